package nbdclient_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/holdfast-backup/holdfast/nbdserver/internal/wire"
	"github.com/holdfast-backup/holdfast/nbdserver/nbdclient"
)

// checkLost checks that whatever is asked of the client is ErrLost, also later,
// and that no byte arrives.
func checkLost(t *testing.T, c *nbdclient.Client) {
	t.Helper()
	for range 3 {
		p := make([]byte, c.Size())
		if n, err := c.ReadAt(p, 0); n != 0 || !errors.Is(err, nbdclient.ErrLost) || bytes.Count(p, []byte{0}) != len(p) {
			t.Errorf("ReadAt: got %d, %v, or bytes; want %v", n, err, nbdclient.ErrLost)
		}
		extents := 0
		for e, err := range c.Extents(t.Context(), 0, c.Size()) {
			extents++
			if !errors.Is(err, nbdclient.ErrLost) {
				t.Errorf("Extents: got %v, %v, want %v", e, err, nbdclient.ErrLost)
			}
		}
		for _, name := range c.Contexts() {
			extents++
			for e, err := range c.Changed(t.Context(), name) {
				if !errors.Is(err, nbdclient.ErrLost) {
					t.Errorf("Changed(%s): got %v, %v, want %v", name, e, err, nbdclient.ErrLost)
				}
			}
		}
		if want := 1 + len(c.Contexts()); extents != want {
			t.Errorf("got %d errors, want %d", extents, want)
		}
		time.Sleep(time.Minute) // of the bubble's time
	}
}

// TestNoReconnect: one of several connections ends while nothing is asked of it.
// What is connected after it has another disk of the same size.
func TestNoReconnect(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name     string
		ends     int // which connection, from 0
		read     bool
		contexts []string
	}{
		{"a further one", 1, true, []string{wire.BaseAllocation}},
		{"the first", 0, true, []string{wire.BaseAllocation}},
		{"before anything was read", 2, false, []string{wire.BaseAllocation}},
		{"without block status", 1, true, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				old, other := bytes.Repeat([]byte{1}, mib), bytes.Repeat([]byte{2}, mib)
				var conns atomic.Int32
				hangUp := make(chan struct{})
				o := play(t, func(nth int, conn net.Conn) {
					conns.Add(1)
					f := newFake()
					f.Conn, f.contexts = conn, tt.contexts
					f.flags |= wire.FlagCanMultiConn
					if nth >= 3 {
						f.serve(other)
						return
					}
					if nth == tt.ends {
						go func() {
							<-hangUp
							conn.Close()
						}()
					}
					f.serve(old)
				})
				o.NoReconnect, o.Connections = true, 3
				c, err := nbdclient.Dial(t.Context(), o)
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				if got := conns.Load(); got != 3 {
					t.Errorf("got %d connections after Dial, want 3", got)
				}
				p := make([]byte, mib)
				if tt.read {
					if _, err := c.ReadAt(p, 0); err != nil || !bytes.Equal(p, old) {
						t.Errorf("before: got %v, or other bytes", err)
					}
				}
				close(hangUp)
				synctest.Wait()
				checkLost(t, c)
				if got := conns.Load(); got != 3 {
					t.Errorf("got %d connections, want 3", got)
				}
				c.Close()
				if _, err := c.ReadAt(p, 0); !errors.Is(err, nbdclient.ErrClosed) {
					t.Errorf("after Close: got %v", err)
				}
			})
		})
	}
}

// TestNoReconnectOwed: requests that are sent or wait for room when another
// connection ends.
func TestNoReconnectOwed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		hangUp := make(chan struct{})
		o := play(t, func(nth int, conn net.Conn) {
			f := newFake()
			f.Conn = conn
			f.flags |= wire.FlagCanMultiConn
			if nth == 1 {
				f.handshake()
				go f.drain()
				<-hangUp
				return
			}
			f.handshake()
			f.drain()
		})
		o.NoReconnect, o.Connections, o.InFlight = true, 2, 1
		c, err := nbdclient.Dial(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		var readers sync.WaitGroup
		for i := range int64(5) { // two are sent, three wait
			readers.Go(func() {
				_, err := c.ReadAt(make([]byte, 4096), i*4096)
				if !errors.Is(err, nbdclient.ErrLost) || !errors.Is(err, io.ErrUnexpectedEOF) {
					t.Errorf("got %v, want %v and %v", err, nbdclient.ErrLost, io.ErrUnexpectedEOF)
				}
			})
		}
		synctest.Wait()
		began := time.Now()
		close(hangUp)
		readers.Wait()
		if took := time.Since(began); took != 0 {
			t.Errorf("it took %v", took)
		}
	})
}

// TestNoReconnectDial: what Dial makes of the connections after the first.
func TestNoReconnectDial(t *testing.T) {
	t.Parallel()
	want := content(mib)
	for _, tt := range []struct {
		name string
		// further is the server from the second connection on; first is the first
		// connection.
		further func(nth int, f *fake, first net.Conn)
		conns   int32 // made in Dial, of at most 4
		took    time.Duration
		want    error
	}{
		{"all", func(_ int, f *fake, _ net.Conn) { f.serve(want) }, 4, 0, nil},
		{"refused", func(nth int, f *fake, _ net.Conn) {
			if nth == 1 {
				f.serve(want)
			}
		}, 3, 0, nil},
		{"unanswered", func(_ int, f *fake, _ net.Conn) { f.drain() }, 2, 10 * time.Second, nil},
		{"Dial's context ends", func(nth int, f *fake, _ net.Conn) {
			if nth == 1 {
				f.serve(want)
			}
			f.drain()
		}, 3, 9 * time.Second, context.DeadlineExceeded},
		{"another size", func(_ int, f *fake, _ net.Conn) { f.size++; f.serve(want) }, 2, 0, nbdclient.ErrChanged},
		{"other flags", func(_ int, f *fake, _ net.Conn) { f.flags &^= wire.FlagReadOnly; f.serve(want) }, 2, 0, nbdclient.ErrChanged},
		{"a context less", func(_ int, f *fake, _ net.Conn) { f.contexts = nil; f.serve(want) }, 2, 0, nbdclient.ErrChanged},
		{"the first ends meanwhile", func(nth int, f *fake, first net.Conn) {
			first.Close()
			time.Sleep(time.Second)
			f.serve(want)
		}, 4, 3 * time.Second, nbdclient.ErrLost},
		{"the first ends and no other is made", func(_ int, _ *fake, first net.Conn) {
			first.Close()
			time.Sleep(time.Second)
		}, 2, time.Second, nbdclient.ErrLost},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				var conns atomic.Int32
				var first net.Conn
				o := play(t, func(nth int, conn net.Conn) {
					conns.Add(1)
					f := newFake()
					f.Conn = conn
					f.flags |= wire.FlagCanMultiConn
					if nth > 0 {
						tt.further(nth, f, first)
						return
					}
					first = conn
					f.serve(want)
				})
				o.NoReconnect = true
				ctx, cancel := context.WithTimeout(t.Context(), 15*time.Second)
				defer cancel()
				if errors.Is(tt.want, context.DeadlineExceeded) {
					ctx, cancel = context.WithTimeout(ctx, 9*time.Second)
					defer cancel()
				}
				began := time.Now()
				c, err := nbdclient.Dial(ctx, o)
				if took := time.Since(began); !errors.Is(err, tt.want) || took != tt.took {
					t.Errorf("Dial: got %v after %v, want %v after %v", err, took, tt.want, tt.took)
				}
				if c != nil {
					defer c.Close()
					time.Sleep(time.Minute)
					p := make([]byte, mib)
					if _, err := c.ReadAt(p, 0); err != nil || !bytes.Equal(p, want) {
						t.Errorf("got %v, or other bytes", err)
					}
				}
				if got := conns.Load(); got != tt.conns {
					t.Errorf("got %d connections, want %d", got, tt.conns)
				}
			})
		})
	}
}

// TestNoReconnectServers: another server's disk has come up at the address of one
// that is still there, when one of its connections ends.
func TestNoReconnectServers(t *testing.T) {
	t.Parallel()
	const size = 4 * mib
	dir := t.TempDir()
	old := bytes.Repeat([]byte{1}, size)
	oldFile := writeFile(t, filepath.Join(dir, "old"), old)
	otherFile := writeFile(t, filepath.Join(dir, "other"), bytes.Repeat([]byte{2}, size))
	for name, args := range map[string]func(socket, file string) []string{
		"nbdkit": func(socket, file string) []string { return []string{"-f", "-r", "-U", socket, "file", file} },
		"qemu-nbd": func(socket, file string) []string {
			return []string{"-t", "-r", "-e", "8", "-f", "raw", "-k", socket, file}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			socket := filepath.Join(t.TempDir(), "nbd")
			process(t, socket, name, args(socket, oldFile)...)
			var conns []*net.UnixConn
			o := unixOptions(socket)
			o.NoReconnect, o.Connections = true, 3
			o.Dialer = func(ctx context.Context, network, address string) (net.Conn, error) {
				conn, err := new(net.Dialer).DialContext(ctx, network, address)
				if err == nil {
					conns = append(conns, conn.(*net.UnixConn))
				}
				return conn, err
			}
			c := dial(t, o)
			if len(conns) != 3 {
				t.Fatalf("got %d connections, want 3", len(conns))
			}
			p := make([]byte, size)
			if _, err := c.ReadAt(p, 0); err != nil || !bytes.Equal(p, old) {
				t.Fatalf("got %v, or other bytes", err)
			}
			if err := os.Remove(socket); err != nil {
				t.Fatal(err)
			}
			process(t, socket, name, args(socket, otherFile)...)
			if err := conns[1].CloseRead(); err != nil {
				t.Fatal(err)
			}
			var err error
			for end := time.Now().Add(time.Minute); err == nil && time.Now().Before(end); {
				clear(p)
				_, err = c.ReadAt(p, 0)
				if bytes.Contains(p, []byte{2}) || err == nil && !bytes.Equal(p, old) {
					t.Fatalf("got bytes of another disk, %v", err)
				}
			}
			if !errors.Is(err, nbdclient.ErrLost) {
				t.Errorf("got %v, want %v", err, nbdclient.ErrLost)
			}
			if len(conns) != 3 {
				t.Errorf("got %d connections, want 3", len(conns))
			}
		})
	}
}

// TestFewerConnections: a lost connection that the server does not replace leaves
// the others, and when the last one has ended, all are made again.
func TestFewerConnections(t *testing.T) {
	t.Parallel()
	want := content(mib)
	synctest.Test(t, func(t *testing.T) {
		var accepted, refused atomic.Int32
		var full atomic.Bool
		var hangUp [3]chan struct{}
		for i := range hangUp {
			hangUp[i] = make(chan struct{})
		}
		o := play(t, func(nth int, conn net.Conn) {
			if full.Load() {
				refused.Add(1)
				return
			}
			accepted.Add(1)
			if nth < len(hangUp) {
				go func() {
					<-hangUp[nth]
					conn.Close()
				}()
			}
			f := newFake()
			f.Conn = conn
			f.flags |= wire.FlagCanMultiConn
			f.serve(want)
		})
		o.Connections = 3
		c, err := nbdclient.Dial(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		check := func(wantAccepted, wantRefused int32) {
			t.Helper()
			p := make([]byte, mib)
			if _, err := c.ReadAt(p, 0); err != nil || !bytes.Equal(p, want) {
				t.Errorf("got %v, or other bytes", err)
			}
			time.Sleep(time.Minute)
			if a, r := accepted.Load(), refused.Load(); a != wantAccepted || r != wantRefused {
				t.Errorf("got %d connections and %d refused, want %d and %d", a, r, wantAccepted, wantRefused)
			}
		}
		synctest.Wait()
		check(3, 0)
		full.Store(true)
		close(hangUp[1])
		synctest.Wait()
		check(3, 1)
		full.Store(false)
		check(3, 1)
		close(hangUp[0])
		close(hangUp[2])
		synctest.Wait()
		check(6, 1)
	})
}
