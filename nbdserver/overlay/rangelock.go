package overlay

import (
	"slices"
	"sync"
)

// rangeLock locks ranges of blocks. Those who want overlapping ranges get them in
// the order in which they came.
type rangeLock struct {
	mu    sync.Mutex
	spans []*span // held and waited for, in the order of their coming; one a caller at most
}

// span is the range [first, end) of one caller.
type span struct {
	first, end int64
	released   chan struct{} // closed at its release; made by the first who waits, under mu
}

// lock waits until nobody who came before holds or wants a block of
// [first, end). The holder must call unlock with what it returns.
func (l *rangeLock) lock(first, end int64) *span {
	own := &span{first: first, end: end}
	var before []chan struct{}
	l.mu.Lock()
	for _, s := range l.spans {
		if s.first < end && first < s.end {
			if s.released == nil {
				s.released = make(chan struct{})
			}
			before = append(before, s.released)
		}
	}
	l.spans = append(l.spans, own)
	l.mu.Unlock()
	for _, released := range before {
		<-released
	}
	return own
}

func (l *rangeLock) unlock(s *span) {
	l.mu.Lock()
	defer l.mu.Unlock()
	i := slices.Index(l.spans, s)
	l.spans = slices.Delete(l.spans, i, i+1)
	if s.released != nil {
		close(s.released)
	}
}
