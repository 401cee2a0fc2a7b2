package qcow2

import (
	"container/list"
	"sync"
)

// cache keeps the most recently used blocks of a file. Blocks are shared by
// all who asked for them and must not be written to.
type cache struct {
	capacity int // in blocks

	mu      sync.Mutex // guards what follows
	blocks  map[uint64]*list.Element
	recency list.List // of *block, the latest first
}

type block struct {
	key  uint64
	load sync.Once
	data []byte
	err  error
}

func newCache(capacity int) *cache {
	return &cache{capacity: capacity, blocks: make(map[uint64]*list.Element)}
}

// get returns the block of that key. One caller loads it, others that want it
// meanwhile wait. A block that fails to load is not kept.
func (c *cache) get(key uint64, load func() ([]byte, error)) ([]byte, error) {
	b := c.block(key)
	b.load.Do(func() { b.data, b.err = load() })
	if b.err != nil {
		c.drop(b)
		return nil, b.err
	}
	return b.data, nil
}

func (c *cache) block(key uint64) *block {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e, ok := c.blocks[key]; ok {
		c.recency.MoveToFront(e)
		return e.Value.(*block)
	}
	if c.recency.Len() >= c.capacity {
		oldest := c.recency.Remove(c.recency.Back()).(*block)
		delete(c.blocks, oldest.key)
	}
	b := &block{key: key}
	c.blocks[key] = c.recency.PushFront(b)
	return b
}

func (c *cache) drop(b *block) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e, ok := c.blocks[b.key]; ok && e.Value.(*block) == b {
		c.recency.Remove(e)
		delete(c.blocks, b.key)
	}
}
