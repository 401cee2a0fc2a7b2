package blockstore

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"testing"

	"github.com/holdfast-backup/holdfast/internal/durable"
)

// faultyFS is the operating system's file system but for one operation, the
// n-th from when it is armed, which fails.
type faultyFS struct {
	durable.FS
	mu     sync.Mutex
	left   int // operations until the one that fails; 0 is never
	err    error
	hit    bool
	sticky bool // all operations after it fail, too
}

func (f *faultyFS) arm(n int, err error, sticky bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.left, f.err, f.hit, f.sticky = n, err, false, sticky
}

// step is called before every operation that changes something.
func (f *faultyFS) step() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.hit && f.sticky {
		return f.err
	}
	if f.left == 0 {
		return nil
	}
	if f.left--; f.left > 0 {
		return nil
	}
	f.hit = true
	return f.err
}

func (f *faultyFS) Create(name string) (durable.File, error) {
	if err := f.step(); err != nil {
		return nil, err
	}
	file, err := f.FS.Create(name)
	return faultyFile{file, f}, err
}

func (f *faultyFS) OpenWrite(name string) (durable.File, error) {
	file, err := f.FS.OpenWrite(name)
	return faultyFile{file, f}, err
}

func (f *faultyFS) Rename(a, b string) error {
	return errors.Join(f.step(), f.FS.Rename(a, b)) // it may have happened all the same
}

func (f *faultyFS) Remove(name string) error {
	if err := f.step(); err != nil {
		return err
	}
	return f.FS.Remove(name)
}

// Syncs are not passed on: what they are for, no test can see, and they take their time.
func (f *faultyFS) SyncDir(string) error { return f.step() }

type faultyFile struct {
	durable.File
	fs *faultyFS
}

func (f faultyFile) WriteAt(p []byte, off int64) (int, error) {
	if err := f.fs.step(); err != nil {
		n, _ := f.File.WriteAt(p[:len(p)/2], off) // a short write
		return n, err
	}
	return f.File.WriteAt(p, off)
}

func (f faultyFile) Sync() error { return f.fs.step() }
func (f faultyFile) Truncate(size int64) error {
	return errors.Join(f.fs.step(), f.File.Truncate(size))
}

// Every operation on files in turn fails, in a backup, a deletion or a
// collection. What was acknowledged stays, now and after reopening, and the next backup
// works.
func TestFaults(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		err    error
		sticky bool
		step   int
	}{{syscall.EIO, false, 1}, {syscall.ENOSPC, true, 4}} { // each round opens several repositories

		t.Run(fmt.Sprint(tt.err), func(t *testing.T) {
			t.Parallel()
			for n := 1; ; n += tt.step {
				fs := &faultyFS{FS: durable.OS()}
				parent := memoryDir(t)
				dir := createIn(t, parent, CreateOptions{})
				if !faultRound(t, dir, fs, n, tt.err, tt.sticky) {
					break
				}
				if err := os.RemoveAll(parent); err != nil {
					t.Fatal(err)
				}
				if t.Failed() {
					t.Fatalf("with operation %d failing", n)
				}
			}
		})
	}
}

// faultRound runs the operations with the n-th failing and reports whether there
// was an n-th.
func faultRound(t *testing.T, dir string, fs *faultyFS, n int, fault error, sticky bool) bool {
	r := open(t, dir, Options{SegmentSize: 96 << 10, fs: fs})
	acked := map[PointID]content{}
	keep, drop := numbers(1, 10), numbers(6, 12)
	acked[mustBackup(t, r, "vm", keep).ID] = keep
	doomed := mustBackup(t, r, "vm", drop)

	fs.arm(n, fault, sticky)
	next := numbers(16, 30)
	if p, err := backup(t, r, "vm", next); err == nil {
		acked[p.ID] = next
	} else if !errors.Is(err, fault) {
		t.Errorf("backup: got %v, want %v", err, fault)
	}
	if err := r.DeletePoint(doomed.ID); err != nil {
		acked[doomed.ID] = drop // it may or may not be listed; if it is, it must be whole
	}
	if _, err := r.Collect(t.Context(), CollectOptions{}); err != nil && !errors.Is(err, fault) {
		t.Errorf("collect: got %v, want %v", err, fault)
	}
	hit := fs.hit
	fs.arm(0, nil, false)

	check := func(r *Repository) {
		listed := map[PointID]bool{}
		for _, p := range r.Points() {
			listed[p.ID] = true
			want, ok := acked[p.ID]
			if !ok && sticky {
				want = next // neither acknowledged nor, on the failing disk, taken back
			} else if !ok {
				t.Errorf("point %s is listed and was never acknowledged", p.ID)
			}
			checkDisk(t, r, p.ID, want)
		}
		for id := range acked {
			if !listed[id] && id != doomed.ID {
				t.Errorf("point %s was acknowledged and is not listed", id)
			}
		}
		checkSound(t, r)
	}
	var crashed string
	if n%2 == 0 {
		crashed = crash(t, dir)
	}
	again := mustBackup(t, r, "vm", numbers(30, 30))
	acked[again.ID] = numbers(30, 30)
	check(r)
	_ = r.Close() // what failed before may be told of here
	discard(r)
	r = open(t, dir, Options{})
	check(r)
	closeOnce(t, r)
	if crashed != "" {
		delete(acked, again.ID)
		r = open(t, crashed, Options{})
		check(r)
		closeOnce(t, r)
	}
	return hit
}
