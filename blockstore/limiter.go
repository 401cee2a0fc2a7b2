package blockstore

import (
	"context"
	"sync"
	"time"
)

// limiter spreads work over time. A nil limiter lets everything pass. It is safe for concurrent
// use.
type limiter struct {
	rate int64 // units a second

	mu   sync.Mutex
	next time.Time // when what passed until now is paid for; guarded by mu
}

// newLimiter returns a limiter for a rate; 0 is none.
func newLimiter(rate int64) *limiter {
	if rate == 0 {
		return nil
	}
	return &limiter{rate: rate}
}

// wait returns when n more units may pass, or when ctx ends. Time in which nothing passed is not made
// up for.
func (l *limiter) wait(ctx context.Context, n int64) error {
	if l == nil {
		return ctx.Err()
	}
	l.mu.Lock()
	now := time.Now()
	if l.next.Before(now) {
		l.next = now
	}
	delay := l.next.Sub(now)
	l.next = l.next.Add(time.Duration(float64(n) / float64(l.rate) * float64(time.Second)))
	l.mu.Unlock()
	if delay == 0 {
		return ctx.Err()
	}
	timer := time.NewTimer(delay)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
