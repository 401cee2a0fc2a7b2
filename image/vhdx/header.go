package vhdx

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"slices"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/internal/imgfile"
)

// Places and sizes in the first MiB, and signatures.
// Source: [MS-VHDX] 2.2.
const (
	header1At     = 64 << 10
	header2At     = 128 << 10
	regions1At    = 192 << 10
	regions2At    = 256 << 10
	headerSize    = 4 << 10
	regionsSize   = 64 << 10
	metadataTable = 64 << 10 // metadata items start behind it

	fileSignature     = "vhdxfile"
	headerSignature   = "head"
	regionsSignature  = "regi"
	metadataSignature = "metadata"

	tableEntrySize  = 32   // of the region table and of the metadata table
	maxTableEntries = 2047 // likewise
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// guid is an identifier in the byte order of the file.
type guid [16]byte

// Regions and metadata items. Source: [MS-VHDX] 2.2.3.2, 2.6.2.
var (
	regionBAT      = mustGUID("6677c22d23f600429d64115e9bfd4a08")
	regionMetadata = mustGUID("06a27c8b90479a4bb8fe575f050f886e")

	itemFileParameters = mustGUID("3767a1ca36fa434db3b633f0aa44e76b")
	itemDiskSize       = mustGUID("2442a52f1bcd7648b2115dbed83bf4b8")
	itemDiskID         = mustGUID("ab12cabee6b2234593efc309e000c746")
	itemLogicalSector  = mustGUID("1dbf41816fa90947ba47f233a8faab5f")
	itemPhysicalSector = mustGUID("c748a3cd5d4471449cc9e9885251c556")
	itemParentLocator  = mustGUID("2d5fd3a80bb34d45abf7d3d84834ab0c")
)

func mustGUID(s string) (g guid) {
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != len(g) {
		panic("vhdx: internal error: identifier " + s)
	}
	return guid(b)
}

// Flags of metadata. Source: [MS-VHDX] 2.6.1.2, 2.6.2.1.
const (
	flagUser     = 1 << 0
	flagDisk     = 1 << 1
	flagRequired = 1 << 2

	flagHasParent = 1 << 1 // of the file parameters
)

func open(f *os.File) (*Image, error) {
	fileSize, err := imgfile.Size(f)
	if err != nil {
		return nil, err
	}
	head := make([]byte, len(fileSignature))
	if _, err := f.ReadAt(head, 0); err != nil && err != io.EOF {
		return nil, err
	}
	if !Match(head) {
		return nil, fmt.Errorf("%w: %s does not start like a vhdx", image.ErrNotImage, f.Name())
	}
	p := parser{f: f, fileSize: fileSize}
	if err := p.checkHeaders(); err != nil {
		return nil, err
	}
	bat, metadata, err := p.regions()
	if err != nil {
		return nil, err
	}
	g, err := p.metadata(metadata)
	if err != nil {
		return nil, err
	}
	if need := g.batEntries() * batEntry; need > bat.len {
		return nil, p.corrupt("its block table has %d bytes, %d are needed", bat.len, need)
	}
	return &Image{f: f, fileSize: fileSize, geometry: g, batOff: bat.off, bat: imgfile.NewCache(f)}, nil
}

// parser reads the structures that are read once.
type parser struct {
	f        *os.File
	fileSize int64
}

func (p parser) corrupt(format string, args ...any) error {
	return fmt.Errorf("%w: %s: %s", image.ErrCorrupt, p.f.Name(), fmt.Sprintf(format, args...))
}

func (p parser) unsupported(format string, args ...any) error {
	return fmt.Errorf("%w: %s: %s", image.ErrUnsupported, p.f.Name(), fmt.Sprintf(format, args...))
}

// checked reads a structure that starts with a signature and its checksum; ok
// says whether both are right.
func (p parser) checked(off, size int64, signature string) (b []byte, ok bool, err error) {
	b = make([]byte, size)
	if err := imgfile.ReadFull(p.f, b, off); err != nil {
		return nil, false, err
	}
	sum := binary.LittleEndian.Uint32(b[4:])
	clear(b[4:8])
	return b, string(b[:4]) == signature && crc32.Checksum(b, castagnoli) == sum, nil
}

// checkHeaders looks at the header that counts: is this a version that we
// read, with nothing left in its log? Source: [MS-VHDX] 2.2.2.
func (p parser) checkHeaders() error {
	var current []byte
	for _, off := range []int64{header1At, header2At} {
		h, ok, err := p.checked(off, headerSize, headerSignature)
		if err != nil {
			return err
		}
		if ok && (current == nil || binary.LittleEndian.Uint64(h[8:]) > binary.LittleEndian.Uint64(current[8:])) {
			current = h
		}
	}
	if current == nil {
		return p.corrupt("neither of its headers is intact")
	}
	if version := binary.LittleEndian.Uint16(current[66:]); version != 1 {
		return p.unsupported("vhdx version %d", version)
	}
	if log := guid(current[48:64]); log != (guid{}) {
		return p.unsupported("its log holds changes that are not in place yet: the disk is in use, or was not closed cleanly; " +
			"shut the virtual machine down, or open the disk once with its hypervisor, or run qemu-img check -r all on it")
	}
	return nil
}

// region is a range of the file.
type region struct{ off, len int64 }

// regions reads the region table, or its copy. Source: [MS-VHDX] 2.2.3.
func (p parser) regions() (bat, metadata region, err error) {
	table, ok, err := p.checked(regions1At, regionsSize, regionsSignature)
	if err == nil && !ok {
		table, ok, err = p.checked(regions2At, regionsSize, regionsSignature)
	}
	if err != nil {
		return bat, metadata, err
	}
	count := binary.LittleEndian.Uint32(table[8:])
	if !ok || count > maxTableEntries {
		return bat, metadata, p.corrupt("neither of its region tables is intact")
	}
	for e := range slices.Chunk(table[16:][:count*tableEntrySize], tableEntrySize) {
		var into *region
		switch id := guid(e[:16]); id {
		case regionBAT:
			into = &bat
		case regionMetadata:
			into = &metadata
		default:
			if binary.LittleEndian.Uint32(e[28:])&1 != 0 {
				return bat, metadata, p.unsupported("it has a required region of an unknown kind, %x", id)
			}
			continue
		}
		off, length := binary.LittleEndian.Uint64(e[16:]), int64(binary.LittleEndian.Uint32(e[24:]))
		if into.len > 0 || off < mib || off%mib != 0 || off > uint64(max(0, p.fileSize-length)) {
			return bat, metadata, p.corrupt("a region of %d bytes at %d is outside the file or there twice; the file may have been truncated", length, off)
		}
		*into = region{off: int64(off), len: length}
	}
	if bat.len == 0 || metadata.len == 0 {
		return bat, metadata, p.corrupt("it has no block table or no metadata")
	}
	return bat, metadata, nil
}

// metadata reads the disk's parameters. Source: [MS-VHDX] 2.6.
func (p parser) metadata(r region) (g geometry, err error) {
	if r.len < metadataTable {
		return g, p.corrupt("its metadata region is too short")
	}
	table := make([]byte, metadataTable)
	if err := imgfile.ReadFull(p.f, table, r.off); err != nil {
		return g, err
	}
	count := int(binary.LittleEndian.Uint16(table[10:]))
	if string(table[:8]) != metadataSignature || count > maxTableEntries {
		return g, p.corrupt("its metadata table is damaged")
	}
	for e := range slices.Chunk(table[tableEntrySize:][:count*tableEntrySize], tableEntrySize) {
		id, flags := guid(e[:16]), binary.LittleEndian.Uint32(e[24:])
		size, known := itemSizes[id]
		if flags&flagUser != 0 || !known {
			if flags&flagRequired != 0 {
				return g, p.unsupported("it has a required metadata item of an unknown kind, %x", id)
			}
			continue
		}
		off, length := int64(binary.LittleEndian.Uint32(e[16:])), int64(binary.LittleEndian.Uint32(e[20:]))
		if off < metadataTable || length < size || off+length > r.len {
			return g, p.corrupt("metadata item %x is outside its region", id)
		}
		item := make([]byte, size)
		if err := imgfile.ReadFull(p.f, item, r.off+off); err != nil {
			return g, err
		}
		if err := p.apply(&g, id, item); err != nil {
			return g, err
		}
	}
	return g, p.check(g)
}

// itemSizes has the length in bytes of the known items, of those with a
// variable length the least.
var itemSizes = map[guid]int64{
	itemFileParameters: 8,
	itemDiskSize:       8,
	itemDiskID:         16,
	itemLogicalSector:  4,
	itemPhysicalSector: 4,
	itemParentLocator:  20,
}

// apply enters a metadata item into g.
func (p parser) apply(g *geometry, id guid, item []byte) error {
	switch id {
	case itemFileParameters:
		g.blockSize = int64(binary.LittleEndian.Uint32(item))
		if binary.LittleEndian.Uint32(item[4:])&flagHasParent != 0 {
			return p.unsupported("a differencing vhdx; merge it into its parent or convert it first")
		}
	case itemDiskSize:
		size := binary.LittleEndian.Uint64(item)
		if size > maxSize {
			return p.corrupt("a disk of %d bytes is larger than the format allows", size)
		}
		g.size = int64(size)
	case itemLogicalSector:
		g.sectorSize = int64(binary.LittleEndian.Uint32(item))
	}
	return nil
}

// check refuses what the rest of the package could not compute with, missing
// items included.
func (p parser) check(g geometry) error {
	if g.sectorSize != 512 && g.sectorSize != 4096 {
		return p.corrupt("logical sectors of %d bytes", g.sectorSize)
	}
	if g.blockSize < mib || g.blockSize > 256*mib || g.blockSize&(g.blockSize-1) != 0 {
		return p.corrupt("blocks of %d bytes", g.blockSize)
	}
	if g.size%g.sectorSize != 0 {
		return p.corrupt("a disk of %d bytes is no whole number of sectors", g.size)
	}
	return nil
}
