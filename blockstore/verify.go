package blockstore

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

// VerifyOptions say how much is verified. The zero value verifies everything.
type VerifyOptions struct {
	// Percent is the share of the stored bytes to read, above 0 up to 100; 0 is 100.
	// Segments that were verified longest ago come first.
	Percent float64
	// Progress, if set, hears of stored bytes read, and how many will be.
	Progress func(done, total int64)
}

// VerifyResult tells what was read and what is wrong.
type VerifyResult struct {
	CheckedChunks int64         `json:"checked_chunks"` // records read, map nodes included
	CheckedBytes  int64         `json:"checked_bytes"`  // plain bytes of those
	Errors        []VerifyError `json:"errors"`
}

// VerifyError is one place where a restore point is not what it should be.
type VerifyError struct {
	Point  PointID `json:"point"`
	VM     string  `json:"vm"`
	Disk   string  `json:"disk"`
	Offset int64   `json:"offset"` // on the disk, bytes
	Length int64   `json:"length"`
	Reason string  `json:"reason"`
}

// maxVerifyErrors bounds the list; a disk that failed whole has millions.
const maxVerifyErrors = 10_000

// Verify reads chunks and map nodes that points need and compares each with its
// hash. Bad ones are remembered, so that a backup that meets the same
// content stores it anew.
func (r *Repository) Verify(ctx context.Context, o VerifyOptions) (VerifyResult, error) {
	if o.Percent == 0 {
		o.Percent = 100
	}
	if o.Percent < 0 || o.Percent > 100 {
		return VerifyResult{}, fmt.Errorf("verify %v percent: want more than 0, up to 100", o.Percent)
	}
	if err := r.appender.finish(); err != nil {
		return VerifyResult{}, err
	}
	v := &verification{
		r: r, o: o, needed: marks{}, walked: walkedNodes{}, clean: walkedNodes{},
		unlisted: map[uint64]bool{}, bad: map[ID]string{},
	}
	v.result.Errors = []VerifyError{}
	if err := v.envelopes(ctx); err != nil {
		return v.result, err
	}
	points := r.Points()
	// Pins keep a collection that runs meanwhile from taking what is about to be read.
	var disks []*Disk
	defer func() {
		for _, d := range disks {
			d.unpin()
		}
	}()
	for _, p := range points {
		for _, d := range p.Disks {
			disk, err := r.OpenDisk(p.ID, d.Name, DiskOptions{})
			if errors.Is(err, ErrNotFound) {
				continue // deleted just now
			}
			if err != nil {
				return v.result, err
			}
			disks = append(disks, disk)
			if err := v.mark(ctx, r.tree(d.Map)); err != nil {
				return v.result, err
			}
		}
	}
	if err := v.read(ctx); err != nil {
		return v.result, err
	}
	for _, d := range r.DamagedPoints() {
		v.add(VerifyError{Point: d.ID, Reason: "the point's file cannot be read: " + d.Err.Error()})
	}
	return v.result, v.report(ctx, points)
}

// verification is one run of Verify.
type verification struct {
	r      *Repository
	o      VerifyOptions
	needed marks
	walked walkedNodes
	clean  walkedNodes // nodes below which report found nothing bad

	// unlisted are the segments whose tables of contents are damaged: what points need of
	// them is read as mark comes to it.
	unlisted map[uint64]bool
	// all: a map node is bad, so nobody knows what was needed below it. Every record is
	// read, that a backup of the same content may store anew what is bad.
	all bool

	mu     sync.Mutex // guards the fields below
	bad    map[ID]string
	result VerifyResult
	done   int64
}

func (v *verification) fail(id ID, err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.bad[id] = err.Error()
}

func (v *verification) add(e VerifyError) {
	if len(v.result.Errors) < maxVerifyErrors {
		v.result.Errors = append(v.result.Errors, e)
	}
}

// mark finds the records that a tree needs.
func (v *verification) mark(ctx context.Context, t tree) error {
	if t.id.IsNull() {
		return nil
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	loc, ok, err := v.r.locate(t.id)
	if err != nil {
		return err
	}
	if !ok {
		v.fail(t.id, errors.New("it is in no segment"))
		v.all = v.all || t.level > 0
		return nil
	}
	if v.needed.set(loc) && t.level == 0 && v.unlisted[loc.Segment] {
		return v.readOne(t.id)
	}
	if t.level == 0 || !v.walked.add(t.level, loc) {
		return nil
	}
	v.r.nodes.drop(t.id) // what is in memory proves nothing of what is on disk
	n, err := v.r.node(t.id)
	if errors.Is(err, ErrDamaged) {
		v.fail(t.id, err)
		v.all = true
		return nil
	}
	if err != nil {
		return err
	}
	for i := range Fanout {
		if err := v.mark(ctx, t.child(n, i)); err != nil {
			return err
		}
	}
	return nil
}

// readOne checks a chunk by itself.
func (v *verification) readOne(id ID) error {
	err := v.r.load(id, chunkRecord, make([]byte, v.r.chunkSize, v.r.chunkSize+decodeSlack), true)
	if errors.Is(err, ErrDamaged) {
		v.fail(id, err)
		return nil
	}
	v.result.CheckedChunks++
	v.result.CheckedBytes += int64(v.r.chunkSize)
	return err
}

// envelopes checks what is around the records of each segment.
func (v *verification) envelopes(ctx context.Context) error {
	for _, seg := range v.r.segments.sealedSegments() {
		if err := ctx.Err(); err != nil {
			return err
		}
		_, err := v.r.entries(seg)
		if errors.Is(err, errGone) {
			continue
		}
		if away(err) {
			return err
		}
		v.unlisted[seg.number] = err != nil
		if err == nil {
			err = v.r.checkHeader(seg)
		}
		if away(err) {
			return err
		}
		if err != nil && !errors.Is(err, errGone) {
			v.add(VerifyError{Reason: fmt.Sprintf("segment %s, beside its records: %v", segmentName(seg.number, seg.generation, ""), err)})
		}
	}
	return nil
}

// checkHeader compares a segment's header with its name.
func (r *Repository) checkHeader(seg *segment) error {
	opened, err := r.segments.acquire(location{Segment: seg.number, Generation: seg.generation})
	if err != nil {
		return err
	}
	defer r.segments.release(opened)
	h, err := readSegmentHeader(opened.file)
	want := segmentHeader{Number: seg.number, Generation: seg.generation, Repository: r.segments.repoID, Encrypted: r.keys != nil}
	if err == nil && h != want {
		err = errors.New("the header is that of another segment")
	}
	return err
}

// read checks the needed records of as many segments as were asked for, in the
// order in which they lie.
func (v *verification) read(ctx context.Context) error {
	segments := v.r.segments.sealedSegments()
	var total int64
	last := map[*segment]int64{}
	v.r.segments.mu.Lock()
	for _, s := range segments {
		total += s.summary.Size
		last[s] = s.summary.VerifiedSec
	}
	v.r.segments.mu.Unlock()
	slices.SortStableFunc(segments, func(a, b *segment) int { return cmp.Compare(last[a], last[b]) })
	want := int64(float64(total) * v.o.Percent / 100)
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	var planned int64
	for _, seg := range segments {
		if planned >= want {
			break
		}
		planned += seg.summary.Size
		g.Go(func() error { return v.segment(ctx, seg, want) })
	}
	return g.Wait()
}

// segment checks the needed records of one segment.
func (v *verification) segment(ctx context.Context, seg *segment, want int64) error {
	if v.unlisted[seg.number] {
		return nil // envelopes has told, and mark has read what is needed
	}
	entries, err := v.r.entries(seg)
	if errors.Is(err, errGone) {
		return nil // collected meanwhile
	}
	if err != nil {
		return err
	}
	opened, err := v.r.segments.acquire(location{Segment: seg.number, Generation: seg.generation})
	if errors.Is(err, errGone) {
		return nil
	}
	if err != nil {
		return err
	}
	defer v.r.segments.release(opened)
	record := make([]byte, recordHeaderSize+maxPayload)
	plain := make([]byte, max(v.r.chunkSize, nodeSize))
	for i, e := range entries {
		if err := ctx.Err(); err != nil {
			return err
		}
		if e.ID.IsNull() || !v.all && !v.needed.has(seg.number, uint32(i)) {
			continue
		}
		err := v.check(opened, e, record, plain)
		if away(err) {
			return fmt.Errorf("segment %s, offset %d: %w", seg.path, e.Off, err)
		}
		if err != nil {
			v.fail(e.ID, &CorruptError{ID: e.ID, Segment: segmentName(seg.number, seg.generation, ""), Off: int64(e.Off), Err: err})
		}
		v.mu.Lock()
		v.result.CheckedChunks++
		v.result.CheckedBytes += int64(e.Raw)
		v.mu.Unlock()
	}
	v.mu.Lock()
	v.done += seg.summary.Size
	done := v.done
	v.mu.Unlock()
	if v.o.Progress != nil {
		v.o.Progress(min(done, want), want)
	}
	return v.r.verified(seg, time.Now())
}

// check reads one record and compares the content with its id.
func (v *verification) check(seg *segment, e tocEntry, record, plain []byte) error {
	h, payload, err := seg.record(record, e.ID, e.Off, e.Stored)
	if err != nil {
		return err
	}
	if h.Type != e.Type || h.Raw != e.Raw || int(h.Raw) > len(plain) {
		return errors.New("the record is not what the table of contents says")
	}
	data, err := v.r.coder.expand(plain, payload, h.Codec, int(h.Raw))
	if err != nil {
		return err
	}
	if v.r.hash(h.Type, data) != e.ID {
		return errors.New("content does not have this hash")
	}
	return nil
}

// verified remembers when a segment was read whole.
func (r *Repository) verified(seg *segment, at time.Time) error {
	r.segments.mu.Lock()
	if seg.gone {
		r.segments.mu.Unlock()
		return nil
	}
	seg.summary.VerifiedSec = at.Unix()
	sum := seg.summary
	r.segments.mu.Unlock()
	return r.index.write(func(w indexWrite) error { return w.putSummary(seg.number, sum) })
}

// report remembers what is bad and finds which disks suffer where.
func (v *verification) report(ctx context.Context, points []Point) error {
	if len(v.bad) == 0 {
		return nil
	}
	ids := make([]ID, 0, len(v.bad))
	for id := range v.bad {
		ids = append(ids, id)
	}
	if err := v.r.markDamaged(ids); err != nil {
		return err
	}
	for _, p := range points {
		for _, d := range p.Disks {
			if _, err := v.locate(ctx, v.r.tree(d.Map), 0, p, d); err != nil {
				return err
			}
		}
	}
	return nil
}

// locate reports the bad parts of a subtree that starts at an offset of a
// disk, and whether there are any.
func (v *verification) locate(ctx context.Context, t tree, start int64, p Point, d PointDisk) (found bool, err error) {
	if t.id.IsNull() || start >= d.Map.Size || len(v.result.Errors) >= maxVerifyErrors {
		return false, ctx.Err()
	}
	if reason, bad := v.bad[t.id]; bad {
		v.add(VerifyError{
			Point: p.ID, VM: p.VM, Disk: d.Name,
			Offset: start, Length: min(v.r.span(t.level), d.Map.Size-start), Reason: reason,
		})
		return true, nil
	}
	if t.level == 0 {
		return false, nil
	}
	loc, _, err := v.r.find(t.id)
	if err != nil || v.clean[t.level].has(loc.Segment, loc.Ordinal) {
		return false, err
	}
	n, err := v.r.node(t.id)
	if err != nil {
		return false, err
	}
	for i := range Fanout {
		below, err := v.locate(ctx, t.child(n, i), start+int64(i)*v.r.span(t.level-1), p, d)
		if err != nil {
			return found, err
		}
		found = found || below
	}
	if !found {
		v.clean.add(t.level, loc) // the next point that shares it need not walk it
	}
	return found, nil
}
