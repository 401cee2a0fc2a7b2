package blockstore

import (
	"context"
	"errors"

	"github.com/holdfast-backup/holdfast/image"
)

// maxDamagedExtents bounds the extents that DamagedExtents returns.
const maxDamagedExtents = 1 << 20

// DamagedExtents returns the parts of a disk that are known to be damaged, or found to be: chunks,
// and all that lies below a map node. In order, neighbours merged; behind the first 2^20 of them what
// lies between counts as damaged, too.
func (r *Repository) DamagedExtents(ctx context.Context, m Map) ([]image.Extent, error) {
	if !r.AnyDamaged() {
		return nil, nil
	}
	var out []image.Extent
	err := r.damagedBelow(ctx, r.tree(m), 0, m.Size, func(e image.Extent) {
		if n := len(out); n > 0 && (out[n-1].End() == e.Off || n == maxDamagedExtents) {
			out[n-1].Len = e.End() - out[n-1].Off
			return
		}
		out = append(out, e)
	})
	return out, err
}

// damagedBelow adds the damaged parts of a subtree that starts at start of a disk of a size.
func (r *Repository) damagedBelow(ctx context.Context, t tree, start, size int64, add func(image.Extent)) error {
	if t.id.IsNull() || start >= size {
		return ctx.Err()
	}
	bad := r.Damaged(t.id)
	var n Node
	if !bad && t.level > 0 {
		var err error
		n, err = r.node(t.id)
		if bad = errors.Is(err, ErrDamaged); err != nil && !bad {
			return err
		}
	}
	if bad {
		add(image.Extent{Off: start, Len: min(r.span(t.level), size-start)})
		return nil
	}
	if t.level == 0 {
		return nil
	}
	for i := range Fanout {
		if err := r.damagedBelow(ctx, t.child(n, i), start+int64(i)*r.span(t.level-1), size, add); err != nil {
			return err
		}
	}
	return nil
}
