package nbdserver

import (
	"fmt"
	"math/bits"
	"net"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/holdfast-backup/holdfast/nbdserver/internal/wire"
)

// buffer holds one whole reply or one chunk of it, and before that maybe the
// payload of a write.
type buffer struct {
	b    []byte
	last int   // where the last chunk of a structured reply begins
	cost int64 // bytes of the connection's memory to give back once it is sent
	lane int64 // bytes of the lane, likewise
}

// Buffers come in classes of 512 bytes to 32 MiB, each with room for the headers
// of a reply with a payload of that size.
const (
	minClassBits = 9
	classes      = 17
	headerRoom   = 64
)

var pools [classes]sync.Pool

// class returns the smallest class with room for a payload of n bytes, at most
// wire.MaxPayload.
func class(n int) int { return max(bits.Len(uint(max(n-1, 0))), minClassBits) - minClassBits }

// bufferCost is what a buffer for a payload of n bytes takes of the memory.
func bufferCost(n int) int64 { return 1<<(class(n)+minClassBits) + headerRoom }

// newBuffer returns an empty buffer with room for a payload of n bytes and its
// headers.
func newBuffer(n int) *buffer {
	if b, ok := pools[class(n)].Get().(*buffer); ok {
		return b
	}
	return &buffer{b: make([]byte, 0, bufferCost(n))}
}

func (b *buffer) free() {
	b.b, b.last, b.cost, b.lane = b.b[:0], 0, 0, 0
	pools[class(cap(b.b)-headerRoom)].Put(b)
}

// extend lengthens the buffer by n bytes and returns them. Their content is
// undefined.
func (b *buffer) extend(n int) []byte {
	start := len(b.b)
	b.b = b.b[:start+n]
	return b.b[start:]
}

// done marks the last chunk as the reply's last.
func (b *buffer) done() { b.b[b.last+5] |= byte(wire.ChunkFlagDone) }

const (
	// smallReply and below overtake larger replies that wait.
	smallReply = 64 << 10
	// batchBytes is how much one system call may send when several replies
	// wait: a small reply waits for no more than that, or for one large reply.
	batchBytes = 512 << 10
	// batchReplies is the most that writev takes.
	batchReplies = 1024
	// laneTimeout is how long a client that holds memory of the lane may take
	// for pieceLen bytes and, while others wait, for a reply and what is sent before it.
	laneTimeout = 30 * time.Second
	// batchPieces is how many pieces a batch without a reply of the lane may
	// have: its last small and its last large one may both end beyond batchBytes.
	batchPieces = batchBytes/pieceLen + 2
)

// replyQueue sends replies. Whoever flushes it while nobody is writing becomes
// the writer until it is empty. What has gathered meanwhile leaves with one
// system call.
type replyQueue struct {
	conn      net.Conn
	release   func(cost, lane int64) // called as replies leave memory
	failed    func(error)            // called when the client cannot be written to
	contended func() bool            // reports whether somebody waits for the lane

	mu      sync.Mutex // guards small, large, writing, lane and since
	small   []*buffer
	large   []*buffer // also every chunk of a reply of several, in their order
	writing bool
	lane    int       // replies that hold memory of the lane
	since   time.Time // when the last of them left, or the first came

	sent atomic.Int64 // batches

	// The rest is owned by the writer.
	broken  bool // the client is gone, replies are dropped
	batch   []*buffer
	vectors net.Buffers
}

// add queues a reply, which is the queue's from then on. Somebody must flush.
func (q *replyQueue) add(b *buffer) {
	q.mu.Lock()
	defer q.mu.Unlock()
	switch {
	case b.lane > 0:
		q.large = append(q.large, b)
		if q.lane++; q.lane > 1 {
			break
		}
		q.since = time.Now()
		if q.writing {
			q.conn.SetWriteDeadline(q.since.Add(batchPieces * laneTimeout)) // for the batch that is being written
		}
	case len(b.b) <= smallReply:
		q.small = append(q.small, b)
	default:
		q.large = append(q.large, b)
	}
}

// addPart queues the part of a reply. An empty one has nothing to say; last,
// which appends a chunk, is called if it is the last nevertheless.
func (q *replyQueue) addPart(b *buffer, p *parts, last func(*buffer)) {
	q.mu.Lock()
	if p.left.Add(-1) == 0 {
		if len(b.b) == 0 {
			last(b)
		}
		b.done()
	}
	if len(b.b) > 0 {
		q.large = append(q.large, b)
		q.mu.Unlock()
		return
	}
	q.mu.Unlock()
	q.release(b.cost, 0)
	b.free()
}

// idle reports whether nothing waits and nobody writes.
func (q *replyQueue) idle() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return !q.writing && len(q.small)+len(q.large) == 0
}

// flush returns when the queue is empty or somebody else is writing. more says
// that further replies are likely to come in a moment.
func (q *replyQueue) flush(more bool) {
	q.mu.Lock()
	if q.writing || len(q.small)+len(q.large) == 0 {
		q.mu.Unlock()
		return
	}
	q.writing = true
	q.mu.Unlock()
	if more {
		runtime.Gosched() // lets those who are ready add theirs
	}
	for q.take() {
		q.write()
	}
}

// take moves the next replies to batch; false means that there are none and
// that the caller is the writer no longer.
func (q *replyQueue) take() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.batch = q.batch[:0]
	room := batchBytes
	for _, waiting := range []*[]*buffer{&q.small, &q.large} {
		n := 0
		for n < len(*waiting) && len(q.batch) < batchReplies && (room > 0 || n == 0) {
			b := (*waiting)[n]
			q.batch = append(q.batch, b)
			room -= len(b.b)
			n++
		}
		*waiting = slices.Delete(*waiting, 0, n)
	}
	q.writing = len(q.batch) > 0
	return q.writing
}

// write sends the batch and frees its buffers.
func (q *replyQueue) write() {
	if !q.broken {
		if err := q.send(); err != nil {
			q.broken = true
			q.failed(err)
		}
	}
	var cost, lane int64
	for i, b := range q.batch {
		cost += b.cost
		lane += b.lane
		if b.lane > 0 {
			q.leaveLane()
		}
		b.free()
		q.batch[i] = nil
	}
	q.sent.Add(1)
	q.release(cost, lane)
}

func (q *replyQueue) leaveLane() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.since = time.Now()
	if q.lane--; q.lane == 0 {
		q.conn.SetWriteDeadline(time.Time{})
	}
}

func (q *replyQueue) send() error {
	q.mu.Lock()
	lane := q.lane > 0
	q.mu.Unlock()
	if lane {
		return q.sendSlowly()
	}
	q.vectors = q.vectors[:0]
	for _, b := range q.batch {
		q.vectors = append(q.vectors, b.b)
	}
	return writeBuffers(q.conn, q.vectors)
}

// errSlow is a deadline that passed in several pieces.
var errSlow = fmt.Errorf("the client takes a reply too slowly: %w", os.ErrDeadlineExceeded)

// sendSlowly sends the batch in pieces that each have a deadline, as has the reply
// while others wait for its memory.
func (q *replyQueue) sendSlowly() error {
	for _, b := range q.batch {
		for piece := range slices.Chunk(b.b, pieceLen) {
			q.mu.Lock()
			now := time.Now()
			slow := q.lane > 0 && now.Sub(q.since) > laneTimeout
			q.conn.SetWriteDeadline(now.Add(laneTimeout))
			q.mu.Unlock()
			if slow && q.contended() {
				return errSlow
			}
			if _, err := q.conn.Write(piece); err != nil {
				return err
			}
		}
	}
	return nil
}
