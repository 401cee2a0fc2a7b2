package blockstore

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
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
	mu     sync.Mutex
	points map[PointID]content
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
			m := &model{points: map[PointID]content{}}
			for round := range uint64(2) {
				r := open(t, dir, o)
				runModel(t, r, m, seed+round, length/2)
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

func runModel(t *testing.T, r *Repository, m *model, seed uint64, length time.Duration) {
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
	actor(11, func(*rand.Rand) error {
		_, err := r.Collect(t.Context(), CollectOptions{})
		return err
	})
	actor(12, func(*rand.Rand) error {
		v, err := r.Verify(t.Context(), VerifyOptions{})
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
	if len(c) == 0 {
		return r.DeletePoint(id)
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
