package vmdk

import (
	"encoding/binary"
	"fmt"
	"math/bits"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/internal/imgfile"
)

const (
	tableEntries = 512
	tableBytes   = tableEntries * 4

	// Grain sizes that are read. The specification asks for a power of two of
	// 8 sectors or more; the limit bounds the memory of an inflated grain to 4 MiB.
	minGrainSectors = 8
	maxGrainSectors = 8192

	flagNewlines   = 1 << 0  // newlines is valid
	flagRedundant  = 1 << 1  // there is a second copy of directory and tables
	flagZeroGrains = 1 << 2  // table entry 1 is a grain of zeros
	flagCompressed = 1 << 16 // grains are compressed
	flagMarkers    = 1 << 17 // grains and metadata have markers

	directoryAtEnd = 1<<64 - 1 // Directory of a stream: the footer knows
	deflate        = 1         // Compression

	entryZero = 1 // table entry of a grain of zeros, with flagZeroGrains
)

// newlines shows damage by a transfer as text.
var newlines = [4]byte{'\n', ' ', '\r', '\n'}

// header is the first sector of a sparse extent, and the footer of a
// stream-optimized one. Places and sizes are in sectors.
//
// Source: Virtual Disk Format 5.0, "Hosted Sparse Extent Header".
type header struct {
	Magic              [4]byte
	Version            uint32 // 1; 2 with flagZeroGrains; 3 for streams and changed block tracking
	Flags              uint32
	Capacity           uint64
	Grain              uint64
	Descriptor         uint64 // 0 if there is none
	DescriptorLen      uint64
	TableEntries       uint32
	RedundantDirectory uint64
	Directory          uint64
	Overhead           uint64 // metadata before the first grain
	Unclean            uint8
	Newlines           [4]byte
	Compression        uint16
	_                  [433]byte
}

// readHeader reads a sparse extent's header, or its footer where the header
// leaves the directory's place to it.
func readHeader(f imgfile.File) (header, error) {
	h, err := readHeaderAt(f, 0)
	if err != nil || h.Directory != directoryAtEnd {
		return h, err
	}
	// The end is three sectors: footer marker, footer, end-of-stream marker.
	end := make([]byte, 3*sectorSize)
	start := f.Size - int64(len(end))
	if f.Size%sectorSize != 0 || start < sectorSize {
		return h, fmt.Errorf("%w: stream ends without a footer", image.ErrCorrupt)
	}
	if err := imgfile.ReadFull(f.File, end, start); err != nil {
		return h, err
	}
	var footer, eos marker
	footer.decode(end)
	eos.decode(end[2*sectorSize:])
	if footer.size != 0 || footer.kind != markerFooter || eos != (marker{}) {
		return h, fmt.Errorf("%w: stream ends without a footer", image.ErrCorrupt)
	}
	return readHeaderAt(f, start+sectorSize)
}

func readHeaderAt(f imgfile.File, off int64) (header, error) {
	var h header
	sector := make([]byte, sectorSize)
	if err := imgfile.ReadFull(f.File, sector, off); err != nil {
		return h, err
	}
	if _, err := binary.Decode(sector, binary.LittleEndian, &h); err != nil {
		panic("vmdk: internal error: " + err.Error())
	}
	return h, h.check()
}

// check refuses headers that contradict themselves or need what is not read.
func (h header) check() error {
	const known = flagNewlines | flagRedundant | flagZeroGrains | flagCompressed | flagMarkers
	compressed := h.Flags&flagCompressed != 0
	switch {
	case string(h.Magic[:]) != sparseMagic:
		return fmt.Errorf("%w: sparse extent without its magic", image.ErrCorrupt)
	case h.Version < 1 || h.Version > 3:
		return fmt.Errorf("%w: version %d", image.ErrUnsupported, h.Version)
	case h.Flags&^uint32(known) != 0:
		return fmt.Errorf("%w: flags %#x", image.ErrUnsupported, h.Flags)
	case h.Flags&flagNewlines != 0 && h.Newlines != newlines:
		return fmt.Errorf("%w: the file was transferred as text", image.ErrCorrupt)
	case compressed != (h.Compression == deflate) || h.Compression > deflate:
		return fmt.Errorf("%w: compression %d with flags %#x", image.ErrUnsupported, h.Compression, h.Flags)
	case compressed != (h.Flags&flagMarkers != 0):
		return fmt.Errorf("%w: markers and compression not together, flags %#x", image.ErrUnsupported, h.Flags)
	case h.Capacity > uint64(image.MaxSize/sectorSize):
		return fmt.Errorf("%w: capacity of %d sectors", image.ErrUnsupported, h.Capacity)
	case bits.OnesCount64(h.Grain) != 1 || h.Grain < minGrainSectors || h.Grain > maxGrainSectors:
		return fmt.Errorf("%w: grain of %d sectors", image.ErrUnsupported, h.Grain)
	case h.TableEntries != tableEntries:
		return fmt.Errorf("%w: grain tables of %d entries", image.ErrUnsupported, h.TableEntries)
	}
	return nil
}

// tables returns the number of grain tables, which is the length of the directory.
func (h header) tables() int64 {
	covered := h.Grain * tableEntries
	return int64((h.Capacity + covered - 1) / covered)
}

// Kinds of metadata markers.
const (
	markerEnd       = 0
	markerTable     = 1
	markerDirectory = 2
	markerFooter    = 3
)

const grainMarkerLen = 12 // value and size; the data follows at once

// marker stands before everything in a stream. For a grain, value is its first
// sector on the disk and size the length of its data. For metadata, size is 0,
// value the metadata's length in sectors and kind what it is.
//
// Source: Virtual Disk Format 5.0, "Stream-Optimized Compressed Sparse Extents".
type marker struct {
	value uint64
	size  uint32
	kind  uint32
}

func (m *marker) decode(p []byte) {
	m.value = binary.LittleEndian.Uint64(p)
	m.size = binary.LittleEndian.Uint32(p[8:])
	m.kind = binary.LittleEndian.Uint32(p[12:])
}

func (m marker) encode(p []byte) {
	binary.LittleEndian.PutUint64(p, m.value)
	binary.LittleEndian.PutUint32(p[8:], m.size)
	binary.LittleEndian.PutUint32(p[12:], m.kind)
}
