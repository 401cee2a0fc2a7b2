package blockstore

import (
	"context"
	"fmt"
	"iter"

	"github.com/holdfast-backup/holdfast/image"
)

const (
	// Fanout is the number of children of a map node.
	Fanout = 1024
	// nodeSize is the length of a map node in bytes.
	nodeSize = Fanout * IDSize
)

// Map names the content of a whole disk: the root of its tree.
type Map struct {
	Root ID    `json:"root"`
	Size int64 `json:"size_bytes"` // of the disk
	Data int64 `json:"data_bytes"` // bytes of the chunks that are not zero
}

func (m Map) check(chunkSize int) error {
	if m.Size < 0 || m.Size > image.MaxSize {
		return fmt.Errorf("disk of %d bytes", m.Size)
	}
	if m.Data < 0 || m.Data > m.Size+int64(chunkSize) || m.Data%int64(chunkSize) != 0 {
		return fmt.Errorf("disk of %d bytes with %d bytes of data", m.Size, m.Data)
	}
	return nil
}

// Node is a map node: the ids of its children, chunks or nodes one level down. It
// must not be changed.
type Node []byte

// Child returns the i-th child's id.
func (n Node) Child(i int) ID { return ID(n[i*IDSize:]) }

// tree is a subtree of a map: a node's id and its level. Level 0 is a chunk;
// a node of level 1, a leaf, lists chunks.
type tree struct {
	id    ID
	level int
}

// tree returns a map's whole tree.
func (r *Repository) tree(m Map) tree {
	level := 1
	for span := r.span(1); span < m.Size; span *= Fanout {
		level++
	}
	return tree{m.Root, level}
}

// span returns how many bytes of a disk a subtree of a level covers.
func (r *Repository) span(level int) int64 {
	span := int64(r.chunkSize)
	for range level {
		span *= Fanout
	}
	return span
}

// Leaf returns the node that lists the chunks of bytes [i*LeafSpan,
// (i+1)*LeafSpan) of a disk; nil if they are all zeros.
func (r *Repository) Leaf(m Map, i int64) (Node, error) {
	t := r.tree(m)
	if i*r.LeafSpan() >= m.Size {
		return nil, nil
	}
	for t.level > 1 {
		n, err := r.node(t.id)
		if n == nil || err != nil {
			return nil, err
		}
		t.level--
		t.id = n.Child(int(i * r.LeafSpan() / r.span(t.level) % Fanout))
	}
	return r.node(t.id)
}

// LeafSpan is how many bytes of a disk one leaf covers.
func (r *Repository) LeafSpan() int64 { return r.span(1) }

// node reads a map node; the null id's is nil.
func (r *Repository) node(id ID) (Node, error) {
	if id.IsNull() {
		return nil, nil
	}
	return r.nodes.get(id, func() ([]byte, error) {
		n := make([]byte, nodeSize)
		return n, r.load(id, nodeRecord, n, true)
	})
}

// child returns the i-th subtree of a tree. A tree of a lower level than
// asked for stands for one of that level whose other children are zeros.
func (t tree) child(n Node, i int) tree {
	if n == nil {
		return tree{level: t.level - 1}
	}
	return tree{n.Child(i), t.level - 1}
}

// walk yields the extents of [off, end) of a map whose subtree t starts at
// start: what is not null is data. It returns false when the consumer has
// had enough.
func (r *Repository) walk(ctx context.Context, t tree, start, off, end int64, yield func(image.Extent, error) bool) bool {
	span := r.span(t.level)
	from, to := max(off, start), min(end, start+span)
	if from >= to {
		return true
	}
	if t.id.IsNull() || t.level == 0 {
		return yield(image.Extent{Off: from, Len: to - from, Zero: t.id.IsNull()}, nil)
	}
	if err := ctx.Err(); err != nil {
		yield(image.Extent{}, err)
		return false
	}
	n, err := r.node(t.id)
	if err != nil {
		yield(image.Extent{}, fmt.Errorf("map at offset %d: %w", start, err))
		return false
	}
	span /= Fanout
	for i := int((from - start) / span); i < Fanout; i++ {
		if !r.walk(ctx, t.child(n, i), start+int64(i)*span, off, end, yield) {
			return false
		}
		if start+int64(i+1)*span >= to {
			break
		}
	}
	return true
}

// DataBytes counts the bytes of the chunks of a map that are not zero.
func (r *Repository) DataBytes(ctx context.Context, m Map) (int64, error) {
	var n int64
	var failed error
	chunk := int64(r.chunkSize)
	r.walk(ctx, r.tree(m), 0, 0, (m.Size+chunk-1)/chunk*chunk, func(e image.Extent, err error) bool {
		if err == nil && !e.Zero {
			n += e.Len
		}
		failed = err
		return err == nil
	})
	return n, failed
}

// Diff yields the ranges of [off, off+length) in which two disks differ, in
// order, neighbours merged, in whole chunks clipped to that range and to the larger disk.
// Bytes past the end of the smaller disk count as zeros; so equal content in
// disks of two sizes differs nowhere. Subtrees that are the same, or outside the
// range, are not read.
func (r *Repository) Diff(ctx context.Context, a, b Map, off, length int64) iter.Seq2[image.Extent, error] {
	off, length = image.Clip(off, length, max(a.Size, b.Size))
	return image.Coalesce(func(yield func(image.Extent, error) bool) {
		r.diff(ctx, r.tree(a), r.tree(b), 0, off, off+length, yield)
	})
}

// diff compares two subtrees that start at start, as far as they lie in [off, end).
func (r *Repository) diff(ctx context.Context, a, b tree, start, off, end int64, yield func(image.Extent, error) bool) bool {
	level := max(a.level, b.level)
	if start >= end || start+r.span(level) <= off || a == b {
		return true
	}
	if a.id.IsNull() && b.id.IsNull() {
		return true
	}
	if level == 0 {
		from := max(start, off)
		return yield(image.Extent{Off: from, Len: min(start+int64(r.chunkSize), end) - from}, nil)
	}
	if err := ctx.Err(); err != nil {
		yield(image.Extent{}, err)
		return false
	}
	childA, err := r.children(a, level)
	if err == nil {
		var childB func(int) tree
		if childB, err = r.children(b, level); err == nil {
			span := r.span(level - 1)
			for i := range Fanout {
				if !r.diff(ctx, childA(i), childB(i), start+int64(i)*span, off, end, yield) {
					return false
				}
			}
			return true
		}
	}
	yield(image.Extent{}, fmt.Errorf("map at offset %d: %w", start, err))
	return false
}

// children returns the subtrees of t as if it were a tree of the given level,
// which is its own or a higher one.
func (r *Repository) children(t tree, level int) (func(i int) tree, error) {
	if t.level < level {
		return func(i int) tree {
			if i == 0 {
				return t
			}
			return tree{level: level - 1}
		}, nil
	}
	n, err := r.node(t.id)
	return func(i int) tree { return t.child(n, i) }, err
}
