package blockstore

import (
	"container/list"
	"fmt"
	"os"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// hugePage is the size of a huge page, bytes. The system clears one in an eighth of the time that
	// the small pages take for which it stands.
	hugePage = 2 << 20
	// slabSize is how much memory the cache takes from the system at a time, bytes: several huge
	// pages, for an old kernel begins a mapping anywhere, and what lies before the first of
	// them and behind the last is small pages.
	slabSize = 4 * hugePage
	// dearPage is the processor time from which on a fresh huge page is dear: a third of what
	// decoding as much takes. A fifth of it is usual. A virtual machine whose host
	// takes back what is free pays four times as much, and a system without huge pages as much.
	dearPage = time.Millisecond
	// hitGap is the part of the cache, one in so many chunks, that must have been
	// loaded between a chunk's own loading and a hit for that hit to count.
	// Those of a reader that goes through the disk in small steps come at once.
	hitGap = 16
	// newcomers is the part of a full cache, one in so many chunks, that chunks without
	// a hit that counts may take from the others.
	newcomers = 4
	// passing is the part of a full cache, one in so many chunks, that chunks read whole
	// may take from the others: they are a copy's, say, which will not come back. Where memory is
	// dear, it is also the part that chunks read for the first time get, of either kind.
	passing = 16
)

// chunkCache keeps decoded chunks. Readers that want the same one at the same
// time share one load. It is safe for concurrent use.
//
// Chunks come into the queue recent, those that are read whole into passed. One that was hit
// again after a while moves on into frequent when its turn to go has come, any other
// goes; its id is remembered, and if it is wanted again it comes into frequent at once.
// So one pass over a large disk, such as a copy, displaces little of what is read again and
// again, and what fits is there for a second copy, or for a third if memory is dear.
//
// Their memory is taken from the system and not from Go's heap, which the collector would let
// grow to twice the cache, and is used again for other chunks. It goes back
// some time after the cache is not referenced any more.
type chunkCache struct {
	chunkSize int
	limit     int // chunks

	load  func(id ID, dst []byte) error   // may use dst's whole capacity
	price func(page []byte) time.Duration // touch, or a test's

	mu       sync.Mutex
	items    map[ID]*cachedChunk
	passed   *list.List      // of *cachedChunk, oldest first
	recent   *list.List      // of *cachedChunk, oldest first
	frequent *list.List      // of *cachedChunk, the next to be looked at first
	gone     map[ID]struct{} // that left recent and passed last
	goneRing []ID            // the same in their order, up to limit
	goneNext int             // in goneRing: the oldest
	free     [][]byte
	made     int    // buffers made, free or not; up to limit
	dear     bool   // fresh memory is dear
	loads    uint64 // so far
}

// cachedChunk is a chunk in the cache, or one that left it while somebody had it.
type cachedChunk struct {
	id    ID
	ready chan struct{}
	data  []byte // valid, as err, once ready is closed
	err   error
	heap  bool // data is not of the cache's memory

	// Guarded by chunkCache.mu.
	users int           // that have acquired it
	queue *list.List    // passed, recent or frequent
	place *list.Element // in queue; nil if it has left
	born  uint64        // chunkCache.loads when it came
	hit   bool          // since it came into its queue, or since it was looked at there
}

// newChunkCache makes a cache of up to limit bytes, but at least one chunk.
func newChunkCache(chunkSize int, limit int64, load func(id ID, dst []byte) error) *chunkCache {
	return &chunkCache{
		chunkSize: chunkSize, load: load, limit: max(int(limit/int64(chunkSize+decodeSlack)), 1),
		items: map[ID]*cachedChunk{}, passed: list.New(), recent: list.New(), frequent: list.New(),
		gone: map[ID]struct{}{}, price: touch,
	}
}

// acquire returns a chunk, loading it if need be; whole says that all of it will be read now. Its data must not be changed and are
// the caller's until it releases it. A failed load is not kept, and nothing is to be
// released then.
func (c *chunkCache) acquire(id ID, whole bool) (*cachedChunk, error) {
	c.mu.Lock()
	if s, ok := c.items[id]; ok {
		s.users++
		if s.queue == c.frequent || c.loads-s.born > uint64(c.limit/hitGap) {
			s.hit = true
		}
		c.mu.Unlock()
		<-s.ready
		if s.err != nil {
			c.release(s)
			return nil, s.err
		}
		return s, nil
	}
	c.loads++
	s := &cachedChunk{id: id, ready: make(chan struct{}), users: 1, born: c.loads, queue: c.recent}
	if whole {
		s.queue = c.passed
	}
	if _, again := c.gone[id]; again {
		s.queue = c.frequent
	}
	s.data = c.bufferLocked(s.queue)
	if s.heap = s.data == nil; s.heap {
		s.data = make([]byte, c.chunkSize, c.chunkSize+decodeSlack)
	}
	s.place = s.queue.PushBack(s)
	c.items[id] = s
	c.mu.Unlock()

	s.err = c.load(id, s.data)
	close(s.ready)
	if s.err != nil {
		c.mu.Lock()
		c.removeLocked(s)
		c.mu.Unlock()
		c.release(s)
		return nil, s.err
	}
	return s, nil
}

// release ends what acquire began.
func (c *chunkCache) release(s *cachedChunk) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s.users--
	if s.heap && s.place != nil {
		c.removeLocked(s) // one too many
	}
	c.reuseLocked(s)
}

// has reports whether a chunk is there or being loaded.
func (c *chunkCache) has(id ID) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, ok := c.items[id]
	return ok
}

// drop forgets an id.
func (c *chunkCache) drop(id ID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s, ok := c.items[id]; ok {
		c.removeLocked(s)
		c.reuseLocked(s)
	}
}

// removeLocked takes a chunk out; its memory stays that of its users.
func (c *chunkCache) removeLocked(s *cachedChunk) {
	if s.place == nil {
		return // dropped while it was loading
	}
	s.queue.Remove(s.place)
	s.place = nil
	delete(c.items, s.id)
}

// reuseLocked takes back the memory of a chunk that has left and has no users.
func (c *chunkCache) reuseLocked(s *cachedChunk) {
	if s.users == 0 && s.place == nil && !s.heap {
		c.free = append(c.free, s.data)
		s.data = nil
	}
}

// bufferLocked returns memory for a chunk that comes into a queue, with decodeSlack bytes of
// capacity more; nil if all of it is in use this moment.
func (c *chunkCache) bufferLocked(queue *list.List) []byte {
	switch {
	case c.dear && queue != c.frequent && queue.Len() > c.limit/passing:
		c.evictLocked(queue) // also if there is some that was not used yet
	case len(c.free) == 0 && (c.made == c.limit || !c.growLocked()):
		c.evictLocked(nil)
	}
	if len(c.free) == 0 && c.made < c.limit {
		c.growLocked()
	}
	if len(c.free) == 0 {
		return nil
	}
	b := c.free[len(c.free)-1]
	c.free = c.free[:len(c.free)-1]
	return b
}

// growLocked takes another slab from the system; false means that it gives none.
func (c *chunkCache) growLocked() bool {
	stride := c.chunkSize + decodeSlack
	n := min(max(slabSize/stride, 1), c.limit-c.made)
	length := n * stride
	if length > hugePage {
		length = (length + hugePage - 1) &^ (hugePage - 1) // Linux from 6.7 on aligns such alone
	}
	slab, err := unix.Mmap(-1, 0, length, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return false
	}
	_ = unix.Madvise(slab, unix.MADV_HUGEPAGE) // a kernel without them does without
	runtime.AddCleanup(c, unmap, slab)
	if middle := slab[length/2:]; len(middle) >= hugePage {
		c.dear = c.price(middle[:hugePage]) > dearPage
	}
	for i := range n {
		c.free = append(c.free, slab[i*stride:i*stride+c.chunkSize:(i+1)*stride])
	}
	c.made += n
	return true
}

// touch writes to fresh memory and returns the processor time that it took.
func touch(memory []byte) time.Duration {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var from, to unix.Timespec
	if unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &from) != nil {
		return 0
	}
	for i := 0; i < len(memory); i += os.Getpagesize() {
		memory[i] = 0
	}
	if unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &to) != nil {
		return 0
	}
	return time.Duration(to.Nano() - from.Nano())
}

func unmap(slab []byte) {
	if err := unix.Munmap(slab); err != nil {
		panic(fmt.Sprintf("blockstore: internal error: unmap %d bytes: %v", len(slab), err))
	}
}

// evictLocked frees one chunk's memory, unless users have all of it. If from is not nil the chunk
// is one of that queue.
func (c *chunkCache) evictLocked(from *list.List) {
	// Each turn takes a chunk out, takes its hit away, or passes over one in use.
	for range 2 * len(c.items) {
		queue := from
		if queue == nil {
			queue = c.nextLocked()
		}
		if queue.Len() == 0 {
			return
		}
		s := queue.Front().Value.(*cachedChunk)
		switch {
		case s.users > 0:
			queue.MoveToBack(s.place)
		case s.hit:
			s.hit = false
			queue.Remove(s.place)
			s.queue, s.place = c.frequent, c.frequent.PushBack(s)
		default:
			if queue != c.frequent {
				c.rememberLocked(s.id)
			}
			c.removeLocked(s)
			c.reuseLocked(s)
			return
		}
	}
}

// nextLocked returns the queue whose turn it is to lose a chunk.
func (c *chunkCache) nextLocked() *list.List {
	switch {
	case c.passed.Len() > 0 && c.passed.Len() >= c.limit/passing:
		return c.passed
	case c.recent.Len() > c.limit/newcomers || c.frequent.Len() == 0 && c.recent.Len() > 0:
		return c.recent
	case c.frequent.Len() == 0:
		return c.passed
	}
	return c.frequent
}

// rememberLocked notes that a chunk left, in place of the one that did so longest ago.
func (c *chunkCache) rememberLocked(id ID) {
	if len(c.goneRing) < c.limit {
		c.goneRing = append(c.goneRing, id)
	} else {
		delete(c.gone, c.goneRing[c.goneNext])
		c.goneRing[c.goneNext] = id
		c.goneNext = (c.goneNext + 1) % c.limit
	}
	c.gone[id] = struct{}{}
}
