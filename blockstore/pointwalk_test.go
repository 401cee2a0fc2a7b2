package blockstore

import (
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/faultfs"
)

// testClock is a machine whose clocks a test sets.
type testClock struct {
	wall time.Time
	boot string
	up   time.Duration
}

func newTestClock() *testClock {
	return &testClock{time.Date(2026, 11, 22, 8, 0, 0, 0, time.UTC), "one", time.Hour}
}

func (c *testClock) Wall() time.Time       { return c.wall }
func (c *testClock) Boot() string          { return c.boot }
func (c *testClock) Uptime() time.Duration { return c.up }

func (c *testClock) pass(d time.Duration) { c.wall, c.up = c.wall.Add(d), c.up+d }

const testDir = "/repo"

// newPoints makes a repository of which there are only the points.
func newPoints(t testing.TB, k *keys, clock *testClock, quarantine time.Duration) *faultfs.FS {
	t.Helper()
	fs := faultfs.New(filepath.Join(testDir, pointsDir))
	s := sealer{k, [16]byte{1}}
	if err := createCatalog(fs, filepath.Join(testDir, pointsDir), s, CreateOptions{clock: clock, DeleteQuarantine: quarantine}); err != nil {
		t.Fatal(err)
	}
	return fs
}

// openPoints opens a repository as far as the points go.
func openPoints(fs *faultfs.FS, k *keys, clock *testClock) (*Repository, error) {
	o, err := Options{fs: fs}.withDefaults()
	if err != nil {
		return nil, err
	}
	r := &Repository{
		dir: testDir, fs: fs, log: o.Log, chunkSize: testChunk, keys: k, sealer: sealer{k, [16]byte{1}},
		pointSet: newPointSet(), pins: map[Map]int{},
	}
	return r, r.loadPoints(clock)
}

// commitPoint lists a point of one disk.
func commitPoint(r *Repository, id PointID, lock time.Duration) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.writePoint(Point{
		ID: id, VM: "vm", Time: r.clock.Now().Truncate(time.Millisecond),
		Disks: []PointDisk{{Name: "vda", Map: Map{Root: ID{1}, Size: testChunk}}},
	}, lock)
}

// pointState is what a test knows of a point: "" is that there is none.
type pointState string

const (
	stateLive    pointState = "live"
	stateLocked  pointState = "locked"
	stateDeleted pointState = "deleted"
)

// pointStates returns the states of all points.
func pointStates(r *Repository) map[PointID]pointState {
	states := map[PointID]pointState{}
	for _, p := range r.Points() {
		states[p.ID] = stateLive
		if !p.LockedUntil.IsZero() {
			states[p.ID] = stateLocked
		}
	}
	for _, p := range r.DeletedPoints() {
		states[p.ID] = stateDeleted
	}
	return states
}

func pointNamed(n int) PointID { return PointID(fmt.Sprintf("%032x", n)) }

// step is one operation on points and what it makes of their states.
type step struct {
	name string
	do   func(r *Repository) error
	then func(states map[PointID]pointState)
}

func pointSteps() []step {
	set := func(n int, s pointState) func(map[PointID]pointState) {
		return func(states map[PointID]pointState) { states[pointNamed(n)] = s }
	}
	commit := func(n int, lock time.Duration) func(*Repository) error {
		return func(r *Repository) error { return commitPoint(r, pointNamed(n), lock) }
	}
	return []step{
		{"commit", commit(1, 0), set(1, stateLive)},
		{"commit locked", commit(2, time.Hour), set(2, stateLocked)},
		{"commit", commit(3, 0), set(3, stateLive)},
		{"delete", func(r *Repository) error { return r.DeletePoint(pointNamed(1)) }, set(1, stateDeleted)},
		{"undelete", func(r *Repository) error { return r.UndeletePoint(pointNamed(1)) }, set(1, stateLive)},
		{"lock", func(r *Repository) error { _, err := r.LockPoint(pointNamed(1), time.Hour); return err }, set(1, stateLocked)},
		{"delete", func(r *Repository) error { return r.DeletePoint(pointNamed(3)) }, set(3, stateDeleted)},
		{"purge", (*Repository).purge, func(states map[PointID]pointState) { delete(states, pointNamed(3)) }},
		{"set", func(r *Repository) error { return r.SetDeleteQuarantine(time.Hour) }, func(map[PointID]pointState) {}},
		{"rewrite", func(r *Repository) error { return r.RewritePoint(pointNamed(2)) }, func(map[PointID]pointState) {}},
		{"commit", commit(4, 0), set(4, stateLive)},
		{"close", (*Repository).keepTime, func(map[PointID]pointState) {}},
	}
}

// checkPoints compares the states with those before or after a step that was cut short (after
// may be before), and expects nothing to be wrong.
func checkPoints(t *testing.T, r *Repository, before, after map[PointID]pointState) {
	t.Helper()
	if got := pointStates(r); !maps.Equal(got, before) && !maps.Equal(got, after) {
		t.Errorf("got %v, want %v or %v", got, before, after)
	}
	if err := r.CheckPoints(t.Context()); err != nil {
		t.Error(err)
	}
	for _, p := range r.PointProblems() {
		t.Errorf("got problem %v of %s: %v, want none", p.Kind, p.File, p.Err)
	}
}

// walk does the steps with a fault that is armed before step number from, and returns the repository's state
// when one of them fails, with the states before and after that step and the last head that was acknowledged.
func walkPoints(t *testing.T, fs *faultfs.FS, k *keys, fault faultfs.Fault) (r *Repository, before, after map[PointID]pointState, head string, failed bool) {
	t.Helper()
	r, err := openPoints(fs, k, newTestClock())
	if err != nil {
		t.Fatal(err)
	}
	fs.Fail(fault)
	before, head = map[PointID]pointState{}, r.Head()
	for _, s := range pointSteps() {
		after = maps.Clone(before)
		s.then(after)
		if err := s.do(r); err != nil {
			if !fs.Hit() || !errors.Is(err, syscall.EIO) {
				t.Fatalf("%s: %v", s.name, err)
			}
			return r, before, after, head, true
		}
		before, head = after, r.Head()
	}
	return r, before, before, head, fs.Hit()
}

// The machine stops in every operation on files in turn, and forgets all, nothing or some of what was not
// synced. What was acknowledged is there, what was not is there whole or not, and nothing
// is reported as wrong.
func TestPointsPowerLoss(t *testing.T) {
	t.Parallel()
	for _, k := range []*keys{nil, fixedKeys()} {
		t.Run(fmt.Sprintf("encrypted=%v", k != nil), func(t *testing.T) {
			t.Parallel()
			stride := 1
			if k != nil && !extended() {
				stride = 5
			}
			for n := 1; ; n += stride {
				for _, effect := range some(n, faultfs.Nothing, faultfs.Whole) {
					fs := newPoints(t, k, newTestClock(), 0)
					_, before, after, head, hit := walkPoints(t, fs, k, faultfs.Fault{N: n, Effect: effect, Kill: true})
					if !hit {
						return
					}
					for _, loss := range some(n/2, faultfs.LoseAll, faultfs.LoseNothing, faultfs.Loss(n), faultfs.Loss(n+1000)) {
						checkAfterLoss(t, fs.PowerLoss(loss), k, before, after, head)
					}
					if t.Failed() {
						t.Fatalf("stopped in operation %d, effect %d", n, effect)
					}
				}
			}
		})
	}
}

// some returns one of several ways to fail in operation n, or all of them when tests are to take their time.
func some[T any](n int, ways ...T) []T {
	if extended() {
		return ways
	}
	return ways[n%len(ways):][:1]
}

// checkAfterLoss opens what a loss of power left, and goes on with it.
func checkAfterLoss(t *testing.T, fs *faultfs.FS, k *keys, before, after map[PointID]pointState, head string) {
	t.Helper()
	clock := newTestClock()
	clock.boot, clock.up = "two", 0
	r, err := openPoints(fs, k, clock)
	if err != nil {
		t.Fatal(err)
	}
	checkPoints(t, r, before, after)
	if err := r.Descends(head); err != nil {
		t.Errorf("head %s: %v", head, err)
	}
	states := pointStates(r)
	if err := commitPoint(r, pointNamed(9), 0); err != nil {
		t.Error(err)
	}
	if err := r.purge(); err != nil {
		t.Error(err)
	}
	states[pointNamed(9)] = stateLive
	maps.DeleteFunc(states, func(_ PointID, s pointState) bool { return s == stateDeleted })
	again, err := openPoints(fs.PowerLoss(faultfs.LoseAll), k, clock)
	if err != nil {
		t.Fatal(err)
	}
	checkPoints(t, again, states, states)
	if r.Head() != again.Head() {
		t.Errorf("got head %s, want %s", again.Head(), r.Head())
	}
}

// Every operation on files in turn fails, once or from then on, and the process lives. What it
// acknowledged is there; what failed it tells; once the disk is well again it goes on,
// and what is on disk is what it says.
func TestPointsDiskFails(t *testing.T) {
	t.Parallel()
	for n := 1; ; n++ {
		for _, fault := range some(n, []faultfs.Fault{
			{N: n}, {N: n, Effect: faultfs.Whole}, {N: n, Forever: true}, {N: n, Forever: true, Effect: faultfs.Whole},
		}...) {
			fs := newPoints(t, nil, newTestClock(), 0)
			r, before, after, head, hit := walkPoints(t, fs, nil, fault)
			if !hit {
				return
			}
			if got := pointStates(r); !maps.Equal(got, before) && !maps.Equal(got, after) {
				t.Errorf("got %v, want %v or %v", got, before, after)
			}
			checkAfterLoss(t, fs.PowerLoss(faultfs.LoseAll), nil, before, after, head)
			fs.Fail(faultfs.Fault{})
			states := pointStates(r)
			if err := commitPoint(r, pointNamed(9), 0); err != nil {
				t.Error(err)
			}
			states[pointNamed(9)] = stateLive
			checkPoints(t, r, states, states)
			for _, loss := range []faultfs.Loss{faultfs.LoseAll, faultfs.LoseNothing} {
				again, err := openPoints(fs.PowerLoss(loss), nil, newTestClock())
				if err != nil {
					t.Fatal(err)
				}
				checkPoints(t, again, states, states)
				if r.Head() != again.Head() {
					t.Errorf("got head %s, want %s", again.Head(), r.Head())
				}
			}
			if t.Failed() {
				t.Fatalf("with operation %d failing: %+v; last %v", n, fault, lastOps(fs, n))
			}
		}
	}
}

// lastOps returns the n-th change and the few before it.
func lastOps(fs *faultfs.FS, n int) []faultfs.Op {
	ops := fs.Trace(faultfs.Changes)
	return slices.Clone(ops[max(0, len(ops)-10):])
}
