// Package vhdx reads and writes Hyper-V's virtual disks, VHDX version 1.
//
// # On-disk format
//
// All integers are little-endian, checksums are CRC-32C over a structure whose
// checksum field is zero. Everything but the first MiB is aligned to 1 MiB.
//
//	  0 KiB   file identifier: "vhdxfile"
//	 64 KiB   header 1 (4 KiB); the valid one with the higher sequence number counts
//	128 KiB   header 2
//	192 KiB   region table: where the metadata and the block allocation table (BAT) are
//	256 KiB   region table, the copy
//	  1 MiB…  log, metadata, BAT and payload blocks, anywhere
//
// The disk is cut into payload blocks of 1 to 256 MiB. A BAT entry has 8
// bytes: the state in bits 0–2, the block's offset in the file, in MiB, in bits
// 20–63. After every chunk-ratio entries (2²³ × logical sector size ÷ block
// size) stands one entry of a sector bitmap, which only differencing
// disks use.
//
// Source: [MS-VHDX] "Virtual Hard Disk v2 (VHDX) File Format", sections 2.2 to 2.6.
//
// # Limits
//
// A disk has at most 64 TiB. Differencing disks are refused, and so are images
// whose log is not empty: replaying it means to change the file, and that is
// its owner's to do. Memory is a fixed 4 MiB for cached parts of the BAT.
package vhdx

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/internal/imgfile"
)

// States of a payload block. Source: [MS-VHDX] 2.5.1.1.
const (
	stateNotPresent   = 0
	stateUndefined    = 1
	stateZero         = 2
	stateUnmapped     = 3
	stateUnmappedOld  = 5 // the value in drafts of the specification
	stateFullyPresent = 6
	statePartly       = 7 // differencing disks only

	stateMask  = 1<<3 - 1
	offsetMask = ^uint64(mib - 1)
)

const (
	mib      = 1 << 20
	maxSize  = 64 << 40
	batEntry = 8
)

// absent is the file offset of a block that is not in the file.
const absent = -1

// Match reports whether head, the first bytes of a file, are those of a VHDX.
func Match(head []byte) bool {
	return bytes.HasPrefix(head, []byte(fileSignature))
}

// Image is a VHDX, opened for reading.
type Image struct {
	f        *os.File
	fileSize int64
	geometry
	batOff int64
	bat    *imgfile.Cache
}

// geometry is what the place of a block's BAT entry follows from.
type geometry struct {
	size       int64 // of the disk
	blockSize  int64
	sectorSize int64
}

// blocks returns the number of payload blocks.
func (g geometry) blocks() int64 { return (g.size + g.blockSize - 1) / g.blockSize }

// index returns the place in the BAT of payload block n's entry.
func (g geometry) index(n int64) int64 {
	chunkRatio := (1 << 23) * g.sectorSize / g.blockSize
	return n + n/chunkRatio
}

// batEntries returns how many entries the BAT of a disk without a parent has.
func (g geometry) batEntries() int64 {
	if g.size == 0 {
		return 0
	}
	return g.index(g.blocks()-1) + 1
}

// Open reads the headers of the VHDX in f. It takes ownership of f, also when
// it fails. Errors wrap [image.ErrNotImage], [image.ErrUnsupported] or
// [image.ErrCorrupt] and name the file.
func Open(f *os.File, _ image.OpenOptions) (*Image, error) {
	im, err := open(f)
	if err != nil {
		f.Close()
		return nil, err
	}
	return im, nil
}

// Size implements [image.Disk].
func (im *Image) Size() int64 { return im.size }

// Close closes the file.
func (im *Image) Close() error { return im.f.Close() }

// ReadAt implements [image.Disk].
func (im *Image) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, errors.New("vhdx: negative offset")
	}
	off, length := image.Clip(off, int64(len(p)), im.size)
	for done := int64(0); done < length; {
		pos := off + done
		within := pos % im.blockSize
		at, err := im.block(pos / im.blockSize)
		if err != nil {
			return int(done), err
		}
		part := p[done:min(length, done+im.blockSize-within)]
		if at == absent {
			clear(part)
		} else if err := imgfile.ReadFull(im.f, part, at+within); err != nil {
			return int(done), err
		}
		done += int64(len(part))
	}
	if length < int64(len(p)) {
		return int(length), io.EOF
	}
	return len(p), nil
}

// block returns the offset in the file of payload block n, or absent.
func (im *Image) block(n int64) (int64, error) {
	var b [batEntry]byte
	if err := im.bat.ReadFull(b[:], im.batOff+im.index(n)*batEntry); err != nil {
		return 0, err
	}
	return im.place(n, binary.LittleEndian.Uint64(b[:]))
}

// place returns the offset in the file that BAT entry e gives to payload block
// n, or absent. All of the block that lies inside the disk is inside the file.
func (im *Image) place(n int64, e uint64) (int64, error) {
	switch state := e & stateMask; state {
	case stateNotPresent, stateUndefined, stateZero, stateUnmapped, stateUnmappedOld:
		return absent, nil
	case stateFullyPresent:
		at, need := e&offsetMask, min(im.blockSize, im.size-n*im.blockSize)
		if at < mib || at > uint64(max(0, im.fileSize-need)) {
			return 0, fmt.Errorf("%w: %s: block %d at byte %d is outside the file, which has %d bytes; it may have been truncated",
				image.ErrCorrupt, im.f.Name(), n, at, im.fileSize)
		}
		return int64(at), nil
	default:
		return 0, fmt.Errorf("%w: %s: block %d has state %d, which a disk without a parent cannot have", image.ErrCorrupt, im.f.Name(), n, state)
	}
}

// Extents implements [image.Disk]. Blocks that are not in the file are zero,
// and so are the file's holes inside blocks: a VHDX of fixed size has all
// its blocks, but the file is often sparse.
func (im *Image) Extents(ctx context.Context, off, length int64) iter.Seq2[image.Extent, error] {
	off, length = image.Clip(off, length, im.size)
	return func(yield func(image.Extent, error) bool) {
		for r, err := range im.runs(ctx, off, off+length) {
			if err != nil {
				yield(image.Extent{}, err)
				return
			}
			if r.at == absent {
				if !yield(image.Extent{Off: r.off, Len: r.len, Zero: true}, nil) {
					return
				}
				continue
			}
			for e, err := range imgfile.ExtentsAt(ctx, im.f, r.at, r.len, r.off) {
				if !yield(e, err) || err != nil {
					return
				}
			}
		}
	}
}

// run is a range of the disk that lies in one piece in the file, or is absent.
type run struct {
	off, len int64
	at       int64
}

// joins reports whether next, which follows r on the disk, continues it.
func (r run) joins(next run) bool {
	if r.at == absent || next.at == absent {
		return r.at == next.at
	}
	return r.at+r.len == next.at
}

// runs walks the BAT, a piece at a time, and yields the runs of [off, end).
func (im *Image) runs(ctx context.Context, off, end int64) iter.Seq2[run, error] {
	return func(yield func(run, error) bool) {
		var held run
		for off < end {
			first, entries, err := im.batPiece(ctx, off, end)
			for ; err == nil && off < end; off = held.off + held.len {
				n := off / im.blockSize
				entry := (im.index(n) - first) * batEntry
				if entry >= int64(len(entries)) {
					break
				}
				next := run{off: off, len: min(end, (n+1)*im.blockSize) - off}
				if next.at, err = im.place(n, binary.LittleEndian.Uint64(entries[entry:])); err != nil {
					break
				}
				if next.at != absent {
					next.at += off - n*im.blockSize
				}
				if held.len > 0 && held.joins(next) {
					held.len += next.len
					continue
				}
				if held.len > 0 && !yield(held, nil) {
					return
				}
				held = next
			}
			if err != nil {
				yield(run{}, err)
				return
			}
		}
		if held.len > 0 {
			yield(held, nil)
		}
	}
}

// batPiece returns the BAT's entries from that of the block at off on: up to
// the one before end, or 32 KiB. first is the place of the first in the BAT.
func (im *Image) batPiece(ctx context.Context, off, end int64) (first int64, entries []byte, err error) {
	if err := ctx.Err(); err != nil {
		return 0, nil, err
	}
	first = im.index(off / im.blockSize)
	entries = make([]byte, min(32<<10, (im.index((end-1)/im.blockSize)-first+1)*batEntry))
	return first, entries, imgfile.ReadFull(im.f, entries, im.batOff+first*batEntry)
}
