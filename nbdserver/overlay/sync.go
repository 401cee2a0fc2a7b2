package overlay

import (
	"fmt"
	"syscall"
)

// Sync implements [image.Writer]. Any error is [syscall.EIO] and makes the overlay
// failed.
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
		o.fail()
		return fmt.Errorf("sync overlay %s: %w: %s", o.path, syscall.EIO, err.Error())
	}
	o.synced.Store(now)
	return nil
}

// flush makes all changes so far durable. Stopped anywhere, it leaves the file as
// before or with some of the changes: each step relies on the ones before alone.
func (o *Overlay) flush() error {
	logged, err := o.log.begin()
	if err != nil {
		return err
	}
	o.mu.Lock()
	pages, dir := o.blocks.takeDirty()
	o.mu.Unlock()
	// The data that the pages refer to were written before they were taken.
	if err := o.file.Sync(); err != nil {
		return err
	}
	if err := o.flushPages(pages); err != nil {
		return err
	}
	// A page that the directory begins to refer to is on disk whole; it may be
	// long ago that it last had a meaning, with other states.
	if err := o.flushPages(dir); err != nil {
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
		if _, err := o.file.WriteAt(encodePage(&p.states, p.bad, o.header.id, p.off), p.off); err != nil {
			return err
		}
	}
	return o.file.Sync()
}
