package overlay

import "io"

// WithRandom makes ids of what r has.
func WithRandom(o Options, r io.Reader) Options {
	o.random = r
	return o
}

// DecodeHeader decodes the header and the meta, and returns how they are encoded
// again.
func DecodeHeader(b []byte) ([]byte, error) {
	h, err := decodeHeader(b)
	if err != nil {
		return nil, err
	}
	return h.encode(), nil
}

// DecodePage decodes a page of the map, and returns how it is encoded again and
// which sectors are bad.
func DecodePage(b []byte, id [16]byte, off int64) ([]byte, uint8) {
	var s states
	bad := decodePage(&s, b, id, off)
	return encodePage(&s, bad, id, off), bad
}

// EncodePage encodes states of the map, 496 bytes a sector.
func EncodePage(b []byte, id [16]byte, off int64) []byte {
	var s states
	copy(s[:], b)
	return encodePage(&s, 0, id, off)
}

// Places returns where the directory, the map and the data begin in the file of a disk.
func Places(size int64) (dir, pages, data int64) {
	l := newLayout(size)
	return l.dirPage(0), l.mapPage(0), l.block(0)
}
