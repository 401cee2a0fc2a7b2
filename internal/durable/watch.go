package durable

import (
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

const (
	// watched is how many operations are noted at once; storage that hangs holds on to a
	// few of them, whatever the others do.
	watched = 256
	// probes is how many places an operation looks at for a free one; with none it is not noted.
	probes = 8
	// minLimit is the shortest limit of a Watcher.
	minLimit = 100 * time.Millisecond
	maxTick  = time.Second
	// ticksInLimit is how finely a limit is measured, at least.
	ticksInLimit = 20
)

// DefaultStallLimit is how long one operation may take before the storage counts as stalled.
const DefaultStallLimit = 2 * time.Minute

// Act is what an operation does.
type Act uint8

// The acts.
const (
	Opening Act = iota
	Reading
	Writing
	Syncing
	Changing // names, lengths, room
	Closing
)

var actNames = [...]string{"opening", "reading", "writing", "syncing", "changing", "closing"}

func (a Act) String() string { return actNames[a] }

// StallError says that storage does not answer: one operation has taken too long. Nobody
// knows whether it will end, or how.
type StallError struct {
	Act   Act
	Path  string
	Since time.Duration // how long it has taken so far
}

func (e *StallError) Error() string {
	return fmt.Sprintf("storage does not answer: %v %s has taken %v; check the disk or the network storage",
		e.Act, e.Path, e.Since.Round(time.Millisecond))
}

// Watcher knows what is being done with storage and for how long: system calls on a disk that is
// lost, or on a file server that is gone, do not return and cannot be interrupted.
// All methods are safe for concurrent use, and those of a nil Watcher do nothing.
//
// Time is counted in ticks of a goroutine of its own: time in which the whole process
// was stopped does not count.
type Watcher struct {
	tick time.Duration
	now  atomic.Int64 // ticks, from 1
	ops  [watched]Operation
	stop chan struct{}
	done chan struct{}
}

// compound is the bit beside the Act of an operation that is many system calls.
const compound = 1 << 7

// Operation is one that is under way. A nil Operation is not noted.
type Operation struct {
	w     *Watcher
	began atomic.Int64 // in ticks<<8 | Act; free or taken if there is no such operation
	path  atomic.Pointer[string]
	_     [40]byte // no two share a line of the processor's cache
}

const (
	free  = 0
	taken = 1 // by one that is just being noted
)

// NewWatcher starts a watcher, which must be closed. While an operation takes longer than
// limit (0 is DefaultStallLimit) it is told to log, which may be nil.
func NewWatcher(limit time.Duration, log *slog.Logger) *Watcher {
	limit = StallLimit(limit)
	w := &Watcher{tick: min(limit/ticksInLimit, maxTick), stop: make(chan struct{}), done: make(chan struct{})}
	w.now.Store(1)
	for i := range w.ops {
		w.ops[i].w = w
	}
	go w.run(limit, log)
	return w
}

// StallLimit returns the limit that a Watcher has for one that was asked for.
func StallLimit(limit time.Duration) time.Duration {
	if limit == 0 {
		return DefaultStallLimit
	}
	return max(limit, minLimit)
}

// Close ends the watcher's goroutine.
func (w *Watcher) Close() {
	if w == nil {
		return
	}
	close(w.stop)
	<-w.done
}

func (w *Watcher) run(limit time.Duration, log *slog.Logger) {
	defer close(w.done)
	t := time.NewTicker(w.tick)
	defer t.Stop()
	var told error
	var before int64 // see moved
	for {
		select {
		case <-w.stop:
			return
		case <-t.C:
		}
		w.now.Add(1)
		if n := moved(); n != before {
			before = n
			w.renewMany()
		}
		err := w.Overdue(limit)
		if log != nil && told == nil && err != nil {
			log.Error("storage does not answer", slog.Any("error", err))
		}
		if log != nil && told != nil && err == nil {
			log.Warn("storage answers again")
		}
		told = err
	}
}

// Begin notes the beginning of an operation, one system call, on what path names, which must
// not change. The caller ends it.
func (w *Watcher) Begin(act Act, path *string) *Operation { return w.begin(int64(act), path) }

// BeginMany is Begin for an operation that is many system calls, or accesses to mapped files.
// It begins anew whenever the process has moved bytes to or from storage.
func (w *Watcher) BeginMany(act Act, path *string) *Operation {
	return w.begin(int64(act)|compound, path)
}

func (w *Watcher) begin(what int64, path *string) *Operation {
	if w == nil {
		return nil
	}
	first := rand.Uint32()
	for i := range uint32(probes) {
		o := &w.ops[(first+i)%watched]
		if o.began.Load() == free && o.began.CompareAndSwap(free, taken) {
			o.path.Store(path)
			o.began.Store(w.now.Load()<<8 | what)
			return o
		}
	}
	return nil
}

// End notes that the operation is over.
func (o *Operation) End() {
	if o != nil {
		o.began.Store(free)
	}
}

// Renew has the operation begin anew: it has got on. What is left of it may take more time by
// what is given.
func (o *Operation) Renew(more time.Duration) {
	if o != nil {
		ticks := o.w.now.Load() + int64((more+o.w.tick-1)/o.w.tick)
		o.began.Store(ticks<<8 | o.began.Load()&0xff)
	}
}

// renewMany renews the operations that are many system calls.
func (w *Watcher) renewMany() {
	now := w.now.Load()
	for i := range w.ops {
		began := w.ops[i].began.Load()
		if began&compound != 0 && began>>8 < now {
			w.ops[i].began.CompareAndSwap(began, now<<8|began&0xff)
		}
	}
}

// moved returns how many bytes this process has moved to and from storage; 0 where the system does
// not tell. Source: proc(5), /proc/pid/io: read_bytes and write_bytes.
func moved() (bytes int64) {
	text, err := os.ReadFile("/proc/self/io")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
		if name == "read_bytes" || name == "write_bytes" {
			n, _ := strconv.ParseInt(value, 10, 64) // the kernel's own
			bytes += n
		}
	}
	return bytes
}

// Overdue returns a StallError for the operation that has been under way longest if
// that is patience or more, and else nil.
func (w *Watcher) Overdue(patience time.Duration) error {
	if w == nil {
		return nil
	}
	now, most := w.now.Load(), int64((patience+w.tick-1)/w.tick)
	var oldest *StallError
	for i := range w.ops {
		o := &w.ops[i]
		began := o.began.Load()
		path := o.path.Load()
		age := now - began>>8 - 1 // the first tick came in the midst of one
		if began == free || began == taken || age < most || o.began.Load() != began {
			continue
		}
		most = age + 1
		oldest = &StallError{Act: Act(began & 0xff &^ compound), Path: *path, Since: time.Duration(age) * w.tick}
	}
	if oldest == nil {
		return nil
	}
	return oldest
}

// FS returns a file system whose operations the watcher knows of.
func (w *Watcher) FS(fsys FS) FS {
	if w == nil {
		return fsys
	}
	return watchedFS{fsys, w}
}

type watchedFS struct {
	fs FS
	w  *Watcher
}

type watchedFile struct {
	File
	w    *Watcher
	name string
}

func (f watchedFS) open(act Act, name string, open func(string) (File, error)) (File, error) {
	o := f.w.Begin(act, &name)
	file, err := open(name)
	o.End()
	if err != nil {
		return nil, err
	}
	return &watchedFile{file, f.w, name}, nil
}

func (f watchedFS) Open(name string) (File, error)      { return f.open(Opening, name, f.fs.Open) }
func (f watchedFS) OpenWrite(name string) (File, error) { return f.open(Opening, name, f.fs.OpenWrite) }

func (f watchedFS) Create(name string) (File, error) { return f.open(Changing, name, f.fs.Create) }

func (f watchedFS) Rename(oldName, newName string) error {
	defer f.w.Begin(Changing, &oldName).End()
	return f.fs.Rename(oldName, newName)
}

func (f watchedFS) Remove(name string) error {
	defer f.w.Begin(Changing, &name).End()
	return f.fs.Remove(name)
}

func (f watchedFS) ReadDir(name string) ([]os.DirEntry, error) {
	defer f.w.Begin(Reading, &name).End()
	return f.fs.ReadDir(name)
}

func (f watchedFS) Mkdir(name string) error {
	defer f.w.Begin(Changing, &name).End()
	return f.fs.Mkdir(name)
}

func (f watchedFS) SyncDir(name string) error {
	defer f.w.Begin(Syncing, &name).End()
	return f.fs.SyncDir(name)
}

func (f watchedFS) Space(name string) (free, total int64, err error) {
	defer f.w.Begin(Reading, &name).End()
	return f.fs.Space(name)
}

func (f watchedFS) Immutable(name string) (bool, error) {
	defer f.w.Begin(Reading, &name).End()
	return f.fs.Immutable(name)
}

func (f *watchedFile) Size() (int64, error) {
	defer f.w.Begin(Reading, &f.name).End()
	return f.File.Size()
}

func (f *watchedFile) ReadAt(p []byte, off int64) (int, error) {
	defer f.w.Begin(Reading, &f.name).End()
	return f.File.ReadAt(p, off)
}

func (f *watchedFile) WriteAt(p []byte, off int64) (int, error) {
	defer f.w.Begin(Writing, &f.name).End()
	return f.File.WriteAt(p, off)
}

func (f *watchedFile) Sync() error {
	defer f.w.Begin(Syncing, &f.name).End()
	return f.File.Sync()
}

func (f *watchedFile) Truncate(size int64) error {
	defer f.w.Begin(Changing, &f.name).End()
	return f.File.Truncate(size)
}

func (f *watchedFile) PunchHole(off, length int64) error {
	defer f.w.Begin(Changing, &f.name).End()
	return f.File.PunchHole(off, length)
}

func (f *watchedFile) NextHole(off int64) (int64, error) {
	defer f.w.Begin(Reading, &f.name).End()
	return f.File.NextHole(off)
}

func (f *watchedFile) DropCache() error {
	defer f.w.Begin(Changing, &f.name).End()
	return f.File.DropCache()
}

func (f *watchedFile) Close() error {
	defer f.w.Begin(Closing, &f.name).End()
	return f.File.Close()
}
