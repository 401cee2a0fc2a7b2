package nbdserver

import (
	"context"
	"encoding/binary"
	"errors"
	"iter"
	"slices"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/nbdserver/internal/wire"
)

// maxPieces bounds what is read of a metadata context for one request.
const maxPieces = 1 << 16

// allocation is the metadata context base:allocation of a disk.
//
// Source: NBD doc/proto.md, "The base: metadata context namespace".
type allocation struct{ disk image.Disk }

// Status implements Context.
func (a allocation) Status(ctx context.Context, off, length int64) iter.Seq2[Status, error] {
	return func(yield func(Status, error) bool) {
		for e, err := range a.disk.Extents(ctx, off, length) {
			s := Status{Off: e.Off, Len: e.Len}
			if e.Zero {
				s.Flags = wire.StateHole | wire.StateZero
			}
			if !yield(s, err) {
				return
			}
		}
	}
}

// readContexts reads the payload of a block status: the length of its effect and
// the contexts that it asks for, one at least unless there is a problem.
//
// Source: NBD doc/proto.md of branch extension-ext-header, "NBD_CMD_BLOCK_STATUS".
func (c *conn) readContexts(r wire.Request) (length uint64, asked []selected, p *problem, err error) {
	ids := int(r.Length)/4 - 2
	if r.Length%4 != 0 || ids < 1 || ids > len(c.contexts) {
		return 0, nil, problemContexts, c.discard(int(r.Length))
	}
	payload := make([]byte, r.Length)
	if err := c.readFull(payload); err != nil {
		return 0, nil, nil, err
	}
	d := wire.Decoder{P: payload}
	length = d.Uint64()
	for range ids {
		id := d.Uint32()
		is := func(s selected) bool { return s.id == id }
		i := slices.IndexFunc(c.contexts, is)
		if i < 0 || slices.ContainsFunc(asked, is) {
			return 0, nil, problemContexts, nil
		}
		asked = append(asked, c.contexts[i])
	}
	r.Length = length
	return length, asked, c.checkRange(r), nil
}

// blockStatus answers NBD_CMD_BLOCK_STATUS for one metadata context, with as
// many extents as fit.
//
// Source: NBD doc/proto.md, "NBD_REPLY_TYPE_BLOCK_STATUS", and its branch
// extension-ext-header, "NBD_REPLY_TYPE_BLOCK_STATUS_EXT".
func (c *conn) blockStatus(ctx context.Context, j job, b *buffer) error {
	kind, head, each := wire.ChunkBlockStatus, 4, wire.DescriptorLen
	if c.extended {
		kind, head, each = wire.ChunkBlockStatusExt, 8, wire.ExtendedDescriptorLen
	}
	limit := (pieceLen - head) / each
	if j.Flags&wire.CmdFlagReqOne != 0 {
		limit = 1
	}
	c.chunk(b, j.Request, kind, 0)
	start := len(b.b)
	b.extend(head)
	count := 0
	add := func(s Status) bool {
		count++
		if c.extended {
			b.b = binary.BigEndian.AppendUint64(b.b, uint64(s.Len))
			b.b = binary.BigEndian.AppendUint64(b.b, uint64(s.Flags))
		} else {
			b.b = binary.BigEndian.AppendUint32(b.b, uint32(s.Len)) // no longer than the request
			b.b = binary.BigEndian.AppendUint32(b.b, s.Flags)
		}
		return count < limit
	}
	if err := statuses(ctx, j, add); err != nil {
		return err
	}
	binary.BigEndian.PutUint32(b.b[start:], j.contexts[0].id)
	if c.extended {
		binary.BigEndian.PutUint32(b.b[start+4:], uint32(count))
	}
	binary.BigEndian.PutUint32(b.b[start-4:], uint32(len(b.b)-start)) // the low half of an extended length
	return nil
}

var errMap = errors.New("the disk's map has a gap")

// statuses calls add with the statuses of the disk from the job's offset on,
// neighbours merged, until it wants no more, and reads no more of the context
// than that takes. They may end before the job does: clients ask again for the
// rest, and meet an error of the context then. There is at least one, or an
// error.
func statuses(ctx context.Context, j job, add func(Status) bool) error {
	pos, end := j.off, j.off+j.length
	var held Status
	pieces, full := 0, false
	for s, err := range j.contexts[0].Status(ctx, pos, j.length) {
		if err == nil && s.Off != pos {
			err = errMap
		}
		if err != nil {
			if held.Len == 0 {
				return err
			}
			break
		}
		s.Len = min(s.Len, end-pos)
		switch {
		case s.Len <= 0:
		case held.Len > 0 && held.Flags == s.Flags:
			held.Len += s.Len
		default:
			if held.Len > 0 && !add(held) {
				full = true
			}
			held = s
		}
		pos += max(s.Len, 0)
		if pieces++; full || pieces == maxPieces || pos == end {
			break
		}
	}
	if held.Len == 0 {
		return errMap
	}
	if !full {
		add(held)
	}
	return nil
}
