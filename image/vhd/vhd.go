// Package vhd reads Microsoft's Virtual Hard Disks (VHD, QEMU's "vpc"): of
// fixed size, dynamic and differencing.
//
// # On-disk format
//
// All integers are big-endian. The last 512 bytes of the file are the footer:
// kind, size and identity of the disk. A disk of fixed size is its
// bytes and the footer. The others have a copy of the footer at the start, and:
//
//	dynamic header   1024 bytes, where the footer says; block size, parent
//	table            a 32-bit entry a block: its place in the file in sectors of 512 bytes, or 2³²-1
//	blocks           a bitmap of the block's sectors, padded to a sector, then the sectors
//
// Bit 7 of a bitmap's first byte is the block's first sector. A sector whose bit is not
// set is the parent's, or zero where the disk has none. The checksum of
// footer and header is the complement of the sum of their other bytes.
//
// Source: Microsoft, "Virtual Hard Disk Image Format Specification", version 1.0.
//
// # The disk's size
//
// Virtual PC cut disks to what the footer's cylinders, heads and sectors can
// address; everyone else uses the footer's current size. The geometry counts
// for images that Virtual PC ("vpc ") and older QEMU ("qemu") made, unless it
// is the largest that can be written, as QEMU decides too. Images of makers
// that QEMU does not know have their current size here: no byte may be missing
// in a backup.
//
// # Limits
//
// Footers of 511 bytes, written before Virtual PC 2004, are not read. A
// parent's time stamp is not compared, only its identity. Memory is a fixed
// 4 MiB an image for cached parts of the table and the bitmaps.
package vhd

import (
	"bytes"
	"context"
	"errors"
	"io"
	"iter"
	"os"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/internal/imgfile"
)

// Match reports whether head, the first bytes of a file, are those of a
// dynamic or differencing VHD. One of fixed size is found by [MatchFooter].
func Match(head []byte) bool {
	return bytes.HasPrefix(head, []byte(footerCookie))
}

// MatchFooter reports whether foot, the last 512 bytes of a file of fileSize
// bytes, are the intact footer of a VHD of fixed size. A footer that would
// leave out more of the file than itself does not count: a guest may have
// written it to the end of its raw disk, to have the rest missing in a backup.
func MatchFooter(foot []byte, fileSize int64) bool {
	ft, err := parseFooter(foot)
	if err != nil || ft.kind != kindFixed {
		return false
	}
	size, err := ft.diskSize()
	return err == nil && size >= fileSize-footerSize
}

// Image is a VHD, opened for reading.
type Image struct {
	f      *os.File
	size   int64
	blocks *blocks          // nil for a disk of fixed size
	parent image.DiskCloser // nil unless the disk is a differencing one
}

// Open reads the headers of the VHD in f and opens its parent, if it has one,
// through o.OpenBacking. It takes ownership of f, also when it fails.
// Errors wrap [image.ErrNotImage], [image.ErrUnsupported] or
// [image.ErrCorrupt] and name the file.
func Open(f *os.File, o image.OpenOptions) (*Image, error) {
	im := &Image{f: f}
	if err := im.open(o); err != nil {
		f.Close()
		return nil, err
	}
	return im, nil
}

func (im *Image) open(o image.OpenOptions) error {
	fileSize, err := imgfile.Size(im.f)
	if err != nil {
		return err
	}
	ft, err := readFooter(im.f, fileSize)
	if err != nil {
		return err
	}
	if im.size, err = ft.diskSize(); err != nil {
		return named(im.f, err)
	}
	if ft.kind == kindFixed {
		if im.size > fileSize-footerSize {
			return corrupt(im.f, "a disk of %d bytes in a file of %d; it may have been truncated", im.size, fileSize)
		}
		return nil
	}
	h, err := readHeader(im.f, ft.headerAt)
	if err != nil {
		return err
	}
	if im.blocks, err = newBlocks(im.f, fileSize, h, im.size); err != nil {
		return err
	}
	if ft.kind == kindDifferencing {
		im.parent, err = openParent(im.f, h, o)
	}
	return err
}

// Size implements [image.Disk].
func (im *Image) Size() int64 { return im.size }

// Close closes the file and the parent.
func (im *Image) Close() error {
	err := im.f.Close()
	if im.parent != nil {
		err = errors.Join(err, im.parent.Close())
	}
	return err
}

// ReadAt implements [image.Disk].
func (im *Image) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, errors.New("vhd: negative offset")
	}
	off, length := image.Clip(off, int64(len(p)), im.size)
	for done := int64(0); done < length; {
		s, err := im.at(off+done, off+length)
		if err != nil {
			return int(done), err
		}
		part := p[done : done+s.len]
		switch {
		case s.at != absent:
			err = imgfile.ReadFull(im.f, part, s.at)
		case im.parent != nil:
			err = im.readParent(part, s.off)
		default:
			clear(part)
		}
		if err != nil {
			return int(done), err
		}
		done += s.len
	}
	if length < int64(len(p)) {
		return int(length), io.EOF
	}
	return len(p), nil
}

// at returns the run that starts at off, clipped to end.
func (im *Image) at(off, end int64) (run, error) {
	if im.blocks == nil {
		return run{off: off, len: end - off, at: off}, nil
	}
	return im.blocks.at(off, end)
}

// readParent reads what the parent has at off; a disk may be larger than its
// parent, and is zero there.
func (im *Image) readParent(p []byte, off int64) error {
	_, n := image.Clip(off, int64(len(p)), im.parent.Size())
	clear(p[n:])
	if n == 0 {
		return nil
	}
	return image.ReadFull(im.parent, p[:n], off)
}

// Extents implements [image.Disk]. The extents of a disk of fixed size are
// those of its file; of others, allocated sectors are data, and the rest is
// the parent's or zero.
func (im *Image) Extents(ctx context.Context, off, length int64) iter.Seq2[image.Extent, error] {
	off, length = image.Clip(off, length, im.size)
	if im.blocks == nil {
		return imgfile.Extents(ctx, im.f, off, length)
	}
	return func(yield func(image.Extent, error) bool) {
		for r, err := range im.blocks.runs(ctx, off, off+length) {
			if err != nil {
				yield(image.Extent{}, err)
				return
			}
			if r.at != absent {
				if !yield(image.Extent{Off: r.off, Len: r.len}, nil) {
					return
				}
				continue
			}
			below := int64(0) // bytes of the run that are the parent's
			if im.parent != nil {
				_, below = image.Clip(r.off, r.len, im.parent.Size())
			}
			if below > 0 {
				for e, err := range im.parent.Extents(ctx, r.off, below) {
					if !yield(e, err) || err != nil {
						return
					}
				}
			}
			if below < r.len && !yield(image.Extent{Off: r.off + below, Len: r.len - below, Zero: true}, nil) {
				return
			}
		}
	}
}
