package nbdserver_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/holdfast-backup/holdfast/nbdserver"
)

// counter is a disk that counts the bytes it has handed out.
type counter struct {
	disk
	bytes *atomic.Int64
}

func (c counter) ReadAt(p []byte, off int64) (int, error) {
	c.bytes.Add(int64(len(p)))
	return c.disk.ReadAt(p, off)
}

func newCounter() counter {
	return counter{disk{ReaderAt: zeros{}, size: 1 << 30}, new(atomic.Int64)}
}

// serveInBubble serves exports over pipes, which hold nothing themselves, in a
// synctest bubble. The function that it returns stops the server.
func serveInBubble(t *testing.T, o nbdserver.Options, exports ...nbdserver.Export) (*pipeListener, func() error) {
	t.Helper()
	s := nbdserver.New(o)
	for _, e := range exports {
		if err := s.Add(e); err != nil {
			t.Fatal(err)
		}
	}
	l := newPipeListener()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- s.Serve(ctx, l) }()
	return l, func() error { cancel(); return <-ended }
}

// TestMemoryIsBounded: clients that ask for much and read nothing get what is
// stated and no more, and others are served all the same.
func TestMemoryIsBounded(t *testing.T) {
	t.Parallel()
	for _, m := range modes {
		for _, length := range []uint64{64 << 10, maxPieceLen, 8 << 20} {
			t.Run(fmt.Sprintf("%v/%d", m, length), func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					const shared, hogs, room = 8 << 20, 10, 40 * maxPieceLen
					hogged, fine := newCounter(), newCounter()
					l, stop := serveInBubble(t, nbdserver.Options{Memory: shared},
						nbdserver.Export{Name: "hogged", Disk: hogged}, nbdserver.Export{Name: "fine", Disk: fine})
					for range hogs {
						c := enterMode(greet(t, l.dial()), "hogged", m)
						for i := range uint64(40) {
							c.send(c.header(ask64{0, cmdRead, i, i << 20, length}))
						}
					}
					synctest.Wait()
					most := int64(shared + hogs*maxPieceLen)
					if m == simpleMode && length > maxPieceLen {
						most = 64 << 20 // of the lane
					}
					if got := hogged.bytes.Load(); got > most || got < hogs*64<<10 {
						t.Errorf("%d bytes are in memory, want at most %d", got, most)
					}
					c := enterMode(greet(t, l.dial()), "fine", m)
					for i := range uint64(room / maxPieceLen) {
						if a := c.ask(ask64{0, cmdRead, i, 0, maxPieceLen}, nil); a.errno != 0 {
							t.Errorf("another client: got error %d", a.errno)
						}
					}
					if err := stop(); err != nil {
						t.Errorf("Serve: %v", err)
					}
				})
			})
		}
	}
}

// TestLaneTimeout: replies that cannot be cut wait for the memory of clients that
// do not read, until those are dropped.
func TestLaneTimeout(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l, stop := serveInBubble(t, quiet, nbdserver.Export{Name: "disk", Disk: newCounter()})
		const length = 32 << 20
		var hogs []modeClient
		for i := range uint64(2) {
			c := enterMode(greet(t, l.dial()), "disk", simpleMode)
			c.send(c.header(ask64{0, cmdRead, i, 0, length}))
			hogs = append(hogs, c)
		}
		synctest.Wait()
		c := enterMode(greet(t, l.dial()), "disk", simpleMode)
		began := time.Now()
		if a := c.ask(ask64{0, cmdRead, 9, 0, length}, nil); a.errno != 0 || len(a.data) != length {
			t.Errorf("got error %d", a.errno)
		}
		if got := time.Since(began); got != 30*time.Second {
			t.Errorf("the client waited for %v, want 30s", got)
		}
		for _, h := range hogs {
			h.SetReadDeadline(time.Now().Add(time.Minute))
			h.wantClosed()
		}
		if err := stop(); err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
}

// TestSlowClientLeavesLane: clients that take a little now and then of replies that
// cannot be cut are dropped when others wait for that memory; one alone leaves half of it.
func TestSlowClientLeavesLane(t *testing.T) {
	t.Parallel()
	for hogs, most := range map[int]time.Duration{1: 0, 3: time.Minute} {
		synctest.Test(t, func(t *testing.T) {
			l, stop := serveInBubble(t, quiet, nbdserver.Export{Name: "disk", Disk: newCounter()})
			var dripping sync.WaitGroup
			for range hogs {
				h := enterMode(greet(t, l.dial()), "disk", simpleMode)
				h.SetReadDeadline(time.Time{})
				for i := range uint64(8) {
					h.send(h.header(ask64{0, cmdRead, i, 0, maxRequest}))
				}
				dripping.Go(func() {
					for p := make([]byte, 64<<10); ; time.Sleep(500 * time.Millisecond) {
						if _, err := h.Read(p); err != nil {
							return
						}
					}
				})
				defer h.Close()
			}
			synctest.Wait()
			c := enterMode(greet(t, l.dial()), "disk", simpleMode)
			began := time.Now()
			if a := c.ask(ask64{0, cmdRead, 9, 0, maxPieceLen + 1}, nil); a.errno != 0 {
				t.Errorf("got error %d", a.errno)
			}
			if got := time.Since(began); got > most {
				t.Errorf("%d slow clients: waited for %v, want %v at most", hogs, got, most)
			}
			if err := stop(); err != nil {
				t.Errorf("Serve: %v", err)
			}
			dripping.Wait()
		})
	}
}

// TestHalfSentWrites: payloads that never arrive hold up nobody else.
func TestHalfSentWrites(t *testing.T) {
	t.Parallel()
	r := newRAM(make([]byte, 40<<20))
	socket := start(t, nbdserver.Options{Memory: 1}, nbdserver.Export{Name: "disk", Disk: r})
	for range 50 {
		c := enterMode(dial(t, socket), "disk", simpleMode)
		c.send(c.header(ask64{0, cmdWrite, 1, 0, maxRequest}), make([]byte, 100))
	}
	c := enterMode(dial(t, socket), "disk", simpleMode)
	p := bytes.Repeat([]byte("payload!"), 4<<20)
	if a := c.ask(ask64{0, cmdWrite, 1, 5, uint64(len(p))}, p); a.errno != 0 {
		t.Errorf("got error %d", a.errno)
	}
	if got := r.content()[5 : 5+len(p)]; !bytes.Equal(got, p) {
		t.Error("wrong bytes")
	}
}

// TestHungDisk: requests that stay in one export's disk hold up only that export;
// Serve and Remove say so.
func TestHungDisk(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		hung := gated{disk{ReaderAt: zeros{}, size: 1 << 30}, make(chan int64, 1000000), make(chan struct{})}
		s := nbdserver.New(quiet)
		for _, e := range []nbdserver.Export{{Name: "hung", Disk: hung}, {Name: "gone", Disk: hung}, {Name: "fine", Disk: newCounter()}} {
			if err := s.Add(e); err != nil {
				t.Fatal(err)
			}
		}
		l := newPipeListener()
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- s.Serve(ctx, l) }()
		for i := range 60 {
			c := enterMode(greet(t, l.dial()), []string{"hung", "gone"}[i%2], simpleMode)
			for i := range uint64(100) {
				c.send(c.header(ask64{0, cmdRead, i, 0, 512}))
			}
			if i == 0 {
				c.Close()
			}
		}
		synctest.Wait()
		if got := len(hung.entered); got < 64 || got > 4096 {
			t.Errorf("%d reads are in the disk", got)
		}
		c := enterMode(greet(t, l.dial()), "fine", simpleMode)
		if a := c.ask(ask64{0, cmdRead, 1, 0, 512}, nil); a.errno != 0 {
			t.Errorf("another export: got error %d", a.errno)
		}
		if err := s.Remove("gone"); !errors.Is(err, nbdserver.ErrBusy) {
			t.Errorf("Remove: got %v, want %v", err, nbdserver.ErrBusy)
		}
		cancel()
		if err := <-ended; !errors.Is(err, nbdserver.ErrBusy) || !bytes.Contains([]byte(err.Error()), []byte(`"hung"`)) {
			t.Errorf("Serve: got %v, want %v and the export's name", err, nbdserver.ErrBusy)
		}
		close(hung.let)
	})
}

// TestShutdownErrors: while a connection drains, further requests are answered
// with an error, payloads included, and it ends when the client is quiet.
func TestShutdownErrors(t *testing.T) {
	t.Parallel()
	for _, m := range modes {
		synctest.Test(t, func(t *testing.T) {
			g := newGated()
			l, stop := serveInBubble(t, quiet, nbdserver.Export{Name: "disk", Disk: g})
			c := enterMode(greet(t, l.dial()), "disk", m)
			under := ask64{0, cmdRead, 7, 0, 512}
			c.send(c.header(under))
			<-g.entered
			ended := make(chan error)
			go func() { ended <- stop() }()
			synctest.Wait()
			began := time.Now()
			for i := range uint64(50) {
				if a := c.ask(ask64{0, cmdRead, i, 0, 512}, nil); a.errno != eshutdown {
					t.Errorf("%v: a read: got error %d, want %d", m, a.errno, eshutdown)
				}
				if a := c.ask(ask64{payloadLen * uint16(m/extendedMode), cmdWrite, i, 0, 512}, make([]byte, 512)); a.errno != eshutdown {
					t.Errorf("%v: a write: got error %d, want %d", m, a.errno, eshutdown)
				}
				time.Sleep(90 * time.Millisecond)
			}
			close(g.let)
			if a := c.answer(under); a.errno != 0 {
				t.Errorf("%v: the read under way: got error %d", m, a.errno)
			}
			c.wantClosed()
			if err := <-ended; err != nil {
				t.Errorf("%v: Serve: %v", m, err)
			}
			if got := time.Since(began); got > 5*time.Second {
				t.Errorf("%v: a quiet client held up the end for %v", m, got)
			}
		})
	}
}

// TestFlushesShare: flushes that wait at the same time share one Sync, which
// begins after the last of them came.
func TestFlushesShare(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := &slowSync{newRAM(make([]byte, 4096)), make(chan struct{})}
		l, stop := serveInBubble(t, quiet, nbdserver.Export{Name: "disk", Disk: r})
		var clients []modeClient
		for range 5 {
			c := enterMode(greet(t, l.dial()), "disk", simpleMode)
			for i := range uint64(3) {
				c.send(c.header(ask64{0, cmdFlush, i, 0, 0}))
			}
			clients = append(clients, c)
		}
		synctest.Wait()
		if got := r.syncs.Load(); got != 1 {
			t.Errorf("%d syncs have begun, want 1", got)
		}
		close(r.let)
		for _, c := range clients {
			for range 3 {
				if a := c.simple(0); a.errno != 0 {
					t.Errorf("got error %d", a.errno)
				}
			}
		}
		if got := r.syncs.Load(); got != 2 {
			t.Errorf("%d syncs for 15 flushes, of which all but the first wait for the second", got)
		}
		if err := stop(); err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
}

type slowSync struct {
	*ram
	let chan struct{}
}

func (s *slowSync) Sync() error { err := s.ram.Sync(); <-s.let; return err }

// prefetched is a disk that notes what it is told to prefetch.
type prefetched struct {
	disk
	mu    *sync.Mutex // guards calls
	calls *[][2]int64
}

func (p prefetched) Prefetch(off, length int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	*p.calls = append(*p.calls, [2]int64{off, length})
}

// taken returns the calls since the last time.
func (p prefetched) taken() [][2]int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	defer func() { *p.calls = nil }()
	return *p.calls
}

// TestPrefetch: the disk hears of what follows a sequence of reads, of what CACHE
// asks for, and of nothing when reads are random.
func TestPrefetch(t *testing.T) {
	t.Parallel()
	const size = 16 << 20
	d := prefetched{disk{ReaderAt: zeros{}, size: size}, new(sync.Mutex), new([][2]int64)}
	socket := start(t, nbdserver.Options{}, nbdserver.Export{Name: "disk", Disk: d})
	c := enterMode(dial(t, socket), "disk", extendedMode)
	random := rand.New(rand.NewPCG(1, 2))
	for range 1000 {
		c.ask(ask64{0, cmdRead, 1, random.Uint64N(size/4096) * 4096, 4096}, nil)
	}
	if got := d.taken(); len(got) > 0 {
		t.Errorf("random reads: got %v", got)
	}
	c.ask(ask64{0, cmdCache, 1, 4096, 8192}, nil)
	if got, want := d.taken(), [][2]int64{{4096, 8192}}; !slices.Equal(got, want) {
		t.Errorf("cache: got %v, want %v", got, want)
	}
	c = enterMode(dial(t, socket), "disk", extendedMode)
	const step = 64 << 10
	for off := uint64(0); off < size; off += step { // two sequences
		c.ask(ask64{0, cmdRead, 1, off, step}, nil)
		c.ask(ask64{0, cmdRead, 1, (off + size/2) % size, step}, nil)
	}
	covered := make([]bool, size/step)
	calls := d.taken()
	for _, call := range calls {
		if call[0] < 0 || call[1] < step || call[0]+call[1] > size {
			t.Fatalf("prefetch of %v", call)
		}
		for off := call[0]; off < call[0]+call[1]; off += step {
			covered[off/step] = true
		}
	}
	missing := 0
	for _, c := range covered {
		if !c {
			missing++
		}
	}
	if missing > 20 || len(calls) > 300 {
		t.Errorf("%d steps of %d were not prefetched, in %d calls", missing, len(covered), len(calls))
	}
}

// TestManyConnections: a thousand clients at once, and 64 with 16 requests each
// under way, which read and write.
func TestManyConnections(t *testing.T) {
	t.Parallel()
	const requests, depth, region = 60, 16, 64 << 10
	r := newRAM(make([]byte, 64*region))
	l, err := nbdserver.Listen("unix", filepath.Join(t.TempDir(), "nbd"))
	if err != nil {
		t.Fatal(err)
	}
	serve(t, l, nbdserver.Options{MaxConnections: 1100}, nbdserver.Export{Name: "disk", Disk: r})
	for range 1000 {
		nc, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		c := enterMode(greet(t, nc), "disk", simpleMode)
		c.send(c.header(ask64{0, cmdRead, 1, 0, 512}))
	}
	var clients sync.WaitGroup
	for i := range uint64(64) {
		c := enterMode(dial(t, l.Addr().String()), "disk", simpleMode)
		places := make(chan struct{}, depth)
		clients.Go(func() {
			for n := range uint64(requests) {
				places <- struct{}{}
				c.Write(append(c.header(ask64{0, cmdWrite, n, i*region + n*100, 100}), bytes.Repeat([]byte{byte(i), byte(n)}, 50)...))
			}
		})
		clients.Go(func() {
			for range requests {
				if a := c.simple(0); a.errno != 0 {
					t.Errorf("client %d: got error %d", i, a.errno)
				}
				<-places
			}
		})
	}
	clients.Wait()
	content := r.content()
	for i := range 64 {
		for n := range requests {
			if got := content[i*region+n*100:][:100]; !bytes.Equal(got, bytes.Repeat([]byte{byte(i), byte(n)}, 50)) {
				t.Fatalf("client %d, write %d: wrong bytes", i, n)
			}
		}
	}
}

// TestSmallBesideLarge: small reads do not wait for the large ones of their own
// connection that came before.
func TestSmallBesideLarge(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d := disk{ReaderAt: delayed{zeros{}, time.Millisecond}, size: 1 << 30}
		l, stop := serveInBubble(t, nbdserver.Options{Workers: 4}, nbdserver.Export{Name: "disk", Disk: d})
		c := enterMode(greet(t, l.dial()), "disk", structuredMode)
		for i := range uint64(4) {
			c.send(c.header(ask64{0, cmdRead, i, 0, maxRequest}))
		}
		c.send(c.header(ask64{0, cmdRead, 99, 0, 512}))
		before := 0
		for {
			k := c.chunk()
			if k.Cookie == 99 {
				break
			}
			before += len(k.Payload)
		}
		if before > 4<<20 {
			t.Errorf("%d bytes of large replies came before the small one", before)
		}
		c.Close()
		if err := stop(); err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
}
