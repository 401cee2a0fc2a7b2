package nbdserver_test

import (
	"bytes"
	"context"
	"io"
	"iter"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/nbdserver"
)

// disk is an image.Disk over any reader, with a map of pieces of one size:
// zero says which of them are holes. A nil zero means that all is data.
type disk struct {
	io.ReaderAt
	size  int64
	piece int64
	zero  func(piece int64) bool
}

func (d disk) Size() int64 { return d.size }

func (d disk) Extents(_ context.Context, off, length int64) iter.Seq2[image.Extent, error] {
	return func(yield func(image.Extent, error) bool) {
		off, length := image.Clip(off, length, d.size)
		end := off + length
		if d.zero == nil && length > 0 {
			yield(image.Extent{Off: off, Len: length}, nil)
			return
		}
		for off < end {
			next := min(end, off-off%d.piece+d.piece)
			if !yield(image.Extent{Off: off, Len: next - off, Zero: d.zero(off / d.piece)}, nil) {
				return
			}
			off = next
		}
	}
}

// start serves exports on a unix socket until the test ends and returns the
// socket's path. The test fails if the server does not end well.
func start(tb testing.TB, o nbdserver.Options, exports ...nbdserver.Export) string {
	tb.Helper()
	socket := filepath.Join(tb.TempDir(), "nbd")
	startOn(tb, "unix", socket, o, exports...)
	return socket
}

func startOn(tb testing.TB, network, address string, o nbdserver.Options, exports ...nbdserver.Export) *nbdserver.Server {
	tb.Helper()
	l, err := nbdserver.Listen(network, address)
	if err != nil {
		tb.Fatal(err)
	}
	return serve(tb, l, o, exports...)
}

func serve(tb testing.TB, l net.Listener, o nbdserver.Options, exports ...nbdserver.Export) *nbdserver.Server {
	tb.Helper()
	s := nbdserver.New(o)
	for _, e := range exports {
		if err := s.Add(e); err != nil {
			tb.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- s.Serve(ctx, l) }()
	tb.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			tb.Errorf("Serve: %v", err)
		}
	})
	return s
}

func openFile(tb testing.TB, path string) *os.File {
	tb.Helper()
	f, err := os.Open(path)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { f.Close() })
	return f
}

// run runs a command that must succeed and returns its standard output.
func run(tb testing.TB, name string, args ...string) []byte {
	tb.Helper()
	var stderr bytes.Buffer
	cmd := exec.CommandContext(tb.Context(), name, args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		tb.Fatalf("%s %q: %v\n%s%s", name, args, err, out, stderr.Bytes())
	}
	return out
}

// pipeListener hands out the server's ends of pipes, on which nothing is
// buffered.
type pipeListener struct {
	conns  chan net.Conn
	closed chan struct{}
	close  func()
}

func newPipeListener() *pipeListener {
	l := &pipeListener{conns: make(chan net.Conn), closed: make(chan struct{})}
	l.close = sync.OnceFunc(func() { close(l.closed) })
	return l
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error   { l.close(); return nil }
func (l *pipeListener) Addr() net.Addr { return &net.UnixAddr{Net: "unix", Name: "pipe"} }

// dial returns the client's end of a new pipe.
func (l *pipeListener) dial() net.Conn {
	client, server := net.Pipe()
	l.conns <- server
	return client
}

// pipe connects a client over a pipe to a server of its own.
func pipe(tb testing.TB, o nbdserver.Options, exports ...nbdserver.Export) *client {
	tb.Helper()
	l := newPipeListener()
	serve(tb, l, o, exports...)
	return greet(tb, l.dial())
}
