package blockstore

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/holdfast-backup/holdfast/internal/faultfs"
)

// run does everything at once for a time, until it is killed or stopped.
func (m *model) run(rng *rand.Rand, length time.Duration, killed bool) {
	var wg sync.WaitGroup
	m.stop.Store(false)
	actor := func(what string, act func(rng *rand.Rand) error) {
		rng := rand.New(rand.NewPCG(rng.Uint64(), rng.Uint64()))
		wg.Go(func() {
			for !m.stop.Load() && !m.t.Failed() {
				if err := act(rng); err != nil && !m.excused(err) {
					m.t.Errorf("%s: %v", what, err)
				} else if err == nil {
					m.did(what)
				}
			}
		})
	}
	for n := range 3 {
		actor("backup", func(rng *rand.Rand) error { return m.backup(rng, fmt.Sprint("vm", n)) })
	}
	actor("delete", m.delete)
	actor("undelete", m.undelete)
	actor("lock", m.lock)
	actor("collect", m.collect)
	actor("verify", m.verifySome)
	actor("read", m.read)
	actor("diff", m.diff)
	actor("copy", m.copy)
	actor("seal", func(rng *rand.Rand) error {
		m.pause(rng, 40)
		m.r.Stats()
		return m.r.appender.finish() // in the middle of everything
	})
	actor("time", func(rng *rand.Rand) error {
		m.pause(rng, 40)
		m.clock.advance(time.Duration(rng.Int64N(int64(modelKept / 10))))
		return nil
	})
	if m.secret != "" {
		actor("key", m.key)
	}
	if m.faulty {
		actor("fault", func(rng *rand.Rand) error {
			err := []error{syscall.EIO, syscall.ENOSPC}[rng.IntN(2)]
			m.fs.arm(1+rng.IntN(100), err, faultfs.Effect(rng.IntN(3)))
			m.pause(rng, 100)
			return nil
		})
	}
	for end := time.Now().Add(length); time.Now().Before(end) && !m.t.Failed(); {
		time.Sleep(20 * time.Millisecond)
	}
	if killed {
		m.fs.kill()
	}
	m.stop.Store(true)
	wg.Wait()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.done["fault hits"] += int(m.fs.hits.Load())
}

func (m *model) pause(rng *rand.Rand, milliseconds int) {
	time.Sleep(time.Duration(1+rng.IntN(milliseconds)) * time.Millisecond)
}

// modelNumber is of one of a few chunks that many disks hold, or of one of many.
func modelNumber(rng *rand.Rand) uint32 {
	if rng.IntN(4) == 0 {
		return 1 + rng.Uint32N(6000)
	}
	return 1 + rng.Uint32N(300)
}

func modelContent(rng *rand.Rand) content {
	n := 1 + rng.IntN(100)
	if rng.IntN(6) == 0 {
		n = Fanout - 5 + rng.IntN(60) // one leaf, or two
	}
	c := make(content, n)
	for i := range c {
		if rng.IntN(5) == 0 {
			c[i] = modelNumber(rng)
		}
	}
	return c
}

// backup stores disks, or changes those of the VM's last point, and sometimes gives up.
func (m *model) backup(rng *rand.Rand, vm string) error {
	for len(m.steady()) >= maxModelPoints && !m.stop.Load() {
		m.pause(rng, 10)
	}
	s := m.r.Begin()
	defer s.Close()
	p := &modelPoint{id: NewPointID(), doubt: true}
	maps, err := m.storeDisks(rng, s, vm, p)
	if err != nil || maps == nil || rng.IntN(5) == 0 {
		return err // given up
	}
	var lock time.Duration
	if rng.IntN(8) == 0 {
		lock = time.Second + time.Duration(rng.Int64N(int64(modelKept)))
		if err := s.LockFor(lock); err != nil {
			return err
		}
	}
	point := Point{ID: p.id, VM: vm, Time: time.Now()}
	for i, built := range maps {
		point.Disks = append(point.Disks, PointDisk{Name: diskName(i), Map: built})
	}
	m.mu.Lock()
	m.points[p.id] = p
	m.mu.Unlock()
	from := m.clock.Uptime()
	_, err = s.Commit(m.t.Context(), point)
	to := m.clock.Uptime()
	m.give(p, func() {
		p.listed, p.doubt = err == nil, err != nil
		if lock > 0 && err == nil {
			p.lockFrom = from + lock
		}
		if lock > 0 {
			p.lockTo = to + lock
		}
	})
	return err
}

// storeDisks stores the disks of a point; none if the point that it builds upon goes meanwhile.
func (m *model) storeDisks(rng *rand.Rand, s *Session, vm string, p *modelPoint) ([]Map, error) {
	_, since := s.Base(vm, diskName(0))
	m.mu.Lock()
	was := m.points[since]
	m.mu.Unlock()
	var maps []Map
	if was == nil || rng.IntN(3) == 0 {
		for range 1 + rng.IntN(3) {
			c := modelContent(rng)
			built, err := store(m.t, s, c)
			if err != nil {
				return nil, err
			}
			p.disks, maps = append(p.disks, c), append(maps, built)
		}
		return maps, nil
	}
	changed := rng.IntN(len(was.disks))
	for i, c := range was.disks {
		built, ok := s.BaseAt(since, diskName(i))
		if !ok {
			return nil, nil // deleted
		}
		if i == changed || rng.IntN(8) == 0 {
			var err error
			if c, built, err = m.storeChange(rng, s, c, built); err != nil {
				return nil, err
			}
		}
		p.disks, maps = append(p.disks, c), append(maps, built)
	}
	return maps, nil
}

// storeChange changes a leaf of a disk.
func (m *model) storeChange(rng *rand.Rand, s *Session, was content, base Map) (content, Map, error) {
	c := append(content{}, was...)
	index := rng.IntN((len(c) + Fanout - 1) / Fanout)
	leaf, err := m.r.Leaf(base, int64(index))
	if err != nil {
		return nil, base, err
	}
	var children [Fanout]ID
	for i := index * Fanout; i < min(len(c), (index+1)*Fanout); i++ {
		if leaf != nil {
			children[i%Fanout] = leaf.Child(i % Fanout)
		}
		if rng.IntN(50) == 0 {
			c[i] = modelNumber(rng)
			chunk := chunkOf(c[i])
			children[i%Fanout] = m.r.ID(chunk)
			if _, err := s.Put(children[i%Fanout], chunk); err != nil {
				return nil, base, err
			}
		}
	}
	id, _, err := s.PutNode(&children)
	if err != nil {
		return nil, base, err
	}
	root, _, err := s.BuildMap(base.Size, base, []Leaf{{Index: int64(index), ID: id}})
	return c, Map{Root: root, Size: base.Size}, err
}

// delete deletes a point while its disk is being read, for good or to be kept for a while. One that is
// locked stays.
func (m *model) delete(rng *rand.Rand) error {
	p := m.take(rng, func(p *modelPoint) bool { return p.listed })
	if p == nil {
		m.pause(rng, 10)
		return nil
	}
	next := *p
	defer func() {
		m.give(p, func() { p.listed, p.doubt, p.keptUntil = next.listed, next.doubt, next.keptUntil })
	}()
	i := rng.IntN(len(p.disks))
	d, err := m.r.OpenDisk(p.id, diskName(i), DiskOptions{Whole: rng.IntN(2) == 0})
	if err != nil {
		return err
	}
	defer d.Close()
	var keep time.Duration
	if rng.IntN(3) == 0 {
		keep = modelKept
	}
	if err := m.r.SetDeleteQuarantine(keep); err != nil {
		return err
	}
	from := m.clock.Uptime()
	err = m.r.DeletePoint(p.id)
	to := m.clock.Uptime()
	switch {
	case errors.Is(err, ErrLocked) && from < p.lockTo:
		m.did("delete refused")
		return nil
	case err == nil && to < p.lockFrom:
		return fmt.Errorf("point %s was deleted and is locked", p.id)
	case err != nil:
		next.doubt = true
		return err
	}
	next.listed, next.doubt, next.keptUntil = false, false, 0
	if keep > 0 {
		next.keptUntil = from + keep
	}
	if _, err := m.r.Point(p.id); !errors.Is(err, ErrNotFound) {
		return fmt.Errorf("deleted point: %w", err)
	}
	return sameBytes(d, p.disks[i])
}

// undelete brings a point back, unless it was purged.
func (m *model) undelete(rng *rand.Rand) error {
	m.pause(rng, 20)
	p := m.take(rng, func(p *modelPoint) bool { return !p.listed && !p.doubt })
	if p == nil {
		return nil
	}
	err := m.r.UndeletePoint(p.id)
	now := m.clock.Uptime()
	purged := errors.Is(err, ErrNotFound) && now >= p.keptUntil
	m.give(p, func() {
		p.listed, p.doubt = err == nil, err != nil
		if purged {
			delete(m.points, p.id)
		}
	})
	if purged {
		return nil
	}
	return err
}

// lock locks a point, or makes its lock longer.
func (m *model) lock(rng *rand.Rand) error {
	m.pause(rng, 200)
	p := m.take(rng, func(p *modelPoint) bool { return p.listed })
	if p == nil {
		return nil
	}
	length := time.Second + time.Duration(rng.Int64N(int64(modelKept)))
	from := m.clock.Uptime()
	_, err := m.r.LockPoint(p.id, length)
	to := m.clock.Uptime()
	m.give(p, func() {
		switch {
		case errors.Is(err, ErrLocked) && from+length < p.lockTo:
			err = nil // it is locked for longer
		case err == nil:
			p.lockFrom, p.lockTo = from+length, to+length
		default:
			p.lockTo = max(p.lockTo, to+length) // it may be locked
		}
	})
	return err
}

// collect collects, and is stopped at times.
func (m *model) collect(rng *rand.Rand) error {
	ctx, cancel := context.WithCancel(m.t.Context())
	defer cancel()
	steps := 1 + rng.IntN([]int{500, 50000}[rng.IntN(2)])
	_, err := m.r.Collect(watchedContext{ctx, func() {
		if steps--; steps == 0 {
			cancel()
		}
	}}, CollectOptions{DryRun: rng.IntN(10) == 0})
	switch {
	case errors.Is(err, context.Canceled):
		m.did("collect stopped")
		return nil
	case errors.Is(err, ErrCollecting): // a copy is being made
		m.pause(rng, 5)
		return nil
	}
	return err
}

// verifySome verifies everything, a share, or some points.
func (m *model) verifySome(rng *rand.Rand) error {
	var o VerifyOptions
	switch rng.IntN(4) {
	case 0:
		o.Percent = float64(1 + rng.IntN(99))
	case 1:
		for p := range m.steady() {
			if o.Points = append(o.Points, p.id); len(o.Points) == 3 {
				break
			}
		}
	}
	err := m.verify(o)
	if errors.Is(err, ErrNotFound) {
		return nil // a point was deleted just now
	}
	return err
}

// verify verifies. Where changes fail, files that are there twice need not be the same until
// the next change; nothing else is ever wrong.
func (m *model) verify(o VerifyOptions) error {
	v, err := m.r.Verify(m.t.Context(), o)
	if err != nil {
		return err
	}
	for _, e := range v.Errors {
		if m.faulty && e.Point == "" && (strings.HasPrefix(e.File, pointsDir+"/catalog") || strings.HasPrefix(e.File, configFile)) {
			continue
		}
		return fmt.Errorf("verify: %+v", e)
	}
	return nil
}

// read reads a disk, whose point may be deleted meanwhile.
func (m *model) read(rng *rand.Rand) error {
	for p := range m.steady() {
		i := rng.IntN(len(p.disks))
		err := m.sameDisk(m.r, p.id, i, p.disks[i], DiskOptions{Whole: rng.IntN(4) == 0})
		if errors.Is(err, ErrNotFound) {
			return nil // deleted
		}
		return err
	}
	m.pause(rng, 10)
	return nil
}

// diff compares two points, which are kept from being deleted meanwhile by being open.
func (m *model) diff(rng *rand.Rand) error {
	m.pause(rng, 10)
	var disks []*Disk
	var contents []content
	for p := range m.steady() {
		if len(disks) == 2 {
			break
		}
		i := rng.IntN(len(p.disks))
		if d, err := m.r.OpenDisk(p.id, diskName(i), DiskOptions{}); err == nil {
			disks, contents = append(disks, d), append(contents, p.disks[i])
			defer d.Close()
		}
	}
	if len(disks) < 2 {
		return nil
	}
	at := func(c content, i int64) uint32 {
		if i < int64(len(c)) {
			return c[i]
		}
		return 0
	}
	differs := map[int64]bool{}
	for e, err := range m.r.Diff(m.t.Context(), disks[0].Map(), disks[1].Map(), 0, max(disks[0].Size(), disks[1].Size())) {
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

// copy copies the folder without its index, file by file, while all goes on but collections, as a
// backup of the backups does. The copy holds every point that was there all the time.
func (m *model) copy(rng *rand.Rand) error {
	m.pause(rng, 100)
	m.r.maintenance.Lock()
	points := m.steady()
	to, err := os.MkdirTemp(m.parent, "copy-")
	if err == nil {
		defer os.RemoveAll(to)
		err = copyLive(m.dir, to)
	}
	m.r.maintenance.Unlock()
	m.keep(points)
	if err != nil {
		return err
	}
	copied, err := Open(m.t.Context(), to, Options{SegmentSize: 1 << 20, CacheSize: 1 << 20, indexMemory: 1 << 20, Passphrase: m.secret})
	if err != nil {
		return fmt.Errorf("open a copy: %w", err)
	}
	for p := range points {
		i := rng.IntN(len(p.disks))
		if err := m.sameDisk(copied, p.id, i, p.disks[i], DiskOptions{}); err != nil {
			return errors.Join(fmt.Errorf("copy: %w", err), copied.Close())
		}
	}
	return copied.Close()
}

// key adds a key, removes one or puts another in its place.
func (m *model) key(rng *rand.Rand) error {
	m.pause(rng, 200)
	m.mu.Lock()
	var ids []string
	for id, k := range m.keys {
		if !k.doubt {
			ids = append(ids, id)
		}
	}
	m.mu.Unlock()
	id := ""
	if len(ids) > 0 && rng.IntN(4) < len(ids) {
		id = ids[rng.IntN(len(ids))]
	}
	added := &modelKey{passphrase: fmt.Sprint("key ", rng.Uint64()), doubt: true}
	n := NewKey{Passphrase: added.passphrase, Label: "model", workFactor: 1}
	var k AddedKey
	var err error
	switch {
	case id == "":
		k, err = m.r.AddKey(n)
	case rng.IntN(2) == 0:
		k, err = m.r.RotateKey(id, n)
	default:
		err = m.r.RemoveKey(id)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if k.ID != "" {
		added.doubt = err != nil
		m.keys[k.ID] = added
	}
	switch {
	case id == "":
	case err == nil:
		m.removed = m.keys[id].passphrase
		delete(m.keys, id)
	default:
		m.keys[id].doubt = true
	}
	return err
}
