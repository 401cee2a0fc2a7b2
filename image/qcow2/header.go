package qcow2

import (
	"encoding/binary"
	"fmt"
	"os"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/internal/imgfile"
)

// Offsets of the header's fields. Version 2 ends before the incompatible
// features; the compression type is there if the header's length says so.
const (
	atVersion          = 4
	atBackingOffset    = 8
	atBackingLength    = 16
	atClusterBits      = 20
	atSize             = 24
	atEncryption       = 32
	atL1Entries        = 36
	atL1Offset         = 40
	atRefcountTable    = 48
	atRefcountClusters = 56 // length of the reference count table, in clusters
	lengthV2           = 72
	atIncompatible     = 72
	atRefcountOrder    = 96
	atHeaderLength     = 100
	lengthV3           = 104
	atCompression      = 104
)

// Incompatible features: a reader that does not know one must not read on.
const (
	featureDirty = 1 << iota
	featureCorrupt
	featureDataFile
	featureCompression
	featureExtendedL2
	knownFeatures = 1<<iota - 1
)

const (
	extensionEnd           = 0
	extensionBackingFormat = 0xe2792aca
	maxBackingName         = 1023
)

var order = binary.BigEndian

// header is what a reader needs of the first cluster, checked against the
// limits, the file's size and itself.
type header struct {
	name          string // of the image file, for messages and the backing file's path
	version       uint32
	size          int64 // of the disk, in bytes
	clusterBits   int
	l1Offset      int64
	l1Entries     int64 // that a disk of this size needs; the table may have more
	extendedL2    bool
	zstd          bool
	backingName   string // "": none
	backingFormat string // "": not said
}

func (h *header) clusterSize() int64 { return 1 << h.clusterBits }

// tableSpan returns how many bytes of the disk one L2 table describes.
func (h *header) tableSpan() int64 { return h.clusterSize() / h.entrySize() << h.clusterBits }

// entrySize returns the size of an L2 entry in bytes.
func (h *header) entrySize() int64 {
	if h.extendedL2 {
		return 16
	}
	return 8
}

func (h *header) corrupt(format string, args ...any) error {
	return fmt.Errorf("%w: %s: %s", image.ErrCorrupt, h.name, fmt.Sprintf(format, args...))
}

func (h *header) unsupported(format string, args ...any) error {
	return fmt.Errorf("%w: %s %s", image.ErrUnsupported, h.name, fmt.Sprintf(format, args...))
}

// readHeader reads and checks the first cluster of a file of the given size.
func readHeader(f *os.File, fileSize int64) (header, error) {
	h := header{name: f.Name()}
	head := make([]byte, min(lengthV2, fileSize))
	if err := imgfile.ReadFull(f, head, 0); err != nil {
		return h, fmt.Errorf("read the header of %s: %w", h.name, err)
	}
	if !Match(head) {
		return h, fmt.Errorf("%w: %s does not begin like a qcow2 image", image.ErrNotImage, h.name)
	}
	if len(head) < lengthV2 {
		return h, h.corrupt("the file ends inside the header")
	}
	h.version = order.Uint32(head[atVersion:])
	if h.version != 2 && h.version != 3 {
		return h, h.unsupported("is of qcow version %d; 2 and 3 are read", h.version)
	}
	bits := order.Uint32(head[atClusterBits:])
	if bits < minClusterBits || bits > maxClusterBits {
		return h, h.corrupt("clusters of 2^%d bytes; 2^%d to 2^%d are allowed", bits, minClusterBits, maxClusterBits)
	}
	h.clusterBits = int(bits)

	first := make([]byte, min(h.clusterSize(), fileSize))
	if err := imgfile.ReadFull(f, first, 0); err != nil {
		return h, fmt.Errorf("read the header of %s: %w", h.name, err)
	}
	if err := h.parseEncryption(first); err != nil {
		return h, err
	}
	length, err := h.parseV3(first)
	if err != nil {
		return h, err
	}
	if err := h.parseL1(first, fileSize); err != nil {
		return h, err
	}
	return h, h.parseBacking(first, length)
}

func (h *header) parseEncryption(first []byte) error {
	switch method := order.Uint32(first[atEncryption:]); method {
	case 0:
		return nil
	case 1:
		return h.unsupported("is encrypted (legacy AES)")
	case 2:
		return h.unsupported("is encrypted (LUKS)")
	default:
		return h.unsupported("is encrypted (unknown method %d)", method)
	}
}

// parseV3 reads the fields that version 3 added and returns the header's
// length, after which the extensions begin.
func (h *header) parseV3(first []byte) (length int64, err error) {
	if h.version == 2 {
		return lengthV2, nil
	}
	if len(first) < lengthV3 {
		return 0, h.corrupt("the file ends inside the header")
	}
	length = int64(order.Uint32(first[atHeaderLength:]))
	if length < lengthV3 || length > int64(len(first)) {
		return 0, h.corrupt("a header of %d bytes", length)
	}
	compression := byte(0)
	if length > atCompression {
		compression = first[atCompression]
	}
	features := order.Uint64(first[atIncompatible:])
	h.extendedL2 = features&featureExtendedL2 != 0
	h.zstd = compression == 1
	switch {
	case features&^knownFeatures != 0:
		return 0, h.unsupported("uses unknown features (bits %#x)", features&^knownFeatures)
	case features&featureCorrupt != 0:
		return 0, h.corrupt("marked as corrupt; repair it with `qemu-img check -r all` first")
	case features&featureDirty != 0:
		return 0, h.unsupported("was not closed cleanly; run `qemu-img check -r all` on it first")
	case features&featureDataFile != 0:
		return 0, h.unsupported("keeps its data in an external data file")
	case compression > 1:
		return 0, h.unsupported("uses the unknown compression type %d", compression)
	case h.zstd != (features&featureCompression != 0):
		return 0, h.corrupt("compression type %d contradicts the feature bits %#x", compression, features)
	case h.extendedL2 && h.clusterBits < 14:
		return 0, h.corrupt("extended L2 entries with clusters of 2^%d bytes; 2^14 is the least", h.clusterBits)
	}
	return length, nil
}

// parseL1 reads the disk's size and the place of the L1 table.
func (h *header) parseL1(first []byte, fileSize int64) error {
	size := order.Uint64(first[atSize:])
	if size > uint64(image.MaxSize) {
		return h.unsupported("has a disk of %d bytes; %d is the limit", size, image.MaxSize)
	}
	h.size = int64(size)
	h.l1Entries = (h.size + h.tableSpan() - 1) / h.tableSpan()
	entries := int64(order.Uint32(first[atL1Entries:]))
	offset := order.Uint64(first[atL1Offset:])
	switch {
	case entries < h.l1Entries:
		return h.corrupt("an L1 table of %d entries; a disk of %d bytes needs %d", entries, size, h.l1Entries)
	case entries > maxL1Bytes/8:
		return h.unsupported("has an L1 table of %d entries; %d is the limit", entries, maxL1Bytes/8)
	case entries == 0:
		return nil
	case offset == 0 || offset%uint64(h.clusterSize()) != 0:
		return h.corrupt("an L1 table at offset %d", offset)
	case offset > uint64(fileSize) || 8*entries > fileSize-int64(offset):
		return h.corrupt("the L1 table (offset %d, %d entries) lies beyond the end of the file", offset, entries)
	}
	h.l1Offset = int64(offset)
	return nil
}

// parseBacking reads the name of the backing file and, from the header's
// extensions, its format. Extensions end where the name begins.
func (h *header) parseBacking(first []byte, length int64) error {
	offset := order.Uint64(first[atBackingOffset:])
	size := order.Uint32(first[atBackingLength:])
	if offset == 0 || size == 0 {
		return nil
	}
	if offset < uint64(length) || offset > uint64(len(first)) || size > maxBackingName || uint64(size) > uint64(len(first))-offset {
		return h.corrupt("a backing file name of %d bytes at offset %d", size, offset)
	}
	h.backingName = string(first[offset:][:size])

	for rest := first[length:offset]; len(rest) >= 8; {
		kind, size := order.Uint32(rest), order.Uint32(rest[4:])
		rest = rest[8:]
		if kind == extensionEnd {
			break
		}
		if uint64(size) > uint64(len(rest)) {
			return h.corrupt("a header extension of %d bytes", size)
		}
		if kind == extensionBackingFormat {
			h.backingFormat = string(rest[:size])
		}
		padded := (uint64(size) + 7) &^ 7
		rest = rest[min(padded, uint64(len(rest))):]
	}
	return nil
}
