package blockstore

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"
)

// files looks through the files of the repository that are not segments.
func (v *verification) files(ctx context.Context) error {
	for _, check := range []func(context.Context) ([]VerifyError, error){v.r.verifyConfig, v.r.verifyPoints} {
		found, err := check(ctx)
		if err != nil {
			return err
		}
		for _, e := range found {
			v.add(e)
		}
	}
	return nil
}

// verifyConfig tells of the files of the configuration that are not what they should be.
func (r *Repository) verifyConfig(context.Context) ([]VerifyError, error) {
	var out []VerifyError
	for _, p := range r.checkConfig() {
		if away(p.Err) {
			return nil, p.Err
		}
		out = append(out, VerifyError{File: p.File, Reason: p.Err.Error()})
	}
	return out, nil
}

// verifyPoints reads the files of the points and of the catalog, and tells of what is wrong with them.
func (r *Repository) verifyPoints(ctx context.Context) ([]VerifyError, error) {
	if err := r.CheckPoints(ctx); err != nil {
		return nil, err
	}
	var out []VerifyError
	for _, p := range r.PointProblems() {
		out = append(out, VerifyError{Point: p.ID, VM: p.VM, File: p.File, Reason: p.Err.Error()})
	}
	return out, nil
}

// envelopes checks what is around the records of each segment.
func (v *verification) envelopes(ctx context.Context, segments []*segment) error {
	for _, seg := range segments {
		if err := ctx.Err(); err != nil {
			return err
		}
		header, contents, err := v.envelope(ctx, seg)
		if errors.Is(err, errGone) {
			continue
		}
		if err != nil {
			return err
		}
		v.alone[seg.number] = cmp.Or(contents, header) != nil || v.strange[seg.number]
		if err = cmp.Or(contents, header); err == nil || v.seen[seg] {
			continue
		}
		v.seen[seg] = true
		v.add(VerifyError{
			File: segmentsDir + "/" + filepath.Base(seg.path), Reason: fmt.Sprintf("beside its records: %v", err),
		})
	}
	return nil
}

// envelope returns what is wrong with a segment's header, and with its table of contents or
// footer. The error is that neither can be told.
func (v *verification) envelope(ctx context.Context, seg *segment) (header, contents, err error) {
	opened, err := v.r.segments.acquireWhole(seg)
	if errors.Is(err, errGone) || away(err) {
		return nil, nil, err
	}
	if corrupt, ok := errors.AsType[*CorruptError](err); ok {
		err = corrupt.Err // of no chunk
	}
	if err != nil {
		return nil, err, nil
	}
	defer v.r.segments.release(opened)
	_ = opened.file.DropCache() // where it can't be, the page cache is what is checked
	size, err := opened.file.Size()
	if away(err) {
		return nil, nil, err
	}
	if err != nil {
		return nil, err, nil
	}
	entries, contents := readEntries(opened.file, size, seg.generation)
	if seg.unlisted && contents == nil {
		contents = errUnlisted
	}
	if err := v.limit.wait(ctx, int64(len(entries))*tocEntrySize); err != nil {
		return nil, nil, err
	}
	header = v.r.checkHeader(opened)
	for _, err := range []error{header, contents} {
		if away(err) {
			return nil, nil, fmt.Errorf("segment %s: %w", seg.path, err)
		}
	}
	return header, contents, nil
}

// checkHeader compares the header of a segment, which is open, with its name.
func (r *Repository) checkHeader(seg *segment) error {
	h, err := readSegmentHeader(seg.file)
	want := r.segments.header(seg.number, seg.generation)
	if err == nil && h != want {
		err = errors.New("the header is that of another segment")
	}
	return err
}

// read checks the needed records of as many segments as were asked for, in the
// order in which they lie.
func (v *verification) read(ctx context.Context) error {
	segments := v.r.segments.sealedSegments()
	live, last, sizes := map[uint64]bool{}, map[*segment]int64{}, map[*segment]int64{}
	now := time.Now()
	v.r.segments.mu.Lock()
	for _, s := range segments {
		live[s.number], last[s], sizes[s] = true, s.summary.verified(now), s.summary.Size
	}
	v.r.segments.mu.Unlock()
	for number := range v.needed {
		v.again = v.again || !live[number] && !v.alone[number] && v.o.Percent == 100 // collected since mark was there
	}
	var total int64
	segments = slices.DeleteFunc(segments, func(s *segment) bool {
		if v.passed[s.number] && !v.all || v.o.Points != nil && !v.all && v.needed[s.number] == nil {
			return true
		}
		total += sizes[s]
		return false
	})
	slices.SortStableFunc(segments, func(a, b *segment) int { return cmp.Compare(last[a], last[b]) })
	want := int64(float64(total) * v.o.Percent / 100)
	v.done = 0
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	var planned int64
	for _, seg := range segments {
		if planned >= want {
			break
		}
		planned += sizes[seg]
		g.Go(func() error { return v.segment(ctx, seg, sizes[seg], want) })
	}
	return g.Wait()
}

// segment checks the needed records of one segment, of size bytes.
func (v *verification) segment(ctx context.Context, seg *segment, size, want int64) error {
	if v.alone[seg.number] {
		v.progress(size, want) // envelopes has told, and mark has read what is needed
		return nil
	}
	opened, err := v.r.segments.acquireWhole(seg)
	if away(err) {
		return err
	}
	if err != nil {
		v.reread()
		return nil
	}
	defer v.r.segments.release(opened)
	// Where it can't be dropped, the page cache is what is checked.
	_ = opened.file.DropCache()
	entries, err := readEntries(opened.file, size, seg.generation)
	if err != nil {
		v.reread()
		return nil
	}
	bad, good, err := v.records(ctx, opened, entries, want)
	_ = opened.file.DropCache() // others may have better use for the memory
	// What is bad is remembered before the segment counts as verified.
	if len(bad) > 0 {
		err = errors.Join(err, v.r.markDamaged(bad), v.r.saveDamaged())
	}
	v.r.damaged.remove(good)
	if err != nil {
		return err
	}
	v.progress(size-recordsEnd(entries)+segmentHeaderSize, want)
	if v.o.Points != nil {
		return nil // others may need more of it
	}
	return v.r.verified(seg, time.Now())
}

// reread asks for another round: a segment is gone, or cannot be read any more.
func (v *verification) reread() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.again = v.again || v.o.Percent == 100
}

// single asks for another round, in which the records of a segment are read one by one.
func (v *verification) single(number uint64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.again = v.again || v.o.Percent == 100
	v.strange[number] = true
}

// progress counts stored bytes as done.
func (v *verification) progress(n, want int64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.done += n
	if v.o.Progress != nil && !v.later {
		v.o.Progress(min(v.done, want), want)
	}
}

// progressStep is how many bytes are read between two calls of Progress by a goroutine.
const progressStep = 4 << 20

// records checks the needed records of a segment that is open. It returns the ids of the bad
// ones, and of the good ones that were known to be bad.
func (v *verification) records(ctx context.Context, seg *segment, entries []tocEntry, want int64) (bad, good []ID, err error) {
	record := make([]byte, recordHeaderSize+maxPayload)
	plain := make([]byte, max(v.r.chunkSize, nodeSize))
	v.mu.Lock()
	done := marks{seg.number: v.checked[seg.number]}
	v.mu.Unlock()
	var passed int64
	for i, e := range entries {
		if err := ctx.Err(); err != nil {
			return bad, good, err
		}
		if passed += e.size(); passed >= progressStep {
			v.progress(passed, want)
			passed = 0
		}
		if e.ID.IsNull() || done.has(seg.number, uint32(i)) || !v.all && !v.needed.has(seg.number, uint32(i)) {
			continue
		}
		if err := v.limit.wait(ctx, e.size()); err != nil {
			return bad, good, err
		}
		wrong := v.r.checkEntry(seg, e, record, plain)
		if away(wrong) {
			return bad, good, fmt.Errorf("segment %s, offset %d: %w", seg.path, e.Off, wrong)
		}
		v.count(int64(e.Raw))
		at, ok, err := v.r.find(e.ID)
		if err != nil {
			return bad, good, err
		}
		here := ok && at.Segment == seg.number && at.Generation == seg.generation && at.Off == e.Off
		switch {
		case !here && v.needed.has(seg.number, uint32(i)):
			// What the index has at this place is another chunk, or this one was stored anew,
			// or moved, since.
			v.single(seg.number)
		case ok && !here:
			// An old record of a chunk that has a new one.
		case wrong != nil:
			v.fail(e.ID, &CorruptError{ID: e.ID, Segment: segmentName(seg.number, seg.generation, ""), Off: int64(e.Off), Err: wrong})
			bad = append(bad, e.ID)
		case v.r.Damaged(e.ID):
			good = append(good, e.ID)
		}
	}
	v.progress(passed, want)
	v.mu.Lock()
	defer v.mu.Unlock()
	for i := range entries {
		if v.all || v.needed.has(seg.number, uint32(i)) {
			v.checked.set(location{Segment: seg.number, Ordinal: uint32(i)})
		}
	}
	return bad, good, nil
}

// checkEntry reads one record and compares the content with its id.
func (r *Repository) checkEntry(seg *segment, e tocEntry, record, plain []byte) error {
	_, _, err := r.readEntry(seg, e, record, plain)
	return err
}

// elsewhere looks whether other segments have what is bad, and stores it anew. It
// reports whether one had. A chunk can have several records: an old one that
// was damaged is not taken for the chunk once a new one is found.
func (v *verification) elsewhere(ctx context.Context) (found bool, err error) {
	if len(v.bad) == 0 {
		return false, nil
	}
	record := make([]byte, recordHeaderSize+maxPayload)
	plain := make([]byte, max(v.r.chunkSize, nodeSize))
	for _, seg := range slices.Backward(v.r.segments.sealedSegments()) {
		opened, err := v.r.segments.acquireWhole(seg)
		if err != nil {
			continue // what can't be opened has been told of
		}
		healed, err := v.others(ctx, opened, record, plain)
		v.r.segments.release(opened)
		if err != nil {
			return found, err
		}
		found = found || healed
	}
	return found, nil
}

// others stores anew the good records that a segment, which is open, has of bad chunks.
func (v *verification) others(ctx context.Context, seg *segment, record, plain []byte) (found bool, err error) {
	size, err := seg.file.Size()
	if err != nil {
		return false, nil //nolint:nilerr // envelopes has told of it
	}
	entries, err := readEntries(seg.file, size, seg.generation)
	if err != nil {
		return false, nil //nolint:nilerr // envelopes has told of it
	}
	if err := v.limit.wait(ctx, int64(len(entries))*tocEntrySize); err != nil {
		return false, err
	}
	for _, e := range entries {
		if _, bad := v.bad[e.ID]; !bad {
			continue
		}
		if err := v.limit.wait(ctx, e.size()); err != nil {
			return found, err
		}
		h, payload, err := v.r.readEntry(seg, e, record, plain)
		if err != nil {
			continue
		}
		taken, err := v.r.storeAgain(e.ID, h, payload)
		if errors.Is(err, ErrNoSpace) {
			continue // it stays known as damaged
		}
		if err != nil {
			return found, err
		}
		if taken {
			delete(v.bad, e.ID)
			v.result.DamagedChunks--
			found = true
		}
	}
	return found, nil
}

// storeAgain stores a record that was found good anew, unless the chunk is being stored at this moment: an
// index that is made anew takes the latest record of a chunk, which was bad.
func (r *Repository) storeAgain(id ID, h recordHeader, payload []byte) (bool, error) {
	cl, mine := r.claims.take(id)
	if !mine {
		return false, nil
	}
	at, ok, err := r.index.get(id)
	if err == nil {
		err = r.storeClaimed(cl, at, ok, h, payload)
	} else {
		r.claims.drop(id, cl)
	}
	return err == nil, err
}

// storeClaimed appends a good record of a chunk that is claimed, and resolves the claim. If ok is set, at is
// where the index has the chunk.
func (r *Repository) storeClaimed(cl *claim, at location, ok bool, h recordHeader, payload []byte) error {
	err := r.checkSpace(collectShare)
	var to location
	if err == nil {
		to, err = r.appender.append(h.ID, h.Type, h.Codec, int(h.Raw), payload)
	}
	if err != nil {
		r.claims.drop(h.ID, cl)
		return err
	}
	if ok {
		r.segments.moved(at, to)
	}
	r.claims.stored(h.ID, cl, to)
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
