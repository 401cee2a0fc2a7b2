// Package nbdserver serves disks over NBD, the network block device protocol.
//
// A [Server] holds named exports, each an [image.Disk], and speaks fixed
// newstyle NBD on the listeners it is given, in plain text or over TLS. Clients
// that negotiate structured replies or extended headers get zeros as holes, and
// block status of base:allocation and of the export's own contexts. Disks that are
// an [image.Writer] can be written.
//
// The protocol is NBD's doc/proto.md; comments name its sections.
//
// # A connection
//
// The handshake runs in one goroutine. Whatever it settles is forgotten when TLS
// starts, and metadata contexts when it goes on to another export. The transmission phase has
//
//	one reader     takes requests off the socket, with the payloads of writes,
//	               and queues them; while the disk answers within
//	               microseconds, it executes small ones itself, and another
//	               goroutine goes on reading if one then takes long
//	workers        started while something is queued, at most
//	               Options.Workers; each executes a request, or a piece of
//	               256 KiB of a long one, and builds the reply in a pooled buffer
//	one writer     a role, not a goroutine: a worker that finds nobody
//	               writing writes, and goes on until nothing waits
//
// So a request to a quick disk wakes no other goroutine, and the reader of such a
// connection waits for the next one in the system call and not in Go's poller, for 5 ms
// at most and on GOMAXPROCS - 1 connections at the same time. A slow disk is used in
// parallel, and under load many replies leave with one system call. Replies
// overtake each other, and small requests and replies overtake large ones. A
// sequence of reads is told to a disk that is a [Prefetcher], as is NBD_CMD_CACHE.
//
// # Memory
//
// A piece is executed once there is memory for it, and the payload of a write is
// read from the socket in pieces, each once there is memory. Every connection has
// 256 KiB of its own, so that it gets on whatever others do with the rest; a piece of
// a write that has its memory overtakes what is refused some. Beyond that it borrows
// from Options.Memory, and never comes to hold more than half of what is then
// free: one client that asks for much and reads nothing holds a third, a hundred
// of them leave room for others. Replies that cannot be cut (simple ones, and those
// with the flag DF) and are longer than a piece take their memory, in turn, from
// 64 MiB for all connections; of a connection at most 4 and 32 MiB do so at the same
// time. A client that holds some is dropped if it takes less than 256 KiB in 30 s or,
// while others wait, if such a reply takes it longer than 30 s in all.
//
// # Writes
//
// A flush makes durable what all connections have been told is written; flushes
// that wait at the same time share one Sync. A long write reaches the disk in
// pieces, in any order; when one fails the others may be written or not. A write
// that fails is read from the socket to its end, so the connection goes on. What was
// asked before a client disconnects, or is gone, still changes the disk, within
// Options.DrainTimeout.
//
// # Invariants
//
//   - A reply, or the chunk of one, is complete before its first byte is sent: an
//     error of the disk becomes an error reply or chunk and never a broken stream.
//   - The server uses an export's disk only between the handshake that chose
//     the export and the return of [Server.Remove] or [Server.Serve], unless that
//     is ErrBusy.
//   - Whatever a request waits for is given in the order of asking, but for the
//     preference of small ones, which is bounded, and of writes that have their memory.
//   - Metadata contexts belong to the export that they were negotiated for.
//   - An export with a list of identities is neither listed nor described nor
//     entered without one of them on a certificate that was verified for this
//     very connection.
//
// # Limits
//
//	32 MiB      payload of a request; a longer read gets an error reply, a longer
//	            write ends the connection, since its bytes would have to be read
//	4096 bytes  names, descriptions, queries
//	64 KiB      data of an option; a longer one ends the connection
//	64          options of a handshake
//	128         queries of a metadata option, 16 contexts selected
//	10 s        for a handshake, TLS's included; see Options.MaxConnections for
//	            how many may be under way
//	1024        clients, who may stay as long as they like unless there is an
//	            Options.IdleTimeout: whoever opens so many keeps the others out
//	256 KiB     of extents in a block status reply for each context, and 65,536
//	            pieces of the context that are looked at for it
//	256         requests of a connection that wait to be executed
//	10          errors of a disk, and of its map, logged for a connection one by one
//	64          operations that an export's disk runs at the same time, and of
//	            4,096 more for all exports at most half of what is free: a
//	            disk that hangs holds up no other export
//
// and those of [Options]. In all, payloads and replies take at most
// Options.Memory + 64 MiB + 256 KiB for each connection, which besides has buffers
// and queues of less than 100 KiB.
package nbdserver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"maps"
	"math/bits"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"golang.org/x/sync/semaphore"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/nbdserver/internal/wire"
)

// Errors of Add and Remove.
var (
	// ErrExists means that an export of that name is being served.
	ErrExists = errors.New("export exists already")
	// ErrNotFound means that no export of that name is being served.
	ErrNotFound = errors.New("no such export")
	// ErrBusy means that a disk does not answer. It must not be closed.
	ErrBusy = errors.New("a request stays in the disk")
	// ErrInvalid means an export that NBD cannot express.
	ErrInvalid = errors.New("invalid export")
)

// Options configure a Server. The zero value is the production default, and so
// is each number that is zero or less.
type Options struct {
	// MaxConnections is how many clients may be connected at once, over all
	// listeners. A quarter of them, or 16, may be in the handshake. One more takes
	// the place of whoever has been in the handshake longest, or is closed at once
	// if nobody is. Default 1024.
	MaxConnections int
	// HandshakeTimeout is how long a client may take to choose an export.
	// Default 10 s.
	HandshakeTimeout time.Duration
	// IdleTimeout ends the connection of a client in the transmission phase that
	// has asked nothing and awaited no reply for that long, or that long sent
	// nothing of a payload; it may take twice as long. 0, the default, is never: QEMU
	// keeps a connection for as long as a guest runs.
	IdleTimeout time.Duration
	// DrainTimeout is how long a client may take to receive its last replies
	// when it hung up, the server stops or its export is removed. Default 10 s.
	DrainTimeout time.Duration
	// Workers is how many requests of one connection use the disk at the same
	// time. Default 64, what copying clients send at once.
	Workers int
	// Memory is how many bytes of payloads all connections together hold beyond
	// the 256 KiB that each has for itself; see the package's Limits. Default
	// 256 MiB.
	Memory int64
	// TLS encrypts connections and verifies clients. nil means that there is no
	// encryption.
	TLS *TLS
	// Log receives errors of disks, and at debug level the coming and going of
	// clients. Default slog.Default().
	Log *slog.Logger
}

func (o Options) withDefaults() Options {
	o.MaxConnections = cmp.Or(max(o.MaxConnections, 0), 1024)
	o.HandshakeTimeout = cmp.Or(max(o.HandshakeTimeout, 0), 10*time.Second)
	o.DrainTimeout = cmp.Or(max(o.DrainTimeout, 0), 10*time.Second)
	o.Workers = cmp.Or(max(o.Workers, 0), 64)
	o.Memory = cmp.Or(max(o.Memory, 0), 256<<20)
	o.Log = cmp.Or(o.Log, slog.Default())
	return o
}

// Export is a disk with the name that clients ask for.
type Export struct {
	// Name is 1 to 4096 bytes of UTF-8 without NUL.
	Name string
	// Description is for people; at most 4096 bytes of UTF-8 without NUL.
	Description string
	// Disk is what is served. Its size must not change. The server does not
	// close it.
	Disk image.Disk
	// BlockSize is the size in bytes of the requests that the disk answers
	// best, a power of two from 512 to 32 MiB. 0 means 4096.
	BlockSize int
	// ReadOnly refuses writes to a Disk that is an [image.Writer]; any other is
	// read-only anyway.
	ReadOnly bool
	// Rotational tells clients that seeks cost: the disk lies on rotating media.
	Rotational bool
	// Allow, if not empty, names who may use the export: see [Identities]. For
	// all others it does not exist. It needs TLS that verifies clients.
	Allow []string
	// Contexts are the disk's metadata contexts besides base:allocation; nil
	// means that there are none.
	Contexts Contexts
}

// Contexts are metadata contexts of a disk.
type Contexts interface {
	// List returns the names of contexts, as NAMESPACE:LEAF, each once.
	List() []string
	// Open returns the context that a client selects by name; the name need not
	// be one of List's. False means that there is none.
	Open(name string) (Context, bool)
}

// Context is a metadata context: what block status tells of a disk's ranges.
type Context interface {
	// Status yields what [off, off+length) holds, in order and without gaps,
	// clipped to that range; neighbours of the same flags may be yielded apart. An
	// error ends the sequence. A caller may stop early; work is done only as far as
	// it reads.
	Status(ctx context.Context, off, length int64) iter.Seq2[Status, error]
}

// Status is the half-open byte range [Off, Off+Len) with the flags that a metadata context gives it.
type Status struct {
	Off, Len int64
	Flags    uint32
}

// validate checks what the protocol demands of an export.
//
// Source: NBD doc/proto.md, "Conventions" and "Size constraints".
func (e Export) validate() error {
	for what, s := range map[string]string{"name": e.Name, "description": e.Description} {
		if len(s) > wire.MaxString || !utf8.ValidString(s) || strings.ContainsRune(s, 0) {
			return fmt.Errorf("%w: the %s %.64q is not %d bytes or less of UTF-8 without NUL", ErrInvalid, what, s, wire.MaxString)
		}
	}
	if e.Name == "" {
		return fmt.Errorf("%w: it has no name", ErrInvalid)
	}
	if e.BlockSize < 512 || e.BlockSize > wire.MaxPayload || bits.OnesCount(uint(e.BlockSize)) != 1 {
		return fmt.Errorf("%w: %q has block size %d, not a power of two from 512 to %d", ErrInvalid, e.Name, e.BlockSize, wire.MaxPayload)
	}
	if size := e.Disk.Size(); size < 0 || size > image.MaxSize {
		return fmt.Errorf("%w: %q has a size of %d bytes", ErrInvalid, e.Name, size)
	}
	return nil
}

// export is an Export being served.
type export struct {
	Export
	size    int64
	removed context.Context // done once the export is removed
	remove  context.CancelFunc
	users   sync.WaitGroup // of the disk; Add only under Server.mu
	slots   slots          // for operations of the disk
	syncs   syncs
	stuck   atomic.Int64 // connections that ended but for a request that stays in the disk
}

// abandon counts a use of the disk that has to be waited for no longer, until it
// ends and idle is closed.
func (x *export) abandon(idle <-chan struct{}) error {
	x.stuck.Add(1)
	go func() { <-idle; x.stuck.Add(-1) }()
	return fmt.Errorf("%w: export %q", ErrBusy, x.Name)
}

// Server serves exports to NBD clients. Its methods may be called from many
// goroutines at once.
type Server struct {
	options Options
	places  *places
	memory  *pool               // of payloads and replies, in bytes
	lane    *lane               // memory of replies that cannot be cut
	slots   *pool               // for operations of disks
	waiters *semaphore.Weighted // connections whose system calls wait

	mu      sync.Mutex // guards exports
	exports map[string]*export
}

// New returns a server without exports.
func New(o Options) *Server {
	o = o.withDefaults()
	return &Server{
		options: o,
		places:  newPlaces(o.MaxConnections),
		memory:  newPool(o.Memory),
		lane:    newLane(),
		slots:   newPool(sharedSlots),
		waiters: semaphore.NewWeighted(int64(runtime.GOMAXPROCS(0)) - 1),
		exports: map[string]*export{},
	}
}

// Add begins to serve an export. It fails with ErrExists or ErrInvalid.
func (s *Server) Add(e Export) error {
	e.BlockSize = cmp.Or(e.BlockSize, 4096)
	if err := e.validate(); err != nil {
		return err
	}
	if len(e.Allow) > 0 && (s.options.TLS == nil || !s.options.TLS.verify) {
		return fmt.Errorf("%w: %q names who may use it, but the server verifies no certificates", ErrInvalid, e.Name)
	}
	e.Allow = slices.Clone(e.Allow)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.exports[e.Name] != nil {
		return fmt.Errorf("%w: %q", ErrExists, e.Name)
	}
	x := &export{Export: e, size: e.Disk.Size()}
	x.removed, x.remove = context.WithCancel(context.Background())
	x.slots.account = account{pool: s.slots, credit: ownSlots}
	s.exports[e.Name] = x
	return nil
}

// Remove stops serving an export and ends its connections as Serve does when it
// ends. It returns when the last use of its disk has ended, so that the disk can
// be closed. It fails with ErrNotFound, and with ErrBusy if the disk does not
// answer; the disk must not be closed then.
func (s *Server) Remove(name string) error {
	s.mu.Lock()
	x := s.exports[name]
	delete(s.exports, name)
	s.mu.Unlock()
	if x == nil {
		return fmt.Errorf("%w: %q", ErrNotFound, name)
	}
	x.remove()
	unused := make(chan struct{})
	go func() { x.users.Wait(); close(unused) }()
	select {
	case <-unused:
		return nil
	case <-time.After(s.options.DrainTimeout + 2*closingTime):
		return fmt.Errorf("%w: export %q", ErrBusy, name)
	}
}

// find returns the export that a client knows by that name, or nil. The empty
// name means its only export, if there is exactly one.
func (s *Server) find(who identities, name string) *export {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.findLocked(who, name)
}

func (s *Server) findLocked(who identities, name string) *export {
	if name == "" {
		if known := s.listLocked(who); len(known) == 1 {
			return known[0]
		}
	}
	if x := s.exports[name]; x != nil && who.may(x) {
		return x
	}
	return nil
}

// attach is find for a client that uses the export, in the transmission phase
// above all. The caller calls users.Done of the export when the client is gone.
func (s *Server) attach(who identities, name string) *export {
	s.mu.Lock()
	defer s.mu.Unlock()
	x := s.findLocked(who, name)
	if x != nil {
		x.users.Add(1)
	}
	return x
}

// list returns the exports that a client may use, sorted by name.
func (s *Server) list(who identities) []*export {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.listLocked(who)
}

func (s *Server) listLocked(who identities) []*export {
	known := slices.DeleteFunc(slices.Collect(maps.Values(s.exports)), func(x *export) bool { return !who.may(x) })
	slices.SortFunc(known, func(a, b *export) int { return cmp.Compare(a.Name, b.Name) })
	return known
}

// Serve accepts clients on l until ctx is done. Then each client receives the
// replies to what it has asked, further requests are answered with ESHUTDOWN, and
// the connection ends when the client hangs up, when it has been quiet for a tenth
// of a second, or after Options.DrainTimeout.
//
// Serve returns nil after the last connection has ended, or the listener's error;
// l is closed in any case. If a request stays in a disk for longer than 5 s after
// its connection was closed, Serve returns ErrBusy with the export's name, too,
// and leaves that request to itself: the caller must not close that disk. Several
// listeners may be served at once.
func (s *Server) Serve(ctx context.Context, l net.Listener) (err error) {
	ctx, cancel := context.WithCancel(ctx)
	var clients sync.WaitGroup
	defer func() {
		clients.Wait()
		err = errors.Join(err, s.busy())
	}()
	defer cancel() // ends the clients when the listener failed
	defer l.Close()
	defer context.AfterFunc(ctx, func() { l.Close() })()

	for {
		nc, err := l.Accept()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				nc.Close()
			}
			return nil
		case err != nil && isTemporary(err):
			s.options.Log.WarnContext(ctx, "cannot accept a client", slog.Any("error", err))
			pause(ctx, 100*time.Millisecond)
			continue
		case err != nil:
			return fmt.Errorf("accept on %v: %w", l.Addr(), err)
		}
		place := s.places.take(ctx, nc)
		if place == nil {
			s.options.Log.WarnContext(ctx, "too many clients", slog.Int("limit", s.options.MaxConnections))
			nc.Close()
			continue
		}
		clients.Go(func() {
			defer place.leave()
			err := s.serveClient(ctx, nc, place.settle)
			s.options.Log.DebugContext(ctx, "client gone", slog.String("client", clientName(nc)), slog.Any("error", err))
		})
	}
}

// busy returns ErrBusy for the exports whose disks do not answer, or nil.
func (s *Server) busy() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var names []string
	for name, x := range s.exports {
		if x.stuck.Load() > 0 {
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		return nil
	}
	slices.Sort(names)
	return fmt.Errorf("%w: exports %q", ErrBusy, names)
}

// ServeConn serves one client that is connected already, until it leaves or ctx
// is done, as Serve does. It closes nc. The error says why the client had to be
// dropped; it is nil also for one that left without choosing an export. The
// client does not count towards Options.MaxConnections.
func (s *Server) ServeConn(ctx context.Context, nc net.Conn) error {
	return s.serveClient(ctx, nc, func() {})
}

// serveClient is ServeConn that calls settled when the handshake is over.
func (s *Server) serveClient(ctx context.Context, nc net.Conn, settled func()) error {
	n := newNegotiation(s, nc)
	defer func() { n.conn.Close() }() // with TLS's farewell if it was started
	proceed := context.AfterFunc(ctx, func() { nc.Close() })
	chosen, err := n.run(ctx)
	if chosen == nil {
		proceed()
		if err != nil {
			return fmt.Errorf("handshake: %w", err)
		}
		return nil
	}
	settled()
	if !proceed() {
		chosen.export.users.Done()
		return nil
	}
	log := s.options.Log.With(slog.String("client", clientName(nc)), slog.String("export", chosen.export.Name))
	log.DebugContext(ctx, "client connected", slog.Bool("tls", n.encrypted))
	return newConn(s, n.conn, n.in, *chosen, log).serve(ctx)
}

// clientName is the client's address for logs; a connection that broke before
// anybody asked has none.
func clientName(nc net.Conn) string {
	if addr := nc.RemoteAddr(); addr != nil {
		return addr.String()
	}
	return ""
}
