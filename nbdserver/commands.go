package nbdserver

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/nbdserver/internal/wire"
)

const (
	// allocationID is the id of base:allocation on every connection.
	allocationID = 1
	// maxDescriptors bounds a block status reply, and maxPieces what is read of
	// the disk's map for one.
	maxDescriptors = 1 << 16
	maxPieces      = 1 << 16
	// smallRead is the length up to which a read looks for zeros in the bytes
	// and not in the disk's map, which costs more.
	smallRead = 16 << 10
	// minHole is the shortest hole inside a read that gets a chunk of its own.
	minHole = 4 << 10
	// dataChunkLen and holeChunkLen are the lengths in bytes of what surrounds
	// the data of a chunk, and of a whole chunk for a hole.
	dataChunkLen = wire.ChunkLen + 8
	holeChunkLen = wire.ChunkLen + 12
	// cacheStep is how much of the disk a CACHE command reads at a time.
	cacheStep = 1 << 20
)

// problem is why a request fails: what the client is told.
type problem struct {
	errno   wire.Errno
	message string
}

var (
	problemReadOnly = &problem{wire.EPERM, "the export is read-only"}
	problemPastEnd  = &problem{wire.EINVAL, "the request reaches past the end of the export"}
	problemFlags    = &problem{wire.EINVAL, "a command flag is unknown or does not apply"}
	problemCommand  = &problem{wire.EINVAL, "unknown command"}
	problemFlush    = &problem{wire.EINVAL, "a flush has no offset and no length"}
	problemContext  = &problem{wire.EINVAL, "no metadata context was negotiated"}
	problemNoLength = &problem{wire.EINVAL, "the request has no length"}
	problemDisk     = &problem{wire.EIO, "the disk could not be read"}
)

// replySize returns how many bytes of memory the reply to r may take at most,
// beyond requestCost.
func (c *conn) replySize(r wire.Request) int64 {
	if c.check(r) != nil {
		return 0
	}
	switch r.Command {
	case wire.CmdRead:
		return int64(r.Length)
	case wire.CmdCache:
		return min(int64(r.Length), cacheStep)
	case wire.CmdBlockStatus:
		return 4 * wire.DescriptorLen * min(int64(r.Length), maxDescriptors) // the extents and their encoding
	}
	return 0
}

// check returns why r must fail without a look at the disk, or nil.
func (c *conn) check(r wire.Request) *problem {
	allowed := uint16(0)
	switch r.Command {
	case wire.CmdRead:
		if c.structured {
			allowed = wire.CmdFlagDF
		}
	case wire.CmdBlockStatus:
		allowed = wire.CmdFlagReqOne
	case wire.CmdCache, wire.CmdFlush:
	case wire.CmdWrite, wire.CmdTrim, wire.CmdWriteZeroes:
		return problemReadOnly
	default:
		return problemCommand
	}
	switch {
	case r.Flags&^allowed != 0:
		return problemFlags
	case r.Command == wire.CmdFlush && (r.Offset != 0 || r.Length != 0):
		return problemFlush
	case !r.Inside(c.export.size):
		return problemPastEnd
	case r.Command == wire.CmdBlockStatus && len(c.contexts) == 0:
		return problemContext
	case r.Command == wire.CmdBlockStatus && r.Length == 0:
		return problemNoLength
	case r.Command != wire.CmdBlockStatus && r.Length > wire.MaxPayload:
		return c.tooLong()
	}
	return nil
}

// tooLong is the answer to a READ or CACHE beyond the maximum payload. Clients without structured
// replies do not expect EOVERFLOW.
func (c *conn) tooLong() *problem {
	p := &problem{wire.EINVAL, fmt.Sprintf("the request is longer than %d bytes", wire.MaxPayload)}
	if c.structured {
		p.errno = wire.EOVERFLOW
	}
	return p
}

// execute carries out a request and returns the whole reply.
func (c *conn) execute(ctx context.Context, r wire.Request) *buffer {
	if p := c.check(r); p != nil {
		return c.failure(r, p)
	}
	var b *buffer
	var err error
	switch {
	case r.Command == wire.CmdRead && r.Length > 0:
		b, err = c.read(ctx, r)
	case r.Command == wire.CmdBlockStatus:
		b, err = c.blockStatus(ctx, r)
	case r.Command == wire.CmdCache:
		b, err = c.cache(r)
	default:
		b = c.success(r)
	}
	if err != nil && ctx.Err() != nil {
		return c.failure(r, problemDisk) // nobody is there to receive it
	}
	if err != nil {
		c.log.ErrorContext(ctx, "cannot read an export's disk", slog.Uint64("offset", r.Offset),
			slog.Uint64("length", uint64(r.Length)), slog.Any("error", err))
		return c.failure(r, problemDisk)
	}
	return b
}

// success is the reply to a request that has nothing to say.
func (c *conn) success(r wire.Request) *buffer {
	b := newBuffer(wire.ChunkLen)
	if c.structured {
		b.b = wire.AppendChunk(b.b, wire.ChunkFlagDone, wire.ChunkNone, r.Cookie, 0)
	} else {
		b.b = wire.AppendSimple(b.b, 0, r.Cookie)
	}
	return b
}

// failure is an error reply.
//
// Source: NBD doc/proto.md, "NBD_REPLY_TYPE_ERROR".
func (c *conn) failure(r wire.Request, p *problem) *buffer {
	b := newBuffer(wire.ChunkLen + 6 + len(p.message))
	if !c.structured {
		b.b = wire.AppendSimple(b.b, p.errno, r.Cookie)
		return b
	}
	b.b = wire.AppendChunk(b.b, wire.ChunkFlagDone, wire.ChunkError, r.Cookie, 6+len(p.message))
	b.b = binary.BigEndian.AppendUint32(b.b, uint32(p.errno))
	b.b = binary.BigEndian.AppendUint16(b.b, uint16(len(p.message)))
	b.b = append(b.b, p.message...)
	return b
}

// read answers NBD_CMD_READ: in one simple reply, in one chunk, or in chunks of
// data and holes.
func (c *conn) read(ctx context.Context, r wire.Request) (*buffer, error) {
	whole := image.Extent{Off: int64(r.Offset), Len: int64(r.Length)}
	switch {
	case !c.structured:
		b := newBuffer(wire.SimpleLen + int(r.Length))
		b.b = wire.AppendSimple(b.b, 0, r.Cookie)
		return c.fill(b, whole)
	case r.Flags&wire.CmdFlagDF != 0 || r.Length <= smallRead:
		b, err := c.readChunks(r, []image.Extent{whole})
		if err == nil && r.Length <= smallRead && image.IsZero(b.b[dataChunkLen:]) {
			b.b = appendHole(b.b[:0], wire.ChunkFlagDone, r.Cookie, whole)
		}
		return b, err
	default:
		return c.readChunks(r, c.runs(ctx, whole))
	}
}

// fill appends the disk's bytes of e to b, which has room for them. It frees b
// when it fails.
func (c *conn) fill(b *buffer, e image.Extent) (*buffer, error) {
	if err := image.ReadFull(c.export.Disk, b.extend(int(e.Len)), e.Off); err != nil {
		b.free()
		return nil, err
	}
	return b, nil
}

// readChunks builds a structured reply of one chunk for each run.
func (c *conn) readChunks(r wire.Request, runs []image.Extent) (*buffer, error) {
	size := 0
	for _, e := range runs {
		if e.Zero {
			size += holeChunkLen
		} else {
			size += dataChunkLen + int(e.Len)
		}
	}
	b := newBuffer(size)
	for i, e := range runs {
		flags := uint16(0)
		if i == len(runs)-1 {
			flags = wire.ChunkFlagDone
		}
		if e.Zero {
			b.b = appendHole(b.b, flags, r.Cookie, e)
			continue
		}
		b.b = wire.AppendChunk(b.b, flags, wire.ChunkOffsetData, r.Cookie, 8+int(e.Len))
		b.b = binary.BigEndian.AppendUint64(b.b, uint64(e.Off))
		var err error
		if b, err = c.fill(b, e); err != nil {
			return nil, err
		}
	}
	return b, nil
}

func appendHole(b []byte, flags uint16, cookie uint64, e image.Extent) []byte {
	b = wire.AppendChunk(b, flags, wire.ChunkOffsetHole, cookie, 12)
	b = binary.BigEndian.AppendUint64(b, uint64(e.Off))
	return binary.BigEndian.AppendUint32(b, uint32(e.Len))
}

// runs cuts a range into what is sent as data and as holes. Whatever the disk's
// map does not clearly call a hole is data; so is all that follows an error of
// the map, since reading may still work.
func (c *conn) runs(ctx context.Context, whole image.Extent) []image.Extent {
	var runs []image.Extent
	pos := whole.Off
	for e, err := range image.Coalesce(c.export.Disk.Extents(ctx, whole.Off, whole.Len)) {
		if err != nil {
			c.log.WarnContext(ctx, "cannot read the map of an export's disk", slog.Int64("offset", pos), slog.Any("error", err))
			break
		}
		start, end := max(e.Off, pos), min(e.End(), whole.End())
		if !e.Zero || end-start < minHole {
			continue
		}
		if start > pos {
			runs = append(runs, image.Extent{Off: pos, Len: start - pos})
		}
		runs = append(runs, image.Extent{Off: start, Len: end - start, Zero: true})
		pos = end
	}
	if pos < whole.End() {
		runs = append(runs, image.Extent{Off: pos, Len: whole.End() - pos})
	}
	return runs
}

// blockStatus answers NBD_CMD_BLOCK_STATUS with as many extents as fit.
//
// Source: NBD doc/proto.md, "NBD_REPLY_TYPE_BLOCK_STATUS".
func (c *conn) blockStatus(ctx context.Context, r wire.Request) (*buffer, error) {
	limit := maxDescriptors
	if r.Flags&wire.CmdFlagReqOne != 0 {
		limit = 1
	}
	extents, err := c.extents(ctx, r, limit)
	if err != nil {
		return nil, err
	}
	payload := 4 + wire.DescriptorLen*len(extents)
	b := newBuffer(wire.ChunkLen + payload)
	b.b = wire.AppendChunk(b.b, wire.ChunkFlagDone, wire.ChunkBlockStatus, r.Cookie, payload)
	b.b = binary.BigEndian.AppendUint32(b.b, allocationID)
	for _, e := range extents {
		state := uint32(0)
		if e.Zero {
			state = wire.StateHole | wire.StateZero
		}
		b.b = binary.BigEndian.AppendUint32(b.b, uint32(e.Len))
		b.b = binary.BigEndian.AppendUint32(b.b, state)
	}
	return b, nil
}

var errMap = errors.New("the disk's map has a gap")

// extents returns 1 to limit extents of the disk from the request's offset on,
// neighbours merged, and reads no more of the disk's map than that takes. They
// may end before the request does: clients ask again for the rest, and meet an
// error of the map then.
func (c *conn) extents(ctx context.Context, r wire.Request, limit int) ([]image.Extent, error) {
	var found []image.Extent
	pos, pieces := int64(r.Offset), 0
	for e, err := range c.export.Disk.Extents(ctx, pos, int64(r.Length)) {
		if err == nil && e.Off != pos {
			err = errMap
		}
		if err != nil && len(found) == 0 {
			return nil, err
		}
		if err != nil {
			return found, nil
		}
		e.Len = min(e.Len, r.End()-pos)
		switch n := len(found); {
		case n > 0 && found[n-1].Zero == e.Zero:
			found[n-1].Len += e.Len
		case n == limit:
			return found, nil
		case e.Len > 0:
			found = append(found, e)
		}
		pos = e.End()
		if pieces++; pieces == maxPieces || pos == r.End() {
			break
		}
	}
	if len(found) == 0 {
		return nil, errMap
	}
	return found, nil
}

// cache answers NBD_CMD_CACHE by reading the range, which warms the caches
// below.
func (c *conn) cache(r wire.Request) (*buffer, error) {
	b := newBuffer(int(min(r.Length, cacheStep)))
	for pos := int64(r.Offset); pos < r.End(); pos += cacheStep {
		b.b = b.b[:0]
		if _, err := c.fill(b, image.Extent{Off: pos, Len: min(cacheStep, r.End()-pos)}); err != nil {
			return nil, err
		}
	}
	b.free()
	return c.success(r), nil
}
