package blockstore

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
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
