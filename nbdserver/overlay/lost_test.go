package overlay_test

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/faultfs"
	"github.com/holdfast-backup/holdfast/nbdserver/overlay"
)

// TestFileSystemLost has the file system stop in every operation in turn and lose what
// was not synced, while the machine goes on: the log is of this boot.
func TestFileSystemLost(t *testing.T) {
	t.Parallel()
	disk := pattern(crashSize)
	boot := func() ([16]byte, error) { return [16]byte{1}, nil }
	for n := 1; ; n += 2 {
		fsys, o := inMemory()
		r := &crashRun{model: newModel(t, disk), disk: disk, o: overlay.WithBoot(o, boot), fsys: fsys}
		fsys.Fail(faultfs.Fault{N: n, Forever: true})
		r.run(t)
		hit := fsys.Hit()
		fsys.Fail(faultfs.Fault{})
		for loss := range faultfs.Loss(5) {
			after := fsys.PowerLoss(loss + faultfs.Loss(n*100))
			o := overlay.WithBoot(options(after), boot)
			o.Log = slog.New(slog.DiscardHandler)
			ov, err := overlay.Open(crashPath, disk, o)
			if err != nil && !r.created {
				continue
			}
			ok(t, err)
			r.model.clone().check(t, ov, true)
			ok(t, ov.Close())
			if t.Failed() {
				t.Fatalf("lost after operation %d, seed %d", n, loss)
			}
		}
		if !hit {
			return
		}
	}
}

// syncLog is the kernel that writes the log back.
func syncLog(t *testing.T, fsys *faultfs.FS) {
	t.Helper()
	f, err := fsys.OpenWrite("/d/o.log")
	ok(t, err)
	ok(t, errors.Join(f.Sync(), f.Close(), fsys.SyncDir("/d")))
}

// TestLogOutlivesData finds a log whose data are lost, and one that is older than what
// was synced: neither is believed, and the first is told.
func TestLogOutlivesData(t *testing.T) {
	t.Parallel()
	disk := pattern(mib + 1000)
	boot := func() ([16]byte, error) { return [16]byte{1}, nil }
	for _, tt := range []struct {
		name   string
		change func(t *testing.T, ov *overlay.Overlay, fsys *faultfs.FS)
		told   bool
	}{
		{"unsynced", func(t *testing.T, ov *overlay.Overlay, fsys *faultfs.FS) {
			write(t, ov, bytesOf(2, sector), 16*block)
			syncLog(t, fsys)
		}, true},
		{"the last block", func(t *testing.T, ov *overlay.Overlay, fsys *faultfs.FS) {
			write(t, ov, bytesOf(2, 10), mib+10)
			syncLog(t, fsys)
		}, true},
		{"one of several", func(t *testing.T, ov *overlay.Overlay, fsys *faultfs.FS) {
			write(t, ov, bytesOf(2, block), 16*block)
			f, err := fsys.OpenWrite("/d/o")
			ok(t, err)
			ok(t, errors.Join(f.Sync(), f.Close()))
			write(t, ov, bytesOf(2, block), 17*block)
			ok(t, ov.Zero(0, block))
			syncLog(t, fsys)
		}, true},
		{"synced since", func(t *testing.T, ov *overlay.Overlay, fsys *faultfs.FS) {
			ok(t, ov.Zero(0, block))
			syncLog(t, fsys)
			write(t, ov, bytesOf(1, block), 0)
			ok(t, ov.Sync())
		}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			fsys, o := inMemory()
			ov := create(t, "/d/o", disk, overlay.WithBoot(o, boot))
			write(t, ov, bytesOf(1, block), 0)
			ok(t, ov.Sync())
			tt.change(t, ov, fsys)
			after := fsys.PowerLoss(faultfs.LoseAll)
			var told bytes.Buffer
			o = overlay.WithBoot(options(after), boot)
			o.Log = slog.New(slog.NewTextHandler(&told, nil))
			ov = open(t, "/d/o", disk, o)
			wantBytes(t, ov, 0, bytesOf(1, block))
			wantBytes(t, ov, 18*block, read(t, disk, 18*block, 10*block))
			for _, b := range []int64{16, 17} { // what reached the disk may be there
				got := read(t, ov, b*block, block)
				if want := read(t, disk, b*block, block); !bytes.Equal(got, want) {
					t.Errorf("block %d: got %x…, want %x…", b, got[:4], want[:4])
				}
			}
			wantBytes(t, ov, mib, read(t, disk, mib, 1000))
			if got := strings.Contains(told.String(), "/d/o"); got != tt.told {
				t.Errorf("got %q logged, want something %v", told.String(), tt.told)
			}
			ok(t, ov.Close())
		})
	}
}

// TestNoRoomInSync has a write of each Sync find no room: nothing is lost, and
// the next Sync does what is left.
func TestNoRoomInSync(t *testing.T) {
	t.Parallel()
	disk := pattern(crashSize)
	for n := 1; ; n++ {
		fsys, o := inMemory()
		ov := create(t, "/d/o", disk, o)
		write(t, ov, bytesOf(1, block), block)
		ok(t, ov.Sync())
		write(t, ov, bytesOf(2, 10), 5*block)
		write(t, ov, bytesOf(2, 10), page)
		ok(t, ov.Zero(block, block))
		contents := func(ov *overlay.Overlay) []byte {
			return append(read(t, ov, 0, 10*block), read(t, ov, page-block, 2*block)...)
		}
		want := contents(ov)
		fsys.Fail(faultfs.Fault{Kinds: faultfs.Write | faultfs.Truncate, N: n, Err: syscall.ENOSPC})
		err := ov.Sync()
		if !fsys.Hit() {
			ok(t, err)
			return
		}
		if !errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EIO) {
			t.Fatalf("write %d: got %v, want %v", n, err, syscall.ENOSPC)
		}
		if !bytes.Equal(contents(ov), want) {
			t.Errorf("write %d: other content after the sync", n)
		}
		write(t, ov, bytesOf(3, 10), 9*block)
		want = contents(ov)
		if n%2 == 0 {
			ov = open(t, "/d/o", disk, o) // the process is killed
			if !bytes.Equal(contents(ov), want) {
				t.Errorf("write %d: other content after a kill", n)
			}
		}
		ok(t, ov.Sync())
		ov = open(t, "/d/o", disk, options(fsys.PowerLoss(faultfs.LoseAll)))
		if !bytes.Equal(contents(ov), want) {
			t.Errorf("write %d: other content after the next sync", n)
		}
	}
}

// TestFilledByOthers has no room left after the last write that was answered.
func TestFilledByOthers(t *testing.T) {
	t.Parallel()
	fsys, o := inMemory()
	o.Reserve = 1
	disk := pattern(crashSize)
	ov := create(t, "/d/o", disk, o)
	write(t, ov, bytesOf(1, block), page-block)
	write(t, ov, bytesOf(1, 10), page+block)
	ok(t, ov.Zero(2*page, block))
	fsys.SetSize(1) // it is full
	if _, err := ov.WriteAt(bytesOf(1, block), 9*block); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("got %v, want %v", err, syscall.ENOSPC)
	}
	last, zeros := read(t, ov, page-block, 3*block), read(t, ov, 2*page, 2*block)
	ok(t, ov.Sync())
	ov = open(t, "/d/o", disk, options(fsys.PowerLoss(faultfs.LoseAll)))
	wantBytes(t, ov, page-block, last)
	wantBytes(t, ov, 2*page, zeros)
}

// TestDeadFileSystem names the log in the error of a Sync that could not empty it.
func TestDeadFileSystem(t *testing.T) {
	t.Parallel()
	fsys, o := inMemory()
	ov := create(t, "/d/o", pattern(mib), o)
	write(t, ov, bytesOf(1, block), block)
	fsys.Fail(faultfs.Fault{N: 1, Forever: true})
	for range 2 {
		if err := ov.Sync(); !errors.Is(err, syscall.EIO) || !strings.Contains(err.Error(), "/d/o.log could not be emptied") {
			t.Errorf("got %v", err)
		}
	}
}

// TestEmpty tells an overlay that nobody changed.
func TestEmpty(t *testing.T) {
	t.Parallel()
	for _, size := range []int64{0, mib, crashSize} {
		fsys, o := inMemory()
		disk := pattern(size)
		ov := create(t, "/d/o", disk, o)
		_ = read(t, ov, 0, min(size, mib))
		ok(t, ov.Sync())
		if !ov.Empty() {
			t.Error("a new one is not empty")
		}
		if size == 0 {
			continue
		}
		fsys.Fail(faultfs.Fault{Kinds: faultfs.Write, N: 2, Err: syscall.ENOSPC})
		if _, err := ov.WriteAt([]byte{1}, 0); err == nil || !fsys.Hit() || !ov.Empty() {
			t.Errorf("after a write that failed with %v: got empty %v", err, ov.Empty())
		}
		ok(t, ov.Close())
		ov = open(t, "/d/o", disk, o)
		if !ov.Empty() {
			t.Error("opened again, it is not empty")
		}
		ok(t, ov.Zero(size-1, 1))
		ok(t, ov.Trim(0, size))
		if ov.Empty() || ov.Used() != 0 {
			t.Errorf("trimmed: got empty %v, %d bytes used", ov.Empty(), ov.Used())
		}
	}
}

// loop mounts a new ext4 of some MiB until the test ends, and returns its folder and how
// to mount it anew.
func loop(t *testing.T, size int64) (dir string, again func()) {
	t.Helper()
	image := filepath.Join(t.TempDir(), "image")
	dir = filepath.Join(t.TempDir(), "ext4")
	ok(t, os.WriteFile(image, nil, 0o600))
	ok(t, errors.Join(os.Truncate(image, size*mib), os.Mkdir(dir, 0o700)))
	run := func(args ...string) error {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("%v: %w: %s (the test must run as root, with loop devices)", args, err, out)
		}
		return nil
	}
	ok(t, run("mkfs.ext4", "-q", image))
	mount := func() { ok(t, run("mount", "-o", "loop", image, dir)) }
	umount := func() error { return run("umount", dir) }
	mount()
	t.Cleanup(func() {
		// A test that failed may have files open, until its process ends.
		if err := run("umount", "--lazy", dir); err != nil {
			t.Error(err)
		}
	})
	return dir, func() {
		ok(t, umount())
		mount()
	}
}

// TestShutDown has a real file system shut down after an error, once the kernel has
// written the log back and before it does so for the data, and mounts it anew.
func TestShutDown(t *testing.T) {
	t.Parallel()
	dir, again := loop(t, 64)
	path := filepath.Join(dir, "overlay")
	disk := pattern(mib)
	ov := create(t, path, disk, overlay.Options{})
	write(t, ov, bytesOf(1, sector), 16*block)
	f, err := os.OpenFile(path+".log", os.O_RDWR, 0)
	ok(t, err)
	ok(t, f.Sync())
	// Source: ext4.h, EXT4_IOC_SHUTDOWN; 2 flushes no journal.
	ok(t, unix.IoctlSetPointerInt(int(f.Fd()), 0x8004587d, 2))
	ok(t, f.Close())
	if err := ov.Close(); !errors.Is(err, syscall.EIO) || !strings.Contains(err.Error(), path+".log could not be emptied") {
		t.Errorf("got %v, want %v and what to do", err, syscall.EIO)
	}
	again()
	if info, err := os.Stat(path + ".log"); err != nil || info.Size() == 0 {
		t.Fatalf("the log is lost, too: got %v", err)
	}
	ov = open(t, path, disk, overlay.Options{})
	wantBytes(t, ov, 0, read(t, disk, 0, mib))
	ok(t, ov.Close())
}

// TestFilledDisk fills a real file system behind an overlay's back.
func TestFilledDisk(t *testing.T) {
	t.Parallel()
	dir, again := loop(t, 64)
	path := filepath.Join(dir, "overlay")
	disk := pattern(page + mib)
	ov := create(t, path, disk, overlay.Options{})
	write(t, ov, bytesOf(1, block), page-block)
	write(t, ov, bytesOf(2, 10), page+block)
	f, err := os.Create(filepath.Join(dir, "other"))
	ok(t, err)
	for size := mib; size >= sector; {
		if _, err := f.Write(make([]byte, size)); err != nil {
			size /= 2
		}
	}
	ok(t, f.Close())
	want := read(t, ov, page-block, 3*block)
	ok(t, ov.Close())
	again()
	ov = open(t, path, disk, overlay.Options{})
	wantBytes(t, ov, page-block, want)
	ok(t, ov.Close())
}
