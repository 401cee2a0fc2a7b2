package blockstore

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math/bits"
	"os"
	"slices"
	"syscall"
)

// minQuarantine is how many records a quarantine can hold in any repository; in
// one of 64 times as many and more it is a 64th of them.
const minQuarantine = 4 << 20

// quarantine holds the segments that a collection has taken out of the live set and the index,
// and whose files are still there. They go once a confirmation has shown that nothing of them
// is missed; if it is, or if the collection ends before, they come back. After a crash
// the next opening enters them again.
type quarantine struct {
	segments []quarantined
	prefixes []uint64 // of the ids of all records in them
	limit    int      // of prefixes
	size     int64    // of the files, bytes
}

// quarantined is a segment in quarantine.
type quarantined struct {
	seg    *segment
	copied int64 // bytes that were stored elsewhere for it
}

// add puts a segment into quarantine.
func (q *quarantine) add(seg *segment, entries []tocEntry, copied int64) {
	q.segments = append(q.segments, quarantined{seg, copied})
	q.size += seg.summary.Size
	for _, e := range entries {
		if !e.ID.IsNull() {
			q.prefixes = append(q.prefixes, prefixOf(e.ID))
		}
	}
}

func (q *quarantine) clear() {
	q.segments, q.prefixes, q.size = nil, q.prefixes[:0], 0
}

func prefixOf(id ID) uint64 { return binary.BigEndian.Uint64(id[:]) }

// idSet is a set of ids that are told apart by their first 8 bytes: it may say that it has
// an id that it has not.
type idSet struct {
	sorted []uint64
	from   []uint32 // where in sorted those with the same first bits begin, and one more
	shift  int      // to the first bits
}

// newIDSet returns the set of ids with prefixes, which are sorted, none twice; it keeps them.
func newIDSet(prefixes []uint64) idSet {
	first := max(1, bits.Len(uint(len(prefixes)/4))) // about four prefixes share their first bits
	s := idSet{sorted: prefixes, from: make([]uint32, 1<<first+1), shift: 64 - first}
	for _, p := range prefixes {
		s.from[p>>s.shift+1]++
	}
	for i := 1; i < len(s.from); i++ {
		s.from[i] += s.from[i-1]
	}
	return s
}

// find returns the place of a prefix in the set.
func (s idSet) find(prefix uint64) (int, bool) {
	first := prefix >> s.shift
	from := int(s.from[first])
	for i, p := range s.sorted[from:s.from[first+1]] {
		if p == prefix {
			return from + i, true
		}
	}
	return 0, false
}

// release confirms that nothing in quarantine is missed and removes it for good.
func (c *collection) release(ctx context.Context) error {
	q := &c.quarantine
	if len(q.segments) == 0 {
		return nil
	}
	if err := c.confirm(ctx); err != nil {
		return errors.Join(err, c.putBack())
	}
	// Nothing needs these files. Stopped from here on, those that are left are
	// live again at the next opening.
	for len(q.segments) > 0 {
		seg := q.segments[0].seg
		err := c.r.fs.Remove(seg.path)
		if errors.Is(err, syscall.EPERM) { // it has become immutable since
			c.r.log.Warn("segment cannot be removed and stays", attrSegment(seg), attrErr(err))
			if err := c.r.revive(seg); err != nil {
				return errors.Join(err, c.putBack())
			}
			c.result.FreedBytes -= q.segments[0].copied
			q.segments = q.segments[1:]
			continue
		}
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return errors.Join(fmt.Errorf("remove segment: %w", err), c.putBack())
		}
		freed := seg.summary.Size - q.segments[0].copied
		c.result.FreedBytes += freed
		c.r.log.Debug("collected a segment", attrSegment(seg), slog.Int64("freed_bytes", freed))
		q.segments = q.segments[1:]
	}
	q.clear()
	return c.r.fs.SyncDir(c.r.segments.dir)
}

// putBack makes what is in quarantine live again. Of a record that was copied out the copy
// counts.
func (c *collection) putBack() error {
	var failed []error
	for _, q := range c.quarantine.segments {
		if err := c.r.revive(q.seg); err != nil {
			failed = append(failed, fmt.Errorf("enter segment %s again: %w; the next opening enters it", segmentName(q.seg.number, q.seg.generation, ""), err))
		}
	}
	c.quarantine.clear()
	return errors.Join(failed...)
}

// revive enters a sealed segment that was dropped into the live set and the index again, if it
// has a file.
func (r *Repository) revive(dropped *segment) error {
	seg := &segment{
		number: dropped.number, generation: dropped.generation,
		path: dropped.path, sealed: true, summary: dropped.summary,
	}
	r.segments.add(seg)
	_, err := r.entries(seg)
	if errors.Is(err, os.ErrNotExist) {
		r.segments.drop(seg) // a removal that failed has happened all the same
		return nil
	}
	if err == nil {
		err = r.enterMissing(seg)
	}
	if err != nil {
		// A chunk that is missed meanwhile is looked for in all segments, once more.
		r.reindexAgain()
		return err
	}
	return r.index.write(func(w indexWrite) error { return w.putSummary(seg.number, seg.summary) })
}

// short reports whether file system space is so short that what is in quarantine should go
// before a segment of which need bytes are copied.
func (c *collection) short(need int64) (bool, error) {
	free, total, err := c.r.fs.Space(c.r.dir)
	if err != nil {
		return false, err
	}
	keep := reserve(total)
	return free-need < keep && c.quarantine.size >= keep/4, nil
}

// confirmation walks the maps of all that may need a record in quarantine. It rests on the ids
// in the maps and on the tables of contents of the segments that hold copies, not on what the
// collection has marked or remembers to have copied.
type confirmation struct {
	c      *collection
	gone   idSet    // ids of the records in quarantine
	copies []uint64 // bitmap of those in gone that segments hold which came later
	walked map[walkedNode]struct{}
}

// walkedNode is a node that was walked at a level. Half an id tells nodes apart.
type walkedNode struct {
	id    [IDSize / 2]byte
	level uint8
}

// confirm fails if a listed point, a pinned map or a session needs a record that is in
// quarantine and nowhere else.
func (c *collection) confirm(ctx context.Context) error {
	slices.Sort(c.quarantine.prefixes)
	gone := newIDSet(slices.Compact(c.quarantine.prefixes))
	cf := &confirmation{c: c, gone: gone, copies: make([]uint64, len(gone.sorted)/64+1), walked: map[walkedNode]struct{}{}}
	total := c.marked
	done := func() { c.progress(PhaseConfirm, int64(len(cf.walked)), total) }
	done()
	if err := cf.findCopies(ctx); err != nil {
		return err
	}
	// Sessions first: one that is not there any more has listed its point, or has none.
	for _, n := range c.r.segments.sessionNeeds() {
		err := cf.session(ctx, n)
		if err != nil && c.r.appender.check(n.session.epoch) != nil {
			continue // what it put is cut off, and it can't commit
		}
		if err != nil {
			return fmt.Errorf("a running backup: %w", err)
		}
	}
	for _, root := range c.r.roots() {
		if err := cf.walk(ctx, c.r.tree(root.m), done); err != nil {
			return fmt.Errorf("%s: %w", root.label, err)
		}
	}
	return nil
}

// findCopies finds which of the ids in quarantine are in segments that were made since the collection
// began.
func (cf *confirmation) findCopies(ctx context.Context) error {
	r := cf.c.r
	if err := r.appender.finish(); err != nil {
		return err
	}
	for _, seg := range r.segments.sealedSegments() {
		if cf.c.old[seg] {
			continue
		}
		if err := cf.c.pace(ctx); err != nil {
			return err
		}
		entries, err := r.entries(seg)
		if err != nil {
			return err
		}
		for _, e := range entries {
			if k, ok := cf.gone.find(prefixOf(e.ID)); ok {
				cf.copies[k/64] |= 1 << (k % 64)
			}
		}
	}
	return nil
}

// session checks what a session needs: the children of the nodes that it put, what it put and no
// node lists yet.
func (cf *confirmation) session(ctx context.Context, n sessionNeeds) error {
	for _, id := range n.loose {
		if err := cf.check(ctx, id); err != nil {
			return err
		}
	}
	for _, id := range n.nodes {
		// Whatever the node's level: a child that is a node was put by the session too, or
		// belongs to a map that is pinned.
		if err := cf.walk(ctx, tree{id, 1}, func() {}); err != nil {
			return err
		}
	}
	return nil
}

// walk checks a subtree.
func (cf *confirmation) walk(ctx context.Context, t tree, done func()) error {
	if t.id.IsNull() {
		return nil
	}
	if err := cf.check(ctx, t.id); err != nil || t.level == 0 {
		return err
	}
	key := walkedNode{[IDSize / 2]byte(t.id[:]), uint8(t.level)}
	if _, ok := cf.walked[key]; ok {
		return nil
	}
	cf.walked[key] = struct{}{}
	if err := cf.c.pace(ctx); err != nil {
		return err
	}
	n, err := cf.c.r.node(t.id)
	if err != nil {
		return fmt.Errorf("a map node cannot be read, so nobody knows which chunks it needs; nothing was deleted: %w", err)
	}
	done()
	for i := range Fanout {
		if err := cf.walk(ctx, t.child(n, i), done); err != nil {
			return err
		}
	}
	return nil
}

// check fails if an id lay in quarantine and counts nowhere.
func (cf *confirmation) check(ctx context.Context, id ID) error {
	k, ok := cf.gone.find(prefixOf(id))
	if !ok || cf.copies[k/64]&(1<<(k%64)) != 0 {
		return nil
	}
	r := cf.c.r
	if err := cf.c.pace(ctx); err != nil {
		return err
	}
	if loc, ok, err := r.find(id); err != nil || ok && r.segments.holds(loc) {
		return err
	}
	// Somebody may be storing it at this moment.
	cl, mine := r.claims.take(id)
	if mine {
		r.claims.drop(id, cl)
	} else {
		<-cl.ready
	}
	if _, ok, err := r.locate(ctx, id); err != nil || ok {
		return err
	}
	return fmt.Errorf("internal error: chunk %.16s is needed and was about to be deleted; nothing was lost, %d segments are back where they were; please report this",
		id, len(cf.c.quarantine.segments))
}
