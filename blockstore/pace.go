package blockstore

import (
	"context"
	"time"
)

// Beside sessions a collection works for paceSlice at a time and then rests paceRest times as long,
// at most maxRest, as often as its work is so far: it leaves most of a processor, of the disk and of the
// locks to the backups.
const (
	paceSlice = 5 * time.Millisecond
	paceRest  = 4
	maxRest   = time.Second
)

// pace is called between pieces of work of some milliseconds at most, with no lock or claim held. It
// rests if it is time to, and fails if ctx has ended.
func (c *collection) pace(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if !c.r.segments.busy() {
		c.slice = time.Time{}
		return nil
	}
	now := time.Now()
	if c.slice.IsZero() {
		c.slice = now
	}
	worked := now.Sub(c.slice)
	if worked < paceSlice {
		return nil
	}
	rest := time.NewTimer(min(worked*paceRest, maxRest))
	defer rest.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-rest.C:
	}
	c.slice = time.Now()
	return nil
}

// busy reports whether a session is open.
func (s *segmentSet) busy() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.sessions) > 0
}
