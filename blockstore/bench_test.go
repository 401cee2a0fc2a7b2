package blockstore

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/image"
)

// openDefault makes a repository with the options of production and opens it.
func openDefault(b *testing.B) (dir string, r *Repository) {
	b.Helper()
	dir = filepath.Join(b.TempDir(), "repo")
	if err := Create(dir, CreateOptions{}); err != nil {
		b.Fatal(err)
	}
	return dir, reopen(b, dir)
}

func reopen(b *testing.B, dir string) *Repository {
	b.Helper()
	r, err := Open(b.Context(), dir, Options{})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { closeOnce(b, r) })
	return r
}

// template is a chunk, half noise and half words.
func template() []byte {
	rng := rand.New(rand.NewPCG(1, 2))
	chunk := make([]byte, DefaultChunkSize)
	for i := 0; i < len(chunk); i += 8 {
		if i&(2<<10) == 0 {
			binary.LittleEndian.PutUint64(chunk[i:], rng.Uint64())
		} else {
			copy(chunk[i:], fmt.Sprintf("word%03d ", rng.IntN(200)))
		}
	}
	return chunk
}

// number makes every 4 KiB of a chunk unlike those of the chunks with other numbers.
func number(chunk []byte, n uint64) {
	for i := 0; i < len(chunk); i += 4 << 10 {
		binary.LittleEndian.PutUint64(chunk[i:], n)
	}
}

// BenchmarkPut stores chunks, hashing included, from as many goroutines as there
// are processors.
func BenchmarkPut(b *testing.B) {
	put := func(b *testing.B, distinct uint64) {
		_, r := openDefault(b)
		s := r.Begin()
		defer s.Close()
		store := func(chunk []byte, n uint64) {
			number(chunk, n)
			if _, err := s.Put(r.ID(chunk), chunk); err != nil {
				b.Error(err)
			}
		}
		for n := range distinct {
			store(template(), n)
		}
		if err := r.appender.flush(); err != nil {
			b.Fatal(err)
		}
		b.SetBytes(DefaultChunkSize)
		b.ResetTimer()
		b.RunParallel(func(pb *testing.PB) {
			chunk, n := template(), rand.Uint64()
			for pb.Next() {
				if n++; distinct > 0 {
					n %= distinct
				}
				store(chunk, n)
			}
		})
		if err := r.appender.flush(); err != nil {
			b.Fatal(err)
		}
	}
	b.Run("new", func(b *testing.B) { put(b, 0) })
	b.Run("known", func(b *testing.B) { put(b, 4096) })
}

// syntheticPoint commits a point of a disk of 1 TiB whose chunks do not exist.
// children fills the ids of a leaf, from its index, or leaves them null.
func syntheticPoint(b *testing.B, r *Repository, children func(leaf int64, ids *[Fanout]ID)) Map {
	b.Helper()
	s := r.Begin()
	defer s.Close()
	m := Map{Size: 1 << 40}
	var leaves []Leaf
	for i := range m.Size / r.LeafSpan() {
		var ids [Fanout]ID
		children(i, &ids)
		id, _, err := s.PutNode(&ids)
		if err != nil {
			b.Fatal(err)
		}
		leaves = append(leaves, Leaf{Index: i, ID: id})
	}
	var err error
	if m.Root, _, err = s.BuildMap(m.Size, Map{}, leaves); err != nil {
		b.Fatal(err)
	}
	p := Point{
		ID: NewPointID(), VM: "vm", Time: time.Now(), Mode: "full", Consistency: "crash",
		Disks: []PointDisk{{Name: "vda", Map: m}},
	}
	if _, err := s.Commit(b.Context(), p); err != nil {
		b.Fatal(err)
	}
	return m
}

// syntheticIDs fills a leaf with ids that no other number gives.
func syntheticIDs(n uint64, ids []ID) {
	rng := rand.New(rand.NewPCG(n, 1))
	for i := range ids {
		for j := 0; j < IDSize; j += 8 {
			binary.LittleEndian.PutUint64(ids[i][j:], rng.Uint64())
		}
	}
}

// BenchmarkDiff compares two points of 1 TiB with nothing in the cache, so every
// node is read from its segment. sparse has data in every 16th leaf, dense in every chunk; ten
// chunks differ, far from each other. In every-leaf each leaf of a dense disk
// has one chunk that differs, which no diff can pass over.
func BenchmarkDiff(b *testing.B) {
	leaves := int64((1 << 40) / (DefaultChunkSize * Fanout))
	for _, bench := range []struct {
		name     string
		everyNth int64 // leaves with data
		ids      int   // chunks with data in them
		changes  int64 // so many leaves have a changed chunk, equally far from each other
	}{
		{"sparse", 16, 16, 10},
		{"dense", 1, Fanout, 10},
		{"every-leaf", 1, Fanout, leaves},
	} {
		b.Run(bench.name, func(b *testing.B) {
			dir, r := openDefault(b)
			point := func(changed bool) Map {
				return syntheticPoint(b, r, func(leaf int64, ids *[Fanout]ID) {
					if leaf%bench.everyNth == 0 {
						syntheticIDs(uint64(leaf), ids[:bench.ids])
					}
					if changed && leaf%(leaves/bench.changes) == 0 {
						ids[500] = ID{1}
					}
				})
			}
			from, to := point(false), point(true)
			closeOnce(b, r)
			for b.Loop() {
				b.StopTimer()
				r := reopen(b, dir)
				b.StartTimer()
				found := int64(0)
				for _, err := range r.Diff(b.Context(), from, to, 0, image.MaxSize) {
					if err != nil {
						b.Fatal(err)
					}
					found++
				}
				b.StopTimer()
				if found < bench.changes {
					b.Fatalf("%d differences found, want %d", found, bench.changes)
				}
				closeOnce(b, r)
				b.StartTimer()
			}
		})
	}
}

// storedDisk makes a repository with a disk of data, and returns it open.
func storedDisk(b *testing.B, size int64) (*Repository, Point) {
	b.Helper()
	_, r := openDefault(b)
	s := r.Begin()
	defer s.Close()
	m := Map{Size: size, Data: size}
	var leaves []Leaf
	chunk := template()
	for off := int64(0); off < size; off += r.LeafSpan() {
		var ids [Fanout]ID
		for i := range min(Fanout, (size-off)/DefaultChunkSize) {
			number(chunk, uint64(off/DefaultChunkSize+i))
			ids[i] = r.ID(chunk)
			if _, err := s.Put(ids[i], chunk); err != nil {
				b.Fatal(err)
			}
		}
		id, _, err := s.PutNode(&ids)
		if err != nil {
			b.Fatal(err)
		}
		leaves = append(leaves, Leaf{Index: off / r.LeafSpan(), ID: id})
	}
	var err error
	if m.Root, _, err = s.BuildMap(size, Map{}, leaves); err != nil {
		b.Fatal(err)
	}
	p, err := s.Commit(b.Context(), Point{
		ID: NewPointID(), VM: "vm", Time: time.Now(), Mode: "full", Consistency: "crash",
		Disks: []PointDisk{{Name: "vda", Map: m}},
	})
	if err != nil {
		b.Fatal(err)
	}
	return r, p
}

// BenchmarkReadWhole reads a disk of 512 MiB from end to end as a restore does, in
// parallel and with every hash checked.
func BenchmarkReadWhole(b *testing.B) {
	r, p := storedDisk(b, 512<<20)
	d, err := r.OpenDisk(p.ID, "vda", DiskOptions{Whole: true})
	if err != nil {
		b.Fatal(err)
	}
	defer d.Close()
	b.SetBytes(d.Size())
	for b.Loop() {
		err := image.ForEachData(b.Context(), d, 1<<20, func(int64) {}, func(int64, []byte) error { return nil })
		if err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkReadRandom reads 4 KiB anywhere in a disk, from as many goroutines
// as there are processors: in cached one that the cache holds whole, in hot one that it
// does not, whose segments the kernel has in memory.
func BenchmarkReadRandom(b *testing.B) {
	for _, bench := range []struct {
		name string
		size int64
	}{{"cached", 64 << 20}, {"hot", 1 << 30}} {
		b.Run(bench.name, func(b *testing.B) {
			r, p := storedDisk(b, bench.size)
			d, err := r.OpenDisk(p.ID, "vda", DiskOptions{})
			if err != nil {
				b.Fatal(err)
			}
			defer d.Close()
			b.SetBytes(4 << 10)
			b.ResetTimer()
			b.RunParallel(func(pb *testing.PB) {
				buf := make([]byte, 4<<10)
				for pb.Next() {
					if err := image.ReadFull(d, buf, rand.Int64N(d.Size()>>12)<<12); err != nil {
						b.Error(err)
						return
					}
				}
			})
		})
	}
}

// BenchmarkVerify reads and checks 512 MiB of chunks.
func BenchmarkVerify(b *testing.B) {
	r, _ := storedDisk(b, 512<<20)
	b.SetBytes(512 << 20)
	for b.Loop() {
		v, err := r.Verify(b.Context(), VerifyOptions{})
		if err != nil || len(v.Errors) > 0 {
			b.Fatalf("got %+v, %v", v.Errors, err)
		}
	}
}

// BenchmarkOpen opens a repository of many chunks, whose records are as small as
// they can be.
func BenchmarkOpen(b *testing.B) {
	for _, bench := range []struct {
		name   string
		chunks uint64
	}{{"chunks=1e5", 1e5}, {"chunks=1e6", 1e6}} {
		b.Run(bench.name, func(b *testing.B) {
			dir := filepath.Join(b.TempDir(), "repo")
			if err := Create(dir, CreateOptions{ChunkSize: MinChunkSize}); err != nil {
				b.Fatal(err)
			}
			r := reopen(b, dir)
			s := r.Begin()
			chunk := make([]byte, MinChunkSize)
			var ids [1]ID
			for n := range bench.chunks {
				syntheticIDs(n, ids[:]) // the hash is the caller's word
				if _, err := s.Put(ids[0], chunk); err != nil {
					b.Fatal(err)
				}
			}
			s.Close()
			closeOnce(b, r)
			for b.Loop() {
				r := reopen(b, dir)
				b.StopTimer()
				closeOnce(b, r)
				b.StartTimer()
			}
		})
	}
}

// syntheticSegments makes sealed segments of count records, 4096 each, that have tables of contents
// and no payloads.
func syntheticSegments(b *testing.B, dir string, count int) {
	b.Helper()
	const each, stored = 4096, 30 << 10
	rng := rand.New(rand.NewPCG(5, 6))
	for number := uint64(1); count > 0; number++ {
		var entries []tocEntry
		end := int64(segmentHeaderSize)
		for range min(count, each) {
			e := tocEntry{Off: uint32(end), Stored: stored, Raw: DefaultChunkSize, Type: chunkRecord}
			for i := 0; i < IDSize; i += 8 {
				binary.LittleEndian.PutUint64(e.ID[i:], rng.Uint64())
			}
			entries = append(entries, e)
			end += e.size()
		}
		count -= len(entries)
		f, err := os.Create(filepath.Join(dir, segmentsDir, segmentName(number, 7, segmentSuffix)))
		if err != nil {
			b.Fatal(err)
		}
		if _, err := f.WriteAt(encodeTail(7, entries, end), end); err != nil {
			b.Fatal(err)
		}
		if err := f.Close(); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkOpenIndex opens a repository of a million chunks, or of ten million, with its index and without.
func BenchmarkOpenIndex(b *testing.B) {
	for _, count := range []int{1_000_000, 10_000_000} {
		b.Run(fmt.Sprint("chunks=", count), func(b *testing.B) {
			dir := filepath.Join(b.TempDir(), "repo")
			if err := Create(dir, CreateOptions{}); err != nil {
				b.Fatal(err)
			}
			syntheticSegments(b, dir, count)
			open := func(b *testing.B, prepare func()) {
				for b.Loop() {
					b.StopTimer()
					prepare()
					b.StartTimer()
					r, err := Open(b.Context(), dir, Options{})
					if err != nil {
						b.Fatal(err)
					}
					b.StopTimer()
					if got := r.Stats().Chunks; got != int64(count) {
						b.Fatalf("got %d chunks, want %d", got, count)
					}
					if err := r.Close(); err != nil {
						b.Fatal(err)
					}
					b.StartTimer()
				}
			}
			b.Run("index=none", func(b *testing.B) {
				open(b, func() {
					if err := os.RemoveAll(filepath.Join(dir, indexDir)); err != nil {
						b.Fatal(err)
					}
				})
			})
			b.Run("index=whole", func(b *testing.B) { open(b, func() {}) })
		})
	}
}
