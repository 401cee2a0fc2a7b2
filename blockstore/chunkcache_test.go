package blockstore

import (
	"bytes"
	"errors"
	"math"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/fstest"
	"time"

	"github.com/holdfast-backup/holdfast/image"
)

// countingCache is a cache of n chunks that are filled with the first byte of
// their ids. Loading an id is counted; one whose second byte is set fails.
type countingCache struct {
	*chunkCache
	loaded [256]atomic.Int64
}

var errLoad = errors.New("load")

func newCountingCache(n int) *countingCache {
	c := &countingCache{}
	c.chunkCache = newChunkCache(testChunk, int64(n)*(testChunk+decodeSlack), func(id ID, dst []byte) error {
		c.loaded[id[0]].Add(1)
		dst = dst[:cap(dst)]
		for i := range dst {
			dst[i] = id[0]
		}
		if id[1] != 0 {
			return errLoad
		}
		return nil
	})
	return c
}

// read acquires a chunk, checks its bytes and releases it.
func (c *countingCache) read(t *testing.T, n byte) {
	t.Helper()
	s, err := c.acquire(ID{n}, n%3 == 0)
	if err != nil {
		t.Error(err)
		return
	}
	defer c.release(s)
	if len(s.data) != testChunk || bytes.Count(s.data, []byte{n}) != testChunk {
		t.Errorf("chunk %d does not have its bytes", n)
	}
}

func TestChunkCacheLoadsOnce(t *testing.T) {
	t.Parallel()
	c := newCountingCache(8)
	started, proceed := make(chan struct{}), make(chan struct{})
	load := c.load
	c.load = func(id ID, dst []byte) error {
		close(started) // a second load of the chunk panics
		<-proceed
		return load(id, dst)
	}
	var readers sync.WaitGroup
	readers.Go(func() { c.read(t, 1) })
	<-started
	for range 4 {
		readers.Go(func() { c.read(t, 1) })
	}
	close(proceed)
	readers.Wait()
	c.read(t, 1)
	if got := c.loaded[1].Load(); got != 1 {
		t.Errorf("got %d loads, want 1", got)
	}
}

// What a reader has acquired stays as it is, however much is read meanwhile,
// forgotten, or more than there is memory for.
func TestChunkCacheKeepsWhatIsInUse(t *testing.T) {
	t.Parallel()
	const size = 4
	c := newCountingCache(size)
	var held []*cachedChunk
	for n := range byte(2 * size) {
		s, err := c.acquire(ID{n}, n%3 == 0)
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, s)
	}
	c.drop(ID{0})
	for n := range byte(100) {
		c.read(t, 100+n)
	}
	for n, s := range held {
		if bytes.Count(s.data, []byte{byte(n)}) != testChunk {
			t.Errorf("chunk %d changed while it was in use", n)
		}
		c.release(s)
	}
	for n := range byte(100) {
		c.read(t, 100+n)
	}
	if len(c.items) != size || c.made != size || len(c.free) != 0 {
		t.Errorf("got %d chunks, %d buffers made, %d free; want %d, %d, 0", len(c.items), c.made, len(c.free), size, size)
	}
}

func TestChunkCacheFailedLoad(t *testing.T) {
	t.Parallel()
	c := newCountingCache(4)
	for range 10 {
		if _, err := c.acquire(ID{1, 1}, false); !errors.Is(err, errLoad) {
			t.Errorf("got %v, want %v", err, errLoad)
		}
	}
	if got := c.loaded[1].Load(); got != 10 || len(c.items) != 0 || len(c.free) != c.made {
		t.Errorf("got %d loads, %d chunks kept, %d of %d buffers free; want 10, none, all", got, len(c.items), len(c.free), c.made)
	}
}

// A copy of a disk that fits is in the cache for the next one. Where memory is dear, the first
// takes little of it, the second what it needs, and the third finds all.
func TestChunkCacheCopies(t *testing.T) {
	t.Parallel()
	const size, disk = 2048, 1000
	const little, kept = size/passing + slabSize/testChunk, size/passing + 1
	for _, tt := range []struct {
		name  string
		price time.Duration
		loads []int64 // so far, after each copy
		made  []int   // at most
	}{
		{"cheap", dearPage, []int64{disk, disk}, []int{size, size}},
		{"dear", dearPage + 1, []int64{disk, 2*disk - kept, 2*disk - kept}, []int{little, size, size}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			c := newCountingCache(size)
			c.price = func([]byte) time.Duration { return tt.price }
			for i, want := range tt.loads {
				for n := range disk {
					s, err := c.acquire(ID{1, 0, byte(n), byte(n >> 8)}, true)
					if err != nil {
						t.Fatal(err)
					}
					c.release(s)
				}
				if got := c.loaded[1].Load(); got != want || c.made > tt.made[i] {
					t.Errorf("copy %d: got %d loads, memory for %d chunks; want %d, %d or less", i+1, got, c.made, want, tt.made[i])
				}
			}
		})
	}
}

// Of chunks that left, as many are remembered as the cache has at most.
func TestChunkCacheRemembers(t *testing.T) {
	t.Parallel()
	const size = 32
	c := newCountingCache(size)
	for n := range 100 * size {
		s, err := c.acquire(ID{1, 0, byte(n % 3000), byte(n % 3000 >> 8)}, n%3 == 0)
		if err != nil {
			t.Fatal(err)
		}
		c.release(s)
	}
	if len(c.gone) != size || len(c.goneRing) != size {
		t.Errorf("got %d ids, %d in order; want %d, %d", len(c.gone), len(c.goneRing), size, size)
	}
}

// A copy of a large disk, in steps smaller than a chunk, leaves most of what
// is read again and again.
func TestChunkCacheScan(t *testing.T) {
	t.Parallel()
	const size = 64
	c := newCountingCache(size)
	for n := range byte(size/2 + size/hitGap + 1) {
		c.read(t, n)
	}
	for n := range byte(size / 2) {
		c.read(t, n)
	}
	for range 4 {
		for n := range byte(128) {
			for range 4 {
				c.read(t, 128+n)
			}
		}
	}
	for n := range byte(size / 2) {
		c.read(t, n)
		if got := c.loaded[n].Load(); got != 1 {
			t.Errorf("chunk %d: got %d loads, want 1", n, got)
		}
	}
}

func TestChunkCacheRace(t *testing.T) {
	t.Parallel()
	c := newCountingCache(6)
	var readers sync.WaitGroup
	for range 8 {
		readers.Go(func() {
			for range 2000 {
				switch n := byte(rand.IntN(20)); rand.IntN(10) {
				case 0:
					c.drop(ID{n})
				case 1:
					if _, err := c.acquire(ID{n, 1}, n%2 == 0); !errors.Is(err, errLoad) {
						t.Errorf("got %v, want %v", err, errLoad)
					}
				default:
					c.read(t, n)
				}
			}
		})
	}
	readers.Wait()
	if got := len(c.items) + len(c.free); got != c.made || c.passed.Len()+c.recent.Len()+c.frequent.Len() != len(c.items) {
		t.Errorf("got %d buffers, %d chunks in queues; want %d, %d", got, c.passed.Len()+c.recent.Len()+c.frequent.Len(), c.made, len(c.items))
	}
}

func TestPrefetch(t *testing.T) {
	t.Parallel()
	dir := create(t, CreateOptions{})
	c := append(append(make(content, 3), numbers(1, 40)...), make(content, 7)...)
	p := mustBackup(t, open(t, dir, Options{}), "vm", c)
	for _, tt := range []struct {
		name        string
		off, length int64
		cache       int64 // 0 is plenty
		want        int   // chunks in the cache
	}{
		{"all", 0, math.MaxInt64, 0, 40},
		{"part of a chunk", 5*testChunk + 1, 1, 0, 1},
		{"two halves", 5*testChunk + testChunk/2, testChunk, 0, 2},
		{"zeros", 0, 3 * testChunk, 0, 0},
		{"negative", -1, testChunk, 0, 0},
		{"empty", 5 * testChunk, 0, 0, 0},
		{"behind the end", 50 * testChunk, testChunk, 0, 0},
		{"more than may wait", 3 * testChunk, 40 * testChunk, 1 << 20, 5},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := crash(t, dir)
			r := open(t, dir, Options{CacheSize: tt.cache})
			d, err := r.OpenDisk(p.ID, "", DiskOptions{})
			if err != nil {
				t.Fatal(err)
			}
			// Nobody takes from the queue before it is looked at.
			r.ahead.workers = maxAheadWorkers
			d.Prefetch(tt.off, tt.length)
			r.ahead.workers = 1
			r.ahead.work()
			d.ahead.Wait()
			if got := len(r.chunks.items); got != tt.want {
				t.Errorf("got %d chunks in the cache, want %d", got, tt.want)
			}
			got := make([]byte, d.Size())
			if err := image.ReadFull(d, got, 0); err != nil || !bytes.Equal(got, c.bytes()) {
				t.Errorf("got other bytes than were stored, %v", err)
			}
			d.Prefetch(0, d.Size())
			if err := d.Close(); err != nil {
				t.Error(err)
			}
			d.Prefetch(0, d.Size())
			r.ahead.mu.Lock()
			defer r.ahead.mu.Unlock()
			if len(r.ahead.queue) != 0 || len(r.pins) != 0 {
				t.Errorf("a closed disk has %d chunks waiting and %d pins", len(r.ahead.queue), len(r.pins))
			}
		})
	}
}

// Decoding touches nothing but the result and the capacity that it was given.
func TestExpandStaysInside(t *testing.T) {
	t.Parallel()
	coder, err := newCoder()
	if err != nil {
		t.Fatal(err)
	}
	defer coder.close()
	for n := range uint32(50) {
		want := bytes.Repeat(chunkOf(n + 1)[:1000+n], 60)
		payload, how, err := coder.compress(nil, ID{1}, chunkRecord, want)
		if err != nil || how != codecZstd {
			t.Fatalf("got codec %d, %v", how, err)
		}
		for _, slack := range []int{0, 1, 16, decodeSlack, 2 * decodeSlack} {
			room := bytes.Repeat([]byte{0xaa}, len(want)+4*decodeSlack)
			got, err := coder.expand(room[:len(want):len(want)+slack], payload, how, len(want))
			if err != nil || !bytes.Equal(got, want) {
				t.Fatalf("%d bytes, slack %d: other bytes than were compressed, %v", len(want), slack, err)
			}
			behind := room[len(want)+min(slack, decodeSlack):]
			if bytes.Count(behind, []byte{0xaa}) != len(behind) {
				t.Errorf("%d bytes, slack %d: written behind its end", len(want), slack)
			}
		}
	}
}

func TestCgroupMemory(t *testing.T) {
	t.Parallel()
	root := fstest.MapFS{
		"system.slice/memory.max":             {Data: []byte("max\n")},
		"system.slice/web.service/memory.max": {Data: []byte("536870912\n")},
		"user.slice/memory.max":               {Data: []byte("1000\n")},
		"user.slice/a/b/memory.max":           {Data: []byte("2000\n")},
		"bad/memory.max":                      {Data: []byte("many\n")},
	}
	for _, tt := range []struct {
		groups string
		want   int64
	}{
		{"0::/system.slice/web.service\n", 512 << 20},
		{"12:cpu:/user.slice\n0::/system.slice\n", math.MaxInt64},
		{"0::/user.slice/a/b\n", 1000},
		{"0::/\n", math.MaxInt64},
		{"0::/../../user.slice\n", math.MaxInt64},
		{"0::/bad\n", math.MaxInt64},
		{"0::/gone\n", math.MaxInt64},
		{"", math.MaxInt64},
	} {
		if got := cgroupMemory(root, tt.groups); got != tt.want {
			t.Errorf("%q: got %d, want %d", tt.groups, got, tt.want)
		}
	}
}
