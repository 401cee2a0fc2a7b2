package nbdclient_test

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/nbdserver/internal/wire"
	"github.com/holdfast-backup/holdfast/nbdserver/nbdclient"
)

// script is a connection whose server says what is written, whatever it is told.
type script struct {
	net.Conn // nil
	now      io.Reader
	then     io.Reader // after the first request

	asked  chan struct{}
	closed chan struct{}
	ask    func()
	close  func()
}

func newScript(now, then []byte) *script {
	s := &script{now: bytes.NewReader(now), then: bytes.NewReader(then), asked: make(chan struct{}), closed: make(chan struct{})}
	s.ask = sync.OnceFunc(func() { close(s.asked) })
	s.close = sync.OnceFunc(func() { close(s.closed) })
	return s
}

func (s *script) Read(p []byte) (int, error) {
	if n, err := s.now.Read(p); err == nil {
		return n, nil
	}
	select {
	case <-s.asked:
		return s.then.Read(p)
	case <-s.closed:
		return 0, net.ErrClosed
	}
}

func (s *script) Write(p []byte) (int, error) {
	if bytes.HasPrefix(p, be32(wire.MagicRequest)) || bytes.HasPrefix(p, be32(wire.MagicExtendedRequest)) {
		s.ask()
	}
	return len(p), nil
}

func (s *script) Close() error                     { s.close(); return nil }
func (s *script) SetWriteDeadline(time.Time) error { return nil }

// useScript runs a client against the script: a read in the middle of a buffer,
// and block status. Whatever the server says, the client ends, and writes
// nowhere else.
func useScript(t *testing.T, s *script) {
	c, err := nbdclient.Dial(t.Context(), nbdclient.Options{
		Dialer:      func(context.Context, string, string) (net.Conn, error) { return s, nil },
		NoReconnect: true, Connections: 1,
		HandshakeTimeout: time.Second, Timeout: time.Second,
		Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		return
	}
	defer c.Close()
	p := bytes.Repeat([]byte{0xa5}, 3*8192)
	n, err := c.ReadAt(p[8192:2*8192:2*8192], 4096)
	if n < 0 || n > 8192 || n < 8192 && err == nil {
		t.Errorf("ReadAt: got %d, %v", n, err)
	}
	if bytes.Count(p[:8192], []byte{0xa5}) != 8192 || bytes.Count(p[2*8192:], []byte{0xa5}) != 8192 {
		t.Error("ReadAt wrote beside its buffer")
	}
	pos := int64(0)
	for e, err := range c.Extents(t.Context(), 0, c.Size()) {
		if err != nil {
			break
		}
		if e.Off != pos || e.Len <= 0 || e.End() > c.Size() {
			t.Errorf("Extents: got %v after %d, size %d", e, pos, c.Size())
		}
		pos = e.End()
	}
}

// handshakeBytes are what a server says up to the transmission phase.
func handshakeBytes(f *fake) []byte {
	b := be64(wire.MagicServer, wire.MagicOption)
	b = append(b, be16(wire.FlagFixedNewstyle|wire.FlagNoZeroes)...)
	b = append(b, f.replies(wire.OptExtendedHeaders)...)
	if !f.extended {
		b = append(b, f.replies(wire.OptStructuredReply)...)
	}
	if f.extended || f.structured {
		b = append(b, f.replies(wire.OptSetMetaContext)...)
	}
	return append(b, f.replies(wire.OptGo)...)
}

// FuzzHandshake: a hostile server from its first byte on.
func FuzzHandshake(f *testing.F) {
	for _, mode := range []string{"structured", "extended", "simple"} {
		s := newFake()
		s.structured, s.extended = mode == "structured", mode == "extended"
		f.Add(handshakeBytes(s))
	}
	f.Add(append(be64(wire.MagicServer, wire.MagicOption, 0, 1<<20), make([]byte, 200)...))
	f.Fuzz(func(t *testing.T, p []byte) {
		s := newScript(p, nil)
		s.ask() // the end of the bytes is that of the connection
		useScript(t, s)
	})
}

// FuzzTransmission: a hostile server after a good handshake.
func FuzzTransmission(f *testing.F) {
	modes := []*fake{newFake(), newFake(), newFake()}
	modes[1].structured, modes[1].extended = false, true
	modes[2].structured = false
	for _, tt := range hostileReplies {
		r := wire.Request{Cookie: 1, Offset: 4096, Length: 8192}
		if tt.status {
			r = wire.Request{Cookie: 2, Length: mib}
		}
		for i, mode := range modes {
			read := wire.Request{Cookie: 1, Offset: 4096, Length: 8192}
			mode.Conn = nopConn{}
			if tt.status {
				f.Add(byte(i), append(mode.chunk(read, done, data, be64(4096), make([]byte, 8192)), tt.reply(mode, r)...))
			} else {
				f.Add(byte(i), tt.reply(mode, r))
			}
		}
	}
	f.Fuzz(func(t *testing.T, mode byte, p []byte) {
		useScript(t, newScript(handshakeBytes(modes[int(mode)%len(modes)]), p))
	})
}

// nopConn takes what is written to it.
type nopConn struct{ net.Conn }

func (nopConn) Write(p []byte) (int, error) { return len(p), nil }
func (nopConn) Close() error                { return nil }
