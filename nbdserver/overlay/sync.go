package overlay

import (
	"errors"
	"fmt"
	"syscall"
)

// Sync implements [image.Writer]. It fails with [syscall.ENOSPC] if a page of the map
// or the log finds no room: nothing is lost, and a later Sync may succeed. Any other error is
// [syscall.EIO] and makes the overlay failed.
func (o *Overlay) Sync() error {
	want := o.changes.Load()
	if err := o.failure(); err != nil || o.synced.Load() >= want {
		return err
	}
	o.syncing.Lock()
	defer o.syncing.Unlock()
	// The Sync that was waited for has failed, or began late enough to do for this
	// one too.
	if err := o.failure(); err != nil || o.synced.Load() >= want {
		return err
	}
	now := o.changes.Load()
	if err := o.flush(); err != nil {
		if !errors.Is(err, syscall.ENOSPC) {
			err = o.fail("sync", err)
		}
		return fmt.Errorf("sync overlay %s: %w", o.path, err)
	}
	o.synced.Store(now)
	return nil
}

// flush makes all changes so far durable. Stopped anywhere, it leaves the file as
// before or with some of the changes: each step relies on the ones before alone.
// ENOSPC is of a write that found no room, and all can be done again.
func (o *Overlay) flush() error {
	logged, err := o.log.begin()
	if err != nil {
		return err
	}
	o.mu.Lock()
	pages, dir := o.blocks.takeDirty()
	o.mu.Unlock()
	// The data that the pages refer to were written before they were taken.
	if err := syncFile(o.file); err != nil {
		return err
	}
	err = o.flushPages(pages)
	if err == nil {
		// A page that the directory begins to refer to is on disk whole; it may be
		// long ago that it last had a meaning, with other states.
		err = o.flushPages(dir)
	}
	if err != nil {
		o.mu.Lock()
		defer o.mu.Unlock()
		o.blocks.putBack(pages, dir)
		return err
	}
	return o.log.done(logged) // all that was logged before the map was looked at is durable
}

// flushPages writes pages of the map or of the directory and makes them durable. Each is
// one write, so that the kernel does not write back half of one.
func (o *Overlay) flushPages(pages []dirtyPage) error {
	if len(pages) == 0 {
		return nil
	}
	for _, p := range pages {
		if err := o.writePage(p); err != nil {
			return err
		}
	}
	return syncFile(o.file)
}

func (o *Overlay) writePage(p dirtyPage) error {
	_, err := o.file.WriteAt(encodePage(&p.states, p.bad, o.header.id, p.off), p.off)
	return err
}

// syncFile is the file's Sync. It may have dropped bytes when it fails, also for lack of
// room: no error of it is ENOSPC.
func syncFile(f interface{ Sync() error }) error {
	if err := f.Sync(); err != nil {
		return fmt.Errorf("%w: %s", syscall.EIO, err.Error())
	}
	return nil
}
