package blockstore

import (
	"runtime"
	"sync"
)

const (
	// maxAhead is how many chunks may wait to be read ahead, over all disks; but
	// no more than an eighth of the cache.
	maxAhead = 256
	// maxAheadWorkers is how many are read ahead at the same time, if there are as many processors.
	maxAheadWorkers = 4
)

// prefetcher brings chunks into the cache before they are asked for.
type prefetcher struct {
	limit int // of queue

	mu      sync.Mutex
	queue   []aheadChunk
	workers int // running; each ends when the queue is empty
}

// aheadChunk is a chunk of a disk, by its first byte.
type aheadChunk struct {
	d   *Disk
	off int64
}

func newPrefetcher(cacheLimit int) *prefetcher {
	return &prefetcher{limit: min(maxAhead, max(cacheLimit/8, 1))}
}

// Prefetch starts to bring [off, off+length) into the cache and returns at once. It is a
// hint: what finds the queue full is left out, an error is left to the
// read that will meet it, and a disk that is read Whole has no use for it. Close
// waits for what has begun.
func (d *Disk) Prefetch(off, length int64) {
	if d.o.Whole || off < 0 || off >= d.m.Size {
		return
	}
	p, chunk := d.r.ahead, int64(d.r.chunkSize)
	length = min(length, d.m.Size-off)
	p.mu.Lock()
	defer p.mu.Unlock()
	if d.closed.Load() {
		return
	}
	for at := off - off%chunk; at < off+length && len(p.queue) < p.limit; at += chunk {
		p.queue = append(p.queue, aheadChunk{d, at})
		d.ahead.Add(1)
	}
	for p.workers < min(len(p.queue), maxAheadWorkers, runtime.GOMAXPROCS(0)) {
		p.workers++
		go p.work()
	}
}

// work reads chunks until none waits. The disks wait for it: see Disk.unpin.
func (p *prefetcher) work() {
	for {
		p.mu.Lock()
		if len(p.queue) == 0 {
			p.queue = nil
			p.workers--
			p.mu.Unlock()
			return
		}
		next := p.queue[0]
		p.queue = p.queue[1:]
		p.mu.Unlock()
		next.d.fetch(next.off)
		next.d.ahead.Done()
	}
}

// fetch brings the chunk at off into the cache.
func (d *Disk) fetch(off int64) {
	if d.closed.Load() {
		return
	}
	id, err := d.chunkAt(off)
	if err != nil || id.IsNull() || d.r.chunks.has(id) {
		return
	}
	if s, err := d.r.chunks.acquire(id, true); err == nil {
		d.r.chunks.release(s)
	}
}
