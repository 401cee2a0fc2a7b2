package nbdserver_test

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"testing"
	"time"
)

// The tests spell the protocol out once more, in the numbers of NBD
// doc/proto.md, so that a wrong constant in the package shows.
const (
	optExportName, optAbort, optList, optStartTLS, optInfo, optGo uint32 = 1, 2, 3, 5, 6, 7
	optStructured, optListMeta, optSetMeta, optExtended           uint32 = 8, 9, 10, 11

	repAck, repServer, repInfo, repMeta       uint32 = 1, 2, 3, 4
	errUnsup, errPolicy, errInvalid           uint32 = 0x80000001, 0x80000002, 0x80000003
	errTLS, errUnknown, errBig, errExtended   uint32 = 0x80000005, 0x80000006, 0x80000009, 0x8000000a
	cmdRead, cmdWrite, cmdDisc, cmdFlush      uint16 = 0, 1, 2, 3
	cmdTrim, cmdCache, cmdZeroes, cmdStatus   uint16 = 4, 5, 6, 7
	fua, noHole, df, reqOne                   uint16 = 1, 2, 4, 8
	none, data, hole, status, chunkErr        uint16 = 0, 1, 2, 5, 0x8001
	eperm, eio, einval, eoverflow             uint32 = 1, 5, 22, 75
	readOnlyFlags                             uint16 = 1<<0 | 1<<1 | 1<<2 | 1<<8 | 1<<10
	withDF                                    uint16 = readOnlyFlags | 1<<7
	fixedNewstyle, noZeroes                   uint32 = 1, 2
	greetingLength, maxRequest, maxOptionData        = 18, 32 << 20, 64 << 10
)

// wire encodes numbers big-endian and strings as they are.
func wire(parts ...any) []byte {
	var b bytes.Buffer
	for _, p := range parts {
		switch p := p.(type) {
		case string:
			b.WriteString(p)
		case []byte:
			b.Write(p)
		default:
			if err := binary.Write(&b, binary.BigEndian, p); err != nil {
				panic(fmt.Sprintf("cannot encode %T", p))
			}
		}
	}
	return b.Bytes()
}

// str is a string with its length in front.
func str(s string) []byte { return wire(uint32(len(s)), s) }

func option(n uint32, parts ...any) []byte {
	p := wire(parts...)
	return wire("IHAVEOPT", n, uint32(len(p)), p)
}

// info is the data of INFO and GO.
func info(name string, kinds ...uint16) []byte { return wire(str(name), uint16(len(kinds)), kinds) }

// meta is the data of LIST_META_CONTEXT and SET_META_CONTEXT.
func meta(name string, queries ...string) []byte {
	b := wire(str(name), uint32(len(queries)))
	for _, q := range queries {
		b = append(b, str(q)...)
	}
	return b
}

type request struct {
	flags, command uint16
	cookie         uint64
	offset         uint64
	length         uint32
}

func (r request) wire() []byte { return wire(uint32(0x25609513), r) }

// client is a raw NBD client. A server that does not
// answer within a minute fails the test.
type client struct {
	testing.TB
	net.Conn
	in *bufio.Reader
}

// dial connects to a socket and reads the greeting.
func dial(tb testing.TB, socket string) *client {
	tb.Helper()
	nc, err := net.Dial("unix", socket)
	if err != nil {
		tb.Fatal(err)
	}
	return greet(tb, nc)
}

func greet(tb testing.TB, nc net.Conn) *client {
	tb.Helper()
	tb.Cleanup(func() { nc.Close() })
	nc.SetReadDeadline(time.Now().Add(time.Minute))
	c := &client{tb, nc, bufio.NewReader(nc)}
	want := wire("NBDMAGICIHAVEOPT", uint16(3))
	if got := c.read(greetingLength); !bytes.Equal(got, want) {
		tb.Fatalf("greeting: got %q, want %q", got, want)
	}
	return c
}

// enter goes into the transmission phase of an export.
func (c *client) enter(name string, structured bool) *client {
	c.Helper()
	c.send(fixedNewstyle | noZeroes)
	if structured {
		c.send(option(optStructured), option(optSetMeta, meta(name, "base:allocation")))
		c.wantReply(optStructured, repAck)
		c.wantReply(optSetMeta, repMeta)
		c.wantReply(optSetMeta, repAck)
	}
	c.send(option(optGo, info(name)))
	c.wantReply(optGo, repInfo)
	c.wantReply(optGo, repAck)
	return c
}

func (c *client) send(parts ...any) {
	c.Helper()
	if _, err := c.Write(wire(parts...)); err != nil {
		c.Fatalf("send: %v", err)
	}
}

func (c *client) read(n int) []byte {
	c.Helper()
	p := make([]byte, n)
	if _, err := io.ReadFull(c.in, p); err != nil {
		c.Fatalf("read %d bytes: %v", n, err)
	}
	return p
}

// wantClosed fails the test unless the server hangs up without a word.
func (c *client) wantClosed() {
	c.Helper()
	p, err := io.ReadAll(c.in)
	if ne, ok := err.(net.Error); len(p) > 0 || ok && ne.Timeout() {
		c.Errorf("got %q, %v, want the end of the connection", p, err)
	}
}

// optReply is a reply to an option. Messages of errors are left out.
type optReply struct {
	Option, Kind uint32
	Data         string
}

func (c *client) optReply() optReply {
	c.Helper()
	p := c.read(20)
	if magic := binary.BigEndian.Uint64(p); magic != 0x3e889045565a9 {
		c.Fatalf("option reply magic: got %#x", magic)
	}
	r := optReply{binary.BigEndian.Uint32(p[8:]), binary.BigEndian.Uint32(p[12:]), ""}
	r.Data = string(c.read(int(binary.BigEndian.Uint32(p[16:]))))
	if r.Kind>>31 == 1 {
		r.Data = ""
	}
	return r
}

func (c *client) wantReply(option, kind uint32) {
	c.Helper()
	if got := c.optReply(); got.Option != option || got.Kind != kind {
		c.Fatalf("got reply %#x to option %d, want %#x to %d", got.Kind, got.Option, kind, option)
	}
}

// chunk is one chunk of a structured reply.
type chunk struct {
	Flags, Kind uint16
	Cookie      uint64
	Payload     []byte
}

func (c *client) chunk() chunk {
	c.Helper()
	p := c.read(20)
	if magic := binary.BigEndian.Uint32(p); magic != 0x668e33ef {
		c.Fatalf("chunk magic: got %#x", magic)
	}
	k := chunk{Flags: binary.BigEndian.Uint16(p[4:]), Kind: binary.BigEndian.Uint16(p[6:]), Cookie: binary.BigEndian.Uint64(p[8:])}
	k.Payload = c.read(int(binary.BigEndian.Uint32(p[16:])))
	return k
}

// reply is the whole answer to one request.
type reply struct {
	cookie uint64
	errno  uint32
	kinds  []uint16 // of the chunks, none for a simple reply
	data   []byte   // of a READ
	states []extent // of a BLOCK_STATUS
}

type extent struct{ Length, State uint32 }

// simple reads a simple reply with n bytes of data unless it is an error.
func (c *client) simple(n uint32) reply {
	c.Helper()
	p := c.read(16)
	if magic := binary.BigEndian.Uint32(p); magic != 0x67446698 {
		c.Fatalf("simple reply magic: got %#x", magic)
	}
	r := reply{errno: binary.BigEndian.Uint32(p[4:]), cookie: binary.BigEndian.Uint64(p[8:])}
	if r.errno == 0 {
		r.data = c.read(int(n))
	}
	return r
}

// structured reads the chunks of the reply to q, which must be the only request
// under way, and checks what holds for all replies.
func (c *client) structured(q request) reply {
	c.Helper()
	r := reply{cookie: q.cookie}
	covered := uint64(0)
	for {
		k := c.chunk()
		r.kinds = append(r.kinds, k.Kind)
		if k.Cookie != q.cookie {
			c.Fatalf("got cookie %#x, want %#x", k.Cookie, q.cookie)
		}
		if r.data == nil && (k.Kind == data || k.Kind == hole) {
			r.data = make([]byte, q.length)
		}
		switch k.Kind {
		case data:
			off := binary.BigEndian.Uint64(k.Payload) - q.offset
			covered += uint64(copy(r.data[off:], k.Payload[8:]))
		case hole:
			covered += uint64(binary.BigEndian.Uint32(k.Payload[8:]))
		case status:
			if id := binary.BigEndian.Uint32(k.Payload); id != 1 {
				c.Fatalf("got context %d, want 1", id)
			}
			for p := k.Payload[4:]; len(p) > 0; p = p[8:] {
				r.states = append(r.states, extent{binary.BigEndian.Uint32(p), binary.BigEndian.Uint32(p[4:])})
			}
		case chunkErr:
			r.errno = binary.BigEndian.Uint32(k.Payload)
			if n := binary.BigEndian.Uint16(k.Payload[4:]); int(n) != len(k.Payload)-6 {
				c.Fatalf("error message of %d bytes in a payload of %d", n, len(k.Payload))
			}
		}
		if k.Flags&1 == 1 {
			break
		}
	}
	if q.command == cmdRead && r.errno == 0 && covered != uint64(q.length) {
		c.Fatalf("the chunks hold %d bytes, want %d", covered, q.length)
	}
	return r
}

// ask sends a request and returns its reply.
func (c *client) ask(q request, structured bool, payload ...any) reply {
	c.Helper()
	c.send(q.wire(), wire(payload...))
	if structured {
		return c.structured(q)
	}
	n := uint32(0)
	if q.command == cmdRead {
		n = q.length
	}
	r := c.simple(n)
	if r.cookie != q.cookie {
		c.Fatalf("got cookie %#x, want %#x", r.cookie, q.cookie)
	}
	return r
}
