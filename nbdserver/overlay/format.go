package overlay

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"github.com/holdfast-backup/holdfast/image"
)

const (
	magic   = "HOLDOVL\n"
	version = 1

	// MaxMeta is the most bytes of meta that an overlay keeps.
	MaxMeta = 4096

	blockSize    = 4096
	headerSize   = 512 // what is used of the first page
	sectorSize   = 512
	sectorBytes  = 496             // of states in a sector
	sectorStates = 4 * sectorBytes // in a sector
	pageSize     = 4096            // of map and directory
	pageSectors  = pageSize / sectorSize
	pageStates   = pageSectors * sectorStates
	metaStart    = pageSize
	dirStart     = 2 * pageSize
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// header is what the header and the meta hold.
type header struct {
	size, limit int64
	id          [16]byte
	meta        []byte
}

// encode returns the pages of the header and of the meta.
func (h *header) encode() []byte {
	b := make([]byte, dirStart)
	copy(b, magic)
	le := binary.LittleEndian
	le.PutUint32(b[8:], version)
	le.PutUint32(b[12:], blockSize)
	le.PutUint64(b[16:], uint64(h.size))
	le.PutUint64(b[24:], uint64(h.limit))
	copy(b[32:], h.id[:])
	le.PutUint32(b[48:], uint32(len(h.meta)))
	le.PutUint32(b[52:], crc32.Checksum(h.meta, castagnoli))
	le.PutUint32(b[headerSize-4:], crc32.Checksum(b[:headerSize-4], castagnoli))
	copy(b[metaStart:], h.meta)
	return b
}

// decodeHeader is the reverse of encode. Errors are [image.ErrNotImage],
// [image.ErrUnsupported] for another version and [image.ErrCorrupt].
func decodeHeader(b []byte) (*header, error) {
	if len(b) < dirStart || string(b[:len(magic)]) != magic {
		return nil, fmt.Errorf("%w: not an overlay", image.ErrNotImage)
	}
	le := binary.LittleEndian
	if v := le.Uint32(b[8:]); v != version {
		return nil, fmt.Errorf("%w: version %d of overlays, want %d", image.ErrUnsupported, v, version)
	}
	if le.Uint32(b[headerSize-4:]) != crc32.Checksum(b[:headerSize-4], castagnoli) {
		return nil, fmt.Errorf("%w: checksum of the overlay's header", image.ErrCorrupt)
	}
	size, limit, n := le.Uint64(b[16:]), le.Uint64(b[24:]), le.Uint32(b[48:])
	if le.Uint32(b[12:]) != blockSize || size > uint64(image.MaxSize) || limit > 1<<62 || n > MaxMeta {
		return nil, fmt.Errorf("%w: values of the overlay's header", image.ErrCorrupt)
	}
	h := &header{size: int64(size), limit: int64(limit), meta: b[metaStart : metaStart+int(n)]}
	copy(h.id[:], b[32:])
	if crc32.Checksum(h.meta, castagnoli) != le.Uint32(b[52:]) {
		return nil, fmt.Errorf("%w: checksum of the overlay's meta", image.ErrCorrupt)
	}
	return h, nil
}

// layout says where the regions of a file are.
type layout struct {
	blocks, pages, dirPages int64
}

func newLayout(size int64) layout {
	l := layout{blocks: divUp(size, blockSize)}
	l.pages = divUp(l.blocks, pageStates)
	l.dirPages = divUp(l.pages, pageStates)
	return l
}

func (l layout) dirPage(i int64) int64 { return dirStart + i*pageSize }
func (l layout) mapPage(i int64) int64 { return l.dirPage(l.dirPages) + i*pageSize }
func (l layout) block(i int64) int64   { return l.mapPage(l.pages) + i*blockSize }

// end returns the length of the file.
func (l layout) end() int64 { return l.block(l.blocks) }

func divUp(n, by int64) int64 { return (n + by - 1) / by }

// states are those of a page of the map or of the directory, as on disk.
type states [pageSectors * sectorBytes]byte

// encodePage returns a page as it is at an offset of the file. The bad sectors
// are made ones that do not decode, so that they stay bad.
func encodePage(s *states, bad uint8, id [16]byte, off int64) []byte {
	b := make([]byte, pageSize)
	for i := range pageSectors {
		encodeSector(b[i*sectorSize:][:sectorSize], s[i*sectorBytes:][:sectorBytes], id, off+int64(i)*sectorSize)
		if bad&(1<<i) != 0 {
			b[i*sectorSize] ^= 0xff
		}
	}
	return b
}

func encodeSector(b, s []byte, id [16]byte, off int64) {
	copy(b[4:8], id[:])
	binary.LittleEndian.PutUint64(b[8:], uint64(off))
	copy(b[16:], s)
	binary.LittleEndian.PutUint32(b, crc32.Checksum(b[4:], castagnoli))
}

// decodePage is the reverse of encodePage: it fills s and returns the sectors
// that are bad, as bits; their states are left as they are.
func decodePage(s *states, b []byte, id [16]byte, off int64) (bad uint8) {
	for i := range pageSectors {
		sector := b[i*sectorSize:][:sectorSize]
		if !validSector(sector, id, off+int64(i)*sectorSize) {
			bad |= 1 << i
			continue
		}
		copy(s[i*sectorBytes:], sector[16:])
	}
	return bad
}

func validSector(b []byte, id [16]byte, off int64) bool {
	if binary.LittleEndian.Uint32(b) != crc32.Checksum(b[4:], castagnoli) ||
		string(b[4:8]) != string(id[:4]) || binary.LittleEndian.Uint64(b[8:]) != uint64(off) {
		return false
	}
	for _, four := range b[16:] {
		if four&(four>>1)&0x55 != 0 { // a state of 3
			return false
		}
	}
	return true
}
