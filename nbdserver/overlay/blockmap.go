package overlay

import (
	"encoding/binary"
	"fmt"
	"math/bits"

	"github.com/holdfast-backup/holdfast/image"
)

// state says where a block is read from.
type state uint8

// As on disk. In the directory a page that is mixed has the state data.
const (
	base state = iota
	data
	zero
)

// repeated is a byte of four equal states.
func (s state) repeated() byte { return byte(s) * 0x55 }

// page is the map of 62 MiB of the disk.
type page struct {
	states
	bad   uint8 // sectors that could not be read
	dirty bool  // differs from what is on disk
}

func (p *page) at(i int64) state { return state(p.states[i/4]>>(i%4*2)) & 3 }

// run returns how many of the states from i up to end are equal. Bad sectors are an
// error.
func (p *page) run(i, end int64) (state, int64, error) {
	if p.bad != 0 {
		sector := i / sectorStates
		if p.bad&(1<<sector) != 0 {
			return 0, 0, fmt.Errorf("%w: checksum of an overlay's map", image.ErrCorrupt)
		}
		end = min(end, (sector+1)*sectorStates)
	}
	s := p.at(i)
	word := uint64(s.repeated()) * 0x0101010101010101
	j := i + 1
	for j < end {
		if j%32 == 0 && j+32 <= end && binary.LittleEndian.Uint64(p.states[j/4:]) == word {
			j += 32
			continue
		}
		if p.at(j) != s {
			break
		}
		j++
	}
	return s, j - i, nil
}

func (p *page) set(i, end int64, s state) {
	for i < end {
		if i%4 == 0 && i+4 <= end {
			p.states[i/4] = s.repeated()
			i += 4
			continue
		}
		shift := i % 4 * 2
		p.states[i/4] = p.states[i/4]&^(3<<shift) | byte(s)<<shift
		i++
	}
}

// blockMap has the state of every block. Its user locks it.
type blockMap struct {
	layout
	// table has nil for a page of which all blocks are base, and allZero for one
	// of which all are zero.
	table   []*page
	allZero *page
	rotten  *page // what a bad sector of the directory told of

	dirtyPages []int64        // those of table that are dirty; may have others, and some twice
	dirtyDir   map[int64]bool // directory pages that differ from what is on disk
}

func newBlockMap(l layout) *blockMap {
	m := &blockMap{layout: l, table: make([]*page, l.pages), allZero: &page{}, rotten: &page{bad: 0xff}, dirtyDir: map[int64]bool{}}
	m.allZero.set(0, pageStates, zero)
	return m
}

// uniform reports whether all blocks of a page are base or all are zero: it needs
// no page of the map.
func (m *blockMap) uniform(i int64) bool { return m.table[i] == nil || m.table[i] == m.allZero }

// run returns the state of block b and how many blocks from it up to end have the
// same.
func (m *blockMap) run(b, end int64) (s state, n int64, err error) {
	for at := b; at < end; {
		first := at / pageStates * pageStates
		last := min(end, first+pageStates)
		next, k := base, last-at
		if p := m.table[at/pageStates]; p == m.allZero {
			next = zero
		} else if p != nil {
			next, k, err = p.run(at-first, last-first)
		}
		if n > 0 && (err != nil || next != s) {
			return s, n, nil //nolint:nilerr // the bad sector comes after these
		}
		if err != nil {
			return 0, 0, err
		}
		s, n, at = next, n+k, at+k
		if at < last && m.table[at/pageStates].bad == 0 {
			break
		}
	}
	return s, n, nil
}

// survey is what a range of blocks looks like to one who wants to write to it.
type survey struct {
	fresh       int64 // blocks that are not data
	pages       int64 // pages of the map that have to be made
	first, last state // of the range's first and last block
}

func (m *blockMap) survey(first, end int64) (v survey, err error) {
	for at := first; at < end; {
		s, n, err := m.run(at, end)
		if err != nil {
			return v, err
		}
		if at == first {
			v.first = s
		}
		if s != data {
			v.fresh += n
		}
		v.last = s
		at += n
	}
	for i := first / pageStates; i*pageStates < end; i++ {
		if m.uniform(i) {
			v.pages++
		}
	}
	return v, nil
}

// newPage returns a page with the states that the blocks of a uniform one have.
func (m *blockMap) newPage(i int64) *page {
	p := &page{}
	if m.table[i] == m.allZero {
		p.set(0, min(pageStates, m.blocks-i*pageStates), zero)
	}
	return p
}

// give puts a page of newPage in its place.
func (m *blockMap) give(i int64, p *page) {
	m.table[i] = p
	m.dirtyDir[i/pageStates] = true
}

// set gives the blocks [first, end) a state. The range has no bad sectors.
func (m *blockMap) set(first, end int64, s state) {
	for first < end {
		i := first / pageStates
		from, to := first-i*pageStates, min(end-i*pageStates, pageStates)
		first = i*pageStates + to
		if s == zero && from == 0 && first == min((i+1)*pageStates, m.blocks) {
			if m.table[i] != m.allZero {
				m.table[i] = m.allZero
				m.dirtyDir[i/pageStates] = true
			}
			continue
		}
		if m.uniform(i) {
			m.give(i, m.newPage(i))
		}
		p := m.table[i]
		p.set(from, to, s)
		if !p.dirty {
			p.dirty = true
			m.dirtyPages = append(m.dirtyPages, i)
		}
	}
}

// count returns how many blocks are data; those of bad sectors are not counted.
func (m *blockMap) count() (n int64) {
	for i, p := range m.table {
		if m.uniform(int64(i)) {
			continue
		}
		for at := 0; at < len(p.states); at += 8 {
			// Of the three states data alone has the lower bit.
			n += int64(bits.OnesCount64(binary.LittleEndian.Uint64(p.states[at:]) & 0x5555555555555555))
		}
	}
	return n
}

// dirtyPage is a page of the map or of the directory to be written.
type dirtyPage struct {
	i   int64 // of the map or of the directory
	off int64 // in the file
	states
	bad uint8
}

// takeDirty returns what differs from the disk, which from then on counts as
// written. All that it returns is of one moment: the directory refers to no map page
// that is neither on disk nor returned.
func (m *blockMap) takeDirty() (pages, dir []dirtyPage) {
	for _, i := range m.dirtyPages {
		if p := m.table[i]; !m.uniform(i) && p.dirty {
			p.dirty = false
			pages = append(pages, dirtyPage{i, m.mapPage(i), p.states, p.bad})
		}
	}
	m.dirtyPages = nil
	for k := range m.dirtyDir {
		dir = append(dir, m.dirPageStates(k))
	}
	clear(m.dirtyDir)
	return pages, dir
}

// putBack undoes takeDirty, for pages that found no room.
func (m *blockMap) putBack(pages, dir []dirtyPage) {
	for _, d := range pages {
		if p := m.table[d.i]; !m.uniform(d.i) && !p.dirty {
			p.dirty = true
			m.dirtyPages = append(m.dirtyPages, d.i)
		}
	}
	for _, d := range dir {
		m.dirtyDir[d.i] = true
	}
}

func (m *blockMap) dirPageStates(k int64) dirtyPage {
	var d page
	first := k * pageStates
	for i := first; i < min(first+pageStates, m.pages); i++ {
		switch m.table[i] {
		case nil:
		case m.allZero:
			d.set(i-first, i-first+1, zero)
		case m.rotten:
			d.bad |= 1 << ((i - first) / sectorStates)
		default:
			d.set(i-first, i-first+1, data)
		}
	}
	return dirtyPage{k, m.dirPage(k), d.states, d.bad}
}
