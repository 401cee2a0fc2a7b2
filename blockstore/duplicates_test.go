package blockstore

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/durable"
)

// twoRecords is a repository in which a chunk of a point has two records, as after it was healed. The
// index knows the newer one.
type twoRecords struct {
	dir          string
	r            *Repository
	p            Point
	c            content
	id           ID
	older, newer location
}

func newTwoRecords(t *testing.T) *twoRecords {
	t.Helper()
	w := &twoRecords{dir: create(t, CreateOptions{}), c: numbers(1, 20)}
	w.r = open(t, w.dir, Options{})
	w.id = w.r.ID(chunkOf(7))
	dead := mustBackup(t, w.r, "x", numbers(100, 20)) // beside both records, that there is something to collect
	w.p = mustBackup(t, w.r, "vm", w.c)
	must(t, w.r.appender.finish())
	w.older = w.at(t)
	w.r.damaged.add(w.id)
	dead2 := mustBackup(t, w.r, "y", numbers(200, 20))
	mustBackup(t, w.r, "vm", w.c)
	must(t, w.r.appender.finish())
	if w.newer = w.at(t); w.newer.Segment <= w.older.Segment {
		t.Fatalf("the second record is in segment %d, the first in %d", w.newer.Segment, w.older.Segment)
	}
	must(t, errors.Join(w.r.DeletePoint(dead.ID), w.r.DeletePoint(dead2.ID)))
	return w
}

// at returns where the chunk is.
func (w *twoRecords) at(t *testing.T) location {
	t.Helper()
	loc, ok, err := w.r.find(w.id)
	if err != nil || !ok {
		t.Fatal(ok, err)
	}
	return loc
}

// rot damages one of the records.
func (w *twoRecords) rot(t *testing.T, loc location) {
	t.Helper()
	path := filepath.Join(w.dir, segmentsDir, segmentName(loc.Segment, loc.Generation, segmentSuffix))
	flip(t, path, int64(loc.Off)+recordHeaderSize+9)
	emptyCache(w.r)
}

// reopen closes the repository, calls between, and opens it.
func (w *twoRecords) reopen(t *testing.T, between func() error) {
	t.Helper()
	closeOnce(t, w.r)
	must(t, between())
	w.r = open(t, w.dir, Options{})
}

// Of a chunk with two records, one of them bad, the good one is what counts and what stays, whatever
// happens to the index and whichever segments a collection takes.
func TestTwoRecords(t *testing.T) {
	t.Parallel()
	loseIndex := func(w *twoRecords) func() error {
		return func() error { return os.RemoveAll(filepath.Join(w.dir, indexDir)) }
	}
	for _, tt := range []struct {
		name string
		do   func(t *testing.T, w *twoRecords)
	}{
		{"older rots, a kill leaves its segment unknown", func(t *testing.T, w *twoRecords) {
			w.rot(t, w.older)
			must(t, w.r.index.write(func(x indexWrite) error { return x.removeSummary(w.older.Segment) }))
			w.reopen(t, func() error { return nil })
		}},
		{"older rots, the index forgets the chunk", func(t *testing.T, w *twoRecords) {
			w.rot(t, w.older)
			must(t, w.r.index.write(func(x indexWrite) error { return x.remove(w.id) }))
		}},
		{"older rots, the index is lost", func(t *testing.T, w *twoRecords) {
			w.rot(t, w.older)
			w.reopen(t, loseIndex(w))
		}},
		{"newer rots, verify finds it, the index is lost", func(t *testing.T, w *twoRecords) {
			w.rot(t, w.newer)
			if v, err := w.r.Verify(t.Context(), VerifyOptions{}); err != nil || len(v.Errors) > 0 {
				t.Errorf("verify: got %+v, %v, want the other record found", v, err)
			}
			w.reopen(t, loseIndex(w))
		}},
		{"newer rots, a read finds it", func(t *testing.T, w *twoRecords) {
			w.rot(t, w.newer)
			if _, err := readDisk(w.r, w.p.ID); !errors.Is(err, ErrDamaged) {
				t.Errorf("read: got %v, want ErrDamaged", err)
			}
			// The collection keeps the good one; to look for it is a verification's work.
			if _, err := w.r.Collect(t.Context(), CollectOptions{}); err != nil {
				t.Error(err)
			}
			if v, err := w.r.Verify(t.Context(), VerifyOptions{}); err != nil || len(v.Errors) > 0 {
				t.Errorf("verify: got %+v, %v, want the other record found", v, err)
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			w := newTwoRecords(t)
			tt.do(t, w)
			checkDisk(t, w.r, w.p.ID, w.c)
			for range 2 {
				if _, err := w.r.Collect(t.Context(), CollectOptions{}); err != nil {
					t.Error(err)
				}
				w.reopen(t, loseIndex(w))
				checkDisk(t, w.r, w.p.ID, w.c)
			}
		})
	}
}

// A record whose checksum is right and whose content is not is known to be damaged; a collection that
// meets it does not forget that.
func TestCollectDoesNotHeal(t *testing.T) {
	t.Parallel()
	dir := create(t, CreateOptions{})
	r := open(t, dir, Options{})
	c := numbers(1, 20)
	id := r.ID(chunkOf(7))
	dead := mustBackup(t, r, "x", numbers(100, 20))
	if _, err := r.appender.append(id, chunkRecord, codecNone, testChunk, chunkOf(8)); err != nil {
		t.Fatal(err)
	}
	must(t, r.appender.flush())
	p := mustBackup(t, r, "vm", c)
	if v, err := r.Verify(t.Context(), VerifyOptions{}); err != nil || v.DamagedChunks != 1 || !r.Damaged(id) {
		t.Fatalf("verify: got %+v, %v, want one damaged chunk", v, err)
	}
	must(t, r.DeletePoint(dead.ID))
	if _, err := r.Collect(t.Context(), CollectOptions{}); err != nil {
		t.Error(err)
	}
	if !r.Damaged(id) {
		t.Error("a collection forgot that a chunk is damaged")
	}
	mustBackup(t, r, "vm", c)
	emptyCache(r)
	checkDisk(t, r, p.ID, c)
}

// The number of a segment that cannot be opened is not given to another, which would hide it for ever.
func TestUnopenedSegmentKeepsItsNumber(t *testing.T) {
	t.Parallel()
	dir := create(t, CreateOptions{})
	r := open(t, dir, Options{})
	c := numbers(1, 20)
	p := mustBackup(t, r, "vm", c)
	closeOnce(t, r)
	must(t, os.RemoveAll(filepath.Join(dir, indexDir)))
	fs := &faultyReads{FS: durable.OS(), fail: func(name string) error {
		if strings.HasSuffix(name, segmentSuffix) {
			return syscall.EIO
		}
		return nil
	}}
	r, err := Open(t.Context(), dir, Options{fs: fs, indexMemory: 1 << 20})
	must(t, err)
	_, _ = backup(t, r, "x", numbers(100, 5)) // what it stores is durable, whether it reads anything or not
	closeOnce(t, r)
	r = open(t, dir, Options{})
	checkDisk(t, r, p.ID, c)
	checkSound(t, r)
}

// A point that is deleted and not purged is verified, repaired and healed like others: it may come back,
// and collections wait for its maps.
func TestVerifyDeletedPoints(t *testing.T) {
	t.Parallel()
	dir := create(t, CreateOptions{DeleteQuarantine: time.Hour})
	r := open(t, dir, Options{})
	c := numbers(1, 20)
	p := mustBackup(t, r, "vm", c)
	must(t, r.DeletePoint(p.ID))
	must(t, r.appender.finish())
	loc, _, err := r.find(r.ID(chunkOf(7)))
	must(t, err)
	flip(t, segmentFiles(t, dir, segmentSuffix)[0], int64(loc.Off)+recordHeaderSize+9)
	v, err := r.Verify(t.Context(), VerifyOptions{})
	if err != nil || len(v.Errors) != 1 || v.Errors[0].Point != p.ID || v.Errors[0].Offset != 6*testChunk {
		t.Errorf("verify: got %+v, %v, want the chunk of the deleted point", v, err)
	}
	got, err := r.Repair(t.Context(), RepairOptions{Apply: true})
	if err != nil || got.LostChunks != 1 {
		t.Errorf("repair: got %+v, %v, want one chunk lost", got, err)
	}
	mustBackup(t, r, "vm", c)
	must(t, r.UndeletePoint(p.ID))
	checkDisk(t, r, p.ID, c)
	checkSound(t, r)
}

// A point's file that nobody may change, and that is worn, does not keep a repair from the rest.
func TestRepairImmutablePoint(t *testing.T) {
	t.Parallel()
	dir := create(t, CreateOptions{})
	fs := &immutableFS{FS: durable.OS()}
	r := open(t, dir, Options{fs: fs})
	p := mustBackup(t, r, "vm", numbers(1, 20))
	must(t, r.appender.finish())
	file := filepath.Join(pointsDir, string(p.ID)+pointSuffix)
	flip(t, filepath.Join(dir, file), 60)
	flip(t, segmentFiles(t, dir, segmentSuffix)[0], 20)
	fs.set(dir, []string{file})
	got, err := r.Repair(t.Context(), RepairOptions{Apply: true})
	if err != nil || len(got.Actions) != 2 || got.Actions[0].Done || !got.Actions[1].Done {
		t.Errorf("got %+v, %v, want the point's file left and the segment repaired", got, err)
	}
	fs.set(dir, nil)
	if got, err := r.Repair(t.Context(), RepairOptions{Apply: true}); err != nil || got.Remains() {
		t.Errorf("got %+v, %v, want nothing left to do", got, err)
	}
	checkSound(t, r)
}

// A segment that a repair replaced does not come back in the place of one that got its number since.
func TestRestoredSegmentHidesNone(t *testing.T) {
	t.Parallel()
	for _, first := range []bool{false, true} { // in the order of names
		dir := create(t, CreateOptions{})
		r := open(t, dir, Options{})
		c := numbers(1, 20)
		p := mustBackup(t, r, "vm", c)
		closeOnce(t, r)
		old := segmentName(1, 0, segmentSuffix)
		if !first {
			old = segmentName(1, 1<<64-1, segmentSuffix)
		}
		from := filepath.Join(dir, quarantineDir, "20260101T000000Z", segmentsDir)
		must(t, os.MkdirAll(from, 0o700))
		must(t, os.WriteFile(filepath.Join(from, old), mustRead(t, segmentFiles(t, dir, segmentSuffix)[0]), 0o600))
		restored, kept, err := RestoreQuarantine(dir, "20260101T000000Z")
		if err != nil || len(restored) > 0 || len(kept) != 1 {
			t.Errorf("got %v and %v, %v, want it kept", restored, kept, err)
		}
		r = open(t, dir, Options{})
		checkDisk(t, r, p.ID, c)
	}
}

// What was verified by a clock that ran ahead is verified again, and not passed over until then.
func TestVerifiedInTheFuture(t *testing.T) {
	t.Parallel()
	r := open(t, create(t, CreateOptions{}), Options{})
	mustBackup(t, r, "vm", numbers(1, 20))
	must(t, r.appender.finish())
	must(t, r.verified(r.segments.sealedSegments()[0], time.Now().Add(1000*time.Hour)))
	must(t, r.index.write(func(w indexWrite) error { return w.setVerifyBegan(time.Now().Unix()) }))
	if v, err := r.Verify(t.Context(), VerifyOptions{Resume: true}); err != nil || !v.Resumed || v.CheckedChunks != 21 {
		t.Errorf("got %+v, %v, want all read", v, err)
	}
}
