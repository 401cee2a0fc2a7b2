// Package imgtest is what the tests of image formats share: disks with random
// contents, QEMU's view of an image, loops over damaged and truncated images,
// and a check of everything that an [image.Disk] promises.
package imgtest

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/internal/imgfile"
)

const (
	page   = 4 << 10
	sector = 512
)

// Random returns a disk of size bytes: about thirty stretches of data, from
// one sector to a tenth of the disk, the first and the last sector among
// them, and zeros. Half of the data is noise, half can be compressed.
func Random(size int64, seed uint64) []byte {
	source := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	rnd := rand.New(source)
	disk := make([]byte, size)
	fill := func(off, n int64) {
		p := disk[off:min(off+n, size)]
		noise := len(p)
		if rnd.IntN(2) == 0 {
			noise = min(noise, sector) // and the same sector again and again
		}
		_, _ = source.Read(p[:noise]) // never fails
		for done := noise; done < len(p); {
			done += copy(p[done:], p[:done])
		}
	}
	for range 30 {
		longest := max(1, size/10>>rnd.IntN(8))
		fill(rnd.Int64N(size/sector+1)*sector, (1+rnd.Int64N(longest)/sector)*sector)
	}
	fill(0, sector)
	fill(max(0, size-sector), sector)
	return disk
}

// WriteFile writes a file, with holes for its pages of zeros, and returns its
// path.
func WriteFile(t testing.TB, path string, data []byte) string {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := errors.Join(f.Truncate(int64(len(data))), imgfile.WriteSparse(f, data, 0)); err != nil {
		t.Fatal(err)
	}
	return path
}

// ReadFile returns a file's bytes.
func ReadFile(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Edit changes a file's bytes.
func Edit(t testing.TB, path string, change func(b []byte) []byte) {
	t.Helper()
	WriteFile(t, path, change(ReadFile(t, path)))
}

// WriteImage writes d with a format's writer into a new file, whose path it
// returns. The progress reported must be the disk's size.
func WriteImage(t testing.TB, d image.Disk, write func(context.Context, *os.File, image.Disk, image.WriteOptions) error) string {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "written"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var done atomic.Int64
	if err := write(t.Context(), f, d, image.WriteOptions{Progress: func(n int64) { done.Add(n) }}); err != nil {
		t.Fatal(err)
	}
	if done.Load() != d.Size() {
		t.Errorf("progress: got %d bytes, want %d", done.Load(), d.Size())
	}
	return f.Name()
}

// Open opens a file for reading.
func Open(t testing.TB, path string) *os.File {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// Opener is the Open of a format.
type Opener[I image.DiskCloser] func(*os.File, image.OpenOptions) (I, error)

// OpenImage opens the image at path for the test's duration. The file must be
// closed afterwards: at once if open fails, else by the image's Close.
func OpenImage[I image.DiskCloser](t testing.TB, path string, open Opener[I], o image.OpenOptions) (I, error) {
	t.Helper()
	f := Open(t, path)
	closed := func() {
		if _, err := f.Stat(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("%s is still open: %v", path, err)
		}
	}
	d, err := open(f, o)
	if err != nil {
		closed()
		return d, err
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		closed()
	})
	return d, nil
}

// MustOpen opens the image at path, which must work, for the test's duration.
func MustOpen[I image.DiskCloser](t testing.TB, path string, open Opener[I]) I {
	t.Helper()
	d, err := OpenImage(t, path, open, image.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return d
}
