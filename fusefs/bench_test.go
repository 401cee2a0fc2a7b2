package fusefs_test

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// BenchmarkRead reads a disk in memory through a mount, and for comparison a plain file on the machine's disk.
// "cold" drops the kernel's cache before each pass.
func BenchmarkRead(b *testing.B) {
	disk := newDisk(64*mib, 0, 64*mib)
	m, _ := mount(b, oneDisk(disk))
	for _, file := range []struct{ name, path string }{
		{"mount", filepath.Join(m.Dir(), diskPath)},
		{"plain", writeTemp(b, disk.data)},
	} {
		b.Run("sequential-1M-cold/"+file.name, func(b *testing.B) { readAll(b, file.path, true) })
		b.Run("sequential-1M-cached/"+file.name, func(b *testing.B) { readAll(b, file.path, false) })
		b.Run("random-4K-direct/"+file.name, func(b *testing.B) { readRandom(b, file.path, 1) })
		b.Run("random-4K-direct-16/"+file.name, func(b *testing.B) { readRandom(b, file.path, 16) })
	}
}

func readAll(b *testing.B, path string, cold bool) {
	f := open(b, path)
	if err := f.Sync(); err != nil { // dirty pages cannot be dropped from the cache
		b.Fatal(err)
	}
	p := make([]byte, mib)
	b.SetBytes(64 * mib)
	for b.Loop() {
		if cold {
			if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
				b.Fatal(err)
			}
		}
		for off := int64(0); off < 64*mib; off += mib {
			if _, err := f.ReadAt(p, off); err != nil {
				b.Fatal(err)
			}
		}
	}
}

// readRandom reads with that many requests at a time for each processor.
func readRandom(b *testing.B, path string, depth int) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	b.SetBytes(4096)
	b.SetParallelism(depth)
	read := func(p []byte) {
		if _, err := f.ReadAt(p, rand.Int64N(64*mib/4096)*4096); err != nil {
			b.Error(err)
		}
	}
	if depth == 1 {
		p := aligned()
		for b.Loop() {
			read(p)
		}
		return
	}
	b.RunParallel(func(pb *testing.PB) {
		p := aligned()
		for pb.Next() {
			read(p)
		}
	})
}

// aligned returns a buffer of a page at the start of one, as direct reads want it.
func aligned() []byte {
	p, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		panic(err)
	}
	return p
}
