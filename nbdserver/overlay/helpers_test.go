package overlay_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"iter"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/internal/durable"
	"github.com/holdfast-backup/holdfast/internal/faultfs"
	"github.com/holdfast-backup/holdfast/nbdserver/overlay"
)

const (
	block = 4096
	page  = 15872 * block // of a page of the map
	kib   = 1 << 10
	mib   = 1 << 20
	tib   = 1 << 40
)

// pattern is a disk of a size whose bytes tell where they are. Of each 64 KiB
// the last 16 are zero.
type pattern int64

func (d pattern) Size() int64 { return int64(d) }

func patternZero(off int64) bool { return off%(64*kib) >= 48*kib }

func (d pattern) ReadAt(p []byte, off int64) (int, error) {
	_, n := image.Clip(off, int64(len(p)), d.Size())
	for i := int64(0); i < n; {
		at := off + i
		var word [8]byte
		if !patternZero(at) {
			binary.LittleEndian.PutUint64(word[:], uint64(at/8+1)*0x9e3779b97f4a7c15)
		}
		i += int64(copy(p[i:n], word[at%8:]))
	}
	if int(n) < len(p) {
		return int(n), io.EOF
	}
	return len(p), nil
}

func (d pattern) Extents(_ context.Context, off, length int64) iter.Seq2[image.Extent, error] {
	off, length = image.Clip(off, length, d.Size())
	return func(yield func(image.Extent, error) bool) {
		for end := off + length; off < end; {
			n := min(16*kib-off%(16*kib), end-off)
			if !yield(image.Extent{Off: off, Len: n, Zero: patternZero(off)}, nil) {
				return
			}
			off += n
		}
	}
}

// noHoles is a file system that cannot punch holes.
type noHoles struct{ durable.FS }

type noHolesFile struct{ durable.File }

func (noHolesFile) PunchHole(int64, int64) error { return errors.ErrUnsupported }

func (f noHoles) OpenWrite(name string) (durable.File, error) {
	file, err := f.FS.OpenWrite(name)
	return noHolesFile{file}, err
}

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func create(t testing.TB, path string, base image.Disk, o overlay.Options) *overlay.Overlay {
	t.Helper()
	ov, err := overlay.Create(path, base, o)
	ok(t, err)
	return ov
}

func open(t testing.TB, path string, base image.Disk, o overlay.Options) *overlay.Overlay {
	t.Helper()
	ov, err := overlay.Open(path, base, o)
	ok(t, err)
	return ov
}

// inMemory returns options with a file system in memory that has the folder /d.
func inMemory() (*faultfs.FS, overlay.Options) {
	fsys := faultfs.New("/d")
	return fsys, options(fsys)
}

// options are those of overlays in a file system in memory.
func options(fsys *faultfs.FS) overlay.Options {
	return overlay.WithBoot(overlay.Options{FS: fsys}, fsys.Boot)
}

func write(t testing.TB, w image.Writer, p []byte, off int64) {
	t.Helper()
	n, err := w.WriteAt(p, off)
	ok(t, err)
	if n != len(p) {
		t.Fatalf("got %d bytes written, want %d", n, len(p))
	}
}

func read(t testing.TB, d image.Disk, off, length int64) []byte {
	t.Helper()
	p := make([]byte, length)
	if n, err := d.ReadAt(p, off); err != nil || n != len(p) {
		t.Fatalf("read %d bytes at %d: got %d, %v", length, off, n, err)
	}
	return p
}

// wantBytes compares what a disk holds at off.
func wantBytes(t testing.TB, d image.Disk, off int64, want []byte) {
	t.Helper()
	got := read(t, d, off, int64(len(want)))
	if bytes.Equal(got, want) {
		return
	}
	for i := range got {
		if got[i] != want[i] {
			t.Fatalf("byte %d: got %#x, want %#x", off+int64(i), got[i], want[i])
		}
	}
}

// collect returns all extents.
func collect(t testing.TB, seq iter.Seq2[image.Extent, error]) []image.Extent {
	t.Helper()
	var all []image.Extent
	for e, err := range seq {
		ok(t, err)
		all = append(all, e)
	}
	return all
}

func wantExtents(t testing.TB, what string, got iter.Seq2[image.Extent, error], want ...image.Extent) {
	t.Helper()
	if got := collect(t, got); !slices.Equal(got, want) {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

func bytesOf(b byte, n int) []byte { return bytes.Repeat([]byte{b}, n) }

// tmpfs mounts a file system in memory of a size such as "8m" until the test ends.
func tmpfs(t *testing.T, size string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "tmpfs")
	ok(t, os.Mkdir(dir, 0o700))
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size="+size, "tmpfs", dir).CombinedOutput(); err != nil {
		t.Fatalf("mount: %v: %s (the test must run as root)", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	})
	return dir
}
