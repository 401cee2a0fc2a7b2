package blockstore

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime/pprof"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/internal/durable"
)

const (
	maxModelPoints = 40               // listed at once
	modelKept      = time.Hour        // by the model's clock: how long points are locked, and deleted ones kept
	modelStuck     = 10 * time.Minute // after the time that a round should take it is given up
)

// modelSeed and modelTime extend TestModel:
//
//	MODEL_TIME=1h MODEL_SEED=7 go test -run TestModel -timeout 0 ./blockstore
func modelSeed(t *testing.T) (seed uint64, length time.Duration) {
	t.Helper()
	seed, length = rand.Uint64(), 3*time.Second
	var err error
	if s := os.Getenv("MODEL_SEED"); s != "" {
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	if s := os.Getenv("MODEL_TIME"); s != "" {
		if length, err = time.ParseDuration(s); err != nil {
			t.Fatal(err)
		}
	}
	return seed, length
}

// model is a repository, and what it should hold.
type model struct {
	t      *testing.T
	parent string // of dir
	dir    string
	secret string // the passphrase that always opens the repository; "" if it is not encrypted
	clock  modelClock

	// Of this opening:
	r      *Repository
	fs     *flakyFS
	faulty bool // changes fail
	failed bool // they failed in the opening before
	stop   atomic.Bool

	mu      sync.Mutex // guards the fields below
	points  map[PointID]*modelPoint
	keys    map[string]*modelKey // by id, without the one for secret
	removed string               // a passphrase that opens nothing any more
	done    map[string]int       // how often what was done
}

// modelPoint is what is known of a point that was committed, or that somebody tried to. While busy,
// it is changed by one goroutine.
type modelPoint struct {
	id     PointID
	disks  []content
	listed bool
	// doubt: the last change of it failed. The next opening shows what became of it.
	doubt    bool
	busy     bool
	versions int // how often it was busy

	// By the clock's uptime:
	lockFrom, lockTo time.Duration // its lock ends between these
	keptUntil        time.Duration // unless listed: it can be undeleted at least until then
}

type modelKey struct {
	passphrase string
	doubt      bool
}

// TestModel has backups, deletions, locks, collections, reads, verifications and changes of keys run at the
// same time, on the store and on a map; the process is killed and the repository opened
// again, and changes of the file system fail now and then. What was acknowledged is what the store
// gives back.
func TestModel(t *testing.T) {
	t.Parallel()
	seed, length := modelSeed(t)
	t.Logf("MODEL_SEED=%d", seed)
	for i, secret := range []string{"", "secret"} {
		t.Run("passphrase="+secret, func(t *testing.T) {
			t.Parallel()
			m := &model{
				t: t, parent: memoryDir(t), secret: secret, points: map[PointID]*modelPoint{},
				keys: map[string]*modelKey{}, done: map[string]int{},
			}
			m.dir = createIn(t, m.parent, CreateOptions{Passphrase: secret})
			defer func() { t.Logf("MODEL_SEED=%d: %v", seed, m.done) }()
			defer m.close()
			rng := rand.New(rand.NewPCG(seed, uint64(i)))
			for end := time.Now().Add(length); time.Now().Before(end) && !t.Failed(); {
				m.round(rng, min(length/6, 2*time.Second)+time.Duration(rng.Int64N(int64(min(length/6, 12*time.Second)))))
			}
			if !t.Failed() {
				m.last()
			}
		})
	}
}

// round opens the repository, looks at it, uses it for a time and ends it in one way or another.
func (m *model) round(rng *rand.Rand, length time.Duration) {
	m.failed, m.faulty = m.faulty, rng.IntN(2) == 0
	killed := rng.IntN(2) == 0
	m.open(rng)
	m.resolve()
	m.compare(rng)
	stuck := time.AfterFunc(length+modelStuck, func() {
		_ = pprof.Lookup("goroutine").WriteTo(os.Stderr, 2)
		panic("the model is stuck")
	})
	defer stuck.Stop()
	m.run(rng, length, killed)
	m.did("rounds")
	if m.t.Failed() {
		return
	}
	if killed {
		m.did("kills")
		m.crash(rng)
		return
	}
	m.compare(rng)
	m.usable()
	m.close()
}

func (m *model) did(what string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.done[what]++
}

// excused reports whether an error may be the consequence of a change that was made to fail.
func (m *model) excused(err error) bool {
	m.fs.alive.RLock()
	defer m.fs.alive.RUnlock()
	return (m.faulty || m.fs.dead) && (errors.Is(err, syscall.EIO) || errors.Is(err, syscall.ENOSPC))
}

func (m *model) options(passphrase string) Options {
	return Options{
		Passphrase: passphrase, SegmentSize: 512 << 10, CacheSize: 1 << 20,
		fs: m.fs, indexMemory: 1 << 20, clock: &m.clock,
	}
}

// open opens the repository with one of its keys, and not with one that was removed.
func (m *model) open(rng *rand.Rand) {
	m.t.Helper()
	m.fs = &flakyFS{FS: durable.OS()}
	passphrases := []string{m.secret}
	for _, k := range m.keys {
		if !k.doubt {
			passphrases = append(passphrases, k.passphrase)
		}
	}
	if m.removed != "" {
		if r, err := Open(m.t.Context(), m.dir, m.options(m.removed)); !errors.Is(err, ErrWrongKey) {
			if err == nil {
				_ = r.Close()
			}
			m.t.Fatalf("open with a key that was removed: got %v, want %v", err, ErrWrongKey)
		}
	}
	r, err := Open(m.t.Context(), m.dir, m.options(passphrases[rng.IntN(len(passphrases))]))
	if err != nil {
		m.t.Fatalf("open: %v", err)
	}
	m.r = r
}

// close closes the repository.
func (m *model) close() {
	if m.r == nil {
		return
	}
	m.fs.arm(0, nil, 0)
	if err := m.r.Close(); err != nil && !m.excused(err) {
		m.t.Errorf("close: %v", err)
	}
	m.r = nil
}

// crash goes on with what a process that was killed left of the repository, with the index or without.
func (m *model) crash(rng *rand.Rand) {
	left, err := os.MkdirTemp(m.parent, "left-")
	if err == nil && rng.IntN(2) == 0 {
		err = copyLive(m.dir, left)
	} else if err == nil {
		err = os.CopyFS(left, os.DirFS(m.dir))
	}
	_ = m.r.Close() // it is dead
	m.r = nil
	if err := errors.Join(err, os.RemoveAll(m.dir)); err != nil {
		m.t.Fatal(err)
	}
	m.dir = left
}

// resolve compares the lists of points and keys after an opening with what is known, and learns what became
// of what was in doubt.
func (m *model) resolve() {
	m.t.Helper()
	listed, deleted := map[PointID]bool{}, map[PointID]bool{}
	for _, p := range m.r.Points() {
		listed[p.ID] = true
	}
	for _, p := range m.r.DeletedPoints() {
		deleted[p.ID] = true
	}
	for id := range listed {
		if m.points[id] == nil {
			m.t.Errorf("point %s is listed, and was gone or nobody made it", id)
		}
	}
	now := m.clock.Uptime()
	for id, p := range m.points {
		if !p.doubt && p.listed != listed[id] {
			m.t.Errorf("point %s: got listed %v, want %v", id, listed[id], p.listed)
		}
		if !p.doubt && !p.listed && !deleted[id] && now < p.keptUntil {
			m.t.Errorf("deleted point %s is gone before its time", id)
		}
		if p.doubt && deleted[id] {
			p.keptUntil = 0 // who knows when it was deleted
		}
		if p.listed, p.doubt = listed[id], false; !listed[id] && !deleted[id] {
			delete(m.points, id)
		}
	}
	for _, p := range m.r.PointProblems() {
		// Its writing failed, and the process was killed before the next change had written it.
		if !m.failed || p.File != pointsDir+"/"+catalogCopyFile {
			m.t.Errorf("problem: %+v", p)
		}
	}
	for _, bad := range m.r.DamagedPoints() {
		m.t.Errorf("point %s is damaged: %v", bad.ID, bad.Err)
	}
	m.resolveKeys()
}

func (m *model) resolveKeys() {
	m.t.Helper()
	there := map[string]bool{}
	for _, k := range m.r.Keys() {
		there[k.ID] = true
		if m.keys[k.ID] == nil && k.Label != "" { // the first has none
			m.t.Errorf("key %s was gone", k.ID)
		}
	}
	for id, k := range m.keys {
		if !k.doubt && !there[id] {
			m.t.Errorf("key %s is gone", id)
		}
		if k.doubt = false; !there[id] {
			delete(m.keys, id)
		}
	}
}

// compare reads every disk of every point that is listed.
func (m *model) compare(rng *rand.Rand) {
	m.t.Helper()
	for id, p := range m.points {
		if !p.listed {
			continue
		}
		for i, c := range p.disks {
			if err := m.sameDisk(m.r, id, i, c, DiskOptions{Whole: rng.IntN(2) == 0}); err != nil {
				m.t.Errorf("point %s: %v", id, err)
			}
		}
	}
}

func diskName(i int) string { return "vd" + string(rune('a'+i)) }

func (m *model) sameDisk(r *Repository, id PointID, i int, want content, o DiskOptions) error {
	d, err := r.OpenDisk(id, diskName(i), o)
	if err != nil {
		return err
	}
	defer d.Close()
	return sameBytes(d, want)
}

// sameBytes compares a disk with what it should hold.
func sameBytes(d *Disk, want content) error {
	if d.Size() != int64(len(want))*testChunk {
		return fmt.Errorf("a disk has %d bytes, want %d chunks", d.Size(), len(want))
	}
	const piece = 32
	got := make([]byte, piece*testChunk)
	for first := 0; first < len(want); first += piece {
		part := want[first:min(len(want), first+piece)]
		got := got[:len(part)*testChunk]
		if err := image.ReadFull(d, got, int64(first)*testChunk); err != nil {
			return err
		}
		for i, n := range part {
			if !bytes.Equal(got[i*testChunk:(i+1)*testChunk], chunkOf(n)) {
				return fmt.Errorf("chunk %d of a disk does not have the bytes that were stored", first+i)
			}
		}
	}
	return nil
}

// usable checks that whatever failed is over: everything works.
func (m *model) usable() {
	m.t.Helper()
	m.fs.arm(0, nil, 0)
	c := numbers(rand.Uint32N(6000), 20)
	p, err := backup(m.t, m.r, "usable", c)
	if err == nil {
		_, err = m.r.Collect(m.t.Context(), CollectOptions{})
	}
	if err == nil {
		checkDisk(m.t, m.r, p.ID, c)
		err = m.r.DeletePoint(p.ID)
	}
	if err != nil {
		m.t.Errorf("usable: %v", err)
	}
	if p.ID != "" {
		m.points[p.ID] = &modelPoint{id: p.ID, disks: []content{c}, doubt: err != nil}
	}
	if err := m.verify(VerifyOptions{}); err != nil {
		m.t.Errorf("usable: %v", err)
	}
}

// last looks at everything once more: what can be undeleted comes back, and what nobody needs goes.
func (m *model) last() {
	m.failed, m.faulty = m.faulty, false
	rng := rand.New(rand.NewPCG(0, 0))
	m.open(rng)
	m.resolve()
	for id, p := range m.points {
		if p.listed {
			continue
		}
		err := m.r.UndeletePoint(id)
		if p.listed = err == nil; err != nil && m.clock.Uptime() < p.keptUntil {
			m.t.Errorf("undelete: %v", err)
		}
	}
	if _, err := m.r.Collect(m.t.Context(), CollectOptions{}); err != nil {
		m.t.Error(err)
	}
	m.compare(rng)
	again, err := m.r.Collect(m.t.Context(), CollectOptions{DryRun: true})
	if err != nil || again.DeadChunks != 0 {
		m.t.Errorf("after a collection: got %+v, %v, want nothing dead", again, err)
	}
	checkSound(m.t, m.r)
	m.done["points at the end"] = len(m.points)
}

// take returns a random point that nobody is changing and that is fit, to be changed.
func (m *model) take(rng *rand.Rand, fit func(p *modelPoint) bool) *modelPoint {
	m.mu.Lock()
	defer m.mu.Unlock()
	var ids []PointID
	for id, p := range m.points {
		if !p.busy && fit(p) {
			ids = append(ids, id)
		}
	}
	if len(ids) == 0 {
		return nil
	}
	slices.Sort(ids)
	p := m.points[ids[rng.IntN(len(ids))]]
	p.busy = true
	p.versions++
	return p
}

// give ends a change, which edit tells of.
func (m *model) give(p *modelPoint, edit func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	edit()
	p.busy = false
}

// steady returns the points that are listed for sure and that nobody is changing, and their versions.
func (m *model) steady() map[*modelPoint]int {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := map[*modelPoint]int{}
	for _, p := range m.points {
		if p.listed && !p.doubt && !p.busy {
			out[p] = p.versions
		}
	}
	return out
}

// keep leaves out of some points those that were changed since.
func (m *model) keep(points map[*modelPoint]int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	maps.DeleteFunc(points, func(p *modelPoint, version int) bool { return p.versions != version })
}

// copyLive copies a repository's folder without its index. Files may come and go.
func copyLive(from, to string) error {
	return filepath.WalkDir(from, func(path string, d os.DirEntry, err error) error {
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		name, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		if d.IsDir() {
			if name == indexDir {
				return filepath.SkipDir
			}
			return os.MkdirAll(filepath.Join(to, name), 0o700)
		}
		data, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(to, name), data, 0o600)
	})
}
