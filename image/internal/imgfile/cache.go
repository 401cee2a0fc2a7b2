package imgfile

import (
	"io"
	"os"
	"sync"
)

// Size of a cache's memory: 1,024 pages of 4 KiB, 4 MiB an image.
const (
	cachePage  = 4 << 10
	cachePages = 1 << 10
)

// Cache reads a file and remembers the pages read last, in at most 4 MiB. It
// is for the tables of an image that nobody changes: an entry costs no system
// call where its neighbours were read before. It may be used from many
// goroutines at once.
type Cache struct {
	f *os.File

	mu    sync.RWMutex
	pages map[int64][]byte // by number; a page's bytes never change; the file's last page is shorter
}

// NewCache returns an empty cache over f, which stays the caller's.
func NewCache(f *os.File) *Cache {
	return &Cache{f: f, pages: map[int64][]byte{}}
}

// ReadFull reads like the function of that name.
func (c *Cache) ReadFull(p []byte, off int64) error {
	for len(p) > 0 {
		b, err := c.page(off / cachePage)
		if err != nil {
			return err
		}
		skip := off % cachePage
		if skip >= int64(len(b)) {
			return ReadFull(c.f, p, off) // past the end: it has the words for it
		}
		n := copy(p, b[skip:])
		p, off = p[n:], off+int64(n)
	}
	return nil
}

func (c *Cache) page(number int64) ([]byte, error) {
	c.mu.RLock()
	b, ok := c.pages[number]
	c.mu.RUnlock()
	if ok {
		return b, nil
	}
	b = make([]byte, cachePage)
	n, err := c.f.ReadAt(b, number*cachePage)
	if err != nil && err != io.EOF {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.pages) >= cachePages {
		for victim := range c.pages { // any one: the map's order is random
			delete(c.pages, victim)
			break
		}
	}
	c.pages[number] = b[:n]
	return b[:n], nil
}
