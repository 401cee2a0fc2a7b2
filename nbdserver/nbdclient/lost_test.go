package nbdclient_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/nbdserver/internal/wire"
	"github.com/holdfast-backup/holdfast/nbdserver/nbdclient"
)

// TestLostConnection: what a client does when its first connection dies in the
// middle of a reply. In a bubble of synctest, which also finds goroutines that
// do not end.
func TestLostConnection(t *testing.T) {
	t.Parallel()
	want := content(mib)
	for _, tt := range []struct {
		name   string
		change func(o *nbdclient.Options)
		// second is the server from the second connection on.
		second func(f *fake)
		conns  int32 // most connections made, if not 0
		want   error
	}{
		{"replayed", nil, func(f *fake) { f.serve(want) }, 2, nil},
		{"not wanted", func(o *nbdclient.Options) { o.NoReconnect = true }, nil, 1, nbdclient.ErrLost},
		{"another size", nil, func(f *fake) { f.size++; f.serve(want) }, 2, nbdclient.ErrChanged},
		{"other flags", nil, func(f *fake) { f.flags = wire.FlagHasFlags; f.serve(want) }, 2, nbdclient.ErrChanged},
		{"a context less", nil, func(f *fake) { f.contexts = nil; f.serve(want) }, 2, nbdclient.ErrChanged},
		{"dies again", func(o *nbdclient.Options) { o.Attempts = 3 }, func(f *fake) { f.handshake(); f.request() }, 3, io.ErrUnexpectedEOF},
		{"never again", nil, func(f *fake) { f.Close() }, 0, io.ErrUnexpectedEOF},
		{"silent forever", nil, func(f *fake) { f.handshake(); f.drain() }, 3, nbdclient.ErrTimeout},
		{"hangs in the handshake", nil, func(f *fake) { f.drain() }, 7, nbdclient.ErrTimeout},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				var conns atomic.Int32
				o := play(t, func(nth int, conn net.Conn) {
					conns.Add(1)
					f := newFake()
					f.Conn = conn
					if nth > 0 {
						tt.second(f)
						return
					}
					f.handshake()
					r, _ := f.request()
					// Wrong bytes, so that those of the second try have to replace them.
					f.Write(f.chunk(r, done, data, be64(r.Offset), bytes.Repeat([]byte{1}, int(r.Length)))[:5000])
				})
				if tt.change != nil {
					tt.change(&o)
				}
				c, err := nbdclient.Dial(t.Context(), o)
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				p := make([]byte, 100<<10)
				began := time.Now()
				n, err := c.ReadAt(p, 512)
				switch {
				case tt.want == nil && (err != nil || n != len(p) || !bytes.Equal(p, want[512:512+len(p)])):
					t.Errorf("got %d, %v, or other bytes", n, err)
				case tt.want != nil && (n != 0 || !errors.Is(err, tt.want)):
					t.Errorf("got %d, %v, want %v", n, err, tt.want)
				}
				if got := conns.Load(); tt.conns > 0 && got > tt.conns {
					t.Errorf("got %d connections, want at most %d", got, tt.conns)
				}
				if took := time.Since(began); took > 140*time.Second {
					t.Errorf("it took %v", took)
				}
			})
		})
	}
}

// TestSilence: a server that answers too late, or a byte at a time, loses its
// connection.
func TestSilence(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name   string
		others bool // requests are sent
		serve  func(f *fake, r wire.Request)
		least  time.Duration
		most   time.Duration
	}{
		{"silent", false, func(f *fake, _ wire.Request) { f.drain() }, time.Minute, 70 * time.Second},
		{"stops in the data", false, func(f *fake, r wire.Request) {
			f.Write(f.chunk(r, done, data, be64(r.Offset), make([]byte, r.Length))[:100])
			f.drain()
		}, time.Minute, 70 * time.Second},
		{"answers others only", true, func(f *fake, _ wire.Request) {
			for {
				r, ok := f.request()
				if !ok {
					return
				}
				f.Write(f.answer(r, make([]byte, mib)))
			}
		}, 10 * time.Minute, 11 * time.Minute},
		{"dribbles", false, func(f *fake, r wire.Request) {
			for i := range r.Length {
				time.Sleep(50 * time.Second)
				if _, err := f.Write(f.chunk(r, 0, hole, be64(r.Offset+i), be32(1))); err != nil {
					return
				}
			}
		}, 10 * time.Minute, 11 * time.Minute},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				o := play(t, func(_ int, conn net.Conn) {
					f := newFake()
					f.Conn = conn
					f.handshake()
					r, _ := f.request()
					tt.serve(f, r)
				})
				o.NoReconnect = true
				c, err := nbdclient.Dial(t.Context(), o)
				if err != nil {
					t.Fatal(err)
				}
				var others sync.WaitGroup
				defer others.Wait()
				defer c.Close()
				began := time.Now()
				// Another reader, who comes second and goes on.
				others.Go(func() {
					for err := error(nil); err == nil && tt.others; _, err = c.ReadAt(make([]byte, 4096), 4096) {
						time.Sleep(50 * time.Second)
					}
				})
				_, err = c.ReadAt(make([]byte, 4096), 0)
				if took := time.Since(began); !errors.Is(err, nbdclient.ErrTimeout) || took < tt.least || took > tt.most {
					t.Errorf("got %v after %v, want %v", err, took, nbdclient.ErrTimeout)
				}
			})
		})
	}
}

// TestWaitingEnds: the end of a context and Close end what waits for a server
// that is silent.
func TestWaitingEnds(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		o := play(t, func(_ int, conn net.Conn) {
			f := newFake()
			f.Conn = conn
			f.handshake()
			f.drain()
		})
		o.InFlight = 2 // of which the block status takes one
		c, err := nbdclient.Dial(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began := time.Now()
		for _, err := range c.Extents(ctx, 0, c.Size()) {
			if !errors.Is(err, context.DeadlineExceeded) || time.Since(began) != time.Second {
				t.Errorf("block status: got %v after %v", err, time.Since(began))
			}
		}
		var calls sync.WaitGroup
		for i := range int64(4) { // one is sent, three wait
			calls.Go(func() {
				if _, err := c.ReadAt(make([]byte, 4096), i*4096); !errors.Is(err, nbdclient.ErrClosed) {
					t.Errorf("read: got %v, want %v", err, nbdclient.ErrClosed)
				}
			})
		}
		synctest.Wait()
		c.Close()
		calls.Wait()
		if _, err := c.ReadAt(make([]byte, 1), 0); !errors.Is(err, nbdclient.ErrClosed) {
			t.Errorf("after Close: got %v", err)
		}
		c.Close()
	})
}

// TestShutdown: a server that says that it shuts down is left for its successor.
func TestShutdown(t *testing.T) {
	t.Parallel()
	want := content(mib)
	synctest.Test(t, func(t *testing.T) {
		o := play(t, func(nth int, conn net.Conn) {
			f := newFake()
			f.Conn = conn
			if nth > 0 {
				f.serve(want)
				return
			}
			f.handshake()
			r, _ := f.request()
			f.Write(f.chunk(r, done, failed, be32(108), be16(0)))
			f.drain()
		})
		c, err := nbdclient.Dial(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		p := make([]byte, 4096)
		if _, err := c.ReadAt(p, 0); err != nil || !bytes.Equal(p, want[:4096]) {
			t.Errorf("got %v, or other bytes", err)
		}
	})
}

// TestConnections: as many connections as the server allows, and fewer if it
// refuses some.
func TestConnections(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name        string
		flags       uint16
		accept      int
		connections int
		want        int32
	}{
		{"one is allowed", wire.FlagHasFlags, 9, 4, 1},
		{"many are allowed", wire.FlagHasFlags | wire.FlagCanMultiConn, 9, 3, 3},
		{"two are accepted", wire.FlagHasFlags | wire.FlagCanMultiConn, 2, 4, 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			want := content(mib)
			synctest.Test(t, func(t *testing.T) {
				var served atomic.Int32
				o := play(t, func(nth int, conn net.Conn) {
					if nth >= tt.accept {
						return
					}
					served.Add(1)
					f := newFake()
					f.Conn, f.flags = conn, tt.flags
					f.serve(want)
				})
				o.Connections = tt.connections
				c, err := nbdclient.Dial(t.Context(), o)
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				p := make([]byte, mib)
				if _, err := c.ReadAt(p, 0); err != nil || !bytes.Equal(p, want) {
					t.Errorf("got %v, or other bytes", err)
				}
				time.Sleep(time.Minute)
				if got := served.Load(); got != tt.want {
					t.Errorf("got %d connections, want %d", got, tt.want)
				}
			})
		})
	}
}

// TestKilledServer kills nbdkit and qemu-nbd while they are being read, and starts them again.
func TestKilledServer(t *testing.T) {
	t.Parallel()
	const size = 16 * mib
	want := content(size)
	file := writeFile(t, filepath.Join(t.TempDir(), "raw"), want)
	for name, args := range map[string][]string{
		"nbdkit":   {"-f", "--filter=delay", "file", file, "rdelay=20ms", "-U"},
		"qemu-nbd": {"-t", "-r", "-e", "8", "-f", "raw", file, "-k"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			socket := filepath.Join(t.TempDir(), "nbd")
			start := func() (kill func()) { return process(t, socket, name, append(args, socket)...) }
			kill := start()
			o := unixOptions(socket)
			o.InFlight = 2 // so that reading takes a while
			c := dial(t, o)
			var rounds atomic.Int32
			var readers sync.WaitGroup
			stop := make(chan struct{})
			for range 4 {
				readers.Go(func() {
					p := make([]byte, size)
					for {
						select {
						case <-stop:
							return
						default:
						}
						clear(p)
						if _, err := c.ReadAt(p, 0); err != nil || !bytes.Equal(p, want) {
							t.Errorf("got %v, or other bytes", err)
							return
						}
						rounds.Add(1)
						for _, err := range c.Extents(t.Context(), 0, size) {
							if err != nil {
								t.Error(err)
							}
						}
					}
				})
			}
			for range 3 {
				time.Sleep(100 * time.Millisecond)
				kill()
				if err := os.Remove(socket); err != nil {
					t.Error(err)
				}
				kill = start()
			}
			close(stop)
			readers.Wait()
			if rounds.Load() < 4 {
				t.Errorf("got %d rounds", rounds.Load())
			}
		})
	}
}

// TestBlockStatusLengths: replies that are shorter or longer than asked, and
// longer than a megabyte.
func TestBlockStatusLengths(t *testing.T) {
	t.Parallel()
	const size = 8 << 30
	for _, tt := range []struct {
		name     string
		extended bool
		reply    func(f *fake, r wire.Request) []byte
		want     []image.Extent
	}{
		{"a GiB each, the last longer than the disk", false, func(f *fake, r wire.Request) []byte {
			return f.chunk(r, done, status, be32(1, 1<<30, uint32(r.Offset>>30)&2, 1<<32-1, uint32(r.Offset>>30)&2))
		}, nil},
		{"in one", true, func(f *fake, r wire.Request) []byte {
			return f.chunk(r, done, ext, be32(1, 2), be64(4096, 3, 1<<64-1, 1))
		}, []image.Extent{{Off: 0, Len: 4096, Zero: true}, {Off: 4096, Len: size - 4096}}},
		{"longer than numbers", true, func(f *fake, r wire.Request) []byte {
			return f.chunk(r, done, ext, be32(1, 3), be64(1<<64-1, 3, 1<<64-1, 3, 9, 0))
		}, []image.Extent{{Off: 0, Len: size, Zero: true}}},
		{"a megabyte of payload", false, func(f *fake, r wire.Request) []byte {
			if r.Offset > 0 {
				return f.chunk(r, done, status, be32(1, uint32(r.Length), 2))
			}
			p := be32(1)
			for i := range uint32(1 << 18) {
				p = append(p, be32(4096, i%2*2)...)
			}
			return f.chunk(r, done, status, p)
		}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			o := play(t, func(_ int, conn net.Conn) {
				f := newFake()
				f.Conn, f.size, f.extended, f.structured = conn, size, tt.extended, !tt.extended
				f.handshake()
				for {
					r, ok := f.request()
					if !ok {
						return
					}
					f.Write(tt.reply(f, r))
				}
			})
			got := collect(t, dial(t, o).Extents(t.Context(), 0, size))
			pos := int64(0)
			for _, e := range got {
				if e.Off != pos {
					t.Fatalf("%v after %d", e, pos)
				}
				pos = e.End()
			}
			if pos != size || tt.want != nil && !slices.Equal(got, tt.want) {
				t.Errorf("got %d extents up to %d, %v", len(got), pos, got[:min(3, len(got))])
			}
		})
	}
}
