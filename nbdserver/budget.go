package nbdserver

import (
	"context"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/semaphore"
)

const (
	// laneBytes is the memory for replies that cannot be cut, of all
	// connections.
	laneBytes = 64 << 20
	// laneShare is how much of it one connection may hold, enough for the longest.
	laneShare = laneBytes / 2
	// ownSlots is how many operations each export's disk may run at the same
	// time whatever the others do, and sharedSlots how many more all together:
	// each may take an operating system's thread, of which Go allows 10,000.
	ownSlots    = 64
	sharedSlots = 4096
)

// pool is a stock that accounts borrow from: bytes of memory, or places for
// operations of disks.
type pool struct{ free atomic.Int64 }

func newPool(size int64) *pool {
	p := new(pool)
	p.free.Store(size)
	return p
}

// borrow takes n out of the pool for somebody who then holds held of it. Nobody
// may come to hold more than half of what is then free: who takes much leaves
// room for others, who all get less while many take.
func (p *pool) borrow(n, held int64) bool {
	for {
		free := p.free.Load()
		if held > (free-n)/2 {
			return false
		}
		if p.free.CompareAndSwap(free, free-n) {
			return true
		}
	}
}

// account is one party's share: a credit of its own, which others cannot take,
// and what it borrows from a pool beyond that. Its owner guards it.
//
// Whoever is refused holds something itself, since the credit suffices for the
// largest amount. It need only wait for that, so that must not wait for it.
type account struct {
	pool   *pool
	credit int64
	used   int64
}

// take takes n if it may.
func (a *account) take(n int64) bool {
	held := max(a.used+n-a.credit, 0)
	if more := held - max(a.used-a.credit, 0); more > 0 && !a.pool.borrow(more, held) {
		return false
	}
	a.used += n
	return true
}

// give gives n back.
func (a *account) give(n int64) {
	if less := max(a.used-a.credit, 0) - max(a.used-n-a.credit, 0); less > 0 {
		a.pool.free.Add(less)
	}
	a.used -= n
}

// lane is the memory of replies that cannot be cut. Those who wait get it in the
// order in which they came.
type lane struct {
	bytes   *semaphore.Weighted
	waiting atomic.Int64
}

func newLane() *lane { return &lane{bytes: semaphore.NewWeighted(laneBytes)} }

// enter takes n bytes. It fails when ctx is done first.
func (l *lane) enter(ctx context.Context, n int64) error {
	l.waiting.Add(1)
	defer l.waiting.Add(-1)
	return l.bytes.Acquire(ctx, n)
}

func (l *lane) leave(n int64) { l.bytes.Release(n) }

// contended reports whether somebody waits.
func (l *lane) contended() bool { return l.waiting.Load() > 0 }

// slots bounds how many operations of an export's disk run at the same time.
// Those who wait get a slot in the order in which they came.
type slots struct {
	mu      sync.Mutex // guards what follows
	account account
	waiting []chan struct{} // closed when the slot is given
}

// try takes a slot if one is free and nobody waits.
func (p *slots) try() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.waiting) == 0 && p.account.take(1)
}

// enter takes a slot. It fails when ctx is done first.
func (p *slots) enter(ctx context.Context) error {
	p.mu.Lock()
	if len(p.waiting) == 0 && p.account.take(1) {
		p.mu.Unlock()
		return nil
	}
	given := make(chan struct{})
	p.waiting = append(p.waiting, given)
	p.mu.Unlock()
	select {
	case <-given:
		return nil
	case <-ctx.Done():
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, w := range p.waiting {
		if w == given {
			p.waiting = append(p.waiting[:i], p.waiting[i+1:]...)
			return ctx.Err()
		}
	}
	p.leaveLocked() // it was given meanwhile
	return ctx.Err()
}

// leave gives a slot back.
func (p *slots) leave() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.leaveLocked()
}

func (p *slots) leaveLocked() {
	p.account.give(1)
	for len(p.waiting) > 0 && p.account.take(1) {
		close(p.waiting[0])
		p.waiting = p.waiting[1:]
	}
}
