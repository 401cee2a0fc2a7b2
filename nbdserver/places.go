package nbdserver

import (
	"container/list"
	"context"
	"net"
	"sync"
	"time"
)

// handshakeGrace is how long a client is left alone in the handshake while
// others wait for its place: a few round trips.
const handshakeGrace = 100 * time.Millisecond

// places bounds how many clients are connected, and how many of them are in the
// handshake, where anybody may be. When there is no place for a new client, the
// one that has been in the handshake longest makes room: clients that say
// nothing cannot lock out others, who need a place for a few round trips only.
// To close the new one instead would let a stranger with little effort keep
// everybody out.
type places struct {
	clients    int // limit
	handshakes int // limit

	mu       sync.Mutex // guards what follows
	taken    int        // clients with a place
	leaving  int        // clients that lost their place and have not ended yet
	choosing list.List  // of *place, those in the handshake, the oldest first

	freed chan struct{} // holds a token when a place may have become free
}

// place is that of one client.
type place struct {
	of       *places
	conn     net.Conn
	began    time.Time
	choosing *list.Element // nil after the handshake
	lost     bool
}

func newPlaces(clients int) *places {
	return &places{clients: clients, handshakes: max(clients/4, 16), freed: make(chan struct{}, 1)}
}

// take finds a place for a client, for which it may wait some time and close the
// connection of another. nil means that there is none.
func (p *places) take(ctx context.Context, nc net.Conn) *place {
	for {
		got, wait := p.tryTake(nc)
		if wait <= 0 {
			return got
		}
		select {
		case <-ctx.Done():
			return nil
		case <-p.freed:
		case <-time.After(wait):
		}
	}
}

// tryTake is take that says how long to wait instead.
func (p *places) tryTake(nc net.Conn) (*place, time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.taken >= p.clients || p.choosing.Len() >= p.handshakes {
		oldest := p.choosing.Front()
		if oldest == nil || p.leaving >= p.handshakes {
			return nil, 0
		}
		old := oldest.Value.(*place)
		if age := time.Since(old.began); age < handshakeGrace {
			return nil, handshakeGrace - age
		}
		old.settleLocked()
		old.lost = true
		p.taken--
		p.leaving++
		old.conn.Close()
	}
	p.taken++
	got := &place{of: p, conn: nc, began: time.Now()}
	got.choosing = p.choosing.PushBack(got)
	return got, 0
}

// settle says that the client's handshake is over.
func (x *place) settle() {
	x.of.mu.Lock()
	defer x.of.mu.Unlock()
	x.settleLocked()
}

func (x *place) settleLocked() {
	if x.choosing == nil {
		return
	}
	x.of.choosing.Remove(x.choosing)
	x.choosing = nil
	x.of.notify()
}

func (p *places) notify() {
	select {
	case p.freed <- struct{}{}:
	default:
	}
}

// leave gives the place back. It is called once, when the client is gone.
func (x *place) leave() {
	x.of.mu.Lock()
	defer x.of.mu.Unlock()
	x.settleLocked()
	if x.lost {
		x.of.leaving--
	} else {
		x.of.taken--
	}
	x.of.notify()
}
