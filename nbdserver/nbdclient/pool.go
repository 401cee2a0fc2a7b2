package nbdclient

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"
)

// pool is the connections of a client, and the requests that wait for one.
type pool struct {
	inFlight int  // requests on one connection
	most     int  // connections that may be used
	final    bool // the end of any connection is that of all

	mu      sync.Mutex // guards the rest
	live    []*conn
	want    int // connections, at most most; fewer once the server refuses more
	waiters []chan<- acquired
	lost    error // if final: why the first connection ended
	closed  bool
}

// acquired is a connection with room for a request, or why there is none.
type acquired struct {
	conn *conn
	err  error
}

// roomLocked returns the connection with the fewest requests, its count raised,
// or nil if all are full.
func (p *pool) roomLocked() *conn {
	var best *conn
	for _, c := range p.live {
		if c.load < p.inFlight && (best == nil || c.load < best.load) {
			best = c
		}
	}
	if best != nil {
		best.load++
	}
	return best
}

// serveLocked gives room to those who wait, in order.
func (p *pool) serveLocked() {
	for len(p.waiters) > 0 {
		c := p.roomLocked()
		if c == nil {
			return
		}
		p.waiters[0] <- acquired{conn: c}
		p.waiters = p.waiters[1:]
	}
}

func (p *pool) failLocked(err error) {
	for _, w := range p.waiters {
		w <- acquired{err: err}
	}
	p.waiters = nil
}

// release gives back the room that a request had.
func (p *pool) release(c *conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	c.load--
	p.serveLocked()
}

// remove takes out a connection that has ended by err, and returns the error of
// the requests that it owes.
func (p *pool) remove(c *conn, err error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.live = slices.DeleteFunc(p.live, func(l *conn) bool { return l == c })
	switch {
	case p.closed:
	case p.final:
		return p.loseLocked(err)
	case len(p.live) == 0:
		p.want = p.most
	case !c.useful:
		p.want = len(p.live) // so a server may say that it accepts no more
	}
	return err
}

// loseLocked ends all connections because one has ended by err, and returns the
// error of all requests from then on.
func (p *pool) loseLocked(err error) error {
	if p.lost == nil {
		p.lost = fmt.Errorf("%w: %w", ErrLost, err)
		p.failLocked(p.lost)
		for _, c := range p.live {
			c.fail(p.lost)
		}
	}
	return p.lost
}

// ended returns why there will be no connection any more, or nil.
func (p *pool) ended() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.endedLocked()
}

func (p *pool) endedLocked() error {
	if p.closed {
		return ErrClosed
	}
	return p.lost
}

// content makes do with the connections that there are, and reports
// whether there are any.
func (p *pool) content() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.live) == 0 {
		return false
	}
	p.want = len(p.live)
	return true
}

// all returns the connections that there are.
func (p *pool) all() []*conn {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.live)
}

// close ends the waiting, and returns the connections to be closed.
func (p *pool) close() []*conn {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	p.failLocked(ErrClosed)
	return slices.Clone(p.live)
}

// missing reports whether a connection is to be made: another one, or the only
// one if a request waits for it.
func (p *pool) missing() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || len(p.live) == 0 && len(p.waiters) == 0 {
		return false
	}
	return len(p.live) < p.want
}

// giveUp fails the requests that wait.
func (p *pool) giveUp(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.failLocked(err)
}

// acquire waits for a connection with room for a request.
func (c *Client) acquire(ctx context.Context) (*conn, error) {
	p := &c.pool
	p.mu.Lock()
	if err := p.endedLocked(); err != nil {
		p.mu.Unlock()
		return nil, err
	}
	if conn := p.roomLocked(); conn != nil {
		p.mu.Unlock()
		return conn, nil
	}
	got := make(chan acquired, 1)
	p.waiters = append(p.waiters, got)
	p.mu.Unlock()
	c.wake()
	select {
	case a := <-got:
		return a.conn, a.err
	case <-ctx.Done():
	}
	p.mu.Lock()
	p.waiters = slices.DeleteFunc(p.waiters, func(w chan<- acquired) bool { return w == got })
	p.mu.Unlock()
	select {
	case a := <-got: // it came in the meantime
		if a.conn != nil {
			p.release(a.conn)
		}
	default:
	}
	return nil, ctx.Err()
}

// wake makes keepConnected look for work.
func (c *Client) wake() {
	select {
	case c.kick <- struct{}{}:
	default:
	}
}

// adopt puts a connection to use.
func (c *Client) adopt(conn *conn) {
	p := &c.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.endedLocked(); err != nil {
		conn.fail(err)
		return
	}
	conn.completed = func() { p.release(conn) }
	p.live = append(p.live, conn)
	c.running.Go(func() {
		err := conn.receive()
		owed := p.remove(conn, err)
		if !errors.Is(err, ErrClosed) && !errors.Is(err, ErrLost) { // neither Close nor another one's end
			c.options.Log.Warn("connection to the NBD server lost", c.logAttrs(err)...)
		}
		conn.abandon(owed)
		c.wake()
	})
	p.serveLocked()
}

// connectAll makes the connections besides the first, for a client that makes
// none later. One that the server refuses is the last.
func (c *Client) connectAll(ctx context.Context) error {
	for range c.pool.most - 1 {
		conn, err := c.connectSame(ctx)
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, ErrChanged) {
				return err
			}
			c.options.Log.DebugContext(ctx, "no further connection to the NBD server", c.logAttrs(err)...)
			break
		}
		c.adopt(conn)
	}
	return c.pool.ended()
}

// connectSame makes a connection to what the first one found.
func (c *Client) connectSame(ctx context.Context) (*conn, error) {
	conn, err := c.connect(ctx)
	if err != nil {
		return nil, err
	}
	if err := c.export.same(conn.export); err != nil {
		conn.leave()
		return nil, err
	}
	return conn, nil
}

// keepConnected makes the connections that are missing, until ctx ends.
func (c *Client) keepConnected(ctx context.Context) {
	for {
		select {
		case <-c.kick:
			c.reconnect(ctx)
		case <-ctx.Done():
			return
		}
	}
}

// reconnect makes connections until none is missing. While there are others, a
// failure means that the server wants no more; without any, it tries for
// Options.RetryTime and then fails the requests that wait.
func (c *Client) reconnect(ctx context.Context) {
	p := &c.pool
	deadline := time.Now().Add(c.options.RetryTime)
	pause := 50 * time.Millisecond
	for p.missing() {
		trying, cancel := context.WithDeadlineCause(ctx, deadline, ErrTimeout)
		conn, err := c.connectSame(trying)
		cancel()
		switch {
		case err == nil:
			c.adopt(conn)
		case p.content():
			c.options.Log.DebugContext(ctx, "no further connection to the NBD server", c.logAttrs(err)...)
		case errors.Is(err, ErrChanged), !time.Now().Add(pause).Before(deadline):
			p.giveUp(fmt.Errorf("cannot connect again: %w", err))
			return
		default:
			sleep(ctx, pause)
			pause = min(2*pause, 5*time.Second)
		}
	}
}

func (c *Client) logAttrs(err error) []any {
	return []any{slog.String("address", c.options.Address), slog.String("export", c.options.Export), slog.Any("error", err)}
}

// watch ends connections that have not answered in time.
func (c *Client) watch(ctx context.Context) {
	tick := time.NewTicker(max(c.options.Timeout/8, time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case now := <-tick.C:
			for _, conn := range c.pool.all() {
				if conn.overdue(now, c.options.Timeout) {
					conn.fail(fmt.Errorf("%w: for %v", ErrTimeout, c.options.Timeout))
				}
			}
		case <-ctx.Done():
			return
		}
	}
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
