package nbdclient

import (
	"cmp"
	"context"
	"iter"
	"slices"
	"sync"
	"time"

	"github.com/holdfast-backup/holdfast/nbdserver/internal/wire"
)

// batch collects the answers to requests that were sent together.
type batch struct {
	unanswered sync.WaitGroup

	mu     sync.Mutex // guards failed
	failed []*request
}

func (b *batch) complete(r *request) {
	if r.err != nil {
		b.mu.Lock()
		b.failed = append(b.failed, r)
		b.mu.Unlock()
	}
	b.unanswered.Done()
}

// tries counts how often a request lost its connection.
type tries struct {
	lost  int
	first time.Time // when it did
}

// another counts a loss and reports whether the request may be sent again.
func (t *tries) another(o Options) bool {
	if t.lost == 0 {
		t.first = time.Now()
	}
	t.lost++
	return t.lost < o.Attempts && !o.NoReconnect && time.Since(t.first) < o.RetryTime
}

// exchange sends requests, waits for all answers, and sends those again that
// lost their connection. It returns those that failed for good.
func (c *Client) exchange(ctx context.Context, requests iter.Seq[*request]) []*request {
	var tries tries
	for {
		var b batch
		var conn *conn
		var err error
		for r := range requests {
			r.prepare(b.complete)
			b.unanswered.Add(1)
			if err == nil {
				conn, err = c.acquire(ctx)
			}
			if err != nil {
				r.err = err
				b.complete(r)
				continue
			}
			conn.send(r)
		}
		b.unanswered.Wait()
		final := func(r *request) bool { return !r.retry }
		if len(b.failed) == 0 || slices.ContainsFunc(b.failed, final) || !tries.another(c.options) {
			return b.failed
		}
		requests = slices.Values(b.failed)
	}
}

// read fills p, which lies inside the disk, from off on, and returns how many
// bytes before the first failure are good.
func (c *Client) read(p []byte, off int64) (int, error) {
	pieces := &pieces{client: c, p: p, off: off}
	failed := c.exchange(context.Background(), pieces.requests) // ends with the client, see Close
	for _, b := range pieces.bounces {
		copy(b.to, b.from)
	}
	if len(failed) == 0 {
		return len(p), nil
	}
	first := slices.MinFunc(failed, func(a, b *request) int { return cmp.Compare(a.Offset, b.Offset) })
	return int(max(off, int64(first.Offset)) - off), first.err
}

// pieces are the requests that fill p from off on.
type pieces struct {
	client  *Client
	p       []byte
	off     int64
	bounces []bounce
}

// bounce is what the caller wants of a block that had to be read whole.
type bounce struct{ from, to []byte }

func (s *pieces) requests(yield func(*request) bool) {
	pos, end := s.off, s.off+int64(len(s.p))
	for pos < end {
		from, to := s.client.pieceAt(pos, end)
		into := s.p[pos-s.off : min(to, end)-s.off]
		r := &request{Request: wire.Request{Command: wire.CmdRead, Offset: uint64(from), Length: uint64(to - from)}, buf: into}
		if from < pos || to > end {
			r.buf = make([]byte, to-from)
			s.bounces = append(s.bounces, bounce{r.buf[pos-from:], into})
		}
		if !yield(r) {
			return
		}
		pos = to
	}
}

// pieceAt returns the range to read for the bytes at pos and after, up to end at
// most; or the server's smallest block around pos, if a part of it is wanted.
func (c *Client) pieceAt(pos, end int64) (from, to int64) {
	minimum := c.export.minimum
	to = min(pos-pos%c.piece+c.piece, end)
	if to < c.export.size {
		to -= to % minimum
	}
	if pos%minimum == 0 && to > pos {
		return pos, to
	}
	from = pos - pos%minimum
	return from, min(from+minimum, c.export.size)
}
