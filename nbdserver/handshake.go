package nbdserver

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/nbdserver/internal/wire"
)

// Limits of the handshake.
const (
	maxOptions    = 64
	maxOptionData = 64 << 10
	maxQueries    = 128
	maxContexts   = 16
)

// readerSize is the buffer of a connection's input: as many requests as one
// system call may bring.
const readerSize = 16 << 10

// choice is what a handshake settled.
type choice struct {
	export     *export
	structured bool // structured replies; extended headers imply them
	extended   bool // extended headers
	contexts   []selected
}

// selected is a metadata context that a client selected, with its id on this
// connection.
type selected struct {
	id uint32
	Context
}

// negotiation is the handshake of one client.
//
// Source: NBD doc/proto.md, "Fixed newstyle negotiation".
type negotiation struct {
	server *Server
	conn   net.Conn
	in     *bufio.Reader // goes on to be the input of the transmission phase
	out    *bufio.Writer

	noZeroes  bool
	tls       *TLS // that the client may or must start; nil for none
	encrypted bool
	who       identities
	deadline  time.Time // of the handshake
	negotiated
}

// negotiated is what a client has settled about its transmission phase so far.
type negotiated struct {
	structured bool // structured replies; extended headers imply them
	extended   bool
	// contexts are those selected for contextsOf, which is nil while there are
	// none.
	contextsOf *export
	contexts   []selected
}

func newNegotiation(s *Server, nc net.Conn) *negotiation {
	n := &negotiation{server: s, tls: s.options.TLS}
	n.use(nc)
	return n
}

// use makes nc the connection.
func (n *negotiation) use(nc net.Conn) {
	n.conn, n.in, n.out = nc, bufio.NewReaderSize(nc, readerSize), bufio.NewWriter(nc)
}

// run greets the client and answers its options. It returns the choice with
// which transmission begins, its export attached, or nil when the client left
// or had to be dropped; the error says why and is nil for a polite farewell.
func (n *negotiation) run(ctx context.Context) (*choice, error) {
	n.deadline = time.Now().Add(n.server.options.HandshakeTimeout)
	if err := n.conn.SetDeadline(n.deadline); err != nil {
		return nil, err
	}
	if err := n.greet(); err != nil {
		return nil, err
	}
	for range maxOptions {
		option, data, err := n.readOption()
		if err != nil {
			return nil, err
		}
		if option == wire.OptAbort {
			n.reply(option, wire.RepAck, nil)
			return nil, n.out.Flush()
		}
		chosen, err := n.turn(ctx, option, data)
		if err == nil {
			err = n.out.Flush()
		}
		if err == nil && chosen != nil {
			err = n.conn.SetDeadline(time.Time{}) // from here on an idle client is fine
		}
		if err != nil {
			if chosen != nil {
				chosen.export.users.Done()
			}
			return nil, err
		}
		if chosen != nil {
			return chosen, nil
		}
	}
	return nil, fmt.Errorf("%w: more than %d options", wire.ErrProtocol, maxOptions)
}

// turn answers one option. The choice is nil while the handshake goes on, the
// error is why it cannot.
func (n *negotiation) turn(ctx context.Context, option uint32, data []byte) (*choice, error) {
	if n.tls != nil && n.tls.options.Required && option != wire.OptStartTLS {
		if option == wire.OptExportName {
			return nil, fmt.Errorf("%w: the option EXPORT_NAME without TLS", wire.ErrProtocol)
		}
		n.fail(option, wire.RepErrTLSReqd, "this server requires TLS")
		return nil, nil
	}
	switch option {
	case wire.OptStartTLS:
		return nil, n.startTLS(ctx, data)
	case wire.OptExportName:
		return n.exportName(string(data))
	case wire.OptGo:
		return n.enter(data)
	case wire.OptListMetaContext, wire.OptSetMetaContext:
		return nil, n.metaContext(ctx, option, data)
	}
	n.answer(option, data)
	return nil, nil
}

// startTLS answers NBD_OPT_STARTTLS and takes the connection over to TLS. What
// was negotiated before may be an attacker's and is forgotten; so may be bytes
// that came along with the option, which end the connection.
//
// Source: NBD doc/proto.md, "NBD_OPT_STARTTLS" and "TLS support".
func (n *negotiation) startTLS(ctx context.Context, data []byte) error {
	switch {
	case len(data) > 0:
		n.fail(wire.OptStartTLS, wire.RepErrInvalid, "this option has no data")
		return nil
	case n.encrypted:
		n.fail(wire.OptStartTLS, wire.RepErrInvalid, "TLS is in use already")
		return nil
	case n.tls == nil:
		n.fail(wire.OptStartTLS, wire.RepErrPolicy, "TLS is not set up here")
		return nil
	case n.in.Buffered() > 0:
		return fmt.Errorf("%w: bytes behind the option STARTTLS", wire.ErrProtocol)
	}
	n.reply(wire.OptStartTLS, wire.RepAck, nil)
	if err := n.out.Flush(); err != nil {
		return err
	}
	c := newEncrypted(n.conn, n.tls.current(ctx))
	if err := c.HandshakeContext(ctx); err != nil { // within the deadline of the connection
		return fmt.Errorf("TLS: %w", err)
	}
	if peer := c.ConnectionState().PeerCertificates; len(peer) > 0 {
		n.who = Identities(peer[0]) // which the handshake has verified
	}
	n.use(c)
	n.tls, n.encrypted, n.negotiated = nil, true, negotiated{}
	return nil
}

func (n *negotiation) greet() error {
	b := binary.BigEndian.AppendUint64(nil, wire.MagicServer)
	b = binary.BigEndian.AppendUint64(b, wire.MagicOption)
	b = binary.BigEndian.AppendUint16(b, wire.FlagFixedNewstyle|wire.FlagNoZeroes)
	if _, err := n.conn.Write(b); err != nil {
		return err
	}
	var p [4]byte
	if _, err := io.ReadFull(n.in, p[:]); err != nil {
		return err
	}
	flags := binary.BigEndian.Uint32(p[:])
	if flags&^(wire.FlagFixedNewstyle|wire.FlagNoZeroes) != 0 {
		return fmt.Errorf("%w: client flags %#x", wire.ErrProtocol, flags)
	}
	n.noZeroes = flags&wire.FlagNoZeroes != 0
	if flags&wire.FlagFixedNewstyle == 0 && n.tls != nil {
		if n.tls.options.Required {
			return fmt.Errorf("%w: this server requires TLS, for which the client is too old", wire.ErrProtocol)
		}
		n.tls = nil // forbidden by NBD doc/proto.md, "TLS support"
	}
	return nil
}

func (n *negotiation) readOption() (option uint32, data []byte, err error) {
	var p [16]byte
	if _, err := io.ReadFull(n.in, p[:]); err != nil {
		return 0, nil, err
	}
	if magic := binary.BigEndian.Uint64(p[:]); magic != wire.MagicOption {
		return 0, nil, fmt.Errorf("%w: option magic %#x", wire.ErrProtocol, magic)
	}
	option, length := binary.BigEndian.Uint32(p[8:]), binary.BigEndian.Uint32(p[12:])
	if length > maxOptionData {
		return 0, nil, fmt.Errorf("%w: option %d with %d bytes", wire.ErrProtocol, option, length)
	}
	data = make([]byte, length)
	_, err = io.ReadFull(n.in, data)
	return option, data, err
}

// reply queues a reply to an option. Errors surface when out is flushed.
func (n *negotiation) reply(option, kind uint32, payload []byte) {
	var p [20]byte
	binary.BigEndian.PutUint64(p[:], wire.MagicOptionReply)
	binary.BigEndian.PutUint32(p[8:], option)
	binary.BigEndian.PutUint32(p[12:], kind)
	binary.BigEndian.PutUint32(p[16:], uint32(len(payload)))
	n.out.Write(p[:])
	n.out.Write(payload)
}

// fail queues an error reply with a message for people.
func (n *negotiation) fail(option, kind uint32, message string) {
	n.reply(option, kind, []byte(message))
}

// answer handles the options that neither end nor fail the handshake.
func (n *negotiation) answer(option uint32, data []byte) {
	switch option {
	case wire.OptList:
		n.list(data)
	case wire.OptInfo:
		if name, infos, ok := parseInfo(data); !ok {
			n.fail(option, wire.RepErrInvalid, "malformed request")
		} else {
			n.describe(option, n.server.find(n.who, name), infos)
		}
	case wire.OptStructuredReply, wire.OptExtendedHeaders:
		n.upgrade(option, data)
	default:
		n.fail(option, wire.RepErrUnsup, "unknown option")
	}
}

// upgrade answers the options that change the form of replies. Asking once more
// for structured replies is harmless. Extended headers are not given up again.
//
// Source: NBD doc/proto.md, "NBD_OPT_STRUCTURED_REPLY", and its branch
// extension-ext-header, "NBD_OPT_EXTENDED_HEADERS".
func (n *negotiation) upgrade(option uint32, data []byte) {
	switch {
	case len(data) > 0:
		n.fail(option, wire.RepErrInvalid, "this option has no data")
		return
	case option == wire.OptExtendedHeaders && n.extended:
		n.fail(option, wire.RepErrInvalid, "extended headers are negotiated already")
		return
	case option == wire.OptStructuredReply && n.extended:
		n.fail(option, wire.RepErrExtHeaderReq, "extended headers are negotiated already")
		return
	}
	n.structured = true
	n.extended = n.extended || option == wire.OptExtendedHeaders
	n.reply(option, wire.RepAck, nil)
}

func (n *negotiation) list(data []byte) {
	if len(data) > 0 {
		n.fail(wire.OptList, wire.RepErrInvalid, "this option has no data")
		return
	}
	for _, x := range n.server.list(n.who) {
		b := binary.BigEndian.AppendUint32(nil, uint32(len(x.Name)))
		b = append(append(b, x.Name...), x.Description...)
		n.reply(wire.OptList, wire.RepServer, b)
	}
	n.reply(wire.OptList, wire.RepAck, nil)
}

// exportName answers the one option that has no way to say no.
//
// Source: NBD doc/proto.md, "NBD_OPT_EXPORT_NAME"; its branch
// extension-ext-header forbids it after extended headers.
func (n *negotiation) exportName(name string) (*choice, error) {
	if n.extended {
		return nil, fmt.Errorf("%w: extended headers, then the option EXPORT_NAME", wire.ErrProtocol)
	}
	x := n.server.attach(n.who, name)
	if x == nil {
		return nil, fmt.Errorf("%w: %.64q", ErrNotFound, name)
	}
	b := binary.BigEndian.AppendUint64(nil, uint64(x.size))
	b = binary.BigEndian.AppendUint16(b, x.transmissionFlags(n.structured, n.extended))
	if !n.noZeroes {
		b = append(b, make([]byte, 124)...)
	}
	n.out.Write(b)
	return n.choose(x), nil
}

// enter answers NBD_OPT_GO. The choice is nil after an error reply.
func (n *negotiation) enter(data []byte) (*choice, error) {
	name, infos, ok := parseInfo(data)
	if !ok {
		n.fail(wire.OptGo, wire.RepErrInvalid, "malformed request")
		return nil, nil
	}
	x := n.server.attach(n.who, name)
	n.describe(wire.OptGo, x, infos)
	if x == nil {
		return nil, nil
	}
	return n.choose(x), nil
}

func (n *negotiation) choose(x *export) *choice {
	chosen := &choice{export: x, structured: n.structured, extended: n.extended}
	if n.contextsOf == x {
		chosen.contexts = n.contexts
	}
	return chosen
}

// parseInfo reads the data of NBD_OPT_INFO and NBD_OPT_GO.
func parseInfo(data []byte) (name string, infos []uint16, ok bool) {
	d := wire.Decoder{P: data}
	name = d.String()
	for range d.Uint16() {
		if d.Bad {
			break
		}
		infos = append(infos, d.Uint16())
	}
	return name, infos, d.Complete()
}

// describe replies with what a client asked to know about an export; nil is one
// that does not exist.
//
// Source: NBD doc/proto.md, "NBD_REP_INFO".
func (n *negotiation) describe(option uint32, x *export, infos []uint16) {
	if x == nil {
		n.unknown(option)
		return
	}
	info := func(kind uint16) []byte { return binary.BigEndian.AppendUint16(nil, kind) }
	b := binary.BigEndian.AppendUint64(info(wire.InfoExport), uint64(x.size))
	n.reply(option, wire.RepInfo, binary.BigEndian.AppendUint16(b, x.transmissionFlags(n.structured, n.extended)))
	if slices.Contains(infos, wire.InfoName) {
		n.reply(option, wire.RepInfo, append(info(wire.InfoName), x.Name...))
	}
	if slices.Contains(infos, wire.InfoDescription) && x.Description != "" {
		n.reply(option, wire.RepInfo, append(info(wire.InfoDescription), x.Description...))
	}
	if slices.Contains(infos, wire.InfoBlockSize) {
		b := binary.BigEndian.AppendUint32(info(wire.InfoBlockSize), 1)
		b = binary.BigEndian.AppendUint32(b, uint32(x.BlockSize))
		n.reply(option, wire.RepInfo, binary.BigEndian.AppendUint32(b, wire.MaxPayload))
	}
	n.reply(option, wire.RepAck, nil)
}

// unknown is the answer about an export that does not exist, or of which the
// client may not know: it must not learn which. TLS might tell more.
//
// Source: NBD doc/proto.md, "SELECTIVETLS mode".
func (n *negotiation) unknown(option uint32) {
	if n.tls != nil && (option == wire.OptInfo || option == wire.OptGo) {
		n.fail(option, wire.RepErrTLSReqd, "no such export without TLS")
		return
	}
	n.fail(option, wire.RepErrUnknown, "no such export, or not for this client")
}

// metaContext lists or selects metadata contexts. The error is that of consult.
//
// Source: NBD doc/proto.md, "NBD_OPT_LIST_META_CONTEXT", "NBD_OPT_SET_META_CONTEXT".
func (n *negotiation) metaContext(ctx context.Context, option uint32, data []byte) error {
	if option == wire.OptSetMetaContext {
		n.contextsOf, n.contexts = nil, nil // also when this request fails
		if !n.structured {
			n.fail(option, wire.RepErrInvalid, "structured replies come first")
			return nil
		}
	}
	d := wire.Decoder{P: data}
	name, count := d.String(), d.Uint32()
	if count > maxQueries {
		n.fail(option, wire.RepErrTooBig, "too many queries")
		return nil
	}
	var queries []string
	for range count {
		query := d.String()
		if namespace, _, ok := strings.Cut(query, ":"); !ok || namespace == "" {
			d.Bad = true
		}
		queries = append(queries, query)
	}
	if !d.Complete() {
		n.fail(option, wire.RepErrInvalid, "malformed request")
		return nil
	}
	x := n.server.attach(n.who, name) // its contexts are looked at
	if x == nil {
		n.unknown(option)
		return nil
	}
	look := x.selectContexts
	if option == wire.OptListMetaContext {
		look = x.listContexts
	}
	found, err := n.consult(ctx, x, func() []namedContext { return look(queries) })
	switch {
	case err != nil:
		return err
	case option == wire.OptSetMetaContext && len(found) > maxContexts:
		n.fail(option, wire.RepErrTooBig, "too many contexts")
		return nil
	case option == wire.OptSetMetaContext:
		n.contextsOf = x
	}
	for i, f := range found {
		id := uint32(0) // is reserved, and what a list has
		if option == wire.OptSetMetaContext {
			id = uint32(i) + 1
			n.contexts = append(n.contexts, selected{id, f.Context})
		}
		n.reply(option, wire.RepMetaContext, append(binary.BigEndian.AppendUint32(nil, id), f.name...))
	}
	n.reply(option, wire.RepAck, nil)
	return nil
}

// consult returns what look finds in an attached export's contexts, and ends the
// attachment. That counts as an operation of the disk. If it takes longer than the
// handshake may, or than closingTime after ctx is done, it is left to itself, and
// the error is ErrBusy.
func (n *negotiation) consult(ctx context.Context, x *export, look func() []namedContext) ([]namedContext, error) {
	ctx, cancel := context.WithDeadline(ctx, n.deadline)
	defer cancel()
	if err := x.slots.enter(ctx); err != nil {
		x.users.Done()
		return nil, err
	}
	found := make(chan []namedContext, 1)
	idle := make(chan struct{})
	go func() {
		defer close(idle)
		defer x.users.Done()
		defer x.slots.leave()
		found <- look()
	}()
	select {
	case <-idle:
		return <-found, nil
	case <-ctx.Done():
	}
	select {
	case <-idle:
		return nil, ctx.Err()
	case <-time.After(closingTime):
		return nil, x.abandon(idle)
	}
}

// namedContext is a metadata context with its name.
type namedContext struct {
	name string
	Context
}

// listContexts returns the names of contexts that match any of the queries, all
// if there is none. A query that ends in a colon matches every name that begins
// so. Contexts that are not listed match none: to find out would be to open them.
func (x *export) listContexts(queries []string) []namedContext {
	names := []string{wire.BaseAllocation}
	if x.Contexts != nil {
		names = append(names, x.Contexts.List()...)
	}
	var found []namedContext
	matches := func(name string) bool {
		return len(queries) == 0 || slices.ContainsFunc(queries, func(query string) bool {
			return name == query || strings.HasSuffix(query, ":") && strings.HasPrefix(name, query)
		})
	}
	for _, name := range names {
		if matches(name) {
			found = append(found, namedContext{name: name})
		}
	}
	return found
}

// selectContexts returns the contexts that are named by the queries, in the order of
// the queries, and one more than maxContexts at most. Names that are unknown are
// passed over.
func (x *export) selectContexts(queries []string) []namedContext {
	var found []namedContext
	for _, query := range queries {
		known := slices.ContainsFunc(found, func(f namedContext) bool { return f.name == query })
		if c, ok := x.context(query); ok && !known {
			found = append(found, namedContext{query, c})
		}
		if len(found) > maxContexts {
			break
		}
	}
	return found
}

// context returns the metadata context of that name, which the caller's
// attachment to the export covers.
func (x *export) context(name string) (Context, bool) {
	switch {
	case name == wire.BaseAllocation:
		return allocation{x.Disk}, true
	case x.Contexts == nil || strings.HasSuffix(name, ":"):
		return nil, false
	}
	return x.Contexts.Open(name)
}
