package nbdserver_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/nbdserver"
)

// TestMain fails if a goroutine of the server outlives the tests.
func TestMain(m *testing.M) {
	if path := os.Getenv("NBDSERVER_TEST_ABANDON"); path != "" {
		abandonSocket(path)
	}
	if socket := os.Getenv("NBDSERVER_TEST_SERVE"); socket != "" {
		if err := serveBench(socket, os.Args[1], os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if os.Getenv("NBDSERVER_TEST_ACTIVATED") != "" {
		activated()
	}
	code := m.Run()
	var stacks []byte
	for range 50 {
		stacks = make([]byte, 1<<20)
		stacks = stacks[:runtime.Stack(stacks, true)]
		if !bytes.Contains(stacks, []byte("nbdserver.(*")) {
			os.Exit(code)
		}
		time.Sleep(20 * time.Millisecond)
	}
	fmt.Printf("FAIL: goroutines are left over\n%s\n", stacks)
	os.Exit(1)
}

func TestAdd(t *testing.T) {
	t.Parallel()
	d := disk{size: 4096}
	s := nbdserver.New(nbdserver.Options{})
	for _, tt := range []struct {
		name   string
		export nbdserver.Export
		want   error
	}{
		{"good", nbdserver.Export{Name: "a", Disk: d}, nil},
		{"again", nbdserver.Export{Name: "a", Disk: d}, nbdserver.ErrExists},
		{"block size 512", nbdserver.Export{Name: "b", Disk: d, BlockSize: 512}, nil},
		{"block size 32 MiB", nbdserver.Export{Name: "c", Disk: d, BlockSize: 32 << 20}, nil},
		{"block size below", nbdserver.Export{Name: "d", Disk: d, BlockSize: 256}, nbdserver.ErrInvalid},
		{"block size above", nbdserver.Export{Name: "d", Disk: d, BlockSize: 64 << 20}, nbdserver.ErrInvalid},
		{"block size no power of two", nbdserver.Export{Name: "d", Disk: d, BlockSize: 1000}, nbdserver.ErrInvalid},
		{"block size negative", nbdserver.Export{Name: "d", Disk: d, BlockSize: -512}, nbdserver.ErrInvalid},
		{"no name", nbdserver.Export{Disk: d}, nbdserver.ErrInvalid},
		{"longest name", nbdserver.Export{Name: strings.Repeat("x", 4096), Disk: d}, nil},
		{"name too long", nbdserver.Export{Name: strings.Repeat("x", 4097), Disk: d}, nbdserver.ErrInvalid},
		{"name with NUL", nbdserver.Export{Name: "d\x00", Disk: d}, nbdserver.ErrInvalid},
		{"name not UTF-8", nbdserver.Export{Name: "\xff", Disk: d}, nbdserver.ErrInvalid},
		{"description with NUL", nbdserver.Export{Name: "d", Description: "\x00", Disk: d}, nbdserver.ErrInvalid},
		{"empty disk", nbdserver.Export{Name: "empty", Disk: disk{}}, nil},
		{"negative size", nbdserver.Export{Name: "d", Disk: disk{size: -1}}, nbdserver.ErrInvalid},
		{"too large", nbdserver.Export{Name: "d", Disk: disk{size: image.MaxSize + 1}}, nbdserver.ErrInvalid},
	} {
		if err := s.Add(tt.export); !errors.Is(err, tt.want) {
			t.Errorf("%s: got %v, want %v", tt.name, err, tt.want)
		}
	}
	if err := s.Remove("a"); err != nil {
		t.Errorf("Remove: %v", err)
	}
	if err := s.Remove("a"); !errors.Is(err, nbdserver.ErrNotFound) {
		t.Errorf("Remove again: got %v, want %v", err, nbdserver.ErrNotFound)
	}
	if err := s.Add(nbdserver.Export{Name: "a", Disk: d}); err != nil {
		t.Errorf("Add after Remove: %v", err)
	}
}

// TestRemove: Remove ends the connections of the export, not others, answers
// what is under way, and returns only when the disk is no longer read.
func TestRemove(t *testing.T) {
	t.Parallel()
	g := newGated()
	socket := filepath.Join(t.TempDir(), "nbd")
	s := startOn(t, "unix", socket, nbdserver.Options{}, testExport(), nbdserver.Export{Name: "gated", Disk: g})
	other := dial(t, socket).enter("disk", true)
	c := dial(t, socket).enter("gated", false)
	c.send(request{command: cmdRead, cookie: 1, length: 512}.wire())
	<-g.entered
	removed := make(chan error)
	go func() { removed <- s.Remove("gated") }()
	for { // until the export is gone, while its disk is still being read
		o := dial(t, socket)
		o.send(fixedNewstyle, option(optInfo, info("gated")))
		kind := o.optReply().Kind
		o.Close()
		if kind == errUnknown {
			break
		}
	}
	select {
	case err := <-removed:
		t.Fatalf("Remove returned %v while the disk was being read", err)
	default:
	}
	close(g.let)
	if r := c.simple(512); r.errno != 0 || r.cookie != 1 {
		t.Errorf("the read under way: got error %d, cookie %d", r.errno, r.cookie)
	}
	c.wantClosed()
	if err := <-removed; err != nil {
		t.Errorf("Remove: %v", err)
	}
	if r := other.ask(request{command: cmdRead, length: 512}, true); r.errno != 0 {
		t.Errorf("a client of another export: got error %d", r.errno)
	}
}

// TestDeadlines: a client has ten seconds to choose an export, and then all the
// time in the world.
func TestDeadlines(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		l := newPipeListener()
		s := nbdserver.New(nbdserver.Options{})
		if err := s.Add(testExport()); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error)
		go func() { ended <- s.Serve(ctx, l) }()

		silent := greet(t, l.dial())
		began := time.Now()
		silent.wantClosed()
		if got := time.Since(began); got != 10*time.Second {
			t.Errorf("a silent client was dropped after %v, want 10s", got)
		}
		idle := greet(t, l.dial()).enter("disk", true)
		idle.SetDeadline(time.Time{})
		time.Sleep(24 * time.Hour)
		if r := idle.ask(request{command: cmdRead, length: 512}, true); r.errno != 0 {
			t.Errorf("after a day: got error %d", r.errno)
		}
		// One that does not take its replies holds up the end for ten seconds.
		idle.send(request{command: cmdRead, length: 512}.wire())
		synctest.Wait()
		began = time.Now()
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Serve: %v", err)
		}
		if got := time.Since(began); got != 10*time.Second {
			t.Errorf("Serve returned after %v, want 10s", got)
		}
	})
}

// TestDrain: what a client has asked for when the server stops is answered.
func TestDrain(t *testing.T) {
	t.Parallel()
	g := newGated()
	l := newPipeListener()
	s := nbdserver.New(nbdserver.Options{})
	if err := s.Add(nbdserver.Export{Name: "disk", Disk: g}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- s.Serve(ctx, l) }()
	choosing := greet(t, l.dial())
	c := greet(t, l.dial()).enter("disk", false)
	for i := range uint64(3) {
		c.send(request{command: cmdRead, cookie: i, length: 512}.wire())
		<-g.entered
	}
	cancel()
	choosing.wantClosed()
	<-l.closed
	close(g.let)
	for range 3 {
		if r := c.simple(512); r.errno != 0 {
			t.Errorf("got error %d", r.errno)
		}
	}
	c.wantClosed()
	if err := <-ended; err != nil {
		t.Errorf("Serve: got %v, want nil", err)
	}
}

func TestServeReportsAFailedListener(t *testing.T) {
	t.Parallel()
	l := newPipeListener()
	l.Close()
	if err := nbdserver.New(nbdserver.Options{}).Serve(t.Context(), l); !errors.Is(err, net.ErrClosed) {
		t.Errorf("got %v, want %v", err, net.ErrClosed)
	}
}

func TestManyClients(t *testing.T) {
	t.Parallel()
	socket := start(t, nbdserver.Options{}, testExport())
	content := testBytes()
	var clients sync.WaitGroup
	for i := range uint64(100) {
		c := dial(t, socket).enter("disk", i%2 == 0) // all are connected at once
		clients.Go(func() {
			for n := range uint64(20) {
				off := (i*7919 + n*104729) % (testSize - 5000)
				r := c.ask(request{command: cmdRead, cookie: n, offset: off, length: 5000}, i%2 == 0)
				if !bytes.Equal(r.data, content[off:off+5000]) {
					t.Errorf("client %d: wrong bytes at %d, error %d", i, off, r.errno)
					return
				}
			}
		})
	}
	clients.Wait()
}

func TestURI(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		addr net.Addr
		name string
		want string
	}{
		{&net.UnixAddr{Net: "unix", Name: "/run/nbd.sock"}, "disk", "nbd+unix:///disk?socket=/run/nbd.sock"},
		{&net.UnixAddr{Net: "unix", Name: "/run/a b&c=d?#+%.sock"}, "", "nbd+unix:///?socket=/run/a%20b%26c%3Dd%3F%23%2B%25.sock"},
		{&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 10809}, "vm/disk 1?", "nbd://127.0.0.1:10809/vm/disk%201%3F"},
		{&net.TCPAddr{IP: net.IPv6loopback, Port: 1}, "/ü", "nbd://[::1]:1//%C3%BC"},
		{&net.TCPAddr{IP: net.ParseIP("fe80::1"), Zone: "eth0", Port: 1}, "x", "nbd://[fe80::1%25eth0]:1/x"},
		{&net.TCPAddr{IP: net.IPv6unspecified, Port: 1}, "x", "nbd://localhost:1/x"},
		{&net.TCPAddr{Port: 1}, "x", "nbd://localhost:1/x"},
	} {
		if got := nbdserver.URI(tt.addr, tt.name); got != tt.want {
			t.Errorf("%v, %q: got %s, want %s", tt.addr, tt.name, got, tt.want)
		}
	}
}

// abandonSocket listens on path and is killed, as a crashing server would be.
func abandonSocket(path string) {
	if _, err := net.Listen("unix", path); err == nil {
		syscall.Kill(os.Getpid(), syscall.SIGKILL)
	}
	os.Exit(3)
}

func TestListen(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "nbd")
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "NBDSERVER_TEST_ABANDON="+path)
	cmd.Run()
	if _, err := os.Lstat(path); err != nil {
		t.Fatalf("the killed process left no socket: %v", err)
	}
	l, err := nbdserver.Listen("unix", path)
	if err != nil {
		t.Fatalf("over a stale socket: %v", err)
	}
	if _, err := nbdserver.Listen("unix", path); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("over a live socket: got %v, want %v", err, syscall.EADDRINUSE)
	}
	if c, err := net.Dial("unix", path); err != nil {
		t.Errorf("the live socket was harmed: %v", err)
	} else {
		c.Close()
	}
	l.Close()

	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := nbdserver.Listen("unix", file); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("over a file: got %v, want %v", err, syscall.EADDRINUSE)
	}
	if p, err := os.ReadFile(file); string(p) != "precious" {
		t.Errorf("the file: got %q, %v", p, err)
	}
}
