package blockstore

import "slices"

// marks is a set of records: a bitmap for every segment that it touches, one
// bit a record.
type marks map[uint64][]uint64

// set adds a record and reports whether it was new.
func (m marks) set(loc location) bool {
	words := m[loc.Segment]
	word, bit := int(loc.Ordinal/64), uint64(1)<<(loc.Ordinal%64)
	if word >= len(words) {
		words = append(words, make([]uint64, word+1-len(words))...)
		m[loc.Segment] = words
	}
	if words[word]&bit != 0 {
		return false
	}
	words[word] |= bit
	return true
}

// clear takes a record out.
func (m marks) clear(loc location) {
	if m.has(loc.Segment, loc.Ordinal) {
		m[loc.Segment][loc.Ordinal/64] &^= 1 << (loc.Ordinal % 64)
	}
}

func (m marks) has(segment uint64, ordinal uint32) bool {
	words := m[segment]
	word := int(ordinal / 64)
	return word < len(words) && words[word]&(1<<(ordinal%64)) != 0
}

// merge adds all records of other.
func (m marks) merge(other marks) {
	for segment, words := range other {
		mine := m[segment]
		if len(mine) < len(words) {
			mine = append(mine, make([]uint64, len(words)-len(mine))...)
			m[segment] = mine
		}
		for i, w := range words {
			mine[i] |= w
		}
	}
}

// walkedNodes are the nodes that a walk over trees has been at, by level: of two points
// that disagree about a node's level, which only a foreign or damaged point does, neither
// hides from the other what is below.
type walkedNodes map[int]marks

// add adds a node and reports whether it was new.
func (w walkedNodes) add(level int, loc location) bool {
	m := w[level]
	if m == nil {
		m = marks{}
		w[level] = m
	}
	return m.set(loc)
}

func sortByNumber(segments []*segment) {
	slices.SortFunc(segments, func(a, b *segment) int {
		if a.number < b.number {
			return -1
		}
		return 1
	})
}
