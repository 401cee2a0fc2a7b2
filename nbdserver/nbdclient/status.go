package nbdclient

import (
	"context"
	"fmt"
	"iter"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/nbdserver/internal/wire"
)

// The longest range that block status is asked for, in bytes. Without extended
// headers lengths have 32 bits.
const (
	maxStatusLength         = 1 << 30
	maxStatusLengthExtended = 1 << 40
)

// Extents yields what [off, off+length) holds, see [image.Disk]. A server
// without base:allocation holds data everywhere.
func (c *Client) Extents(ctx context.Context, off, length int64) iter.Seq2[image.Extent, error] {
	off, length = image.Clip(off, length, c.export.size)
	if !c.export.has(wire.BaseAllocation) {
		return func(yield func(image.Extent, error) bool) {
			if err := c.pool.ended(); err != nil {
				yield(image.Extent{}, c.wrap(err))
			} else if length > 0 {
				yield(image.Extent{Off: off, Len: length}, nil)
			}
		}
	}
	return c.statuses(ctx, wire.BaseAllocation, off, length, func(flags uint64) bool {
		return flags&uint64(wire.StateZero) != 0
	})
}

// Changed yields the ranges of the disk that a metadata context of Options.Contexts calls
// changed, such as "qemu:dirty-bitmap:NAME": in order and not adjacent. A range
// with any flag counts as changed, also with one that is unknown. A context that
// the server did not grant is [ErrNoContext].
func (c *Client) Changed(ctx context.Context, name string) iter.Seq2[image.Extent, error] {
	return func(yield func(image.Extent, error) bool) {
		if !c.export.has(name) {
			yield(image.Extent{}, c.wrap(fmt.Errorf("%w: %q", ErrNoContext, name)))
			return
		}
		clean := func(flags uint64) bool { return flags == 0 }
		for e, err := range image.Coalesce(c.statuses(ctx, name, 0, c.export.size, clean)) {
			if err == nil && e.Zero { // which stands for clean here
				continue
			}
			if !yield(e, err) {
				return
			}
		}
	}
}

// statuses yields the block status of a range inside the disk, Zero being what
// mark says of an extent's flags.
func (c *Client) statuses(ctx context.Context, name string, off, length int64, mark func(flags uint64) bool) iter.Seq2[image.Extent, error] {
	return func(yield func(image.Extent, error) bool) {
		pos, end := off, off+length
		for pos < end {
			r, err := c.blockStatus(ctx, name, pos, end)
			if err != nil {
				yield(image.Extent{}, c.wrap(fmt.Errorf("block status %q at %d: %w", name, pos, err)))
				return
			}
			from := int64(r.Offset)
			for _, e := range r.extents {
				to := from + int64(min(e.length, uint64(end-from)))
				if to > pos {
					if !yield(image.Extent{Off: pos, Len: to - pos, Zero: mark(e.flags)}, nil) {
						return
					}
					pos = to
				}
				from = to
			}
		}
	}
}

// blockStatus asks for the block status of a context at pos, up to end at most.
// The answer covers at least the byte at pos.
func (c *Client) blockStatus(ctx context.Context, name string, pos, end int64) (*request, error) {
	minimum := c.export.minimum
	from := pos - pos%minimum
	longest := int64(maxStatusLength)
	if c.export.replies == extended {
		longest = maxStatusLengthExtended
	}
	to := min((end+minimum-1)/minimum*minimum, from+longest, c.export.size)
	var tries tries
	for {
		r := &request{
			Request: wire.Request{Command: wire.CmdBlockStatus, Offset: uint64(from), Length: uint64(to - from)},
			context: name,
		}
		err := c.ask(ctx, r)
		switch {
		case err == nil && r.covers(pos):
			return r, nil
		case err == nil:
			return nil, fmt.Errorf("%w: a block status reply that does not reach what was asked", ErrProtocol)
		case ctx.Err() != nil || !r.retry || !tries.another(c.options):
			return nil, err
		}
	}
}

// covers reports whether the block status received tells of the byte at pos.
func (r *request) covers(pos int64) bool {
	ahead := uint64(pos) - r.Offset
	for _, e := range r.extents {
		if e.length > ahead {
			return true
		}
		ahead -= e.length
	}
	return false
}

// ask sends a request for block status and waits for the answer, or for the end
// of ctx: then the request is left to its connection.
func (c *Client) ask(ctx context.Context, r *request) error {
	select {
	case c.status <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	conn, err := c.acquire(ctx)
	if err != nil {
		<-c.status
		return err
	}
	answered := make(chan struct{})
	r.prepare(func(*request) {
		<-c.status
		close(answered)
	})
	conn.send(r)
	select {
	case <-answered:
		return r.err
	case <-ctx.Done():
		return ctx.Err()
	}
}
