package nbdclient_test

import (
	"bytes"
	"errors"
	"io"
	"net"
	"syscall"
	"testing"

	"github.com/holdfast-backup/holdfast/nbdserver/internal/wire"
	"github.com/holdfast-backup/holdfast/nbdserver/nbdclient"
)

const (
	done   = wire.ChunkFlagDone
	data   = wire.ChunkOffsetData
	hole   = wire.ChunkOffsetHole
	none   = wire.ChunkNone
	status = wire.ChunkBlockStatus
	ext    = wire.ChunkBlockStatusExt
	failed = wire.ChunkError
)

// hostileReplies are answers to a read of 8192 bytes at 4096 or, with status, to
// a request for the block status of the disk. The server goes on to wait for the
// client to hang up.
var hostileReplies = []struct {
	name   string
	mode   string // structured if empty
	status bool
	want   error // ErrProtocol if nil
	reply  func(f *fake, r wire.Request) []byte
}{
	{name: "no magic", reply: func(*fake, wire.Request) []byte { return make([]byte, 20) }},
	{name: "unknown cookie", reply: func(f *fake, r wire.Request) []byte {
		r.Cookie++
		return f.chunk(r, done, data, be64(4096), make([]byte, 8192))
	}},
	{name: "simple where structured was negotiated", reply: func(_ *fake, r wire.Request) []byte { return wire.AppendSimple(nil, 0, r.Cookie) }},
	{name: "simple error to a structured read", reply: func(_ *fake, r wire.Request) []byte { return wire.AppendSimple(nil, wire.EIO, r.Cookie) }},
	{name: "structured where simple was negotiated", mode: "simple", reply: func(f *fake, r wire.Request) []byte {
		return f.chunk(r, done, data, be64(4096), make([]byte, 8192))
	}},
	{name: "structured where extended was negotiated", mode: "extended", reply: func(_ *fake, r wire.Request) []byte {
		return append(wire.AppendChunk(nil, done, none, r.Cookie, 0), make([]byte, 12)...)
	}},
	{name: "extended where structured was negotiated", reply: func(_ *fake, r wire.Request) []byte {
		return wire.AppendExtendedChunk(nil, done, none, r.Cookie, r.Offset, 0)
	}},
	{name: "extended with another offset", mode: "extended", reply: func(f *fake, r wire.Request) []byte {
		r.Offset++
		return f.chunk(r, done, data, be64(4096), make([]byte, 8192))
	}},
	{name: "no content", reply: func(f *fake, r wire.Request) []byte { return f.chunk(r, done, none) }},
	{name: "missing head", reply: func(f *fake, r wire.Request) []byte {
		return f.chunk(r, done, data, be64(4097), make([]byte, 8191))
	}},
	{name: "missing tail", reply: func(f *fake, r wire.Request) []byte {
		return f.chunk(r, done, data, be64(4096), make([]byte, 8191))
	}},
	{name: "missing middle", reply: func(f *fake, r wire.Request) []byte {
		return append(f.chunk(r, 0, data, be64(4096), make([]byte, 4096)), f.chunk(r, done, hole, be64(8193), be32(4095))...)
	}},
	{name: "before the request", reply: func(f *fake, r wire.Request) []byte {
		return f.chunk(r, 0, data, be64(4095), make([]byte, 8192))
	}},
	{name: "behind the request", reply: func(f *fake, r wire.Request) []byte {
		return f.chunk(r, 0, data, be64(4097), make([]byte, 8192))
	}},
	{name: "longer than the request", reply: func(f *fake, r wire.Request) []byte {
		return f.chunk(r, done, data, be64(4096), make([]byte, 8193))
	}},
	{name: "offset near the highest number", reply: func(f *fake, r wire.Request) []byte {
		return f.chunk(r, 0, hole, be64(1<<64-4096), be32(8192))
	}},
	{name: "huge payload", reply: func(_ *fake, r wire.Request) []byte {
		return append(wire.AppendChunk(nil, done, data, r.Cookie, 1<<32-1), be64(4096)...)
	}},
	{name: "huge extended payload", mode: "extended", reply: func(_ *fake, r wire.Request) []byte {
		return append(wire.AppendExtendedChunk(nil, done, data, r.Cookie, r.Offset, -1), be64(4096)...)
	}},
	{name: "overlap", reply: func(f *fake, r wire.Request) []byte {
		return append(f.chunk(r, 0, data, be64(4096), make([]byte, 4097)), f.chunk(r, 0, data, be64(8192), make([]byte, 4096))...)
	}},
	{name: "overlap from before", reply: func(f *fake, r wire.Request) []byte {
		return append(f.chunk(r, 0, hole, be64(8192), be32(10)), f.chunk(r, 0, hole, be64(4096), be32(4097))...)
	}},
	{name: "twice the same", reply: func(f *fake, r wire.Request) []byte {
		return append(f.chunk(r, 0, hole, be64(4096), be32(8192)), f.chunk(r, 0, hole, be64(4096), be32(8192))...)
	}},
	{name: "data of no bytes", reply: func(f *fake, r wire.Request) []byte { return f.chunk(r, 0, data, be64(4096)) }},
	{name: "hole of no bytes", reply: func(f *fake, r wire.Request) []byte { return f.chunk(r, 0, hole, be64(4096), be32(0)) }},
	{name: "hole with the wrong length", reply: func(f *fake, r wire.Request) []byte { return f.chunk(r, 0, hole, be64(4096), be64(8192)) }},
	{name: "none that is not done", reply: func(f *fake, r wire.Request) []byte { return f.chunk(r, 0, none) }},
	{name: "none with a payload", reply: func(f *fake, r wire.Request) []byte { return f.chunk(r, done, none, be32(0)) }},
	{name: "unknown type", reply: func(f *fake, r wire.Request) []byte { return f.chunk(r, done, 77) }},
	{name: "block status to a read", reply: func(f *fake, r wire.Request) []byte { return f.chunk(r, done, status, be32(1, 8192, 0)) }},
	{name: "error without an error", reply: func(f *fake, r wire.Request) []byte { return f.chunk(r, done, failed, be32(0), be16(0)) }},
	{name: "short error", reply: func(f *fake, r wire.Request) []byte { return f.chunk(r, done, failed, be32(5)) }},
	{name: "error's message too long", reply: func(f *fake, r wire.Request) []byte { return f.chunk(r, done, failed, be32(5), be16(3), []byte("no")) }},
	{name: "long error", reply: func(f *fake, r wire.Request) []byte {
		return f.chunk(r, done, failed, be32(5), be16(0), make([]byte, 5000))
	}},
	{name: "error elsewhere", reply: func(f *fake, r wire.Request) []byte {
		return f.chunk(r, done, wire.ChunkErrorOffset, be32(5), be16(0), be64(4095))
	}},
	{name: "an answer after the last", reply: func(f *fake, r wire.Request) []byte {
		first := f.chunk(r, done, failed, be32(5), be16(0))
		return append(first, first...)
	}, want: syscall.EIO},
	{name: "hangs up in the header", want: io.ErrUnexpectedEOF, reply: func(f *fake, r wire.Request) []byte {
		defer f.Close()
		f.Write(f.chunk(r, done, none)[:10])
		return nil
	}},
	{name: "hangs up in the data", want: io.ErrUnexpectedEOF, reply: func(f *fake, r wire.Request) []byte {
		defer f.Close()
		f.Write(f.chunk(r, done, data, be64(4096), make([]byte, 8192))[:5000])
		return nil
	}},

	{name: "data to block status", status: true, reply: func(f *fake, r wire.Request) []byte {
		return f.chunk(r, done, data, be64(0), make([]byte, 1000))
	}},
	{name: "simple success to block status", status: true, reply: func(_ *fake, r wire.Request) []byte { return wire.AppendSimple(nil, 0, r.Cookie) }},
	{name: "status without extents", status: true, reply: func(f *fake, r wire.Request) []byte { return f.chunk(r, done, status, be32(1)) }},
	{name: "status that is cut off", status: true, reply: func(f *fake, r wire.Request) []byte { return f.chunk(r, done, status, be32(1, 5)) }},
	{name: "status of an unknown context", status: true, reply: func(f *fake, r wire.Request) []byte { return f.chunk(r, done, status, be32(2, 4096, 0)) }},
	{name: "status twice", status: true, reply: func(f *fake, r wire.Request) []byte {
		return append(f.chunk(r, 0, status, be32(1, 4096, 0)), f.chunk(r, done, status, be32(1, 4096, 0))...)
	}},
	{name: "no status", status: true, reply: func(f *fake, r wire.Request) []byte { return f.chunk(r, done, none) }},
	{name: "extent of no bytes", status: true, reply: func(f *fake, r wire.Request) []byte { return f.chunk(r, done, status, be32(1, 0, 0)) }},
	{name: "too many extents", status: true, reply: func(_ *fake, r wire.Request) []byte {
		return append(wire.AppendChunk(nil, done, status, r.Cookie, 4+8*(1<<20+1)), be32(1)...)
	}},
	{name: "extended status where compact was negotiated", status: true, reply: func(f *fake, r wire.Request) []byte {
		return f.chunk(r, done, ext, be32(1, 1), be64(4096, 0))
	}},
	{name: "compact status where extended was negotiated", mode: "extended", status: true, reply: func(f *fake, r wire.Request) []byte {
		return f.chunk(r, done, status, be32(1, 4096, 0))
	}},
	{name: "extended status that miscounts", mode: "extended", status: true, reply: func(f *fake, r wire.Request) []byte {
		return f.chunk(r, done, ext, be32(1, 2), be64(4096, 0))
	}},
}

func TestHostileReplies(t *testing.T) {
	t.Parallel()
	for _, tt := range hostileReplies {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			o := play(t, func(_ int, conn net.Conn) {
				f := newFake()
				f.Conn = conn
				f.extended, f.structured = tt.mode == "extended", tt.mode == ""
				if f.handshake() {
					if r, ok := f.request(); ok {
						f.Write(tt.reply(f, r))
					}
				}
				f.drain()
			})
			o.NoReconnect = true
			c := dial(t, o)
			var err error
			if tt.status {
				for _, err = range c.Extents(t.Context(), 0, c.Size()) {
				}
			} else {
				p := bytes.Repeat([]byte{0xa5}, 3*8192)
				_, err = c.ReadAt(p[8192:2*8192:2*8192], 4096)
				if bytes.Count(p[:8192], []byte{0xa5}) != 8192 || bytes.Count(p[2*8192:], []byte{0xa5}) != 8192 {
					t.Error("bytes beside the buffer were written")
				}
			}
			want := tt.want
			if want == nil {
				want = nbdclient.ErrProtocol
			}
			if !errors.Is(err, want) {
				t.Errorf("got %v, want %v", err, want)
			}
		})
	}
}

// TestOddReplies: what the protocol allows, though nobody may ever have seen it.
func TestOddReplies(t *testing.T) {
	t.Parallel()
	want := content(mib)
	clear(want[8192:9192])
	o := play(t, func(_ int, conn net.Conn) {
		f := newFake()
		f.Conn = conn
		if !f.handshake() {
			return
		}
		first, _ := f.request()
		second, _ := f.request()
		if first.Offset > second.Offset {
			first, second = second, first
		}
		// Parts come last first, and beside those of another reply.
		f.Write(f.chunk(first, 2, data, be64(9192), want[9192:12288]))
		f.Write(f.chunk(second, 0, wire.ChunkErrorOffset, be32(28), be16(4), []byte("full"), be64(second.Offset+7)))
		f.Write(f.chunk(first, 0, hole, be64(8192), be32(1000)))
		f.Write(f.chunk(second, 0, 1<<15+99, be32(77), be16(0), []byte("something new")))
		f.Write(f.chunk(first, 0, data, be64(4096), want[4096:8192]))
		f.Write(f.chunk(second, 0, data, be64(second.Offset), make([]byte, 100)))
		f.Write(f.chunk(first, done, none))
		f.Write(f.chunk(second, done, none))
		f.drain()
	})
	c := dial(t, o)
	other := make(chan error)
	go func() {
		_, err := c.ReadAt(make([]byte, 4096), 512<<10)
		other <- err
	}()
	p := make([]byte, 8192)
	if n, err := c.ReadAt(p, 4096); n != len(p) || err != nil || !bytes.Equal(p, want[4096:12288]) {
		t.Errorf("ReadAt: got %d, %v, or other bytes", n, err)
	}
	err := <-other
	if server, ok := errors.AsType[*nbdclient.ServerError](err); !ok || server.Errno != syscall.ENOSPC || server.Message != "full" {
		t.Errorf("got %v, want ENOSPC, full", err)
	}
}

// TestNoGo: a server that knows options, but not NBD_OPT_GO; what was granted
// before holds.
func TestNoGo(t *testing.T) {
	t.Parallel()
	want := content(mib)
	o := play(t, func(_ int, conn net.Conn) {
		f := newFake()
		f.Conn = conn
		f.greet()
		for {
			option, data, ok := f.option()
			switch {
			case !ok:
				return
			case option == wire.OptGo:
				f.Write(appendOptionReply(nil, option, wire.RepErrUnsup, []byte("what?")))
				continue
			case option != wire.OptExportName:
				f.Write(f.replies(option))
				continue
			case string(data) != "old":
				t.Errorf("got name %q", data)
				return
			}
			f.Write(append(be64(mib), be16(f.flags)...))
			for {
				r, ok := f.request()
				if !ok {
					return
				}
				f.Write(f.answer(r, want))
			}
		}
	})
	o.Export = "old"
	c := dial(t, o)
	checkReads(t, c, want)
	if got := c.Contexts(); len(got) != 1 || c.Protocol() != "structured" {
		t.Errorf("got contexts %q, %s replies", got, c.Protocol())
	}
}

func TestHostileHandshakes(t *testing.T) {
	t.Parallel()
	option := func(option uint32, reply ...[]byte) func(f *fake) {
		return func(f *fake) {
			f.greet()
			for {
				got, _, ok := f.option()
				switch {
				case !ok:
					return
				case got == option:
					f.Write(bytes.Join(reply, nil))
					return
				default:
					f.Write(f.replies(got))
				}
			}
		}
	}
	info := func(parts ...[]byte) []byte {
		return appendOptionReply(nil, wire.OptGo, wire.RepInfo, bytes.Join(parts, nil))
	}
	ack := appendOptionReply(nil, wire.OptGo, wire.RepAck, nil)
	size := info(be16(wire.InfoExport), be64(mib), be16(1))
	granted := func(id uint32, name string) []byte {
		return appendOptionReply(nil, wire.OptSetMetaContext, wire.RepMetaContext, append(be32(id), name...))
	}
	for _, tt := range []struct {
		name  string
		serve func(f *fake)
		want  error
	}{
		{"no NBD", func(f *fake) { f.Write([]byte("SSH-2.0-OpenSSH_9.2p1\r\n")) }, nbdclient.ErrProtocol},
		{"hangs up at once", func(*fake) {}, io.ErrUnexpectedEOF},
		{"wrong magic of a reply", option(wire.OptGo, be64(1, 2, 3)), nbdclient.ErrProtocol},
		{"reply to another option", option(wire.OptGo, appendOptionReply(nil, wire.OptInfo, wire.RepAck, nil)), nbdclient.ErrProtocol},
		{"long reply", option(wire.OptGo, be64(wire.MagicOptionReply), be32(wire.OptGo, wire.RepInfo, 1<<31)), nbdclient.ErrProtocol},
		{"replies without end", option(wire.OptGo, bytes.Repeat(size, 300)), nbdclient.ErrProtocol},
		{"no size", option(wire.OptGo, ack), nbdclient.ErrProtocol},
		{"short size", option(wire.OptGo, info(be16(wire.InfoExport), be64(mib)), ack), nbdclient.ErrProtocol},
		{"huge size", option(wire.OptGo, info(be16(wire.InfoExport), be64(1<<63), be16(1)), ack), nbdclient.ErrUnsupported},
		{"block size no power of two", option(wire.OptGo, size, info(be16(wire.InfoBlockSize), be32(511, 4096, mib)), ack), nbdclient.ErrProtocol},
		{"no block size", option(wire.OptGo, size, info(be16(wire.InfoBlockSize), be32(0, 4096, mib)), ack), nbdclient.ErrProtocol},
		{"no payload", option(wire.OptGo, size, info(be16(wire.InfoBlockSize), be32(1, 4096, 0)), ack), nbdclient.ErrProtocol},
		{"data with structured replies", option(wire.OptStructuredReply, appendOptionReply(nil, wire.OptStructuredReply, wire.RepAck, []byte("x"))), nbdclient.ErrProtocol},
		{"a context that nobody asked for", option(wire.OptSetMetaContext, granted(1, "qemu:dirty-bitmap:x")), nbdclient.ErrProtocol},
		{"a context twice", option(wire.OptSetMetaContext, granted(1, wire.BaseAllocation), granted(2, wire.BaseAllocation)), nbdclient.ErrProtocol},
		{"TLS wanted", option(wire.OptGo, appendOptionReply(nil, wire.OptGo, wire.RepErrTLSReqd, nil)), nbdclient.ErrTLS},
		{"TLS wanted first", option(wire.OptExtendedHeaders, appendOptionReply(nil, wire.OptExtendedHeaders, wire.RepErrTLSReqd, nil)), nbdclient.ErrTLS},
		{"unknown export", option(wire.OptGo, appendOptionReply(nil, wire.OptGo, wire.RepErrUnknown, []byte("where?"))), nbdclient.ErrNoExport},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			o := play(t, func(_ int, conn net.Conn) {
				f := newFake()
				f.Conn = conn
				tt.serve(f)
				if tt.want != io.ErrUnexpectedEOF {
					f.drain()
				}
			})
			if _, err := nbdclient.Dial(t.Context(), o); !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
}
