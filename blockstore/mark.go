package blockstore

import (
	"context"
	"fmt"
	"math"
	"slices"
)

// maxMarking is how many ids are marked in one pass over the maps; half of that at
// least, but in the last.
const maxMarking = 4 << 20

// marking is a pass over all maps for the ids whose prefixes lie in [low, high]. What it
// finds is looked for in the tables of contents of the segments, which are read in their order: that
// costs a hundredth of as many looks into the index.
type marking struct {
	c         *collection
	low, high uint64
	needed    []uint64
	walked    map[walkedNode]struct{}
	places    []foundAt // of the records found, for each id in the set of those needed

	// What same has read: the entries of a segment.
	read    uint32
	entries []tocEntry
}

// foundAt is where a record was found: the position of its segment among those marked, from 1, and
// its ordinal there.
type foundAt struct{ segment, ordinal uint32 }

// mark marks what the roots need in the segments.
func (c *collection) mark(ctx context.Context, roots []root, segments []*segment) error {
	needed := make([]uint64, 0, min(c.pass, 2*c.records+Fanout))
	// Prefixes are spread evenly, so that many passes are of about the same size, and none is too large.
	share := math.MaxUint64 / uint64(1+c.records/(max(c.pass/4, 1)*3))
	for low := uint64(0); ; {
		high := low + share
		if high < low {
			high = math.MaxUint64
		}
		m := &marking{c: c, low: low, high: high, needed: needed[:0], walked: map[walkedNode]struct{}{}}
		last := map[string]Map{} // of each disk, the map that was walked last
		for _, root := range roots {
			if err := m.walk(ctx, c.r.tree(root.m), c.r.tree(last[root.disk])); err != nil {
				return fmt.Errorf("%s: %w", root.label, err)
			}
			last[root.disk] = root.m
		}
		c.marked = int64(len(m.walked))
		if err := m.find(ctx, segments); err != nil {
			return err
		}
		if m.high == math.MaxUint64 {
			return nil
		}
		low, needed = m.high+1, m.needed
	}
}

// walk adds what a subtree needs. What it has in common with like, which was walked, is
// passed over.
func (m *marking) walk(ctx context.Context, t, like tree) error {
	if t.id.IsNull() || t == like {
		return nil
	}
	m.need(t.id)
	if t.level == 0 {
		return nil
	}
	key := walkedNode{[IDSize / 2]byte(t.id[:]), uint8(t.level)}
	if _, ok := m.walked[key]; ok {
		return nil
	}
	m.walked[key] = struct{}{}
	if err := m.c.pace(ctx); err != nil {
		return err
	}
	n, err := m.c.r.node(t.id)
	if err != nil {
		return fmt.Errorf("a map node cannot be read, so nobody knows which chunks it needs; nothing was collected; verify tells which points need it: delete them first: %w", err)
	}
	m.c.progress(PhaseMark, int64(len(m.walked)), m.c.nodes)
	var alike Node
	if like.level == t.level {
		alike, _ = m.c.r.node(like.id) // it only saves work
	}
	for i := range Fanout {
		below := tree{level: -1}
		if alike != nil {
			below = like.child(alike, i)
		}
		if err := m.walk(ctx, t.child(n, i), below); err != nil {
			return err
		}
	}
	return nil
}

// need adds an id. If there are too many, those with the higher prefixes are left to a later pass.
func (m *marking) need(id ID) {
	p := prefixOf(id)
	if p < m.low || p > m.high {
		return
	}
	if len(m.needed) == cap(m.needed) {
		slices.Sort(m.needed)
		m.needed = slices.Compact(m.needed)
		if half := cap(m.needed) / 2; len(m.needed) > half {
			m.needed = m.needed[:half]
			m.high = m.needed[half-1]
		}
		if p > m.high {
			return
		}
	}
	m.needed = append(m.needed, p)
}

// find marks the records of the ids that are needed. Of a chunk that is stored more than once, the
// record that the index knows is marked, and the others if it knows none of them.
func (m *marking) find(ctx context.Context, segments []*segment) error {
	slices.Sort(m.needed)
	set := newIDSet(slices.Compact(m.needed))
	m.places = make([]foundAt, len(set.sorted))
	for i, seg := range segments {
		if err := m.c.pace(ctx); err != nil {
			return err
		}
		if m.c.unlisted[seg] {
			continue
		}
		entries, err := m.c.r.entries(seg)
		if away(err) {
			return err
		}
		if err != nil {
			m.c.unlisted[seg] = true
			m.c.leave(seg, err)
			continue
		}
		for ordinal, e := range entries {
			p := prefixOf(e.ID)
			if e.ID.IsNull() || p < m.low || p > m.high {
				continue
			}
			if k, ok := set.find(p); ok {
				if err := m.found(segments, k, foundAt{uint32(i + 1), uint32(ordinal)}, e.ID); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// found marks the record of the k-th id that is needed.
func (m *marking) found(segments []*segment, k int, at foundAt, id ID) error {
	r, live := m.c.r, m.c.live
	here := location{Segment: segments[at.segment-1].number, Ordinal: at.ordinal}
	first := m.places[k]
	if first == (foundAt{}) {
		m.places[k] = at
		live.set(here)
		return nil
	}
	there := location{Segment: segments[first.segment-1].number, Ordinal: first.ordinal}
	known, ok, err := r.index.get(id)
	if err != nil {
		return err
	}
	switch {
	case !ok || !r.segments.holds(known) || r.Damaged(id) || !m.same(segments, first, id):
		live.set(here)
	case known.Segment == here.Segment && known.Ordinal == here.Ordinal:
		m.places[k] = at
		live.clear(there)
		live.set(here)
	}
	return nil
}

// same reports whether a record that was found is that of id, and not of another whose prefix is
// the same.
func (m *marking) same(segments []*segment, at foundAt, id ID) bool {
	if m.read != at.segment {
		entries, err := m.c.r.entries(segments[at.segment-1])
		if err != nil {
			return false
		}
		m.read, m.entries = at.segment, entries
	}
	return int(at.ordinal) < len(m.entries) && m.entries[at.ordinal].ID == id
}
