package appliance

import (
	"context"
	"errors"
	"iter"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/internal/durable"
)

const (
	// DefaultStorageTimeout is how long storage may take to answer unless told otherwise.
	DefaultStorageTimeout = durable.DefaultStallLimit
	// interruptPatience is how long one operation on storage may take once its work is
	// interrupted.
	interruptPatience = 10 * time.Second
	// stallCheck is how often a run looks whether storage still answers.
	stallCheck = 50 * time.Millisecond
	// slowestSync is the rate at which storage writes out what was written, at least; bytes/s.
	slowestSync = 4 << 20
)

// StallError says which file storage does not answer for.
type StallError = durable.StallError

// Storage ends work that waits for storage which does not answer, such as a file server that is
// gone or a disk that is lost: the system calls on it do not return, and nothing can
// interrupt them.
//
// What has been given up may still do what it was about to do, should the storage come back while the
// process lives. It does that in the order of every backup, so a point may come to be listed that
// was reported as failed; it is whole then.
type Storage struct {
	watch *durable.Watcher
	limit time.Duration
}

// WatchStorage begins to watch storage. One operation that takes longer than timeout (0 is
// DefaultStorageTimeout) means that it does not answer; log, which may be nil, hears of it.
// It must be closed, after what was opened with it.
func WatchStorage(timeout time.Duration, log *slog.Logger) *Storage {
	return &Storage{watch: durable.NewWatcher(timeout, log), limit: durable.StallLimit(timeout)}
}

// Close ends the watching.
func (s *Storage) Close() { s.watch.Close() }

// watcher returns the watcher, nil without one.
func (s *Storage) watcher() *durable.Watcher {
	if s == nil {
		return nil
	}
	return s.watch
}

// Run runs work in a goroutine of its own and returns its error. If storage that was opened with s does
// not answer it gives up: the error says which file is concerned. If ctx ends, work has to come to its
// end, and it is given up as soon as one operation on storage takes more than 10 s.
//
// Work that is given up goes on by itself and must share nothing with the caller.
func (s *Storage) Run(ctx context.Context, work func(context.Context) error) error {
	return s.Serve(ctx, func(ctx context.Context, _ func()) error { return work(ctx) })
}

// Serve is Run for work that calls serving when it has begun to serve something: from then
// on until ctx ends, storage that does not answer is no reason to give up, for it may come back.
func (s *Storage) Serve(ctx context.Context, work func(ctx context.Context, serving func()) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var serves atomic.Bool
	ended := make(chan error, 1)
	go func() { ended <- work(ctx, func() { serves.Store(true) }) }()
	t := time.NewTicker(stallCheck)
	defer t.Stop()
	for {
		select {
		case err := <-ended:
			return err
		case <-t.C:
		}
		patience := s.limit
		switch {
		case ctx.Err() != nil:
			patience = min(patience, interruptPatience)
		case serves.Load():
			continue
		}
		if stall := s.watch.Overdue(patience); stall != nil {
			if ctx.Err() != nil {
				stall = errors.Join(context.Cause(ctx), stall)
			}
			cancel(stall)
			return stall
		}
	}
}

// watchedDisk is a disk of which every operation is noted.
type watchedDisk struct {
	image.DiskCloser
	watch *durable.Watcher
	path  string
}

// openWatched opens a disk, whose operations are noted from the opening on.
func openWatched(w *durable.Watcher, path string, open func() (image.DiskCloser, error)) (image.DiskCloser, error) {
	defer w.Begin(durable.Opening, &path).End()
	d, err := open()
	if err != nil {
		return nil, err
	}
	return &watchedDisk{d, w, path}, nil
}

// ReadAt implements [image.Disk].
func (d *watchedDisk) ReadAt(p []byte, off int64) (int, error) {
	defer d.watch.Begin(durable.Reading, &d.path).End()
	return d.DiskCloser.ReadAt(p, off)
}

// Extents implements [image.Disk].
func (d *watchedDisk) Extents(ctx context.Context, off, length int64) iter.Seq2[image.Extent, error] {
	return func(yield func(image.Extent, error) bool) {
		o := d.watch.Begin(durable.Reading, &d.path)
		defer func() { o.End() }()
		for e, err := range d.DiskCloser.Extents(ctx, off, length) {
			o.End()
			if !yield(e, err) {
				o = nil
				return
			}
			o = d.watch.Begin(durable.Reading, &d.path)
		}
	}
}

// Close closes the disk.
func (d *watchedDisk) Close() error {
	defer d.watch.Begin(durable.Closing, &d.path).End()
	return d.DiskCloser.Close()
}

// writing notes that a file of size bytes is being written, from its opening to its last Sync, until
// end is called; add tells of n bytes that are written.
func writing(w *durable.Watcher, path string, size int64) (add func(n int64), end func()) {
	// What is noted exactly, such as the reads of what is written, goes before in a message.
	const slack = 2 * time.Second
	o := w.Begin(durable.Writing, &path)
	o.Renew(slack)
	var written atomic.Int64
	add = func(n int64) {
		more := slack
		if written.Add(n) >= size { // now it waits for all that is in memory
			more += time.Duration(size/slowestSync) * time.Second
		}
		o.Renew(more)
	}
	return add, o.End
}
