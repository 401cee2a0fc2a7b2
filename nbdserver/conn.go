package nbdserver

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/holdfast-backup/holdfast/nbdserver/internal/wire"
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
	out     *replyQueue
	log     *slog.Logger

	// Owned by the reader.
	in      *bufio.Reader
	jobs    chan job // to the workers
	started int      // workers

	budget  *semaphore.Weighted
	pending atomic.Int64 // requests handed to workers whose reply is not queued yet
	quick   atomic.Int64 // requests that were quick since the last that was not, up to quickRun
	relief  *relief
	readers sync.WaitGroup // the reader, and those who were and still execute a request
	workers sync.WaitGroup
}

// job is a request with the bytes of the budget that it holds.
type job struct {
	wire.Request
	cost int64
}

func newConn(o Options, nc net.Conn, in *bufio.Reader, chosen choice, log *slog.Logger) *conn {
	c := &conn{
		choice: chosen, options: o, net: nc, in: in, log: log,
		jobs:   make(chan job),
		budget: semaphore.NewWeighted(o.Budget),
	}
	c.out = &replyQueue{conn: nc, release: c.budget.Release}
	return c
}

// serve answers requests until the client leaves, its export is removed or ctx
// is done, and returns after the last reply. The error says why the client had
// to be dropped.
func (c *conn) serve(ctx context.Context) error {
	if u, ok := c.net.(*net.UnixConn); ok {
		_ = u.SetWriteBuffer(sendBuffer) // a smaller one is only slower
	}
	// reading ends when no further request shall be taken, working when no
	// reply can reach the client any more.
	reading, stopReading := context.WithCancel(ctx)
	defer stopReading()
	working, stopWorking := context.WithCancel(context.WithoutCancel(ctx))
	defer stopWorking()
	defer context.AfterFunc(c.export.removed, stopReading)() //nolint:contextcheck // the export's end is no child of this call's
	defer context.AfterFunc(reading, func() {
		now := time.Now()
		c.net.SetReadDeadline(now)
		c.net.SetWriteDeadline(now.Add(c.options.DrainTimeout))
	})()
	c.out.failed = func() { stopWorking(); stopReading() }

	ended := make(chan error, 1)
	startReader := func() {
		c.readers.Go(func() {
			if err := c.receive(reading, working); !errors.Is(err, errRelieved) {
				ended <- err
			}
		})
	}
	c.relief = newRelief(startReader)
	startReader()
	err := <-ended
	c.relief.timer.Stop()
	close(c.jobs)
	c.readers.Wait()
	c.workers.Wait()
	return err
}

var errRelieved = errors.New("another goroutine has become the reader")

// receive is the reader. It hands requests to workers, or executes them itself
// while the disk is quick; the replies to those leave when no further request
// has arrived. It returns when there is nothing more to read, or with
// errRelieved.
func (c *conn) receive(reading, working context.Context) error {
	held := true // replies may wait for a flush; a reader before may have left some
	flush := func() {
		if held {
			c.out.flush(false)
			held = false
		}
	}
	flush()
	defer flush()
	for {
		r, err := readRequest(c.in)
		if err != nil {
			return ignoreEOF(err)
		}
		switch r.Command {
		case wire.CmdDisc:
			return nil
		case wire.CmdWrite:
			flush()
			if r.Length > wire.MaxPayload {
				return fmt.Errorf("%w: a write of %d bytes", wire.ErrProtocol, r.Length)
			}
			if _, err := c.in.Discard(int(r.Length)); err != nil {
				return err
			}
		}
		j := job{r, min(requestCost+c.replySize(r), c.options.Budget)}
		if !c.budget.TryAcquire(j.cost) {
			flush()
			if err := c.budget.Acquire(reading, j.cost); err != nil {
				return err
			}
		}
		if c.quick.Load() < quickRun || j.cost > smallReply {
			flush()
			if err := c.dispatch(reading, working, j); err != nil {
				return err
			}
			continue
		}
		more := c.in.Buffered() >= wire.RequestLen
		turn := c.relief.begin()
		c.out.add(c.perform(working, j))
		held = true
		if !more {
			flush()
		}
		if !c.relief.end(turn) {
			return errRelieved
		}
	}
}

// dispatch hands a job to a worker, a new one if none is idle.
func (c *conn) dispatch(reading, working context.Context, j job) error {
	c.pending.Add(1)
	select {
	case c.jobs <- j: // somebody is idle
		return nil
	default:
	}
	if c.started < c.options.Workers {
		c.started++
		c.workers.Go(func() { c.work(working) })
	}
	select {
	case c.jobs <- j:
		return nil
	case <-reading.Done():
		return reading.Err()
	}
}

func (c *conn) work(ctx context.Context) {
	for j := range c.jobs {
		c.out.add(c.perform(ctx, j))
		// While others are at work, their replies may leave with ours.
		c.out.flush(c.pending.Add(-1) > 0)
	}
}

// perform executes a job and notes whether the disk was quick.
func (c *conn) perform(ctx context.Context, j job) *buffer {
	began := time.Now()
	b := c.execute(ctx, j.Request)
	b.cost = j.cost
	if time.Since(began) > quickly {
		c.quick.Store(0)
	} else if c.quick.Load() < quickRun {
		c.quick.Add(1)
	}
	return b
}

func ignoreEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// readRequest reads one request header. It returns io.EOF when the client hung
// up between requests.
func readRequest(in *bufio.Reader) (wire.Request, error) {
	p, err := in.Peek(wire.RequestLen)
	if err != nil {
		return wire.Request{}, err
	}
	r, err := wire.DecodeRequest(p, false)
	if err != nil {
		return wire.Request{}, err
	}
	_, err = in.Discard(wire.RequestLen)
	return r, err
}
