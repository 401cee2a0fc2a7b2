package blockstore

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/image"
)

func TestStoreAndReopen(t *testing.T) {
	t.Parallel()
	for _, passphrase := range []string{"", "open sesame"} {
		t.Run("passphrase="+passphrase, func(t *testing.T) {
			t.Parallel()
			dir := create(t, CreateOptions{Passphrase: passphrase})
			o := Options{Passphrase: passphrase}
			r := open(t, dir, o)
			first := append(numbers(1, 300), make(content, 2*Fanout)...)
			first[len(first)-1] = 7
			second := append(content{}, first...)
			second[5], second[Fanout+3] = 1000, 1001
			p1 := mustBackup(t, r, "web", first)
			before := r.Stats()
			if before.Chunks != 300 || before.UniqueBytes != 300*testChunk {
				t.Errorf("got %+v, want 300 chunks", before)
			}
			p2 := mustBackup(t, r, "web", second)
			after := r.Stats()
			if after.Chunks != 302 {
				t.Errorf("got %d chunks after the second point, want 302", after.Chunks)
			}
			checkDisk(t, r, p1.ID, first)
			closeOnce(t, r)

			if raw, err := os.ReadFile(segmentFiles(t, dir, segmentSuffix)[0]); err != nil || bytes.Contains(raw, chunkOf(1)[:64]) != (passphrase == "") {
				t.Errorf("a chunk's bytes are to be seen in a segment: %v, %v", passphrase == "", err)
			}
			r = open(t, dir, o)
			checkDisk(t, r, p1.ID, first)
			checkDisk(t, r, p2.ID, second)
			checkSound(t, r)
			if got := r.Points(); len(got) != 2 || got[0].ID != p1.ID || !got[1].Time.After(got[0].Time) {
				t.Errorf("points: got %+v", got)
			}
			low, high := image.Extent{Off: 5 * testChunk, Len: testChunk}, image.Extent{Off: (Fanout + 3) * testChunk, Len: testChunk}
			for _, tt := range []struct {
				off, length int64
				want        []image.Extent
			}{
				{0, image.MaxSize, []image.Extent{low, high}},
				{low.End(), high.Off - low.End(), nil},
				{low.Off + 512, high.Off - low.Off, []image.Extent{
					{Off: low.Off + 512, Len: testChunk - 512}, {Off: high.Off, Len: 512},
				}},
				{high.Off, 1, []image.Extent{{Off: high.Off, Len: 1}}},
				{high.End(), image.MaxSize, nil},
			} {
				var diff []image.Extent
				for e, err := range r.Diff(t.Context(), p1.Disks[0].Map, p2.Disks[0].Map, tt.off, tt.length) {
					if err != nil {
						t.Fatal(err)
					}
					diff = append(diff, e)
				}
				if !slices.Equal(diff, tt.want) {
					t.Errorf("diff of %d bytes at %d: got %v, want %v", tt.length, tt.off, diff, tt.want)
				}
			}
		})
	}
}

func TestOpenErrors(t *testing.T) {
	t.Parallel()
	dir := create(t, CreateOptions{Passphrase: "right"})
	for _, tt := range []struct {
		name string
		open func() error
		want error
	}{
		{"missing", func() error { _, err := Open(t.Context(), filepath.Join(dir, "none"), Options{}); return err }, ErrNotRepository},
		{"no passphrase", func() error { _, err := Open(t.Context(), dir, Options{}); return err }, ErrWrongKey},
		{"wrong passphrase", func() error { _, err := Open(t.Context(), dir, Options{Passphrase: "wrong"}); return err }, ErrWrongKey},
		{"create again", func() error { return Create(dir, CreateOptions{}) }, ErrExists},
	} {
		if err := tt.open(); !errors.Is(err, tt.want) {
			t.Errorf("%s: got %v, want %v", tt.name, err, tt.want)
		}
	}
	for _, size := range []int{1, 8 << 10, 24 << 10, 8 << 20, -16384} {
		if err := Create(t.TempDir(), CreateOptions{ChunkSize: size}); err == nil {
			t.Errorf("chunk size %d was accepted", size)
		}
	}
	r := open(t, dir, Options{Passphrase: "right"})
	_, err := Open(t.Context(), dir, Options{Passphrase: "right"})
	if locked, ok := errors.AsType[*LockedError](err); !ok || !strings.Contains(locked.Holder, "process ") {
		t.Errorf("second opening: got %v, want a LockedError that names the process", err)
	}
	closeOnce(t, r)
}

// Sessions that run at the same time store a chunk once.
func TestInFlightDedup(t *testing.T) {
	t.Parallel()
	r := open(t, create(t, CreateOptions{}), Options{})
	c := numbers(1, 500)
	var wg sync.WaitGroup
	points := make([]Point, 4)
	for i := range points {
		wg.Go(func() {
			var err error
			if points[i], err = backup(t, r, "vm", c); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if got := r.Stats().Chunks; got != 500 {
		t.Errorf("got %d chunks, want 500", got)
	}
	for _, p := range points {
		checkDisk(t, r, p.ID, c)
	}
}

func TestDeleteAndCollect(t *testing.T) {
	t.Parallel()
	for _, passphrase := range []string{"", "secret"} {
		t.Run("passphrase="+passphrase, func(t *testing.T) {
			t.Parallel()
			dir := create(t, CreateOptions{Passphrase: passphrase})
			o := Options{Passphrase: passphrase}
			r := open(t, dir, o)
			first, second := numbers(1, 400), append(numbers(1, 390), numbers(1000, 10)...)
			p1 := mustBackup(t, r, "vm", first)
			p2 := mustBackup(t, r, "vm", second)
			held, err := r.OpenDisk(p1.ID, "vda", DiskOptions{Whole: true})
			if err != nil {
				t.Fatal(err)
			}
			if err := r.DeletePoint(p1.ID); err != nil {
				t.Fatal(err)
			}
			got, err := r.Collect(t.Context(), CollectOptions{})
			if err != nil || got.DeadChunks != 0 {
				t.Errorf("while the disk is open: got %+v, %v, want nothing dead", got, err)
			}
			all := make([]byte, held.Size())
			if err := image.ReadFull(held, all, 0); err != nil || !bytes.Equal(all, first.bytes()) {
				t.Errorf("an open disk of a deleted point: %v", err)
			}
			held.Close()
			dry, err := r.Collect(t.Context(), CollectOptions{DryRun: true})
			if err != nil || dry.DeadChunks != 11 || dry.FreedBytes != dry.DeadBytes { // 10 chunks, a leaf
				t.Errorf("dry run: got %+v, %v, want 11 dead that would be freed", dry, err)
			}
			before := r.Stats()
			got, err = r.Collect(t.Context(), CollectOptions{})
			if err != nil {
				t.Fatal(err)
			}
			after := r.Stats()
			if after.Chunks != 400 || got.DeadChunks != dry.DeadChunks || got.DeadChunks < 11 || before.StoredBytes-after.StoredBytes < 10*testChunk/2 {
				t.Errorf("collect: got %+v; before %+v, after %+v", got, before, after)
			}
			checkDisk(t, r, p2.ID, second)
			closeOnce(t, r)
			r = open(t, dir, o)
			checkDisk(t, r, p2.ID, second)
			checkSound(t, r)
			if again, err := r.Collect(t.Context(), CollectOptions{}); err != nil || again.DeadChunks != 0 {
				t.Errorf("a second collection: got %+v, %v", again, err)
			}
			if err := r.DeletePoint(p2.ID); err != nil {
				t.Fatal(err)
			}
			if _, err := r.Collect(t.Context(), CollectOptions{}); err != nil {
				t.Fatal(err)
			}
			if s := r.Stats(); s.StoredBytes != 0 || len(segmentFiles(t, dir, "")) != 0 {
				t.Errorf("without points: got %+v", s)
			}
		})
	}
}

// What a session found stored stays, though the point it came from is deleted and
// collected before the session commits.
func TestCollectBesideSession(t *testing.T) {
	t.Parallel()
	dir := create(t, CreateOptions{})
	r := open(t, dir, Options{})
	c := numbers(1, 200)
	p := mustBackup(t, r, "vm", c)
	found, based := r.Begin(), r.Begin()
	defer found.Close()
	defer based.Close()
	m, err := store(t, found, c)
	if err != nil {
		t.Fatal(err)
	}
	base, since := based.Base("vm", "vda")
	if since != p.ID || base != p.Disks[0].Map {
		t.Fatalf("base: got %+v of %s", base, since)
	}
	if err := r.DeletePoint(p.ID); err != nil {
		t.Fatal(err)
	}
	for range 2 { // twice, so that what was moved must be kept, too
		if got, err := r.Collect(t.Context(), CollectOptions{}); err != nil || got.DeadChunks != 0 {
			t.Fatalf("got %+v, %v, want nothing dead", got, err)
		}
	}
	for _, s := range []*Session{found, based} {
		got, err := s.Commit(t.Context(), Point{ID: NewPointID(), VM: "vm", Disks: []PointDisk{{Name: "vda", Map: m}}})
		if err != nil {
			t.Fatal(err)
		}
		checkDisk(t, r, got.ID, c)
	}
	// Small segments are put together meanwhile.
	for i := range uint32(40) {
		mustBackup(t, r, "small", content{5000 + i})
		if err := r.appender.finish(); err != nil { // seals
			t.Fatal(err)
		}
	}
	if _, err := r.Collect(t.Context(), CollectOptions{}); err != nil {
		t.Fatal(err)
	}
	if got := r.Stats().Segments; got > 10 {
		t.Errorf("got %d segments after the collection", got)
	}
	checkSound(t, r)
}

// A repository that was closed is free, also if a program was started while it was open
// and has not got rid of our files yet.
func TestLockAndChildren(t *testing.T) {
	t.Parallel()
	dir := create(t, CreateOptions{})
	for range 3 {
		unlock, err := lock(dir, nil)
		if err != nil {
			t.Fatal(err)
		}
		// What a child has between fork and exec: another descriptor of the same open file.
		fd, err := dupOfLock(dir)
		if err != nil {
			t.Fatal(err)
		}
		unlock()
		again, err := lock(dir, nil)
		if err != nil {
			t.Error(err)
		} else {
			again()
		}
		if err := unix.Close(fd); err != nil {
			t.Error(err)
		}
	}
}

// dupOfLock duplicates this process's descriptor of a repository's lock that
// has the lock.
func dupOfLock(dir string) (int, error) {
	path, err := filepath.EvalSymlinks(filepath.Join(dir, lockFile))
	if err != nil {
		return 0, err
	}
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return 0, err
	}
	for _, e := range fds {
		if target, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && target == path {
			fd, err := strconv.Atoi(e.Name())
			if err != nil {
				return 0, err
			}
			return unix.Dup(fd)
		}
	}
	return 0, os.ErrNotExist
}
