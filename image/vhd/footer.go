package vhd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/internal/imgfile"
)

const (
	footerSize   = 512
	footerCookie = "conectix"

	headerSize   = 1024
	headerCookie = "cxsparse"
)

// Kinds of disks; the specification reserves the other values.
const (
	kindFixed        = 2
	kindDynamic      = 3
	kindDifferencing = 4
)

func named(f *os.File, err error) error { return fmt.Errorf("%s: %w", f.Name(), err) }

func corrupt(f *os.File, format string, args ...any) error {
	return fmt.Errorf("%w: %s: %s", image.ErrCorrupt, f.Name(), fmt.Sprintf(format, args...))
}

// identity is what a differencing disk knows its parent by.
type identity [16]byte

// String returns the identity in the usual form.
func (id identity) String() string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", id[:4], id[4:6], id[6:8], id[8:10], id[10:])
}

// footer is what counts of a hard disk footer.
type footer struct {
	kind     uint32
	headerAt uint64 // of the dynamic header
	creator  string // four characters
	size     uint64 // the current size, bytes
	chs      int64  // bytes that cylinders, heads and sectors address
	id       identity
}

// maxCHS is the largest geometry: every larger disk has it.
const maxCHS = 65535 * 16 * 255 * 512

// parseFooter decodes a footer. Without its cookie the error wraps
// [image.ErrNotImage], with a wrong checksum [image.ErrCorrupt].
func parseFooter(b []byte) (footer, error) {
	if len(b) != footerSize || string(b[:8]) != footerCookie {
		return footer{}, fmt.Errorf("%w: no vhd footer", image.ErrNotImage)
	}
	if !sumMatches(b, 64) {
		return footer{}, fmt.Errorf("%w: wrong checksum of the vhd footer", image.ErrCorrupt)
	}
	return footer{
		kind:     binary.BigEndian.Uint32(b[60:]),
		headerAt: binary.BigEndian.Uint64(b[16:]),
		creator:  string(b[28:32]),
		size:     binary.BigEndian.Uint64(b[48:]),
		chs:      int64(binary.BigEndian.Uint16(b[56:])) * int64(b[58]) * int64(b[59]) * 512,
		id:       identity(b[68:84]),
	}, nil
}

// sumMatches checks the checksum that stands at b[at:].
func sumMatches(b []byte, at int) bool {
	var sum uint32
	for i, v := range b {
		if i < at || i >= at+4 {
			sum += uint32(v)
		}
	}
	return binary.BigEndian.Uint32(b[at:]) == ^sum
}

// readFooter returns the footer at the file's end or, where that is damaged or
// cut off, the copy at its start.
func readFooter(f *os.File, fileSize int64) (footer, error) {
	if fileSize < footerSize {
		return footer{}, fmt.Errorf("%w: %s is shorter than a vhd footer", image.ErrNotImage, f.Name())
	}
	ft, err := footerAt(f, fileSize-footerSize)
	if err != nil {
		first, firstErr := footerAt(f, 0)
		if firstErr == nil && first.kind != kindFixed {
			ft, err = first, nil
		} else if errors.Is(firstErr, image.ErrCorrupt) {
			err = firstErr // a damaged copy says more than a missing footer
		}
	}
	if err != nil {
		return footer{}, named(f, err)
	}
	if ft.kind != kindFixed && ft.kind != kindDynamic && ft.kind != kindDifferencing {
		return footer{}, fmt.Errorf("%w: %s: vhd of kind %d", image.ErrUnsupported, f.Name(), ft.kind)
	}
	return ft, nil
}

func footerAt(f *os.File, off int64) (footer, error) {
	b := make([]byte, footerSize)
	if err := imgfile.ReadFull(f, b, off); err != nil {
		return footer{}, err
	}
	return parseFooter(b)
}

// diskSize returns the disk's size in bytes; see the package comment.
func (ft footer) diskSize() (int64, error) {
	if (ft.creator == "vpc " || ft.creator == "qemu") && ft.chs > 0 && ft.chs < maxCHS {
		return ft.chs, nil
	}
	if ft.size > uint64(image.MaxSize) {
		return 0, fmt.Errorf("%w: a disk of %d bytes", image.ErrCorrupt, ft.size)
	}
	return int64(ft.size), nil
}

// header is what counts of a dynamic disk header.
type header struct {
	tableAt   uint64
	entries   uint32
	blockSize uint32
	parent    parentRef
}

// readHeader reads the dynamic disk header at off.
func readHeader(f *os.File, off uint64) (header, error) {
	if off > uint64(image.MaxSize) {
		return header{}, corrupt(f, "its dynamic header is at byte %d", off)
	}
	b := make([]byte, headerSize)
	if err := imgfile.ReadFull(f, b, int64(off)); err != nil {
		return header{}, err
	}
	if string(b[:8]) != headerCookie || !sumMatches(b, 36) {
		return header{}, corrupt(f, "its dynamic header at byte %d is damaged", off)
	}
	return header{
		tableAt:   binary.BigEndian.Uint64(b[16:]),
		entries:   binary.BigEndian.Uint32(b[28:]),
		blockSize: binary.BigEndian.Uint32(b[32:]),
		parent:    parseParentRef(b),
	}, nil
}
