package imgfile

import (
	"container/list"
	"sync"
)

// LRU keeps the values that were asked for last, for parts of an image that
// are dear to make: tables of entries, decompressed clusters. Values are shared
// by all who asked for them and must not be written to. It may be used from
// many goroutines at once.
type LRU[K comparable, V any] struct {
	capacity int // in values

	mu      sync.Mutex // guards what follows
	values  map[K]*list.Element
	recency list.List // of *value[K, V], the latest first
}

type value[K comparable, V any] struct {
	key  K
	load sync.Once
	v    V
	err  error
}

// NewLRU returns an empty cache for that many values, at least one.
func NewLRU[K comparable, V any](capacity int) *LRU[K, V] {
	return &LRU[K, V]{capacity: capacity, values: make(map[K]*list.Element)}
}

// Get returns the value of a key. One caller loads it, others that want it
// meanwhile wait. A value that fails to load is not kept.
func (c *LRU[K, V]) Get(key K, load func() (V, error)) (V, error) {
	e := c.value(key)
	e.load.Do(func() { e.v, e.err = load() })
	if e.err != nil {
		c.drop(e)
	}
	return e.v, e.err
}

func (c *LRU[K, V]) value(key K) *value[K, V] {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e, ok := c.values[key]; ok {
		c.recency.MoveToFront(e)
		return e.Value.(*value[K, V])
	}
	if c.recency.Len() >= c.capacity {
		oldest := c.recency.Remove(c.recency.Back()).(*value[K, V])
		delete(c.values, oldest.key)
	}
	e := &value[K, V]{key: key}
	c.values[key] = c.recency.PushFront(e)
	return e
}

func (c *LRU[K, V]) drop(failed *value[K, V]) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e, ok := c.values[failed.key]; ok && e.Value.(*value[K, V]) == failed {
		c.recency.Remove(e)
		delete(c.values, failed.key)
	}
}
