// Package wire is the NBD protocol's bytes, as both ends of it know them:
// magic numbers, flags, options, commands, errors, and the headers that carry them.
//
// Every number on the wire is big-endian. Names and values follow NBD
// doc/proto.md.
package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// Magic numbers.
const (
	MagicServer          uint64 = 0x4e42444d41474943 // "NBDMAGIC"
	MagicOption          uint64 = 0x49484156454f5054 // "IHAVEOPT"
	MagicOptionReply     uint64 = 0x0003e889045565a9
	MagicRequest         uint32 = 0x25609513
	MagicSimple          uint32 = 0x67446698
	MagicStructured      uint32 = 0x668e33ef
	MagicExtendedRequest uint32 = 0x21e41c71
	MagicExtendedReply   uint32 = 0x6e8a278c
)

// Handshake and client flags have the same two bits.
const (
	FlagFixedNewstyle = 1 << iota
	FlagNoZeroes
)

// Transmission flags.
const (
	FlagHasFlags         uint16 = 1 << 0
	FlagReadOnly         uint16 = 1 << 1
	FlagSendFlush        uint16 = 1 << 2
	FlagSendFUA          uint16 = 1 << 3
	FlagRotational       uint16 = 1 << 4
	FlagSendTrim         uint16 = 1 << 5
	FlagSendWriteZeroes  uint16 = 1 << 6
	FlagSendDF           uint16 = 1 << 7
	FlagCanMultiConn     uint16 = 1 << 8
	FlagSendCache        uint16 = 1 << 10
	FlagSendFastZero     uint16 = 1 << 11
	FlagBlockStatPayload uint16 = 1 << 12
)

// Options of the handshake.
const (
	OptExportName      uint32 = 1
	OptAbort           uint32 = 2
	OptList            uint32 = 3
	OptStartTLS        uint32 = 5
	OptInfo            uint32 = 6
	OptGo              uint32 = 7
	OptStructuredReply uint32 = 8
	OptListMetaContext uint32 = 9
	OptSetMetaContext  uint32 = 10
	OptExtendedHeaders uint32 = 11
)

// Replies to options. Those with the highest bit set are errors, with a message
// for people as their payload.
const (
	RepAck             uint32 = 1
	RepServer          uint32 = 2
	RepInfo            uint32 = 3
	RepMetaContext     uint32 = 4
	RepErrUnsup        uint32 = 1<<31 + 1
	RepErrPolicy       uint32 = 1<<31 + 2
	RepErrInvalid      uint32 = 1<<31 + 3
	RepErrTLSReqd      uint32 = 1<<31 + 5
	RepErrUnknown      uint32 = 1<<31 + 6
	RepErrShutdown     uint32 = 1<<31 + 7
	RepErrBlockSize    uint32 = 1<<31 + 8
	RepErrTooBig       uint32 = 1<<31 + 9
	RepErrExtHeaderReq uint32 = 1<<31 + 10
	RepFlagError       uint32 = 1 << 31
)

// Information about an export.
const (
	InfoExport      uint16 = 0
	InfoName        uint16 = 1
	InfoDescription uint16 = 2
	InfoBlockSize   uint16 = 3
)

// Commands of the transmission phase.
const (
	CmdRead        uint16 = 0
	CmdWrite       uint16 = 1
	CmdDisc        uint16 = 2
	CmdFlush       uint16 = 3
	CmdTrim        uint16 = 4
	CmdCache       uint16 = 5
	CmdWriteZeroes uint16 = 6
	CmdBlockStatus uint16 = 7
)

// Command flags.
const (
	CmdFlagFUA        uint16 = 1 << 0
	CmdFlagNoHole     uint16 = 1 << 1
	CmdFlagDF         uint16 = 1 << 2
	CmdFlagReqOne     uint16 = 1 << 3
	CmdFlagFastZero   uint16 = 1 << 4
	CmdFlagPayloadLen uint16 = 1 << 5
)

// Structured reply chunks. Those with the highest bit set are errors.
const (
	ChunkFlagDone       uint16 = 1
	ChunkNone           uint16 = 0
	ChunkOffsetData     uint16 = 1
	ChunkOffsetHole     uint16 = 2
	ChunkBlockStatus    uint16 = 5
	ChunkBlockStatusExt uint16 = 6
	ChunkError          uint16 = 1<<15 + 1
	ChunkErrorOffset    uint16 = 1<<15 + 2
	ChunkTypeError      uint16 = 1 << 15
)

// States of the base:allocation context.
const (
	StateHole uint32 = 1 << 0 // not allocated
	StateZero uint32 = 1 << 1 // reads as zeros
)

// StateDirty is the state of QEMU's contexts of dirty bitmaps, and of ours for
// changes: the extent differs.
const StateDirty uint32 = 1 << 0

// BaseAllocation is the metadata context that every server knows.
const BaseAllocation = "base:allocation"

// Errno is an error value of the transmission phase.
//
// Source: NBD doc/proto.md, "Error values".
type Errno uint32

// The error values.
const (
	EPERM     Errno = 1
	EIO       Errno = 5
	ENOMEM    Errno = 12
	EINVAL    Errno = 22
	ENOSPC    Errno = 28
	EOVERFLOW Errno = 75
	ENOTSUP   Errno = 95
	ESHUTDOWN Errno = 108
)

// Lengths in bytes.
const (
	MaxString             = 4096     // of a name, a description or a query
	MaxPayload            = 32 << 20 // that one request may read or write
	OptionLen             = 16
	OptionReplyLen        = 20
	RequestLen            = 28
	ExtendedRequestLen    = 32
	SimpleLen             = 16
	ChunkLen              = 20
	ExtendedChunkLen      = 32
	DescriptorLen         = 8  // of a block status chunk
	ExtendedDescriptorLen = 16 // of an extended one
)

// ErrProtocol means bytes that the protocol does not allow.
var ErrProtocol = errors.New("protocol violation")

// Request is the header of one command.
type Request struct {
	Flags   uint16
	Command uint16
	Cookie  uint64
	Offset  uint64
	// Length is that of the effect or, with CmdFlagPayloadLen, of the payload.
	// Without extended headers it has 32 bits.
	Length uint64
}

// End returns the offset of the first byte after the request. It is meaningful
// once Inside has said that the request lies inside the disk.
func (r Request) End() int64 { return int64(r.Offset + r.Length) }

// Inside reports whether the request lies inside a disk of size bytes.
func (r Request) Inside(size int64) bool {
	return r.Offset <= uint64(size) && r.Length <= uint64(size)-r.Offset
}

// DecodeRequest decodes a request header of RequestLen or, with extended
// headers, ExtendedRequestLen bytes. A wrong magic is ErrProtocol.
func DecodeRequest(p []byte, extended bool) (Request, error) {
	want := MagicRequest
	if extended {
		want = MagicExtendedRequest
	}
	if magic := binary.BigEndian.Uint32(p); magic != want {
		return Request{}, fmt.Errorf("%w: request magic %#x", ErrProtocol, magic)
	}
	r := Request{
		Flags:   binary.BigEndian.Uint16(p[4:]),
		Command: binary.BigEndian.Uint16(p[6:]),
		Cookie:  binary.BigEndian.Uint64(p[8:]),
		Offset:  binary.BigEndian.Uint64(p[16:]),
	}
	if extended {
		r.Length = binary.BigEndian.Uint64(p[24:])
	} else {
		r.Length = uint64(binary.BigEndian.Uint32(p[24:]))
	}
	return r, nil
}

// AppendRequest appends the header of a request. Without extended headers the
// length must have 32 bits.
func AppendRequest(b []byte, r Request, extended bool) []byte {
	magic := MagicRequest
	if extended {
		magic = MagicExtendedRequest
	}
	b = binary.BigEndian.AppendUint32(b, magic)
	b = binary.BigEndian.AppendUint16(b, r.Flags)
	b = binary.BigEndian.AppendUint16(b, r.Command)
	b = binary.BigEndian.AppendUint64(b, r.Cookie)
	b = binary.BigEndian.AppendUint64(b, r.Offset)
	if extended {
		return binary.BigEndian.AppendUint64(b, r.Length)
	}
	return binary.BigEndian.AppendUint32(b, uint32(r.Length))
}

// AppendSimple appends a simple reply's header.
func AppendSimple(b []byte, e Errno, cookie uint64) []byte {
	b = binary.BigEndian.AppendUint32(b, MagicSimple)
	b = binary.BigEndian.AppendUint32(b, uint32(e))
	return binary.BigEndian.AppendUint64(b, cookie)
}

// AppendChunk appends the header of a structured reply chunk whose payload has
// length bytes.
func AppendChunk(b []byte, flags, kind uint16, cookie uint64, length int) []byte {
	b = binary.BigEndian.AppendUint32(b, MagicStructured)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, kind)
	b = binary.BigEndian.AppendUint64(b, cookie)
	return binary.BigEndian.AppendUint32(b, uint32(length))
}

// AppendExtendedChunk appends the extended header of a reply chunk whose payload
// has length bytes. offset is that of the request.
func AppendExtendedChunk(b []byte, flags, kind uint16, cookie, offset uint64, length int) []byte {
	b = binary.BigEndian.AppendUint32(b, MagicExtendedReply)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, kind)
	b = binary.BigEndian.AppendUint64(b, cookie)
	b = binary.BigEndian.AppendUint64(b, offset)
	return binary.BigEndian.AppendUint64(b, uint64(length))
}

// Decoder reads the fields of an option's data or of a reply's payload. After a
// field that does not fit, Bad is set and every further field is zero.
type Decoder struct {
	P   []byte
	Bad bool
}

// Bytes returns the next n bytes, which are part of P.
func (d *Decoder) Bytes(n uint32) []byte {
	if d.Bad || uint64(n) > uint64(len(d.P)) {
		d.Bad = true
		return nil
	}
	field := d.P[:n]
	d.P = d.P[n:]
	return field
}

// Uint16 reads 16 bits.
func (d *Decoder) Uint16() uint16 {
	if p := d.Bytes(2); p != nil {
		return binary.BigEndian.Uint16(p)
	}
	return 0
}

// Uint32 reads 32 bits.
func (d *Decoder) Uint32() uint32 {
	if p := d.Bytes(4); p != nil {
		return binary.BigEndian.Uint32(p)
	}
	return 0
}

// Uint64 reads 64 bits.
func (d *Decoder) Uint64() uint64 {
	if p := d.Bytes(8); p != nil {
		return binary.BigEndian.Uint64(p)
	}
	return 0
}

// String reads a length of 32 bits and as many bytes, at most MaxString.
func (d *Decoder) String() string {
	n := d.Uint32()
	if n > MaxString {
		d.Bad = true
	}
	return string(d.Bytes(n))
}

// Complete reports whether every field fitted and nothing is left over.
func (d *Decoder) Complete() bool { return !d.Bad && len(d.P) == 0 }
