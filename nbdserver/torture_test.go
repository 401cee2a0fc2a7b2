package nbdserver_test

import (
	"fmt"
	"log/slog"
	"net"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/nbdserver"
)

// tortureServer returns the socket of a server with everything switched on, and
// a check that a client connected from the start and a new one are still served.
func tortureServer(t *testing.T, mode *nbdserver.TLS) (socket string, unharmed func(t *testing.T)) {
	t.Helper()
	exports := append(handshakeExports(), testExport())
	socket = start(t, nbdserver.Options{TLS: mode, Log: slog.New(slog.DiscardHandler)}, exports...)
	resident := dial(t, socket).enter("disk", true)
	return socket, func(t *testing.T) {
		t.Helper()
		fresh := dial(t, socket).enter("disk", true)
		defer fresh.Close()
		for who, c := range map[string]*client{"the resident": resident, "a new client": fresh} {
			if r := c.ask(request{command: cmdRead, cookie: 1, length: 100}, true); r.errno != 0 {
				t.Errorf("%s: got error %d", who, r.errno)
			}
		}
	}
}

func offered(tb testing.TB) *nbdserver.TLS {
	tb.Helper()
	dir, _ := newAuthority(tb).folder("server", "server")
	return loadTLS(tb, dir, nbdserver.TLSOptions{})
}

// allOptions are options known and unknown.
var allOptions = []uint32{
	0, optExportName, optAbort, optList, 4, optStartTLS, optInfo, optGo, optStructured, optListMeta, optSetMeta, optExtended, 12, 0xffffffff,
}

// TestOptionLengths sends every option with zeros of every critical length. The
// server answers or hangs up, and answers the next option unless it hung up.
func TestOptionLengths(t *testing.T) {
	t.Parallel()
	socket, unharmed := tortureServer(t, offered(t))
	for _, n := range allOptions {
		for _, length := range []uint32{0, 1, 3, 4, 5, 6, 8, 9, maxOptionData - 1, maxOptionData, maxOptionData + 1, 1 << 31, 1<<32 - 1} {
			ends := length > maxOptionData || n == optAbort || n == optExportName || n == optStartTLS && length == 0
			c := dial(t, socket)
			c.send(fixedNewstyle, "IHAVEOPT", n, length)
			if length <= maxOptionData {
				c.Write(make([]byte, length)) // the server may have hung up already
				if n != optExportName {
					c.optReply()
				}
			}
			switch {
			case n == optStartTLS && length == 0:
				c.Write(make([]byte, 1000)) // is no TLS
				c.in.Peek(1)
			case ends:
				c.wantClosed()
			default:
				for n == optList && length == 0 { // two of three exports and the end of the list
					if c.optReply().Kind == repAck {
						break
					}
				}
				c.send(option(99))
				c.wantReply(99, errUnsup)
			}
			c.Close()
		}
		c := dial(t, socket)
		c.send(fixedNewstyle, "IHAVEOPU", n, uint32(0))
		c.wantClosed()
		c.Close()
		unharmed(t)
	}
}

// TestHandshakeCutShort ends a long handshake after each of its bytes.
func TestHandshakeCutShort(t *testing.T) {
	t.Parallel()
	socket, unharmed := tortureServer(t, nil)
	whole := wire(fixedNewstyle|noZeroes, option(optList), option(optStructured), option(optExtended),
		option(optListMeta, meta("vm/disk 1", "x-days:")), option(optSetMeta, meta("vm/disk 1", "base:allocation")),
		option(optInfo, info("other", 1, 3)), option(optStartTLS), option(99, "data"), option(optGo, info("vm/disk 1", 3)))
	for n := range whole {
		c := dial(t, socket)
		c.send(whole[:n])
		c.Conn.(*net.UnixConn).CloseWrite()
		if _, err := c.in.WriteTo(discard{}); err != nil {
			t.Errorf("after %d bytes: %v", n, err)
		}
		c.Close()
	}
	unharmed(t)
}

type discard struct{}

func (discard) Write(p []byte) (int, error) { return len(p), nil }

// TestNames asks for exports by names that there cannot be.
func TestNames(t *testing.T) {
	t.Parallel()
	socket, unharmed := tortureServer(t, nil)
	for _, tt := range []struct {
		name string
		want uint32
	}{
		{"disk\x00", errUnknown},
		{"\x00", errUnknown},
		{"\xff\xfe", errUnknown},
		{"DISK", errUnknown},
		{"disk/", errUnknown},
		{"../disk", errUnknown},
		{strings.Repeat("x", 4096), errUnknown},
		{strings.Repeat("x", 4097), errInvalid},
		{strings.Repeat("ü", 2049), errInvalid},
	} {
		c := dial(t, socket)
		c.send(fixedNewstyle, option(optExtended))
		c.wantReply(optExtended, repAck)
		for n, data := range map[uint32][]byte{
			optInfo: info(tt.name), optGo: info(tt.name), optListMeta: meta(tt.name), optSetMeta: meta(tt.name, "base:allocation"),
		} {
			c.send(option(n, data))
			if got := c.optReply(); got.Option != n || got.Kind != tt.want {
				t.Errorf("option %d, name %.10q: got %#x, want %#x", n, tt.name, got.Kind, tt.want)
			}
		}
		c = dial(t, socket)
		c.send(fixedNewstyle, option(optExportName, tt.name))
		c.wantClosed()
		c = dial(t, socket) // as a query, it matches nothing
		c.send(fixedNewstyle, option(optListMeta, meta("vm/disk 1", "x:"+tt.name)))
		if got := c.optReply(); got.Kind != repAck && len(tt.name) < 4095 {
			t.Errorf("query %.10q: got %#x", tt.name, got.Kind)
		}
		unharmed(t)
	}
}

// TestGoTwice: behind GO come requests, and an option is none.
func TestGoTwice(t *testing.T) {
	t.Parallel()
	socket, unharmed := tortureServer(t, nil)
	c := dial(t, socket).enter("disk", false)
	c.send(option(optGo, info("disk", 3))) // as long as a request
	c.wantClosed()
	unharmed(t)
}

// TestInfoTellsWhatGoTells: the answers are the same if nothing happens between.
func TestInfoTellsWhatGoTells(t *testing.T) {
	t.Parallel()
	socket, _ := tortureServer(t, nil)
	for _, first := range [][]byte{nil, option(optStructured), option(optExtended)} {
		c := dial(t, socket)
		c.send(fixedNewstyle, first)
		if first != nil {
			c.optReply()
		}
		var answers [2][]optReply
		for i, n := range []uint32{optInfo, optGo} {
			c.send(option(n, info("vm/disk 1", 0, 1, 2, 3)))
			for {
				r := c.optReply()
				answers[i] = append(answers[i], optReply{0, r.Kind, r.Data})
				if r.Kind != repInfo {
					break
				}
			}
		}
		if !slices.Equal(answers[0], answers[1]) {
			t.Errorf("INFO said %+v, GO %+v", answers[0], answers[1])
		}
	}
}

// TestHandshakeMemory: clients that announce much and send nothing cost the
// server the length of one option each, and those that announce more cost
// nothing. It is not parallel, so that nobody else allocates.
func TestHandshakeMemory(t *testing.T) {
	socket := start(t, nbdserver.Options{Log: slog.New(slog.DiscardHandler)}, testExport())
	heap := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	const clients = 200
	before := heap()
	var open []*client
	for i := range clients {
		c := dial(t, socket)
		c.send(fixedNewstyle, "IHAVEOPT", optInfo, uint32(maxOptionData), fmt.Sprint(i))
		open = append(open, c)
	}
	huge := dial(t, socket)
	huge.send(fixedNewstyle, "IHAVEOPT", optInfo, uint32(1<<32-1))
	huge.wantClosed()
	const each = maxOptionData + 64<<10 // buffers, stacks and both ends' descriptors
	if got := heap() - before; got > clients*each {
		t.Errorf("%d clients in the handshake take %d bytes each, want at most %d", clients, got/clients, each)
	}
	for _, c := range open {
		c.Close()
	}
}
