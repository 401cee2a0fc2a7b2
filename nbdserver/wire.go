package nbdserver

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
)

// Every number on the wire is big-endian. The names follow NBD doc/proto.md.

const (
	magicServer     uint64 = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption     uint64 = 0x49484156454f5054 // "IHAVEOPT"
	magicOptReply   uint64 = 0x0003e889045565a9
	magicRequest    uint32 = 0x25609513
	magicSimple     uint32 = 0x67446698
	magicStructured uint32 = 0x668e33ef
)

// Handshake and client flags have the same two bits.
const (
	flagFixedNewstyle = 1 << iota
	flagNoZeroes
)

// Transmission flags.
const (
	flagHasFlags     uint16 = 1 << 0
	flagReadOnly     uint16 = 1 << 1
	flagSendFlush    uint16 = 1 << 2
	flagSendDF       uint16 = 1 << 7
	flagCanMultiConn uint16 = 1 << 8
	flagSendCache    uint16 = 1 << 10
)

// Options of the handshake.
const (
	optExportName      uint32 = 1
	optAbort           uint32 = 2
	optList            uint32 = 3
	optInfo            uint32 = 6
	optGo              uint32 = 7
	optStructuredReply uint32 = 8
	optListMetaContext uint32 = 9
	optSetMetaContext  uint32 = 10
)

// Replies to options.
const (
	repAck         uint32 = 1
	repServer      uint32 = 2
	repInfo        uint32 = 3
	repMetaContext uint32 = 4
	repErrUnsup    uint32 = 1<<31 + 1
	repErrInvalid  uint32 = 1<<31 + 3
	repErrUnknown  uint32 = 1<<31 + 6
	repErrTooBig   uint32 = 1<<31 + 9
)

// Information about an export.
const (
	infoExport      uint16 = 0
	infoName        uint16 = 1
	infoDescription uint16 = 2
	infoBlockSize   uint16 = 3
)

// Commands of the transmission phase.
const (
	cmdRead        uint16 = 0
	cmdWrite       uint16 = 1
	cmdDisc        uint16 = 2
	cmdFlush       uint16 = 3
	cmdTrim        uint16 = 4
	cmdCache       uint16 = 5
	cmdWriteZeroes uint16 = 6
	cmdBlockStatus uint16 = 7
)

// Command flags.
const (
	cmdFlagDF     uint16 = 1 << 2
	cmdFlagReqOne uint16 = 1 << 3
)

// Structured reply chunks.
const (
	chunkFlagDone    uint16 = 1
	chunkNone        uint16 = 0
	chunkOffsetData  uint16 = 1
	chunkOffsetHole  uint16 = 2
	chunkBlockStatus uint16 = 5
	chunkError       uint16 = 1<<15 + 1
)

// States of the base:allocation context.
const (
	stateData uint32 = 0
	stateHole uint32 = 1<<0 | 1<<1 // not allocated, and reads as zeros
)

// errno is an error value of the transmission phase.
//
// Source: NBD doc/proto.md, "Error values".
type errno uint32

const (
	errPerm     errno = 1
	errIO       errno = 5
	errInval    errno = 22
	errOverflow errno = 75
)

// Limits of the protocol and ours.
const (
	maxString     = 4096     // bytes of a name, a description or a query
	maxPayload    = 32 << 20 // bytes that one request may read or write
	requestLen    = 28
	simpleLen     = 16
	chunkLen      = 20
	dataChunkLen  = chunkLen + 8
	holeChunkLen  = chunkLen + 12
	descriptorLen = 8
)

// baseAllocation is the one metadata context that a disk's extents answer.
const baseAllocation = "base:allocation"

var errProtocol = errors.New("protocol violation")

// request is one command of the client, without the payload of a write.
type request struct {
	flags   uint16
	command uint16
	cookie  uint64
	offset  uint64
	length  uint32
}

// end returns the offset of the first byte after the request. It is meaningful once inside has
// said that the request lies inside the disk.
func (r request) end() int64 { return int64(r.offset) + int64(r.length) }

// inside reports whether the request lies inside a disk of size bytes.
func (r request) inside(size int64) bool {
	return r.offset <= uint64(size) && uint64(r.length) <= uint64(size)-r.offset
}

// readRequest reads one request header. It returns io.EOF when the client hung
// up between requests.
func readRequest(in *bufio.Reader) (request, error) {
	p, err := in.Peek(requestLen)
	if err != nil {
		return request{}, err
	}
	if magic := binary.BigEndian.Uint32(p); magic != magicRequest {
		return request{}, fmt.Errorf("%w: request magic %#x", errProtocol, magic)
	}
	r := request{
		flags:   binary.BigEndian.Uint16(p[4:]),
		command: binary.BigEndian.Uint16(p[6:]),
		cookie:  binary.BigEndian.Uint64(p[8:]),
		offset:  binary.BigEndian.Uint64(p[16:]),
		length:  binary.BigEndian.Uint32(p[24:]),
	}
	_, err = in.Discard(requestLen)
	return r, err
}

func appendSimple(b []byte, e errno, cookie uint64) []byte {
	b = binary.BigEndian.AppendUint32(b, magicSimple)
	b = binary.BigEndian.AppendUint32(b, uint32(e))
	return binary.BigEndian.AppendUint64(b, cookie)
}

// appendChunk appends the header of a structured reply chunk whose payload has
// length bytes.
func appendChunk(b []byte, flags, kind uint16, cookie uint64, length int) []byte {
	b = binary.BigEndian.AppendUint32(b, magicStructured)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, kind)
	b = binary.BigEndian.AppendUint64(b, cookie)
	return binary.BigEndian.AppendUint32(b, uint32(length))
}

// decoder reads the fields of an option's data. After a field that does not
// fit, bad is set and every further field is zero.
type decoder struct {
	p   []byte
	bad bool
}

func (d *decoder) bytes(n uint32) []byte {
	if d.bad || uint64(n) > uint64(len(d.p)) {
		d.bad = true
		return nil
	}
	field := d.p[:n]
	d.p = d.p[n:]
	return field
}

func (d *decoder) uint16() uint16 {
	if p := d.bytes(2); p != nil {
		return binary.BigEndian.Uint16(p)
	}
	return 0
}

func (d *decoder) uint32() uint32 {
	if p := d.bytes(4); p != nil {
		return binary.BigEndian.Uint32(p)
	}
	return 0
}

// string reads a length of 32 bits and as many bytes, at most maxString.
func (d *decoder) string() string {
	n := d.uint32()
	if n > maxString {
		d.bad = true
	}
	return string(d.bytes(n))
}

// complete reports whether every field fitted and nothing is left over.
func (d *decoder) complete() bool { return !d.bad && len(d.p) == 0 }
