package vhdx_test

import (
	"bytes"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/internal/imgtest"
	"github.com/holdfast-backup/holdfast/image/vhdx"
)

// mibs returns a disk that has a MiB of the same byte at a few offsets.
func mibs(size int64, data map[int64]byte) image.Disk {
	d := imgtest.Sparse{Bytes: size, Data: map[int64][]byte{}}
	for off, b := range data {
		d.Data[off] = bytes.Repeat([]byte{b}, mib)
	}
	return d
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
		imgtest.ReadInOrder(b, im)
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
	im := open(b, written(b, mibs(64<<40, map[int64]byte{0: 1, 63 << 40: 2})))
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
