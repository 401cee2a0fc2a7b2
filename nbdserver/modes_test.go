package nbdserver_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/nbdserver"
)

const (
	fastZero, payloadLen          uint16 = 16, 32
	statusExt, errOffset          uint16 = 6, 0x8002
	enospc, enotsup, eshutdown    uint32 = 28, 95, 108
	maxPieceLen                          = 256 << 10
	writableFlags                 uint16 = 1<<0 | 1<<2 | 1<<3 | 1<<5 | 1<<6 | 1<<8 | 1<<10 | 1<<11
	simpleMode, structuredMode           = mode(0), mode(1)
	extendedMode                         = mode(2)
	allocationContext, hugeOffset        = "base:allocation", uint64(1) << 63
)

// mode is what a client negotiates about the form of requests and replies.
type mode int

func (m mode) String() string { return [...]string{"simple", "structured", "extended"}[m] }

var modes = []mode{simpleMode, structuredMode, extendedMode}

// modeClient is a client in the transmission phase that sends one request at a
// time.
type modeClient struct {
	*client
	mode mode
}

// ask64 is a request with a length of 64 bits.
type ask64 struct {
	flags, command uint16
	cookie         uint64
	offset, length uint64
}

// extent64 is a descriptor of a block status.
type extent64 struct{ Length, State uint64 }

// answer is the whole reply to an ask64.
type answer struct {
	errno  uint32
	data   []byte
	states map[uint32][]extent64 // by context
	kinds  []uint16
}

func enterMode(c *client, name string, m mode, contexts ...string) modeClient {
	c.Helper()
	c.send(fixedNewstyle | noZeroes)
	if m > simpleMode {
		upgrade := map[mode]uint32{structuredMode: optStructured, extendedMode: optExtended}[m]
		c.send(option(upgrade))
		c.wantReply(upgrade, repAck)
	}
	if m > simpleMode && len(contexts) > 0 {
		c.send(option(optSetMeta, meta(name, contexts...)))
		for range contexts {
			c.wantReply(optSetMeta, repMeta)
		}
		c.wantReply(optSetMeta, repAck)
	}
	c.send(option(optGo, info(name)))
	c.wantReply(optGo, repInfo)
	c.wantReply(optGo, repAck)
	return modeClient{c, m}
}

func (c modeClient) header(q ask64) []byte {
	if c.mode == extendedMode {
		return wire(uint32(0x21e41c71), q)
	}
	return request{q.flags, q.command, q.cookie, q.offset, uint32(q.length)}.wire()
}

func (c modeClient) ask(q ask64, payload []byte) answer {
	c.Helper()
	c.send(c.header(q), payload) // which the server reads before it replies
	return c.answer(q)
}

func (c modeClient) answer(q ask64) answer {
	c.Helper()
	if c.mode == simpleMode {
		n := uint32(0)
		if q.command == cmdRead {
			n = uint32(q.length)
		}
		r := c.simple(n)
		if r.cookie != q.cookie {
			c.Fatalf("got cookie %#x, want %#x", r.cookie, q.cookie)
		}
		return answer{errno: r.errno, data: r.data}
	}
	a := answer{states: map[uint32][]extent64{}}
	covered := uint64(0)
	for {
		k := c.chunkOf(q)
		a.kinds = append(a.kinds, k.Kind)
		if a.data == nil && (k.Kind == data || k.Kind == hole) {
			a.data = make([]byte, q.length)
		}
		d := k.Payload
		switch k.Kind {
		case none:
			if len(d) > 0 || k.Flags != 1 {
				c.Fatalf("a chunk that says nothing has flags %d and %d bytes", k.Flags, len(d))
			}
		case data:
			covered += uint64(copy(a.data[binary.BigEndian.Uint64(d)-q.offset:], d[8:]))
		case hole:
			covered += uint64(binary.BigEndian.Uint32(d[8:]))
		case status, statusExt:
			a.addStates(c, k)
		case chunkErr, errOffset:
			a.errno = binary.BigEndian.Uint32(d)
			rest := d[6+binary.BigEndian.Uint16(d[4:]):]
			if k.Kind == errOffset {
				if at := binary.BigEndian.Uint64(rest); at < q.offset || at >= q.offset+q.length {
					c.Fatalf("an error at %d, outside of the request", at)
				}
				rest = rest[8:]
			}
			if len(rest) > 0 {
				c.Fatalf("%d bytes behind an error", len(rest))
			}
		default:
			c.Fatalf("got a chunk of type %d", k.Kind)
		}
		if k.Flags&1 == 1 {
			break
		}
	}
	if q.command == cmdRead && a.errno == 0 && covered != q.length {
		c.Fatalf("the chunks hold %d bytes, want %d", covered, q.length)
	}
	return a
}

// chunkOf reads a chunk of the reply to q.
func (c modeClient) chunkOf(q ask64) chunk {
	c.Helper()
	var k chunk
	if c.mode == structuredMode {
		k = c.chunk()
	} else {
		p := c.read(32)
		if magic := binary.BigEndian.Uint32(p); magic != 0x6e8a278c {
			c.Fatalf("chunk magic: got %#x", magic)
		}
		if off := binary.BigEndian.Uint64(p[16:]); off != q.offset {
			c.Fatalf("chunk's offset: got %d, want %d", off, q.offset)
		}
		k = chunk{Flags: binary.BigEndian.Uint16(p[4:]), Kind: binary.BigEndian.Uint16(p[6:]), Cookie: binary.BigEndian.Uint64(p[8:])}
		k.Payload = c.read(int(binary.BigEndian.Uint64(p[24:])))
	}
	if k.Cookie != q.cookie {
		c.Fatalf("got cookie %#x, want %#x", k.Cookie, q.cookie)
	}
	if len(k.Payload) > maxPieceLen+8 && q.flags&df == 0 {
		c.Fatalf("a chunk of %d bytes", len(k.Payload))
	}
	return k
}

func (a answer) addStates(c modeClient, k chunk) {
	c.Helper()
	d := k.Payload
	id := binary.BigEndian.Uint32(d)
	if a.states[id] != nil {
		c.Fatalf("two chunks for context %d", id)
	}
	d = d[4:]
	if k.Kind == statusExt {
		if n := binary.BigEndian.Uint32(d); int(n) != (len(d)-4)/16 || c.mode != extendedMode {
			c.Fatalf("%d descriptors in %d bytes", n, len(d)-4)
		}
		for d = d[4:]; len(d) > 0; d = d[16:] {
			a.states[id] = append(a.states[id], extent64{binary.BigEndian.Uint64(d), binary.BigEndian.Uint64(d[8:])})
		}
		return
	}
	for ; len(d) > 0; d = d[8:] {
		a.states[id] = append(a.states[id], extent64{uint64(binary.BigEndian.Uint32(d)), uint64(binary.BigEndian.Uint32(d[4:]))})
	}
}

// ram is a disk in memory that can be written, and fails as it is told.
type ram struct {
	mu   sync.Mutex // guards p and errs
	p    []byte
	errs map[string]error // by method

	syncs   atomic.Int64
	largest atomic.Int64 // write in bytes
}

func newRAM(p []byte) *ram { return &ram{p: p, errs: map[string]error{}} }

func (r *ram) Size() int64 { return int64(len(r.p)) }

func (r *ram) Extents(_ context.Context, off, length int64) iter.Seq2[image.Extent, error] {
	return func(yield func(image.Extent, error) bool) {
		if length > 0 {
			yield(image.Extent{Off: off, Len: length}, nil)
		}
	}
}

func (r *ram) do(method string, off, length int64, f func(p []byte)) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.errs[method]; err != nil {
		return err
	}
	f(r.p[off : off+length])
	return nil
}

func (r *ram) ReadAt(p []byte, off int64) (int, error) {
	n := 0
	err := r.do("read", off, int64(len(p)), func(q []byte) { n = copy(p, q) })
	return n, err
}

func (r *ram) WriteAt(p []byte, off int64) (int, error) {
	if n := int64(len(p)); n > r.largest.Load() {
		r.largest.Store(n)
	}
	n := 0
	err := r.do("write", off, int64(len(p)), func(q []byte) { n = copy(q, p) })
	return n, err
}

func (r *ram) Zero(off, length int64) error {
	return r.do("zero", off, length, func(q []byte) { clear(q) })
}

// Trim leaves a mark that tells it from Zero.
func (r *ram) Trim(off, length int64) error {
	return r.do("trim", off, length, func(q []byte) {
		for i := range q {
			q[i] = 0xdd
		}
	})
}

func (r *ram) Sync() error { r.syncs.Add(1); return r.do("sync", 0, 0, func([]byte) {}) }

func (r *ram) content() []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.p)
}

func (r *ram) holds(p []byte) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return bytes.Equal(r.p, p)
}

func (r *ram) fail(method string, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.errs[method] = err
}

var quiet = nbdserver.Options{Log: slog.New(slog.DiscardHandler)}

// wantErrno is the protocol's table of errors once more, for a disk that never
// fails.
func wantErrno(m mode, q ask64, size uint64, writable bool) uint32 {
	allowed := map[uint16]uint16{
		cmdRead: fua, cmdWrite: fua, cmdFlush: fua, cmdTrim: fua, cmdCache: fua, cmdStatus: fua | reqOne, cmdZeroes: fua | noHole | fastZero,
	}
	if m > simpleMode {
		allowed[cmdRead] |= df
	}
	if m == extendedMode {
		allowed[cmdWrite] |= payloadLen
	}
	changes := q.command == cmdWrite || q.command == cmdTrim || q.command == cmdZeroes
	outside := q.offset > size || q.length > size-q.offset
	f, known := allowed[q.command]
	if !writable {
		f &^= fua
	}
	switch {
	case !known:
		return einval
	case changes && !writable:
		return eperm
	case q.flags&^f != 0, q.command == cmdFlush && (q.offset != 0 || q.length != 0):
		return einval
	case outside && (q.command == cmdWrite || q.command == cmdZeroes):
		return enospc
	case outside, q.command == cmdStatus && (m == simpleMode || q.length == 0):
		return einval
	case q.command == cmdZeroes && q.flags&(noHole|fastZero) == noHole|fastZero:
		return enotsup
	}
	return 0
}

// TestEveryRequest sends every command with every flag and every edge, in all
// modes, to a disk that can be written and to one that cannot, and compares the
// replies with the protocol's rules, and the disk with a model, byte by byte.
func TestEveryRequest(t *testing.T) {
	t.Parallel()
	const size = maxPieceLen + 1000
	for _, m := range modes {
		for _, writable := range []bool{true, false} {
			t.Run(fmt.Sprintf("%v/writable=%v", m, writable), func(t *testing.T) {
				t.Parallel()
				r := newRAM(bytes.Repeat([]byte{1, 2, 3, 4, 5, 6, 7}, size)[:size])
				model := r.content()
				e := nbdserver.Export{Name: "disk", Disk: r, ReadOnly: !writable}
				c := enterMode(dial(t, start(t, quiet, e)), "disk", m, allocationContext)
				cookie := uint64(0)
				flagSets := []uint16{0, fua, payloadLen, 64}
				if writable {
					flagSets = append(flagSets, noHole, df, reqOne, fastZero, 1<<15, noHole|fastZero, fua|noHole, fua|payloadLen)
				}
				lengths := []uint64{0, 1, size - 1, size, math.MaxUint32}
				if m == extendedMode {
					lengths = append(lengths, 1<<32, math.MaxUint64)
				}
				for command := range uint16(10) {
					for _, flags := range flagSets {
						for _, offset := range []uint64{0, 1, size - 1, size, hugeOffset, math.MaxUint64} {
							for _, length := range lengths {
								cookie++
								q := ask64{flags, command, cookie, offset, length}
								if payload, ok := payloadOf(m, q); ok {
									checkRequest(c, q, payload, r, model, writable)
								}
							}
						}
					}
				}
				if n := r.largest.Load(); n > maxPieceLen || writable != (n == maxPieceLen) {
					t.Errorf("the longest write had %d bytes", n)
				}
			})
		}
	}
}

// payloadOf returns the payload of a request. False means one that ends the
// connection, or asks for a disconnect.
func payloadOf(m mode, q ask64) ([]byte, bool) {
	has := q.command == cmdWrite || m == extendedMode && q.flags&payloadLen != 0
	switch {
	case q.command == cmdDisc, has && q.length > maxRequest:
		return nil, false
	case m == extendedMode && has && q.command == cmdStatus:
		return nil, false // has a meaning, and a test of its own
	case !has:
		return nil, true
	}
	return bytes.Repeat([]byte{byte(q.cookie), byte(q.cookie >> 8), 77}, int(q.length/3)+1)[:q.length], true
}

func checkRequest(c modeClient, q ask64, payload []byte, r *ram, model []byte, writable bool) {
	c.Helper()
	syncs := r.syncs.Load()
	a := c.ask(q, payload)
	want := wantErrno(c.mode, q, uint64(len(model)), writable)
	if a.errno != want {
		c.Errorf("%+v: got error %d, want %d", q, a.errno, want)
		return
	}
	changes := q.command == cmdWrite || q.command == cmdTrim || q.command == cmdZeroes
	if want == 0 {
		part := model[q.offset:][:q.length]
		switch q.command {
		case cmdRead:
			if !bytes.Equal(a.data, part) {
				c.Errorf("%+v: wrong bytes", q)
			}
		case cmdWrite:
			copy(part, payload)
		case cmdZeroes:
			clear(part)
		case cmdTrim:
			copy(part, bytes.Repeat([]byte{0xdd}, len(part)))
		case cmdStatus:
			if got := a.states[1]; !slices.Equal(got, []extent64{{q.length, 0}}) {
				c.Errorf("%+v: got %v", q, got)
			}
		}
		if synced := r.syncs.Load() - syncs; writable && (synced != 0) != (q.command == cmdFlush || changes && q.flags&fua != 0) {
			c.Errorf("%+v: %d syncs", q, synced)
		}
	}
	if changes && !r.holds(model) {
		c.Fatalf("%+v: the disk differs from the model", q)
	}
}

// TestDiskErrorNumbers: what the disk says is what the client hears.
func TestDiskErrorNumbers(t *testing.T) {
	t.Parallel()
	commands := map[string]uint16{"read": cmdRead, "write": cmdWrite, "zero": cmdZeroes, "trim": cmdTrim, "sync": cmdFlush}
	for _, m := range modes {
		r := newRAM(make([]byte, 3*maxPieceLen))
		c := enterMode(dial(t, start(t, quiet, nbdserver.Export{Name: "disk", Disk: r})), "disk", m, allocationContext)
		for method, command := range commands {
			for _, tt := range []struct {
				err  error
				want uint32 // of changes; a read has eio where they have eperm
			}{
				{errBroken, eio},
				{fmt.Errorf("disk: %w", syscall.ENOSPC), enospc},
				{syscall.EDQUOT, enospc},
				{syscall.EFBIG, enospc},
				{syscall.EROFS, eperm},
				{io.EOF, eio},
			} {
				r.fail(method, tt.err)
				for _, length := range []uint64{512, 3 * maxPieceLen} {
					q := ask64{0, command, 5, 0, length}
					if command == cmdFlush {
						q.length = 0
					}
					if command == cmdWrite && m == extendedMode {
						q.flags = payloadLen
					}
					payload, _ := payloadOf(m, q)
					want := tt.want
					if command == cmdRead && want == eperm {
						want = eio
					}
					if a := c.ask(q, payload); a.errno != want {
						t.Errorf("%v: %s of %d bytes, %v: got error %d, want %d", m, method, length, tt.err, a.errno, want)
					}
					r.fail(method, nil)
					if a := c.ask(q, payload); a.errno != 0 {
						t.Errorf("%v: %s afterwards: got error %d", m, method, a.errno)
					}
					r.fail(method, tt.err)
				}
				r.fail(method, nil)
			}
		}
	}
}

// TestErrorInTheMiddle: an error in one piece of a long read is told with its
// place, and the connection stays.
func TestErrorInTheMiddle(t *testing.T) {
	t.Parallel()
	d := broken{testExport().Disk.(disk), 9}
	socket := start(t, quiet, nbdserver.Export{Name: "disk", Disk: d})
	for _, m := range modes {
		c := enterMode(dial(t, socket), "disk", m)
		for range 10 {
			a := c.ask(ask64{0, cmdRead, 1, 0, testSize}, nil)
			if a.errno != eio || m > simpleMode && !slices.Contains(a.kinds, errOffset) {
				t.Errorf("%v: got error %d, chunks %v", m, a.errno, a.kinds)
			}
			if a := c.ask(ask64{0, cmdRead, 2, 12 * piece, 2 * piece}, nil); !bytes.Equal(a.data, testBytes()[12*piece:14*piece]) {
				t.Errorf("%v: the next read: got error %d", m, a.errno)
			}
		}
	}
}

// levels is a context whose flags are the number of the piece, over a given
// piece length; it fails from piece bad on.
type levels struct{ piece, bad int64 }

func (l levels) List() []string { return []string{"test:levels"} }

func (l levels) Open(name string) (nbdserver.Context, bool) { return l, name == "test:levels" }

func (l levels) Status(_ context.Context, off, length int64) iter.Seq2[nbdserver.Status, error] {
	return func(yield func(nbdserver.Status, error) bool) {
		for end := off + length; off < end; {
			next := min(end, off-off%l.piece+l.piece)
			if off/l.piece >= l.bad {
				yield(nbdserver.Status{}, errBroken)
				return
			}
			if !yield(nbdserver.Status{Off: off, Len: next - off, Flags: uint32(off / l.piece)}, nil) {
				return
			}
			off = next
		}
	}
}

func TestContexts(t *testing.T) {
	t.Parallel()
	e := testExport()
	e.Contexts = levels{10 * piece, 1 << 40}
	socket := start(t, quiet, e)
	allocated := []extent64{{4 * piece, 0}, {4 * piece, 3}, {2 * piece, 0}, {piece, 3}, {5*piece + 100, 0}}
	level := []extent64{{10 * piece, 0}, {6*piece + 100, 1}}
	type states = map[uint32][]extent64
	for _, m := range modes[1:] {
		c := enterMode(dial(t, socket), "disk", m, "test:levels", allocationContext)
		for _, tt := range []struct {
			flags   uint16
			ids     []uint32
			errno   uint32
			want    states
			payload int // bytes to leave out of the payload
		}{
			{want: states{1: level, 2: allocated}},
			{flags: reqOne, want: states{1: level[:1], 2: allocated[:1]}},
			{flags: payloadLen, ids: []uint32{2}, want: states{2: allocated}},
			{flags: payloadLen, ids: []uint32{2, 1}, want: states{1: level, 2: allocated}},
			{flags: payloadLen | reqOne, ids: []uint32{1}, want: states{1: level[:1]}},
			{flags: payloadLen, ids: []uint32{1, 1}, errno: einval},
			{flags: payloadLen, ids: []uint32{3}, errno: einval},
			{flags: payloadLen, ids: []uint32{1, 2, 3}, errno: einval},
			{flags: payloadLen, errno: einval},
			{flags: payloadLen, ids: []uint32{1}, payload: 1, errno: einval},
			{flags: payloadLen, ids: []uint32{1}, payload: 11, errno: einval},
		} {
			q := ask64{tt.flags, cmdStatus, 3, 0, testSize}
			var payload []byte
			if tt.flags&payloadLen != 0 {
				if m != extendedMode {
					continue
				}
				payload = wire(uint64(testSize), tt.ids)
				payload = payload[:len(payload)-tt.payload]
				q.length = uint64(len(payload))
			}
			a := c.ask(q, payload)
			if a.errno != tt.errno || tt.errno == 0 && fmt.Sprint(a.states) != fmt.Sprint(tt.want) {
				t.Errorf("%v: %+v: got error %d, %v", m, tt, a.errno, a.states)
			}
		}
		past := wire(uint64(testSize)+1, uint32(1))
		if a := c.ask(ask64{payloadLen, cmdStatus, 3, 0, uint64(len(past))}, past); m == extendedMode && a.errno != einval {
			t.Errorf("%v: past the end: got error %d", m, a.errno)
		}
		if m == structuredMode {
			c.Close() // that payload was none
		}
	}
}

// TestContextFails: a context that fails in its first piece fails the request;
// later, what came before is told.
func TestContextFails(t *testing.T) {
	t.Parallel()
	e := testExport()
	e.Contexts = levels{10 * piece, 1}
	socket := start(t, quiet, e)
	for _, m := range modes[1:] {
		c := enterMode(dial(t, socket), "disk", m, "test:levels", allocationContext)
		a := c.ask(ask64{0, cmdStatus, 3, 0, testSize}, nil)
		if want := []extent64{{10 * piece, 0}}; a.errno != 0 || !slices.Equal(a.states[1], want) || len(a.states[2]) != 5 {
			t.Errorf("%v: got error %d, %v", m, a.errno, a.states)
		}
		if a := c.ask(ask64{0, cmdStatus, 4, 10 * piece, piece}, nil); a.errno != eio {
			t.Errorf("%v: in the bad piece: got error %d", m, a.errno)
		}
	}
}

// TestHugeStatus: extended headers tell of a petabyte at once.
func TestHugeStatus(t *testing.T) {
	t.Parallel()
	d := disk{zeros{}, image.MaxSize, 1 << 49, func(p int64) bool { return p == 1 }}
	c := enterMode(dial(t, start(t, quiet, nbdserver.Export{Name: "disk", Disk: d})), "disk", extendedMode, allocationContext)
	a := c.ask(ask64{0, cmdStatus, 1, 4096, uint64(image.MaxSize) - 4096}, nil)
	if want := []extent64{{1<<49 - 4096, 0}, {1 << 49, 3}}; a.errno != 0 || !slices.Equal(a.states[1], want) {
		t.Errorf("got error %d, %v, want %v", a.errno, a.states, want)
	}
	if a := c.ask(ask64{0, cmdCache, 1, 0, 1 << 40}, nil); a.errno != eoverflow {
		t.Errorf("a cache of 1 TiB: got error %d, want %d", a.errno, eoverflow)
	}
}
