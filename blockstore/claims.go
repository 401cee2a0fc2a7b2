package blockstore

import "sync"

// claims holds the chunks that are being stored, or are stored and not in the
// index yet. It makes runs in flight at the same time store a chunk once: the
// first to claim an id stores it, the others wait for its location.
type claims struct {
	mu     sync.Mutex
	m      map[ID]*claim
	failed map[uint64]struct{} // segments that could not be written
}

// claim is one id's. loc and found may be read once ready is closed.
type claim struct {
	ready chan struct{}
	loc   location
	found bool // loc is where the chunk is

	// entered is the segment whose records, this one's among them, came into the index
	// before the claim was resolved; 0 if none did. Guarded by claims.mu.
	entered uint64
}

func newClaims() *claims {
	return &claims{m: map[ID]*claim{}, failed: map[uint64]struct{}{}}
}

// take returns the claim for an id and whether the caller has just made it. If so,
// the caller must resolve it, whatever happens.
func (c *claims) take(id ID) (cl *claim, mine bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if cl, ok := c.m[id]; ok {
		return cl, false
	}
	cl = &claim{ready: make(chan struct{})}
	c.m[id] = cl
	return cl, true
}

// stored resolves a claim with the location of a record that was just
// appended. It stays until released: the index doesn't know of it yet. If the
// segment has failed since, the claim is dropped.
func (c *claims) stored(id ID, cl *claim, loc location) {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, failed := c.failed[loc.Segment]
	if !failed {
		cl.loc, cl.found = loc, true
	}
	if failed || cl.entered == loc.Segment {
		delete(c.m, id)
	}
	close(cl.ready)
}

// drop resolves a claim for which nothing was stored: the chunk is where the index
// says, or it could not be stored. Who waits looks again.
func (c *claims) drop(id ID, cl *claim) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.m, id)
	close(cl.ready)
}

// find returns the location of a chunk that is stored and not in the index.
func (c *claims) find(id ID) (location, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	cl, ok := c.m[id]
	if !ok {
		return location{}, false
	}
	select {
	case <-cl.ready:
		return cl.loc, cl.found
	default:
		return location{}, false
	}
}

// release ends the claims for records that are in the index now.
func (c *claims) release(entries []entry) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range entries {
		cl, ok := c.m[e.id]
		switch {
		case !ok:
		case cl.isAt(e.loc.Segment):
			delete(c.m, e.id)
		default:
			cl.entered = e.loc.Segment
		}
	}
}

// forget ends the claims for records of a segment that failed.
func (c *claims) forget(segment uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.failed[segment] = struct{}{}
	for id, cl := range c.m {
		if cl.isAt(segment) {
			delete(c.m, id)
		}
	}
}

func (cl *claim) isAt(segment uint64) bool {
	select {
	case <-cl.ready:
		return cl.found && cl.loc.Segment == segment
	default:
		return false
	}
}
