package nbdclient

import (
	"fmt"
	"io"
	"math/bits"
	"slices"

	"github.com/holdfast-backup/holdfast/nbdserver/internal/wire"
)

// Limits of replies.
const (
	maxExtents = 1 << 20             // of a block status chunk
	maxRanges  = 4096                // of a read's reply that are not adjacent
	maxError   = 64 + wire.MaxString // payload of an error chunk
)

// chunkHeader is the header of a structured reply chunk.
type chunkHeader struct {
	flags, kind uint16
	length      uint64
}

// chunk receives a structured reply chunk.
//
// Source: NBD doc/proto.md, "Structured reply chunk message".
func (c *conn) chunk() error {
	size := wire.ChunkLen
	if c.replies == extended {
		size = wire.ExtendedChunkLen
	}
	d, err := c.header(size)
	if err != nil {
		return err
	}
	d.Uint32()
	h := chunkHeader{flags: d.Uint16(), kind: d.Uint16()}
	cookie, offset := d.Uint64(), uint64(0)
	if c.replies == extended {
		offset, h.length = d.Uint64(), d.Uint64()
	} else {
		h.length = uint64(d.Uint32())
	}
	r, err := c.find(cookie)
	if err != nil {
		return err
	}
	if c.replies == extended && offset != r.Offset {
		return fmt.Errorf("%w: a reply with offset %d to a request at %d", ErrProtocol, offset, r.Offset)
	}
	if err := c.payload(r, h); err != nil {
		return err
	}
	if h.flags&wire.ChunkFlagDone == 0 {
		return nil
	}
	if err := c.complete(r); err != nil {
		return err
	}
	return c.answered(r)
}

// payload receives the payload of a chunk.
func (c *conn) payload(r *request, h chunkHeader) error {
	status := wire.ChunkBlockStatus
	if c.replies == extended {
		status = wire.ChunkBlockStatusExt
	}
	switch {
	case h.kind&wire.ChunkTypeError != 0:
		return c.errorChunk(r, h)
	case h.kind == wire.ChunkNone && h.length == 0 && h.flags&wire.ChunkFlagDone != 0:
		return nil
	case h.kind == wire.ChunkOffsetData && r.Command == wire.CmdRead && h.length > 8:
		return c.data(r, h)
	case h.kind == wire.ChunkOffsetHole && r.Command == wire.CmdRead && h.length == 12:
		return c.hole(r)
	case h.kind == status && r.Command == wire.CmdBlockStatus:
		return c.blockStatus(r, h)
	}
	return fmt.Errorf("%w: a chunk of type %d, flags %#x and %d bytes in reply to command %d",
		ErrProtocol, h.kind, h.flags, h.length, r.Command)
}

// complete checks that a reply that ends without an error is whole.
func (c *conn) complete(r *request) error {
	whole := true
	switch r.Command {
	case wire.CmdRead:
		whole = r.got.is(r.Offset, r.Length)
	case wire.CmdBlockStatus:
		whole = bits.OnesCount64(r.answered) == len(c.contexts)
	}
	if !whole && r.failure == nil {
		return fmt.Errorf("%w: the reply to command %d of %d bytes at %d ends, and a part is missing", ErrProtocol, r.Command, r.Length, r.Offset)
	}
	return nil
}

// claim notes that [off, off+length) arrives, and returns where it belongs.
func (r *request) claim(off, length uint64) ([]byte, error) {
	if length == 0 || off < r.Offset || length > r.Length || off-r.Offset > r.Length-length {
		return nil, fmt.Errorf("%w: content at %d, %d bytes, in reply to a read of %d bytes at %d", ErrProtocol, off, length, r.Length, r.Offset)
	}
	if !r.got.add(off, off+length) {
		return nil, fmt.Errorf("%w: content at %d overlaps, or is in too many parts", ErrProtocol, off)
	}
	return r.buf[off-r.Offset:][:length], nil
}

func (c *conn) data(r *request, h chunkHeader) error {
	d, err := c.header(8)
	if err != nil {
		return err
	}
	p, err := r.claim(d.Uint64(), h.length-8)
	if err != nil {
		return err
	}
	_, err = io.ReadFull(c.in, p)
	return unexpected(err)
}

func (c *conn) hole(r *request) error {
	d, err := c.header(12)
	if err != nil {
		return err
	}
	p, err := r.claim(d.Uint64(), uint64(d.Uint32()))
	clear(p)
	return err
}

// errorChunk receives an error; the rest of the reply is received all the same.
// One that is unknown begins like those that are known.
//
// Source: NBD doc/proto.md, "Structured reply types".
func (c *conn) errorChunk(r *request, h chunkHeader) error {
	if h.length > maxError {
		return fmt.Errorf("%w: an error chunk of %d bytes", ErrProtocol, h.length)
	}
	p := make([]byte, h.length)
	if _, err := io.ReadFull(c.in, p); err != nil {
		return unexpected(err)
	}
	d := wire.Decoder{P: p}
	errno := wire.Errno(d.Uint32())
	message := d.Bytes(uint32(d.Uint16()))
	off := r.Offset
	if h.kind == wire.ChunkErrorOffset {
		off = d.Uint64()
	}
	if d.Bad || errno == 0 || off < r.Offset || off-r.Offset >= r.Length {
		return fmt.Errorf("%w: a malformed error chunk %x", ErrProtocol, p[:min(len(p), 32)])
	}
	if r.failure == nil {
		r.failure = serverError(errno, string(message))
	}
	return nil
}

// blockStatus receives the block status of one context. That of others than the
// one wanted is skipped, neighbours of the same status are merged.
func (c *conn) blockStatus(r *request, h chunkHeader) error {
	head, size := uint64(4), uint64(wire.DescriptorLen)
	if c.replies == extended {
		head, size = 8, wire.ExtendedDescriptorLen
	}
	count := (h.length - head) / size
	if h.length <= head || count > maxExtents || h.length != head+count*size {
		return fmt.Errorf("%w: a block status chunk of %d bytes", ErrProtocol, h.length)
	}
	d, err := c.header(int(head))
	if err != nil {
		return err
	}
	id := d.Uint32()
	i := slices.IndexFunc(c.contexts, func(g granted) bool { return g.id == id })
	if i < 0 || r.answered&(1<<i) != 0 {
		return fmt.Errorf("%w: block status of context %d, which is unknown or was told before", ErrProtocol, id)
	}
	if c.replies == extended && uint64(d.Uint32()) != count {
		return fmt.Errorf("%w: a block status chunk miscounts its extents", ErrProtocol)
	}
	r.answered |= 1 << i
	for range count {
		e, err := c.descriptor(int(size))
		if err != nil {
			return err
		}
		if c.contexts[i].name == r.context {
			r.extents = appendRange(r.extents, e)
		}
	}
	return nil
}

func (c *conn) descriptor(size int) (wireRange, error) {
	d, err := c.header(size)
	if err != nil {
		return wireRange{}, err
	}
	var e wireRange
	if size == wire.ExtendedDescriptorLen {
		e = wireRange{d.Uint64(), d.Uint64()}
	} else {
		e = wireRange{uint64(d.Uint32()), uint64(d.Uint32())}
	}
	if e.length == 0 {
		return e, fmt.Errorf("%w: an extent of no bytes", ErrProtocol)
	}
	return e, nil
}

// appendRange appends an extent, or lengthens the last one. Lengths end at the
// highest number.
func appendRange(list []wireRange, e wireRange) []wireRange {
	if n := len(list); n > 0 && list[n-1].flags == e.flags {
		sum, carry := bits.Add64(list[n-1].length, e.length, 0)
		list[n-1].length = sum | -carry
		return list
	}
	return append(list, e)
}

// ranges are the ranges that have arrived, in order, apart from each other.
type ranges []struct{ from, to uint64 }

// add adds [from, to) and reports whether it overlaps none and there are not too
// many.
func (s *ranges) add(from, to uint64) bool {
	list := *s
	i, _ := slices.BinarySearchFunc(list, from, func(e struct{ from, to uint64 }, at uint64) int {
		if e.from < at {
			return -1
		}
		return 1
	})
	// list[i-1] begins before from, list[i] at from or after.
	if i > 0 && list[i-1].to > from || i < len(list) && list[i].from < to {
		return false
	}
	before := i > 0 && list[i-1].to == from
	after := i < len(list) && list[i].from == to
	switch {
	case before && after:
		list[i-1].to = list[i].to
		*s = slices.Delete(list, i, i+1)
	case before:
		list[i-1].to = to
	case after:
		list[i].from = from
	default:
		*s = slices.Insert(list, i, struct{ from, to uint64 }{from, to})
	}
	return len(*s) <= maxRanges
}

// is reports whether the ranges are just the one of length bytes at off.
func (s ranges) is(off, length uint64) bool {
	return len(s) == 1 && s[0].from == off && s[0].to == off+length
}
