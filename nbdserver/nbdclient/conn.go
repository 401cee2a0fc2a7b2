package nbdclient

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/holdfast-backup/holdfast/nbdserver/internal/wire"
)

// inputBuffer is a connection's, in bytes: enough for headers. What it takes of
// the data behind a header has to be copied.
const inputBuffer = 4 << 10

// request is a command that waits for its reply. From conn.send until complete is
// called it belongs to the connection.
type request struct {
	wire.Request
	buf     []byte      // where the data of a read goes, Length bytes
	context string      // of which block status is wanted
	extents []wireRange // its status from Offset on

	got      ranges       // what has arrived of a read
	answered uint64       // bits of the contexts whose block status has arrived
	failure  *ServerError // the first of the reply

	// err is why the request failed; retry says that its connection did, and that
	// it may be sent on another. Both are set before complete is called.
	err      error
	retry    bool
	complete func(*request)

	sent time.Time // guarded by conn.mu
}

// wireRange is an extent of a block status reply.
type wireRange struct{ length, flags uint64 }

// prepare makes the request ready to be sent, again maybe.
func (r *request) prepare(complete func(*request)) {
	r.extents, r.got, r.answered, r.failure = nil, nil, 0, nil
	r.err, r.retry, r.complete = nil, false, complete
}

// conn is a connection in the transmission phase.
type conn struct {
	export
	net       net.Conn
	socket    net.Conn // below TLS
	in        *bufio.Reader
	useful    bool   // has brought a reply; owned by the receiver
	completed func() // called for each request that is answered
	load      int    // requests that hold room, guarded by the pool

	sending sync.Mutex // guards out, and is held while writing
	out     []byte

	mu      sync.Mutex          // guards the rest
	pending map[uint64]*request // nil once abandoned
	cookie  uint64              // the last
	heard   time.Time           // when the last part of a reply began to arrive
	broken  error
}

// send sends a request. Every outcome, also that of sending, is the receiver's to
// tell.
func (c *conn) send(r *request) {
	c.mu.Lock()
	c.cookie++
	r.Cookie = c.cookie
	r.sent = time.Now()
	if c.pending == nil {
		err := c.broken
		c.mu.Unlock()
		c.finish(r, err, true)
		return
	}
	c.pending[r.Cookie] = r
	header := r.Request // from here on r is the receiver's
	c.mu.Unlock()
	c.sending.Lock()
	c.out = wire.AppendRequest(c.out[:0], header, c.replies == extended)
	_, err := c.net.Write(c.out)
	c.sending.Unlock()
	if err != nil {
		c.fail(err)
	}
}

// finish tells the outcome of a request.
func (c *conn) finish(r *request, err error, broken bool) {
	c.completed()
	r.err = err
	r.retry = broken && !errors.Is(err, ErrProtocol) && !errors.Is(err, ErrClosed)
	r.complete(r)
}

// fail ends the connection; the first error is the one that counts.
func (c *conn) fail(err error) {
	c.mu.Lock()
	if c.broken == nil {
		c.broken = err
	}
	c.mu.Unlock()
	c.socket.Close()
}

// leave says goodbye to the server and ends the connection.
func (c *conn) leave() {
	c.mu.Lock()
	if c.broken == nil {
		c.broken = ErrClosed
	}
	c.mu.Unlock()
	c.socket.SetWriteDeadline(time.Now().Add(time.Second)) // also for who is sending
	c.sending.Lock()
	_, _ = c.net.Write(wire.AppendRequest(nil, wire.Request{Command: wire.CmdDisc}, c.replies == extended))
	c.sending.Unlock()
	c.net.Close()
}

// overdue reports whether nothing arrives though there are requests, or a reply
// takes far too long.
func (c *conn) overdue(now time.Time, timeout time.Duration) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, r := range c.pending {
		age := now.Sub(r.sent)
		if age > 10*timeout || age > timeout && now.Sub(c.heard) > timeout {
			return true
		}
	}
	return false
}

// receive takes replies until the connection ends and returns why it did.
func (c *conn) receive() error {
	var err error
	for err == nil {
		err = c.reply()
		c.useful = c.useful || err == nil
	}
	if errors.Is(err, io.EOF) {
		err = fmt.Errorf("the server closed the connection: %w", io.ErrUnexpectedEOF)
	}
	c.fail(err)
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.broken
}

// abandon fails the requests that the ended connection owes with err, and from
// now on those that are sent on it.
func (c *conn) abandon(err error) {
	c.mu.Lock()
	pending := c.pending
	c.pending, c.broken = nil, err
	c.mu.Unlock()
	for _, r := range pending {
		c.finish(r, err, true)
	}
}

// find returns the request that a reply belongs to.
func (c *conn) find(cookie uint64) (*request, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := c.pending[cookie]
	if r == nil {
		return nil, fmt.Errorf("%w: a reply with unknown cookie %#x", ErrProtocol, cookie)
	}
	c.heard = time.Now()
	return r, nil
}

// answered takes a request off the list and tells its outcome. A server that
// shuts down has answered the last request.
//
// Source: NBD doc/proto.md, "Terminating the transmission phase".
func (c *conn) answered(r *request) error {
	c.mu.Lock()
	delete(c.pending, r.Cookie)
	c.mu.Unlock()
	if r.failure == nil {
		c.finish(r, nil, false)
		return nil
	}
	failure, leaves := r.failure, r.failure.Errno == syscall.ESHUTDOWN
	c.finish(r, failure, leaves)
	if leaves {
		return failure
	}
	return nil
}

// reply receives one simple reply, or one chunk of a structured one.
func (c *conn) reply() error {
	p, err := c.in.Peek(4)
	if err != nil {
		return err
	}
	magic := binary.BigEndian.Uint32(p)
	switch {
	case magic == wire.MagicSimple && c.replies != extended:
		return c.simple()
	case magic == wire.MagicStructured && c.replies == structured,
		magic == wire.MagicExtendedReply && c.replies == extended:
		return c.chunk()
	}
	return fmt.Errorf("%w: %#x begins a reply where replies are %v", ErrProtocol, magic, c.replies)
}

// header reads the next n bytes, which are valid until the next read.
func (c *conn) header(n int) (wire.Decoder, error) {
	p, err := c.in.Peek(n)
	if err == nil {
		_, err = c.in.Discard(n)
	}
	return wire.Decoder{P: p}, unexpected(err)
}

// unexpected is err for a stream that must not end here.
func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// simple receives a simple reply.
//
// Source: NBD doc/proto.md, "Simple reply message".
func (c *conn) simple() error {
	d, err := c.header(wire.SimpleLen)
	if err != nil {
		return err
	}
	d.Uint32()
	errno := wire.Errno(d.Uint32())
	r, err := c.find(d.Uint64())
	if err != nil {
		return err
	}
	switch {
	case c.replies == structured && r.Command == wire.CmdRead:
		return fmt.Errorf("%w: a simple reply to a read though structured replies were negotiated", ErrProtocol)
	case errno != 0:
		r.failure = serverError(errno, "")
	case r.Command != wire.CmdRead:
		return fmt.Errorf("%w: a simple reply to a request for block status", ErrProtocol)
	default:
		if _, err := io.ReadFull(c.in, r.buf); err != nil {
			return unexpected(err)
		}
	}
	return c.answered(r)
}
