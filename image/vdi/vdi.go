// Package vdi reads VirtualBox disk images (VDI).
//
// # Format
//
// All numbers are little-endian. A [header] in the first 512 bytes is followed
// by the block map and the blocks, where the header says. The disk is cut into
// blocks (1 MiB as a rule); the map has a 32-bit entry for each: the number of
// the block in the file, 0xffffffff for a block that was never written or
// 0xfffffffe for one that was discarded. Both read as zeros. In a fixed (static) image
// all blocks are there, in order.
//
// Source: QEMU block/vdi.c, which documents the format from VirtualBox's
// VDICore.h.
//
// # Limits
//
// Version 1.1. Differencing and undo images, which depend on a parent,
// and blocks with extra bytes are refused with [image.ErrUnsupported]. A block
// or map past the end of the file is [image.ErrCorrupt], never zeros.
//
// Nothing is allocated by the image's numbers: the map is read in pages of
// 4 KiB, of which at most 256 are kept.
package vdi

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/bits"
	"os"
	"sync/atomic"

	"github.com/holdfast-backup/holdfast/image"
)

const (
	signature    = 0xbeda107f
	signatureOff = 0x40
	version11    = 1<<16 | 1

	typeDynamic = 1
	typeStatic  = 2

	// Blocks of other sizes than 1 MiB are rare; these are all powers of two that make sense.
	minBlock = 4 << 10
	maxBlock = 256 << 20

	entryDiscarded   = 0xfffffffe
	entryUnallocated = 0xffffffff

	pageEntries = 1024
	cachedPages = 256
)

// header is the start of the file.
type header struct {
	Text            [0x40]byte // "<<< Oracle VM VirtualBox Disk Image >>>" and the like
	Signature       uint32
	Version         uint32
	HeaderSize      uint32
	Type            uint32
	Flags           uint32
	Description     [256]byte
	Map             uint32 // place in the file, bytes
	Data            uint32 // place of block 0, bytes
	Geometry        [3]uint32
	SectorSize      uint32
	_               uint32
	Size            uint64 // of the disk, bytes
	BlockSize       uint32
	BlockExtra      uint32 // bytes before each block
	Blocks          uint32 // entries of the map
	BlocksAllocated uint32
	ID, SnapshotID  [16]byte
	Link, Parent    [16]byte // not zero in differencing images
}

// Match reports whether a file that starts with head is a VDI. 68 bytes are enough.
func Match(head []byte) bool {
	return len(head) >= signatureOff+4 && binary.LittleEndian.Uint32(head[signatureOff:]) == signature
}

// Image is an open VDI, an [image.DiskCloser]. It is read-only and safe for use
// by several goroutines; Close must come last.
type Image struct {
	file                  *os.File
	fileSize, size, block int64 // bytes
	mapStart, dataStart   int64 // places in the file
	entries               int64 // of the map, as many as the disk needs
	static                bool
	pages                 [cachedPages]atomic.Pointer[page] // page n is in slot n % cachedPages
}

// page is a piece of the block map; it does not change.
type page struct {
	number  int64
	entries []uint32
}

// Open opens the image in f. It takes ownership of f, also when it fails. A
// VDI names no other files, so the options do not matter.
func Open(f *os.File, _ image.OpenOptions) (*Image, error) {
	m := &Image{file: f}
	if err := m.open(); err != nil {
		f.Close()
		return nil, fmt.Errorf("vdi %s: %w", f.Name(), err)
	}
	return m, nil
}

func (m *Image) open() error {
	var err error
	if m.fileSize, err = m.file.Seek(0, io.SeekEnd); err != nil {
		return err
	}
	var h header
	buf := make([]byte, binary.Size(h))
	n, err := m.file.ReadAt(buf, 0)
	switch {
	case err != nil && !errors.Is(err, io.EOF):
		return err
	case !Match(buf[:n]):
		return fmt.Errorf("%w: no VDI signature", image.ErrNotImage)
	case n < len(buf):
		return fmt.Errorf("%w: ends within its header", image.ErrCorrupt)
	}
	if _, err := binary.Decode(buf, binary.LittleEndian, &h); err != nil {
		panic("vdi: internal error: " + err.Error())
	}
	if err := h.check(); err != nil {
		return err
	}
	m.size, m.block = int64(h.Size), int64(h.BlockSize)
	m.mapStart, m.dataStart = int64(h.Map), int64(h.Data)
	m.entries = (m.size + m.block - 1) / m.block
	m.static = h.Type == typeStatic
	return m.has(m.mapStart, 4*m.entries)
}

// check refuses headers that contradict themselves or need what is not read.
func (h header) check() error {
	zero := [16]byte{}
	headerEnd := uint32(binary.Size(h))
	switch {
	case h.Version != version11:
		return fmt.Errorf("%w: version %d.%d", image.ErrUnsupported, h.Version>>16, h.Version&0xffff)
	case h.Type != typeDynamic && h.Type != typeStatic, h.Link != zero, h.Parent != zero:
		return fmt.Errorf("%w: differencing image (type %d), which needs its parent; merge the snapshots first", image.ErrUnsupported, h.Type)
	case h.SectorSize != 512:
		return fmt.Errorf("%w: sectors of %d bytes", image.ErrUnsupported, h.SectorSize)
	case bits.OnesCount32(h.BlockSize) != 1 || h.BlockSize < minBlock || h.BlockSize > maxBlock:
		return fmt.Errorf("%w: blocks of %d bytes", image.ErrUnsupported, h.BlockSize)
	case h.BlockExtra != 0:
		return fmt.Errorf("%w: %d extra bytes a block", image.ErrUnsupported, h.BlockExtra)
	case h.Size > uint64(image.MaxSize):
		return fmt.Errorf("%w: disk of %d bytes", image.ErrUnsupported, h.Size)
	case h.Size > uint64(h.Blocks)*uint64(h.BlockSize):
		return fmt.Errorf("%w: map of %d blocks for a disk of %d bytes", image.ErrCorrupt, h.Blocks, h.Size)
	case h.Map < headerEnd || h.Data < headerEnd:
		return fmt.Errorf("%w: map at byte %d, data at byte %d overlap the header", image.ErrCorrupt, h.Map, h.Data)
	}
	return nil
}

// has checks that n bytes from off on lie inside the file.
func (m *Image) has(off, n int64) error {
	if off > m.fileSize || n > m.fileSize-off {
		return fmt.Errorf("%w: %s ends at byte %d, before the %d bytes at %d", image.ErrCorrupt, m.file.Name(), m.fileSize, n, off)
	}
	return nil
}

// read fills p from off on in the file.
func (m *Image) read(p []byte, off int64) error {
	if err := m.has(off, int64(len(p))); err != nil {
		return err
	}
	n, err := m.file.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if errors.Is(err, io.EOF) {
		err = fmt.Errorf("%w: %s became shorter while it was open", image.ErrCorrupt, m.file.Name())
	}
	return err
}

// page returns page number of the map.
func (m *Image) page(number int64) ([]uint32, error) {
	slot := &m.pages[number%cachedPages]
	if p := slot.Load(); p != nil && p.number == number {
		return p.entries, nil
	}
	first := number * pageEntries
	var buf [4 * pageEntries]byte
	p := &page{number, make([]uint32, min(pageEntries, m.entries-first))}
	if err := m.read(buf[:4*len(p.entries)], m.mapStart+4*first); err != nil {
		return nil, err
	}
	for i := range p.entries {
		p.entries[i] = binary.LittleEndian.Uint32(buf[4*i:])
	}
	slot.Store(p)
	return p.entries, nil
}

// run is a range that is all zeros, or data in one piece at place in the file.
type run struct {
	length int64
	zero   bool
	place  int64
}

// find returns the run that starts at off, which lies inside the disk, at most
// length long. Runs end with their page of the map.
func (m *Image) find(off, length int64) (run, error) {
	number := off / m.block
	entries, err := m.page(number / pageEntries)
	if err != nil {
		return run{}, err
	}
	entries = entries[number%pageEntries:]
	inBlock := off % m.block
	n := 1
	for int64(n)*m.block-inBlock < length && n < len(entries) && follows(entries[0], entries[n], n) {
		n++
	}
	r := run{length: min(length, int64(n)*m.block-inBlock), zero: isZero(entries[0])}
	if r.zero {
		return r, nil
	}
	r.place = m.dataStart + int64(entries[0])*m.block + inBlock
	return r, m.has(r.place, r.length)
}

func isZero(entry uint32) bool { return entry == entryUnallocated || entry == entryDiscarded }

// follows reports whether entry b continues the run that starts with entry a,
// n blocks before.
func follows(a, b uint32, n int) bool {
	if isZero(a) || isZero(b) {
		return isZero(a) && isZero(b)
	}
	return int64(b) == int64(a)+int64(n)
}

// Size returns the disk's size in bytes.
func (m *Image) Size() int64 { return m.size }

// ReadAt reads the disk; see [image.Disk].
func (m *Image) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("vdi: read at negative offset %d", off)
	}
	_, length := image.Clip(off, int64(len(p)), m.size)
	done := int64(0)
	for done < length {
		r, err := m.find(off+done, length-done)
		if err == nil {
			part := p[done : done+r.length]
			if r.zero {
				clear(part)
			} else {
				err = m.read(part, r.place)
			}
		}
		if err != nil {
			return int(done), fmt.Errorf("vdi: read at offset %d: %w", off+done, err)
		}
		done += r.length
	}
	if done < int64(len(p)) {
		return int(done), io.EOF
	}
	return int(done), nil
}

// Extents yields what the disk's range holds; see [image.Disk]. Dynamic images
// answer from the map, static ones from the holes of the file. A map that
// points past the end of the file is an error that wraps [image.ErrCorrupt].
func (m *Image) Extents(ctx context.Context, off, length int64) iter.Seq2[image.Extent, error] {
	return func(yield func(image.Extent, error) bool) {
		off, length := image.Clip(off, length, m.size)
		for end := off + length; off < end; {
			r, err := m.find(off, end-off)
			if err == nil {
				err = ctx.Err()
			}
			if err == nil && m.static && !r.zero {
				err = m.shorten(&r)
			}
			if err != nil {
				yield(image.Extent{}, fmt.Errorf("vdi: map: %w", err))
				return
			}
			if !yield(image.Extent{Off: off, Len: r.length, Zero: r.zero}, nil) {
				return
			}
			off += r.length
		}
	}
}

// Close closes the file.
func (m *Image) Close() error { return m.file.Close() }
