package nbdserver

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/nbdserver/internal/wire"
)

const (
	// sendBuffer is the buffer in bytes of a unix socket: room for a few replies of
	// the length that copying clients ask for, so that the writer seldom sleeps. The
	// system may grant less.
	sendBuffer = 2 << 20
	// quietTime is how long a client must not have asked anything for its
	// connection to end when the export does.
	quietTime = 100 * time.Millisecond
	// closingTime is how long requests may stay in a disk after their connection
	// was closed before they are left to themselves.
	closingTime = 5 * time.Second
)

// conn is a client in the transmission phase.
type conn struct {
	choice
	options Options
	writer  image.Writer // nil if the export is read-only
	net     net.Conn
	lane    *lane
	ownLane *semaphore.Weighted // what of the lane is this connection's at most
	queue   schedule
	out     replyQueue
	log     *slog.Logger

	// Owned by the reader.
	in         *bufio.Reader
	socket     *socket // nil if net is none of the operating system, or encrypted
	held       bool    // replies may wait for a flush
	streams    streams
	quietSince time.Time // while the connection drains
	sentBefore int64     // replies sent, when that was last looked at

	diskErrors atomic.Int64 // those that were or would have been logged
	mapErrors  atomic.Int64

	draining atomic.Bool
	inline   atomic.Int64 // requests that the reader executes, or one who was that
	quick    atomic.Int64 // score of the disk's latest answers to small requests, up to bestScore
	relief   *relief
	readers  sync.WaitGroup // the reader, and those who were and still execute a request
}

func newConn(s *Server, nc net.Conn, in *bufio.Reader, chosen choice, log *slog.Logger) *conn {
	c := &conn{
		choice: chosen, options: s.options, writer: chosen.export.writer(), net: nc, in: in, log: log,
		lane: s.lane, ownLane: semaphore.NewWeighted(laneShare),
	}
	c.queue.memory = account{pool: s.memory, credit: bufferCost(pieceLen)}
	c.queue.limit = s.options.Workers
	c.queue.watch = time.AfterFunc(stallPeriod, c.queue.stall)
	c.queue.watch.Stop()
	c.out.conn = nc
	c.out.release = func(cost, lane int64) {
		if lane > 0 {
			c.leaveLane(lane)
		}
		c.queue.give(cost)
	}
	c.out.contended = c.lane.contended
	if u, ok := nc.(*net.UnixConn); ok {
		_ = u.SetWriteBuffer(sendBuffer) // a smaller one is only slower
	}
	if c.socket = newSocket(nc, s.waiters); c.socket != nil {
		c.net, c.out.conn = c.socket, c.socket
		read, _ := in.Peek(in.Buffered())
		c.in = bufio.NewReaderSize(io.MultiReader(bytes.NewReader(slices.Clone(read)), c.socket), readerSize)
	}
	c.streams.disk, _ = chosen.export.Disk.(Prefetcher)
	c.streams.size = chosen.export.size
	return c
}

// serve answers requests until the client leaves, or its export is removed or ctx
// is done and the client is quiet, or Options.DrainTimeout after one of that. Whatever
// changes the disk and was asked before the client left is executed in that time,
// also if no reply can reach the client. It returns after the last reply, and ends the
// use of the export's disk: before it returns, or later if it returns ErrBusy. Any
// other error says why the client had to be dropped.
func (c *conn) serve(ctx context.Context) error {
	// working ends when nothing is to begin any more, replying already when no reply
	// can reach the client.
	working, stop := context.WithCancel(context.WithoutCancel(ctx))
	replying, mute := context.WithCancel(working)
	abort := func() { stop(); c.net.Close() }
	defer mute()
	defer abort()
	timer := time.AfterFunc(c.options.DrainTimeout, abort)
	timer.Stop()
	defer timer.Stop()
	last := sync.OnceFunc(func() { timer.Reset(c.options.DrainTimeout) })
	c.out.failed = func(err error) {
		mute()
		last()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			c.net.Close() // the client is there: else what it has sent is still read
		}
	}
	drain := func() {
		last()
		c.draining.Store(true)
		c.net.SetReadDeadline(time.Now().Add(quietTime))
	}
	defer context.AfterFunc(ctx, drain)()
	defer context.AfterFunc(c.export.removed, drain)() //nolint:contextcheck // the export's end is no child of this call's

	c.queue.work = func(next func() (job, bool)) { c.work(working, replying, next) }
	read := make(chan error, 1)
	startReader := func() {
		c.readers.Go(func() {
			if err := c.receive(working); !errors.Is(err, errRelieved) {
				read <- err
			}
		})
	}
	c.relief = newRelief(func() {
		c.quick.Store(0) // the next reader would meet the same disk
		startReader()
	})
	startReader()
	err := <-read
	c.relief.timer.Stop()
	last()
	err = c.end(working, err)
	if disk, maps := c.diskErrors.Load(), c.mapErrors.Load(); max(disk, maps) > maxLogged {
		c.log.WarnContext(ctx, "an export's disk had more errors than were logged",
			slog.Int64("requests", disk), slog.Int64("maps", maps))
	}
	return err
}

// end waits for what is being executed, until closingTime after ctx is done.
func (c *conn) end(ctx context.Context, err error) error {
	idle := make(chan struct{})
	go func() {
		c.readers.Wait()
		c.queue.started.Wait()
		if c.socket != nil {
			c.socket.release()
		}
		c.queue.watch.Stop()
		c.queue.close()
		c.export.users.Done()
		close(idle)
	}()
	select {
	case <-idle:
		return err
	case <-ctx.Done():
	}
	select {
	case <-idle:
		return err
	case <-time.After(closingTime):
		return c.export.abandon(idle)
	}
}

var errRelieved = errors.New("another goroutine has become the reader")

// receive is the reader. It hands requests to workers, or executes them itself
// while the disk is quick; the replies to those leave when no further request
// has arrived. It returns when there is nothing more to read, or with
// errRelieved.
func (c *conn) receive(ctx context.Context) error {
	c.held = true // a reader before may have left some
	c.flush()
	for {
		r, err := c.readRequest()
		if err == nil && r.Command != wire.CmdDisc {
			err = c.accept(ctx, r)
		}
		if err != nil || r.Command == wire.CmdDisc {
			if !errors.Is(err, errRelieved) {
				c.flush()
			}
			return ignoreEOF(err)
		}
	}
}

// flush sends the replies that the reader holds back.
func (c *conn) flush() {
	if c.held {
		c.out.flush(false)
		c.held = false
	}
}

// rest is flush by a reader that perhaps has to wait for others before it reads
// again: the connection is not busy meanwhile.
func (c *conn) rest() {
	c.flush()
	if c.socket != nil {
		c.socket.run = 0
		c.socket.park() // if it cannot be, the next read tries
	}
}

// push hands a job to the workers.
func (c *conn) push(ctx context.Context, j job) error {
	if c.queue.full() {
		c.rest()
	}
	c.flush()
	return c.queue.push(ctx, j)
}

// headerLen is the length of a request's header.
func (c *conn) headerLen() int {
	if c.extended {
		return wire.ExtendedRequestLen
	}
	return wire.RequestLen
}

// readRequest reads one request header. It returns io.EOF when the client hung
// up between requests, or is quiet when it shall.
func (c *conn) readRequest() (wire.Request, error) {
	n := c.headerLen()
	if idle := c.options.IdleTimeout; idle > 0 && c.in.Buffered() < n {
		c.net.SetReadDeadline(time.Now().Add(idle))
	}
	if c.draining.Load() { // perhaps only now: its deadline counts
		c.net.SetReadDeadline(time.Now().Add(quietTime))
	} else {
		c.sentBefore = c.out.sent.Load()
	}
	if c.socket != nil && c.in.Buffered() < n && c.quick.Load() >= quickRun && c.queue.idle() && c.inline.Load() == 0 {
		c.socket.hasten()
	}
	p, err := c.in.Peek(n)
	for err != nil {
		switch {
		case !c.timedOut(err):
			return wire.Request{}, err
		case !c.draining.Load():
			err = c.waitOn(c.busy())
		case c.quiet():
			err = io.EOF
		default:
			err = nil
		}
		if err != nil {
			return wire.Request{}, err
		}
		p, err = c.in.Peek(n)
	}
	r, err := wire.DecodeRequest(p, c.extended)
	if err != nil {
		return wire.Request{}, err
	}
	if c.draining.Load() {
		c.quietSince = time.Now()
	}
	_, err = c.in.Discard(n)
	return r, err
}

var errIdle = errors.New("the client was idle for too long")

// waitOn sets the next deadline after Options.IdleTimeout has passed. It fails if
// nothing happened in that time.
func (c *conn) waitOn(busy bool) error {
	idle := c.options.IdleTimeout
	switch {
	case idle <= 0 || c.draining.Load():
		return c.net.SetReadDeadline(time.Time{})
	case !busy:
		return errIdle
	}
	return c.net.SetReadDeadline(time.Now().Add(idle))
}

// timedOut reports whether reading failed just because of a deadline that drain,
// quiet or waitOn has set.
func (c *conn) timedOut(err error) bool { return errors.Is(err, os.ErrDeadlineExceeded) }

// busy reports whether something is being executed or answered, or has been
// answered since the last look.
func (c *conn) busy() bool {
	before := c.sentBefore
	c.sentBefore = c.out.sent.Load()
	return c.inline.Load() > 0 || !c.queue.idle() || !c.out.idle() || c.sentBefore != before
}

// quiet reports whether nothing has been asked, executed or answered for
// quietTime. If not, it sets the deadline for the next look.
func (c *conn) quiet() bool {
	now := time.Now()
	if c.busy() || c.quietSince.IsZero() {
		c.quietSince = now
	}
	if now.Sub(c.quietSince) >= quietTime {
		return true
	}
	c.net.SetReadDeadline(c.quietSince.Add(quietTime))
	return false
}

// readFull fills p with a payload. That the connection drains does not hurry the
// client.
func (c *conn) readFull(p []byte) error {
	for len(p) > 0 {
		n, err := io.ReadFull(c.in, p)
		p = p[n:]
		if err != nil && c.timedOut(err) {
			err = c.waitOn(n > 0)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// discard reads a payload that nobody wants.
func (c *conn) discard(n int) error {
	for n > 0 {
		done, err := c.in.Discard(n)
		n -= done
		if err != nil && c.timedOut(err) {
			err = c.waitOn(done > 0)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// accept takes a request with its payload, and executes it or hands it to
// workers.
func (c *conn) accept(ctx context.Context, r wire.Request) error {
	payload, err := c.payload(r)
	if err != nil {
		return err
	}
	if payload > c.in.Buffered() {
		c.flush()
	}
	p := c.check(r)
	if c.draining.Load() {
		p = problemShutdown
	}
	contexts := c.contexts
	if p == nil && r.Command == wire.CmdBlockStatus && r.Flags&wire.CmdFlagPayloadLen != 0 {
		r.Length, contexts, p, err = c.readContexts(r)
		payload = 0
		if err != nil {
			return err
		}
	}
	if p != nil {
		if err := c.discard(payload); err != nil {
			return err
		}
		return c.dispatch(ctx, job{Request: r, problem: p, need: bufferCost(len(p.message))})
	}
	if r.Command == wire.CmdWrite && r.Length > 0 {
		return c.acceptWrite(ctx, r)
	}
	return c.dispatch(ctx, c.newJob(r, contexts))
}

// payload returns how many bytes follow a request's header: with extended headers
// what the flag says, but for a write also without it, since QEMU never sets it.
//
// Source: NBD doc/proto.md of branch extension-ext-header, "Request message".
func (c *conn) payload(r wire.Request) (int, error) {
	follows := r.Command == wire.CmdWrite || c.extended && r.Flags&wire.CmdFlagPayloadLen != 0
	switch {
	case !follows:
		return 0, nil
	case r.Length > wire.MaxPayload:
		return 0, fmt.Errorf("%w: a payload of %d bytes", wire.ErrProtocol, r.Length)
	}
	return int(r.Length), nil
}

// acceptWrite reads the payload of a write in pieces, each once there is memory
// for it.
func (c *conn) acceptWrite(ctx context.Context, r wire.Request) error {
	j := job{Request: r, off: int64(r.Offset)}
	if r.Length > pieceLen {
		j.parts = newParts(pieces(j.off, int64(r.Length)))
	}
	for j.off < r.End() {
		j.length = r.End() - j.off
		if j.parts != nil {
			j.length = min(j.length, pieceLen-j.off%pieceLen)
		}
		cost := bufferCost(int(j.length))
		if !c.queue.try(cost) {
			c.rest()
			if err := c.queue.reserve(ctx, cost); err != nil {
				return err
			}
		}
		j.payload = newBuffer(int(j.length))
		j.payload.cost = cost
		if err := c.readFull(j.payload.extend(int(j.length))); err != nil {
			return err
		}
		if err := c.dispatch(ctx, j); err != nil {
			return err
		}
		j.off += j.length
	}
	return nil
}

// newJob plans a request without a payload that has passed check.
func (c *conn) newJob(r wire.Request, contexts []selected) job {
	j := job{Request: r, off: int64(r.Offset), length: int64(r.Length), need: bufferCost(0)}
	switch r.Command {
	case wire.CmdRead:
		c.streams.read(j.off, j.length)
		switch {
		case j.length <= pieceLen:
			j.need = bufferCost(int(j.length))
		case c.structured && r.Flags&wire.CmdFlagDF == 0:
			j.need = bufferCost(pieceLen)
			j.parts = newParts(pieces(j.off, j.length))
		default:
			j.whole, j.need = true, 0
		}
	case wire.CmdBlockStatus:
		j.contexts = contexts
		if r.Flags&wire.CmdFlagReqOne == 0 {
			j.need = bufferCost(pieceLen)
		}
		if len(contexts) > 1 {
			j.parts = newParts(int64(len(contexts)))
		}
	case wire.CmdCache:
		if c.streams.disk == nil {
			j.need = bufferCost(int(min(j.length, pieceLen)))
		}
	}
	return j
}

// dispatch executes a job at once if that is likely to be quicker than waking a
// worker for it, and otherwise hands it to one.
func (c *conn) dispatch(ctx context.Context, j job) error {
	if !c.promises(j) || j.payload == nil && !c.queue.try(j.need) {
		return c.push(ctx, j)
	}
	if j.problem == nil && !c.export.slots.try() {
		if j.payload == nil {
			c.queue.give(j.need)
		}
		return c.push(ctx, j)
	}
	more := c.in.Buffered() >= c.headerLen()
	c.inline.Add(1)
	defer c.inline.Add(-1)
	turn := c.relief.begin()
	c.perform(ctx, j)
	if !more {
		c.out.flush(false)
	}
	if !c.relief.end(turn) {
		if more {
			c.out.flush(false)
		}
		return errRelieved
	}
	c.held = more
	return nil
}

// promises reports whether a job is likely to be quick.
func (c *conn) promises(j job) bool {
	if c.quick.Load() < quickRun || j.parts != nil || j.whole {
		return false
	}
	return j.problem != nil || (j.Command == wire.CmdRead || j.Command == wire.CmdWrite) && j.Flags&wire.CmdFlagFUA == 0 && j.length <= smallReply
}

// work is a worker. A job that only asks something is not begun once replying is
// done.
func (c *conn) work(working, replying context.Context, next func() (job, bool)) {
	for {
		j, ok := next()
		if !ok {
			return
		}
		ctx := replying
		if j.changes() {
			ctx = working
		}
		if !c.begin(ctx, j) {
			continue
		}
		c.perform(ctx, j)
		// While others are at work, their replies may leave with ours.
		c.out.flush(c.queue.busy())
	}
}

// begin waits for what a job needs besides its memory. If ctx is done first, the
// job is dropped and begin returns false.
func (c *conn) begin(ctx context.Context, j job) bool {
	err := ctx.Err()
	if err == nil && j.whole {
		err = c.enterLane(ctx, j.laneCost())
	}
	if err == nil && j.problem == nil {
		if err = c.export.slots.enter(ctx); err != nil && j.whole {
			c.leaveLane(j.laneCost())
		}
	}
	if err != nil {
		c.drop(j)
	}
	return err == nil
}

// drop gives back the memory of a job that is not executed.
func (c *conn) drop(j job) {
	if j.payload == nil {
		c.queue.give(j.need)
		return
	}
	c.queue.give(j.payload.cost)
	j.payload.free()
}

// enterLane takes n bytes of the lane, within the share of the connection.
func (c *conn) enterLane(ctx context.Context, n int64) error {
	if err := c.ownLane.Acquire(ctx, n); err != nil {
		return err
	}
	err := c.lane.enter(ctx, n)
	if err != nil {
		c.ownLane.Release(n)
	}
	return err
}

func (c *conn) leaveLane(n int64) {
	c.lane.leave(n)
	c.ownLane.Release(n)
}

func ignoreEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}
