package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/durable"
	"github.com/holdfast-backup/holdfast/internal/guard"
)

// TestProtect: what is protected stays as it is on real file systems, whoever does what, until
// its time is over on the guard's clock.
func TestProtect(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			data, state, m := mounted(t, kind), filepath.Join(t.TempDir(), "state"), newMachine()
			repository(t, data)
			c, stop := started(t, data, state, m)
			files := []string{pointFile, segmentFile}
			protect(t, c, files, 24*time.Hour)
			untouchable(t, data, files)
			release := func() guard.Code { return ask(t, c, guard.Request{Op: guard.Release, Files: files}).Code }
			if got := release(); got != guard.Protected {
				t.Errorf("release at once: got code %q, want %q", got, guard.Protected)
			}
			protect(t, c, files, time.Second) // shortens nothing
			m.pass(time.Hour)
			m.setWall(m.Wall().Add(100 * 365 * 24 * time.Hour))
			if got := release(); got != guard.Protected {
				t.Errorf("release after the clock was moved: got code %q, want %q", got, guard.Protected)
			}
			stop() // and it goes on with what it has promised
			c, _ = started(t, data, state, m)
			if n, err := c.Release(t.Context()); n != 0 || err != nil {
				t.Errorf("release all: got %d %v, want none", n, err)
			}
			untouchable(t, data, files)
			m.pass(23*time.Hour - time.Second)
			if got := release(); got != guard.Protected {
				t.Errorf("release a second before its time: got code %q, want %q", got, guard.Protected)
			}
			m.pass(time.Second)
			if got := release(); got != "" {
				t.Errorf("release at its time: got code %q, want none", got)
			}
			for _, name := range files {
				ok(t, os.Remove(filepath.Join(data, name)))
			}
		})
	}
}

// untouchable holds files against everything that could change or remove them.
func untouchable(t *testing.T, data string, files []string) {
	t.Helper()
	for _, name := range files {
		path := filepath.Join(data, name)
		_, openErr := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
		for op, err := range map[string]error{
			"write":    openErr,
			"truncate": os.Truncate(path, 0),
			"remove":   os.Remove(path),
			"rename":   os.Rename(path, path+"x"),
			"replace":  os.Rename(filepath.Join(data, otherFile), path),
			"link":     os.Link(path, path+"x"),
			"chmod":    os.Chmod(path, 0o777),
			"chown":    os.Chown(path, 1, 1),
			"xattr":    unix.Setxattr(path, "user.x", []byte("x"), 0),
		} {
			if !errors.Is(err, unix.EPERM) {
				t.Errorf("%s %s: got %v, want EPERM", op, name, err)
			}
		}
		if got, err := durable.OS().Immutable(path); !got || err != nil {
			t.Errorf("%s: got immutable %v %v, want true", name, got, err)
		}
		if got, err := os.ReadFile(path); string(got) != name || err != nil {
			t.Errorf("%s: got content %q %v", name, got, err)
		}
	}
}

func TestNoAttribute(t *testing.T) {
	t.Parallel()
	data := mounted(t, "ramfs")
	repository(t, data)
	c, _ := started(t, data, filepath.Join(t.TempDir(), "state"), newMachine())
	if got := codeOf(t, c.Protect(t.Context(), []string{pointFile}, time.Hour)); got != guard.Unsupported {
		t.Errorf("protect: got code %q, want %q", got, guard.Unsupported)
	}
	if got := ask(t, c, guard.Request{Op: guard.Status}).Protected; got != 0 {
		t.Errorf("status: got %d protected files, want 0", got)
	}
	ok(t, os.Remove(filepath.Join(data, pointFile)))
}

// TestOpenForWriting: a file that can still be written to is immutable, but not called so.
func TestOpenForWriting(t *testing.T) {
	t.Parallel()
	data := mounted(t, "xfs") // where the attribute does not stop who has it open
	repository(t, data)
	c, _ := started(t, data, filepath.Join(t.TempDir(), "state"), newMachine())
	f, err := os.OpenFile(filepath.Join(data, segmentFile), os.O_RDWR, 0)
	ok(t, err)
	if got := codeOf(t, c.Protect(t.Context(), []string{segmentFile}, time.Hour)); got != guard.Busy {
		t.Errorf("while it is open: got code %q, want %q", got, guard.Busy)
	}
	ok(t, f.Close())
	protect(t, c, []string{segmentFile}, time.Hour)
	untouchable(t, data, []string{segmentFile})
}

// TestForeignFiles: nothing but plain files of the repository is touched, whatever stands in
// its folder.
func TestForeignFiles(t *testing.T) {
	t.Parallel()
	data := mounted(t, "ext4")
	repository(t, data)
	ok(t, os.Mkdir(filepath.Join(data, "outside"), 0o700))
	victim := filepath.Join(data, "outside", "victim")
	ok(t, os.WriteFile(victim, nil, 0o600))
	path := filepath.Join(data, segmentFile)
	for name, place := range map[string]func() error{
		"symbolic link":   func() error { return os.Symlink(victim, path) },
		"relative link":   func() error { return os.Symlink("../outside/victim", path) },
		"link to nothing": func() error { return os.Symlink("nothing", path) },
		"hard link":       func() error { return os.Link(victim, path) },
		"folder":          func() error { return os.Mkdir(path, 0o700) },
		"FIFO":            func() error { return unix.Mkfifo(path, 0o600) },
		"device":          func() error { return unix.Mknod(path, unix.S_IFCHR|0o600, 1<<8|3) },
		"socket":          func() error { return unix.Mknod(path, unix.S_IFSOCK|0o600, 0) },
		"another user's file": func() error {
			return errors.Join(os.WriteFile(path, nil, 0o600), os.Chown(path, 1, 1))
		},
		"file system": func() error {
			return errors.Join(os.WriteFile(path, nil, 0o600), unix.Mount("/dev/null", path, "", unix.MS_BIND, ""))
		},
	} {
		ok(t, os.Remove(path))
		ok(t, place())
		c, stop := started(t, data, filepath.Join(t.TempDir(), "state"), newMachine())
		for _, op := range []guard.Op{guard.Protect, guard.Status} {
			r := guard.Request{Op: op, Files: []string{pointFile, segmentFile}}
			if op == guard.Protect {
				r.Seconds = 3600
			}
			if got := ask(t, c, r).Code; got != guard.Invalid {
				t.Errorf("%s of a %s: got code %q, want %q", op, name, got, guard.Invalid)
			}
		}
		stop()
		for _, path := range []string{victim, filepath.Join(data, pointFile)} {
			if got, err := durable.OS().Immutable(path); got || err != nil {
				t.Errorf("after a %s: got %s immutable %v %v, want false", name, path, got, err)
			}
		}
		if name == "file system" {
			ok(t, unix.Unmount(path, 0))
		}
	}
}

// TestFolderIsMoved: a folder above protected files can be moved, and they are still
// what they were.
func TestFolderIsMoved(t *testing.T) {
	t.Parallel()
	data, m := mounted(t, "ext4"), newMachine()
	repository(t, data)
	c, _ := started(t, data, filepath.Join(t.TempDir(), "state"), m)
	protect(t, c, []string{segmentFile, pointFile}, time.Hour)
	moved := filepath.Join(data, "moved")
	ok(t, os.Rename(filepath.Join(data, "segments"), moved))
	ok(t, os.Symlink(moved, filepath.Join(data, "segments")))
	m.pass(time.Hour)
	if n, err := c.Release(t.Context()); n != 2 || err != nil {
		t.Errorf("release all: got %d %v, want 2", n, err)
	}
	if got, err := durable.OS().Immutable(filepath.Join(moved, filepath.Base(segmentFile))); !got || err != nil {
		t.Errorf("moved file: got immutable %v %v, want true", got, err)
	}
	ok(t, os.Remove(filepath.Join(data, pointFile)))
}

// TestReleaseIsDurable: a loss of power brings no attribute back that the guard has
// forgotten.
func TestReleaseIsDurable(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{"ext4", "xfs"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			data, m := mounted(t, kind), newMachine()
			repository(t, data)
			c, stop := started(t, data, filepath.Join(t.TempDir(), "state"), m)
			protect(t, c, []string{pointFile}, time.Hour)
			command(t, "sync", "-f", data)
			m.pass(time.Hour)
			if n, err := c.Release(t.Context()); n != 1 || err != nil {
				t.Fatalf("release: got %d %v, want 1", n, err)
			}
			loseFileSystem(t, data)
			stop()
			remount(t, data)
			if got, err := durable.OS().Immutable(filepath.Join(data, pointFile)); got || err != nil {
				t.Errorf("after a loss of power: got immutable %v %v, want false", got, err)
			}
		})
	}
}

// loseFileSystem ends a file system as a loss of power does: what its journal has not
// written is lost. Source: ext4's and XFS's ioctl GOINGDOWN with NOLOGFLUSH.
func loseFileSystem(t *testing.T, dir string) {
	t.Helper()
	const goingDown, noLogFlush = 0x8004587d, 2
	f, err := os.Open(dir)
	ok(t, err)
	defer f.Close()
	ok(t, unix.IoctlSetPointerInt(int(f.Fd()), goingDown, noLogFlush))
}

// remount mounts a file system again that was lost.
func remount(t *testing.T, dir string) {
	t.Helper()
	device, err := exec.Command("findmnt", "-n", "-o", "SOURCE", dir).Output()
	ok(t, err)
	image, err := exec.Command("losetup", "-n", "-O", "BACK-FILE", strings.TrimSpace(string(device))).Output()
	ok(t, err)
	command(t, "umount", dir)
	command(t, "mount", "-o", "loop", strings.TrimSpace(string(image)), dir)
}
