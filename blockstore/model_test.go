package blockstore

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"
)

// modelSeed and modelTime extend TestModel:
//
//	MODEL_TIME=10m MODEL_SEED=7 go test -run TestModel ./blockstore
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

// model is what a repository should hold.
type model struct {
	mu      sync.Mutex
	points  map[PointID]content
	deleted map[PointID]content // that can be undeleted
}

func (m *model) put(id PointID, c content) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.points[id] = c
}

// take removes a random point and returns it.
func (m *model) take() (PointID, content, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for id, c := range m.points {
		delete(m.points, id)
		return id, c, true
	}
	return "", nil, false
}

// Backups, deletions, collections, reads and verifications run at the same time, on the
// store and on a map; what the map holds is what the store gives back.
func TestModel(t *testing.T) {
	t.Parallel()
	seed, length := modelSeed(t)
	t.Logf("seed %d", seed)
	for _, passphrase := range []string{"", "secret"} {
		t.Run("passphrase="+passphrase, func(t *testing.T) {
			t.Parallel()
			dir := create(t, CreateOptions{Passphrase: passphrase})
			o := Options{Passphrase: passphrase, SegmentSize: 512 << 10, CacheSize: 1 << 20}
			m := &model{points: map[PointID]content{}, deleted: map[PointID]content{}}
			for round := range uint64(2) {
				r := open(t, dir, o)
				runModel(t, r, dir, m, seed+round, length/2)
				for id, c := range m.points {
					checkDisk(t, r, id, c)
				}
				checkSound(t, r)
				closeOnce(t, r)
			}
			r := open(t, dir, o)
			if got := len(r.Points()); got != len(m.points) {
				t.Errorf("got %d points, want %d", got, len(m.points))
			}
			for id, c := range m.deleted {
				if err := r.UndeletePoint(id); err != nil {
					t.Errorf("undelete: %v", err)
				}
				m.points[id] = c
			}
			for id, c := range m.points {
				checkDisk(t, r, id, c)
			}
			if _, err := r.Collect(t.Context(), CollectOptions{}); err != nil {
				t.Error(err)
			}
			again, err := r.Collect(t.Context(), CollectOptions{DryRun: true})
			if err != nil || again.DeadChunks != 0 {
				t.Errorf("after a collection: got %+v, %v, want nothing dead", again, err)
			}
			checkSound(t, r)
		})
	}
}

func runModel(t *testing.T, r *Repository, dir string, m *model, seed uint64, length time.Duration) {
	end := time.Now().Add(length)
	var wg sync.WaitGroup
	actor := func(n uint64, act func(rng *rand.Rand) error) {
		rng := rand.New(rand.NewPCG(seed, n))
		wg.Go(func() {
			for time.Now().Before(end) && !t.Failed() {
				if err := act(rng); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for n := range uint64(3) {
		actor(n, func(rng *rand.Rand) error { return modelBackup(t, r, m, fmt.Sprint("vm", n), rng) })
	}
	actor(10, func(rng *rand.Rand) error { return modelDelete(r, m, rng) })
	actor(11, func(rng *rand.Rand) error {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		steps := 1 + rng.IntN(2000)
		_, err := r.Collect(watchedContext{ctx, func() {
			if steps--; steps == 0 {
				cancel()
			}
		}}, CollectOptions{})
		if errors.Is(err, context.Canceled) || errors.Is(err, ErrCollecting) {
			return nil // interrupted, or a copy is being made
		}
		return err
	})
	actor(14, func(rng *rand.Rand) error { return modelDiff(t, r, m, rng) })
	actor(15, func(*rand.Rand) error { return modelCopy(t, r, dir, m) })
	actor(12, func(rng *rand.Rand) error {
		v, err := r.Verify(t.Context(), VerifyOptions{Percent: float64(1 + rng.IntN(100))})
		if err == nil && len(v.Errors) > 0 {
			err = fmt.Errorf("verify: %+v", v.Errors[0])
		}
		return err
	})
	actor(13, func(*rand.Rand) error {
		r.Stats()
		time.Sleep(20 * time.Millisecond)
		return r.appender.finish() // seals, in the middle of everything
	})
	wg.Wait()
}

// modelBackup stores a new disk, or one built upon the VM's last point, and
// sometimes gives up.
func modelBackup(t *testing.T, r *Repository, m *model, vm string, rng *rand.Rand) error {
	s := r.Begin()
	defer s.Close()
	base, since := s.Base(vm, "vda")
	p := Point{ID: NewPointID(), VM: vm, Time: time.Now()}
	var c content
	if since != "" && rng.IntN(2) == 0 {
		m.mu.Lock()
		was := m.points[since]
		m.mu.Unlock()
		if was == nil {
			return nil // deleted, or about to be
		}
		c = append(content{}, was...)
		index := rng.IntN(len(c)/Fanout + 1)
		leaf, err := r.Leaf(base, int64(index))
		if err != nil {
			return err
		}
		var children [Fanout]ID
		for i := index * Fanout; i < min(len(c), (index+1)*Fanout); i++ {
			if leaf != nil {
				children[i%Fanout] = leaf.Child(i % Fanout)
			}
			if rng.IntN(50) == 0 {
				c[i] = 1 + rng.Uint32N(300)
				chunk := chunkOf(c[i])
				children[i%Fanout] = r.ID(chunk)
				if _, err := s.Put(children[i%Fanout], chunk); err != nil {
					return err
				}
			}
		}
		id, _, err := s.PutNode(&children)
		if err != nil {
			return err
		}
		root, _, err := s.BuildMap(base.Size, base, []Leaf{{Index: int64(index), ID: id}})
		if err != nil {
			return err
		}
		p.Disks = []PointDisk{{Name: "vda", Map: Map{Root: root, Size: base.Size}}}
	} else {
		c = make(content, 1+rng.IntN(Fanout+50))
		for i := range c {
			if rng.IntN(4) == 0 {
				c[i] = rng.Uint32N(300)
			}
		}
		stored, err := store(t, s, c)
		if err != nil {
			return err
		}
		p.Disks = []PointDisk{{Name: "vda", Map: stored}}
	}
	if rng.IntN(5) == 0 {
		return nil // given up
	}
	p, err := s.Commit(t.Context(), p)
	if err == nil {
		m.put(p.ID, c)
	}
	return err
}

// modelDelete deletes a point, sometimes while its disk is being read.
func modelDelete(r *Repository, m *model, rng *rand.Rand) error {
	id, c, ok := m.take()
	if !ok {
		time.Sleep(10 * time.Millisecond)
		return nil
	}
	if rng.IntN(4) == 0 {
		return modelUndelete(r, m, id, c, rng)
	}
	d, err := r.OpenDisk(id, "vda", DiskOptions{Whole: rng.IntN(2) == 0})
	if err != nil {
		return err
	}
	defer d.Close()
	if err := r.DeletePoint(id); err != nil {
		return err
	}
	if _, err := r.Point(id); !errors.Is(err, ErrNotFound) {
		return fmt.Errorf("deleted point: %w", err)
	}
	b := make([]byte, testChunk)
	for range 50 {
		i := rng.IntN(len(c))
		if _, err := d.ReadAt(b, int64(i)*testChunk); err != nil && int64(i+1)*testChunk < d.Size() {
			return err
		}
		if string(b) != string(chunkOf(c[i])) {
			return fmt.Errorf("chunk %d of a disk that is open has other bytes", i)
		}
	}
	return nil
}

// modelUndelete deletes a point that is kept for a while, and brings it back at once or leaves it.
func modelUndelete(r *Repository, m *model, id PointID, c content, rng *rand.Rand) error {
	err := errors.Join(r.SetDeleteQuarantine(time.Hour), r.DeletePoint(id), r.SetDeleteQuarantine(0))
	if err != nil {
		return err
	}
	if rng.IntN(2) == 0 {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.deleted[id] = c
		return nil
	}
	time.Sleep(time.Duration(rng.IntN(20)) * time.Millisecond)
	if err := r.UndeletePoint(id); err != nil {
		return err
	}
	m.put(id, c)
	return nil
}

// modelDiff compares two points, which are kept from being deleted meanwhile by being open.
func modelDiff(t *testing.T, r *Repository, m *model, rng *rand.Rand) error {
	var disks []*Disk
	var contents []content
	m.mu.Lock()
	for id, c := range m.points {
		if len(disks) == 2 {
			break
		}
		if d, err := r.OpenDisk(id, "vda", DiskOptions{}); err == nil {
			disks, contents = append(disks, d), append(contents, c)
			defer d.Close()
		}
	}
	m.mu.Unlock()
	if len(disks) < 2 {
		time.Sleep(time.Duration(1+rng.IntN(10)) * time.Millisecond)
		return nil
	}
	at := func(c content, i int64) uint32 {
		if i < int64(len(c)) {
			return c[i]
		}
		return 0
	}
	differs := map[int64]bool{}
	for e, err := range r.Diff(t.Context(), disks[0].Map(), disks[1].Map(), 0, max(disks[0].Size(), disks[1].Size())) {
		if err != nil {
			return err
		}
		for i := e.Off / testChunk; i < (e.Off+e.Len+testChunk-1)/testChunk; i++ {
			differs[i] = true
		}
	}
	for i := range int64(max(len(contents[0]), len(contents[1]))) {
		if want := at(contents[0], i) != at(contents[1], i); differs[i] != want {
			return fmt.Errorf("diff of chunk %d: got %v, want %v", i, differs[i], want)
		}
	}
	return nil
}

// modelCopy copies the folder without its index, file by file, while all goes on but collections, as a
// backup of the backups does. The copy holds every point that was there all the time.
func modelCopy(t *testing.T, r *Repository, dir string, m *model) error {
	r.maintenance.Lock()
	m.mu.Lock()
	before := maps.Clone(m.points)
	m.mu.Unlock()
	to, err := os.MkdirTemp(filepath.Dir(dir), "copy-")
	if err == nil {
		defer os.RemoveAll(to)
		err = copyLive(dir, to)
	}
	r.maintenance.Unlock()
	if err != nil {
		return err
	}
	o := Options{SegmentSize: 1 << 20, indexMemory: 1 << 20, Passphrase: "secret"}
	if r.keys == nil {
		o.Passphrase = ""
	}
	copied, err := Open(to, o)
	if err != nil {
		return fmt.Errorf("open a copy: %w", err)
	}
	m.mu.Lock()
	maps.DeleteFunc(before, func(id PointID, _ content) bool { return m.points[id] == nil })
	m.mu.Unlock()
	for id, c := range before {
		checkDisk(t, copied, id, c)
	}
	return copied.Close()
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
