package blockstore

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"
)

// Session stores what becomes one restore point. Until it ends, no collection
// takes anything that it stored or found stored. It is safe for
// concurrent use, but for Commit and Close.
type Session struct {
	r     *Repository
	epoch uint64
	bases []Map
	lock  time.Duration // for which the point will be locked

	// Guarded by segmentSet.mu. A collection decides by the marks and confirms by the ids.
	marks marks
	nodes map[ID]struct{} // map nodes that were put
	loose map[ID]struct{} // chunks that were put and no node lists yet, and nodes being put

	unlisted atomic.Int64 // how many are loose
}

// maxUnlisted is how many chunks a session may have put that no node lists.
const maxUnlisted = 1 << 20

// Begin starts a session. It must be closed.
func (r *Repository) Begin() *Session {
	s := &Session{r: r, epoch: r.appender.begin(), marks: marks{}, nodes: map[ID]struct{}{}, loose: map[ID]struct{}{}}
	r.segments.mu.Lock()
	defer r.segments.mu.Unlock()
	r.segments.sessions[s] = struct{}{}
	return s
}

// Close ends the session. Without a commit before, what it stored is left to
// the next collection.
func (s *Session) Close() {
	set := s.r.segments
	set.mu.Lock()
	delete(set.sessions, s)
	if set.live != nil {
		set.live.merge(s.marks) // a collection is deciding what is dead
	}
	set.mu.Unlock()
	for _, m := range s.bases {
		s.r.unpin(m)
	}
	s.bases = nil
	if s.r.appender.check(s.epoch) != nil {
		s.r.appender.drain() // cut what could not be written: its space is needed
	}
}

// Base returns the disk of a VM's newest point that a new backup of this disk
// can be compared with, and that point; the point "" if there is none. The map may be
// built upon until the session ends, even if the point is deleted.
func (s *Session) Base(vm, disk string) (Map, PointID) {
	s.r.mu.Lock()
	defer s.r.mu.Unlock()
	var newest *pointFile
	for _, p := range s.r.points {
		if p.VM == vm && (newest == nil || p.Time.After(newest.Time)) {
			newest = &p
		}
	}
	if newest == nil {
		return Map{}, ""
	}
	m, ok := s.pinLocked(newest.Point, disk)
	if !ok {
		return Map{}, ""
	}
	return m, newest.ID
}

// BaseAt is Base for a disk of a point of any VM; false if there is none.
func (s *Session) BaseAt(id PointID, disk string) (Map, bool) {
	s.r.mu.Lock()
	defer s.r.mu.Unlock()
	p, ok := s.r.points[id]
	if !ok {
		return Map{}, false
	}
	return s.pinLocked(p.Point, disk)
}

// pinLocked keeps the map of a disk until the session ends.
func (s *Session) pinLocked(p Point, disk string) (Map, bool) {
	for _, d := range p.Disks {
		if d.Name == disk {
			s.r.pins[d.Map]++
			s.bases = append(s.bases, d.Map)
			return d.Map, true
		}
	}
	return Map{}, false
}

// Stored tells what storing a chunk took.
type Stored struct {
	New   bool  // it was not in the repository
	Bytes int64 // that it takes in its segment, 0 unless new
}

// ID returns the id that a chunk has, the null id if it is all zeros is
// the caller's to know.
func (r *Repository) ID(chunk []byte) ID { return r.hash(chunkRecord, chunk) }

// Put stores a chunk, ChunkSize bytes with the id given (see Repository.ID), unless the
// repository has it. It is durable after Commit. The node that lists it should be put soon: up to
// 1 Mi chunks may wait for theirs.
func (s *Session) Put(id ID, chunk []byte) (Stored, error) {
	if len(chunk) != s.r.chunkSize {
		panic(fmt.Sprintf("blockstore: internal error: chunk of %d bytes", len(chunk)))
	}
	if s.unlisted.Load() >= maxUnlisted {
		return Stored{}, fmt.Errorf("put chunk: no map node lists the last %d chunks; put their nodes first", maxUnlisted)
	}
	return s.put(id, chunkRecord, chunk)
}

// PutNode stores a map node and returns its id; the null id if all its
// children are null.
func (s *Session) PutNode(children *[Fanout]ID) (ID, Stored, error) {
	if *children == ([Fanout]ID{}) {
		return ID{}, Stored{}, nil
	}
	data := make([]byte, 0, nodeSize)
	for i := range children {
		data = append(data, children[i][:]...)
	}
	id := s.r.hash(nodeRecord, data)
	stored, err := s.put(id, nodeRecord, data)
	if err == nil {
		s.r.segments.listed(s, id, children)
	}
	return id, stored, err
}

func (s *Session) put(id ID, kind recordType, data []byte) (Stored, error) {
	for {
		if err := s.r.appender.check(s.epoch); err != nil {
			return Stored{}, err
		}
		c, mine := s.r.claims.take(id)
		if mine {
			return s.store(c, id, kind, data)
		}
		// Somebody is storing it; that takes as long as compressing a chunk.
		<-c.ready
		if c.found && s.r.segments.protect(s, id, c.loc) {
			return Stored{}, nil
		}
	}
}

// store looks whether the repository has the chunk, stores it if not, and
// resolves the claim.
func (s *Session) store(c *claim, id ID, kind recordType, data []byte) (Stored, error) {
	before, ok, err := s.r.index.get(id)
	if err != nil {
		s.r.claims.drop(id, c)
		return Stored{}, err
	}
	if ok && !s.r.Damaged(id) && s.r.segments.protect(s, id, before) {
		s.r.claims.drop(id, c)
		return Stored{}, nil
	}
	buf := s.r.buffers.Get().(*[]byte)
	defer s.r.buffers.Put(buf)
	payload, how, err := s.r.coder.compress(*buf, id, kind, data)
	if err == nil {
		err = s.r.checkSpace(1)
	}
	var loc location
	if err == nil {
		loc, err = s.r.appender.append(id, kind, how, len(data), payload)
	}
	if err != nil {
		s.r.claims.drop(id, c)
		return Stored{}, err
	}
	if ok {
		s.r.segments.moved(before, loc)
	}
	if !s.r.segments.protect(s, id, loc) {
		// Its segment has failed, or was sealed, found dead and condemned before the mark
		// was set.
		s.r.claims.drop(id, c)
		return s.put(id, kind, data)
	}
	s.r.claims.stored(id, c, loc)
	return Stored{New: true, Bytes: recordHeaderSize + int64(loc.Stored)}, nil
}

// Leaf is a leaf of a map that is being built.
type Leaf struct {
	Index int64 // it covers [Index*LeafSpan, (Index+1)*LeafSpan)
	ID    ID
}

// BuildMap stores the nodes above leaves and returns the root of a disk of a size.
// Leaves that are not given are taken from base, which has the same size; the zero
// Map is all zeros. A node of base that is damaged is no hindrance if all leaves under
// it are given. bytes is what the nodes take in the repository.
func (s *Session) BuildMap(size int64, base Map, leaves []Leaf) (root ID, bytes int64, err error) {
	if base != (Map{}) && base.Size != size {
		panic(fmt.Sprintf("blockstore: internal error: map of %d bytes over one of %d", size, base.Size))
	}
	slices.SortFunc(leaves, func(a, b Leaf) int { return cmp.Compare(a.Index, b.Index) })
	t := s.r.tree(Map{Root: base.Root, Size: size})
	return s.build(t, 0, (size+s.r.LeafSpan()-1)/s.r.LeafSpan(), leaves)
}

// build returns the id of base, a subtree whose first leaf is first, with the
// leaves, all of which lie in it, replaced. The disk has end leaves.
func (s *Session) build(base tree, first, end int64, leaves []Leaf) (ID, int64, error) {
	if len(leaves) == 0 {
		return base.id, 0, nil
	}
	if base.level == 1 {
		return leaves[0].ID, 0, nil
	}
	span := s.r.span(base.level-1) / s.r.LeafSpan() // leaves in a child
	n, err := s.r.node(base.id)
	if errors.Is(err, ErrDamaged) && int64(len(leaves)) == min(Fanout*span, end-first) {
		n, err = nil, nil // nothing of it is needed
	}
	if err != nil {
		return ID{}, 0, err
	}
	var children [Fanout]ID
	var total int64
	for i := range children {
		next := first + int64(i+1)*span
		own := 0
		for own < len(leaves) && leaves[own].Index < next {
			own++
		}
		id, bytes, err := s.build(base.child(n, i), next-span, end, leaves[:own])
		if err != nil {
			return ID{}, 0, err
		}
		children[i] = id
		total += bytes
		leaves = leaves[own:]
	}
	id, stored, err := s.PutNode(&children)
	return id, total + stored.Bytes, err
}

// LockFor has Commit lock the point for a time from then on, as LockPoint would; 0 does not lock it.
func (s *Session) LockFor(length time.Duration) error {
	if length == 0 {
		s.lock = 0
		return nil
	}
	s.lock = length
	return checkLock(length)
}

// Commit makes everything that the session stored durable and then lists the
// point. The id must be new (see NewPointID); the time is moved on by whole milliseconds until no
// other point of the VM has it. When Commit returns nil the point is there for good;
// after an error it is not listed, unless the disk that failed also keeps us from taking its
// file away: then the next opening lists it, and it is whole.
func (s *Session) Commit(ctx context.Context, p Point) (Point, error) {
	p.Time = p.Time.UTC().Truncate(time.Millisecond)
	if err := p.check(s.r.chunkSize); err != nil {
		return Point{}, err
	}
	if err := s.r.appender.flush(); err != nil {
		return Point{}, err
	}
	if err := s.r.appender.check(s.epoch); err != nil {
		return Point{}, err
	}
	if err := ctx.Err(); err != nil {
		return Point{}, err
	}
	s.r.mu.Lock()
	defer s.r.mu.Unlock()
	for taken := true; taken; {
		taken = false
		for _, other := range s.r.catalog.points {
			if other.VM == p.VM && other.Time.Equal(p.Time) {
				p.Time, taken = p.Time.Add(time.Millisecond), true
			}
		}
	}
	if s.r.takenLocked(p.ID) {
		return Point{}, fmt.Errorf("point %s exists", p.ID)
	}
	if err := s.r.writePoint(p, s.lock); err != nil {
		return Point{}, fmt.Errorf("write point: %w", err)
	}
	p.LockedUntil = s.r.lockedUntil(p.ID)
	return p, nil
}
