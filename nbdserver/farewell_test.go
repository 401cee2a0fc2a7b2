package nbdserver_test

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/holdfast-backup/holdfast/nbdserver"
)

// slowWrites is a disk that takes its time.
type slowWrites struct {
	*ram
	delay  time.Duration
	writes *atomic.Int64
}

func (s slowWrites) WriteAt(p []byte, off int64) (int, error) {
	time.Sleep(s.delay)
	s.writes.Add(1)
	return s.ram.WriteAt(p, off)
}

// TestDisconnectAfterWrites: what a client asks to change before it disconnects
// is done, whether or not it stays for the replies.
//
// Source: NBD doc/proto.md, "NBD_CMD_DISC".
func TestDisconnectAfterWrites(t *testing.T) {
	t.Parallel()
	for _, delay := range []time.Duration{0, time.Millisecond} {
		for _, m := range modes {
			t.Run(fmt.Sprintf("%v/%v", delay, m), func(t *testing.T) {
				t.Parallel()
				const n, length = 400, 4096
				d := slowWrites{newRAM(make([]byte, n*length)), delay, new(atomic.Int64)}
				s := nbdserver.New(quiet)
				if err := s.Add(nbdserver.Export{Name: "disk", Disk: d}); err != nil {
					t.Fatal(err)
				}
				l, err := net.Listen("unix", filepath.Join(t.TempDir(), "nbd"))
				if err != nil {
					t.Fatal(err)
				}
				defer l.Close()
				ended := make(chan error)
				go func() {
					nc, err := l.Accept()
					if err == nil {
						err = s.ServeConn(context.Background(), nc)
					}
					ended <- err
				}()
				c := enterMode(dial(t, l.Addr().String()), "disk", m)
				for i := range uint64(n) {
					q := ask64{0, cmdWrite, i, i * length, length}
					if m == extendedMode {
						q.flags = payloadLen
					}
					c.send(c.header(q), bytes.Repeat([]byte{1}, length), c.header(ask64{0, cmdRead, i, 0, length}))
				}
				c.send(c.header(ask64{0, cmdFlush, 1, 0, 0}), c.header(ask64{0, cmdDisc, 1, 0, 0}))
				c.Close()
				<-ended // perhaps with an error: the client is gone
				if got := d.writes.Load(); got != n || d.syncs.Load() != 1 {
					t.Errorf("%d writes and %d flushes were executed, want %d and 1", got, d.syncs.Load(), n)
				}
				if !d.holds(bytes.Repeat([]byte{1}, n*length)) {
					t.Error("wrong bytes")
				}
			})
		}
	}
}

// TestZeroingEnds: zeros that are written one by one over a huge disk hold up
// the end of a connection for Options.DrainTimeout only.
func TestZeroingEnds(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d := huge{slowWrites{newRAM(nil), time.Millisecond, new(atomic.Int64)}}
		l, stop := serveInBubble(t, quiet, nbdserver.Export{Name: "disk", Disk: d})
		c := enterMode(greet(t, l.dial()), "disk", extendedMode)
		c.send(c.header(ask64{noHole, cmdZeroes, 1, 0, 1 << 50}))
		synctest.Wait()
		c.Close()
		if err := stop(); err != nil {
			t.Errorf("Serve: %v", err)
		}
		if got := d.writes.Load(); got < 1000 || got > 10_001 {
			t.Errorf("%d pieces of 1 ms were written", got)
		}
	})
}

type huge struct{ slowWrites }

func (huge) Size() int64 { return 1 << 50 }

func (h huge) WriteAt(p []byte, _ int64) (int, error) {
	time.Sleep(h.delay)
	h.writes.Add(1)
	return len(p), nil
}

// TestFailedListenerAndBusyDisk: the listener's error does not hide that a disk
// must not be closed.
func TestFailedListenerAndBusyDisk(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g := newGated()
		l := newPipeListener()
		s := nbdserver.New(quiet)
		if err := s.Add(nbdserver.Export{Name: "disk", Disk: g}); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error)
		go func() { ended <- s.Serve(t.Context(), l) }()
		c := greet(t, l.dial()).enter("disk", false)
		c.send(request{command: cmdRead, length: 512}.wire())
		<-g.entered
		l.Close()
		if err := <-ended; !errors.Is(err, nbdserver.ErrBusy) || !errors.Is(err, net.ErrClosed) {
			t.Errorf("got %v, want %v and %v", err, net.ErrClosed, nbdserver.ErrBusy)
		}
		close(g.let)
	})
}

// TestKeyUpdateOfADeafClient: a client over TLS that reads nothing and asks for
// new keys, so that TLS itself has something to say, does not hold up the end.
func TestKeyUpdateOfADeafClient(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	dir, _ := a.folder("server", "server")
	o := nbdserver.Options{TLS: loadTLS(t, dir, nbdserver.TLSOptions{}), DrainTimeout: 10 * time.Millisecond}
	l, stop := serveInBubble(t, o, nbdserver.Export{Name: "disk", Disk: newCounter()}) // but in no bubble, since TLS waits for mutexes
	var keys bytes.Buffer
	config := a.config("")
	config.KeyLogWriter = &keys
	c := greet(t, l.dial()).enterFlags().encrypt(config)
	c.send(option(optGo, info("disk")))
	c.wantReply(optGo, repInfo)
	c.wantReply(optGo, repAck)
	encrypted := c.Conn.(*tls.Conn)
	// One record was sent under these keys, the option.
	update := keyUpdate(t, encrypted.ConnectionState().CipherSuite, keys.String(), 1)
	if _, err := encrypted.NetConn().Write(update); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- stop() }()
	select {
	case err := <-ended:
		if err != nil {
			t.Errorf("Serve: %v", err)
		}
	case <-time.After(time.Minute):
		t.Error("Serve does not end")
	}
}

// keyUpdate is a record that asks the other side for new keys as well, encrypted
// with a client's traffic secret from its log of keys. number is how many records were
// sent with that before.
//
// Source: RFC 8446, sections 4.6.3, 5.2, 5.3, 7.1 and 7.3.
func keyUpdate(t *testing.T, suite uint16, log string, number uint64) []byte {
	t.Helper()
	if suite != tls.TLS_AES_128_GCM_SHA256 {
		t.Fatalf("the cipher suite is %s, want AES-128-GCM", tls.CipherSuiteName(suite))
	}
	_, line, _ := strings.Cut(log, "CLIENT_TRAFFIC_SECRET_0 ")
	fields := strings.Fields(line)
	secret, err := hex.DecodeString(fields[1])
	if err != nil {
		t.Fatal(err)
	}
	derive := func(label string, n int) []byte {
		p, err := hkdf.Expand(sha256.New, secret, string(wire(uint16(n), byte(len(label)+6), "tls13 "+label, byte(0))), n)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	block, err := aes.NewCipher(derive("key", 16))
	if err != nil {
		t.Fatal(err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	nonce := derive("iv", 12)
	binary.BigEndian.PutUint64(nonce[4:], binary.BigEndian.Uint64(nonce[4:])^number)
	inner := []byte{24, 0, 0, 1, 1, 22} // KeyUpdate(update_requested), a handshake message
	header := wire(byte(23), uint16(0x0303), uint16(len(inner)+aead.Overhead()))
	return aead.Seal(header, nonce, inner, header)
}
