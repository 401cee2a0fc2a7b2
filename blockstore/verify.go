package blockstore

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

// VerifyOptions say how much is verified. The zero value verifies everything.
// Percent, Points and Resume exclude each other.
type VerifyOptions struct {
	// Percent is the share of the stored bytes to read, above 0 up to 100; 0 is 100.
	// Segments that were verified longest ago come first.
	Percent float64
	// Points, unless nil, has only what these points need verified.
	Points []PointID
	// Resume goes on with a verification of everything that was stopped: what was
	// verified since its beginning is passed over. If there is none, one begins.
	Resume bool
	// Rate bounds the bytes that are read in a second; 0 is no bound.
	Rate int64
	// Progress, if set, hears of stored bytes read, and how many will be. It is called by
	// one goroutine at a time.
	Progress func(done, total int64)
}

func (o VerifyOptions) withDefaults() (VerifyOptions, error) {
	set := 0
	for _, is := range []bool{o.Percent != 0 && o.Percent != 100, o.Points != nil, o.Resume} {
		if is {
			set++
		}
	}
	if o.Percent == 0 {
		o.Percent = 100
	}
	switch {
	case !(o.Percent > 0 && o.Percent <= 100): // NaN neither
		return o, fmt.Errorf("verify %v percent: want more than 0, up to 100", o.Percent)
	case o.Rate < 0:
		return o, fmt.Errorf("verify %d bytes a second: want a rate above 0", o.Rate)
	case set > 1:
		return o, errors.New("verify a share, some points, or what an interrupted verification left: only one of these")
	}
	return o, nil
}

// VerifyResult tells what was read and what is wrong.
type VerifyResult struct {
	Began         time.Time     `json:"began"`          // with Resume, of the verification that was interrupted
	Resumed       bool          `json:"resumed"`        // there was one to go on with
	CheckedChunks int64         `json:"checked_chunks"` // records read, map nodes included
	CheckedBytes  int64         `json:"checked_bytes"`  // plain bytes of those
	DamagedChunks int64         `json:"damaged_chunks"` // that points need and no segment has
	Errors        []VerifyError `json:"errors"`         // the first 10,000
}

// VerifyError is one place where a restore point, or with Point "" a file of the
// repository, is not what it should be.
type VerifyError struct {
	Point  PointID `json:"point"`
	VM     string  `json:"vm"`
	Disk   string  `json:"disk"`
	Offset int64   `json:"offset"`         // on the disk, bytes
	Length int64   `json:"length"`         // of the part of the disk that is lost
	File   string  `json:"file,omitempty"` // in the repository's folder, where it is known
	Reason string  `json:"reason"`
}

// Bounds of what a verification remembers.
const (
	// maxVerifyErrors bounds the list; a disk that failed whole has millions.
	maxVerifyErrors = 10_000
	// maxBadRecords bounds the damaged records whose places are reported and which are looked for
	// elsewhere, at about 300 bytes each. The others are counted, and remembered to be stored anew.
	maxBadRecords = 100_000
	// maxRounds bounds how often the trees are walked because segments were collected
	// meanwhile. What was read once is not read again.
	maxRounds = 100
	maxLost   = 10_000
)

// Verify reads chunks and map nodes that points need, deleted ones that stay for now among them,
// and compares each with its hash, and looks through the other files of the repository. Bad chunks are remembered, so that a
// backup that meets the same content stores it anew. What cannot be read is in the result, and
// the rest is verified all the same.
func (r *Repository) Verify(ctx context.Context, o VerifyOptions) (VerifyResult, error) {
	o, err := o.withDefaults()
	if err != nil {
		return VerifyResult{}, err
	}
	v := newVerification(r, o)
	if err := v.begin(); err != nil {
		return v.result, err
	}
	points, err := v.points()
	if err != nil {
		return v.result, err
	}
	// Pins keep a collection that runs meanwhile from taking what is about to be read.
	disks := v.open(points)
	defer closeDisks(disks)
	r.reindexAgain()
	complete, err := v.index(ctx, func() error { return v.run(ctx, disks, points) })
	if err != nil || !complete {
		return v.result, err
	}
	return v.result, v.end()
}

// index verifies the index before do. If the index is damaged, do may come to no end: what was lost with
// the index is verified the next time.
func (v *verification) index(ctx context.Context, do func() error) (complete bool, err error) {
	damaged := v.r.index.verify(ctx)
	if damaged != nil && !errors.Is(damaged, ErrIndexDamaged) {
		return false, damaged
	}
	if damaged != nil {
		v.add(VerifyError{File: indexDir, Reason: damaged.Error() + ", or by repo rebuild-index"})
	}
	err = do()
	if damaged != nil && errors.Is(err, ErrIndexDamaged) {
		return false, nil
	}
	return err == nil, err
}

func newVerification(r *Repository, o VerifyOptions) *verification {
	v := &verification{
		r: r, o: o, limit: newLimiter(o.Rate), since: noSince,
		checked: marks{}, seen: map[*segment]bool{}, strange: map[uint64]bool{}, bad: map[ID]badRecord{},
		result: VerifyResult{Began: time.Now().UTC().Truncate(time.Second), Errors: []VerifyError{}},
	}
	v.tell = func(_ ID, e VerifyError) { v.add(e) }
	return v
}

func closeDisks(disks []*Disk) {
	for _, d := range disks {
		d.unpin()
	}
}

// verification is one run of Verify.
type verification struct {
	r     *Repository
	o     VerifyOptions
	limit *limiter
	tell  func(ID, VerifyError) // hears from report of the places that need a bad chunk
	since int64                 // segments that were verified at this Unix time or later are passed over

	// The fields of one round; see run.
	needed marks
	walked walkedNodes
	clean  walkedNodes // nodes below which report found nothing bad
	// alone are the segments whose tables of contents can't be relied on: what points need of
	// them is read as mark comes to it.
	alone map[uint64]bool

	checked marks // records that were read, in all rounds
	// passed are the segments of which only what is known to be bad is read.
	passed map[uint64]bool
	seen   map[*segment]bool // envelopes has looked at them
	// all: a map node is bad, so nobody knows what was needed below it. Every record is
	// read, that a backup of the same content may store anew what is bad.
	all   bool
	node  []byte // where mark decodes nodes, by level
	lost  []ID   // in no segment, and not remembered yet; up to maxLost
	later bool   // this is not the first round

	mu sync.Mutex // guards the fields below, and calls of Progress
	// strange are segments whose tables of contents and the index disagree.
	strange map[uint64]bool
	// again: a segment that was to be read was collected meanwhile, or its table of contents
	// is damaged since.
	again  bool
	bad    map[ID]badRecord
	result VerifyResult
	done   int64
}

// badRecord is why a chunk or node cannot be had.
type badRecord struct{ file, reason string }

// noSince is later than any verification.
const noSince = 1<<63 - 1

// whole reports whether everything is to be verified.
func (v *verification) whole() bool { return v.o.Percent == 100 && v.o.Points == nil }

// begin notes when a verification of everything began, or finds out.
func (v *verification) begin() error {
	if !v.whole() {
		return nil
	}
	if v.o.Resume {
		began, err := v.r.index.verifyBegan()
		if err != nil {
			return err
		}
		if began != 0 {
			v.since, v.result.Resumed, v.result.Began = began, true, time.Unix(began, 0).UTC()
			return nil
		}
	}
	return v.r.index.write(func(w indexWrite) error { return w.setVerifyBegan(v.result.Began.Unix()) })
}

// end notes that a verification of everything is complete.
func (v *verification) end() error {
	if !v.whole() {
		return nil
	}
	return v.r.index.write(func(w indexWrite) error { return w.clearVerifyBegan() })
}

// points returns the points that were asked for. Deleted ones that the next collection does not purge are among
// all: an undelete brings them back, and the collection needs their maps.
func (v *verification) points() ([]Point, error) {
	all := v.r.keptPoints()
	if v.o.Points == nil {
		return all, nil
	}
	var out []Point
	for _, id := range v.o.Points {
		i := slices.IndexFunc(all, func(p Point) bool { return p.ID == id })
		if i < 0 {
			return nil, fmt.Errorf("point %s: %w", id, ErrNotFound)
		}
		out = append(out, all[i])
	}
	return out, nil
}

// open opens the disks of points; those that were purged just now are left out.
func (v *verification) open(points []Point) []*Disk {
	v.r.mu.Lock()
	defer v.r.mu.Unlock()
	var disks []*Disk
	for _, p := range points {
		if !v.r.knownLocked(p.ID) {
			continue
		}
		for _, d := range p.Disks {
			disks = append(disks, v.r.openLocked(p, d, DiskOptions{}))
		}
	}
	return disks
}

// run verifies in rounds: a collection that runs meanwhile moves records. What was moved before
// it was read is found, at its new place, by another walk over the trees.
func (v *verification) run(ctx context.Context, disks []*Disk, points []Point) error {
	if v.o.Points == nil {
		if err := v.files(ctx); err != nil {
			return err
		}
	}
	for range maxRounds {
		v.again = false
		if err := v.round(ctx, disks); err != nil {
			return err
		}
		found, err := v.elsewhere(ctx)
		if err != nil {
			return err
		}
		if !v.again && !found {
			return v.report(ctx, points)
		}
		v.later = true
	}
	return errors.New("verify: segments were collected faster than they could be read; verify again")
}

// round walks the trees and reads what they need and no earlier round has read.
func (v *verification) round(ctx context.Context, disks []*Disk) error {
	if err := v.r.appender.finish(); err != nil {
		return err
	}
	v.needed, v.walked, v.alone, v.all = marks{}, walkedNodes{}, map[uint64]bool{}, false
	segments := v.r.segments.sealedSegments()
	v.pass(segments)
	if err := v.envelopes(ctx, segments); err != nil {
		return err
	}
	for _, number := range v.r.segments.unsealed() {
		v.alone[number] = true // its writing has failed, or has just begun
	}
	for _, d := range disks {
		if err := v.mark(ctx, v.r.tree(d.m)); err != nil {
			return err
		}
	}
	if err := v.flushLost(); err != nil {
		return err
	}
	return v.read(ctx)
}

// flushLost remembers chunks that are in no segment.
func (v *verification) flushLost() error {
	lost := v.lost
	v.lost = nil
	return v.r.markDamaged(lost)
}

// pass finds the segments that an interrupted verification has read.
func (v *verification) pass(segments []*segment) {
	v.passed = map[uint64]bool{}
	v.r.segments.mu.Lock()
	defer v.r.segments.mu.Unlock()
	now := time.Now()
	for _, s := range segments {
		if s.summary.verified(now) >= v.since {
			v.passed[s.number] = true
		}
	}
}

// verified returns when the segment was verified last, in Unix time. What a clock wrote that ran ahead counts as
// never: the segment would be passed over until then.
func (s summary) verified(now time.Time) int64 {
	if s.VerifiedSec > now.Unix() {
		return 0
	}
	return s.VerifiedSec
}

// fail notes that a chunk or node cannot be had.
func (v *verification) fail(id ID, err error) {
	bad := badRecord{reason: err.Error()}
	if corrupt, ok := errors.AsType[*CorruptError](err); ok && corrupt.Segment != "" {
		bad.file = segmentsDir + "/" + corrupt.Segment + segmentSuffix
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if _, known := v.bad[id]; known {
		return
	}
	v.result.DamagedChunks++
	if len(v.bad) < maxBadRecords {
		v.bad[id] = bad
	}
}

// add adds to the list of errors.
func (v *verification) add(e VerifyError) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if len(v.result.Errors) < maxVerifyErrors {
		v.result.Errors = append(v.result.Errors, e)
	}
}

// count adds a record that was read.
func (v *verification) count(plain int64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.result.CheckedChunks++
	v.result.CheckedBytes += plain
}

// mark finds the records that a tree needs.
func (v *verification) mark(ctx context.Context, t tree) error {
	if t.id.IsNull() {
		return nil
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	loc, ok, err := v.r.locate(ctx, t.id)
	if err != nil {
		return err
	}
	if !ok {
		v.fail(t.id, v.r.missing(t.id))
		v.all = v.all || t.level > 0
		if v.lost = append(v.lost, t.id); len(v.lost) < maxLost {
			return nil
		}
		return v.flushLost()
	}
	single := v.alone[loc.Segment] || v.passed[loc.Segment] && v.r.Damaged(t.id)
	if v.needed.set(loc) && t.level == 0 && single && v.checked.set(loc) {
		return v.readOne(ctx, t.id)
	}
	if t.level == 0 || !v.walked.add(t.level, loc) {
		return nil
	}
	n, err := v.loadNode(ctx, t)
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

// loadNode reads a node past the cache: what is in memory proves nothing of what is on disk. It
// is valid until the next node of its level is read.
func (v *verification) loadNode(ctx context.Context, t tree) (Node, error) {
	if need := t.level * (nodeSize + decodeSlack); len(v.node) < need {
		v.node = append(v.node, make([]byte, need-len(v.node))...)
	}
	start := (t.level - 1) * (nodeSize + decodeSlack)
	n := v.node[start : start+nodeSize : start+nodeSize+decodeSlack]
	if err := v.limit.wait(ctx, nodeSize); err != nil {
		return nil, err
	}
	return n, v.r.load(t.id, nodeRecord, n, true)
}

// readOne checks a chunk by itself.
func (v *verification) readOne(ctx context.Context, id ID) error {
	if err := v.limit.wait(ctx, int64(v.r.chunkSize)); err != nil {
		return err
	}
	err := v.r.load(id, chunkRecord, make([]byte, v.r.chunkSize, v.r.chunkSize+decodeSlack), true)
	switch {
	case errors.Is(err, ErrDamaged):
		v.fail(id, err)
	case err != nil:
		return err
	case v.r.Damaged(id):
		v.r.damaged.remove([]ID{id})
	}
	v.count(int64(v.r.chunkSize))
	if errors.Is(err, ErrDamaged) {
		return nil
	}
	return err
}

// missing says why a chunk that locate does not find is not there.
func (r *Repository) missing(id ID) error {
	loc, ok, err := r.index.get(id)
	if err != nil || !ok {
		return &CorruptError{ID: id, Err: errors.New("it is in no segment")}
	}
	return &CorruptError{
		ID: id, Segment: segmentName(loc.Segment, loc.Generation, ""), Off: int64(loc.Off),
		Err: errors.New("the segment that held it is missing, and no other has it"),
	}
}

// report finds which disks suffer where.
func (v *verification) report(ctx context.Context, points []Point) error {
	if len(v.bad) == 0 {
		return nil
	}
	v.clean = walkedNodes{}
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
	length := min(v.r.span(t.level), d.Map.Size-start)
	if bad, ok := v.bad[t.id]; ok {
		v.tell(t.id, VerifyError{
			Point: p.ID, VM: p.VM, Disk: d.Name, Offset: start, Length: length,
			File: bad.file, Reason: bad.reason,
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
	if errors.Is(err, ErrDamaged) {
		v.tell(t.id, VerifyError{Point: p.ID, VM: p.VM, Disk: d.Name, Offset: start, Length: length, Reason: err.Error()})
		return true, nil
	}
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
	return found, ctx.Err()
}
