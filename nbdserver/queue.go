package nbdserver

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/holdfast-backup/holdfast/nbdserver/internal/wire"
)

const (
	// pieceLen is the most of a request in bytes that is in memory as one: longer
	// reads and writes are cut at its multiples.
	pieceLen = 256 << 10
	// maxQueued is how many requests of a connection may wait for a worker
	// before no more are read.
	maxQueued = 256
	// smallRun is after how many small jobs in a row a large one is due.
	smallRun = 16
	// fewWorkers is how many workers a connection has while the disk answers large
	// jobs promptly, as from memory: more are no faster, and push each other's
	// buffers out of the processor's caches. stallPeriod is after how long more
	// are started when these suddenly do not get on.
	fewWorkers  = 4
	promptly    = 150 * time.Microsecond
	stallPeriod = 2 * time.Millisecond
	// wholeWorkers is how many replies of a connection that cannot be cut may
	// be under way at the same time.
	wholeWorkers = 4
)

// job is a request, or a piece of one, on its way to a worker.
type job struct {
	wire.Request
	off, length int64      // of the disk, what the job covers
	contexts    []selected // of a BLOCK_STATUS
	parts       *parts     // of a request in several jobs; nil if this is all of it
	payload     *buffer    // of a WRITE; its memory is taken already
	problem     *problem   // the answer, if the request has failed already
	need        int64      // bytes of memory that the job takes
	whole       bool       // a READ whose reply cannot be cut
	granted     chan struct{}
}

// parts is what the jobs of one request share.
type parts struct {
	left    atomic.Int64 // jobs that have not been answered
	problem atomic.Pointer[problem]
}

func newParts(n int64) *parts {
	p := new(parts)
	p.left.Store(n)
	return p
}

// changes reports whether the job changes the disk, or makes changes durable.
func (j *job) changes() bool {
	switch j.Command {
	case wire.CmdWrite, wire.CmdWriteZeroes, wire.CmdTrim, wire.CmdFlush:
		return true
	}
	return false
}

// cut takes the next job off a request that is to be done in several, and
// reports whether more are left.
func (j *job) cut() (piece job, more bool) {
	piece = *j
	switch {
	case j.parts == nil || j.payload != nil:
		return piece, false
	case j.Command == wire.CmdBlockStatus:
		piece.contexts, j.contexts = j.contexts[:1], j.contexts[1:]
		return piece, len(j.contexts) > 0
	}
	piece.length = min(j.length, pieceLen-j.off%pieceLen)
	j.off += piece.length
	j.length -= piece.length
	return piece, j.length > 0
}

// pieces returns how many pieces a range has.
func pieces(off, length int64) int64 {
	return (off+length-1)/pieceLen - off/pieceLen + 1
}

// fifo is a queue.
type fifo struct {
	jobs []job
	head int
}

func (f *fifo) len() int    { return len(f.jobs) - f.head }
func (f *fifo) first() *job { return &f.jobs[f.head] }
func (f *fifo) push(j job) {
	if f.head == len(f.jobs) {
		f.jobs, f.head = f.jobs[:0], 0
	} else if f.head > maxQueued {
		n := copy(f.jobs, f.jobs[f.head:])
		clear(f.jobs[n:]) // which keep nothing alive
		f.jobs, f.head = f.jobs[:n], 0
	}
	f.jobs = append(f.jobs, j)
}

func (f *fifo) pop() job {
	j := f.jobs[f.head]
	f.jobs[f.head] = job{}
	f.head++
	return j
}

// advance moves the first job that has its memory already to the head, and
// reports whether there is one.
func (f *fifo) advance() bool {
	waiting := f.jobs[f.head:]
	i := slices.IndexFunc(waiting, func(j job) bool { return j.payload != nil })
	if i < 0 {
		return false
	}
	first := waiting[i]
	copy(waiting[1:], waiting[:i])
	waiting[0] = first
	return true
}

// schedule decides which of a connection's requests is executed next. Small ones
// come first, but a large one after smallRun of them; otherwise they keep their
// order, and large ones take turns, piece by piece. A worker lives while there
// are jobs whose memory is there.
//
// A job that is refused memory waits for what the connection itself holds: as
// replies, which the client takes; as jobs being executed; or as pieces of writes that
// wait behind it, which therefore overtake it then. The reader takes nothing
// more meanwhile, but in turn.
type schedule struct {
	mu      sync.Mutex // guards what follows
	memory  account
	small   fifo
	large   fifo
	whole   fifo
	run     int  // small jobs since the last large one
	short   bool // the job whose turn it is was refused its memory
	workers int
	wholes  int           // workers for whole
	roomy   chan struct{} // closed when there is room; nil while nobody waits
	prompt  bool          // the disk has answered the last large job promptly
	watched bool          // stall is to run
	taken   uint64        // jobs, up to now
	before  uint64        // and when stall was set to run
	watch   *time.Timer

	started sync.WaitGroup // workers
	limit   int            // of workers
	work    func(next func() (job, bool))
}

// push hands a job to the workers. It waits for room, and fails when ctx is done
// first.
func (s *schedule) push(ctx context.Context, j job) error {
	if err := s.room(ctx); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case j.whole:
		s.whole.push(j)
	case j.need > smallReply || j.parts != nil || j.granted != nil:
		s.large.push(j)
	default:
		s.small.push(j)
	}
	s.spawnLocked()
	return nil
}

// room waits until there is room for a job. There still is when the caller, the
// only one to push, does so.
func (s *schedule) room(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.fullLocked() {
		room := make(chan struct{})
		s.roomy = room
		s.mu.Unlock()
		select {
		case <-room:
			s.mu.Lock()
		case <-ctx.Done():
			s.mu.Lock()
			return ctx.Err()
		}
	}
	return nil
}

// full reports whether there is no room.
func (s *schedule) full() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.fullLocked()
}

func (s *schedule) fullLocked() bool {
	return s.small.len()+s.large.len()+s.whole.len() >= maxQueued
}

// try takes memory for a job that overtakes nobody, and for which there is room.
func (s *schedule) try(n int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.small.len() == 0 && !s.short && !s.fullLocked() && s.memory.take(n)
}

// reserve takes memory for a payload, in turn with the jobs that wait for some,
// and once there is room for the job that will have it: a reader that held
// memory and waited for room might wait for a job that waits for that memory.
func (s *schedule) reserve(ctx context.Context, n int64) error {
	if err := s.room(ctx); err != nil {
		return err
	}
	s.mu.Lock()
	if s.small.len()+s.large.len() == 0 && s.memory.take(n) {
		s.mu.Unlock()
		return nil
	}
	s.mu.Unlock()
	granted := make(chan struct{})
	if err := s.push(ctx, job{need: n, granted: granted}); err != nil {
		return err
	}
	select {
	case <-granted:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// give gives memory back.
func (s *schedule) give(n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.memory.give(n)
	s.spawnLocked()
}

// close gives all memory back, once there are no workers and no reader.
func (s *schedule) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.memory.give(s.memory.used)
}

// idle reports whether nothing waits and nothing is executed.
func (s *schedule) idle() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.workers+s.wholes+s.small.len()+s.large.len()+s.whole.len() == 0
}

// busy reports whether a worker has company.
func (s *schedule) busy() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.workers > 1
}

// spawnLocked starts a worker if there may be something to do for one more.
func (s *schedule) spawnLocked() {
	limit := s.limit
	if s.prompt {
		limit = min(limit, fewWorkers)
	}
	if s.workers >= limit && limit < s.limit && !s.watched && s.small.len()+s.large.len() > 0 {
		s.watched, s.before = true, s.taken
		s.watch.Reset(stallPeriod)
	}
	if s.workers < limit && s.small.len()+s.large.len() > 0 {
		s.workers++
		s.started.Go(func() { s.work(s.next) })
	}
	if s.wholes < wholeWorkers && s.whole.len() > 0 {
		s.wholes++
		s.started.Go(func() { s.work(s.nextWhole) })
	}
}

// stall looks whether the workers get on, and lets there be more if not.
func (s *schedule) stall() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.watched = false
	if s.taken == s.before {
		s.prompt = false
	}
	if s.workers > 0 { // or nothing is left
		s.spawnLocked()
	}
}

// note takes note of how long the disk took for a large job.
func (s *schedule) note(took time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.prompt != (took < promptly) {
		s.prompt = !s.prompt
		s.spawnLocked()
	}
}

// next returns the next job, with its memory. False ends the worker.
func (s *schedule) next() (job, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		from := &s.small
		if s.large.len() > 0 && (s.small.len() == 0 || s.run >= smallRun) {
			from = &s.large
		}
		if from.len() > 0 {
			if s.short = !s.memory.take(from.first().need); s.short {
				from = s.withMemoryLocked()
			}
		}
		if from == nil || from.len() == 0 {
			s.workers--
			return job{}, false
		}
		s.run++
		s.taken++
		if from == &s.large {
			s.run = 0
		}
		j, more := from.first().cut()
		rest := from.pop()
		if more {
			from.push(rest)
		} else if s.roomy != nil {
			close(s.roomy)
			s.roomy = nil
		}
		if j.granted != nil {
			close(j.granted)
			continue
		}
		s.spawnLocked()
		return j, true
	}
}

// withMemoryLocked returns the queue whose head has its memory already, or nil.
func (s *schedule) withMemoryLocked() *fifo {
	for _, from := range []*fifo{&s.small, &s.large} {
		if from.advance() {
			return from
		}
	}
	return nil
}

// nextWhole is next for replies that cannot be cut.
func (s *schedule) nextWhole() (job, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.whole.len() == 0 {
		s.wholes--
		return job{}, false
	}
	j := s.whole.pop()
	if s.roomy != nil {
		close(s.roomy)
		s.roomy = nil
	}
	return j, true
}
