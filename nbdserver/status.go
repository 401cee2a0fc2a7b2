package nbdserver

import (
	"context"
	"iter"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/nbdserver/internal/wire"
)

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
