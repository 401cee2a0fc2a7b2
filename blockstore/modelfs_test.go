package blockstore

import (
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/holdfast-backup/holdfast/internal/durable"
	"github.com/holdfast-backup/holdfast/internal/faultfs"
)

// flakyFS is the operating system's file system, of which one change fails now and then,
// and all from a moment on, as those of a process that was killed.
type flakyFS struct {
	durable.FS
	hits atomic.Int64 // changes that failed

	// alive is held, shared, in every change, and by kill.
	alive sync.RWMutex
	dead  bool

	mu     sync.Mutex // guards the fields below
	left   int        // changes until one fails; 0 is none
	err    error
	effect faultfs.Effect
}

// arm has the n-th change from now fail, with an effect all the same; 0 has none.
func (f *flakyFS) arm(n int, err error, effect faultfs.Effect) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.left, f.err, f.effect = n, err, effect
}

// kill has no change that begins from now on do anything; those that had begun are done.
func (f *flakyFS) kill() {
	f.alive.Lock()
	defer f.alive.Unlock()
	f.dead = true
}

// step counts a change. Unless the error is nil the change fails, with that effect.
func (f *flakyFS) step(op, name string) (faultfs.Effect, error) {
	if f.dead {
		return faultfs.Nothing, &os.PathError{Op: op, Path: name, Err: fmt.Errorf("killed: %w", syscall.EIO)}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.left == 0 {
		return faultfs.Whole, nil
	}
	if f.left--; f.left > 0 {
		return faultfs.Whole, nil
	}
	f.hits.Add(1)
	return f.effect, &os.PathError{Op: op, Path: name, Err: fmt.Errorf("injected: %w", f.err)}
}

// change does a change, unless it is to fail without effect.
func (f *flakyFS) change(op, name string, do func() error) error {
	f.alive.RLock()
	defer f.alive.RUnlock()
	effect, failed := f.step(op, name)
	if effect == faultfs.Whole {
		if err := do(); err != nil {
			return err
		}
	}
	return failed
}

func (f *flakyFS) Create(name string) (file durable.File, err error) {
	err = f.change("create", name, func() (err error) {
		file, err = f.FS.Create(name)
		return err
	})
	if err != nil {
		if file != nil {
			_ = file.Close()
		}
		return nil, err
	}
	return &flakyFile{file, f}, nil
}

func (f *flakyFS) OpenWrite(name string) (durable.File, error) {
	file, err := f.FS.OpenWrite(name)
	if err != nil {
		return nil, err
	}
	return &flakyFile{file, f}, nil
}

func (f *flakyFS) Rename(oldName, newName string) error {
	return f.change("rename", oldName, func() error { return f.FS.Rename(oldName, newName) })
}

func (f *flakyFS) Remove(name string) error {
	return f.change("remove", name, func() error { return f.FS.Remove(name) })
}

func (f *flakyFS) Mkdir(name string) error {
	return f.change("mkdir", name, func() error { return f.FS.Mkdir(name) })
}

func (f *flakyFS) SyncDir(name string) error {
	return f.change("syncdir", name, func() error { return f.FS.SyncDir(name) })
}

type flakyFile struct {
	durable.File
	fs *flakyFS
}

func (f *flakyFile) WriteAt(p []byte, off int64) (int, error) {
	f.fs.alive.RLock()
	defer f.fs.alive.RUnlock()
	effect, failed := f.fs.step("write", f.Name())
	n := len(p)
	switch effect {
	case faultfs.Nothing:
		return 0, failed
	case faultfs.Half:
		n /= 2
	case faultfs.Whole:
	}
	n, err := f.File.WriteAt(p[:n], off)
	if err == nil {
		err = failed
	}
	return n, err
}

func (f *flakyFile) Sync() error {
	return f.fs.change("sync", f.Name(), f.File.Sync)
}

func (f *flakyFile) Truncate(size int64) error {
	return f.fs.change("truncate", f.Name(), func() error { return f.File.Truncate(size) })
}

func (f *flakyFile) PunchHole(off, length int64) error {
	return f.fs.change("punch", f.Name(), func() error { return f.File.PunchHole(off, length) })
}

// modelClock is a machine's clock that goes on when it is told to.
type modelClock struct{ uptime atomic.Int64 }

func (c *modelClock) Wall() time.Time {
	return time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC).Add(c.Uptime())
}
func (c *modelClock) Boot() string          { return "model" }
func (c *modelClock) Uptime() time.Duration { return time.Duration(c.uptime.Load()) }

func (c *modelClock) advance(d time.Duration) { c.uptime.Add(int64(d)) }
