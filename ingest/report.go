package ingest

import (
	"sync"
	"time"
)

// reportEvery is the shortest time between two calls of a progress function.
const reportEvery = 100 * time.Millisecond

// reporter adds up what the workers have done and tells of it now and then.
type reporter struct {
	tell func(Progress) // nil if nobody listens

	mu   sync.Mutex // guards the fields below, and calls of tell
	now  Progress
	last time.Time
}

func newReporter(disks []Source, tell func(Progress)) *reporter {
	r := &reporter{tell: tell}
	for _, d := range disks {
		r.now.Total += d.Disk.Size()
		r.now.Size += d.Disk.Size()
	}
	return r
}

// add counts what was read and stored of a disk.
func (r *reporter) add(disk string, sum DiskResult) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.now.Name = disk
	r.now.DiskResult.add(sum)
}

// done counts bytes that are done.
func (r *reporter) done(n int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.now.Done += n
	if r.tell != nil && time.Since(r.last) >= reportEvery {
		r.last = time.Now()
		r.tell(r.now)
	}
}

// again adds bytes that are to be done once more.
func (r *reporter) again(n int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.now.Total += n
}

// finish tells the last word.
func (r *reporter) finish() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.tell != nil {
		r.tell(r.now)
	}
}
