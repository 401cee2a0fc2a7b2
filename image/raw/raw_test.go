package raw_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/internal/imgtest"
	"github.com/holdfast-backup/holdfast/image/raw"
)

const mib = 1 << 20

func open(t testing.TB, path string) *raw.Image {
	t.Helper()
	return imgtest.MustOpen(t, path, raw.Open)
}

func TestRead(t *testing.T) {
	t.Parallel()
	for _, size := range []int64{0, 1, 511, 3*mib + 7, 20 * mib} {
		path := filepath.Join(t.TempDir(), "disk")
		want := imgtest.Random(size, uint64(size))
		imgtest.WriteFile(t, path, want)
		im := open(t, path)
		imgtest.Check(t, im, want)
		if size == 20*mib { // QEMU shows sizes rounded to sectors
			if got, want := imgtest.Extents(t, im, 0, size), imgtest.QEMUMap(t, "raw", path); !slices.Equal(got, want) {
				t.Errorf("extents: got %v, want %v", got, want)
			}
		}
	}
}

func TestShrinks(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "disk")
	for _, tail := range []byte{0, 1} { // the part that goes is a hole, or data
		disk := bytes.Repeat([]byte{1}, mib)
		imgtest.WriteFile(t, path, append(disk, bytes.Repeat([]byte{tail}, mib)...))
		im := open(t, path)
		if err := os.Truncate(path, mib); err != nil {
			t.Fatal(err)
		}
		if _, err := im.ReadAt(make([]byte, 2*mib), 0); !errors.Is(err, image.ErrCorrupt) {
			t.Errorf("read: got %v, want %v", err, image.ErrCorrupt)
		}
		var last error
		for _, err := range im.Extents(t.Context(), 0, im.Size()) {
			last = err
		}
		if !errors.Is(last, image.ErrCorrupt) {
			t.Errorf("extents: got %v, want %v", last, image.ErrCorrupt)
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	t.Parallel()
	for _, path := range []string{t.TempDir(), "/dev/zero"} {
		if _, err := raw.Open(imgtest.Open(t, path), image.OpenOptions{}); !errors.Is(err, image.ErrUnsupported) {
			t.Errorf("%s: got %v, want %v", path, err, image.ErrUnsupported)
		}
	}
}

func TestWrite(t *testing.T) {
	t.Parallel()
	for _, size := range []int64{0, 5, 20*mib + 512} {
		path := filepath.Join(t.TempDir(), "disk")
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		want := imgtest.Random(size, 3)
		var reported atomic.Int64
		err = raw.Write(t.Context(), f, imgtest.Disk(want), image.WriteOptions{Progress: func(n int64) { reported.Add(n) }})
		if err != nil {
			t.Fatal(err)
		}
		im := open(t, path)
		imgtest.Check(t, im, want)
		if reported.Load() != size {
			t.Errorf("progress: got %d bytes, want %d", reported.Load(), size)
		}
		// No page of zeros takes space.
		if got, want := imgtest.Extents(t, im, 0, size), imgtest.Extents(t, imgtest.Disk(want), 0, size); !slices.Equal(got, want) {
			t.Errorf("extents: got %v, want %v", got, want)
		}
	}
}

func TestWriteCancelled(t *testing.T) {
	t.Parallel()
	f, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := raw.Write(ctx, f, imgtest.Disk(imgtest.Random(mib, 1)), image.WriteOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
}

// loopDevice returns a block device of size bytes that are all 0xff.
func loopDevice(t *testing.T, size int) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "device")
	if err := os.WriteFile(file, bytes.Repeat([]byte{0xff}, size), 0o600); err != nil {
		t.Fatal(err)
	}
	device := strings.TrimSpace(imgtest.Run(t, "losetup", "--find", "--show", file))
	t.Cleanup(func() {
		// The test's own context has ended here.
		if err := exec.Command("losetup", "--detach", device).Run(); err != nil {
			t.Errorf("detach %s: %v", device, err)
		}
	})
	return device
}

func TestDevice(t *testing.T) {
	const size = 8 * mib
	device := loopDevice(t, size)
	f, err := os.OpenFile(device, os.O_RDWR|os.O_EXCL, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()

	if err := raw.Write(t.Context(), f, imgtest.Disk(make([]byte, size+512)), image.WriteOptions{}); err == nil {
		t.Error("a disk larger than the device was written")
	}
	// Zeros in front, in the middle, and at an end inside a sector; what is
	// behind the disk stays.
	disk := make([]byte, size-mib-100)
	copy(disk[mib+5:], "data")
	copy(disk[4*mib:], "more data")
	if err := raw.Write(t.Context(), f, imgtest.Disk(disk), image.WriteOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	want := append(disk, bytes.Repeat([]byte{0xff}, mib+100)...)
	im := open(t, device)
	imgtest.Check(t, im, want)
	if got, want := imgtest.Extents(t, im, 0, size), []image.Extent{{Off: 0, Len: size}}; !slices.Equal(got, want) {
		t.Errorf("extents: got %v, want %v", got, want)
	}
}
