package blockstore

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/faultfs"
)

// Contents of the test's disks. They share chunks, so that what one point had and lost
// another finds.
var (
	kept   = content{1, 2, 3, 0, 5, 6, 7, 8}
	later  = content{1, 2, 30, 0, 5, 60, 7, 8, 9}[:8]
	doomed = content{100, 101, 2, 103, 104, 105, 106}
	wanted = content{100, 2, 101, 200, 201, 202, 103, 203, 204}
	large  = sparse(Fanout+6, 0, 1, 40, Fanout-1, Fanout, Fanout+5)
	newer  = sparse(Fanout+6, 0, 1, 50, Fanout-1, Fanout, Fanout+5)
)

// sparse returns a content of n chunks that is zeros but for some of them.
func sparse(n int, at ...uint32) content {
	c := make(content, n)
	for _, i := range at {
		c[i] = 300 + i
	}
	return c
}

// scenario is something that a repository is doing when a fault meets it.
type scenario struct {
	name    string
	prepare func(t testing.TB, m *machine) error // nil opens the repository
	run     func(t testing.TB, m *machine) error
	bare    bool // there is no repository yet
}

func scenarios() []scenario {
	return []scenario{
		{name: "init", bare: true, run: func(_ testing.TB, m *machine) error { return m.create() }},
		{name: "first backup", bare: true, run: func(t testing.TB, m *machine) error {
			if err := m.open(); err != nil {
				return err
			}
			return m.backup(t, "vm", kept)
		}, prepare: func(_ testing.TB, m *machine) error { return m.create() }},
		{name: "full backup", run: func(t testing.TB, m *machine) error { return m.backup(t, "new", wanted, large) }},
		{name: "incremental backup", run: func(t testing.TB, m *machine) error { return m.backup(t, "vm", later, newer) }},
		{name: "two backups", run: func(t testing.TB, m *machine) error {
			var wg sync.WaitGroup
			var first, second error
			wg.Go(func() { first = m.backup(t, "new", wanted) })
			wg.Go(func() { second = m.backup(t, "vm", later, newer) })
			wg.Wait()
			return errors.Join(first, second)
		}},
		{name: "delete", run: func(_ testing.TB, m *machine) error { return m.delete("doomed") }},
		{name: "delete and keep", run: func(_ testing.TB, m *machine) error {
			return errors.Join(m.r.SetDeleteQuarantine(time.Hour), m.delete("doomed"))
		}},
		{name: "undelete", run: func(_ testing.TB, m *machine) error { return m.undelete("doomed") }, prepare: func(_ testing.TB, m *machine) error {
			if err := m.open(); err != nil {
				return err
			}
			return errors.Join(m.r.SetDeleteQuarantine(time.Hour), m.delete("doomed"))
		}},
		{name: "lock", run: func(_ testing.TB, m *machine) error { return m.lock("doomed") }},
		{name: "collect", run: func(t testing.TB, m *machine) error { return m.collect(t) }, prepare: func(_ testing.TB, m *machine) error {
			return errors.Join(m.open(), m.delete("doomed"))
		}},
		{name: "backup during a collection", run: func(t testing.TB, m *machine) error {
			var wg sync.WaitGroup
			var stored, collected error
			wg.Go(func() { collected = m.collect(t) })
			wg.Go(func() { stored = m.backup(t, "new", wanted, doomed) })
			wg.Wait()
			return errors.Join(stored, collected)
		}, prepare: func(_ testing.TB, m *machine) error { return errors.Join(m.open(), m.delete("doomed")) }},
		{name: "verify", run: func(t testing.TB, m *machine) error { return m.verify(t) }, prepare: func(t testing.TB, m *machine) error {
			return errors.Join(m.open(), m.backup(t, "new", wanted))
		}},
		{name: "rebuild the index", run: func(t testing.TB, m *machine) error { return m.rebuild(t) }, prepare: func(t testing.TB, m *machine) error {
			return errors.Join(m.open(), m.backup(t, "new", wanted))
		}},
		{name: "close", run: func(_ testing.TB, m *machine) error { return m.close() }, prepare: func(t testing.TB, m *machine) error {
			return errors.Join(m.open(), m.backup(t, "new", wanted))
		}},
		{name: "all", run: all},
	}
}

// all is a life of a repository: its errors are joined.
func all(t testing.TB, m *machine) error {
	return errors.Join(
		m.backup(t, "vm", later, newer), m.delete("doomed"), m.backup(t, "new", wanted),
		m.collect(t), m.delete("vm"), m.backup(t, "new", doomed), m.collect(t), m.verify(t), m.close(), m.open())
}

// recovery is the opening of a repository whose process was killed, or whose machine lost
// its power, in the n-th change of a life.
func recovery(n int, loss faultfs.Loss, restarted bool) scenario {
	return scenario{
		name: fmt.Sprintf("recovery %d", n),
		prepare: func(t testing.TB, m *machine) error {
			if err := m.open(); err != nil {
				return err
			}
			m.fs.Fail(faultfs.Fault{N: n, Kill: true})
			_ = all(t, m)
			if restarted {
				m.kill()
				return nil
			}
			after := m.powerLoss(loss)
			m.kill()
			m.fs, m.index = after.fs, after.index
			return nil
		},
		run: func(_ testing.TB, m *machine) error { return m.open() },
	}
}

// faultKind is a way to fail.
type faultKind struct {
	name  string
	fault faultfs.Fault
}

var faultKinds = []faultKind{
	{"power loss or kill", faultfs.Fault{Kill: true}},
	{"power loss or kill in a write", faultfs.Fault{Kill: true, Effect: faultfs.Half, Kinds: faultfs.Write}},
	{"EIO", faultfs.Fault{}},
	{"EIO from there on", faultfs.Fault{Forever: true}},
	{"ENOSPC", faultfs.Fault{Err: syscall.ENOSPC}},
	{"ENOSPC from there on", faultfs.Fault{Err: syscall.ENOSPC, Forever: true, Kinds: faultfs.Create | faultfs.Write | faultfs.Rename | faultfs.Mkdir}},
	{"short write", faultfs.Fault{Err: syscall.ENOSPC, Effect: faultfs.Half, Kinds: faultfs.Write}},
	{"done and reported as failed", faultfs.Fault{Effect: faultfs.Whole}},
	{"EIO in reading", faultfs.Fault{Kinds: faultfs.Open | faultfs.Read | faultfs.ReadDir | faultfs.Space}},
}

// walk injects faults into a scenario.
type walk struct {
	scenario
	base     *machine
	injected *atomic.Int64
}

// extended reports whether tests are to take their time.
func extended() bool { return os.Getenv("HOLDFAST_EXTENDED") != "" }

// TestPowerLoss has operations fail, the process die and the power go away at every
// change that the repository makes to its file system, in all that it does. Whatever was
// acknowledged is there afterwards, byte by byte, and all goes on working.
//
//	HOLDFAST_EXTENDED=1 go test -run TestPowerLoss -timeout 20m ./blockstore
//
// walks over all places, and otherwise over a few that a seed picks.
func TestPowerLoss(t *testing.T) {
	t.Parallel()
	seed := rand.Uint64()
	if s := os.Getenv("FAULTS_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("FAULTS_SEED=%d", seed)
	var injected atomic.Int64
	t.Cleanup(func() { t.Logf("%d faults injected", injected.Load()) })
	rng := rand.New(rand.NewPCG(seed, 0))
	list := scenarios()
	for n := 1 + rng.IntN(20); n < 100; n += 5 {
		if extended() || rng.IntN(10) == 0 {
			list = append(list, recovery(n, faultfs.Loss(rng.Uint64N(5)), n%3 == 0))
		}
	}
	for i, sc := range list {
		seed := rng.Uint64()
		t.Run(sc.name, func(t *testing.T) {
			t.Parallel()
			passphrase := ""
			if i%3 == 0 {
				passphrase = "secret"
			}
			w := &walk{scenario: sc, base: newMachine(machineFolder(t), passphrase), injected: &injected}
			if !sc.bare {
				w.fill(t)
			}
			w.walk(t, rand.New(rand.NewPCG(seed, 1)))
		})
	}
}

// A sync fails and the disk takes nothing more, so that the segment cannot be cut: the next
// process can still read what the disk does not have, and must not rest on it.
func TestFailedSyncIsNotBelieved(t *testing.T) {
	t.Parallel()
	w := &walk{base: newMachine(machineFolder(t), "")}
	w.fill(t)
	m := w.start(t)
	if err := m.backup(t, "new", content{900}); err != nil { // its segment stays open
		t.Fatal(err)
	}
	m.fs.Fail(faultfs.Fault{Kinds: faultfs.Sync | faultfs.Truncate | faultfs.Remove | faultfs.Rename, N: 1, Forever: true})
	if err := m.backup(t, "new", wanted); !errors.Is(err, syscall.EIO) {
		t.Errorf("got %v, want %v", err, syscall.EIO)
	}
	m.fs.Fail(faultfs.Fault{})
	if err := m.verify(t); err != nil { // the segment that failed is needed
		t.Error(err)
	}
	m.kill()
	w.again(t, m)
}

// A process is killed between the removal of a point's file and the sync of its folder. The
// next one collects the point's chunks: the file must not come back after that.
func TestKilledInDeletion(t *testing.T) {
	t.Parallel()
	w := &walk{base: newMachine(machineFolder(t), "")}
	w.fill(t)
	m := w.start(t)
	m.fs.Fail(faultfs.Fault{Kinds: faultfs.SyncDir, N: 1, Kill: true})
	if err := m.delete("doomed"); !errors.Is(err, syscall.EIO) {
		t.Errorf("got %v, want %v", err, syscall.EIO)
	}
	m.kill()
	w.again(t, m)
}

// fill makes the repository that scenarios begin with.
func (w *walk) fill(t *testing.T) {
	m := w.base
	err := errors.Join(m.create(), m.open(),
		m.backup(t, "vm", kept, large), m.backup(t, "doomed", doomed), m.backup(t, "other", content{103, 7, 8}),
		m.close())
	if err != nil {
		t.Fatal(err)
	}
}

// start returns a machine on which the scenario is about to begin.
func (w *walk) start(t *testing.T) *machine {
	m := w.base.powerLoss(faultfs.LoseAll)
	var err error
	switch {
	case w.prepare != nil:
		err = w.prepare(t, m)
	case !w.bare:
		err = m.open()
	}
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// walk injects each kind of fault at every place, or two faults.
func (w *walk) walk(t *testing.T, rng *rand.Rand) {
	m := w.start(t)
	counts := map[faultfs.Kind]int{}
	for _, k := range faultKinds {
		counts[k.fault.Kinds] = -len(m.fs.Trace(cmpKinds(k.fault.Kinds)))
	}
	if err := w.run(t, m); err != nil {
		t.Fatal(err)
	}
	for kinds := range counts {
		counts[kinds] += len(m.fs.Trace(cmpKinds(kinds)))
	}
	w.aftermath(t, m)
	m.kill()
	walked := 0
	for _, i := range rng.Perm(len(faultKinds)) {
		k := faultKinds[i]
		count := counts[k.fault.Kinds]
		places := rng.Perm(count + 1) // the last is behind the end
		if !extended() {
			places = places[:1]
		}
		for _, n := range places {
			w.round(t, k, n+1, rng)
			if t.Failed() {
				t.Fatalf("%s at operation %d of %d", k.name, n+1, count)
			}
		}
		if walked++; walked == 2 && !extended() {
			return
		}
	}
}

func cmpKinds(k faultfs.Kind) faultfs.Kind {
	if k == 0 {
		return faultfs.Changes
	}
	return k
}

// round injects one fault and looks at what it leaves.
func (w *walk) round(t *testing.T, k faultKind, n int, rng *rand.Rand) {
	m := w.start(t)
	before := m.index
	if m.db != nil {
		before = dumpIndex(m.db)
	}
	defer m.kill()
	k.fault.N = n
	m.fs.Fail(k.fault)
	m.unreadable = k.fault.Kinds&faultfs.Read != 0
	err := w.run(t, m)
	m.unreadable = false
	if m.fs.Hit() {
		w.injected.Add(1)
	}
	w.reported(t, k, err)
	if k.fault.Kill {
		w.losses(t, m, before, rng)
		m.kill()
		w.again(t, m)
		return
	}
	m.fs.Fail(faultfs.Fault{})
	if rng.IntN(2) == 0 {
		w.losses(t, m, before, rng)
	}
	if m.r == nil {
		w.again(t, m)
		return
	}
	if k.fault.Kinds&faultfs.Read != 0 { // what could not be read counts as damaged until the next opening
		if err := m.close(); err != nil {
			t.Fatal(err)
		}
		if err := m.open(); err != nil {
			t.Fatal(err)
		}
	}
	m.check(t)
	w.aftermath(t, m)
	_ = m.close() // what failed before may be told of here
	w.again(t, m)
}

// reported checks that an error is the one that was injected.
func (w *walk) reported(t *testing.T, k faultKind, err error) {
	want := k.fault.Err
	if want == nil {
		want = syscall.EIO
	}
	if err != nil && !errors.Is(err, want) {
		t.Errorf("got %v, want %v", err, want)
	}
}

// losses has the power go away, with several outcomes.
func (w *walk) losses(t *testing.T, m *machine, before map[string][]byte, rng *rand.Rand) {
	losses := []faultfs.Loss{faultfs.LoseAll, faultfs.LoseNothing, faultfs.Loss(rng.Uint64()), faultfs.Loss(rng.Uint64())}
	if w.bare { // few files: what one of them alone loses is found by more tries
		for range 12 {
			losses = append(losses, faultfs.Loss(rng.Uint64()))
		}
	}
	if !extended() {
		losses = []faultfs.Loss{losses[rng.IntN(len(losses))]}
	}
	for _, loss := range losses {
		after := m.powerLoss(loss)
		index := rng.IntN(3)
		switch index {
		case 0: // as it is, which may be ahead of the segments
		case 1:
			after.index = before
		case 2:
			after.index = nil
		}
		w.injected.Add(1)
		w.locked(t, m, after)
		if t.Failed() {
			t.Fatalf("loss %d, index %d", loss, index)
		}
	}
}

// locked looks at a machine while the process of another, dead one still has its lock.
func (w *walk) locked(t *testing.T, dead, m *machine) {
	if dead.r != nil && dead.r.unlock != nil {
		dead.r.unlock()
		dead.r.unlock = func() {}
	}
	w.again(t, m)
}

// again opens a repository after a crash, looks at it, uses it, loses the power and
// looks once more.
func (w *walk) again(t *testing.T, m *machine) {
	t.Helper()
	if err := m.open(); err != nil {
		t.Fatalf("open: %v", err)
	}
	m.check(t)
	m.settled()
	after := m.powerLoss(faultfs.LoseAll) // all that was listed just now stays
	w.aftermath(t, m)
	last := m.powerLoss(faultfs.LoseAll)
	m.kill()
	for _, m := range []*machine{after, last} {
		if err := m.open(); err != nil {
			t.Fatalf("open after a second loss: %v", err)
		}
		m.check(t)
		if err := m.verify(t); err != nil {
			t.Fatal(err)
		}
		m.kill()
	}
}

// aftermath uses the repository: everything works.
func (w *walk) aftermath(t *testing.T, m *machine) {
	t.Helper()
	if m.r == nil {
		if err := m.open(); err != nil {
			t.Fatal(err)
		}
	}
	err := errors.Join(m.backup(t, "next", wanted, doomed), m.delete("other"), m.collect(t), m.verify(t))
	if err != nil {
		t.Fatalf("afterwards: %v", err)
	}
	m.check(t)
}

// A segment's removal is reported as failed and has happened all the same: nothing rests on the
// segment, and nobody misses it.
func TestRemovalIsReportedAsFailed(t *testing.T) {
	t.Parallel()
	w := &walk{base: newMachine(machineFolder(t), "")}
	w.fill(t)
	for n, hit := 1, true; hit; n++ {
		m := w.start(t)
		if err := m.delete("doomed"); err != nil {
			t.Fatal(err)
		}
		m.fs.Fail(faultfs.Fault{Kinds: faultfs.Remove, N: n, Effect: faultfs.Whole})
		_ = m.collect(t) // it may say so
		hit = m.fs.Hit()
		m.fs.Fail(faultfs.Fault{})
		if err := errors.Join(m.verify(t), m.backup(t, "new", doomed), m.verify(t)); err != nil {
			t.Errorf("removal %d: %v", n, err)
		}
		m.kill()
		w.again(t, m)
	}
}
