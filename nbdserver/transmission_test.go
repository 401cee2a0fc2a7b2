package nbdserver_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"iter"
	"log/slog"
	"math"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/nbdserver"
)

const (
	piece    = 64 << 10
	testSize = 16*piece + 100
)

// testBytes is a disk of 16 pieces and a bit, in which pieces 4 to 7 and 10
// are zero and say so.
func testBytes() []byte {
	p := make([]byte, testSize)
	for i := range p {
		if !testZero(int64(i / piece)) {
			p[i] = byte(i*7+i>>8) | 1
		}
	}
	return p
}

func testZero(p int64) bool { return p >= 4 && p < 8 || p == 10 }

func testExport() nbdserver.Export {
	return nbdserver.Export{Name: "disk", Disk: disk{bytes.NewReader(testBytes()), testSize, piece, testZero}}
}

func TestCommands(t *testing.T) {
	t.Parallel()
	socket := start(t, nbdserver.Options{}, testExport())
	content := testBytes()
	far := uint64(math.MaxUint64)
	type kinds = []uint16

	clients := map[bool]*client{false: dial(t, socket).enter("disk", false), true: dial(t, socket).enter("disk", true)}
	for _, tt := range []struct {
		name    string
		flags   uint16
		command uint16
		offset  uint64
		length  uint32
		payload int
		errno   uint32
		simple  uint32 // the error without structured replies, where it differs
		kinds   kinds  // of the chunks; nil leaves them open
	}{
		{name: "read", command: cmdRead, offset: 1000, length: 512, kinds: kinds{data}},
		{name: "read one byte", command: cmdRead, offset: testSize - 1, length: 1, kinds: kinds{data}},
		{name: "read nothing", command: cmdRead, kinds: kinds{none}},
		{name: "read nothing at the end", command: cmdRead, offset: testSize, kinds: kinds{none}},
		{name: "read all", command: cmdRead, length: testSize, kinds: kinds{data, data, data, data, data, hole, hole}},
		{name: "read all unfragmented", flags: df, command: cmdRead, length: testSize, kinds: kinds{data}, simple: einval},
		{name: "read a hole", command: cmdRead, offset: 4 * piece, length: 4 * piece, kinds: kinds{hole}},
		{name: "read a small hole", command: cmdRead, offset: 4*piece + 512, length: 4096, kinds: kinds{hole}},
		{name: "read a hole unfragmented", flags: df, command: cmdRead, offset: 4 * piece, length: 4 * piece, kinds: kinds{data}, simple: einval},
		{name: "read the edge of a hole", command: cmdRead, offset: 4*piece - 512, length: 1024, kinds: kinds{data}},
		{name: "read a hole too short for a chunk", command: cmdRead, offset: 3 * piece, length: piece + 4095, kinds: kinds{data}},
		{name: "read a hole just long enough", command: cmdRead, offset: 3 * piece, length: piece + 4096, kinds: kinds{data, hole}},
		{name: "read past the end", command: cmdRead, offset: testSize - 1, length: 2, errno: einval, kinds: kinds{chunkErr}},
		{name: "read at the end", command: cmdRead, offset: testSize, length: 1, errno: einval},
		{name: "read far out", command: cmdRead, offset: far, length: 1, errno: einval},
		{name: "read around the end of 64 bits", command: cmdRead, offset: far - 10, length: 20, errno: einval},
		{name: "read 4 GiB", command: cmdRead, length: math.MaxUint32, errno: einval},
		{name: "read with a flag of another command", flags: reqOne, command: cmdRead, length: 512, errno: einval},
		{name: "read with FUA, not offered", flags: fua, command: cmdRead, length: 512, errno: einval},

		{name: "write", command: cmdWrite, length: 5000, payload: 5000, errno: eperm},
		{name: "write nothing", command: cmdWrite, errno: eperm},
		{name: "write past the end", command: cmdWrite, offset: far, length: 100, payload: 100, errno: eperm},
		{name: "write with unknown flags", flags: 0xffff, command: cmdWrite, length: 100, payload: 100, errno: eperm},
		{name: "write as much as is allowed", command: cmdWrite, length: maxRequest, payload: maxRequest, errno: eperm},
		{name: "trim", command: cmdTrim, length: 4096, errno: eperm},
		{name: "trim 4 GiB", command: cmdTrim, length: math.MaxUint32, errno: eperm},
		{name: "write zeroes", flags: noHole, command: cmdZeroes, length: math.MaxUint32, errno: eperm},

		{name: "flush", command: cmdFlush, kinds: kinds{none}},
		{name: "flush with a length", command: cmdFlush, length: 1, errno: einval},
		{name: "flush with a flag", flags: df, command: cmdFlush, errno: einval},
		{name: "cache", command: cmdCache, offset: 100, length: testSize - 100, kinds: kinds{none}},
		{name: "cache nothing", command: cmdCache, kinds: kinds{none}},
		{name: "cache past the end", command: cmdCache, offset: 1, length: testSize, errno: einval},
		{name: "resize", command: 8, length: 1, errno: einval},
		{name: "unknown command", command: 0xffff, offset: far, length: math.MaxUint32, errno: einval},

		{name: "status", command: cmdStatus, length: testSize, kinds: kinds{status}, simple: einval},
		{name: "status of one byte", flags: reqOne, command: cmdStatus, offset: testSize - 1, length: 1, simple: einval},
		{name: "status past the end", command: cmdStatus, length: testSize + 1, errno: einval},
		{name: "status of nothing", command: cmdStatus, errno: einval},
		{name: "status with a flag of another command", flags: df, command: cmdStatus, length: 1, errno: einval},
	} {
		for structured, c := range clients {
			want := tt.errno
			if !structured && tt.simple != 0 {
				want = tt.simple
			}
			q := request{tt.flags, tt.command, 0x1122334455667788, tt.offset, tt.length}
			r := c.ask(q, structured, make([]byte, tt.payload))
			if r.errno != want {
				t.Errorf("%s, structured %v: got error %d, want %d", tt.name, structured, r.errno, want)
			}
			slices.Sort(r.kinds) // pieces of long reads come in any order
			if structured && tt.kinds != nil && !slices.Equal(r.kinds, tt.kinds) {
				t.Errorf("%s: got chunks %v, want %v", tt.name, r.kinds, tt.kinds)
			}
			if tt.command == cmdRead && want == 0 && !bytes.Equal(r.data, content[tt.offset:][:tt.length]) {
				t.Errorf("%s, structured %v: wrong bytes", tt.name, structured)
			}
			if r := c.ask(request{command: cmdRead, cookie: 2, offset: 7, length: 9}, structured); !bytes.Equal(r.data, content[7:16]) {
				t.Errorf("%s, structured %v: the next read got %x, error %d", tt.name, structured, r.data, r.errno)
			}
		}
	}
}

func TestTooLongRead(t *testing.T) {
	t.Parallel()
	socket := start(t, nbdserver.Options{}, nbdserver.Export{Name: "disk", Disk: disk{zeros{}, 1 << 30, 1 << 30, func(int64) bool { return true }}})
	for structured, want := range map[bool]uint32{false: einval, true: eoverflow} {
		c := dial(t, socket).enter("disk", structured)
		for _, command := range []uint16{cmdRead, cmdCache} {
			if r := c.ask(request{command: command, length: maxRequest + 1}, structured); r.errno != want {
				t.Errorf("command %d, structured %v: got error %d, want %d", command, structured, r.errno, want)
			}
			if r := c.ask(request{command: command, length: maxRequest}, structured); r.errno != 0 {
				t.Errorf("command %d of the maximum, structured %v: got error %d", command, structured, r.errno)
			}
		}
	}
}

// zeros reads as zeros.
type zeros struct{}

func (zeros) ReadAt(p []byte, _ int64) (int, error) {
	clear(p)
	return len(p), nil
}

func TestBlockStatus(t *testing.T) {
	t.Parallel()
	c := dial(t, start(t, nbdserver.Options{}, testExport())).enter("disk", true)
	const dataState, holeState = 0, 3
	for _, tt := range []struct {
		flags  uint16
		offset uint64
		length uint32
		want   []extent
	}{
		{0, 0, testSize, []extent{{4 * piece, dataState}, {4 * piece, holeState}, {2 * piece, dataState}, {piece, holeState}, {5*piece + 100, dataState}}},
		{reqOne, 0, testSize, []extent{{4 * piece, dataState}}},
		{reqOne, 100, 200, []extent{{200, dataState}}},
		{reqOne, 5 * piece, testSize - 5*piece, []extent{{3 * piece, holeState}}},
		{0, 4*piece - 1, 2, []extent{{1, dataState}, {1, holeState}}},
		{0, testSize - 1, 1, []extent{{1, dataState}}},
	} {
		r := c.ask(request{tt.flags, cmdStatus, 1, tt.offset, tt.length}, true)
		if r.errno != 0 || !slices.Equal(r.states, tt.want) {
			t.Errorf("flags %d, [%d, +%d): got %v, error %d, want %v", tt.flags, tt.offset, tt.length, r.states, r.errno, tt.want)
		}
	}
}

// counted counts the pieces of the map that are read.
type counted struct {
	disk
	pieces *atomic.Int64
}

func (c counted) Extents(ctx context.Context, off, length int64) iter.Seq2[image.Extent, error] {
	return func(yield func(image.Extent, error) bool) {
		for e, err := range c.disk.Extents(ctx, off, length) {
			c.pieces.Add(1)
			if !yield(e, err) {
				return
			}
		}
	}
}

// TestBlockStatusIsBounded asks for the status of far more than one reply
// holds, of a disk of 1 PiB.
func TestBlockStatusIsBounded(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name   string
		piece  int64
		zero   func(int64) bool
		flags  uint16
		pieces int64 // the most that may be read
		want   int   // descriptors
	}{
		{"all zero in tiny pieces", 512, func(int64) bool { return true }, 0, 1 << 16, 1},
		{"alternating", 512, func(p int64) bool { return p%2 == 0 }, 0, 1 << 16, 256<<10/8 - 1},
		{"alternating, one asked for", 512, func(p int64) bool { return p%2 == 0 }, reqOne, 2, 1},
		{"huge pieces", 1 << 40, func(int64) bool { return true }, 0, 1, 1},
	} {
		var pieces atomic.Int64
		d := counted{disk{zeros{}, image.MaxSize, tt.piece, tt.zero}, &pieces}
		c := dial(t, start(t, nbdserver.Options{}, nbdserver.Export{Name: "disk", Disk: d})).enter("disk", true)
		r := c.ask(request{tt.flags, cmdStatus, 1, 1 << 49, math.MaxUint32}, true)
		if r.errno != 0 || len(r.states) != tt.want || pieces.Load() > tt.pieces {
			t.Errorf("%s: got %d descriptors, error %d, from %d pieces, want %d from at most %d",
				tt.name, len(r.states), r.errno, pieces.Load(), tt.want, tt.pieces)
		}
	}
}

var errBroken = errors.New("the backend is broken here")

// broken fails to read one piece, and its map fails in the same place.
type broken struct {
	disk
	bad int64
}

func (b broken) ReadAt(p []byte, off int64) (int, error) {
	if off < (b.bad+1)*piece && off+int64(len(p)) > b.bad*piece {
		return 0, errBroken
	}
	return b.disk.ReadAt(p, off)
}

func (b broken) Extents(ctx context.Context, off, length int64) iter.Seq2[image.Extent, error] {
	return func(yield func(image.Extent, error) bool) {
		for e, err := range b.disk.Extents(ctx, off, length) {
			if e.Off/piece == b.bad {
				e, err = image.Extent{}, errBroken
			}
			if !yield(e, err) || err != nil {
				return
			}
		}
	}
}

func TestDiskErrors(t *testing.T) {
	t.Parallel()
	var log syncBuffer
	d := broken{testExport().Disk.(disk), 2}
	socket := start(t, nbdserver.Options{Log: slog.New(slog.NewTextHandler(&log, nil))}, nbdserver.Export{Name: "disk", Disk: d})
	content := testBytes()
	for _, structured := range []bool{false, true} {
		c := dial(t, socket).enter("disk", structured)
		for _, tt := range []struct {
			command uint16
			offset  uint64
			length  uint32
			errno   uint32
		}{
			{cmdRead, 2 * piece, 4096, eio},
			{cmdRead, 0, 4 * piece, eio},
			{cmdRead, 3 * piece, 4 * piece, 0},
			{cmdRead, 2*piece - 4096, 4096, 0},
			{cmdCache, 0, testSize, eio},
			{cmdCache, 3 * piece, piece, 0},
		} {
			r := c.ask(request{command: tt.command, cookie: 9, offset: tt.offset, length: tt.length}, structured)
			if r.errno != tt.errno {
				t.Errorf("command %d at %d, structured %v: got error %d, want %d", tt.command, tt.offset, structured, r.errno, tt.errno)
			}
			if tt.command == cmdRead && tt.errno == 0 && !bytes.Equal(r.data, content[tt.offset:][:tt.length]) {
				t.Errorf("read at %d, structured %v: wrong bytes", tt.offset, structured)
			}
		}
	}
	c := dial(t, socket).enter("disk", true)
	if r := c.ask(request{command: cmdStatus, offset: 0, length: testSize}, true); r.errno != 0 || !slices.Equal(r.states, []extent{{2 * piece, 0}}) {
		t.Errorf("status up to the error: got %v, error %d", r.states, r.errno)
	}
	if r := c.ask(request{command: cmdStatus, offset: 2 * piece, length: 512}, true); r.errno != eio {
		t.Errorf("status at the error: got error %d, want %d", r.errno, eio)
	}
	for _, want := range []string{"export=disk", "offset=131072", errBroken.Error()} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("the log lacks %q:\n%s", want, log.String())
		}
	}
}

type unreadable struct{}

func (unreadable) ReadAt([]byte, int64) (int, error) { return 0, errBroken }

// TestLogIsBounded: a disk that keeps failing, or its map, does not fill the log.
func TestLogIsBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var log syncBuffer
		o := nbdserver.Options{Log: slog.New(slog.NewTextHandler(&log, nil))}
		d := testExport().Disk.(disk)
		l, stop := serveInBubble(t, o, nbdserver.Export{Name: "data", Disk: disk{ReaderAt: unreadable{}, size: testSize}}, nbdserver.Export{Name: "map", Disk: mapless{d}})
		for _, name := range []string{"data", "map"} {
			c := greet(t, l.dial()).enter(name, true)
			for i := range uint64(50) {
				c.ask(request{command: cmdRead, cookie: i, length: piece}, true)
			}
			c.Close()
		}
		if err := stop(); err != nil {
			t.Errorf("Serve: %v", err)
		}
		for message, want := range map[string]int{
			"cannot use an export's disk": 10, "cannot read the map": 10, "more errors than were logged": 2, "requests=50": 1, "maps=50": 1,
		} {
			if got := strings.Count(log.String(), message); got != want {
				t.Errorf("got %q %d times, want %d:\n%s", message, got, want, log.String())
			}
		}
	})
}

// TestMapErrorIsNoReadError: where only the map fails, reads go on.
func TestMapErrorIsNoReadError(t *testing.T) {
	t.Parallel()
	d := mapless{testExport().Disk.(disk)}
	log := slog.New(slog.DiscardHandler)
	c := dial(t, start(t, nbdserver.Options{Log: log}, nbdserver.Export{Name: "disk", Disk: d})).enter("disk", true)
	r := c.ask(request{command: cmdRead, length: testSize}, true)
	if r.errno != 0 || !bytes.Equal(r.data, testBytes()) || !slices.Equal(r.kinds, []uint16{data, data, data, data, data}) {
		t.Errorf("got error %d, chunks %v", r.errno, r.kinds)
	}
}

type mapless struct{ disk }

func (mapless) Extents(context.Context, int64, int64) iter.Seq2[image.Extent, error] {
	return func(yield func(image.Extent, error) bool) { yield(image.Extent{}, errBroken) }
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// TestBrokenStreams: a client that breaks the protocol or dies half-way is
// dropped without a word, and others do not notice.
func TestBrokenStreams(t *testing.T) {
	t.Parallel()
	socket := start(t, nbdserver.Options{}, testExport())
	other := dial(t, socket).enter("disk", true)
	read := request{command: cmdRead, cookie: 5, length: 512}
	for _, tt := range []struct {
		name string
		send []byte
	}{
		{"wrong magic", wire(uint32(0x25609514), read)},
		{"garbage", bytes.Repeat([]byte("garbage "), 100)},
		{"a write longer than the maximum", request{command: cmdWrite, length: maxRequest + 1}.wire()},
		{"disconnect", request{command: cmdDisc}.wire()},
	} {
		c := dial(t, socket).enter("disk", true)
		c.send(tt.send)
		c.wantClosed()

		c = dial(t, socket).enter("disk", true)
		c.send(read.wire(), tt.send)
		if r := c.structured(read); r.errno != 0 {
			t.Errorf("a read before %s: got error %d", tt.name, r.errno)
		}
		c.wantClosed()
	}
	for _, half := range [][]byte{read.wire()[:1], read.wire()[:27], wire(request{command: cmdWrite, length: 100}.wire(), "half")} {
		c := dial(t, socket).enter("disk", true)
		c.send(half)
		c.Close()
	}
	if r := other.ask(read, true); r.errno != 0 {
		t.Errorf("another client: got error %d", r.errno)
	}
}

// gated is a disk on which each read waits to be let through.
type gated struct {
	disk
	entered chan int64 // receives the offset of each read
	let     chan struct{}
}

func newGated() gated {
	return gated{disk{ReaderAt: zeros{}, size: 1 << 30}, make(chan int64, 100), make(chan struct{})}
}

func (g gated) ReadAt(p []byte, off int64) (int, error) {
	g.entered <- off
	<-g.let
	return g.disk.ReadAt(p, off)
}

func TestParallelReads(t *testing.T) {
	t.Parallel()
	const workers, requests = 8, 20
	g := newGated()
	c := dial(t, start(t, nbdserver.Options{Workers: workers}, nbdserver.Export{Name: "disk", Disk: g})).enter("disk", false)
	for i := range uint64(requests) {
		c.send(request{command: cmdRead, cookie: i, offset: i << 20, length: 4096}.wire())
	}
	for range workers {
		<-g.entered // all at once, or the test hangs
	}
	if n := len(g.entered); n > 0 {
		t.Errorf("%d reads beyond the %d workers", n, workers)
	}
	close(g.let)
	seen := map[uint64]bool{}
	for range requests {
		if r := c.simple(4096); r.errno == 0 {
			seen[r.cookie] = true
		}
	}
	if len(seen) != requests {
		t.Errorf("got %d replies without an error, want %d", len(seen), requests)
	}
}

// slowStart holds up reads at offset 0.
type slowStart struct {
	disk
	let chan struct{}
}

func (s slowStart) ReadAt(p []byte, off int64) (int, error) {
	if off == 0 {
		<-s.let
	}
	return s.disk.ReadAt(p, off)
}

func TestRepliesOvertake(t *testing.T) {
	t.Parallel()
	s := slowStart{disk{ReaderAt: zeros{}, size: 1 << 30}, make(chan struct{})}
	c := dial(t, start(t, nbdserver.Options{}, nbdserver.Export{Name: "disk", Disk: s})).enter("disk", false)
	// First many fast ones, one by one, as a client does before it is unlucky.
	for i := range uint64(200) {
		c.ask(request{command: cmdRead, cookie: i, offset: 4096, length: 4096}, false)
	}
	for i := range uint64(4) {
		c.send(request{command: cmdRead, cookie: i, offset: i << 20, length: 4096}.wire())
	}
	for range 3 {
		if r := c.simple(4096); r.cookie == 0 {
			t.Error("the reply to the slow request came before the others")
		}
	}
	close(s.let)
	if r := c.simple(4096); r.cookie != 0 {
		t.Errorf("got the reply to request %d, want the slow one", r.cookie)
	}
}

// TestNoSharedMemory: a connection gets along with the memory of its own.
func TestNoSharedMemory(t *testing.T) {
	t.Parallel()
	c := dial(t, start(t, nbdserver.Options{Memory: 1}, testExport())).enter("disk", true)
	for range 3 {
		if r := c.ask(request{command: cmdRead, length: testSize}, true); r.errno != 0 {
			t.Errorf("got error %d", r.errno)
		}
	}
}

// TestManySmallRequests sends more than fit into the budget before it reads a
// reply, so that the batches grow as large as they can.
func TestManySmallRequests(t *testing.T) {
	t.Parallel()
	const requests = 5000
	c := dial(t, start(t, nbdserver.Options{Memory: 1 << 20}, testExport())).enter("disk", false)
	content := testBytes()
	sent := make(chan error, 1)
	go func() {
		var b []byte
		for i := range uint64(requests) {
			b = append(b, request{command: cmdRead, cookie: i, offset: i * 8, length: uint32(i % 100)}.wire()...)
		}
		_, err := c.Write(b)
		sent <- err
	}()
	for range requests {
		p := c.read(16)
		i := binary.BigEndian.Uint64(p[8:])
		if got := c.read(int(i % 100)); !bytes.Equal(got, content[i*8:][:i%100]) {
			t.Fatalf("request %d: wrong bytes", i)
		}
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
}

// TestSmallOvertakesLarge: while one large reply is being received, small
// replies that are ready pass the other large ones.
func TestSmallOvertakesLarge(t *testing.T) {
	t.Parallel()
	const large = 8 << 20
	g := newGated()
	c := pipe(t, nbdserver.Options{}, nbdserver.Export{Name: "disk", Disk: g}).enter("disk", false)
	for i := range uint64(4) {
		c.send(request{command: cmdRead, cookie: i, length: large}.wire())
		<-g.entered
	}
	close(g.let)
	header := c.read(16) // a first reply is on its way, the others wait behind it
	c.send(request{command: cmdRead, cookie: 99}.wire())
	for range 1024 { // slowly, so that the worker has its turn
		c.read(large / 1024)
		runtime.Gosched()
	}
	order := []uint64{binary.BigEndian.Uint64(header[8:])}
	for range 4 {
		p := c.read(16)
		cookie := binary.BigEndian.Uint64(p[8:])
		order = append(order, cookie)
		if cookie != 99 {
			io.CopyN(io.Discard, c.in, large)
		}
	}
	if i := slices.Index(order, 99); i != 1 {
		t.Errorf("the small reply came at position %d of %v, want 1", i, order)
	}
}

// oddMap is a disk whose map keeps to no contract: one extent, which does not
// start or end where it should.
type oddMap struct {
	disk
	before, after int64
}

func (o oddMap) Extents(_ context.Context, off, length int64) iter.Seq2[image.Extent, error] {
	return func(yield func(image.Extent, error) bool) {
		yield(image.Extent{Off: off - o.before, Len: o.before + length + o.after, Zero: true}, nil)
	}
}

// TestOddMaps: whatever a disk's map says, the client gets a valid reply.
func TestOddMaps(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		before, after int64
		errno         uint32
	}{{0, 0, 0}, {0, 4096, 0}, {4096, 0, eio}, {-4096, 0, eio}, {0, -64 << 10, eio}} {
		d := oddMap{disk{ReaderAt: zeros{}, size: 1 << 20}, tt.before, tt.after}
		log := slog.New(slog.DiscardHandler)
		c := dial(t, start(t, nbdserver.Options{Log: log}, nbdserver.Export{Name: "disk", Disk: d})).enter("disk", true)
		r := c.ask(request{command: cmdStatus, offset: 8192, length: 64 << 10}, true)
		if r.errno != tt.errno || r.errno == 0 && !slices.Equal(r.states, []extent{{64 << 10, 3}}) {
			t.Errorf("%+v: status: got %v, error %d", tt, r.states, r.errno)
		}
		if r := c.ask(request{command: cmdRead, offset: 8192, length: 64 << 10}, true); r.errno != 0 || !image.IsZero(r.data) {
			t.Errorf("%+v: read: got error %d", tt, r.errno)
		}
	}
}
