package blockstore

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/holdfast-backup/holdfast/internal/durable"
)

// immutableFS is a file system some of whose files carry the immutable attribute.
type immutableFS struct {
	durable.FS

	mu        sync.Mutex
	immutable map[string]bool
	// removing is called before a segment is removed; it may be nil.
	removing func(name string)
	refused  int // operations that failed with EPERM
}

func (f *immutableFS) set(dir string, files []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.immutable = map[string]bool{}
	for _, name := range files {
		f.immutable[filepath.Join(dir, name)] = true
	}
}

func (f *immutableFS) refuse(op, name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.immutable[name] {
		return nil
	}
	f.refused++
	return &os.PathError{Op: op, Path: name, Err: syscall.EPERM}
}

func (f *immutableFS) Immutable(name string) (bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.immutable[name], nil
}

func (f *immutableFS) OpenWrite(name string) (durable.File, error) {
	if err := f.refuse("open", name); err != nil {
		return nil, err
	}
	return f.FS.OpenWrite(name)
}

func (f *immutableFS) Remove(name string) error {
	if f.removing != nil && strings.HasSuffix(name, segmentSuffix) {
		f.removing(name)
	}
	if err := f.refuse("remove", name); err != nil {
		return err
	}
	return f.FS.Remove(name)
}

func (f *immutableFS) Rename(oldName, newName string) error {
	if err := errors.Join(f.refuse("rename", oldName), f.refuse("rename", newName)); err != nil {
		return err
	}
	return f.FS.Rename(oldName, newName)
}

func mustFiles(t *testing.T, r *Repository, id PointID) []string {
	t.Helper()
	files, err := r.PointFiles(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// TestPointFiles: what it names is all that a point needs, and no more.
func TestPointFiles(t *testing.T) {
	t.Parallel()
	dir := create(t, CreateOptions{})
	r := open(t, dir, Options{SegmentSize: 128 << 10})
	other := mustBackup(t, r, "other", numbers(1000, 40))
	if err := r.appender.finish(); err != nil {
		t.Fatal(err)
	}
	want := append(numbers(1, 40), 1001) // one chunk is in a segment of the other's
	p := mustBackup(t, r, "vm", want)
	files := mustFiles(t, r, p.ID)
	if got := unsealed(t, dir); len(got) > 0 {
		t.Errorf("segments %v can still be written to", got)
	}
	if !slices.Contains(files, filepath.Join(pointsDir, string(p.ID)+pointSuffix)) {
		t.Errorf("got %v, want the point's own file among them", files)
	}
	others := mustFiles(t, r, other.ID)
	closeOnce(t, r)
	removed := 0
	for _, path := range segmentFiles(t, dir, segmentSuffix) {
		if name := filepath.Join(segmentsDir, filepath.Base(path)); !slices.Contains(files, name) {
			removed++
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
			if !slices.Contains(others, name) {
				t.Errorf("%s is of neither point", name)
			}
		}
	}
	if removed == 0 || removed >= len(others) {
		t.Errorf("got %d files of the other point alone, of its %d", removed, len(others))
	}
	if err := os.RemoveAll(filepath.Join(dir, indexDir)); err != nil {
		t.Fatal(err)
	}
	checkDisk(t, open(t, dir, Options{}), p.ID, want)
}

// TestCollectionPassesOverImmutableSegments: what nobody can remove is not copied either, however
// often a collection runs, and is collected once it can be.
func TestCollectionPassesOverImmutableSegments(t *testing.T) {
	t.Parallel()
	dir := create(t, CreateOptions{})
	fsys := &immutableFS{FS: durable.OS()}
	r := open(t, dir, Options{fs: fsys, SegmentSize: 16 << 20})
	doomed := mustBackup(t, r, "x", numbers(100, 20))
	p := mustBackup(t, r, "vm", numbers(1, 20))
	for i := range uint32(smallCount + 2) { // as many small segments as would be put together
		mustBackup(t, r, "vm", numbers(1, 20+i))
		if err := r.appender.finish(); err != nil {
			t.Fatal(err)
		}
	}
	var files []string
	for _, p := range r.Points() {
		if p.VM == "vm" {
			files = append(files, mustFiles(t, r, p.ID)...)
		}
	}
	fsys.set(dir, files)
	if err := r.DeletePoint(doomed.ID); err != nil {
		t.Fatal(err)
	}
	before := r.Stats()
	for range 3 {
		got, err := r.Collect(t.Context(), CollectOptions{})
		if err != nil || got.FreedBytes != 0 || got.DeadBytes == 0 || got.ImmutableBytes != got.DeadBytes {
			t.Fatalf("collect: got %+v, %v, want that all that is dead stays", got, err)
		}
	}
	if after := r.Stats(); after.StoredBytes != before.StoredBytes || after.Segments != before.Segments {
		t.Errorf("after collections: got %+v, want %+v", after, before)
	}
	fsys.set(dir, nil)
	if got, err := r.Collect(t.Context(), CollectOptions{}); err != nil || got.FreedBytes == 0 || got.ImmutableBytes != 0 {
		t.Errorf("collect without attributes: got %+v, %v, want bytes freed", got, err)
	}
	checkDisk(t, r, p.ID, numbers(1, 20))
	checkSound(t, r)
}

// TestSegmentBecomesImmutableWhileCollected: it stays, nothing is lost, and later it goes.
func TestSegmentBecomesImmutableWhileCollected(t *testing.T) {
	t.Parallel()
	dir := create(t, CreateOptions{})
	fsys := &immutableFS{FS: durable.OS()}
	r := open(t, dir, Options{fs: fsys})
	doomed := mustBackup(t, r, "x", numbers(100, 60))
	p := mustBackup(t, r, "vm", append(numbers(100, 5), numbers(1, 100)...))
	want := append(numbers(100, 5), numbers(1, 100)...)
	if err := r.DeletePoint(doomed.ID); err != nil {
		t.Fatal(err)
	}
	fsys.removing = func(name string) { fsys.set("", []string{name}) }
	if got, err := r.Collect(t.Context(), CollectOptions{}); err != nil || fsys.refused == 0 || got.FreedBytes > 0 {
		t.Fatalf("collect: got %+v, %v, %d refused", got, err, fsys.refused)
	}
	checkDisk(t, r, p.ID, want)
	checkSound(t, r)
	if _, err := os.Stat(slices.Collect(maps.Keys(fsys.immutable))[0]); err != nil {
		t.Error(err)
	}
	fsys.removing = nil
	fsys.set(dir, nil)
	if got, err := r.Collect(t.Context(), CollectOptions{}); err != nil || got.FreedBytes <= 0 {
		t.Errorf("collect later: got %+v, %v, want bytes freed", got, err)
	}
	checkDisk(t, r, p.ID, want)
	checkSound(t, r)
}

// TestOpenWithImmutableSegments: a repository opens without its index, also if the end of a segment
// that nobody can write to is damaged.
func TestOpenWithImmutableSegments(t *testing.T) {
	t.Parallel()
	for _, cut := range []int64{0, footerSize, footerSize + 100} {
		t.Run(fmt.Sprint(cut), func(t *testing.T) {
			t.Parallel()
			dir := create(t, CreateOptions{})
			r := open(t, dir, Options{})
			p := mustBackup(t, r, "vm", numbers(1, 20))
			files := mustFiles(t, r, p.ID)
			closeOnce(t, r)
			if err := os.RemoveAll(filepath.Join(dir, indexDir)); err != nil {
				t.Fatal(err)
			}
			segment := filepath.Join(dir, files[0])
			info, err := os.Stat(segment)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(segment, info.Size()-cut); err != nil {
				t.Fatal(err)
			}
			fsys := &immutableFS{FS: durable.OS()}
			fsys.set(dir, files)
			r = open(t, dir, Options{fs: fsys})
			checkDisk(t, r, p.ID, numbers(1, 20))
			if _, err := r.Collect(t.Context(), CollectOptions{}); err != nil {
				t.Errorf("collect: %v", err)
			}
			if after, err := os.Stat(segment); err != nil || after.Size() != info.Size()-cut {
				t.Errorf("segment: got %v, %v, want it as it was", after, err)
			}
		})
	}
}

// TestSealedSegmentIsNotOpenForWriting: nothing of this process can change it.
func TestSealedSegmentIsNotOpenForWriting(t *testing.T) {
	t.Parallel()
	dir := create(t, CreateOptions{})
	r := open(t, dir, Options{})
	p := mustBackup(t, r, "vm", numbers(1, 20))
	loc, ok, err := r.find(r.ID(chunkOf(1)))
	if err != nil || !ok {
		t.Fatal(ok, err)
	}
	seg, err := r.segments.acquire(loc) // somebody reads while it is sealed
	if err != nil {
		t.Fatal(err)
	}
	files := mustFiles(t, r, p.ID)
	r.segments.release(seg)
	checkDisk(t, r, p.ID, numbers(1, 20))
	links, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, link := range links {
		target, err := os.Readlink(link)
		if err != nil || target != filepath.Join(dir, files[0]) {
			continue
		}
		info, err := os.ReadFile("/proc/self/fdinfo/" + filepath.Base(link))
		if err != nil {
			t.Fatal(err)
		}
		var pos, flags int
		if _, err := fmt.Sscanf(string(info), "pos:\t%d\nflags:\t%o", &pos, &flags); err != nil || flags&syscall.O_ACCMODE != syscall.O_RDONLY {
			t.Errorf("%s is open with flags %#o, %v", target, flags, err)
		}
	}
}
