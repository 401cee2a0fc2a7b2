package blockstore

import (
	"container/list"
	"sync"
)

// cache keeps map nodes, the least recently used going first.
// Readers that want the same one at the same time share one load.
type cache struct {
	mu    sync.Mutex
	limit int64 // bytes
	size  int64
	items map[ID]*list.Element // of *cached
	used  *list.List           // most recently used first
}

type cached struct {
	id    ID
	ready chan struct{}
	data  []byte // valid, as err, once ready is closed
	err   error

	counted bool // in cache.size; guarded by cache.mu
}

func newCache(limit int64) *cache {
	return &cache{limit: limit, items: map[ID]*list.Element{}, used: list.New()}
}

// get returns the bytes for an id, which must not be changed, loading them if
// need be. A failed load is not kept.
func (c *cache) get(id ID, load func() ([]byte, error)) ([]byte, error) {
	c.mu.Lock()
	if e, ok := c.items[id]; ok {
		c.used.MoveToFront(e)
		c.mu.Unlock()
		item := e.Value.(*cached)
		<-item.ready
		return item.data, item.err
	}
	item := &cached{id: id, ready: make(chan struct{})}
	e := c.used.PushFront(item)
	c.items[id] = e
	c.mu.Unlock()

	item.data, item.err = load()
	close(item.ready)

	c.mu.Lock()
	defer c.mu.Unlock()
	if c.items[id] != e {
		return item.data, item.err // dropped while it was loading
	}
	if item.err != nil {
		c.removeLocked(e)
		return nil, item.err
	}
	c.size += int64(len(item.data))
	item.counted = true
	for back := c.used.Back(); c.size > c.limit && back != nil; {
		previous := back.Prev()
		if back.Value.(*cached).counted { // not one that is still loading
			c.removeLocked(back)
		}
		back = previous
	}
	return item.data, nil
}

// drop forgets an id.
func (c *cache) drop(id ID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e, ok := c.items[id]; ok {
		c.removeLocked(e)
	}
}

func (c *cache) removeLocked(e *list.Element) {
	item := e.Value.(*cached)
	if item.counted {
		c.size -= int64(len(item.data))
	}
	c.used.Remove(e)
	delete(c.items, item.id)
}
