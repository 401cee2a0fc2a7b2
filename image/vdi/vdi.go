// Package vdi reads VirtualBox disk images (VDI).
//
// # On-disk format
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
// Nothing is allocated by the image's numbers: memory is a fixed 4 MiB an image
// for cached parts of the map.
package vdi

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"iter"
	"os"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/internal/imgfile"
)

const (
	entryDiscarded   = 0xfffffffe
	entryUnallocated = 0xffffffff
	entrySize        = 4
	pieceEntries     = 1024 // of the map that are looked at together
)

// Match reports whether a file that starts with head is a VDI. 68 bytes are enough.
func Match(head []byte) bool {
	return len(head) >= signatureOff+4 && binary.LittleEndian.Uint32(head[signatureOff:]) == signature
}

// Image is an open VDI, an [image.DiskCloser]. It is read-only and safe for use
// by several goroutines; Close must come last.
type Image struct {
	file                imgfile.File
	size, block         int64 // bytes
	mapStart, dataStart int64 // places in the file
	entries             int64 // of the map, as many as the disk needs
	static              bool
	cache               *imgfile.Cache // for the map
}

// Open opens the image in f. It takes ownership of f, also when it fails. A
// VDI names no other files, so the options do not matter.
func Open(f *os.File, _ image.OpenOptions) (*Image, error) {
	m, err := open(f)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("vdi %s: %w", f.Name(), err)
	}
	return m, nil
}

func open(f *os.File) (*Image, error) {
	file, err := imgfile.NewFile(f)
	if err != nil {
		return nil, err
	}
	h, err := readHeader(file)
	if err != nil {
		return nil, err
	}
	m := &Image{
		file:      file,
		size:      int64(h.Size),
		block:     int64(h.BlockSize),
		mapStart:  int64(h.Map),
		dataStart: int64(h.Data),
		static:    h.Type == typeStatic,
		cache:     imgfile.NewCache(f),
	}
	m.entries = (m.size + m.block - 1) / m.block
	return m, file.Has(m.mapStart, entrySize*m.entries)
}

// run is a range that is all zeros, or data in one piece at place in the file.
type run struct {
	length int64
	zero   bool
	place  int64
}

// find returns the run that starts at off, which lies inside the disk, at most
// length long. It may be shorter than it could: one look at the map reaches no
// further than pieceEntries.
func (m *Image) find(off, length int64) (run, error) {
	number, inBlock := off/m.block, off%m.block
	count := min(pieceEntries, (inBlock+length-1)/m.block+1)
	entries := make([]byte, entrySize*count)
	if err := m.cache.ReadFull(entries, m.mapStart+entrySize*number); err != nil {
		return run{}, err
	}
	entry := func(i int64) uint32 { return binary.LittleEndian.Uint32(entries[entrySize*i:]) }
	n := int64(1)
	for n < count && follows(entry(0), entry(n), n) {
		n++
	}
	r := run{length: min(length, n*m.block-inBlock), zero: isZero(entry(0))}
	if r.zero {
		return r, nil
	}
	r.place = m.dataStart + int64(entry(0))*m.block + inBlock
	return r, m.file.Has(r.place, r.length)
}

func isZero(entry uint32) bool { return entry == entryUnallocated || entry == entryDiscarded }

// follows reports whether entry b continues the run that starts with entry a,
// n blocks before.
func follows(a, b uint32, n int64) bool {
	if isZero(a) || isZero(b) {
		return isZero(a) && isZero(b)
	}
	return int64(b) == int64(a)+n
}

// Size implements [image.Disk].
func (m *Image) Size() int64 { return m.size }

// ReadAt implements [image.Disk].
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
				err = imgfile.ReadFull(m.file.File, part, r.place)
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

// Extents implements [image.Disk]. Dynamic images answer from the map, static
// ones from the holes of the file too. A map that points past the end of the
// file is an error that wraps [image.ErrCorrupt].
func (m *Image) Extents(ctx context.Context, off, length int64) iter.Seq2[image.Extent, error] {
	return func(yield func(image.Extent, error) bool) {
		off, length := image.Clip(off, length, m.size)
		for end := off + length; off < end; {
			r, err := m.find(off, end-off)
			if err == nil {
				err = ctx.Err()
			}
			if err != nil {
				yield(image.Extent{}, fmt.Errorf("vdi: map: %w", err))
				return
			}
			for e, err := range m.runExtents(ctx, off, r) {
				if !yield(e, err) || err != nil {
					return
				}
			}
			off += r.length
		}
	}
}

// runExtents yields the extents of the run that starts at off.
func (m *Image) runExtents(ctx context.Context, off int64, r run) iter.Seq2[image.Extent, error] {
	if m.static && !r.zero {
		return imgfile.ExtentsAt(ctx, m.file.File, r.place, r.length, off)
	}
	return func(yield func(image.Extent, error) bool) {
		yield(image.Extent{Off: off, Len: r.length, Zero: r.zero}, nil)
	}
}

// Close closes the file.
func (m *Image) Close() error { return m.file.Close() }
