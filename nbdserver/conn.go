package nbdserver

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"
)

// requestCost is what a request weighs in the budget besides its payload. It
// bounds how many small replies may wait for a client that does not read.
const requestCost = 4 << 10

// sendBuffer is the buffer in bytes of a unix socket: room for a few replies of
// the length that copying clients ask for, so that the writer seldom sleeps. The
// system may grant less.
const sendBuffer = 2 << 20

// conn is a client in the transmission phase.
type conn struct {
	choice
	options Options
	net     net.Conn
	in      *bufio.Reader // owned by the reader
	out     *replyQueue
	log     *slog.Logger

	budget  *semaphore.Weighted
	pending atomic.Int64 // requests handed to workers whose reply is not queued yet
}

// job is a request with the bytes of the budget that it holds.
type job struct {
	request
	cost int64
}

func newConn(o Options, nc net.Conn, in *bufio.Reader, chosen choice, log *slog.Logger) *conn {
	return &conn{
		choice: chosen, options: o, net: nc, in: in, log: log,
		out:    &replyQueue{conn: nc},
		budget: semaphore.NewWeighted(o.Budget),
	}
}

// serve answers requests until the client leaves, its export is removed or ctx
// is done, and returns after the last reply. The error says why the client had
// to be dropped.
func (c *conn) serve(ctx context.Context) error {
	if u, ok := c.net.(*net.UnixConn); ok {
		u.SetWriteBuffer(sendBuffer)
	}
	// reading ends when no further request shall be taken, working when no
	// reply can reach the client any more.
	reading, stopReading := context.WithCancel(ctx)
	defer stopReading()
	working, stopWorking := context.WithCancel(context.WithoutCancel(ctx))
	defer stopWorking()
	defer context.AfterFunc(c.export.removed, stopReading)()
	defer context.AfterFunc(reading, func() {
		now := time.Now()
		c.net.SetReadDeadline(now)
		c.net.SetWriteDeadline(now.Add(c.options.DrainTimeout))
	})()
	c.out.failed = func() { stopWorking(); stopReading() }
	c.out.release = c.budget.Release

	jobs := make(chan job)
	var workers sync.WaitGroup
	err := c.receive(reading, jobs, func() { workers.Go(func() { c.work(working, jobs) }) })
	close(jobs)
	workers.Wait()
	return err
}

// receive is the reader: it hands requests to workers, of which start makes one
// more.
func (c *conn) receive(ctx context.Context, jobs chan<- job, start func()) error {
	workers := 0
	for {
		r, err := readRequest(c.in)
		if err != nil {
			return ignoreEOF(err)
		}
		switch r.command {
		case cmdDisc:
			return nil
		case cmdWrite:
			if r.length > maxPayload {
				return fmt.Errorf("%w: a write of %d bytes", errProtocol, r.length)
			}
			if _, err := c.in.Discard(int(r.length)); err != nil {
				return err
			}
		}
		j := job{r, min(requestCost+c.replySize(r), c.options.Budget)}
		if err := c.budget.Acquire(ctx, j.cost); err != nil {
			return err
		}
		c.pending.Add(1)
		select {
		case jobs <- j: // somebody is idle
			continue
		default:
		}
		if workers < c.options.Workers {
			workers++
			start()
		}
		select {
		case jobs <- j:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (c *conn) work(ctx context.Context, jobs <-chan job) {
	for j := range jobs {
		b := c.execute(ctx, j.request)
		b.cost = j.cost
		// While others are at work, their replies may leave with ours.
		c.out.send(b, c.pending.Add(-1) > 0)
	}
}

func ignoreEOF(err error) error {
	if err == io.EOF {
		return nil
	}
	return err
}
