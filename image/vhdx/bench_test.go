package vhdx_test

import (
	"context"
	"io"
	"iter"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/internal/imgtest"
	"github.com/holdfast-backup/holdfast/image/vhdx"
)

// sparse is a disk that has a MiB of the same byte at a few offsets, which are
// multiples of a MiB, and zeros elsewhere.
type sparse struct {
	size int64
	data map[int64]byte
}

func (s sparse) Size() int64 { return s.size }

func (s sparse) ReadAt(p []byte, off int64) (int, error) {
	for i := range p {
		at := off + int64(i)
		p[i] = s.data[at-at%mib]
	}
	return len(p), nil
}

func (s sparse) Extents(context.Context, int64, int64) iter.Seq2[image.Extent, error] {
	return func(yield func(image.Extent, error) bool) {
		at := int64(0)
		for _, off := range slices.Sorted(maps.Keys(s.data)) {
			if off > at && !yield(image.Extent{Off: at, Len: off - at, Zero: true}, nil) ||
				!yield(image.Extent{Off: off, Len: mib}, nil) {
				return
			}
			at = off + mib
		}
		if at < s.size {
			yield(image.Extent{Off: at, Len: s.size - at, Zero: true}, nil)
		}
	}
}

func benchDisk() []byte {
	disk := make([]byte, 256*mib)
	source := rand.NewChaCha8([32]byte{})
	_, _ = source.Read(disk)
	return disk
}

func BenchmarkRead(b *testing.B) {
	im := open(b, written(b, imgtest.Disk(benchDisk())))
	b.Run("sequential", func(b *testing.B) {
		buf := make([]byte, mib)
		b.SetBytes(im.Size())
		b.ReportAllocs()
		for b.Loop() {
			if _, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, io.NewSectionReader(im, 0, im.Size()), buf); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("random4k", func(b *testing.B) {
		b.SetBytes(4096)
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			buf := make([]byte, 4096)
			for pb.Next() {
				if _, err := im.ReadAt(buf, rand.Int64N(im.Size()/4096)*4096); err != nil && err != io.EOF {
					b.Error(err)
					return
				}
			}
		})
	})
}

// BenchmarkExtents walks the map of a disk of 64 TiB that is nearly empty.
func BenchmarkExtents(b *testing.B) {
	im := open(b, written(b, sparse{size: 64 << 40, data: map[int64]byte{0: 1, 63 << 40: 2}}))
	for b.Loop() {
		for _, err := range im.Extents(b.Context(), 0, im.Size()) {
			if err != nil {
				b.Fatal(err)
			}
		}
	}
}

func BenchmarkWrite(b *testing.B) {
	disk := imgtest.Disk(benchDisk())
	path := filepath.Join(b.TempDir(), "disk.vhdx")
	b.SetBytes(disk.Size())
	b.ReportAllocs()
	for b.Loop() {
		f, err := os.Create(path)
		if err != nil {
			b.Fatal(err)
		}
		if err := vhdx.Write(b.Context(), f, disk, image.WriteOptions{}); err != nil {
			b.Fatal(err)
		}
		f.Close()
	}
}
