package nbdclient_test

import (
	"context"
	"encoding/binary"
	"io"
	"log/slog"
	"net"
	"sync"
	"testing"

	"github.com/holdfast-backup/holdfast/nbdserver/internal/wire"
	"github.com/holdfast-backup/holdfast/nbdserver/nbdclient"
)

// fake is the server's end of a connection whose server a test plays.
type fake struct {
	net.Conn
	// What the handshake grants.
	size       uint64
	flags      uint16
	extended   bool
	structured bool
	contexts   []string // ids 1, 2 and so on
	options    []uint32 // that the client has sent
}

// newFake returns a fake of a disk of 1 MiB with structured replies and
// base:allocation.
func newFake() *fake {
	return &fake{size: mib, flags: wire.FlagHasFlags | wire.FlagReadOnly, structured: true, contexts: []string{wire.BaseAllocation}}
}

// play returns options for a client whose nth connection, from 0, is served by
// the function. It waits for all of them when the test ends.
func play(tb testing.TB, serve func(nth int, conn net.Conn)) nbdclient.Options {
	tb.Helper()
	var mu sync.Mutex
	var servers sync.WaitGroup
	nth := 0
	tb.Cleanup(servers.Wait)
	return nbdclient.Options{
		Address: "fake",
		Log:     slog.New(slog.DiscardHandler),
		Dialer: func(context.Context, string, string) (net.Conn, error) {
			mu.Lock()
			defer mu.Unlock()
			n := nth
			nth++
			client, server := net.Pipe()
			servers.Go(func() {
				defer server.Close()
				serve(n, server)
			})
			return client, nil
		},
	}
}

// drain reads until the client has hung up.
func (f *fake) drain() { io.Copy(io.Discard, f) }

func (f *fake) greet() {
	b := binary.BigEndian.AppendUint64(nil, wire.MagicServer)
	b = binary.BigEndian.AppendUint64(b, wire.MagicOption)
	f.Write(binary.BigEndian.AppendUint16(b, wire.FlagFixedNewstyle|wire.FlagNoZeroes))
	io.ReadFull(f, make([]byte, 4))
}

func (f *fake) option() (option uint32, data []byte, ok bool) {
	var p [wire.OptionLen]byte
	if _, err := io.ReadFull(f, p[:]); err != nil {
		return 0, nil, false
	}
	option = binary.BigEndian.Uint32(p[8:])
	f.options = append(f.options, option)
	data = make([]byte, binary.BigEndian.Uint32(p[12:]))
	_, err := io.ReadFull(f, data)
	return option, data, err == nil
}

func appendOptionReply(b []byte, option, kind uint32, payload []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, wire.MagicOptionReply)
	b = binary.BigEndian.AppendUint32(b, option)
	b = binary.BigEndian.AppendUint32(b, kind)
	return append(binary.BigEndian.AppendUint32(b, uint32(len(payload))), payload...)
}

// replies returns what the fake replies to an option.
func (f *fake) replies(option uint32) []byte {
	ack := appendOptionReply(nil, option, wire.RepAck, nil)
	switch {
	case option == wire.OptExtendedHeaders && f.extended, option == wire.OptStructuredReply && f.structured:
		return ack
	case option == wire.OptSetMetaContext:
		var b []byte
		for i, name := range f.contexts {
			b = appendOptionReply(b, option, wire.RepMetaContext, append(binary.BigEndian.AppendUint32(nil, uint32(i+1)), name...))
		}
		return append(b, ack...)
	case option == wire.OptGo:
		info := binary.BigEndian.AppendUint16(nil, wire.InfoExport)
		info = binary.BigEndian.AppendUint64(info, f.size)
		info = binary.BigEndian.AppendUint16(info, f.flags)
		return append(appendOptionReply(nil, option, wire.RepInfo, info), ack...)
	}
	return appendOptionReply(nil, option, wire.RepErrUnsup, nil)
}

// handshake runs up to the transmission phase and reports whether it came to it.
func (f *fake) handshake() bool {
	f.greet()
	for {
		option, _, ok := f.option()
		if !ok || option == wire.OptAbort {
			return false
		}
		f.Write(f.replies(option))
		if option == wire.OptGo {
			return true
		}
	}
}

// request takes the next request; false means that the client left.
func (f *fake) request() (wire.Request, bool) {
	length := wire.RequestLen
	if f.extended {
		length = wire.ExtendedRequestLen
	}
	p := make([]byte, length)
	if _, err := io.ReadFull(f, p); err != nil {
		return wire.Request{}, false
	}
	r, err := wire.DecodeRequest(p, f.extended)
	return r, err == nil && r.Command != wire.CmdDisc
}

// serve answers reads from content and block status with one extent of data.
func (f *fake) serve(content []byte) {
	if !f.handshake() {
		return
	}
	for {
		r, ok := f.request()
		if !ok {
			return
		}
		f.Write(f.answer(r, content))
	}
}

func (f *fake) answer(r wire.Request, content []byte) []byte {
	if r.Command == wire.CmdRead {
		return f.chunk(r, wire.ChunkFlagDone, wire.ChunkOffsetData, be64(r.Offset), content[r.Offset:r.End()])
	}
	return f.chunk(r, wire.ChunkFlagDone, wire.ChunkBlockStatus, be32(1, uint32(r.Length), 0))
}

// chunk returns a reply chunk whose payload is the parts.
func (f *fake) chunk(r wire.Request, flags, kind uint16, parts ...[]byte) []byte {
	var payload []byte
	for _, p := range parts {
		payload = append(payload, p...)
	}
	var head []byte
	if f.extended {
		head = wire.AppendExtendedChunk(nil, flags, kind, r.Cookie, r.Offset, len(payload))
	} else {
		head = wire.AppendChunk(nil, flags, kind, r.Cookie, len(payload))
	}
	return append(head, payload...)
}

func be16(values ...uint16) []byte {
	var b []byte
	for _, v := range values {
		b = binary.BigEndian.AppendUint16(b, v)
	}
	return b
}

func be32(values ...uint32) []byte {
	var b []byte
	for _, v := range values {
		b = binary.BigEndian.AppendUint32(b, v)
	}
	return b
}

func be64(values ...uint64) []byte {
	var b []byte
	for _, v := range values {
		b = binary.BigEndian.AppendUint64(b, v)
	}
	return b
}
