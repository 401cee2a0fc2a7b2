package blockstore

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"
)

// CollectOptions say how much a collection does. The zero value gives back
// every byte that no point needs.
type CollectOptions struct {
	// DryRun only tells what would be freed.
	DryRun bool
	// MaxUnused is the share of dead bytes, 0 to 1, that a segment may
	// keep. Taking a dead record out of a segment copies the live ones.
	MaxUnused float64
	// Progress, if set, hears how far the collection is.
	Progress func(CollectProgress)
}

// CollectPhase is a part of a collection.
type CollectPhase string

// The phases. Mark comes once, then sweep and confirm, in turn if there is much to
// take.
const (
	PhaseMark    CollectPhase = "mark"    // finds what is needed: map nodes
	PhaseSweep   CollectPhase = "sweep"   // takes segments out of use: bytes
	PhaseConfirm CollectPhase = "confirm" // proves that nothing of them is missed: map nodes
)

// CollectProgress tells how far a phase is. Total of map nodes is the most that there can be.
type CollectProgress struct {
	Phase       CollectPhase
	Done, Total int64
}

// CollectResult tells what a collection found and did.
type CollectResult struct {
	LiveChunks int64 `json:"live_chunks"` // records that points need, map nodes included
	DeadChunks int64 `json:"dead_chunks"` // records that nobody needs
	DeadBytes  int64 `json:"dead_bytes"`  // what those take
	FreedBytes int64 `json:"freed_bytes"` // given back to the file system; of a dry run, about what would be
	// ImmutableBytes are those of DeadBytes that stay because their files carry the immutable
	// attribute.
	ImmutableBytes int64 `json:"immutable_bytes"`
}

// Small segments are put together once there are smallCount of them that are
// below 1/smallShare of the size at which a segment is sealed.
const (
	smallShare = 8
	smallCount = 16
)

// collectShare is the part of the reserve that a collection leaves: see checkSpace.
const collectShare = 2

// ErrCollecting means that a collection is running already.
var ErrCollecting = errors.New("a collection is running already")

// Collect gives back the space of chunks that no point, no open disk and no
// running session needs: it marks what is needed, copies it out of the
// segments that hold much else, and removes those. Everything else may run
// meanwhile. It may be stopped at any moment.
func (r *Repository) Collect(ctx context.Context, o CollectOptions) (CollectResult, error) {
	if !r.maintenance.TryLock() {
		return CollectResult{}, ErrCollecting
	}
	defer r.maintenance.Unlock()
	if err := r.settle(); err != nil {
		return CollectResult{}, fmt.Errorf("collect: the folder of points cannot be brought in order: %w", err)
	}
	if err := r.collectable(); err != nil {
		return CollectResult{}, err
	}
	if !o.DryRun {
		if err := r.purge(); err != nil {
			return CollectResult{}, fmt.Errorf("collect: deleted points cannot be purged: %w", err)
		}
	}
	if err := r.appender.finish(); err != nil {
		return CollectResult{}, err
	}
	r.reindexAgain()
	c := r.newCollection(o)
	candidates := r.segments.sealedSegments()
	roots := c.begin(candidates)
	defer c.end()
	if err := c.mark(ctx, roots, candidates); err != nil {
		return CollectResult{}, fmt.Errorf("collect: %w", err)
	}
	err := c.sweep(ctx, candidates)
	if err != nil {
		err = errors.Join(err, c.putBack())
	}
	return c.result, err
}

// collection is one run of Collect.
type collection struct {
	r        *Repository
	o        CollectOptions
	pass     int               // ids that are marked in one pass
	live     marks             // of this goroutine
	unlisted map[*segment]bool // segments whose records could not be listed
	marked   int64             // nodes that a walk over all maps comes to

	// At the start:
	old     map[*segment]bool // the sealed segments
	size    int64             // of those, bytes
	records int               // in those
	nodes   int64             // in those

	quarantine quarantine
	unchecked  int64     // bytes that may be copied before the space is looked at
	slice      time.Time // when the work began that pace measures
	result     CollectResult
}

func (r *Repository) newCollection(o CollectOptions) *collection {
	return &collection{r: r, o: o, pass: maxMarking, live: marks{}, unlisted: map[*segment]bool{}}
}

// root is a map that is needed.
type root struct {
	m     Map
	disk  string // roots with the same one are much alike
	label string
}

// roots returns the maps that are needed, those of one disk one after the other.
func (r *Repository) roots() []root {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.rootsLocked(false)
}

// rootsLocked leaves out, for a dry run, the deleted points that a collection would purge.
func (r *Repository) rootsLocked(dryRun bool) []root {
	var roots []root
	points := r.kept(dryRun)
	slices.SortFunc(points, func(a, b Point) int {
		return cmp.Or(cmp.Compare(a.VM, b.VM), a.Time.Compare(b.Time))
	})
	for _, p := range points {
		for _, d := range p.Disks {
			roots = append(roots, root{d.Map, p.VM + "/" + d.Name, fmt.Sprintf("disk %s of %s, point %.8s", d.Name, p.VM, p.ID)})
		}
	}
	for m := range r.pins {
		roots = append(roots, root{m, "", "an open disk"})
	}
	return roots
}

// begin returns the maps that are needed. From here on the marks of sessions
// that end are kept, too. A map that a session takes as its base later was
// listed or pinned now, or made by a session that runs now.
func (c *collection) begin(candidates []*segment) []root {
	r := c.r
	r.mu.Lock()
	defer r.mu.Unlock()
	r.segments.mu.Lock()
	defer r.segments.mu.Unlock()
	r.segments.live = marks{}
	c.old = make(map[*segment]bool, len(candidates))
	for _, seg := range candidates {
		c.nodes += int64(seg.summary.Records - seg.summary.Chunks)
		c.old[seg] = true
		c.records += int(seg.summary.Records)
		c.size += seg.summary.Size
	}
	c.quarantine.limit = max(minQuarantine, c.records/64)
	return r.rootsLocked(c.o.DryRun)
}

func (c *collection) end() {
	c.r.segments.mu.Lock()
	defer c.r.segments.mu.Unlock()
	c.r.segments.live = nil
}

func (c *collection) progress(phase CollectPhase, done, total int64) {
	if c.o.Progress != nil {
		c.o.Progress(CollectProgress{phase, min(done, total), total})
	}
}

// neededLocked reports whether a record may be referenced. segmentSet.mu is held.
func (c *collection) neededLocked(segment uint64, ordinal uint32) bool {
	set := c.r.segments
	if c.live.has(segment, ordinal) || set.live.has(segment, ordinal) {
		return true
	}
	for s := range set.sessions {
		if s.marks.has(segment, ordinal) {
			return true
		}
	}
	return false
}

// candidate is a segment and what of it was dead when it was first looked at.
type candidate struct {
	seg       *segment
	deadBytes int64
	worth     bool
}

// sweep takes the segments that are worth it out of use, the deadest first: on a full
// disk they give the space to rewrite the others.
func (c *collection) sweep(ctx context.Context, segments []*segment) error {
	c.progress(PhaseSweep, 0, c.size)
	todo, err := c.candidates(ctx, segments)
	if err != nil {
		return err
	}
	var done int64
	for _, cand := range todo {
		if err := c.pace(ctx); err != nil {
			return err
		}
		c.progress(PhaseSweep, done, c.size)
		switch {
		case !cand.worth:
		case c.o.DryRun:
			c.result.FreedBytes += cand.deadBytes
		default:
			if err := c.take(ctx, cand); err != nil {
				return fmt.Errorf("collect segment %s: %w", cand.seg.path, err)
			}
		}
		done += cand.seg.summary.Size
	}
	if err := c.release(ctx); err != nil {
		return fmt.Errorf("collect: %w", err)
	}
	c.progress(PhaseSweep, c.size, c.size)
	return c.r.appender.finish()
}

// candidates returns the segments that can be collected, the deadest first.
func (c *collection) candidates(ctx context.Context, segments []*segment) ([]candidate, error) {
	var todo []candidate
	small, fixed, err := c.survey(segments)
	if err != nil {
		return nil, err
	}
	for _, seg := range segments {
		if err := c.pace(ctx); err != nil {
			return nil, err
		}
		if c.unlisted[seg] {
			continue // what of it is needed was not marked
		}
		entries, err := c.r.entries(seg)
		if away(err) {
			return nil, err
		}
		if err != nil {
			c.leave(seg, err)
			continue
		}
		cand := candidate{seg: seg}
		total, dead := c.count(seg, entries)
		if fixed[seg] {
			c.result.ImmutableBytes += dead
			continue
		}
		cand.deadBytes = dead
		cand.worth = dead > 0 && float64(dead) >= c.o.MaxUnused*float64(total) ||
			small >= smallCount && seg.summary.Size < c.r.segmentSize/smallShare
		todo = append(todo, cand)
	}
	slices.SortStableFunc(todo, func(a, b candidate) int {
		return cmp.Compare(float64(b.deadBytes)/float64(b.seg.summary.Size), float64(a.deadBytes)/float64(a.seg.summary.Size))
	})
	return todo, nil
}

// survey returns how many segments are small, and those that nobody may remove: to copy
// what they hold would give nothing back, and would be done again in each collection.
func (c *collection) survey(segments []*segment) (small int, fixed map[*segment]bool, err error) {
	fixed = map[*segment]bool{}
	for _, seg := range segments {
		immutable, err := c.r.fs.Immutable(seg.path)
		switch {
		case errors.Is(err, os.ErrNotExist): // its records cannot be read either
		case err != nil:
			return 0, nil, err
		case immutable:
			fixed[seg] = true
		case seg.summary.Size < c.r.segmentSize/smallShare:
			small++
		}
	}
	return small, fixed, nil
}

// take puts a segment into quarantine, which is emptied before if there is no room, in memory
// or on disk.
func (c *collection) take(ctx context.Context, cand candidate) error {
	q := &c.quarantine
	short, err := c.short(cand.seg.summary.Size - cand.deadBytes)
	if err != nil {
		return err
	}
	if short || len(q.prefixes)+int(cand.seg.summary.Records) > q.limit {
		if err := c.release(ctx); err != nil {
			return err
		}
	}
	err = c.rewrite(ctx, cand.seg)
	if errors.Is(err, ErrNoSpace) && len(q.segments) > 0 {
		if err := c.release(ctx); err != nil {
			return err
		}
		err = c.rewrite(ctx, cand.seg)
	}
	return err
}

// leave passes over a segment whose list of records is not to be relied on: which
// of them are needed is known by their place in it.
func (c *collection) leave(seg *segment, err error) {
	c.r.log.Error("segment is damaged and was left as it is", attrSegment(seg), attrErr(err))
}

// count adds a segment's records to the result and returns the bytes of all
// and of the dead ones.
func (c *collection) count(seg *segment, entries []tocEntry) (total, dead int64) {
	c.r.segments.mu.Lock()
	defer c.r.segments.mu.Unlock()
	for i, e := range entries {
		total += e.size()
		if c.neededLocked(seg.number, uint32(i)) {
			c.result.LiveChunks++
			continue
		}
		c.result.DeadChunks++
		dead += e.size()
	}
	c.result.DeadBytes += dead
	return total, dead
}

// rewrite copies what is needed out of a segment and puts it into quarantine.
func (c *collection) rewrite(ctx context.Context, seg *segment) error {
	entries, err := c.r.entries(seg)
	if away(err) {
		return err
	}
	if err != nil {
		c.leave(seg, err)
		return nil
	}
	// From the moment that it is condemned, nobody comes to rest on a record of
	// this segment, so what is dead now stays dead.
	needed := make([]bool, len(entries))
	set := c.r.segments
	set.mu.Lock()
	seg.condemned = true
	for i := range entries {
		needed[i] = c.neededLocked(seg.number, uint32(i))
	}
	set.mu.Unlock()
	copied, err := c.copyOut(ctx, seg, entries, needed)
	if err != nil {
		set.mu.Lock()
		seg.condemned = false
		set.mu.Unlock()
		if errors.Is(err, ErrDamaged) {
			// What is needed and can't be read stays where it is, for a repair.
			c.leave(seg, err)
			return nil
		}
		return err
	}
	// All that is needed is durable elsewhere and in the index. Stopped from here on, the
	// next opening enters the segment again, and the next collection finds it dead.
	err = c.forget(ctx, seg, entries, needed)
	set.drop(seg)
	c.quarantine.add(seg, entries, copied)
	return err
}

// copyOut stores the needed records of a segment elsewhere, durably, and returns
// how many bytes they take there.
func (c *collection) copyOut(ctx context.Context, seg *segment, entries []tocEntry, needed []bool) (copied int64, err error) {
	epoch := c.r.appender.begin()
	opened, err := c.r.segments.acquire(location{Segment: seg.number, Generation: seg.generation})
	if err != nil {
		return 0, err
	}
	defer c.r.segments.release(opened)
	var buf []byte
	for i, e := range entries {
		if !needed[i] {
			continue
		}
		if err := c.pace(ctx); err != nil {
			return copied, err
		}
		if cap(buf) < int(e.size()) {
			buf = make([]byte, e.size())
		}
		loc := location{Segment: seg.number, Generation: seg.generation, Off: e.Off, Stored: e.Stored, Ordinal: uint32(i)}
		moved, err := c.move(opened, e, loc, buf)
		if err != nil {
			return copied, err
		}
		copied += moved
	}
	if slices.Contains(needed, true) { // also what a session has just stored must be durable
		if err := c.r.appender.flush(); err != nil {
			return copied, err
		}
	}
	return copied, c.r.appender.check(epoch)
}

// move copies one record, unless the chunk has been stored anew since.
func (c *collection) move(seg *segment, e tocEntry, from location, buf []byte) (int64, error) {
	for {
		cl, mine := c.r.claims.take(e.ID)
		if !mine {
			<-cl.ready
			if cl.found {
				c.r.segments.moved(from, cl.loc)
				return 0, nil
			}
			continue
		}
		at, ok, err := c.r.index.get(e.ID)
		if ok = ok && at != from && c.r.segments.holds(at); ok && c.r.Damaged(e.ID) {
			// It may be the one that is bad, and this one good.
			err = c.r.loadOnce(e.ID, e.Type, make([]byte, e.Raw, e.Raw+decodeSlack), true)
			if ok = err == nil; errors.Is(err, ErrDamaged) || errors.Is(err, errGone) {
				err = nil
			}
		}
		if err != nil || ok && at.Segment != from.Segment {
			c.r.claims.drop(e.ID, cl)
			if err == nil {
				c.r.segments.moved(from, at)
			}
			return 0, err
		}
		if ok { // a later record in the same segment
			e.Off, e.Stored = at.Off, at.Stored
		}
		h, payload, err := c.readRecord(seg, e, buf)
		if err != nil {
			c.r.claims.drop(e.ID, cl)
			return 0, damage(&CorruptError{ID: e.ID, Segment: segmentName(seg.number, seg.generation, ""), Off: int64(e.Off), Err: err})
		}
		if err := c.checkSpace(int64(len(payload))); err != nil {
			c.r.claims.drop(e.ID, cl)
			return 0, err
		}
		to, err := c.r.appender.append(e.ID, h.Type, h.Codec, int(h.Raw), payload)
		if err != nil {
			c.r.claims.drop(e.ID, cl)
			return 0, err
		}
		c.r.segments.moved(from, to)
		c.r.claims.stored(e.ID, cl, to)
		return recordHeaderSize + int64(to.Stored), nil
	}
}

// checkSpace is Repository.checkSpace for bytes that are about to be copied, as often as the appender writes.
func (c *collection) checkSpace(length int64) error {
	if c.unchecked -= length; c.unchecked > 0 {
		return nil
	}
	c.unchecked = writeSize
	return c.r.checkSpace(collectShare)
}

// readRecord reads a record that is to be copied. One that is known to be bad has to have the right
// content: its copy counts as good.
func (c *collection) readRecord(seg *segment, e tocEntry, buf []byte) (recordHeader, []byte, error) {
	if !c.r.Damaged(e.ID) {
		return seg.record(buf, e.ID, e.Off, e.Stored)
	}
	return c.r.readEntry(seg, e, buf, make([]byte, max(c.r.chunkSize, nodeSize)))
}

// moved passes what sessions, also those that ended during a collection, hold of a record on to
// its new place.
func (s *segmentSet) moved(from, to location) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.live.has(from.Segment, from.Ordinal) {
		s.live.set(to)
	}
	for session := range s.sessions {
		if session.marks.has(from.Segment, from.Ordinal) {
			session.marks.set(to)
		}
	}
}

// forget takes a segment and its dead records out of the index. A chunk that
// is being stored anew at this moment keeps its claim and so its entry.
func (c *collection) forget(ctx context.Context, seg *segment, entries []tocEntry, needed []bool) error {
	held := map[ID]*claim{}
	defer func() {
		for id, cl := range held {
			c.r.claims.drop(id, cl)
		}
	}()
	return c.r.index.write(func(w indexWrite) error {
		// Without a summary the next opening enters the segment anew.
		if err := w.removeSummary(seg.number); err != nil {
			return err
		}
		for i, e := range entries {
			if needed[i] || held[e.ID] != nil {
				continue
			}
			if err := ctx.Err(); err != nil {
				return err
			}
			cl, mine := c.r.claims.take(e.ID)
			if !mine {
				continue
			}
			held[e.ID] = cl
			at, ok, err := c.r.index.get(e.ID)
			if err != nil {
				return err
			}
			if !ok || at.Segment != seg.number || at.Generation != seg.generation {
				continue
			}
			if err := w.remove(e.ID); err != nil {
				return err
			}
			c.r.nodes.drop(e.ID)
			c.r.chunks.drop(e.ID)
		}
		return nil
	})
}
