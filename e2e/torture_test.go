package e2e_test

import (
	"bytes"
	bigendian "encoding/binary"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// Limits of an export, as `export add --help` and the server's documentation
// state them.
const (
	maxClients = 1024
	// servingMemory is what requests take in all, and clientMemory what each
	// connection takes besides.
	servingMemory = (256 + 64) * miB
	clientMemory  = (256 + 100) * kiB
)

// hostile is a raw NBD client with bad intentions.
type hostile struct {
	net.Conn
	in io.Reader
}

// knock connects to a socket and says nothing.
func knock(t *testing.T, socket string) hostile {
	t.Helper()
	nc, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	return hostile{nc, nc}
}

// enter goes into the transmission phase of the only export. It reports whether
// the server let it in.
//
// Source: NBD doc/proto.md, "Newstyle negotiation", NBD_OPT_STRUCTURED_REPLY and
// NBD_OPT_EXPORT_NAME.
func enter(t *testing.T, socket string, structured bool) (hostile, bool) {
	t.Helper()
	h := knock(t, socket)
	hello := []byte{0, 0, 0, 3} // fixed newstyle, no zeroes
	answer := 18 + 10
	if structured {
		hello = append(hello, "IHAVEOPT\x00\x00\x00\x08\x00\x00\x00\x00"...)
		answer += 20
	}
	hello = append(hello, "IHAVEOPT\x00\x00\x00\x01\x00\x00\x00\x00"...)
	h.SetDeadline(time.Now().Add(30 * time.Second))
	_, err := h.Write(hello) // fails if the server has closed already
	if err == nil {
		_, err = io.ReadFull(h, make([]byte, answer))
	}
	h.SetDeadline(time.Time{})
	if err != nil {
		h.Close()
	}
	return h, err == nil
}

// request is a request's header.
//
// Source: NBD doc/proto.md, "Request message".
func request(command uint16, cookie, off uint64, length uint32) []byte {
	b := bigendian.BigEndian.AppendUint32(nil, 0x25609513)
	b = bigendian.BigEndian.AppendUint16(b, 0)
	b = bigendian.BigEndian.AppendUint16(b, command)
	b = bigendian.BigEndian.AppendUint64(b, cookie)
	b = bigendian.BigEndian.AppendUint64(b, off)
	return bigendian.BigEndian.AppendUint32(b, length)
}

const (
	cmdRead        = 0
	cmdWrite       = 1
	cmdBlockStatus = 7
)

// send writes what the server may refuse to take: it has two seconds.
func (h hostile) send(p []byte) {
	h.SetWriteDeadline(time.Now().Add(2 * time.Second))
	_, _ = h.Write(p)
}

// attack has n clients of each kind of trouble. They stay connected until the
// test ends or they are closed.
func attack(t *testing.T, socket string, n int, hole uint64) []hostile {
	t.Helper()
	var clients []hostile
	var busy sync.WaitGroup
	t.Cleanup(busy.Wait)
	in := func(structured bool, do func(hostile)) {
		h, ok := enter(t, socket, structured)
		if !ok {
			t.Fatal("a client was not let in")
		}
		t.Cleanup(func() { h.Close() }) // before busy.Wait
		clients = append(clients, h)
		if do != nil {
			busy.Go(func() { do(h) })
		}
	}
	garbage := bytes.Repeat([]byte("\xff\x00IHAVEOPTNBDMAGIC\x25\x60\x95\x13"), 1000)
	var reads, statuses []byte
	for k := range uint64(16) {
		reads = append(reads, request(cmdRead, k, k<<19, 32*miB)...)
		statuses = append(statuses, request(cmdBlockStatus, k, 0, 64*miB)...)
	}
	for i := range n {
		clients = append(clients, knock(t, socket)) // silent
		h := knock(t, socket)
		h.send(garbage[i%30:])
		clients = append(clients, h)

		in(true, nil) // idle
		in(i%2 == 0, func(h hostile) { h.send(garbage[i%30:]) })
		in(true, func(h hostile) { h.send(request(cmdRead, 1, 0, 4096)[:i%28]) })                                   // half a header
		in(true, func(h hostile) { h.send(append(request(cmdWrite, 1, hole, 32*miB), make([]byte, i*10*kiB)...)) }) // half a payload
		in(i%2 == 0, func(h hostile) { h.send(reads) })                                                             // and reads nothing
		in(true, func(h hostile) { h.send(statuses) })
		in(true, func(h hostile) { // reads slowly
			h.send(reads)
			for p := make([]byte, 4*kiB); ; time.Sleep(20 * time.Millisecond) {
				if _, err := h.Read(p); err != nil {
					return
				}
			}
		})
		in(i%2 == 0, func(h hostile) { // leaves amid its replies
			h.send(reads)
			_, _ = io.ReadFull(h, make([]byte, i*100*kiB))
			h.Close()
		})
	}
	return clients
}

// sockets is how many sockets a process has open.
func (p *process) sockets() int {
	p.t.Helper()
	folder := fmt.Sprintf("/proc/%d/fd", p.cmd.Process.Pid)
	entries, err := os.ReadDir(folder)
	if err != nil {
		p.t.Fatal(err)
	}
	n := 0
	for _, e := range entries {
		if to, err := os.Readlink(filepath.Join(folder, e.Name())); err == nil && strings.HasPrefix(to, "socket:") {
			n++
		}
	}
	return n
}

// peakMemory is the most bytes of memory that a process has had.
func (p *process) peakMemory() int64 {
	p.t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		p.t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), "VmHWM:")
	kilobytes, _, _ := strings.Cut(rest, "kB")
	n, err := strconv.ParseInt(strings.TrimSpace(kilobytes), 10, 64)
	if err != nil {
		p.t.Fatal(err)
	}
	return n * kiB
}

// TestHostileClients: whatever clients do, others are served right, memory stays
// within what is documented, and the export ends when it shall.
func TestHostileClients(t *testing.T) {
	t.Parallel()
	const data, size = 48 * miB, 96 * miB
	source := noiseDisk(t, data, 31)
	if err := os.Truncate(source, size); err != nil { // the rest is a hole
		t.Fatal(err)
	}
	r := newRepo(t)
	e := r.export(r.backup(source).Point, "--writable", "--name", "disk")
	u, err := url.Parse(e.URI)
	if err != nil {
		t.Fatal(err)
	}
	socket := u.Query().Get("socket")
	identicalExport(t, e.URI, source)
	own := e.sockets()

	// No more than the limit are let in, and all who are.
	var crowd []hostile
	for range 3000 {
		if h, ok := enter(t, socket, true); ok {
			crowd = append(crowd, h)
		}
	}
	if len(crowd) != maxClients {
		t.Errorf("%d clients were let in, want %d", len(crowd), maxClients)
	}
	for _, h := range crowd {
		h.Close()
	}
	e.until("end of the crowd's connections", func() bool { return e.sockets() == own })

	before := e.peakMemory()
	clients := attack(t, socket, 80, data)
	to := filepath.Join(t.TempDir(), "copy")
	for range 2 {
		tool(t, "nbdcopy", "--connections=4", e.URI, to)
		sameFile(t, to, source)
		identicalExport(t, e.URI, source)
	}
	if got, want := e.peakMemory()-before, int64(servingMemory+len(clients)*clientMemory); got > want {
		t.Errorf("the export took %d MiB more at its peak, want at most %d", got/miB, want/miB)
	}
	for _, h := range clients {
		h.Close()
	}
	e.until("end of the hostile clients' connections", func() bool { return e.sockets() == own })
	identicalExport(t, e.URI, source)

	// Clients that neither read nor leave do not keep it from ending.
	attack(t, socket, 5, data)
	e.stop()
}
