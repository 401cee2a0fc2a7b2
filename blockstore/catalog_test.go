package blockstore

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/durable"
	"github.com/holdfast-backup/holdfast/internal/faultfs"
)

// pointsFile returns the path of a file in the folder of points.
func pointsFile(name string) string { return filepath.Join(testDir, pointsDir, name) }

func pointFileName(n int) string { return pointsFile(string(pointNamed(n)) + pointSuffix) }

func fileOf(t *testing.T, fs *faultfs.FS, name string) []byte {
	t.Helper()
	data, err := durable.ReadFile(fs, name, maxEnvelopeFile)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func putFile(t *testing.T, fs *faultfs.FS, name string, data []byte) {
	t.Helper()
	if err := durable.WriteFile(fs, name, data); err != nil {
		t.Fatal(err)
	}
}

func mustOpenPoints(t *testing.T, fs *faultfs.FS, k *keys, clock *testClock) *Repository {
	t.Helper()
	r, err := openPoints(fs, k, clock)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// flipAt returns data with bits changed at offsets.
func flipAt(data []byte, at ...int) []byte {
	data = bytes.Clone(data)
	for _, i := range at {
		data[i] ^= 0x10
	}
	return data
}

// One copy of an envelope is enough, whatever has happened to the other.
func TestEnvelopeTwice(t *testing.T) {
	t.Parallel()
	for _, n := range []int{0, 1, envelopeAlign - envelopeHeaderSize - 1, envelopeAlign - envelopeHeaderSize, envelopeAlign, 3*envelopeAlign + 5} {
		for _, k := range []*keys{nil, fixedKeys()} {
			s := fixedSealer(k)
			payload := bytes.Repeat([]byte{7}, n)
			data, err := s.encode(pointKind, "name", payload)
			must(t, err)
			second := len(data) / 2 / envelopeAlign * envelopeAlign
			if second*2 < len(data) {
				second = alignUp(len(data) / 2)
			}
			length := len(data) - second
			for _, tt := range []struct {
				name string
				data []byte
				good bool
			}{
				{"as written", data, true},
				{"magic of the first", flipAt(data, 0), true},
				{"length of the first", flipAt(data, 12), true},
				{"length of the first, much too large", flipAt(data, 15), true},
				{"end of the first", flipAt(data, length-1), true},
				{"magic of the second", flipAt(data, second), true},
				{"end of the second", flipAt(data, len(data)-1), true},
				{"first block is zeros", append(make([]byte, min(second, envelopeAlign)), data[min(second, envelopeAlign):]...), true},
				{"second is cut off", data[:second], true},
				{"something follows", append(bytes.Clone(data), 1), true},
				{"both", flipAt(data, 0, second), false},
				{"both, elsewhere", flipAt(data, length-1, second+36), false},
				{"first is cut short", data[:length-1], false},
				{"empty", nil, false},
			} {
				got, err := s.decode(pointKind, "name", tt.data)
				if (err == nil) != tt.good || tt.good && !bytes.Equal(got.payload, payload) {
					t.Errorf("%d bytes, %s: got %d bytes, %v, want good %v", n, tt.name, len(got.payload), err, tt.good)
				}
				if tt.good && (got.worn == bytes.Equal(tt.data, data) || !bytes.Equal(twice(got.one), data)) {
					t.Errorf("%d bytes, %s: worn %v, and rewritten as it was %v", n, tt.name, got.worn, bytes.Equal(twice(got.one), data))
				}
			}
			if _, err := s.decode(pointKind, "other", data); !errors.Is(err, errForged) {
				t.Errorf("under another name: got %v, want %v", err, errForged)
			}
		}
	}
}

// Files of points and of the catalog are damaged, taken away, put back and exchanged. All is noticed, nothing
// that can be known is lost, and a repair brings it to an end.
func TestPointsTampered(t *testing.T) {
	t.Parallel()
	live := func(numbers ...int) map[PointID]pointState {
		states := map[PointID]pointState{}
		for _, n := range numbers {
			states[pointNamed(n)] = stateLive
		}
		return states
	}
	for _, tt := range []struct {
		name   string
		tamper func(t *testing.T, fs *faultfs.FS, old map[string][]byte)
		want   map[PointID]pointState
		kinds  []string // of the problems
		lost   bool     // the catalog was
	}{
		{"nothing", func(*testing.T, *faultfs.FS, map[string][]byte) {}, live(1, 2), nil, false},
		{"half of a point", func(t *testing.T, fs *faultfs.FS, _ map[string][]byte) {
			putFile(t, fs, pointFileName(1), flipAt(fileOf(t, fs, pointFileName(1)), 60))
		}, live(1, 2), []string{ProblemWorn}, false},
		{"a point", func(t *testing.T, fs *faultfs.FS, _ map[string][]byte) {
			putFile(t, fs, pointFileName(1), []byte("rot"))
		}, live(2), []string{ProblemUnreadable}, false},
		{"a point is missing", func(t *testing.T, fs *faultfs.FS, _ map[string][]byte) {
			must(t, fs.Remove(pointFileName(1)))
		}, live(2), []string{ProblemMissing}, false},
		{"a point is another of the same name", func(t *testing.T, fs *faultfs.FS, old map[string][]byte) {
			putFile(t, fs, pointFileName(1), old["first 1"])
		}, live(2), []string{ProblemSwapped}, false},
		{"a purged point is back", func(t *testing.T, fs *faultfs.FS, old map[string][]byte) {
			putFile(t, fs, pointFileName(3), old["3"])
		}, live(1, 2), []string{ProblemUnlisted}, false},
		{"one catalog", func(t *testing.T, fs *faultfs.FS, _ map[string][]byte) {
			putFile(t, fs, pointsFile(catalogFile), []byte("rot"))
		}, live(1, 2), []string{ProblemCatalog}, false},
		{"the other", func(t *testing.T, fs *faultfs.FS, _ map[string][]byte) {
			must(t, fs.Remove(pointsFile(catalogCopyFile)))
		}, live(1, 2), []string{ProblemCatalog}, false},
		{"half of a catalog", func(t *testing.T, fs *faultfs.FS, _ map[string][]byte) {
			putFile(t, fs, pointsFile(catalogFile), flipAt(fileOf(t, fs, pointsFile(catalogFile)), 0))
		}, live(1, 2), []string{ProblemCatalog}, false},
		{"an older catalog", func(t *testing.T, fs *faultfs.FS, old map[string][]byte) {
			putFile(t, fs, pointsFile(catalogFile), old["catalog"])
		}, live(1, 2), []string{ProblemCatalog}, false},
		{"an older copy", func(t *testing.T, fs *faultfs.FS, old map[string][]byte) {
			putFile(t, fs, pointsFile(catalogCopyFile), old["catalog"])
		}, live(1, 2), []string{ProblemCatalog}, false},
		{"both older", func(t *testing.T, fs *faultfs.FS, old map[string][]byte) {
			putFile(t, fs, pointsFile(catalogFile), old["catalog"])
			putFile(t, fs, pointsFile(catalogCopyFile), old["catalog"])
		}, live(1, 2), []string{ProblemCatalog, ProblemMissing}, true}, // point 3 was there then
		{"both lost", func(t *testing.T, fs *faultfs.FS, _ map[string][]byte) {
			must(t, fs.Remove(pointsFile(catalogFile)))
			putFile(t, fs, pointsFile(catalogCopyFile), []byte("rot"))
		}, live(1, 2), []string{ProblemCatalog, ProblemCatalog, ProblemCatalog}, true},
	} {
		for _, k := range []*keys{nil, fixedKeys()} {
			t.Run(fmt.Sprintf("%s, encrypted=%v", tt.name, k != nil), func(t *testing.T) {
				t.Parallel()
				clock, old := newTestClock(), map[string][]byte{}
				fs := newPoints(t, k, clock, 0)
				r := mustOpenPoints(t, fs, k, clock)
				must(t, commitPoint(r, pointNamed(1), 0))
				old["first 1"] = fileOf(t, fs, pointFileName(1))
				must(t, r.DeletePoint(pointNamed(1)))
				must(t, r.purge())
				must(t, commitPoint(r, pointNamed(3), 0))
				old["3"], old["catalog"] = fileOf(t, fs, pointFileName(3)), fileOf(t, fs, pointsFile(catalogFile))
				must(t, r.DeletePoint(pointNamed(3)))
				must(t, r.purge())
				must(t, commitPoint(r, pointNamed(1), 0))
				must(t, commitPoint(r, pointNamed(2), 0))
				tt.tamper(t, fs, old)
				checkTampered(t, fs, k, clock, tt.want, tt.kinds, tt.lost)
			})
		}
	}
}

// checkTampered opens a repository and compares what it tells with what it should, then repairs it.
func checkTampered(t *testing.T, fs *faultfs.FS, k *keys, clock *testClock, want map[PointID]pointState, kinds []string, lost bool) {
	t.Helper()
	for range 2 { // opening changes nothing
		r := mustOpenPoints(t, fs, k, clock)
		var got []string
		for _, p := range r.PointProblems() {
			got = append(got, p.Kind)
			if p.Kind != ProblemCatalog && p.Kind != ProblemUnreadable && (p.VM != "vm" || p.Time.IsZero()) {
				t.Errorf("problem %v does not name the VM and the time", p.Err)
			}
		}
		if states := pointStates(r); !maps.Equal(states, want) || !slices.Equal(got, kinds) {
			t.Fatalf("got points %v with problems %v, want %v with %v", states, got, want, kinds)
		}
		withheld := slices.ContainsFunc(kinds, func(s string) bool {
			return s == ProblemUnreadable || s == ProblemMissing || s == ProblemSwapped
		})
		if err := r.collectable(); (err != nil) != (withheld || lost) {
			t.Errorf("a collection may run: %v", err)
		}
	}
	r := mustOpenPoints(t, fs, k, clock)
	if err := r.DeletePoint(pointNamed(2)); errors.Is(err, ErrCatalogLost) != lost {
		t.Errorf("a deletion: got %v", err)
	} else if err == nil {
		must(t, r.UndeletePoint(pointNamed(2)))
	}
	for _, p := range r.PointProblems() {
		switch p.Kind {
		case ProblemWorn:
			must(t, r.RewritePoint(p.ID))
		case ProblemUnlisted:
			must(t, fs.Remove(pointFileName(3)))
		}
	}
	must(t, r.RepairCatalog())
	for _, d := range r.DamagedPoints() {
		must(t, r.DeletePoint(d.ID))
	}
	must(t, r.purge())
	must(t, r.CheckPoints(t.Context()))
	again := mustOpenPoints(t, fs, k, clock)
	checkPoints(t, again, want, want)
	must(t, again.collectable())
}

// While a repository is open, rot of a point's file costs nothing: it is written anew from memory.
func TestRewriteFromMemory(t *testing.T) {
	t.Parallel()
	clock := newTestClock()
	fs := newPoints(t, nil, clock, 0)
	r := mustOpenPoints(t, fs, nil, clock)
	must(t, commitPoint(r, pointNamed(1), time.Hour))
	written := fileOf(t, fs, pointFileName(1))
	must(t, fs.Remove(pointFileName(1)))
	must(t, r.CheckPoints(t.Context()))
	if p := r.PointProblems(); len(p) != 1 || p[0].Kind != ProblemWorn || len(r.Points()) != 1 {
		t.Errorf("got %v, want the point to be there and worn", p)
	}
	must(t, r.RewritePoint(pointNamed(1)))
	if !bytes.Equal(fileOf(t, fs, pointFileName(1)), written) {
		t.Error("the file is another than was written first")
	}
	states := map[PointID]pointState{pointNamed(1): stateLocked}
	checkPoints(t, mustOpenPoints(t, fs, nil, clock), states, states)
}

// A lock holds for as long as was said, whatever is done to clocks, machines and files.
func TestLockLasts(t *testing.T) {
	t.Parallel()
	const day = 24 * time.Hour
	for _, tt := range []struct {
		name string
		then func(t *testing.T, c *testClock, fs *faultfs.FS)
		want bool // it is locked
	}{
		{"at once", func(*testing.T, *testClock, *faultfs.FS) {}, true},
		{"nearly", func(_ *testing.T, c *testClock, _ *faultfs.FS) { c.pass(10*day - time.Second) }, true},
		{"its time is over", func(_ *testing.T, c *testClock, _ *faultfs.FS) { c.pass(10 * day) }, false},
		{"clock set forward", func(_ *testing.T, c *testClock, _ *faultfs.FS) { c.wall = c.wall.Add(1000 * day) }, true},
		{"clock set back", func(_ *testing.T, c *testClock, _ *faultfs.FS) { c.pass(10 * day); c.wall = c.wall.Add(-1000 * day) }, false},
		{"off for long", func(_ *testing.T, c *testClock, _ *faultfs.FS) {
			c.wall, c.boot, c.up = c.wall.Add(1000*day), "two", time.Minute
		}, true},
		{"another machine that ran for long", func(_ *testing.T, c *testClock, _ *faultfs.FS) { c.boot, c.up = "other", 1000*day }, true},
		{"the clock's file and a catalog are gone", func(t *testing.T, c *testClock, fs *faultfs.FS) {
			c.wall = c.wall.Add(1000 * day)
			must(t, fs.Remove(pointsFile(catalogFile)))
			must(t, fs.Remove(pointsFile(clockFile)))
		}, true},
		{"all but the points is gone", func(t *testing.T, c *testClock, fs *faultfs.FS) {
			c.wall = c.wall.Add(1000 * day)
			for _, name := range []string{catalogFile, catalogCopyFile, clockFile} {
				must(t, fs.Remove(pointsFile(name)))
			}
		}, true},
	} {
		clock := newTestClock()
		fs := newPoints(t, nil, clock, 0)
		r := mustOpenPoints(t, fs, nil, clock)
		must(t, commitPoint(r, pointNamed(1), 10*day))
		must(t, r.keepTime())
		tt.then(t, clock, fs)
		r = mustOpenPoints(t, fs, nil, clock)
		must(t, r.RepairCatalog())
		err := r.DeletePoint(pointNamed(1))
		if locked := errors.Is(err, ErrLocked); locked != tt.want || err != nil && !locked {
			t.Errorf("%s: got %v, want locked %v", tt.name, err, tt.want)
		}
	}
}

// A lock is made longer and never shorter; a deleted point is brought back or purged in its time.
func TestLockAndQuarantine(t *testing.T) {
	t.Parallel()
	clock := newTestClock()
	fs := newPoints(t, nil, clock, time.Hour)
	r := mustOpenPoints(t, fs, nil, clock)
	id := pointNamed(1)
	must(t, commitPoint(r, id, 2*time.Hour))
	if _, err := r.LockPoint(id, time.Hour); !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), "2026-11-22T10:00:00Z") {
		t.Errorf("a shorter lock: got %v, want a refusal that names the time", err)
	}
	until, err := r.LockPoint(id, 3*time.Hour)
	if want := clock.wall.Add(3 * time.Hour); err != nil || !until.Equal(want) {
		t.Errorf("a longer lock: got %v, %v, want %v", until, err, want)
	}
	for _, d := range []time.Duration{0, -time.Hour, MaxLock + 1} {
		if _, err := r.LockPoint(id, d); err == nil {
			t.Errorf("a lock for %v was made", d)
		}
	}
	clock.pass(3 * time.Hour)
	must(t, r.DeletePoint(id))
	must(t, r.SetDeleteQuarantine(0)) // which is for later deletions
	must(t, r.purge())
	clock.pass(time.Hour - time.Second)
	r = mustOpenPoints(t, fs, nil, clock)
	must(t, r.purge())
	if _, err := r.Point(id); !errors.Is(err, ErrNotFound) || len(r.DeletedPoints()) != 1 {
		t.Errorf("deleted: got %v, and deleted points %v", err, r.DeletedPoints())
	}
	if _, err := r.OpenDisk(id, "vda", DiskOptions{}); !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), "undelete") {
		t.Errorf("a disk of a deleted point: got %v, want a hint", err)
	}
	if !r.takenLocked(id) {
		t.Error("the id of a deleted point can be used again")
	}
	must(t, r.UndeletePoint(id))
	must(t, r.DeletePoint(id)) // kept for no time now
	must(t, r.purge())
	if len(pointStates(r)) != 0 {
		t.Errorf("got points %v, want none", pointStates(r))
	}
	if err := r.UndeletePoint(id); !errors.Is(err, ErrNotFound) {
		t.Errorf("a purged point: got %v, want %v", err, ErrNotFound)
	}
}

// A point whose file is immutable is not purged.
func TestPurgeImmutable(t *testing.T) {
	t.Parallel()
	clock := newTestClock()
	fs := newPoints(t, nil, clock, 0)
	r := mustOpenPoints(t, fs, nil, clock)
	must(t, commitPoint(r, pointNamed(1), 0))
	must(t, r.DeletePoint(pointNamed(1)))
	must(t, fs.SetImmutable(pointFileName(1), true))
	must(t, r.purge())
	if n := len(r.kept(false)); n != 1 {
		t.Errorf("a collection keeps %d points, want 1", n)
	}
	must(t, fs.SetImmutable(pointFileName(1), false))
	must(t, r.purge())
	if n := len(r.kept(false)); n != 0 {
		t.Errorf("a collection keeps %d points, want none", n)
	}
}

// The chain tells a head of this repository from others, as long as the catalog knows of it.
func TestDescends(t *testing.T) {
	t.Parallel()
	s := fixedSealer(fixedKeys())
	c, heads := s.newCatalog(), []string{}
	for n := range maxChanges + 100 {
		heads = append(heads, c.head())
		c.record(s, Change{Op: OpLock, Point: pointNamed(n)})
	}
	data, err := s.encodeCatalog(c)
	must(t, err)
	c, _, err = s.decodeCatalog(data)
	must(t, err)
	must(t, c.descends(s, c.head()))
	for _, n := range []int{0, 99, 100, 101, 500, len(heads) - 1} {
		if err := c.descends(s, heads[n]); (err == nil) != (n >= 100) {
			t.Errorf("head %d: got %v", n, err)
		}
	}
	other := s.newCatalog()
	for range len(heads) {
		other.record(s, Change{Op: OpDelete})
	}
	if err := c.descends(s, other.head()); err == nil {
		t.Error("the head of another history is taken for one of this")
	}
	if err := c.descends(s, "1"); !errors.Is(err, ErrHead) {
		t.Errorf("got %v, want %v", err, ErrHead)
	}
}

// BenchmarkCatalog is what a commit's catalog takes with 10,000 points: two files that each hold it twice.
func BenchmarkCatalog(b *testing.B) {
	for _, k := range []*keys{nil, fixedKeys()} {
		b.Run(fmt.Sprintf("encrypted=%v", k != nil), func(b *testing.B) {
			r := benchmarkPoints(b, k, 10_000)
			size := 0
			for b.Loop() {
				r.mu.Lock()
				if err := r.change(func(c *catalog) { c.record(r.sealer, Change{Op: OpSet}) }); err != nil {
					b.Fatal(err)
				}
				r.mu.Unlock()
			}
			for _, name := range []string{catalogFile, catalogCopyFile} {
				data, err := durable.ReadFile(r.fs, filepath.Join(r.dir, pointsDir, name), maxEnvelopeFile)
				if err != nil {
					b.Fatal(err)
				}
				size += len(data)
			}
			b.ReportMetric(float64(size), "bytes-on-disk")
		})
	}
}

// benchmarkPoints returns a repository on the disk whose catalog lists n points.
func benchmarkPoints(b *testing.B, k *keys, n int) *Repository {
	b.Helper()
	dir := b.TempDir()
	if err := durable.OS().Mkdir(filepath.Join(dir, pointsDir)); err != nil {
		b.Fatal(err)
	}
	o, err := Options{}.withDefaults()
	if err != nil {
		b.Fatal(err)
	}
	clock := newTestClock()
	r := &Repository{dir: dir, fs: o.fs, log: o.Log, chunkSize: testChunk, keys: k, sealer: sealer{k, [16]byte{1}}, pointSet: newPointSet()}
	if err := createCatalog(r.fs, filepath.Join(dir, pointsDir), r.sealer, CreateOptions{clock: clock}); err != nil {
		b.Fatal(err)
	}
	if err := r.loadPoints(clock); err != nil {
		b.Fatal(err)
	}
	for i := range n {
		f := pointFile{Point: Point{ID: pointNamed(i), VM: fmt.Sprint("machine-", i%50), Time: clock.wall}, Seq: r.catalog.Seq + 1, Committed: clock.wall}
		r.catalog.commit(r.sealer, f, ID{byte(i)})
	}
	return r
}

// A full catalog takes no more points, and still lets points be deleted and purged, which makes room.
func TestFullCatalog(t *testing.T) {
	t.Parallel()
	clock := newTestClock()
	fs := newPoints(t, nil, clock, time.Hour)
	r := mustOpenPoints(t, fs, nil, clock)
	must(t, commitPoint(r, pointNamed(1), time.Minute))
	size := r.catalog.size
	if n, err := copyLength(catalogKind, fileOf(t, fs, pointsFile(catalogFile))); err != nil || size != n-envelopeHeaderSize {
		t.Errorf("got a catalog of %d bytes, want that of the file, %d, %v", size, n, err)
	}
	r = mustOpenPoints(t, fs, nil, clock)
	if r.catalog.size != size {
		t.Errorf("read: got a catalog of %d bytes, want %d", r.catalog.size, size)
	}
	r.catalog.size = maxCatalog + 1
	if err := commitPoint(r, pointNamed(2), 0); err == nil || !strings.Contains(err.Error(), "no room") {
		t.Errorf("commit: got %v, want that there is no room", err)
	}
	if _, err := fs.Open(pointsFile(string(pointNamed(2)) + pointSuffix)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the file of a point that was refused: got %v, want none", err)
	}
	clock.pass(time.Hour)
	must(t, r.DeletePoint(pointNamed(1)))
	clock.pass(2 * time.Hour)
	before, err := json.Marshal(r.catalog.points[pointNamed(1)])
	must(t, err)
	must(t, r.change(func(*catalog) {}))
	must(t, r.purge())
	after, err := json.Marshal(r.catalog.points[pointNamed(1)])
	must(t, err)
	if len(after) >= len(before) {
		t.Errorf("a purge made of %s %s, which is longer", before, after)
	}
}
