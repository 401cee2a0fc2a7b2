package vhdx

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"os"
	"sync"
	"unicode/utf16"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/internal/imgfile"
)

// The layout that Write makes.
const (
	logAt      = 1 * mib
	logSize    = 1 * mib
	metadataAt = 2 * mib
	batAt      = 3 * mib

	logicalSector  = 512
	physicalSector = 4096

	maxBlocks = 16 * mib / batEntry // so that a BAT has at most 16 MiB
	readSize  = 1 * mib             // of the disk at once; divides every block size
)

// blockSizeFor returns the block size of a new image: 1 MiB, the smallest
// there is, as long as the BAT stays below 16 MiB, that is for disks of up to
// 2 TiB; then the least power of two that keeps it there, 32 MiB for the largest
// disk. Small blocks hold less that is zero, which counts where the
// file is copied to a file system without holes; Microsoft too advises 1 MiB for guests
// whose file systems scatter their metadata.
func blockSizeFor(size int64) int64 {
	blockSize := int64(mib)
	for size > maxBlocks*blockSize {
		blockSize *= 2
	}
	return blockSize
}

// Write writes d as a VHDX of dynamic size into f, an empty file, in which
// zeros stay holes. A size that is no multiple of 512 is rounded up to one, as
// the format wants it. Blocks without data are marked as zero, so that no
// reader may take them for undefined. The headers are written last: a file
// that was cut off in the middle is no VHDX. The caller syncs and closes f.
func Write(ctx context.Context, f *os.File, d image.Disk, o image.WriteOptions) error {
	if d.Size() == 0 || d.Size() > maxSize {
		return fmt.Errorf("%w: a vhdx holds 1 to %d bytes, the disk has %d", image.ErrUnsupported, int64(maxSize), d.Size())
	}
	w := newWriter(f, d.Size())
	if err := image.ForEachData(ctx, d, readSize, o.Report, w.put); err != nil {
		return err
	}
	return w.finish()
}

type writer struct {
	f *os.File
	geometry
	batSize int64 // bytes, whole MiB

	mu  sync.Mutex
	bat []uint64 // guarded by mu
	end int64    // of the file: where the next block goes; guarded by mu
}

func newWriter(f *os.File, size int64) *writer {
	size = roundUp(size, logicalSector)
	w := &writer{f: f, geometry: geometry{size: size, blockSize: blockSizeFor(size), sectorSize: logicalSector}}
	w.bat = make([]uint64, w.batEntries())
	for n := range w.blocks() {
		w.bat[w.index(n)] = stateZero
	}
	w.batSize = max(mib, roundUp(w.batEntries()*batEntry, mib))
	w.end = batAt + w.batSize
	return w
}

func roundUp(n, unit int64) int64 { return (n + unit - 1) / unit * unit }

// put writes p, a piece of the disk that lies inside one block.
func (w *writer) put(off int64, p []byte) error {
	return imgfile.WriteSparse(w.f, p, w.allocate(off/w.blockSize)+off%w.blockSize)
}

// allocate returns where payload block n is in the file, from its first use on.
func (w *writer) allocate(n int64) int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	entry := &w.bat[w.index(n)]
	if *entry == stateZero {
		*entry = uint64(w.end) | stateFullyPresent
		w.end += w.blockSize
	}
	return int64(*entry & offsetMask)
}

// finish writes everything but the payload.
func (w *writer) finish() error {
	if err := w.f.Truncate(w.end); err != nil {
		return err
	}
	bat := make([]byte, 0, len(w.bat)*batEntry)
	for _, entry := range w.bat {
		bat = binary.LittleEndian.AppendUint64(bat, entry)
	}
	identifier := []byte(fileSignature)
	for _, unit := range utf16.Encode([]rune("Holdfast")) {
		identifier = binary.LittleEndian.AppendUint16(identifier, unit)
	}
	regions := w.regions()
	fileID, dataID := newGUID(), newGUID()
	for _, part := range []struct {
		at int64
		b  []byte
	}{
		{batAt, bat},
		{metadataAt, w.metadata()},
		{regions1At, regions},
		{regions2At, regions},
		{header1At, header(1, fileID, dataID)},
		{header2At, header(2, fileID, dataID)},
		{0, identifier},
	} {
		if _, err := w.f.WriteAt(part.b, part.at); err != nil {
			return err
		}
	}
	return nil
}

// header returns a header with an empty log. Source: [MS-VHDX] 2.2.2.
func header(sequence uint64, fileID, dataID guid) []byte {
	b := make([]byte, headerSize)
	copy(b, headerSignature)
	binary.LittleEndian.PutUint64(b[8:], sequence)
	copy(b[16:], fileID[:])
	copy(b[32:], dataID[:])
	binary.LittleEndian.PutUint16(b[66:], 1) // the format's version
	binary.LittleEndian.PutUint32(b[68:], logSize)
	binary.LittleEndian.PutUint64(b[72:], logAt)
	return seal(b)
}

// regions returns the region table. Source: [MS-VHDX] 2.2.3.
func (w *writer) regions() []byte {
	b := make([]byte, 16, regionsSize)
	copy(b, regionsSignature)
	binary.LittleEndian.PutUint32(b[8:], 2)
	entry := func(id guid, at, size int64) {
		b = append(b, id[:]...)
		b = binary.LittleEndian.AppendUint64(b, uint64(at))
		b = binary.LittleEndian.AppendUint32(b, uint32(size))
		b = binary.LittleEndian.AppendUint32(b, 1) // required
	}
	entry(regionBAT, batAt, w.batSize)
	entry(regionMetadata, metadataAt, mib)
	return seal(b[:regionsSize])
}

// metadata returns the metadata table and its items. Source: [MS-VHDX] 2.6.
func (w *writer) metadata() []byte {
	table := make([]byte, tableEntrySize, metadataTable)
	copy(table, metadataSignature)
	var items []byte
	item := func(id guid, flags uint32, value []byte) {
		table = append(table, id[:]...)
		table = binary.LittleEndian.AppendUint32(table, uint32(metadataTable+len(items)))
		table = binary.LittleEndian.AppendUint32(table, uint32(len(value)))
		table = binary.LittleEndian.AppendUint32(table, flags)
		table = binary.LittleEndian.AppendUint32(table, 0)
		items = append(items, value...)
	}
	le := binary.LittleEndian
	diskID := newGUID()
	item(itemFileParameters, flagRequired, le.AppendUint32(le.AppendUint32(nil, uint32(w.blockSize)), 0))
	item(itemDiskSize, flagRequired|flagDisk, le.AppendUint64(nil, uint64(w.size)))
	item(itemDiskID, flagRequired|flagDisk, diskID[:])
	item(itemLogicalSector, flagRequired|flagDisk, le.AppendUint32(nil, logicalSector))
	item(itemPhysicalSector, flagRequired|flagDisk, le.AppendUint32(nil, physicalSector))
	le.PutUint16(table[10:], uint16(len(table)/tableEntrySize-1))
	return append(table[:metadataTable], items...)
}

// seal enters the checksum of a structure.
func seal(b []byte) []byte {
	binary.LittleEndian.PutUint32(b[4:], crc32.Checksum(b, castagnoli))
	return b
}

// newGUID returns a random identifier (RFC 9562, version 4).
func newGUID() (g guid) {
	rand.Read(g[:])         // never fails
	g[7] = g[7]&0x0f | 0x40 // the third field is little-endian
	g[8] = g[8]&0x3f | 0x80
	return g
}
