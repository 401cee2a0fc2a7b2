package nbdserver

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"syscall"
	"time"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/nbdserver/internal/wire"
)

const (
	// smallRead is the length up to which a read looks for zeros in the bytes
	// and not in the disk's map, which costs more.
	smallRead = 16 << 10
	// minHole is the shortest hole inside a read that gets a chunk of its own.
	minHole = 4 << 10
	// maxLogged is how many errors of a disk, and how many of its map, are logged
	// one by one for a connection.
	maxLogged = 10
)

// problem is why a request fails: what the client is told.
type problem struct {
	errno   wire.Errno
	message string
}

var (
	problemReadOnly = &problem{wire.EPERM, "the export is read-only"}
	problemPastEnd  = &problem{wire.EINVAL, "the request reaches past the end of the export"}
	problemNoSpace  = &problem{wire.ENOSPC, "the request reaches past the end of the export"}
	problemFlags    = &problem{wire.EINVAL, "a command flag is unknown or does not apply"}
	problemCommand  = &problem{wire.EINVAL, "unknown command"}
	problemFlush    = &problem{wire.EINVAL, "a flush has no offset and no length"}
	problemContext  = &problem{wire.EINVAL, "no metadata context was negotiated"}
	problemContexts = &problem{wire.EINVAL, "the payload does not name some of the negotiated metadata contexts"}
	problemNoLength = &problem{wire.EINVAL, "the request has no length"}
	problemNotFast  = &problem{wire.ENOTSUP, "writing zeros without a hole is not fast"}
	problemDisk     = &problem{wire.EIO, "the disk could not be read or written"}
	problemFull     = &problem{wire.ENOSPC, "the disk has no room"}
	problemDenied   = &problem{wire.EPERM, "the disk cannot be changed"}
	problemShutdown = &problem{wire.ESHUTDOWN, "the export is being removed, or the server stops"}
	problemTooLong  = &problem{wire.EINVAL, fmt.Sprintf("the request is longer than %d bytes", wire.MaxPayload)}
	problemOverflow = &problem{wire.EOVERFLOW, problemTooLong.message}
)

// problemOf translates the error of a disk that executed j. That something is not
// permitted is an answer to changes only.
func problemOf(j job, err error) *problem {
	for _, e := range []error{syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG} {
		if errors.Is(err, e) {
			return problemFull
		}
	}
	for _, e := range []error{syscall.EPERM, syscall.EROFS} {
		if j.changes() && errors.Is(err, e) {
			return problemDenied
		}
	}
	return problemDisk
}

// flags returns the flags that a command may have, and false if it is unknown.
func (c *conn) flags(command uint16) (uint16, bool) {
	allowed := uint16(0)
	if c.writer != nil {
		allowed = wire.CmdFlagFUA // without effect on a command that writes nothing
	}
	switch command {
	case wire.CmdRead:
		if c.structured {
			allowed |= wire.CmdFlagDF
		}
	case wire.CmdWrite:
		if c.extended {
			allowed |= wire.CmdFlagPayloadLen
		}
	case wire.CmdWriteZeroes:
		allowed |= wire.CmdFlagNoHole | wire.CmdFlagFastZero
	case wire.CmdBlockStatus:
		allowed |= wire.CmdFlagReqOne
		if c.extended {
			allowed |= wire.CmdFlagPayloadLen
		}
	case wire.CmdFlush, wire.CmdTrim, wire.CmdCache:
	default:
		return 0, false
	}
	return allowed, true
}

// check returns why r must fail without a look at the disk, or nil.
//
// Source: NBD doc/proto.md, "Error values".
func (c *conn) check(r wire.Request) *problem {
	allowed, known := c.flags(r.Command)
	writes := r.Command == wire.CmdWrite || r.Command == wire.CmdTrim || r.Command == wire.CmdWriteZeroes
	switch {
	case !known:
		return problemCommand
	case writes && c.writer == nil:
		return problemReadOnly
	case r.Flags&^allowed != 0:
		return problemFlags
	case r.Flags&wire.CmdFlagPayloadLen != 0 && r.Command == wire.CmdBlockStatus:
		return nil // what is asked for stands in the payload
	case r.Command == wire.CmdFlush && (r.Offset != 0 || r.Length != 0):
		return problemFlush
	}
	return c.checkRange(r)
}

// checkRange is the part of check that concerns offset and length.
func (c *conn) checkRange(r wire.Request) *problem {
	const fastNoHole = wire.CmdFlagFastZero | wire.CmdFlagNoHole
	switch {
	case !r.Inside(c.export.size) && (r.Command == wire.CmdWrite || r.Command == wire.CmdWriteZeroes):
		return problemNoSpace
	case !r.Inside(c.export.size):
		return problemPastEnd
	case r.Command == wire.CmdWriteZeroes && r.Flags&fastNoHole == fastNoHole:
		return problemNotFast
	case r.Command == wire.CmdBlockStatus && len(c.contexts) == 0:
		return problemContext
	case r.Command == wire.CmdBlockStatus && r.Length == 0:
		return problemNoLength
	case (r.Command == wire.CmdRead || r.Command == wire.CmdCache) && r.Length > wire.MaxPayload:
		if c.structured {
			return problemOverflow
		}
		return problemTooLong // clients without structured replies do not expect EOVERFLOW
	}
	return nil
}

// laneCost is what a job takes of the lane.
func (j job) laneCost() int64 { return bufferCost(int(j.length)) - headerRoom }

// perform executes a job, notes whether the disk was quick, and queues the
// reply. The caller has taken what the job needs; the slot is given back here.
func (c *conn) perform(ctx context.Context, j job) {
	b := j.payload
	if b == nil {
		room := j.length
		if j.need > 0 {
			room = j.need - headerRoom
		}
		b = newBuffer(int(room))
		b.cost = j.need
	}
	if j.whole {
		b.lane = j.laneCost()
	}
	p := j.problem
	if p == nil {
		began := time.Now()
		err := c.execute(ctx, j, b)
		if j.Command == wire.CmdRead || j.Command == wire.CmdWrite {
			c.note(time.Since(began), j.length)
		}
		c.export.slots.leave()
		p = c.problem(ctx, j, err)
	}
	c.answer(j, b, p)
}

// note keeps score of how quick the disk is with small jobs, and whether it is
// prompt with large ones. A slow job costs as many points as quick ones could have
// been done meanwhile, but no more than slowest, since every disk is slow once in a
// while on a busy machine.
func (c *conn) note(took time.Duration, length int64) {
	if length > smallReply {
		c.queue.note(took)
		return
	}
	was := c.quick.Load()
	score := was + 1
	if took > quickly {
		score = was - min(int64(took/quickly), slowest)
	}
	if score = min(max(score, 0), bestScore); score != was {
		c.quick.Store(score) // what another job adds at the same time may be lost
	}
}

// problem translates what execute returned, and logs the first error of a
// request, within limits.
func (c *conn) problem(ctx context.Context, j job, err error) *problem {
	if err == nil {
		return nil
	}
	p := problemOf(j, err)
	first := j.parts == nil || j.parts.problem.CompareAndSwap(nil, p)
	if first && ctx.Err() == nil && c.diskErrors.Add(1) <= maxLogged {
		c.log.ErrorContext(ctx, "cannot use an export's disk", slog.Int("command", int(j.Command)), slog.Uint64("offset", j.Offset),
			slog.Uint64("length", j.Length), slog.Any("error", err))
	}
	return p
}

// answer queues the reply to a job, which b holds unless there is a problem.
func (c *conn) answer(j job, b *buffer, p *problem) {
	if j.payload != nil {
		if j.parts != nil && j.parts.left.Add(-1) > 0 {
			c.queue.give(b.cost)
			b.free()
			return
		}
		if j.parts != nil {
			p = j.parts.problem.Load()
		}
		j.parts = nil
	}
	switch {
	case p != nil:
		b.b = b.b[:0]
		c.fail(b, j, p)
	case len(b.b) == 0 && j.parts == nil:
		c.succeed(b, j.Request)
	}
	if b.lane == 0 {
		b = c.shrink(b)
	}
	if j.parts != nil {
		c.out.addPart(b, j.parts, func(b *buffer) { c.chunk(b, j.Request, wire.ChunkNone, 0) })
		return
	}
	if c.structured {
		b.done()
	}
	c.out.add(b)
}

// shrink moves a reply to a smaller buffer if it does not fill half of the one
// that it is in.
func (c *conn) shrink(b *buffer) *buffer {
	cost := bufferCost(len(b.b))
	if cost > b.cost/2 {
		return b
	}
	small := newBuffer(len(b.b))
	small.b = append(small.b, b.b...)
	small.last, small.cost = b.last, cost
	c.queue.give(b.cost - cost)
	b.free()
	return small
}

// execute carries out a job and fills b with the reply; one that just says that
// all went well may be left empty.
func (c *conn) execute(ctx context.Context, j job, b *buffer) error {
	if j.parts != nil && j.parts.problem.Load() != nil {
		return nil // the client knows, or will
	}
	switch j.Command {
	case wire.CmdRead:
		return c.read(ctx, j, b)
	case wire.CmdBlockStatus:
		return c.blockStatus(ctx, j, b)
	case wire.CmdCache:
		return c.cache(ctx, j, b)
	case wire.CmdWrite:
		return c.write(j, b)
	case wire.CmdTrim:
		return c.change(j, c.writer.Trim)
	case wire.CmdWriteZeroes:
		return c.writeZeroes(ctx, j)
	}
	return c.sync() // a flush
}

// chunk appends the header of a chunk whose payload has n bytes.
func (c *conn) chunk(b *buffer, r wire.Request, kind uint16, n int) {
	b.last = len(b.b)
	if c.extended {
		b.b = wire.AppendExtendedChunk(b.b, 0, kind, r.Cookie, r.Offset, n)
	} else {
		b.b = wire.AppendChunk(b.b, 0, kind, r.Cookie, n)
	}
}

// succeed fills b with a reply that has nothing to say.
func (c *conn) succeed(b *buffer, r wire.Request) {
	if c.structured {
		c.chunk(b, r, wire.ChunkNone, 0)
	} else {
		b.b = wire.AppendSimple(b.b, 0, r.Cookie)
	}
}

// fail fills b with an error. A part of a reply tells where it is.
//
// Source: NBD doc/proto.md, "NBD_REPLY_TYPE_ERROR" and "NBD_REPLY_TYPE_ERROR_OFFSET".
func (c *conn) fail(b *buffer, j job, p *problem) {
	if !c.structured {
		b.b = wire.AppendSimple(b.b, p.errno, j.Cookie)
		return
	}
	if j.parts != nil {
		c.chunk(b, j.Request, wire.ChunkErrorOffset, 14+len(p.message))
	} else {
		c.chunk(b, j.Request, wire.ChunkError, 6+len(p.message))
	}
	b.b = binary.BigEndian.AppendUint32(b.b, uint32(p.errno))
	b.b = binary.BigEndian.AppendUint16(b.b, uint16(len(p.message)))
	b.b = append(b.b, p.message...)
	if j.parts != nil {
		b.b = binary.BigEndian.AppendUint64(b.b, uint64(j.off))
	}
}

// read answers NBD_CMD_READ: in one simple reply, in one chunk, or in chunks of
// data and holes.
func (c *conn) read(ctx context.Context, j job, b *buffer) error {
	whole := image.Extent{Off: j.off, Len: j.length}
	switch {
	case j.length == 0:
		return nil
	case !c.structured:
		b.b = wire.AppendSimple(b.b, 0, j.Cookie)
		return image.ReadFull(c.export.Disk, b.extend(int(j.length)), j.off)
	case j.Flags&wire.CmdFlagDF == 0 && j.length > smallRead:
		for _, e := range c.runs(ctx, whole) {
			if err := c.readRun(j.Request, e, b); err != nil {
				return err
			}
		}
		return nil
	}
	err := c.readRun(j.Request, whole, b)
	if err == nil && j.length <= smallRead && image.IsZero(b.b[len(b.b)-int(j.length):]) {
		b.b = b.b[:0]
		whole.Zero = true
		err = c.readRun(j.Request, whole, b)
	}
	return err
}

// readRun appends a chunk for a range that is sent as data or as a hole.
//
// Source: NBD doc/proto.md, "NBD_REPLY_TYPE_OFFSET_DATA" and "NBD_REPLY_TYPE_OFFSET_HOLE".
func (c *conn) readRun(r wire.Request, e image.Extent, b *buffer) error {
	if e.Zero {
		c.chunk(b, r, wire.ChunkOffsetHole, 12)
		b.b = binary.BigEndian.AppendUint64(b.b, uint64(e.Off))
		b.b = binary.BigEndian.AppendUint32(b.b, uint32(e.Len))
		return nil
	}
	c.chunk(b, r, wire.ChunkOffsetData, 8+int(e.Len))
	b.b = binary.BigEndian.AppendUint64(b.b, uint64(e.Off))
	return image.ReadFull(c.export.Disk, b.extend(int(e.Len)), e.Off)
}

// runs cuts a range into what is sent as data and as holes. Whatever the disk's
// map does not clearly call a hole is data; so is all that follows an error of
// the map, since reading may still work.
func (c *conn) runs(ctx context.Context, whole image.Extent) []image.Extent {
	var runs []image.Extent
	pos := whole.Off
	for e, err := range image.Coalesce(c.export.Disk.Extents(ctx, whole.Off, whole.Len)) {
		if err != nil && ctx.Err() != nil {
			break // nobody is there to receive what is read
		}
		if err != nil {
			if c.mapErrors.Add(1) <= maxLogged {
				c.log.WarnContext(ctx, "cannot read the map of an export's disk", slog.Int64("offset", pos), slog.Any("error", err))
			}
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

// cache answers NBD_CMD_CACHE: it has the disk prefetch the range or, if that
// cannot be, reads it, which warms the caches below.
func (c *conn) cache(ctx context.Context, j job, b *buffer) error {
	if c.streams.disk != nil {
		if j.length > 0 {
			c.streams.disk.Prefetch(j.off, j.length)
		}
		return nil
	}
	for pos := j.off; pos < j.off+j.length; pos += pieceLen {
		if err := c.pause(ctx, pos > j.off); err != nil {
			return err
		}
		p := b.b[:min(pieceLen, j.off+j.length-pos)]
		if err := image.ReadFull(c.export.Disk, p, pos); err != nil {
			return err
		}
	}
	return nil
}

// pause lets others use the disk between two steps of a long operation. It fails
// when ctx is done.
func (c *conn) pause(ctx context.Context, between bool) error {
	if err := ctx.Err(); err != nil || !between {
		return err
	}
	c.export.slots.leave()
	return c.export.slots.enter(context.WithoutCancel(ctx))
}
