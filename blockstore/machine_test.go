package blockstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/dgraph-io/badger/v4"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/internal/faultfs"
)

// machine is a computer with a repository: a file system that fails and forgets, the
// index beside it, and what the repository has promised.
type machine struct {
	fs         *faultfs.FS
	dir        string // of the repository; its lock has a real folder of the same path
	passphrase string
	index      map[string][]byte // what BadgerDB has on disk

	unreadable bool // reading may fail: verify tells of damage

	r  *Repository // nil while nobody has it open
	db *badger.DB  // of r

	mu     sync.Mutex // guards the fields below
	made   bool       // its creation was acknowledged
	points map[PointID]*promise
}

// promise is what may be relied on of a point.
type promise struct {
	vm    string
	disks []content
	// listed means that it must be there, and gone that it must not. If neither is
	// said it may be there, whole.
	listed, gone bool
	locked       bool // nothing deletes it
}

// machineFolder is the real folder for the lock of a machine's repository.
func machineFolder(t testing.TB) string {
	t.Helper()
	dir := filepath.Join(memoryDir(t), "repo")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

func newMachine(dir, passphrase string) *machine {
	return &machine{
		fs: faultfs.New(filepath.Dir(dir)), dir: dir, passphrase: passphrase, points: map[PointID]*promise{},
	}
}

// powerLoss returns the machine as it is found after a loss of power now. This one
// goes on meanwhile.
func (m *machine) powerLoss(loss faultfs.Loss) *machine {
	m.mu.Lock()
	defer m.mu.Unlock()
	after := &machine{
		fs: m.fs.PowerLoss(loss), dir: m.dir, passphrase: m.passphrase, index: m.index, made: m.made,
		points: map[PointID]*promise{},
	}
	for id, p := range m.points {
		after.points[id] = new(promise)
		*after.points[id] = *p
	}
	if m.db != nil {
		after.index = dumpIndex(m.db)
	}
	return after
}

// kill ends the process that has the repository open. Nothing that it does from here
// on reaches the file system.
func (m *machine) kill() {
	if m.r != nil {
		m.index = dumpIndex(m.db)
		m.fs.Fail(faultfs.Fault{N: 1, Kill: true})
		_ = m.fs.Remove(filepath.Join(m.dir, "killed")) // the operation in which it is killed
		_ = m.r.Close()
		m.r, m.db = nil, nil
	}
	m.fs.Fail(faultfs.Fault{}) // the next process's operations work
}

func dumpIndex(db *badger.DB) map[string][]byte {
	out := map[string][]byte{}
	err := db.View(func(txn *badger.Txn) error {
		it := txn.NewIterator(badger.DefaultIteratorOptions)
		defer it.Close()
		for it.Rewind(); it.Valid(); it.Next() {
			v, err := it.Item().ValueCopy(nil)
			if err != nil {
				return err
			}
			out[string(it.Item().Key())] = v
		}
		return nil
	})
	if err != nil {
		panic(err)
	}
	return out
}

// openDB is BadgerDB in memory, with what m.index holds. Its folder says that there are no
// tables.
func (m *machine) openDB(o badger.Options) (*badger.DB, error) {
	if err := os.WriteFile(filepath.Join(o.Dir, badger.ManifestFilename), []byte("Bdgr\x00\x00\x00\x08"), 0o600); err != nil {
		return nil, err
	}
	db, err := badger.Open(o.WithDir("").WithValueDir("").WithInMemory(true).
		WithNumCompactors(0).WithNumGoroutines(1).WithBaseTableSize(1 << 18))
	if err != nil {
		return nil, err
	}
	b := db.NewWriteBatch()
	for _, key := range slices.Sorted(maps.Keys(m.index)) {
		if err := b.Set([]byte(key), m.index[key]); err != nil {
			return nil, errors.Join(err, db.Close())
		}
	}
	if err := b.Flush(); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	m.db = db
	return db, nil
}

func (m *machine) options() Options {
	return Options{
		Passphrase: m.passphrase, SegmentSize: machineSegment, CacheSize: 1 << 20,
		fs: m.fs, indexMemory: 128 << 10, openDB: m.openDB,
	}
}

// machineSegment makes segments of a few chunks.
const machineSegment = 5 * testChunk

// open opens the repository, and makes it before if nobody was told that it exists.
func (m *machine) open() error {
	r, err := Open(context.Background(), m.dir, m.options())
	if errors.Is(err, ErrNotRepository) && !m.made {
		if err := m.create(); err != nil {
			return err
		}
		r, err = Open(context.Background(), m.dir, m.options())
	}
	if err != nil {
		m.db = nil // its repository has closed it
		return err
	}
	m.r, m.made = r, true
	return nil
}

func (m *machine) create() error {
	err := Create(m.dir, CreateOptions{ChunkSize: testChunk, Passphrase: m.passphrase, fs: m.fs, workFactor: 1})
	m.made = m.made || err == nil
	return err
}

func (m *machine) close() error {
	err := m.r.appender.close() // which enters what was stored
	m.index = dumpIndex(m.db)
	err = errors.Join(err, m.r.Close())
	m.r, m.db = nil, nil
	return err
}

// backup stores a VM's disks as a point, upon its last one where they have the same size.
func (m *machine) backup(t testing.TB, vm string, disks ...content) error {
	s := m.r.Begin()
	defer s.Close()
	p := Point{ID: NewPointID(), VM: vm, Time: time.Now(), Mode: "full"}
	for i, c := range disks {
		name := fmt.Sprint("vd", i)
		built, err := m.storeDisk(t, s, vm, name, i, c)
		if err != nil {
			return err
		}
		p.Disks = append(p.Disks, PointDisk{Name: name, Map: built})
	}
	promised := &promise{vm: vm, disks: disks}
	m.mu.Lock()
	m.points[p.ID] = promised
	m.mu.Unlock()
	_, err := s.Commit(t.Context(), p)
	m.mu.Lock()
	defer m.mu.Unlock()
	promised.listed = err == nil
	return err
}

func (m *machine) storeDisk(t testing.TB, s *Session, vm, name string, i int, c content) (Map, error) {
	base, since := s.Base(vm, name)
	m.mu.Lock()
	was := m.points[since]
	m.mu.Unlock()
	if since == "" || len(was.disks[i]) != len(c) {
		return store(t, s, c)
	}
	built := Map{Size: base.Size}
	for _, n := range c {
		if n != 0 {
			built.Data += testChunk
		}
	}
	var leaves []Leaf
	for first := 0; first < len(c); first += Fanout {
		last := min(len(c), first+Fanout)
		if slices.Equal(c[first:last], was.disks[i][first:last]) {
			continue
		}
		n, err := m.r.Leaf(base, int64(first/Fanout))
		if err != nil {
			return built, err
		}
		var children [Fanout]ID
		for j := range children[:last-first] {
			number := c[first+j]
			if number == was.disks[i][first+j] && n != nil {
				children[j] = n.Child(j)
			} else if number != 0 {
				children[j] = m.r.ID(chunkOf(number))
				if _, err := s.Put(children[j], chunkOf(number)); err != nil {
					return built, err
				}
			}
		}
		id, _, err := s.PutNode(&children)
		if err != nil {
			return built, err
		}
		leaves = append(leaves, Leaf{Index: int64(first / Fanout), ID: id})
	}
	root, _, err := s.BuildMap(base.Size, base, leaves)
	built.Root = root
	return built, err
}

// delete deletes the oldest point of a VM that must be there.
func (m *machine) delete(vm string) error {
	for _, p := range m.r.Points() {
		m.mu.Lock()
		promised := m.points[p.ID]
		m.mu.Unlock()
		if p.VM != vm || !promised.listed {
			continue
		}
		promised.listed = false
		err := m.r.DeletePoint(p.ID)
		promised.gone = err == nil
		return err
	}
	return nil
}

func (m *machine) collect(t testing.TB) error {
	_, err := m.r.Collect(t.Context(), CollectOptions{})
	return err
}

// find returns a point of a VM that was made.
func (m *machine) find(vm string) (PointID, *promise) {
	for id, p := range m.points {
		if p.vm == vm {
			return id, p
		}
	}
	return "", nil
}

// undelete brings the only point of a VM back.
func (m *machine) undelete(vm string) error {
	id, p := m.find(vm)
	p.gone = false
	err := m.r.UndeletePoint(id)
	p.listed = err == nil
	return err
}

// lock locks the only point of a VM.
func (m *machine) lock(vm string) error {
	id, p := m.find(vm)
	_, err := m.r.LockPoint(id, time.Hour)
	p.locked = err == nil
	return err
}

func (m *machine) verify(t testing.TB) error {
	v, err := m.r.Verify(t.Context(), VerifyOptions{})
	// The index is in memory; the files in its folder are those of several machines.
	v.Errors = slices.DeleteFunc(v.Errors, func(e VerifyError) bool { return e.File == indexDir })
	if err == nil && len(v.Errors) > 0 && !m.unreadable {
		t.Errorf("verify: got %+v", v.Errors)
	}
	return err
}

func (m *machine) rebuild(t testing.TB) error {
	if err := m.close(); err != nil {
		return err
	}
	m.index = nil // RebuildIndex removes it
	_, err := RebuildIndex(t.Context(), m.dir, m.options(), nil)
	m.db = nil
	if err != nil {
		return err
	}
	return m.open()
}

// check compares what is listed with what was promised, every byte of it.
func (m *machine) check(t testing.TB) {
	t.Helper()
	listed := map[PointID]bool{}
	for _, p := range m.r.Points() {
		listed[p.ID] = true
		want := m.points[p.ID]
		switch {
		case want == nil:
			t.Errorf("point %s is listed, and nobody made it", p.ID)
			continue
		case want.gone:
			t.Errorf("point %s of %s is listed, and was gone", p.ID, p.VM)
		}
		for i := range want.disks {
			if err := m.sameDisk(p.ID, fmt.Sprint("vd", i), want.disks[i]); err != nil {
				t.Errorf("point %s of %s, listed %v: %v", p.ID, p.VM, want.listed, err)
			}
		}
	}
	for id, want := range m.points {
		if want.listed && !listed[id] {
			t.Errorf("point %s of %s was acknowledged and is not listed", id, want.vm)
		}
		if want.locked {
			if err := m.r.DeletePoint(id); !errors.Is(err, ErrLocked) {
				t.Errorf("a locked point is deleted: got %v, want %v", err, ErrLocked)
			}
		}
	}
	for _, p := range m.r.PointProblems() {
		t.Errorf("problem: %+v", p)
	}
	for _, bad := range m.r.DamagedPoints() {
		t.Errorf("point %s is damaged: %v", bad.ID, bad.Err)
	}
}

func (m *machine) sameDisk(id PointID, name string, want content) error {
	d, err := m.r.OpenDisk(id, name, DiskOptions{Whole: true})
	if err != nil {
		return err
	}
	defer d.Close()
	if d.Size() != int64(len(want))*testChunk {
		return fmt.Errorf("disk %s has %d bytes", name, d.Size())
	}
	got := make([]byte, testChunk)
	for i, n := range want {
		if n == 0 && i%100 > 0 {
			continue // a large disk would take its time
		}
		if err := image.ReadFull(d, got, int64(i)*testChunk); err != nil {
			return err
		}
		if !bytes.Equal(got, chunkOf(n)) {
			return fmt.Errorf("disk %s does not have the bytes that were stored in chunk %d", name, i)
		}
	}
	return nil
}

// settled notes what a process that has just begun lists: that is a promise too.
func (m *machine) settled() {
	listed := map[PointID]bool{}
	for _, p := range m.r.Points() {
		listed[p.ID] = true
	}
	for id, p := range m.points {
		p.listed, p.gone = listed[id], !listed[id]
	}
}
