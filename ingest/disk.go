package ingest

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/holdfast-backup/holdfast/blockstore"
	"github.com/holdfast-backup/holdfast/image"
)

// stripeSize is how much a worker reads at a time, bytes; at least a chunk.
const stripeSize = 1 << 20

// diskRun is the backup of one disk.
type diskRun struct {
	repo    *blockstore.Repository
	session *blockstore.Session
	src     Source
	size    int64
	chunk   int64 // the repository's chunk size
	stripe  int64 // bytes that a worker reads at a time, whole chunks
	report  *reporter
	buffers sync.Pool // of *[]byte, a stripe long

	// base is the disk in the VM's last point, or in Source.Since, the zero Map if there is none.
	// Leaves that are as they were there are taken over; unless the disk has
	// another size now: then base is only compared with.
	base    blockstore.Map
	resized bool

	mu      sync.Mutex // guards the fields below
	result  DiskResult
	leaves  []blockstore.Leaf
	data    int64 // bytes of chunks that are not zero
	recount bool  // data is not right: parts of base can't be read
}

func newDiskRun(ctx context.Context, repo *blockstore.Repository, s *blockstore.Session, vm string, src Source, report *reporter) (*diskRun, error) {
	d := &diskRun{
		repo: repo, session: s, src: src, size: src.Disk.Size(), report: report,
		chunk: int64(repo.ChunkSize()), stripe: max(stripeSize, int64(repo.ChunkSize())),
		result: DiskResult{Name: src.Name, Mode: Full, Size: src.Disk.Size()},
	}
	d.buffers.New = func() any { b := make([]byte, d.stripe); return &b }
	if src.Changed != nil {
		base, ok := s.BaseAt(src.Since, src.Name)
		if ok && base.Size == d.size {
			// Only what is read can heal what is known to be damaged.
			damaged, err := repo.DamagedExtents(ctx, base)
			if err != nil {
				return nil, err
			}
			d.src.Changed = slices.Concat(src.Changed, damaged)
			d.result.Mode, d.base, d.data = Incremental, base, base.Data
			return d, nil
		}
	}
	var point blockstore.PointID
	if d.base, point = s.Base(vm, src.Name); point == "" {
		return d, nil
	}
	d.result.Mode = Scan
	if d.resized = d.base.Size != d.size; !d.resized {
		d.data = d.base.Data
	}
	return d, nil
}

// backUp backs a disk up. A map of the last point that turns out to be damaged where the source calls
// everything unchanged has the whole disk scanned.
func backUp(ctx context.Context, repo *blockstore.Repository, s *blockstore.Session, vm string, src Source, report *reporter) (blockstore.Map, DiskResult, error) {
	d, err := newDiskRun(ctx, repo, s, vm, src, report)
	if err != nil {
		return blockstore.Map{}, DiskResult{}, err
	}
	m, err := d.run(ctx)
	if errors.Is(err, blockstore.ErrDamaged) && d.result.Mode == Incremental {
		report.again(d.size)
		src.Changed = nil
		return backUp(ctx, repo, s, vm, src, report)
	}
	return m, d.result, err
}

// run backs the disk up and returns its map.
func (d *diskRun) run(ctx context.Context) (blockstore.Map, error) {
	if d.size < 0 || d.size > image.MaxSize {
		return blockstore.Map{}, fmt.Errorf("disk of %d bytes; at most %d are supported", d.size, image.MaxSize)
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(2*runtime.GOMAXPROCS(0) + 2)
	walkErr := d.walk(gctx, g)
	if err := g.Wait(); err != nil {
		return blockstore.Map{}, err // the cause; the walk may only have seen the context end
	}
	if walkErr != nil {
		return blockstore.Map{}, walkErr
	}
	base := d.base
	if d.resized {
		base = blockstore.Map{} // every leaf was made anew
	}
	root, bytes, err := d.session.BuildMap(d.size, base, d.leaves)
	if err != nil {
		return blockstore.Map{}, err
	}
	d.count(DiskResult{Stored: bytes})
	m := blockstore.Map{Root: root, Size: d.size, Data: d.data}
	if d.recount {
		m.Data, err = d.repo.DataBytes(ctx, m)
	}
	return m, err
}

// todo yields what must be looked at, in order: extents of the source within what
// changed.
func (d *diskRun) todo(ctx context.Context) iter.Seq2[image.Extent, error] {
	changed := []image.Extent{{Off: 0, Len: d.size}}
	if d.result.Mode == Incremental {
		changed = wholeChunks(d.src.Changed, d.chunk, d.size)
	}
	return func(yield func(image.Extent, error) bool) {
		for _, c := range changed {
			next := c.Off
			for e, err := range image.Coalesce(d.src.Disk.Extents(ctx, c.Off, c.Len)) {
				if err == nil && (e.Off != next || e.End() > c.End()) {
					err = fmt.Errorf("%v where [%d, %d) was to follow", e, next, c.End())
				}
				if !yield(e, err) || err != nil {
					return
				}
				next = e.End()
			}
			if next != c.End() {
				yield(image.Extent{}, fmt.Errorf("they end at %d instead of %d", next, c.End()))
				return
			}
		}
	}
}

// wholeChunks returns extents sorted, widened to whole chunks, clipped to a disk's
// size, without overlap.
func wholeChunks(extents []image.Extent, chunk, size int64) []image.Extent {
	var out []image.Extent
	sorted := slices.SortedFunc(slices.Values(extents), func(a, b image.Extent) int {
		return int(max(-1, min(1, a.Off-b.Off)))
	})
	for _, e := range sorted {
		off, length := image.Clip(max(e.Off, 0), e.Len+min(e.Off, 0), size)
		if length == 0 {
			continue
		}
		end := min((off+length+chunk-1)/chunk*chunk, size)
		off -= off % chunk
		if n := len(out); n > 0 && off <= out[n-1].End() {
			out[n-1].Len = max(out[n-1].End(), end) - out[n-1].Off
			continue
		}
		out = append(out, image.Extent{Off: off, Len: end - off})
	}
	return out
}

// What is to be done with a chunk.
const (
	keep  = iota // it is as it was in base
	zero         // the source says that it is zero
	fetch        // it must be read
)

// leafPlan says what is to be done with the chunks of a leaf.
type leafPlan struct {
	index  int64
	chunks [blockstore.Fanout]uint8
}

// walk goes through what is to be looked at, leaf by leaf, and hands out the reads.
func (d *diskRun) walk(ctx context.Context, g *errgroup.Group) error {
	span := d.repo.LeafSpan()
	plan := leafPlan{index: -1}
	done := int64(0) // the walk has passed all before this offset
	finish := func() error {
		if plan.index < 0 {
			return nil
		}
		end := min((plan.index+1)*span, d.size)
		start := max(done, plan.index*span)
		d.report.done(start - done)
		done = end
		return d.leaf(ctx, g, &plan, end-start)
	}
	for e, err := range d.todo(ctx) {
		if err != nil {
			return fmt.Errorf("extents of the disk: %w", err)
		}
		for off := e.Off; off < e.End(); {
			index := off / span
			if index != plan.index {
				if err := finish(); err != nil {
					return err
				}
				plan = leafPlan{index: index}
			}
			end := min(e.End(), (index+1)*span)
			what := uint8(fetch)
			if e.Zero {
				what = zero
			}
			for c := off / d.chunk; c*d.chunk < end; c++ {
				plan.chunks[c%blockstore.Fanout] = max(plan.chunks[c%blockstore.Fanout], what)
			}
			off = end
		}
	}
	if err := finish(); err != nil {
		return err
	}
	d.report.done(d.size - done)
	return ctx.Err()
}

// leafRun is a leaf that is being made. The workers write children, each its
// own.
type leafRun struct {
	index    int64
	base     blockstore.Node // nil is all zeros
	unknown  bool            // base cannot be read; every child is made anew
	children [blockstore.Fanout]blockstore.ID
	pending  atomic.Int32 // reads under way, and one for the walk
}

// leaf hands out the reads of a leaf, length bytes of the disk.
func (d *diskRun) leaf(ctx context.Context, g *errgroup.Group, plan *leafPlan, length int64) error {
	start := plan.index * d.repo.LeafSpan()
	chunks := int((length + d.chunk - 1) / d.chunk)
	base, err := d.repo.Leaf(d.base, plan.index)
	if base == nil && err == nil && !slices.Contains(plan.chunks[:chunks], fetch) {
		d.report.done(length) // zeros, as before
		return nil
	}
	l := &leafRun{index: plan.index, base: base}
	switch {
	case errors.Is(err, blockstore.ErrDamaged):
		l.unknown = true
		for i := range chunks {
			plan.chunks[i] = max(plan.chunks[i], fetch)
		}
	case err != nil:
		return err
	}
	l.pending.Store(1)
	for i := 0; i < chunks; {
		what, first := plan.chunks[i], i
		for i < chunks && plan.chunks[i] == what && (what != fetch || int64(i-first) < d.stripe/d.chunk) {
			if what == keep {
				l.children[i] = l.baseChild(i)
			}
			i++
		}
		bytes := min(int64(i)*d.chunk, length) - int64(first)*d.chunk
		if what != fetch {
			d.report.done(bytes)
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		l.pending.Add(1)
		g.Go(func() error {
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := d.fetch(l, first, start+int64(first)*d.chunk, bytes); err != nil {
				return err
			}
			return d.finished(l)
		})
	}
	return d.finished(l)
}

func (l *leafRun) baseChild(i int) blockstore.ID {
	if l.base == nil {
		return blockstore.ID{}
	}
	return l.base.Child(i)
}

// fetch reads length bytes at off, the chunks from first on, and stores what
// is new of them.
func (d *diskRun) fetch(l *leafRun, first int, off, length int64) error {
	b := d.buffers.Get().(*[]byte)
	defer d.buffers.Put(b)
	p := (*b)[:length]
	if err := image.ReadFull(d.src.Disk, p, off); err != nil {
		return err
	}
	if tail := length % d.chunk; tail != 0 {
		// The disk ends within this chunk. Its rest counts as zeros.
		p = (*b)[:length+d.chunk-tail]
		clear(p[length:])
	}
	sum := DiskResult{Read: length}
	for ; len(p) > 0; p, first = p[d.chunk:], first+1 {
		chunk := p[:d.chunk]
		if image.IsZero(chunk) {
			continue
		}
		id := d.repo.ID(chunk)
		l.children[first] = id
		if id == l.baseChild(first) && !d.repo.Damaged(id) {
			continue
		}
		stored, err := d.session.Put(id, chunk)
		if err != nil {
			return err
		}
		if stored.New {
			sum.New += d.chunk
			sum.Stored += stored.Bytes
		}
	}
	d.count(sum)
	d.report.done(length)
	return nil
}

// finished ends one read of a leaf, or the walk over it; the last one stores the
// leaf.
func (d *diskRun) finished(l *leafRun) error {
	if l.pending.Add(-1) > 0 {
		return nil
	}
	var changed, nonZero, wasNonZero int64
	for i, id := range &l.children {
		was := l.baseChild(i)
		if id != was {
			start := (l.index*blockstore.Fanout + int64(i)) * d.chunk
			changed += max(0, min(d.chunk, d.size-start))
		}
		if !id.IsNull() {
			nonZero++
		}
		if !was.IsNull() {
			wasNonZero++
		}
	}
	if changed == 0 && nonZero == wasNonZero && !d.resized && !l.unknown {
		return nil // taken over from base as it is
	}
	id, stored, err := d.session.PutNode(&l.children)
	if err != nil {
		return err
	}
	d.count(DiskResult{Changed: changed, Stored: stored.Bytes})
	d.mu.Lock()
	defer d.mu.Unlock()
	d.leaves = append(d.leaves, blockstore.Leaf{Index: l.index, ID: id})
	d.data += nonZero * d.chunk
	if !d.resized {
		d.data -= wasNonZero * d.chunk
	}
	d.recount = d.recount || l.unknown
	return nil
}

// count adds to the result.
func (d *diskRun) count(sum DiskResult) {
	d.mu.Lock()
	d.result.add(sum)
	d.mu.Unlock()
	d.report.add(d.src.Name, sum)
}

func (r *DiskResult) add(o DiskResult) {
	r.Read += o.Read
	r.Changed += o.Changed
	r.New += o.New
	r.Stored += o.Stored
}
