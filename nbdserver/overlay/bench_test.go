package overlay_test

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/holdfast-backup/holdfast/nbdserver/overlay"
)

// file is what a plain file and an overlay have in common.
type file interface {
	ReadAt(p []byte, off int64) (int, error)
	WriteAt(p []byte, off int64) (int, error)
}

// BenchmarkRandom4K compares an overlay with a plain sparse file: blocks of 4 KiB at
// random places of 1 GiB, from the page cache.
func BenchmarkRandom4K(b *testing.B) {
	const size = 1 << 30
	for _, kind := range []string{"file", "overlay"} {
		for _, op := range []string{"first write", "overwrite", "read"} {
			b.Run(op+"/"+kind, func(b *testing.B) {
				path := filepath.Join(b.TempDir(), kind)
				var f file
				if kind == "file" {
					plain, err := os.Create(path)
					ok(b, err)
					defer plain.Close()
					ok(b, plain.Truncate(size))
					f = plain
				} else {
					ov := create(b, path, pattern(size), overlay.Options{})
					defer ov.Close()
					f = ov
				}
				const region = size / 8 // what is written before, for others than the first write
				buf := bytesOf(1, mib)
				for off := int64(0); op != "first write" && off < region; off += mib {
					_, err := f.WriteAt(buf, off)
					ok(b, err)
				}
				rng := rand.New(rand.NewPCG(1, 2))
				buf = buf[:block]
				b.SetBytes(block)
				b.ReportAllocs()
				n := int64(0)
				for b.Loop() {
					off := rng.Int64N(region/block) * block
					var err error
					switch op {
					case "read":
						_, err = f.ReadAt(buf, off)
					case "overwrite":
						_, err = f.WriteAt(buf, off)
					default: // each block once, in no order, then again
						_, err = f.WriteAt(buf, n*40503%(size/block)*block)
						n++
					}
					ok(b, err)
				}
			})
		}
	}
}
