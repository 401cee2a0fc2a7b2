package nbdserver

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"

	"github.com/holdfast-backup/holdfast/image"
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
	// cacheStep is how much of the disk a CACHE command reads at a time.
	cacheStep = 1 << 20
)

// problem is why a request fails: what the client is told.
type problem struct {
	errno   errno
	message string
}

var (
	problemReadOnly = &problem{errPerm, "the export is read-only"}
	problemPastEnd  = &problem{errInval, "the request reaches past the end of the export"}
	problemFlags    = &problem{errInval, "a command flag is unknown or does not apply"}
	problemCommand  = &problem{errInval, "unknown command"}
	problemFlush    = &problem{errInval, "a flush has no offset and no length"}
	problemContext  = &problem{errInval, "no metadata context was negotiated"}
	problemNoLength = &problem{errInval, "the request has no length"}
	problemDisk     = &problem{errIO, "the disk could not be read"}
)

// replySize returns how many bytes of memory the reply to r may take at most,
// beyond requestCost.
func (c *conn) replySize(r request) int64 {
	if c.check(r) != nil {
		return 0
	}
	switch r.command {
	case cmdRead:
		return int64(r.length)
	case cmdCache:
		return min(int64(r.length), cacheStep)
	case cmdBlockStatus:
		return 4 * descriptorLen * min(int64(r.length), maxDescriptors) // the extents and their encoding
	}
	return 0
}

// check returns why r must fail without a look at the disk, or nil.
func (c *conn) check(r request) *problem {
	allowed := uint16(0)
	switch r.command {
	case cmdRead:
		if c.structured {
			allowed = cmdFlagDF
		}
	case cmdBlockStatus:
		allowed = cmdFlagReqOne
	case cmdCache, cmdFlush:
	case cmdWrite, cmdTrim, cmdWriteZeroes:
		return problemReadOnly
	default:
		return problemCommand
	}
	switch {
	case r.flags&^allowed != 0:
		return problemFlags
	case r.command == cmdFlush && (r.offset != 0 || r.length != 0):
		return problemFlush
	case !r.inside(c.export.size):
		return problemPastEnd
	case r.command == cmdBlockStatus && !c.allocation:
		return problemContext
	case r.command == cmdBlockStatus && r.length == 0:
		return problemNoLength
	case r.command != cmdBlockStatus && r.length > maxPayload:
		return c.tooLong()
	}
	return nil
}

// tooLong is the answer to a READ or CACHE beyond the maximum payload. Clients without structured
// replies do not expect EOVERFLOW.
func (c *conn) tooLong() *problem {
	p := &problem{errInval, fmt.Sprintf("the request is longer than %d bytes", maxPayload)}
	if c.structured {
		p.errno = errOverflow
	}
	return p
}

// execute carries out a request and returns the whole reply.
func (c *conn) execute(ctx context.Context, r request) *buffer {
	if p := c.check(r); p != nil {
		return c.failure(r, p)
	}
	var b *buffer
	var err error
	switch {
	case r.command == cmdRead && r.length > 0:
		b, err = c.read(ctx, r)
	case r.command == cmdBlockStatus:
		b, err = c.blockStatus(ctx, r)
	case r.command == cmdCache:
		b, err = c.cache(r)
	default:
		b = c.success(r)
	}
	if err != nil && ctx.Err() != nil {
		return c.failure(r, problemDisk) // nobody is there to receive it
	}
	if err != nil {
		c.log.ErrorContext(ctx, "cannot read an export's disk", slog.Uint64("offset", r.offset),
			slog.Uint64("length", uint64(r.length)), slog.Any("error", err))
		return c.failure(r, problemDisk)
	}
	return b
}

// success is the reply to a request that has nothing to say.
func (c *conn) success(r request) *buffer {
	b := newBuffer(chunkLen)
	if c.structured {
		b.b = appendChunk(b.b, chunkFlagDone, chunkNone, r.cookie, 0)
	} else {
		b.b = appendSimple(b.b, 0, r.cookie)
	}
	return b
}

// failure is an error reply.
//
// Source: NBD doc/proto.md, "NBD_REPLY_TYPE_ERROR".
func (c *conn) failure(r request, p *problem) *buffer {
	b := newBuffer(chunkLen + 6 + len(p.message))
	if !c.structured {
		b.b = appendSimple(b.b, p.errno, r.cookie)
		return b
	}
	b.b = appendChunk(b.b, chunkFlagDone, chunkError, r.cookie, 6+len(p.message))
	b.b = binary.BigEndian.AppendUint32(b.b, uint32(p.errno))
	b.b = binary.BigEndian.AppendUint16(b.b, uint16(len(p.message)))
	b.b = append(b.b, p.message...)
	return b
}

// read answers NBD_CMD_READ: in one simple reply, in one chunk, or in chunks of
// data and holes.
func (c *conn) read(ctx context.Context, r request) (*buffer, error) {
	whole := image.Extent{Off: int64(r.offset), Len: int64(r.length)}
	switch {
	case !c.structured:
		b := newBuffer(simpleLen + int(r.length))
		b.b = appendSimple(b.b, 0, r.cookie)
		return c.fill(b, whole)
	case r.flags&cmdFlagDF != 0 || r.length <= smallRead:
		b, err := c.readChunks(r, []image.Extent{whole})
		if err == nil && r.length <= smallRead && image.IsZero(b.b[dataChunkLen:]) {
			b.b = appendHole(b.b[:0], chunkFlagDone, r.cookie, whole)
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
func (c *conn) readChunks(r request, runs []image.Extent) (*buffer, error) {
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
			flags = chunkFlagDone
		}
		if e.Zero {
			b.b = appendHole(b.b, flags, r.cookie, e)
			continue
		}
		b.b = appendChunk(b.b, flags, chunkOffsetData, r.cookie, 8+int(e.Len))
		b.b = binary.BigEndian.AppendUint64(b.b, uint64(e.Off))
		var err error
		if b, err = c.fill(b, e); err != nil {
			return nil, err
		}
	}
	return b, nil
}

func appendHole(b []byte, flags uint16, cookie uint64, e image.Extent) []byte {
	b = appendChunk(b, flags, chunkOffsetHole, cookie, 12)
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
func (c *conn) blockStatus(ctx context.Context, r request) (*buffer, error) {
	limit := maxDescriptors
	if r.flags&cmdFlagReqOne != 0 {
		limit = 1
	}
	extents, err := c.extents(ctx, r, limit)
	if err != nil {
		return nil, err
	}
	payload := 4 + descriptorLen*len(extents)
	b := newBuffer(chunkLen + payload)
	b.b = appendChunk(b.b, chunkFlagDone, chunkBlockStatus, r.cookie, payload)
	b.b = binary.BigEndian.AppendUint32(b.b, allocationID)
	for _, e := range extents {
		state := stateData
		if e.Zero {
			state = stateHole
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
func (c *conn) extents(ctx context.Context, r request, limit int) ([]image.Extent, error) {
	var found []image.Extent
	pos, pieces := int64(r.offset), 0
	for e, err := range c.export.Disk.Extents(ctx, pos, int64(r.length)) {
		if err == nil && e.Off != pos {
			err = errMap
		}
		if err != nil && len(found) == 0 {
			return nil, err
		}
		if err != nil {
			return found, nil
		}
		e.Len = min(e.Len, r.end()-pos)
		switch n := len(found); {
		case n > 0 && found[n-1].Zero == e.Zero:
			found[n-1].Len += e.Len
		case n == limit:
			return found, nil
		case e.Len > 0:
			found = append(found, e)
		}
		pos = e.End()
		if pieces++; pieces == maxPieces || pos == r.end() {
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
func (c *conn) cache(r request) (*buffer, error) {
	b := newBuffer(int(min(r.length, cacheStep)))
	for pos := int64(r.offset); pos < r.end(); pos += cacheStep {
		b.b = b.b[:0]
		if _, err := c.fill(b, image.Extent{Off: pos, Len: min(cacheStep, r.end()-pos)}); err != nil {
			return nil, err
		}
	}
	b.free()
	return c.success(r), nil
}
