package blockstore

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/internal/durable"
)

const testChunk = MinChunkSize

// create makes a repository with small chunks and returns its folder.
func create(t testing.TB, o CreateOptions) string {
	t.Helper()
	return createIn(t, t.TempDir(), o)
}

// createIn is create in a folder of the caller's.
func createIn(t testing.TB, parent string, o CreateOptions) string {
	t.Helper()
	dir := filepath.Join(parent, "repo")
	if o.ChunkSize == 0 {
		o.ChunkSize = testChunk
	}
	o.workFactor = 8
	if err := Create(dir, o); err != nil {
		t.Fatal(err)
	}
	return dir
}

// memoryDir returns a temporary folder in memory, where there is one: for tests that open and close
// many repositories.
func memoryDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "holdfast-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// open opens a repository with small segments and closes it at the end of the test.
func open(t testing.TB, dir string, o Options) *Repository {
	t.Helper()
	if o.SegmentSize == 0 {
		o.SegmentSize = 1 << 20
	}
	o.indexMemory = 1 << 20
	r, err := Open(t.Context(), dir, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeOnce(t, r) })
	return r
}

// closeOnce closes a repository unless that has been done.
func closeOnce(t testing.TB, r *Repository) {
	t.Helper()
	if r.unlock == nil {
		return
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	discard(r)
}

// discard marks a repository as closed and lets go of its memory, which the test's
// cleanup would hold on to.
func discard(r *Repository) {
	r.unlock, r.index, r.coder, r.nodes, r.chunks, r.appender, r.segments = nil, nil, nil, nil, nil, nil, nil
}

// content is what a test disk holds: the n-th chunk is made from the n-th number,
// 0 is zeros. Equal numbers make equal chunks.
type content []uint32

func chunkOf(n uint32) []byte {
	b := make([]byte, testChunk)
	if n == 0 {
		return b
	}
	x := uint64(n) * 0x9e3779b97f4a7c15
	for i := 0; i < len(b)/2; i += 8 { // half of it does not compress
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		binary.LittleEndian.PutUint64(b[i:], x)
	}
	return b
}

// bytes returns the disk's bytes.
func (c content) bytes() []byte {
	var b []byte
	for _, n := range c {
		b = append(b, chunkOf(n)...)
	}
	return b
}

// store puts a disk into a session and returns its map.
func store(t testing.TB, s *Session, c content) (Map, error) {
	t.Helper()
	m := Map{Size: int64(len(c)) * testChunk}
	var leaves []Leaf
	for first := 0; first < len(c); first += Fanout {
		var children [Fanout]ID
		for i, n := range c[first:min(len(c), first+Fanout)] {
			if n == 0 {
				continue
			}
			chunk := chunkOf(n)
			children[i] = s.r.ID(chunk)
			if _, err := s.Put(children[i], chunk); err != nil {
				return m, err
			}
			m.Data += testChunk
		}
		id, _, err := s.PutNode(&children)
		if err != nil {
			return m, err
		}
		leaves = append(leaves, Leaf{Index: int64(first / Fanout), ID: id})
	}
	root, _, err := s.BuildMap(m.Size, Map{}, leaves)
	m.Root = root
	return m, err
}

// backup stores a disk as a point of a VM.
func backup(t testing.TB, r *Repository, vm string, c content) (Point, error) {
	t.Helper()
	s := r.Begin()
	defer s.Close()
	m, err := store(t, s, c)
	if err != nil {
		return Point{}, err
	}
	return s.Commit(t.Context(), Point{
		ID: NewPointID(), VM: vm, Time: time.Now(), Mode: "full", Consistency: "crash",
		Disks: []PointDisk{{Name: "vda", Map: m}},
	})
}

func mustBackup(t testing.TB, r *Repository, vm string, c content) Point {
	t.Helper()
	p, err := backup(t, r, vm, c)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// readDisk returns the bytes of a point's disk.
func readDisk(r *Repository, id PointID) ([]byte, error) {
	d, err := r.OpenDisk(id, "vda", DiskOptions{Whole: true})
	if err != nil {
		return nil, err
	}
	defer d.Close()
	b := make([]byte, d.Size())
	return b, image.ReadFull(d, b, 0)
}

func checkDisk(t testing.TB, r *Repository, id PointID, want content) {
	t.Helper()
	got, err := readDisk(r, id)
	if err != nil {
		t.Errorf("point %s: %v", id, err)
		return
	}
	if !bytes.Equal(got, want.bytes()) {
		t.Errorf("point %s does not have the bytes that were stored", id)
	}
}

// checkSound verifies a repository.
func checkSound(t testing.TB, r *Repository) {
	t.Helper()
	v, err := r.Verify(t.Context(), VerifyOptions{})
	if err != nil || len(v.Errors) > 0 {
		t.Errorf("verify: got %+v, %v", v.Errors, err)
	}
}

// crash returns a copy of a repository's folder as it is now, as a crash would
// leave it.
func crash(t testing.TB, dir string) string {
	t.Helper()
	to, err := os.MkdirTemp(filepath.Dir(dir), "crashed-")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(to, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	return to
}

// segmentFiles returns the paths of the segments with a suffix.
func segmentFiles(t testing.TB, dir, suffix string) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, segmentsDir, "*"+suffix))
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// numbers returns the content first, first+1, … of n chunks.
func numbers(first, n uint32) content {
	c := make(content, n)
	for i := range c {
		c[i] = first + uint32(i)
	}
	return c
}

// emptyCache forgets what was decoded.
func emptyCache(r *Repository) {
	r.nodes = newCache(r.nodes.limit)
	r.chunks = newChunkCache(r.chunkSize, int64(r.chunks.limit)*int64(r.chunkSize+decodeSlack), r.chunks.load)
}

// unsealed returns the paths of the segments that do not end with a table of contents.
func unsealed(t testing.TB, dir string) []string {
	t.Helper()
	var out []string
	for _, path := range segmentFiles(t, dir, segmentSuffix) {
		f, err := durable.OS().Open(path)
		if err != nil {
			t.Fatal(err)
		}
		size, err := f.Size()
		if err != nil {
			t.Fatal(err)
		}
		_, generation, _ := parseSegmentName(filepath.Base(path))
		_, err = readEntries(f, size, generation)
		if errors.Is(err, errUnsealed) {
			out = append(out, path)
		} else if err != nil {
			t.Fatal(err)
		}
		_ = f.Close()
	}
	return out
}
