package nbdserver

import (
	"math/bits"
	"net"
	"runtime"
	"slices"
	"sync"
)

// buffer holds one whole reply.
type buffer struct {
	b    []byte
	cost int64 // bytes of the connection's budget to give back once it is sent
}

// Buffers come in classes of 4 KiB to 32 MiB, each with room for the headers of
// a reply with a payload of that size.
const (
	minClassBits = 12
	classes      = 14
	headerRoom   = 64
)

var pools [classes]sync.Pool

// newBuffer returns an empty buffer with room for n bytes.
func newBuffer(n int) *buffer {
	class := max(bits.Len(uint(max(n-headerRoom-1, 0))), minClassBits) - minClassBits
	if class >= classes {
		return &buffer{b: make([]byte, 0, n)}
	}
	if b, ok := pools[class].Get().(*buffer); ok {
		return b
	}
	return &buffer{b: make([]byte, 0, 1<<(class+minClassBits)+headerRoom)}
}

// free gives the buffer back. One that has grown past its class is dropped.
func (b *buffer) free() {
	size := uint(cap(b.b) - headerRoom)
	class := bits.Len(size) - 1 - minClassBits
	b.b, b.cost = b.b[:0], 0
	if class >= 0 && class < classes && bits.OnesCount(size) == 1 {
		pools[class].Put(b)
	}
}

// extend lengthens the buffer by n bytes and returns them. Their content is
// undefined.
func (b *buffer) extend(n int) []byte {
	start := len(b.b)
	b.b = b.b[:start+n]
	return b.b[start:]
}

const (
	// smallReply and below overtake larger replies that wait.
	smallReply = 64 << 10
	// batchBytes is how much one system call may send when several replies
	// wait: a small reply waits for no more than that, or for one large reply.
	batchBytes = 512 << 10
	// batchReplies is the most that writev takes.
	batchReplies = 1024
)

// replyQueue sends replies. Whoever flushes it while nobody is writing becomes
// the writer until it is empty. What has gathered meanwhile leaves with one
// system call.
type replyQueue struct {
	conn    net.Conn
	release func(cost int64) // called as replies leave memory
	failed  func()           // called when the client cannot be written to

	mu      sync.Mutex // guards small, large and writing
	small   []*buffer
	large   []*buffer
	writing bool

	// The rest is owned by the writer.
	broken  bool // the client is gone, replies are dropped
	batch   []*buffer
	vectors net.Buffers
}

// add queues a reply, which is the queue's from then on. Somebody must flush.
func (q *replyQueue) add(b *buffer) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(b.b) <= smallReply {
		q.small = append(q.small, b)
	} else {
		q.large = append(q.large, b)
	}
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
		q.vectors = q.vectors[:0]
		for _, b := range q.batch {
			q.vectors = append(q.vectors, b.b)
		}
		rest := q.vectors // WriteTo consumes it
		if _, err := rest.WriteTo(q.conn); err != nil {
			q.broken = true
			q.failed()
		}
	}
	var cost int64
	for i, b := range q.batch {
		cost += b.cost
		b.free()
		q.batch[i] = nil
	}
	q.release(cost)
}
