package nbdserver

import (
	"sync/atomic"
	"time"
)

const (
	// quickly is how fast a disk must answer for the reader to execute requests
	// itself: about what handing a request to a worker costs.
	quickly = 20 * time.Microsecond
	// quickRun is after how many quick requests the reader does so, and bestScore
	// how many it remembers at most. slowest is how many a slow one cancels at most.
	quickRun  = 16
	bestScore = 64
	slowest   = 32
	// reliefPeriod bounds how long a request that is unexpectedly slow keeps
	// the reader from reading: at most twice as long. Each tick wakes a thread.
	reliefPeriod = 10 * time.Millisecond
)

// relief lets a connection's reader execute quick requests itself, without
// waking a worker, and finds another reader when one of them is not quick after
// all. The clock ticks while there are such requests and once or twice after the last.
type relief struct {
	takeOver func() // called when the reader has lost its role

	// turn is raised at the beginning and at the end of each request that the
	// reader executes: it is odd while there is one.
	turn  atomic.Uint64
	seen  atomic.Uint64 // turn at the last tick
	armed atomic.Bool   // timer is running
	timer *time.Timer
}

func newRelief(takeOver func()) *relief {
	r := &relief{takeOver: takeOver}
	r.timer = time.AfterFunc(reliefPeriod, r.tick)
	r.timer.Stop()
	return r
}

// begin says that the reader executes a request. Until end says that it is
// still the reader, it must not touch what the reader owns.
func (r *relief) begin() uint64 {
	turn := r.turn.Add(1)
	if r.armed.CompareAndSwap(false, true) {
		r.timer.Reset(reliefPeriod)
	}
	return turn
}

// end reports whether the caller of begin is still the reader.
func (r *relief) end(turn uint64) bool { return r.turn.CompareAndSwap(turn, turn+1) }

func (r *relief) tick() {
	turn := r.turn.Load()
	if r.seen.Swap(turn) == turn {
		if turn%2 == 1 && r.turn.CompareAndSwap(turn, turn+1) {
			r.takeOver()
		}
		r.armed.Store(false)
		// A request that began before that did not start the timer.
		if r.turn.Load() == turn || !r.armed.CompareAndSwap(false, true) {
			return
		}
	}
	r.timer.Reset(reliefPeriod)
}
