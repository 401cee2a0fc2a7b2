package blockstore

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/holdfast-backup/holdfast/internal/durable"
)

// watchedContext calls a function whenever somebody asks whether it has ended.
type watchedContext struct {
	context.Context
	asked func()
}

func (c watchedContext) Err() error {
	c.asked()
	return c.Context.Err()
}

// watchedFS calls a function after a segment was removed.
type watchedFS struct {
	durable.FS
	removed func()
}

func (f watchedFS) Remove(name string) error {
	err := f.FS.Remove(name)
	if strings.HasSuffix(name, segmentSuffix) {
		f.removed()
	}
	return err
}

// A session stores chunks anew whose segment is being collected. The machine stops
// when that segment is gone: the point that had them before is whole.
func TestCollectionFlushesWhatReplacesIt(t *testing.T) {
	t.Parallel()
	dir := create(t, CreateOptions{})
	var crashed string
	fs := watchedFS{FS: durable.OS(), removed: func() { crashed = crash(t, dir) }}
	r := open(t, dir, Options{SegmentSize: 16 << 20, fs: fs})
	doomed := mustBackup(t, r, "x", numbers(100, 50))
	kept := mustBackup(t, r, "vm", numbers(1, 3))
	if err := r.DeletePoint(doomed.ID); err != nil {
		t.Fatal(err)
	}
	s := r.Begin()
	defer s.Close()
	var once sync.Once
	ctx := watchedContext{t.Context(), func() {
		r.segments.mu.Lock()
		condemned := false
		for _, seg := range r.segments.byNumber {
			condemned = condemned || seg.condemned
		}
		r.segments.mu.Unlock()
		if condemned {
			once.Do(func() {
				if _, err := store(t, s, numbers(1, 3)); err != nil {
					t.Error(err)
				}
			})
		}
	}}
	if got, err := r.Collect(ctx, CollectOptions{}); err != nil || got.DeadChunks < 50 || crashed == "" {
		t.Fatalf("collect: got %+v, %v", got, err)
	}
	checkDisk(t, open(t, crashed, Options{}), kept.ID, numbers(1, 3))
}

// The index takes entries and then fails. What it took must not be rested on if it is cut
// off the segment.
func TestIndexFails(t *testing.T) {
	t.Parallel()
	dir := create(t, CreateOptions{})
	r := open(t, dir, Options{SegmentSize: 16 << 20})
	first := mustBackup(t, r, "vm", numbers(1, 5))
	r.index.fault = func() error { return syscall.EIO }
	if _, err := backup(t, r, "vm", numbers(50, 5)); !errors.Is(err, syscall.EIO) {
		t.Errorf("got %v, want %v", err, syscall.EIO)
	}
	r.index.fault = nil
	second := mustBackup(t, r, "vm", numbers(50, 5))
	for range 2 {
		checkDisk(t, r, first.ID, numbers(1, 5))
		checkDisk(t, r, second.ID, numbers(50, 5))
		checkSound(t, r)
		closeOnce(t, r)
		r = open(t, dir, Options{})
	}
}

// Damage to a segment's header, to a record's header or to the table of contents costs
// that record at the most, also with the index gone, and no collection makes it more.
func TestDamagedStructure(t *testing.T) {
	t.Parallel()
	for _, passphrase := range []string{"", "secret"} {
		t.Run("passphrase="+passphrase, func(t *testing.T) {
			t.Parallel()
			dir := create(t, CreateOptions{Passphrase: passphrase})
			o := Options{Passphrase: passphrase, SegmentSize: 16 << 20}
			r := open(t, dir, o)
			doomed := mustBackup(t, r, "x", numbers(100, 5))
			kept := mustBackup(t, r, "vm", numbers(1, 40))
			unsealed := crash(t, dir)
			closeOnce(t, r)

			damaged := func(r *Repository) int {
				d, err := r.OpenDisk(kept.ID, "vda", DiskOptions{Whole: true})
				if err != nil {
					t.Fatal(err)
				}
				defer d.Close()
				n := 0
				for i := range uint32(40) {
					b := make([]byte, testChunk)
					if _, err := d.ReadAt(b, int64(i)*testChunk); err != nil {
						n++
					} else if string(b) != string(chunkOf(i+1)) {
						t.Errorf("chunk %d has other bytes", i)
					}
				}
				return n
			}
			place := func(id ID) int64 {
				r := open(t, crash(t, dir), o)
				defer closeOnce(t, r)
				loc, ok, err := r.find(id)
				if err != nil || !ok {
					t.Fatal(ok, err)
				}
				return int64(loc.Off)
			}
			chunk := place(r.ID(chunkOf(11)))
			path := segmentFiles(t, dir, segmentSuffix)[0]
			info, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			for _, tt := range []struct {
				name  string
				flips []int64
				lost  int
			}{
				{"header of the segment", []int64{30}, 0},
				{"magic of a record", []int64{chunk}, 1},
				{"length of a record", []int64{chunk + 13}, 1},
				{"contents", []int64{info.Size() - 100}, 0},
				{"contents and a record", []int64{info.Size() - 100, chunk}, 1},
				{"first record", []int64{segmentHeaderSize}, 0}, // of the doomed point
			} {
				for _, index := range []bool{true, false} {
					dir := crash(t, dir)
					for _, off := range tt.flips {
						flip(t, segmentFiles(t, dir, segmentSuffix)[0], off)
					}
					if !index {
						if err := os.RemoveAll(filepath.Join(dir, indexDir)); err != nil {
							t.Fatal(err)
						}
					}
					r := open(t, dir, o)
					if got := damaged(r); got != tt.lost {
						t.Errorf("%s, index %v: %d chunks are lost, want %d", tt.name, index, got, tt.lost)
					}
					if err := r.DeletePoint(doomed.ID); err != nil {
						t.Error(err)
					}
					if _, err := r.Collect(t.Context(), CollectOptions{}); err != nil {
						t.Errorf("%s, index %v: collect: %v", tt.name, index, err)
					}
					emptyCache(r)
					if got := damaged(r); got != tt.lost {
						t.Errorf("%s, index %v: %d chunks are lost after a collection, want %d", tt.name, index, got, tt.lost)
					}
					v, err := r.Verify(t.Context(), VerifyOptions{})
					if err != nil || tt.lost > 0 && len(v.Errors) == 0 {
						t.Errorf("%s, index %v: verify: got %+v, %v", tt.name, index, v.Errors, err)
					}
					again := mustBackup(t, r, "vm", numbers(1, 40))
					checkDisk(t, r, again.ID, numbers(1, 40))
					closeOnce(t, r)
				}
			}
			for off, lost := range map[int64]int{30: 0, segmentHeaderSize: 0, chunk: 1, chunk + 13: 1, chunk + 70: 1} {
				dir := crash(t, unsealed)
				flip(t, segmentFiles(t, dir, segmentSuffix)[0], off)
				r := open(t, dir, o)
				if got := damaged(r); got != lost {
					t.Errorf("unsealed, offset %d: %d chunks are lost, want %d", off, got, lost)
				}
				closeOnce(t, r)
			}
		})
	}
}

// A point that is wrong about a disk's size, and so about its tree's height, costs other points
// nothing.
func TestWrongHeight(t *testing.T) {
	t.Parallel()
	r := open(t, create(t, CreateOptions{}), Options{})
	c := append(numbers(1, 10), make(content, 2*Fanout)...)
	good := mustBackup(t, r, "vm", c)
	for range 8 {
		s := r.Begin()
		m := good.Disks[0].Map
		m.Size, m.Data = testChunk, testChunk
		_, err := s.Commit(t.Context(), Point{ID: NewPointID(), VM: "wrong", Disks: []PointDisk{{Name: "vda", Map: m}}})
		s.Close()
		if err != nil {
			t.Fatal(err)
		}
	}
	_, _ = r.Collect(t.Context(), CollectOptions{}) // whatever it says of the wrong points
	emptyCache(r)
	checkDisk(t, r, good.ID, c)
}

// stuckFS cannot settle the folder of points while it is stuck.
type stuckFS struct {
	durable.FS
	stuck bool
}

func (f *stuckFS) SyncDir(name string) error {
	if f.stuck && filepath.Base(name) == pointsDir {
		return syscall.EIO
	}
	return f.FS.SyncDir(name)
}

func (f *stuckFS) Remove(name string) error {
	if f.stuck && strings.HasSuffix(name, pointSuffix) {
		return syscall.EIO
	}
	return f.FS.Remove(name)
}

// The file of a point that was not acknowledged stays. No collection takes its chunks before
// the file is gone.
func TestUnsettledPoint(t *testing.T) {
	t.Parallel()
	dir := create(t, CreateOptions{})
	fs := &stuckFS{FS: durable.OS()}
	r := open(t, dir, Options{fs: fs})
	mustBackup(t, r, "vm", numbers(1, 5))
	fs.stuck = true
	if _, err := backup(t, r, "vm", numbers(50, 5)); !errors.Is(err, syscall.EIO) {
		t.Errorf("got %v, want %v", err, syscall.EIO)
	}
	if _, err := r.Collect(t.Context(), CollectOptions{}); !errors.Is(err, syscall.EIO) {
		t.Errorf("collect: got %v, want %v", err, syscall.EIO)
	}
	checkSound(t, open(t, crash(t, dir), Options{}))
	fs.stuck = false
	if got, err := r.Collect(t.Context(), CollectOptions{}); err != nil || got.DeadChunks != 6 {
		t.Errorf("collect: got %+v, %v, want 5 chunks and a leaf dead", got, err)
	}
	closeOnce(t, r)
	r = open(t, dir, Options{})
	if got := r.Points(); len(got) != 1 {
		t.Errorf("got points %v, want one", got)
	}
	checkSound(t, r)
}

// Verifications may run at the same time.
func TestTwoVerifications(t *testing.T) {
	t.Parallel()
	r := open(t, create(t, CreateOptions{}), Options{SegmentSize: 64 << 10})
	mustBackup(t, r, "vm", numbers(1, 100))
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() { checkSound(t, r) })
	}
	wg.Wait()
}

// A guest writes into its disk what looks like a record of somebody else's chunk. When the
// record around it is damaged and the segment is searched for whole ones, it does not count.
func TestForgedRecord(t *testing.T) {
	t.Parallel()
	dir := create(t, CreateOptions{})
	r := open(t, dir, Options{SegmentSize: 16 << 20})
	victim := r.ID(chunkOf(7))
	rng := rand.New(rand.NewPCG(11, 12))
	chunk := make([]byte, testChunk)
	for i := range chunk {
		chunk[i] = byte(rng.Uint32()) // stored as it is
	}
	lie := make([]byte, 8000)
	for i := range lie {
		lie[i] = byte(rng.Uint32())
	}
	forged := appendRecord(nil, nil, recordHeader{Type: chunkRecord, Codec: codecNone, Raw: uint32(len(lie)), Stored: uint32(len(lie)), ID: victim}, lie, 0)
	copy(chunk[1000:], forged)
	s := r.Begin()
	id := r.ID(chunk)
	if _, err := s.Put(id, chunk); err != nil {
		t.Fatal(err)
	}
	if _, err := store(t, s, content{1}); err != nil {
		t.Fatal(err)
	}
	if err := r.appender.flush(); err != nil {
		t.Fatal(err)
	}
	s.Close()
	loc, ok, err := r.find(id)
	if err != nil || !ok || int(loc.Stored) != testChunk {
		t.Fatalf("the chunk is not stored as it is: %+v, %v, %v", loc, ok, err)
	}
	crashed := crash(t, dir)
	flip(t, segmentFiles(t, crashed, segmentSuffix)[0], int64(loc.Off))
	if err := os.RemoveAll(filepath.Join(crashed, indexDir)); err != nil {
		t.Fatal(err)
	}
	r = open(t, crashed, Options{})
	if loc, ok, err := r.find(victim); err != nil || ok {
		t.Errorf("the forged record counts: %+v, %v", loc, err)
	}
	if _, ok, err := r.find(r.ID(chunkOf(1))); err != nil || !ok {
		t.Errorf("the whole record behind the damaged one does not count: %v", err)
	}
}

// A guest writes a chunk that ends like a sealed segment, and the machine stops right behind
// it: what the guest made up is not believed.
func TestForgedEnd(t *testing.T) {
	t.Parallel()
	dir := create(t, CreateOptions{})
	r := open(t, dir, Options{})
	rng := rand.New(rand.NewPCG(13, 14))
	chunk := make([]byte, testChunk)
	for i := range chunk {
		chunk[i] = byte(rng.Uint32()) // stored as it is
	}
	victim := r.ID(chunkOf(5))
	const start, end = segmentHeaderSize, segmentHeaderSize + recordHeaderSize + testChunk
	entries := []tocEntry{{ID: victim, Off: start, Raw: testChunk, Type: chunkRecord}}
	entries[0].Stored = uint32(end - len(encodeTail(0, entries, 0)) - start - recordHeaderSize)
	const guess = 0x0102030405060708 // of the segment's generation
	copy(chunk[end-len(encodeTail(0, entries, 0))-start-recordHeaderSize:], encodeTail(guess, entries, int64(start)+entries[0].size()))
	s := r.Begin()
	if _, err := s.Put(r.ID(chunk), chunk); err != nil {
		t.Fatal(err)
	}
	if err := r.appender.flush(); err != nil {
		t.Fatal(err)
	}
	s.Close()
	crashed := crash(t, dir)
	if err := os.RemoveAll(filepath.Join(crashed, indexDir)); err != nil {
		t.Fatal(err)
	}
	file, err := os.ReadFile(segmentFiles(t, crashed, segmentSuffix)[0])
	if err != nil || len(file) != end {
		t.Fatalf("the segment has %d bytes, %v, want %d", len(file), err, end)
	}
	if got, err := readEntries(bytesFile{bytes.NewReader(file)}, int64(len(file)), guess); err != nil || got[0].ID != victim {
		t.Fatalf("the forgery is not what it should be: %v, %v", got, err)
	}
	r = open(t, crashed, Options{})
	if loc, ok, err := r.find(victim); err != nil || ok {
		t.Errorf("the forged table of contents counts: %+v, %v", loc, err)
	}
	if _, ok, err := r.find(r.ID(chunk)); err != nil || !ok {
		t.Errorf("the record that is there does not count: %v", err)
	}
}
