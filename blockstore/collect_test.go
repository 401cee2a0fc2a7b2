package blockstore

import (
	"context"
	"errors"
	"maps"
	"math/bits"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/internal/durable"
)

// Something forgets to mark what is needed. The confirmation finds it, and nothing is lost.
func TestConfirmation(t *testing.T) {
	t.Parallel()
	c, doomed := numbers(1, 60), numbers(30, 60) // half of it in segments of which much is needed
	for _, tt := range []struct {
		name string
		// need makes something that needs c; what it returns is called once the marks are there and
		// takes them away, and afterwards uses c.
		need func(t *testing.T, r *Repository) (forget func(), use func() PointID)
	}{
		{"point", func(t *testing.T, r *Repository) (func(), func() PointID) {
			p := mustBackup(t, r, "vm", c)
			f := r.points[p.ID]
			delete(r.points, p.ID)
			return func() { r.points[p.ID] = f }, func() PointID { return p.ID }
		}},
		{"open disk", func(t *testing.T, r *Repository) (func(), func() PointID) {
			p := mustBackup(t, r, "vm", c)
			d, err := r.OpenDisk(p.ID, "vda", DiskOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if err := r.DeletePoint(p.ID); err != nil {
				t.Fatal(err)
			}
			r.pins = map[Map]int{}
			return func() { r.pins[d.Map()] = 1 }, func() PointID {
				b := make([]byte, d.Size())
				if _, err := d.ReadAt(b, 0); err != nil || string(b) != string(c.bytes()) {
					t.Errorf("the disk that is open: %v", err)
				}
				d.Close()
				return ""
			}
		}},
		{"session", func(t *testing.T, r *Repository) (func(), func() PointID) {
			s := r.Begin()
			m, err := store(t, s, c)
			if err != nil {
				t.Fatal(err)
			}
			return func() { s.marks = marks{} }, func() PointID {
				defer s.Close()
				return commit(t, s, m)
			}
		}},
		{"session before its first leaf", func(t *testing.T, r *Repository) (func(), func() PointID) {
			s := r.Begin()
			var children [Fanout]ID
			for i, n := range c {
				children[i] = r.ID(chunkOf(n))
				if _, err := s.Put(children[i], chunkOf(n)); err != nil {
					t.Fatal(err)
				}
			}
			return func() { s.marks = marks{} }, func() PointID {
				defer s.Close()
				root, _, err := s.PutNode(&children)
				if err != nil {
					t.Fatal(err)
				}
				return commit(t, s, Map{Root: root, Size: int64(len(c)) * testChunk})
			}
		}},
		{"session that ended meanwhile", func(t *testing.T, r *Repository) (func(), func() PointID) {
			s := r.Begin()
			m, err := store(t, s, c)
			if err != nil {
				t.Fatal(err)
			}
			var id PointID
			return func() {
				id = commit(t, s, m)
				s.Close()
				r.segments.live = marks{}
			}, func() PointID { return id }
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			dir := create(t, CreateOptions{})
			r := open(t, dir, Options{SegmentSize: 128 << 10})
			gone := mustBackup(t, r, "x", doomed)
			other := mustBackup(t, r, "y", numbers(80, 20))
			forget, use := tt.need(t, r)
			if err := r.DeletePoint(gone.ID); err != nil {
				t.Fatal(err)
			}
			var crashed string
			_, err := r.Collect(t.Context(), CollectOptions{Progress: func(p CollectProgress) {
				switch {
				case p.Phase == PhaseSweep && forget != nil:
					forget()
					forget = nil
				case p.Phase == PhaseConfirm && crashed == "":
					crashed = crash(t, dir)
				}
			}})
			if err == nil || !strings.Contains(err.Error(), "internal error") {
				t.Errorf("collect: got %v, want an internal error", err)
			}
			check := func(r *Repository, id PointID) {
				if id != "" {
					checkDisk(t, r, id, c)
				}
				checkDisk(t, r, other.ID, numbers(80, 20))
				checkSound(t, r)
			}
			id := use()
			check(r, id)
			for range 2 { // the copies of what was needed count, and the next collection takes what does not
				if _, err := r.Collect(t.Context(), CollectOptions{}); err != nil {
					t.Errorf("the next collection: %v", err)
				}
				check(r, id)
				closeOnce(t, r)
				r = open(t, dir, Options{})
			}
			r = open(t, crashed, Options{})
			if _, err := r.Point(id); err != nil {
				id = "" // it came later
			}
			check(r, id)
			if _, err := r.Collect(t.Context(), CollectOptions{}); err != nil {
				t.Error(err)
			}
			check(r, id)
			if again, err := r.Collect(t.Context(), CollectOptions{DryRun: true}); err != nil || again.DeadChunks > 0 {
				t.Errorf("after a crash and a collection: got %+v, %v, want nothing dead", again, err)
			}
		})
	}
}

// Marking in many passes finds what one pass finds.
func TestMarkPasses(t *testing.T) {
	t.Parallel()
	r := open(t, create(t, CreateOptions{}), Options{SegmentSize: 64 << 10})
	first := mustBackup(t, r, "vm", numbers(1, 300))
	mustBackup(t, r, "vm", append(numbers(1, 200), numbers(1000, 900)...))
	if err := r.DeletePoint(first.ID); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(r.purge(), r.appender.finish()); err != nil {
		t.Fatal(err)
	}
	var want marks
	for _, pass := range []int{maxMarking, 400, 50, 7} {
		c := r.newCollection(CollectOptions{})
		c.pass = pass
		segments := r.segments.sealedSegments()
		err := c.mark(t.Context(), c.begin(segments), segments)
		c.end()
		if err != nil {
			t.Fatal(err)
		}
		if want == nil {
			want = c.live
		}
		if !maps.EqualFunc(c.live, want, slices.Equal) {
			t.Errorf("in passes of %d ids other records are marked than in one", pass)
		}
	}
	n := 0
	for _, words := range want {
		for _, w := range words {
			n += bits.OnesCount64(w)
		}
	}
	if n != 1100+2+1 {
		t.Errorf("%d records are marked, want 1100 chunks, 2 leaves and a root", n)
	}
}

// commit lists a point of one disk.
func commit(t *testing.T, s *Session, m Map) PointID {
	t.Helper()
	p, err := s.Commit(t.Context(), Point{ID: NewPointID(), VM: "vm", Disks: []PointDisk{{Name: "vda", Map: m}}})
	if err != nil {
		t.Fatal(err)
	}
	return p.ID
}

// A collection is interrupted at any moment: nothing is lost, what it had in quarantine is live again,
// and the next one takes it.
func TestCollectInterrupted(t *testing.T) {
	t.Parallel()
	dir := create(t, CreateOptions{})
	r := open(t, dir, Options{SegmentSize: 64 << 10})
	kept := mustBackup(t, r, "vm", numbers(1, 40))
	for steps := 1; ; steps++ {
		var c content
		for n := range uint32(40) {
			c = append(c, 1+n, 100+n)
		}
		doomed := mustBackup(t, r, "vm", c)
		if err := r.DeletePoint(doomed.ID); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		asked, confirming := 0, false
		_, err := r.Collect(watchedContext{ctx, func() {
			if asked++; asked == steps*7 {
				cancel()
			}
		}}, CollectOptions{Progress: func(p CollectProgress) { confirming = p.Phase == PhaseConfirm }})
		cancel()
		if err != nil && !errors.Is(err, context.Canceled) {
			t.Errorf("got %v, want %v", err, context.Canceled)
		}
		if confirming && r.Stats().Chunks < 80 {
			t.Errorf("interrupted while confirming: %d chunks are there, want all", r.Stats().Chunks)
		}
		checkDisk(t, r, kept.ID, numbers(1, 40))
		checkSound(t, r)
		if _, err := r.Collect(t.Context(), CollectOptions{}); err != nil {
			t.Fatal(err)
		}
		if got := r.Stats().Chunks; got != 40 {
			t.Errorf("after the next collection: got %d chunks, want 40", got)
		}
		if err == nil {
			return
		}
	}
}

// The search through all segments for a chunk that the index lacks stops when it is told to, and is done
// later.
func TestStopped(t *testing.T) {
	t.Parallel()
	dir := create(t, CreateOptions{})
	r := open(t, dir, Options{})
	p := mustBackup(t, r, "vm", numbers(1, 5))
	id := r.ID(chunkOf(1))
	if err := r.appender.finish(); err != nil {
		t.Fatal(err)
	}
	stopped, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.index.write(func(w indexWrite) error { return w.remove(id) }); err != nil {
		t.Fatal(err)
	}
	if _, _, err := r.locate(stopped, id); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
	if _, ok, err := r.locate(t.Context(), id); err != nil || !ok {
		t.Errorf("got %v, %v, want the chunk", ok, err)
	}
	checkDisk(t, r, p.ID, numbers(1, 5))
}

// A session that puts chunks and never a map node that lists them takes memory to a bound.
func TestUnlistedChunksAreBounded(t *testing.T) {
	t.Parallel()
	r := open(t, create(t, CreateOptions{}), Options{})
	s := r.Begin()
	defer s.Close()
	chunk := chunkOf(1)
	children := [Fanout]ID{r.ID(chunk)}
	for _, list := range []bool{false, true} {
		if _, err := s.Put(children[0], chunk); err != nil {
			t.Fatal(err)
		}
		if list {
			if _, _, err := s.PutNode(&children); err != nil {
				t.Fatal(err)
			}
		}
		if got, want := s.unlisted.Load(), int64(1); list != (got < want) {
			t.Errorf("listed %v: %d chunks wait for a node", list, got)
		}
	}
	s.unlisted.Store(maxUnlisted)
	if _, err := s.Put(children[0], chunk); err == nil {
		t.Error("a chunk was put, one more than may wait for map nodes")
	}
}

// shortFS has as much space left as it is told.
type shortFS struct {
	durable.FS
	free int64
}

func (f *shortFS) Space(string) (free, total int64, err error) { return f.free, 512 << 20, nil }

// Where space is short, what is dead goes early.
func TestCollectShortOfSpace(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(5, 6))
	for _, short := range []bool{false, true} {
		fs := &shortFS{durable.OS(), 100 << 20}
		r := open(t, create(t, CreateOptions{}), Options{fs: fs})
		kept := mustBackup(t, r, "vm", numbers(1, 20))
		var c content
		for range 800 {
			c = append(c, 1000+rng.Uint32N(1<<20))
		}
		if err := r.DeletePoint(mustBackup(t, r, "vm", c).ID); err != nil {
			t.Fatal(err)
		}
		if short {
			fs.free = minReserve - 1<<20
		}
		confirmations, last := 0, PhaseMark
		_, err := r.Collect(t.Context(), CollectOptions{Progress: func(p CollectProgress) {
			if p.Phase == PhaseConfirm && last != PhaseConfirm {
				confirmations++
			}
			last = p.Phase
		}})
		if err != nil || confirmations == 0 || short != (confirmations > 1) {
			t.Errorf("short of space %v: %d confirmations, %v", short, confirmations, err)
		}
		checkDisk(t, r, kept.ID, numbers(1, 20))
		if got := r.Stats().Chunks; got != 20 {
			t.Errorf("short of space %v: %d chunks are left, want 20", short, got)
		}
	}
}
