package vmdk

import (
	"hash/maphash"
	"sync/atomic"
)

// caches are shared by all extents of an image.
type caches struct {
	tables *cache[[]uint32] // pieces of directories, and tables: 2 KiB each
	grains *cache[[]byte]   // inflated grains
}

func newCaches() caches {
	return caches{newCache[[]uint32](2048), newCache[[]byte](16)}
}

// cache keeps what was read last, in a fixed number of slots: a new value
// takes the place of whatever was in its slot. It needs no lock, and values
// are immutable once in it.
type cache[T any] struct {
	seed  maphash.Seed
	slots []atomic.Pointer[cached[T]]
}

type cached[T any] struct {
	key   cacheKey
	value T
}

type cacheKey struct {
	s   *sparse
	off int64 // of entries in the file, of a grain on the disk
	n   int64 // entries or bytes
}

func newCache[T any](slots int) *cache[T] {
	return &cache[T]{maphash.MakeSeed(), make([]atomic.Pointer[cached[T]], slots)}
}

// get returns the value of key, from load if the cache does not have it.
// Several goroutines may load the same value at once.
func (c *cache[T]) get(key cacheKey, load func() (T, error)) (T, error) {
	slot := &c.slots[maphash.Comparable(c.seed, key)%uint64(len(c.slots))]
	if e := slot.Load(); e != nil && e.key == key {
		return e.value, nil
	}
	value, err := load()
	if err == nil {
		slot.Store(&cached[T]{key, value})
	}
	return value, err
}
