package blockstore

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/durable"
)

// lock takes a repository for this process. The lock is the kernel's and goes
// with the process, however it ends; the file's content only tells others who
// has it.
func lock(dir string, watch *durable.Watcher) (unlock func(), err error) {
	path := filepath.Join(dir, lockFile)
	defer watch.Begin(durable.Opening, &path).End()
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if errors.Is(err, unix.EROFS) || errors.Is(err, os.ErrPermission) {
		return nil, fmt.Errorf("%w; a repository is opened for writing: make it writable, or open a copy of it", err)
	}
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		defer f.Close()
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		who, err := io.ReadAll(io.LimitReader(f, 1024))
		if err != nil || len(who) == 0 {
			who = []byte("another process")
		}
		return nil, &LockedError{Dir: dir, Holder: strings.TrimSpace(string(who))}
	}
	// Not knowing who holds it is no reason to fail: a full disk refuses this.
	if f.Truncate(0) == nil {
		_, _ = f.WriteAt(append(holder(), '\n'), 0)
	}
	return func() {
		defer watch.Begin(durable.Closing, &path).End()
		_ = f.Truncate(0)
		// Closing alone would leave the lock to a child that is just being started and
		// has not yet let go of our files.
		_ = unix.Flock(int(f.Fd()), unix.LOCK_UN)
		_ = f.Close()
	}, nil
}
