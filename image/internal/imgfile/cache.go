package imgfile

import (
	"io"
	"os"
	"sync/atomic"
)

// Size of a cache's memory: 1,024 pages of 4 KiB, 4 MiB an image.
const (
	cachePage     = 4 << 10
	cacheSlotBits = 10
)

// Cache reads a file and remembers pages read before, in at most 4 MiB. It
// is for the tables of an image that nobody changes: an entry costs no system
// call where its neighbours were read before. It may be used from many
// goroutines at once, and needs no lock for that.
type Cache struct {
	f     *os.File
	slots [1 << cacheSlotBits]atomic.Pointer[cached] // a page has one slot, which it takes from another
}

// cached is a page, which never changes.
type cached struct {
	number int64
	bytes  []byte // the file's last page is shorter
}

// NewCache returns an empty cache over f, which stays the caller's.
func NewCache(f *os.File) *Cache { return &Cache{f: f} }

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
	// Tables are often read at equal distances; multiplying spreads them over
	// the slots (Fibonacci hashing).
	slot := &c.slots[uint64(number)*0x9e3779b97f4a7c15>>(64-cacheSlotBits)]
	if p := slot.Load(); p != nil && p.number == number {
		return p.bytes, nil
	}
	b := make([]byte, cachePage)
	n, err := c.f.ReadAt(b, number*cachePage)
	if err != nil && err != io.EOF {
		return nil, err
	}
	slot.Store(&cached{number, b[:n]})
	return b[:n], nil
}
