package nbdserver_test

import (
	"context"
	"io"
	"log/slog"
	"net"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/holdfast-backup/holdfast/nbdserver"
)

// inBubble runs a test of a server over pipes in fake time.
func inBubble(t *testing.T, o nbdserver.Options, test func(t *testing.T, l *pipeListener)) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		l := newPipeListener()
		o.Log = slog.New(slog.DiscardHandler)
		s := nbdserver.New(o)
		if err := s.Add(testExport()); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error)
		go func() { ended <- s.Serve(ctx, l) }()
		test(t, l)
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
}

func TestMaxConnections(t *testing.T) {
	inBubble(t, nbdserver.Options{MaxConnections: 2}, func(t *testing.T, l *pipeListener) {
		first := greet(t, l.dial()).enter("disk", true)
		greet(t, l.dial()).enter("disk", true)
		third := l.dial()
		if p, err := io.ReadAll(third); len(p) > 0 {
			t.Errorf("the third client: got %q, %v, want to be closed", p, err)
		}
		first.send(request{command: cmdDisc}.wire())
		first.wantClosed()
		synctest.Wait()
		greet(t, l.dial()).enter("disk", true)
	})
}

// TestHandshakeGivesWay: one in the handshake is left alone for a moment and
// then makes room for the next, oldest first; one in transmission never is.
func TestHandshakeGivesWay(t *testing.T) {
	inBubble(t, nbdserver.Options{MaxConnections: 3}, func(t *testing.T, l *pipeListener) {
		busy := greet(t, l.dial()).enter("disk", false)
		first, second := greet(t, l.dial()), greet(t, l.dial())
		began := time.Now()
		third := greet(t, l.dial())
		if got := time.Since(began); got != 100*time.Millisecond {
			t.Errorf("the third got its place after %v, want 100ms", got)
		}
		first.wantClosed()
		second.enterFlags().enterGo("disk")
		third.enterFlags().enterGo("disk")
		if r := busy.ask(request{command: cmdRead, length: 10}, false); r.errno != 0 {
			t.Errorf("the busy client: got error %d", r.errno)
		}
	})
}

func (c *client) enterFlags() *client {
	c.Helper()
	c.send(fixedNewstyle | noZeroes)
	return c
}

// TestStrangers: thousands of connections that say nothing, half a greeting, or
// one byte a second keep no good client out, whether it is there or comes.
func TestStrangers(t *testing.T) {
	inBubble(t, nbdserver.Options{MaxConnections: 64}, func(t *testing.T, l *pipeListener) {
		resident := greet(t, l.dial()).enter("disk", true)
		stop := make(chan struct{})
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			for i := range 3000 {
				nc := l.dial()
				go func() {
					defer nc.Close()
					go io.Copy(io.Discard, nc)
					for _, b := range append(wire(fixedNewstyle), option(optList)...)[:i%20] {
						if _, err := nc.Write([]byte{b}); err != nil {
							return
						}
						time.Sleep(time.Second)
					}
					<-stop
				}()
			}
		}()
		for range 50 {
			time.Sleep(300 * time.Millisecond)
			c := greet(t, l.dial()).enter("disk", true)
			if r := c.ask(request{command: cmdRead, length: 10}, true); r.errno != 0 {
				t.Errorf("a new client: got error %d", r.errno)
			}
			c.send(request{command: cmdDisc}.wire())
			c.wantClosed()
			if r := resident.ask(request{command: cmdRead, length: 10}, true); r.errno != 0 {
				t.Errorf("the resident client: got error %d", r.errno)
			}
		}
		<-ended
		close(stop)
		resident.SetDeadline(time.Time{})
		time.Sleep(time.Minute)
	})
}

// failingListener fails to accept some times before it goes on.
type failingListener struct {
	*pipeListener
	failures int
	err      error
}

func (l *failingListener) Accept() (net.Conn, error) {
	if l.failures > 0 {
		l.failures--
		return nil, &net.OpError{Op: "accept", Err: l.err}
	}
	return l.pipeListener.Accept()
}

func TestAcceptAgain(t *testing.T) {
	t.Parallel()
	for _, err := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.ECONNABORTED} {
		synctest.Test(t, func(t *testing.T) {
			l := &failingListener{newPipeListener(), 10, err}
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan error)
			go func() { ended <- nbdserver.New(nbdserver.Options{Log: slog.New(slog.DiscardHandler)}).Serve(ctx, l) }()
			began := time.Now()
			greet(t, l.dial())
			if got := time.Since(began); got != time.Second {
				t.Errorf("%v: accepted after %v, want ten pauses of 100ms", err, got)
			}
			cancel()
			if err := <-ended; err != nil {
				t.Errorf("Serve: %v", err)
			}
		})
	}
}

// TestIdleTimeout: one that asks nothing is dropped, not one that waits for a
// slow disk.
func TestIdleTimeout(t *testing.T) {
	inBubble(t, nbdserver.Options{IdleTimeout: time.Minute}, func(t *testing.T, l *pipeListener) {
		c := greet(t, l.dial()).enter("disk", true)
		c.SetDeadline(time.Time{})
		for range 3 {
			time.Sleep(59 * time.Second)
			if r := c.ask(request{command: cmdRead, length: 10}, true); r.errno != 0 {
				t.Errorf("after 59 s: got error %d", r.errno)
			}
		}
		began := time.Now()
		c.wantClosed()
		if got := time.Since(began); got < time.Minute || got > 2*time.Minute {
			t.Errorf("dropped after %v, want 1m to 2m", got)
		}

		c = greet(t, l.dial()).enter("disk", true)
		c.SetDeadline(time.Time{})
		c.send(request{command: cmdWrite, length: 1000}.wire(), "half a payl")
		began = time.Now()
		c.wantClosed()
		if got := time.Since(began); got < time.Minute || got > 2*time.Minute {
			t.Errorf("in the middle of a payload: dropped after %v, want 1m to 2m", got)
		}
	})
}

func TestIdleTimeoutWaitsForTheDisk(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g := newGated()
		l := newPipeListener()
		s := nbdserver.New(nbdserver.Options{IdleTimeout: time.Minute})
		if err := s.Add(nbdserver.Export{Name: "disk", Disk: g}); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- s.Serve(ctx, l) }()
		c := greet(t, l.dial()).enter("disk", false)
		c.SetDeadline(time.Time{})
		c.send(request{command: cmdRead, length: 10}.wire())
		time.Sleep(10 * time.Minute)
		close(g.let)
		if r := c.simple(10); r.errno != 0 {
			t.Errorf("got error %d", r.errno)
		}
		c.wantClosed()
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
}

// slowOnce is a disk that one answer of takes long.
type slowOnce struct {
	counter
	slow *atomic.Bool
}

func (s slowOnce) ReadAt(p []byte, off int64) (int, error) {
	if s.slow.CompareAndSwap(true, false) {
		time.Sleep(time.Second)
	}
	return s.counter.ReadAt(p, off)
}

// TestIdleTimeoutWaitsForARelievedReader: a client that awaits the reply to a
// request that the reader executes itself, since the disk was quick, is not idle.
func TestIdleTimeoutWaitsForARelievedReader(t *testing.T) {
	t.Parallel()
	s := slowOnce{newCounter(), new(atomic.Bool)}
	c := dial(t, start(t, nbdserver.Options{IdleTimeout: 300 * time.Millisecond}, nbdserver.Export{Name: "disk", Disk: s})).enter("disk", false)
	for range 2 {
		for i := range uint64(200) {
			c.ask(request{command: cmdRead, cookie: i, length: 512}, false)
		}
		s.slow.Store(true)
		for i := range uint64(2) {
			if r := c.ask(request{command: cmdRead, cookie: i, length: 512}, false); r.errno != 0 {
				t.Errorf("got error %d", r.errno)
			}
		}
	}
}
