// Package nbdclient reads disks from NBD servers.
//
// A [Client] is an [image.Disk] over one export of a server: QEMU's while
// libvirt runs a pull-mode backup, qemu-nbd, nbdkit, or any other that speaks
// fixed newstyle NBD. It reads in pieces, many at once, over as many connections
// as the server allows, and tells zeros from data by the context base:allocation
// and changed ranges from others by a dirty bitmap's context. It never writes.
//
// The protocol is NBD's doc/proto.md, URIs are its doc/uri.md; comments name
// their sections.
//
// # Trust
//
// The server is not trusted to keep to the protocol. A reply that breaks it ends
// its connection with [ErrProtocol]. A read is complete only if every byte has
// arrived; bytes go nowhere but into the part of the caller's buffer that asked
// for them. What is in memory for a server is limited:
//
//	64 KiB      a reply of the handshake; 256 replies to an option
//	4 KiB       input buffer of a connection
//	1,048,576   extents of a block status reply, 16 bytes each; four requests
//	            for block status run at once in a client
//	4096        separate ranges of one read's reply that are not adjacent
//
// With TLS asked for, nothing but NBD_OPT_STARTTLS leaves in the clear, and a
// server that refuses it is an error.
//
// # Concurrency
//
// A connection has one goroutine, which receives. Requests are sent by whoever
// has them, and a request belongs to its connection until that goroutine has
// answered it, or has ended. So no byte arrives in a buffer after its ReadAt has
// returned. One more goroutine connects, and one looks for requests that wait
// too long.
//
// # Lost connections
//
// When a connection ends, the requests that it owes are sent again on another or
// a new one, whose export must have the same size, flags, block sizes, kind of
// replies and contexts; see [Options]. While others are left, one attempt is made
// to replace it: if that fails, the client makes do with the others until the
// last of them has ended.
//
// Whether a new connection finds the same bytes, NBD cannot tell: where another
// disk may come up under the same address, set Options.NoReconnect. All
// connections are then made in Dial, and the end of any of them, be it that
// nothing was asked of it, ends them all: whatever is asked from then on is
// [ErrLost], and nothing is sent again. So all bytes are of one disk, provided
// that Dial met one server. It compares what the connections found, as above, and
// if a server ends between two of them, the end of the first is an ErrLost. What
// it cannot see is an end that the network does not tell of, a server that goes
// on serving while its successor listens, and several servers behind one address.
package nbdclient

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode/utf8"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/nbdserver/internal/wire"
)

var _ image.Disk = (*Client)(nil)

// Errors, wrapped with the name of the export.
var (
	// ErrProtocol means bytes of the server that the protocol does not allow. A
	// request that was answered with them is not sent again.
	ErrProtocol = wire.ErrProtocol
	// ErrClosed means that Close was called.
	ErrClosed = net.ErrClosed
	// ErrNoExport means that the server has no export of that name.
	ErrNoExport = errors.New("no such export")
	// ErrNoContext means a metadata context that the server did not grant. Nothing
	// is known about what it would have told: a disk without its dirty bitmap may
	// have changed anywhere.
	ErrNoContext = errors.New("the server does not offer the metadata context")
	// ErrTLS means that the server wants TLS and none was asked for, or that it
	// was asked for and the server does not offer it.
	ErrTLS = errors.New("no agreement on TLS")
	// ErrUnsupported means a server that is too old, or a URI that needs what this
	// client does not do.
	ErrUnsupported = errors.New("not supported")
	// ErrChanged means that a further connection, or one after a lost one, found
	// another export: its size, flags, block sizes, replies or contexts differ.
	ErrChanged = errors.New("the export has changed")
	// ErrLost means that a connection of a client with Options.NoReconnect ended. It
	// is joined with the reason.
	ErrLost = errors.New("the connection was lost, and the disk may be another one now")
	// ErrTimeout means a server that stopped answering.
	ErrTimeout = errors.New("the server does not answer")
)

// ServerError is an error that the server answered a request with. It unwraps
// to the errno: errors.Is(err, syscall.EIO).
type ServerError struct {
	Errno syscall.Errno
	// Message is the server's text for people, maybe empty.
	Message string
}

func (e *ServerError) Error() string {
	if e.Message == "" {
		return "the server answered: " + e.Errno.Error()
	}
	return fmt.Sprintf("the server answered: %v: %.256q", e.Errno, e.Message)
}

func (e *ServerError) Unwrap() error { return e.Errno }

// serverError returns the error for an error value of the protocol. One that the
// protocol does not know counts as EINVAL.
//
// Source: NBD doc/proto.md, "Error values".
func serverError(e wire.Errno, message string) *ServerError {
	errno, ok := map[wire.Errno]syscall.Errno{
		wire.EPERM:     syscall.EPERM,
		wire.EIO:       syscall.EIO,
		wire.ENOMEM:    syscall.ENOMEM,
		wire.EINVAL:    syscall.EINVAL,
		wire.ENOSPC:    syscall.ENOSPC,
		wire.EOVERFLOW: syscall.EOVERFLOW,
		wire.ENOTSUP:   syscall.ENOTSUP,
		wire.ESHUTDOWN: syscall.ESHUTDOWN,
	}[e]
	if !ok {
		errno = syscall.EINVAL
	}
	return &ServerError{Errno: errno, Message: message}
}

// maxContexts bounds Options.Contexts.
const maxContexts = 32

// Options say what to connect to, and how. Numbers that are zero or less mean
// their defaults.
type Options struct {
	// Network and Address are those of [net.Dial]: "tcp" and "host:port", or "unix"
	// and the path of a socket.
	Network, Address string
	// Dialer, if not nil, connects instead of net.Dialer: a tunnel.
	Dialer func(ctx context.Context, network, address string) (net.Conn, error)
	// Export is the export's name; empty is the server's default.
	Export string
	// TLS, if not nil, is what connections are encrypted with. ServerName must be
	// set for a unix socket; for TCP its default is the host.
	TLS *tls.Config
	// Contexts are metadata contexts to ask for besides base:allocation, such as
	// "qemu:dirty-bitmap:NAME"; at most 32.
	Contexts []string
	// Connections is how many connections to use if the server allows more than
	// one (NBD_FLAG_CAN_MULTI_CONN); fewer, if it refuses further ones or leaves
	// them unanswered. Default 4.
	Connections int
	// InFlight is how many requests one connection may have unanswered. Default 32.
	InFlight int
	// HandshakeTimeout is how long one connection may take to be made. Default 10 s.
	HandshakeTimeout time.Duration
	// Timeout is how long a connection that owes replies may bring nothing: no part
	// of a reply begins to arrive. One reply may take ten times as long, be it that
	// others are before it. Then the connection counts as lost. Default 60 s.
	Timeout time.Duration
	// NoReconnect makes the end of any connection that of the client: ErrLost is the
	// error of the requests that have no answer yet, and of all later ones. No
	// connection is made after Dial, which waits for all of them, one after the
	// other: up to HandshakeTimeout for one that is left unanswered, such as by a
	// qemu-nbd that has as many clients as it may.
	NoReconnect bool
	// Attempts is how often one request is sent before a lost connection is its
	// error. Default 5.
	Attempts int
	// RetryTime is how long to try to connect again when no connection is left, and
	// how long after its first loss a request is sent again. Default 60 s.
	RetryTime time.Duration
	// Log receives lost connections. Default slog.Default().
	Log *slog.Logger
}

func (o Options) withDefaults() (Options, error) {
	o.Network = cmp.Or(o.Network, "tcp")
	if o.Dialer == nil {
		var d net.Dialer
		o.Dialer = d.DialContext
	}
	o.Connections = cmp.Or(max(o.Connections, 0), 4)
	o.InFlight = cmp.Or(max(o.InFlight, 0), 32)
	o.HandshakeTimeout = cmp.Or(max(o.HandshakeTimeout, 0), 10*time.Second)
	o.Timeout = cmp.Or(max(o.Timeout, 0), time.Minute)
	o.Attempts = cmp.Or(max(o.Attempts, 0), 5)
	o.RetryTime = cmp.Or(max(o.RetryTime, 0), time.Minute)
	o.Log = cmp.Or(o.Log, slog.Default())
	if len(o.Contexts) > maxContexts {
		return o, fmt.Errorf("%d metadata contexts are more than %d", len(o.Contexts), maxContexts)
	}
	o.Contexts = slices.Clone(o.Contexts)
	if !slices.Contains(o.Contexts, wire.BaseAllocation) {
		o.Contexts = append(o.Contexts, wire.BaseAllocation)
	}
	if err := checkString("export name", o.Export); err != nil {
		return o, err
	}
	for _, name := range o.Contexts {
		if err := checkString("metadata context", name); err != nil {
			return o, err
		}
		if namespace, leaf, ok := strings.Cut(name, ":"); !ok || namespace == "" || leaf == "" {
			return o, fmt.Errorf("metadata context %.64q is not NAMESPACE:NAME", name)
		}
	}
	return o.withTLSDefaults()
}

func (o Options) withTLSDefaults() (Options, error) {
	if o.TLS == nil {
		return o, nil
	}
	o.TLS = o.TLS.Clone()
	if o.TLS.ServerName == "" && o.Network != "unix" {
		host, _, err := net.SplitHostPort(o.Address)
		if err != nil {
			return o, err
		}
		o.TLS.ServerName = host
	}
	if o.TLS.ServerName == "" && !o.TLS.InsecureSkipVerify {
		return o, errors.New("TLS over a unix socket needs the name that is in the server's certificate (tls-hostname)")
	}
	return o, nil
}

// checkString checks what the protocol demands of every string.
//
// Source: NBD doc/proto.md, "Conventions".
func checkString(what, s string) error {
	if len(s) > wire.MaxString || !utf8.ValidString(s) || strings.ContainsRune(s, 0) {
		return fmt.Errorf("the %s %.64q is not %d bytes or less of UTF-8 without NUL", what, s, wire.MaxString)
	}
	return nil
}

// Client is an export of an NBD server. Its methods may be called from many
// goroutines at once.
type Client struct {
	options Options
	export  export        // as the first connection found it
	piece   int64         // of reads, in bytes: a multiple of export.minimum
	status  chan struct{} // holds a token for each request for block status
	kick    chan struct{} // wakes the goroutine that connects
	stop    context.CancelFunc
	running sync.WaitGroup

	pool pool
}

// pieceSize is the most one request reads, in bytes, and where reads are split:
// at its multiples. Much longer ones leave the caches of both ends; shorter ones
// cost more system calls.
const pieceSize = 256 << 10

// maxStatusRequests is how many requests for block status run at once.
const maxStatusRequests = 4

// Dial connects to a server and returns its export. It fails with ErrNoExport,
// ErrTLS, ErrUnsupported, ErrProtocol or an error of the network; with
// Options.NoReconnect also with ErrChanged or ErrLost. ctx is for Dial alone.
func Dial(ctx context.Context, o Options) (*Client, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("nbd options: %w", err)
	}
	c := &Client{options: o, status: make(chan struct{}, maxStatusRequests), kick: make(chan struct{}, 1)}
	first, err := c.connect(ctx)
	if err != nil {
		return nil, c.wrap(err)
	}
	c.export = first.export
	c.piece = min(pieceSize, c.export.maximum) / c.export.minimum * c.export.minimum
	c.pool.inFlight, c.pool.most, c.pool.final = o.InFlight, 1, o.NoReconnect
	if c.export.flags&wire.FlagCanMultiConn != 0 {
		c.pool.most = o.Connections
	}
	c.pool.want = c.pool.most
	running, stop := context.WithCancel(context.WithoutCancel(ctx))
	c.stop = stop
	c.adopt(first)
	c.running.Go(func() { c.watch(running) })
	if o.NoReconnect {
		if err := c.connectAll(ctx); err != nil {
			_ = c.Close() // it has no error
			return nil, c.wrap(err)
		}
		return c, nil
	}
	c.running.Go(func() { c.keepConnected(running) })
	c.wake()
	return c, nil
}

// wrap names the export in an error.
func (c *Client) wrap(err error) error {
	return fmt.Errorf("nbd export %q at %s: %w", c.options.Export, c.options.Address, err)
}

// Size returns the export's size in bytes.
func (c *Client) Size() int64 { return c.export.size }

// ReadOnly reports whether the server says that it refuses writes.
func (c *Client) ReadOnly() bool { return c.export.flags&wire.FlagReadOnly != 0 }

// Contexts returns the metadata contexts that the server granted, sorted.
func (c *Client) Contexts() []string { return c.export.names() }

// Protocol returns what was negotiated: "extended", "structured" or "simple"
// replies.
func (c *Client) Protocol() string { return c.export.replies.String() }

// Close takes leave of the server. Calls that are waiting fail with ErrClosed.
// It returns when the last goroutine has ended.
func (c *Client) Close() error {
	conns := c.pool.close()
	c.stop()
	for _, conn := range conns {
		conn.leave()
	}
	c.running.Wait()
	return nil
}

// ReadAt reads len(p) bytes at off. Only Close, the Options' times and, with
// Options.NoReconnect, a lost connection end a read early; then, and after a
// [ServerError], n says how many bytes before the first failure are good. Beyond
// Size it returns io.EOF.
func (c *Client) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, c.wrap(fmt.Errorf("read at %d: %w", off, syscall.EINVAL))
	}
	_, length := image.Clip(off, int64(len(p)), c.export.size)
	n, err := c.read(p[:length], off)
	if err != nil {
		return n, c.wrap(fmt.Errorf("read at %d: %w", off+int64(n), err))
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}
