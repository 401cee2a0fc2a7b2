package diskfile_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/diskfile"
	"github.com/holdfast-backup/holdfast/image/internal/imgtest"
)

const mib = 1 << 20

// qemuNames are the formats and QEMU's names for them.
var qemuNames = map[diskfile.Format]string{
	diskfile.Raw: "raw", diskfile.QCOW2: "qcow2", diskfile.VMDK: "vmdk",
	diskfile.VHD: "vpc", diskfile.VHDX: "vhdx", diskfile.VDI: "vdi",
}

// open opens an image, found or stated, and says which format it has.
func open(t testing.TB, path string, o diskfile.Options) *diskfile.File {
	t.Helper()
	f, err := diskfile.Open(path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return f
}

// TestSameDisk has QEMU make an image of the same disk in every format.
func TestSameDisk(t *testing.T) {
	t.Parallel()
	want := imgtest.Random(3*mib, 1)
	plain := filepath.Join(t.TempDir(), "plain")
	imgtest.WriteFile(t, plain, want)
	for _, tt := range []struct {
		format  diskfile.Format
		options string
	}{
		{diskfile.Raw, "preallocation=off"},
		{diskfile.QCOW2, "compat=1.1"},
		{diskfile.VMDK, "subformat=monolithicSparse"},
		{diskfile.VMDK, "subformat=monolithicFlat"},
		{diskfile.VMDK, "subformat=streamOptimized"},
		{diskfile.VHD, "subformat=dynamic,force_size=on"},
		{diskfile.VHD, "subformat=fixed,force_size=on"},
		{diskfile.VHDX, "subformat=dynamic"},
		{diskfile.VDI, "static=off"},
	} {
		t.Run(fmt.Sprint(tt.format, tt.options), func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "disk") // a name that gives nothing away
			imgtest.Run(t, "qemu-img", "convert", "-f", "raw", "-O", qemuNames[tt.format], "-o", tt.options, plain, path)
			imgtest.Check(t, open(t, path, diskfile.Options{}), want)
			got := make([]byte, len(want))
			for _, o := range []diskfile.Options{{}, {Format: diskfile.Auto}, {Format: tt.format}} {
				f := open(t, path, o)
				if f.Format() != tt.format || f.Size() != int64(len(want)) {
					t.Errorf("%v: got %v, %d bytes, want %v, %d", o, f.Format(), f.Size(), tt.format, len(want))
				}
				if err := image.ReadFull(f, got, 0); err != nil || !slices.Equal(got, want) {
					t.Errorf("%v: other bytes, error %v", o, err)
				}
			}
		})
	}
}

// TestWrite writes the disk in every format that can be written; QEMU and we
// read it back.
func TestWrite(t *testing.T) {
	t.Parallel()
	want := imgtest.Random(3*mib+512, 2)
	plain := filepath.Join(t.TempDir(), "plain")
	imgtest.WriteFile(t, plain, want)
	for _, format := range []diskfile.Format{diskfile.Raw, diskfile.QCOW2, diskfile.VMDK, diskfile.VHDX} {
		t.Run(string(format), func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			path := filepath.Join(dir, "disk."+string(format))
			var reported atomic.Int64
			o := image.WriteOptions{Progress: func(n int64) { reported.Add(n) }}
			if err := diskfile.Write(t.Context(), path, imgtest.Disk(want), format, o); err != nil {
				t.Fatal(err)
			}
			if reported.Load() != int64(len(want)) {
				t.Errorf("progress: got %d bytes, want %d", reported.Load(), len(want))
			}
			imgtest.Run(t, "qemu-img", "compare", "-f", qemuNames[format], "-F", "raw", path, plain)
			imgtest.Check(t, open(t, path, diskfile.Options{}), want)
			if got, want := list(t, dir), []string{"disk." + string(format)}; !slices.Equal(got, want) {
				t.Errorf("files: got %v, want %v", got, want)
			}

			before, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			err = diskfile.Write(t.Context(), path, imgtest.Disk(want[:mib]), format, image.WriteOptions{})
			after, readErr := os.ReadFile(path)
			if !errors.Is(err, os.ErrExist) || readErr != nil || !slices.Equal(before, after) {
				t.Errorf("the file exists: got %v, %v, want %v and the same file", err, readErr, os.ErrExist)
			}
		})
	}
}

func list(t testing.TB, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// broken is a disk whose reads fail after a while, or do something.
type broken struct {
	image.Disk
	read func() error
}

func (b broken) ReadAt(p []byte, off int64) (int, error) {
	if err := b.read(); err != nil {
		return 0, err
	}
	return b.Disk.ReadAt(p, off)
}

func TestWriteFails(t *testing.T) {
	t.Parallel()
	disk := imgtest.Disk(imgtest.Random(8*mib, 5))
	for _, format := range []diskfile.Format{diskfile.Raw, diskfile.QCOW2, diskfile.VMDK, diskfile.VHDX} {
		dir := t.TempDir()
		path := filepath.Join(dir, "disk")
		boom := errors.New("boom")
		err := diskfile.Write(t.Context(), path, broken{disk, func() error { return boom }}, format, image.WriteOptions{})
		if !errors.Is(err, boom) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: got %v, want %v and the path", format, err, boom)
		}
		ctx, cancel := context.WithCancel(t.Context())
		err = diskfile.Write(ctx, path, broken{disk, func() error { cancel(); return nil }}, format, image.WriteOptions{})
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%s: got %v, want %v", format, err, context.Canceled)
		}
		// Someone else's file of that name appears while the image is written.
		err = diskfile.Write(t.Context(), path, broken{disk, func() error {
			return os.WriteFile(path, []byte("theirs"), 0o600)
		}}, format, image.WriteOptions{})
		if b, readErr := os.ReadFile(path); !errors.Is(err, os.ErrExist) || string(b) != "theirs" || readErr != nil {
			t.Errorf("%s: got %v, %v, file %q, want %v and their file", format, err, readErr, b, os.ErrExist)
		}
		if got, want := list(t, dir), []string{"disk"}; !slices.Equal(got, want) {
			t.Errorf("%s: files: got %v, want %v", format, got, want)
		}
	}
}

func TestWriteRefuses(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	disk := imgtest.Disk(make([]byte, mib))
	link := filepath.Join(dir, "link")
	if err := os.Symlink("nowhere", link); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		path   string
		format diskfile.Format
		want   error
		says   string
	}{
		{filepath.Join(dir, "a"), diskfile.VHD, image.ErrUnsupported, "qcow2, vhdx, vmdk and raw can be written"},
		{filepath.Join(dir, "b"), diskfile.VDI, image.ErrUnsupported, "qcow2, vhdx, vmdk and raw can be written"},
		{filepath.Join(dir, "c"), "", image.ErrUnsupported, "qcow2, vhdx, vmdk and raw can be written"},
		{filepath.Join(dir, "no", "d"), diskfile.Raw, os.ErrNotExist, "no"},
		{dir, diskfile.Raw, os.ErrExist, ""},
		{link, diskfile.Raw, os.ErrExist, ""},
	} {
		err := diskfile.Write(t.Context(), tt.path, disk, tt.format, image.WriteOptions{})
		if !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.says) || !strings.Contains(err.Error(), tt.path) {
			t.Errorf("%s, %q: got %v, want %v with %q", tt.path, tt.format, err, tt.want, tt.says)
		}
	}
	if got, want := list(t, dir), []string{"link"}; !slices.Equal(got, want) {
		t.Errorf("files: got %v, want %v", got, want)
	}
}

func TestDevice(t *testing.T) {
	file := filepath.Join(t.TempDir(), "device")
	if err := os.WriteFile(file, slices.Repeat([]byte{0xff}, 4*mib), 0o600); err != nil {
		t.Fatal(err)
	}
	device := strings.TrimSpace(imgtest.Run(t, "losetup", "--find", "--show", file))
	t.Cleanup(func() {
		if err := exec.Command("losetup", "--detach", device).Run(); err != nil { // the test's context has ended
			t.Errorf("detach %s: %v", device, err)
		}
	})
	want := imgtest.Random(4*mib, 6)
	for _, tt := range []struct {
		format diskfile.Format
		size   int64
	}{{diskfile.QCOW2, mib}, {diskfile.Raw, 4*mib + 512}} {
		if err := diskfile.Write(t.Context(), device, imgtest.Disk(make([]byte, tt.size)), tt.format, image.WriteOptions{}); err == nil {
			t.Errorf("%s of %d bytes: no error", tt.format, tt.size)
		}
	}
	holder, err := os.OpenFile(device, os.O_RDWR|os.O_EXCL, 0)
	if err != nil {
		t.Fatal(err)
	}
	err = diskfile.Write(t.Context(), device, imgtest.Disk(want), diskfile.Raw, image.WriteOptions{})
	if holder.Close(); !errors.Is(err, syscall.EBUSY) {
		t.Errorf("a device in use: got %v, want %v", err, syscall.EBUSY)
	}
	if err := diskfile.Write(t.Context(), device, imgtest.Disk(want), diskfile.Raw, image.WriteOptions{}); err != nil {
		t.Fatal(err)
	}
	imgtest.Check(t, open(t, device, diskfile.Options{}), want)
}

func TestOpenRefuses(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := func(name string, data []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	pipe := filepath.Join(dir, "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	odd := file("odd", make([]byte, 513))
	for _, tt := range []struct {
		path   string
		format diskfile.Format
		want   error
		says   string
	}{
		{filepath.Join(dir, "missing"), "", os.ErrNotExist, ""},
		{dir, "", image.ErrNotImage, "folder"},
		{dir, diskfile.Raw, image.ErrNotImage, "folder"},
		{pipe, "", image.ErrNotImage, "pipe"},
		{"/dev/zero", diskfile.Raw, image.ErrNotImage, ""},
		{file("empty", nil), "", image.ErrNotImage, "empty"},
		{file("empty too", nil), diskfile.Raw, image.ErrNotImage, "empty"},
		{odd, "", image.ErrNotImage, "--format raw"},
		{odd, diskfile.Auto, image.ErrNotImage, "qcow2, vhdx, vmdk, vdi and vhd"},
		{odd, diskfile.QCOW2, image.ErrNotImage, ""},
		{odd, "ova", image.ErrUnsupported, "known are"},
		{file("sectors", make([]byte, 1024)), diskfile.VHDX, image.ErrNotImage, ""},
	} {
		f, err := diskfile.Open(tt.path, diskfile.Options{Format: tt.format})
		if err == nil {
			f.Close()
		}
		if !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.says) ||
			!strings.Contains(err.Error(), tt.path) && tt.format != "ova" {
			t.Errorf("%s as %q: got %v, want %v with %q", tt.path, tt.format, err, tt.want, tt.says)
		}
	}
	if f := open(t, odd, diskfile.Options{Format: diskfile.Raw}); f.Size() != 513 {
		t.Errorf("stated raw: got %d bytes, want 513", f.Size())
	}
}

// chain makes n qcow2 images over a base of the given format, each the
// backing file of the next, and returns the last one's path.
func chain(t testing.TB, dir string, base []byte, format string, n int) string {
	t.Helper()
	below := filepath.Join(dir, "base")
	imgtest.WriteFile(t, below, base)
	if format != "raw" {
		imgtest.Run(t, "qemu-img", "convert", "-f", "raw", "-O", format, below, below+".image")
		below, _ = below+".image", os.Remove(below)
	}
	for i := range n {
		path := filepath.Join(dir, fmt.Sprintf("%d.qcow2", i))
		imgtest.Run(t, "qemu-img", "create", "-f", "qcow2", "-b", filepath.Base(below), "-F", format, path)
		below, format = path, "qcow2"
	}
	return below
}

func TestBacking(t *testing.T) {
	t.Parallel()
	want := imgtest.Random(3*mib, 4)
	for _, format := range []string{"raw", "vmdk", "vhdx", "vdi"} {
		dir := t.TempDir()
		imgtest.Check(t, open(t, chain(t, dir, want, format, 2), diskfile.Options{}), want)
	}
}

// TestChainDepth has the longest chain, one too many, and one that bites its
// own tail.
func TestChainDepth(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	want := imgtest.Random(mib, 4)
	top := chain(t, dir, want, "raw", 32)
	imgtest.Check(t, open(t, filepath.Join(dir, "30.qcow2"), diskfile.Options{}), want)
	if _, err := diskfile.Open(top, diskfile.Options{}); !errors.Is(err, image.ErrUnsupported) || !strings.Contains(err.Error(), "chain") {
		t.Errorf("33 images: got %v, want %v about the chain", err, image.ErrUnsupported)
	}
	imgtest.Run(t, "qemu-img", "rebase", "-u", "-b", "1.qcow2", "-F", "qcow2", filepath.Join(dir, "0.qcow2"))
	if _, err := diskfile.Open(filepath.Join(dir, "1.qcow2"), diskfile.Options{}); !errors.Is(err, image.ErrUnsupported) || !strings.Contains(err.Error(), "loop") {
		t.Errorf("a loop: got %v, want %v about it", err, image.ErrUnsupported)
	}
}

// TestForgedBacking has a guest that wrote the header of an image with a
// backing file outside into its raw disk, which is the backing file of another.
func TestForgedBacking(t *testing.T) {
	t.Parallel()
	outer := t.TempDir()
	dir := filepath.Join(outer, "vm")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	imgtest.WriteFile(t, filepath.Join(outer, "secret"), imgtest.Random(mib, 1))
	forged := filepath.Join(dir, "base")
	imgtest.Run(t, "qemu-img", "create", "-f", "qcow2", "-b", "../secret", "-F", "raw", forged)
	imgtest.Run(t, "qemu-img", "resize", "--shrink", "-f", "raw", forged, "4M")
	top := filepath.Join(dir, "top.qcow2")

	imgtest.Run(t, "qemu-img", "create", "-f", "qcow2", "-b", "base", "-F", "raw", top) // a stated format is kept
	content, err := os.ReadFile(forged)
	if err != nil {
		t.Fatal(err)
	}
	imgtest.Check(t, open(t, top, diskfile.Options{}), content)

	// The format's name is a header extension; without it the format is found.
	edit, err := os.ReadFile(top)
	if err != nil {
		t.Fatal(err)
	}
	at := strings.Index(string(edit), "\xe2\x79\x2a\xca")
	if at < 0 {
		t.Fatal("no backing format in the header: the test is broken")
	}
	edit[at]++ // an unknown extension, which readers pass over
	if err := os.WriteFile(top, edit, 0o600); err != nil {
		t.Fatal(err)
	}
	if f, err := diskfile.Open(top, diskfile.Options{}); !errors.Is(err, image.ErrUnsupported) || !strings.Contains(err.Error(), "outside") {
		t.Errorf("got %v, %v, want %v", f, err, image.ErrUnsupported)
	}
	f := open(t, top, diskfile.Options{AllowOutside: true})
	if _, err := f.ReadAt(make([]byte, 512), 0); err != nil && err != io.EOF {
		t.Error(err)
	}
}
