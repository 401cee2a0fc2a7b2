package blockstore

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/holdfast-backup/holdfast/internal/durable"
)

func TestVerifyOptions(t *testing.T) {
	t.Parallel()
	r := open(t, create(t, CreateOptions{}), Options{})
	p := mustBackup(t, r, "vm", numbers(1, 3))
	points := []PointID{p.ID}
	for _, o := range []VerifyOptions{
		{Percent: -1},
		{Percent: 101},
		{Rate: -1},
		{Percent: 10, Resume: true},
		{Percent: 10, Points: points},
		{Points: points, Resume: true},
	} {
		if v, err := r.Verify(t.Context(), o); err == nil {
			t.Errorf("%+v: got %+v, want a refusal", o, v)
		}
	}
	if _, err := r.Verify(t.Context(), VerifyOptions{Points: []PointID{NewPointID()}}); !errors.Is(err, ErrNotFound) {
		t.Errorf("a point that is not there: got %v, want %v", err, ErrNotFound)
	}
}

// Only what the points need is read, and segments that others need too don't count as verified.
func TestVerifyPoints(t *testing.T) {
	t.Parallel()
	dir := create(t, CreateOptions{})
	r := open(t, dir, Options{SegmentSize: 64 << 10})
	a := mustBackup(t, r, "a", numbers(1, 30))
	b := mustBackup(t, r, "b", numbers(31, 20))
	loc, ok, err := r.find(r.ID(chunkOf(7)))
	if err != nil || !ok {
		t.Fatal(ok, err)
	}
	if err := r.appender.finish(); err != nil {
		t.Fatal(err)
	}
	flip(t, filepath.Join(dir, segmentsDir, segmentName(loc.Segment, loc.Generation, segmentSuffix)), int64(loc.Off)+60)
	for _, tt := range []struct {
		point  Point
		chunks int64
		bad    int
	}{{b, 21, 0}, {a, 31, 1}} {
		v, err := r.Verify(t.Context(), VerifyOptions{Points: []PointID{tt.point.ID}})
		if err != nil || len(v.Errors) != tt.bad || v.CheckedChunks != tt.chunks {
			t.Errorf("VM %s: got %+v, %v, want %d records and %d errors", tt.point.VM, v, err, tt.chunks, tt.bad)
		}
		for _, e := range v.Errors {
			if e.Point != a.ID || e.Offset != 6*testChunk || !strings.Contains(e.File, segmentsDir) {
				t.Errorf("got %+v, want the point, its offset and the file", e)
			}
		}
	}
	for _, s := range r.segments.sealedSegments() {
		if s.summary.VerifiedSec != 0 {
			t.Errorf("segment %d counts as verified", s.number)
		}
	}
}

// An interrupted verification is gone on with, also after the repository was opened again: what it read
// is not read again, and what it found is found. A finished one leaves nothing to go on with.
func TestVerifyResume(t *testing.T) {
	t.Parallel()
	dir := create(t, CreateOptions{})
	o := Options{SegmentSize: 64 << 10}
	r := open(t, dir, o)
	mustBackup(t, r, "vm", numbers(1, 200))
	if err := r.appender.finish(); err != nil {
		t.Fatal(err)
	}
	flip(t, segmentFiles(t, dir, segmentSuffix)[0], segmentHeaderSize+60)
	ctx, cancel := context.WithCancel(t.Context())
	first, err := r.Verify(ctx, VerifyOptions{Progress: func(done, total int64) {
		if done > total/2 {
			cancel()
		}
	}})
	if !errors.Is(err, context.Canceled) || first.CheckedChunks < 50 {
		t.Fatalf("got %+v, %v, want it stopped in the middle", first, err)
	}
	closeOnce(t, r)
	r = open(t, dir, o)
	second, err := r.Verify(t.Context(), VerifyOptions{Resume: true})
	if err != nil || !second.Resumed || !second.Began.Equal(first.Began) || len(second.Errors) != 1 {
		t.Errorf("got %+v, %v, want the beginning %v and the damage that was found before", second, err, first.Began)
	}
	if all := int64(201); second.CheckedChunks+first.CheckedChunks > all+15 || second.CheckedChunks+first.CheckedChunks < all {
		t.Errorf("read %d and %d records of %d", first.CheckedChunks, second.CheckedChunks, all)
	}
	third, err := r.Verify(t.Context(), VerifyOptions{Resume: true})
	if err != nil || third.Resumed || third.CheckedChunks != 201 {
		t.Errorf("with nothing to go on with: got %+v, %v, want all read", third, err)
	}
}

// What a collection moves while a verification is at any step is checked at its new place.
func TestVerifyMoved(t *testing.T) {
	t.Parallel()
	for _, step := range []int{1, 3, 10, 20} {
		dir := createIn(t, memoryDir(t), CreateOptions{})
		r := open(t, dir, Options{SegmentSize: 16 << 20})
		doomed := mustBackup(t, r, "x", numbers(100, 30))
		kept := mustBackup(t, r, "vm", numbers(1, 20))
		if err := r.DeletePoint(doomed.ID); err != nil {
			t.Fatal(err)
		}
		asked := 0
		var mu sync.Mutex
		ctx := watchedContext{t.Context(), func() {
			mu.Lock()
			defer mu.Unlock()
			if asked++; asked != step {
				return
			}
			got, err := r.Collect(t.Context(), CollectOptions{})
			if err != nil || got.DeadChunks == 0 {
				t.Errorf("collect: got %+v, %v", got, err)
			}
			loc, ok, err := r.find(r.ID(chunkOf(7)))
			if err != nil || !ok {
				t.Error(ok, err)
				return
			}
			flip(t, filepath.Join(dir, segmentsDir, segmentName(loc.Segment, loc.Generation, segmentSuffix)), int64(loc.Off)+60)
		}}
		v, err := r.Verify(ctx, VerifyOptions{})
		if err != nil || asked < step || len(v.Errors) != 1 || v.Errors[0].Point != kept.ID || v.Errors[0].Offset != 6*testChunk {
			t.Errorf("collected at step %d of %d: got %+v, %v, want the damage at the new place", step, asked, v, err)
		}
	}
}

// A file of segments that is not what it should be costs what was in it, is named, and keeps nothing else from
// being verified. A backup heals what is lost.
func TestVerifySegmentFiles(t *testing.T) {
	t.Parallel()
	base := createIn(t, memoryDir(t), CreateOptions{})
	o := Options{SegmentSize: 64 << 10}
	r := open(t, base, o)
	p := mustBackup(t, r, "vm", numbers(1, 100))
	closeOnce(t, r)
	must := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	for name, harm := range map[string]func(first, second string){
		"truncated": func(first, _ string) { must(os.Truncate(first, 20_000)) },
		"emptied":   func(first, _ string) { must(os.Truncate(first, 0)) },
		"deleted":   func(first, _ string) { must(os.Remove(first)) },
		"grown": func(first, _ string) {
			f, err := os.OpenFile(first, os.O_APPEND|os.O_WRONLY, 0)
			must(err)
			_, err = f.Write(make([]byte, 5000))
			must(errors.Join(err, f.Close()))
		},
		"swapped": func(first, second string) {
			must(os.Rename(first, first+"x"))
			must(os.Rename(second, first))
			must(os.Rename(first+"x", second))
		},
		"folder": func(first, _ string) { must(os.Remove(first)); must(os.Mkdir(first, 0o700)) },
	} {
		for _, while := range []bool{false, true} { // it is open
			dir := crash(t, base)
			r := open(t, dir, o)
			files := segmentFiles(t, dir, segmentSuffix)
			if !while {
				closeOnce(t, r)
			}
			harm(files[2], files[4])
			if !while {
				r = open(t, dir, o)
			}
			v, err := r.Verify(t.Context(), VerifyOptions{})
			named := name == "grown" && !while // opening seals it again
			if err != nil || len(v.Errors) == 0 && !named {
				t.Errorf("%s, open %v: got %+v, %v, want errors", name, while, v, err)
			}
			for _, e := range v.Errors {
				named = named || strings.Contains(e.File, filepath.Base(files[2]))
			}
			if !named {
				t.Errorf("%s, open %v: got %+v, want the file named", name, while, v.Errors)
			}
			if _, err := readDisk(r, p.ID); (err == nil) != (v.DamagedChunks == 0) || err != nil && !strings.Contains(err.Error(), "offset") {
				t.Errorf("%s, open %v: read with %d damaged chunks: got %v", name, while, v.DamagedChunks, err)
			}
			mustBackup(t, r, "vm", numbers(1, 100))
			checkDisk(t, r, p.ID, numbers(1, 100))
			if v, err = r.Verify(t.Context(), VerifyOptions{}); err != nil || v.DamagedChunks > 0 {
				t.Errorf("%s, open %v, healed: got %+v, %v", name, while, v, err)
			}
			closeOnce(t, r)
		}
	}
}

// badSectors is a disk that cannot read a part of a file.
type badSectors struct {
	durable.FS
	file     string
	from, to int64
}

type badSectorsFile struct {
	durable.File
	fs *badSectors
}

func (f *badSectors) Open(name string) (durable.File, error) {
	file, err := f.FS.Open(name)
	return badSectorsFile{file, f}, err
}

func (f badSectorsFile) ReadAt(p []byte, off int64) (int, error) {
	if f.Name() == f.fs.file && off < f.fs.to && off+int64(len(p)) > f.fs.from {
		return 0, &os.PathError{Op: "read", Path: f.Name(), Err: syscall.EIO}
	}
	return f.File.ReadAt(p, off)
}

// What a disk cannot read is named, and the rest is verified.
func TestVerifyUnreadable(t *testing.T) {
	t.Parallel()
	dir := create(t, CreateOptions{})
	o := Options{SegmentSize: 64 << 10}
	r := open(t, dir, o)
	p := mustBackup(t, r, "vm", numbers(1, 100))
	closeOnce(t, r)
	path := segmentFiles(t, dir, segmentSuffix)[3]
	size := int64(len(mustRead(t, path)))
	for _, tt := range []struct {
		name     string
		from, to int64
		chunks   bool
	}{
		{"a record", 20_000, 20_001, true},
		{"the table of contents", size - 50, size - 49, false},
		{"the header", 3, 4, false},
		{"all of it", 0, size, true},
	} {
		fs := &badSectors{FS: durable.OS()}
		o.fs = fs
		r := open(t, crash(t, dir), o)
		fs.file, fs.from, fs.to = filepath.Join(r.segments.dir, filepath.Base(path)), tt.from, tt.to
		v, err := r.Verify(t.Context(), VerifyOptions{})
		if err != nil || len(v.Errors) == 0 || v.CheckedChunks < 85 || (v.DamagedChunks > 0) != tt.chunks {
			t.Errorf("%s: got %+v, %v", tt.name, v, err)
		}
		for _, e := range v.Errors {
			if !strings.Contains(e.Reason, syscall.EIO.Error()) || !strings.Contains(e.File, filepath.Base(path)) {
				t.Errorf("%s: got %+v, want the file and the reason", tt.name, e)
			}
		}
		fs.file = "" // the disk has recovered
		checkSound(t, r)
		if r.AnyDamaged() {
			t.Errorf("%s: what is good again counts as damaged", tt.name)
		}
		checkDisk(t, r, p.ID, numbers(1, 100))
	}
}

func mustRead(t *testing.T, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// A good record of a chunk counts, though the index points to a bad one.
func TestVerifyFindsOther(t *testing.T) {
	t.Parallel()
	dir := create(t, CreateOptions{})
	r := open(t, dir, Options{})
	c := numbers(1, 20)
	p := mustBackup(t, r, "vm", c)
	leaf, err := r.Leaf(p.Disks[0].Map, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []ID{leaf.Child(4), p.Disks[0].Map.Root} {
		old, _, err := r.find(id)
		if err != nil {
			t.Fatal(err)
		}
		if err := r.appender.finish(); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, segmentsDir, segmentName(old.Segment, old.Generation, segmentSuffix))
		if bytes.Equal(mustRead(t, path), nil) {
			t.Fatal("empty segment")
		}
		flip(t, path, int64(old.Off)+60)
		if err := r.markDamaged([]ID{id}); err != nil {
			t.Fatal(err)
		}
		mustBackup(t, r, "vm", c)
		if err := r.index.write(func(w indexWrite) error { return w.put([]entry{{id, old}}) }); err != nil {
			t.Fatal(err)
		}
		emptyCache(r)
		checkSound(t, r)
		checkDisk(t, r, p.ID, c)
	}
}

func TestLimiter(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l, start := newLimiter(100), time.Now()
		for range 11 {
			if err := l.wait(t.Context(), 50); err != nil {
				t.Fatal(err)
			}
		}
		if got, want := time.Since(start), 5*time.Second; got != want {
			t.Errorf("11 times 50 units at 100 a second took %v, want %v", got, want)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := l.wait(ctx, 1000); err != nil {
			t.Fatal(err)
		}
		if err := l.wait(ctx, 1); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v, want %v", err, context.DeadlineExceeded)
		}
	})
}
