package nbdclient

import (
	"bufio"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"net"
	"slices"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/nbdserver/internal/wire"
)

// Limits of the handshake.
const (
	maxOptionReply   = 64 << 10
	maxOptionReplies = 256
)

// oldstyleMagic is where the magic of options stands in the handshake of a
// server from before 2011.
const oldstyleMagic uint64 = 0x00420281861253

// replies is how a server answers.
type replies int

const (
	simple replies = iota
	structured
	extended // structured, with extended headers
)

func (r replies) String() string { return [...]string{"simple", "structured", "extended"}[r] }

// export is what a handshake found and settled.
type export struct {
	size     int64
	flags    uint16
	minimum  int64 // block size in bytes: a power of two up to 64 KiB
	maximum  int64 // payload in bytes: at least 512, and not below minimum
	replies  replies
	contexts []granted
}

// granted is a metadata context with its id on the connection.
type granted struct {
	id   uint32
	name string
}

func (e export) names() []string {
	var names []string
	for _, g := range e.contexts {
		names = append(names, g.name)
	}
	slices.Sort(names)
	return names
}

func (e export) has(context string) bool { return slices.Contains(e.names(), context) }

// same fails with ErrChanged if another connection found another export.
func (e export) same(o export) error {
	for _, v := range []struct {
		what string
		a, b any
	}{
		{"size", e.size, o.size},
		{"transmission flags", e.flags, o.flags},
		{"minimum block size", e.minimum, o.minimum},
		{"maximum payload", e.maximum, o.maximum},
		{"replies", e.replies, o.replies},
		{"metadata contexts", fmt.Sprint(e.names()), fmt.Sprint(o.names())},
	} {
		if v.a != v.b {
			return fmt.Errorf("%w: %s was %v and is %v", ErrChanged, v.what, v.a, v.b)
		}
	}
	return nil
}

// connect makes a connection and enters the transmission phase.
func (c *Client) connect(ctx context.Context) (*conn, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, c.options.HandshakeTimeout,
		fmt.Errorf("%w: no connection within %v", ErrTimeout, c.options.HandshakeTimeout))
	defer cancel()
	socket, err := c.options.Dialer(ctx, c.options.Network, c.options.Address)
	if err != nil {
		return nil, cmp.Or(context.Cause(ctx), err)
	}
	proceed := context.AfterFunc(ctx, func() { socket.Close() })
	h := handshake{options: c.options, conn: socket, in: bufio.NewReaderSize(socket, inputBuffer)}
	found, err := h.run(ctx)
	if !proceed() {
		err = cmp.Or(context.Cause(ctx), err)
	}
	if err != nil {
		socket.Close()
		return nil, err
	}
	return &conn{export: found, net: h.conn, socket: socket, in: h.in, pending: map[uint64]*request{}}, nil
}

// handshake is the client's side of the negotiation.
//
// Source: NBD doc/proto.md, "Fixed newstyle negotiation".
type handshake struct {
	options  Options
	conn     net.Conn
	in       *bufio.Reader // goes on to be the input of the transmission phase
	noZeroes bool
}

// refusal is an error reply to an option.
type refusal struct {
	option, kind uint32
	message      string
}

func (r *refusal) Error() string {
	reason, ok := map[uint32]string{
		wire.RepErrUnsup: "unknown option", wire.RepErrPolicy: "forbidden by policy", wire.RepErrInvalid: "invalid request",
		wire.RepErrTLSReqd: "TLS required", wire.RepErrUnknown: "no such export", wire.RepErrShutdown: "shutting down",
		wire.RepErrBlockSize: "block sizes required", wire.RepErrTooBig: "too big", wire.RepErrExtHeaderReq: "extended headers required",
	}[r.kind]
	if !ok {
		reason = fmt.Sprintf("error %#x", r.kind)
	}
	text := fmt.Sprintf("the server refused option %d: %s", r.option, reason)
	if r.message != "" {
		text += fmt.Sprintf(": %.256q", r.message)
	}
	return text
}

// Unwrap returns the class that the refusal belongs to.
func (r *refusal) Unwrap() error {
	switch {
	case r.kind == wire.RepErrTLSReqd, r.option == wire.OptStartTLS:
		return ErrTLS
	case r.kind == wire.RepErrUnknown:
		return ErrNoExport
	}
	return nil
}

// optional returns nil for a refusal after which the handshake can go on without
// the option.
func optional(err error) error {
	r, ok := errors.AsType[*refusal](err)
	if ok && r.kind != wire.RepErrTLSReqd && r.kind != wire.RepErrShutdown {
		return nil
	}
	return err
}

func (h *handshake) run(ctx context.Context) (export, error) {
	found, err := h.negotiate(ctx)
	if _, ok := errors.AsType[*refusal](err); ok {
		_ = h.write(wire.OptAbort, nil) // a farewell; the error is told already
	}
	return found, unexpected(err)
}

func (h *handshake) negotiate(ctx context.Context) (export, error) {
	found := export{minimum: 1, maximum: wire.MaxPayload}
	fixed, err := h.greet()
	if err != nil {
		return found, err
	}
	if !fixed {
		if h.options.TLS != nil {
			return found, fmt.Errorf("%w: the server is too old for it", ErrTLS)
		}
		return found, h.exportName(&found)
	}
	if h.options.TLS != nil {
		if err := h.startTLS(ctx); err != nil {
			return found, err
		}
	}
	if err := h.chooseReplies(&found); err != nil {
		return found, err
	}
	if found.replies != simple {
		if err := h.setContexts(&found); err != nil {
			return found, err
		}
	}
	return found, h.enter(&found)
}

// greet reports whether the server speaks fixed newstyle.
func (h *handshake) greet() (fixed bool, err error) {
	p := make([]byte, 18)
	if _, err := io.ReadFull(h.in, p[:16]); err != nil {
		return false, fmt.Errorf("greeting: %w", unexpected(err))
	}
	switch magic, kind := binary.BigEndian.Uint64(p), binary.BigEndian.Uint64(p[8:]); {
	case magic == wire.MagicServer && kind == oldstyleMagic:
		return false, fmt.Errorf("%w: the server speaks the oldstyle protocol", ErrUnsupported)
	case magic != wire.MagicServer || kind != wire.MagicOption:
		return false, fmt.Errorf("%w: no NBD server: its greeting is %x", ErrProtocol, p[:16])
	}
	if _, err := io.ReadFull(h.in, p[16:]); err != nil {
		return false, err
	}
	flags := uint32(binary.BigEndian.Uint16(p[16:])) & (wire.FlagFixedNewstyle | wire.FlagNoZeroes)
	h.noZeroes = flags&wire.FlagNoZeroes != 0
	_, err = h.conn.Write(binary.BigEndian.AppendUint32(nil, flags))
	return flags&wire.FlagFixedNewstyle != 0, err
}

// write sends an option.
func (h *handshake) write(option uint32, data []byte) error {
	b := binary.BigEndian.AppendUint64(nil, wire.MagicOption)
	b = binary.BigEndian.AppendUint32(b, option)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	_, err := h.conn.Write(append(b, data...))
	return err
}

// request sends an option and calls reply for each reply up to the final one. It
// returns nil after an acknowledgement, and a *refusal after an error reply.
func (h *handshake) request(option uint32, data []byte, reply func(kind uint32, payload []byte) error) error {
	if err := h.write(option, data); err != nil {
		return err
	}
	var p [wire.OptionReplyLen]byte
	for range maxOptionReplies {
		if _, err := io.ReadFull(h.in, p[:]); err != nil {
			return fmt.Errorf("reply to option %d: %w", option, unexpected(err))
		}
		d := wire.Decoder{P: p[:]}
		magic, of, kind, length := d.Uint64(), d.Uint32(), d.Uint32(), d.Uint32()
		if magic != wire.MagicOptionReply || of != option || length > maxOptionReply {
			return fmt.Errorf("%w: a reply to option %d with magic %#x to option %d with %d bytes", ErrProtocol, option, magic, of, length)
		}
		payload := make([]byte, length)
		if _, err := io.ReadFull(h.in, payload); err != nil {
			return fmt.Errorf("reply to option %d: %w", option, unexpected(err))
		}
		switch {
		case kind == wire.RepAck && length == 0:
			return nil
		case kind&wire.RepFlagError != 0:
			return &refusal{option: option, kind: kind, message: string(payload[:min(length, wire.MaxString)])}
		case reply == nil || kind == wire.RepAck:
			return fmt.Errorf("%w: reply of type %d to option %d", ErrProtocol, kind, option)
		}
		if err := reply(kind, payload); err != nil {
			return err
		}
	}
	return fmt.Errorf("%w: more than %d replies to option %d", ErrProtocol, maxOptionReplies, option)
}

// startTLS encrypts the connection.
//
// Source: NBD doc/proto.md, "TLS support".
func (h *handshake) startTLS(ctx context.Context) error {
	if err := h.request(wire.OptStartTLS, nil, nil); err != nil {
		return err
	}
	if h.in.Buffered() > 0 { // somebody slips in plain text that would count as encrypted
		return fmt.Errorf("%w: %d bytes before the TLS handshake", ErrProtocol, h.in.Buffered())
	}
	secured := tls.Client(h.conn, h.options.TLS)
	if err := secured.HandshakeContext(ctx); err != nil {
		return fmt.Errorf("TLS: %w", unexpected(err))
	}
	h.conn = secured
	h.in.Reset(secured)
	return nil
}

// chooseReplies asks for the best kind of replies that the server has.
func (h *handshake) chooseReplies(found *export) error {
	for _, try := range []struct {
		option  uint32
		replies replies
	}{{wire.OptExtendedHeaders, extended}, {wire.OptStructuredReply, structured}} {
		err := h.request(try.option, nil, nil)
		if err == nil {
			found.replies = try.replies
			return nil
		}
		if err := optional(err); err != nil {
			return err
		}
	}
	return nil
}

func appendString(b []byte, s string) []byte {
	return append(binary.BigEndian.AppendUint32(b, uint32(len(s))), s...)
}

// setContexts selects the metadata contexts. Those that the server does not have
// are left out, all of them if it refuses the option.
//
// Source: NBD doc/proto.md, "NBD_OPT_SET_META_CONTEXT".
func (h *handshake) setContexts(found *export) error {
	data := appendString(nil, h.options.Export)
	data = binary.BigEndian.AppendUint32(data, uint32(len(h.options.Contexts)))
	for _, name := range h.options.Contexts {
		data = appendString(data, name)
	}
	var contexts []granted
	err := h.request(wire.OptSetMetaContext, data, func(kind uint32, payload []byte) error {
		d := wire.Decoder{P: payload}
		g := granted{id: d.Uint32(), name: string(d.P)}
		again := slices.ContainsFunc(contexts, func(o granted) bool { return o.id == g.id || o.name == g.name })
		if kind != wire.RepMetaContext || d.Bad || again || !slices.Contains(h.options.Contexts, g.name) {
			return fmt.Errorf("%w: metadata context %.64q, id %d", ErrProtocol, g.name, g.id)
		}
		contexts = append(contexts, g)
		return nil
	})
	if err == nil {
		found.contexts = contexts
	}
	return optional(err)
}

// enter asks for the export and enters the transmission phase.
//
// Source: NBD doc/proto.md, "NBD_OPT_INFO and NBD_OPT_GO".
func (h *handshake) enter(found *export) error {
	data := appendString(nil, h.options.Export)
	data = binary.BigEndian.AppendUint16(data, 1)
	data = binary.BigEndian.AppendUint16(data, wire.InfoBlockSize)
	known := false
	err := h.request(wire.OptGo, data, func(kind uint32, payload []byte) error {
		d := wire.Decoder{P: payload}
		info := d.Uint16()
		if kind != wire.RepInfo || d.Bad {
			return fmt.Errorf("%w: reply of type %d, %d bytes, about the export", ErrProtocol, kind, len(payload))
		}
		switch info {
		case wire.InfoExport:
			known = true
			return found.describe(&d)
		case wire.InfoBlockSize:
			return found.constrain(&d)
		}
		return nil
	})
	if r, ok := errors.AsType[*refusal](err); ok && r.kind == wire.RepErrUnsup {
		return h.exportName(found)
	}
	if err == nil && !known {
		return fmt.Errorf("%w: no size of the export", ErrProtocol)
	}
	return err
}

// exportName enters the transmission phase of a server that does not know
// NBD_OPT_GO. It is no option that is replied to: the server that does not want
// to hangs up.
//
// Source: NBD doc/proto.md, "NBD_OPT_EXPORT_NAME".
func (h *handshake) exportName(found *export) error {
	if err := h.write(wire.OptExportName, []byte(h.options.Export)); err != nil {
		return err
	}
	length := 10
	if !h.noZeroes {
		length += 124
	}
	p := make([]byte, length)
	if _, err := io.ReadFull(h.in, p); errors.Is(err, io.EOF) {
		return fmt.Errorf("the server hung up when asked for the export: %w", ErrNoExport)
	} else if err != nil {
		return unexpected(err)
	}
	return found.describe(&wire.Decoder{P: p[:10]})
}

// describe takes the size and flags of the export.
func (e *export) describe(d *wire.Decoder) error {
	size := d.Uint64()
	e.flags = d.Uint16()
	if !d.Complete() {
		return fmt.Errorf("%w: malformed description of the export", ErrProtocol)
	}
	if size > uint64(image.MaxSize) {
		return fmt.Errorf("%w: the export has %d bytes, more than %d", ErrUnsupported, size, image.MaxSize)
	}
	e.size = int64(size)
	return nil
}

// constrain takes the sizes that requests must have.
//
// Source: NBD doc/proto.md, "Size constraints".
func (e *export) constrain(d *wire.Decoder) error {
	minimum, preferred, maximum := d.Uint32(), d.Uint32(), d.Uint32()
	if !d.Complete() || bits.OnesCount32(minimum) != 1 || minimum > 64<<10 || maximum < max(minimum, 512) {
		return fmt.Errorf("%w: block sizes %d, %d, %d", ErrProtocol, minimum, preferred, maximum)
	}
	e.minimum, e.maximum = int64(minimum), min(int64(maximum), wire.MaxPayload)
	return nil
}
