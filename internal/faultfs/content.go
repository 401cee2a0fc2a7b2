package faultfs

import (
	"io/fs"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"time"
)

const sectorSize = 512

// bytes512 is what a sector holds. It is not changed once it is in a sector,
// which makes versions and copies cheap.
type bytes512 = *[sectorSize]byte // nil is a hole

// sector is one of a file's.
type sector struct {
	now bytes512
	// before is what a loss of power may bring back: every content since the
	// last Sync that worked, the durable one first.
	before []bytes512
	dirty  bool // the next Sync makes now durable
}

func (s *sector) set(b bytes512) {
	s.before = append(s.before, s.now)
	s.now, s.dirty = b, true
}

// content is what a file holds. The zero value is an empty file.
type content struct {
	length      int64
	lengths     []int64 // the lengths since the last Sync that worked, the durable one first
	lengthDirty bool
	sectors     map[int64]*sector // by offset / sectorSize; missing ones are holes
}

// stored returns the bytes of room that the file takes.
func (c *content) stored() int64 {
	var n int64
	for _, s := range c.sectors {
		if s.now != nil {
			n += sectorSize
		}
	}
	return n
}

func (c *content) has(i int64) bool { return c.sectors[i] != nil && c.sectors[i].now != nil }

func (c *content) setLength(length int64) {
	if length != c.length {
		c.lengths = append(c.lengths, c.length)
		c.length, c.lengthDirty = length, true
	}
}

func (c *content) read(p []byte, off int64) int {
	if off >= c.length {
		return 0
	}
	p = p[:min(int64(len(p)), c.length-off)]
	clear(p)
	for done := 0; done < len(p); {
		at := off + int64(done)
		n := min(len(p)-done, int(sectorSize-at%sectorSize))
		if c.has(at / sectorSize) {
			copy(p[done:done+n], c.sectors[at/sectorSize].now[at%sectorSize:])
		}
		done += n
	}
	return len(p)
}

// modify changes [off, off+length) sector by sector and returns by how many
// bytes the room grew. The function gets a sector's bytes to change, with the first
// and last to be changed and whether it is all; it returns false for a hole.
func (c *content) modify(off, length int64, f func(b bytes512, at int64, from, to int64) bool) (grown int64) {
	if c.sectors == nil {
		c.sectors = map[int64]*sector{}
	}
	for end := off + length; off < end; {
		i, from := off/sectorSize, off%sectorSize
		to := min(sectorSize, from+end-off)
		s := c.sectors[i]
		if s == nil {
			s = &sector{}
			c.sectors[i] = s
		}
		b := new([sectorSize]byte)
		if s.now != nil {
			*b = *s.now
			grown -= sectorSize
		}
		if f(b, off, from, to) {
			s.set(b)
			grown += sectorSize
		} else {
			s.set(nil)
		}
		off += to - from
	}
	return grown
}

func (c *content) write(p []byte, off int64) (grown int64) {
	if len(p) == 0 {
		return 0
	}
	c.setLength(max(c.length, off+int64(len(p))))
	return c.modify(off, int64(len(p)), func(b bytes512, at, from, to int64) bool {
		copy(b[from:to], p[at-off:])
		return true
	})
}

// punch makes a hole; sectors that it takes in part keep their room.
func (c *content) punch(off, length int64) (grown int64) {
	// Only what is there, lest a hole of a pebibyte make sectors.
	for _, i := range slices.Sorted(maps.Keys(c.sectors)) {
		from, to := max(off, i*sectorSize), min(off+length, (i+1)*sectorSize)
		if from >= to || c.sectors[i].now == nil {
			continue
		}
		grown += c.modify(from, to-from, func(b bytes512, _, from, to int64) bool {
			clear(b[from:to])
			return to-from < sectorSize
		})
	}
	return grown
}

func (c *content) truncate(size int64) (grown int64) {
	if size < c.length {
		grown = c.punch(size, c.length-size+sectorSize) // to the end of the last sector
	}
	c.setLength(size)
	return grown
}

func (c *content) sync() {
	for i, s := range c.sectors {
		if s.dirty {
			s.before, s.dirty = nil, false
		}
		if s.now == nil && len(s.before) == 0 {
			delete(c.sectors, i)
		}
	}
	if c.lengthDirty {
		c.lengths, c.lengthDirty = nil, false
	}
}

// dropDirty is a Sync that fails: what was dirty is not written by the next.
func (c *content) dropDirty() {
	for _, s := range c.sectors {
		s.dirty = false
	}
	c.lengthDirty = false
}

// dropCache decides what became of the bytes that a Sync failed to write: those of
// every other sector did reach the disk.
func (c *content) dropCache() (grown int64) {
	for i, s := range c.sectors {
		if s.dirty || len(s.before) == 0 {
			continue
		}
		before := s.before[0]
		s.before = nil
		if i%2 == 1 {
			continue
		}
		if s.now != nil {
			grown -= sectorSize
		}
		if before != nil {
			grown += sectorSize
		}
		s.now = before
	}
	return grown
}

// Loss is how much of what is not durable a loss of power takes: LoseAll,
// LoseNothing, or with any other value a part that the value is the seed of.
type Loss uint64

// The losses that are not left to chance.
const (
	LoseAll     Loss = 0
	LoseNothing Loss = 1<<64 - 1
)

// chooser picks what survives.
type chooser struct {
	loss Loss
	rng  *rand.Rand
	keep float64 // the share of changes that survive
}

// next sets the share for a file or for the names: little of one may be lost and
// much of another.
func (c *chooser) next() { c.keep = []float64{0, 0.1, 0.5, 0.9, 1}[c.rng.IntN(5)] }

// pick returns which of n versions survives: 0 is the durable one, n-1 the last.
func (c *chooser) pick(n int) int {
	switch {
	case c.loss == LoseAll:
		return 0
	case c.loss == LoseNothing || c.rng.Float64() < c.keep:
		return n - 1
	default:
		return c.rng.IntN(n - 1)
	}
}

// PowerLoss returns the file system as it would be found after a loss of power
// now. What it has is durable, its size is the same, and nothing fails in it.
func (f *FS) PowerLoss(loss Loss) *FS {
	f.mu.Lock()
	defer f.mu.Unlock()
	ch := &chooser{loss: loss, rng: rand.New(rand.NewPCG(uint64(loss), 0))}
	ch.next()
	names := maps.Clone(f.synced)
	for _, c := range f.pending {
		if ch.pick(2) == 1 {
			c.apply(names)
		}
	}
	after := &FS{names: map[string]*node{}, synced: map[string]*node{}, size: f.size, losses: f.losses + 1}
	copies := map[*node]*node{} // a file may be found under two names
	for _, name := range slices.Sorted(maps.Keys(names)) {
		n := names[name]
		parent := filepath.Dir(name)
		if parent != name && after.names[parent] == nil {
			continue
		}
		if copies[n] == nil {
			ch.next()
			copies[n] = &node{folder: n.folder, linked: true, immutable: n.immutable, content: n.afterLoss(ch)}
			after.used += copies[n].stored()
		}
		after.names[name], after.synced[name] = copies[n], copies[n]
	}
	return after
}

func (c *content) afterLoss(ch *chooser) content {
	after := content{sectors: map[int64]*sector{}}
	lengths := append(slices.Clone(c.lengths), c.length)
	after.length = c.length
	if len(lengths) > 1 {
		after.length = lengths[ch.pick(len(lengths))]
	}
	for _, i := range slices.Sorted(maps.Keys(c.sectors)) {
		s := c.sectors[i]
		b := s.now
		if len(s.before) > 0 {
			if k := ch.pick(len(s.before) + 1); k < len(s.before) {
				b = s.before[k]
			}
		}
		if b == nil || i*sectorSize >= after.length {
			continue
		}
		if cut := after.length - i*sectorSize; cut < sectorSize {
			part := *b
			clear(part[cut:])
			b = &part
		}
		after.sectors[i] = &sector{now: b}
	}
	return after
}

// entry is a file or folder in a listing.
type entry struct {
	name   string
	folder bool
	size   int64
}

func (e entry) Name() string               { return e.name }
func (e entry) IsDir() bool                { return e.folder }
func (e entry) Info() (fs.FileInfo, error) { return e, nil }
func (e entry) Type() fs.FileMode          { return e.Mode().Type() }
func (e entry) Size() int64                { return e.size }
func (e entry) ModTime() time.Time         { return time.Time{} }
func (e entry) Sys() any                   { return nil }
func (e entry) Mode() fs.FileMode {
	if e.folder {
		return fs.ModeDir | 0o700
	}
	return 0o600
}
