// Package imgfile is what the readers and writers of image formats share about
// the files below them: exact reads, holes, sparse writes, and bounded caches of
// pages ([Cache]) and of what is made from them ([LRU]).
package imgfile

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/image"
)

// page is the unit of holes, that of the usual file systems.
const page = 4 << 10

// Size returns the size in bytes of a regular file or a block device. The
// error for a folder, a pipe or another kind of file wraps
// [image.ErrUnsupported].
func Size(f *os.File) (int64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	if !info.Mode().IsRegular() && !IsBlockDevice(info.Mode()) {
		return 0, fmt.Errorf("%w: %s is neither a regular file nor a block device", image.ErrUnsupported, f.Name())
	}
	return f.Seek(0, io.SeekEnd)
}

// IsBlockDevice reports whether mode is that of a block device.
func IsBlockDevice(mode os.FileMode) bool {
	return mode&os.ModeDevice != 0 && mode&os.ModeCharDevice == 0
}

// File is a file with the size that it had when it was opened, in bytes.
type File struct {
	*os.File
	Size int64
}

// NewFile returns f with its size; see [Size].
func NewFile(f *os.File) (File, error) {
	size, err := Size(f)
	return File{f, size}, err
}

// Has checks that n bytes at off lie inside the file. The error wraps
// [image.ErrCorrupt].
func (f File) Has(off, n int64) error {
	if off < 0 || n < 0 || off > f.Size || n > f.Size-off {
		return fmt.Errorf("%w: %s ends at byte %d, before the %d bytes at %d", image.ErrCorrupt, f.Name(), f.Size, n, off)
	}
	return nil
}

// ReadFull is [image.ReadFull] for the file below an image: one that ends
// before the bytes do is an error that wraps [image.ErrCorrupt].
func ReadFull(f *os.File, p []byte, off int64) error {
	err := image.ReadFull(f, p, off)
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: %s ends before or inside the %d bytes at %d", image.ErrCorrupt, f.Name(), len(p), off)
	}
	return err
}

// Extents yields what the file system says of [off, off+length) of f, in
// order and without gaps: its holes are zero. A file system or device that
// cannot tell has only data. Where the file ends before the range does, for
// it was cut after it was opened, the error wraps [image.ErrCorrupt].
func Extents(ctx context.Context, f *os.File, off, length int64) iter.Seq2[image.Extent, error] {
	return func(yield func(image.Extent, error) bool) {
		for end := off + length; off < end; {
			if err := ctx.Err(); err != nil {
				yield(image.Extent{}, err)
				return
			}
			e, err := extentAt(f, off, end)
			if !yield(e, err) || err != nil {
				return
			}
			off = e.End()
		}
	}
}

// ExtentsAt yields the extents of the length bytes at place of f as those of
// a disk that has these bytes at off.
func ExtentsAt(ctx context.Context, f *os.File, place, length, off int64) iter.Seq2[image.Extent, error] {
	return func(yield func(image.Extent, error) bool) {
		for e, err := range Extents(ctx, f, place, length) {
			e.Off += off - place
			if !yield(e, err) || err != nil {
				return
			}
		}
	}
}

// extentAt returns the extent that starts at off, clipped to end.
func extentAt(f *os.File, off, end int64) (image.Extent, error) {
	data, err := f.Seek(off, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO): // no data from off to the end of the file
		size, err := f.Seek(0, io.SeekEnd)
		if err != nil {
			return image.Extent{}, err
		}
		if size < end {
			return image.Extent{}, fmt.Errorf("%w: %s was cut to %d bytes while it was read", image.ErrCorrupt, f.Name(), size)
		}
		data = end
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOTSUP):
		return image.Extent{Off: off, Len: end - off}, nil
	case err != nil:
		return image.Extent{}, err
	}
	if data > off {
		return image.Extent{Off: off, Len: min(data, end) - off, Zero: true}, nil
	}
	hole, err := f.Seek(off, unix.SEEK_HOLE)
	if err != nil {
		return image.Extent{}, err
	}
	if hole <= off { // punched since the first question: reading it is right anyway
		hole = off + page
	}
	return image.Extent{Off: off, Len: min(hole, end) - off}, nil
}

// WriteSparse writes p at off, apart from its pages (4 KiB, counted from p's
// start) that are all zeros: those stay holes of a new file. Neighbouring
// pages go out in one write.
func WriteSparse(w io.WriterAt, p []byte, off int64) error {
	for start := 0; start < len(p); {
		n := dataPages(p[start:])
		if n == 0 {
			start += page
			continue
		}
		if _, err := w.WriteAt(p[start:start+n], off+int64(start)); err != nil {
			return err
		}
		start += n
	}
	return nil
}

// dataPages returns the length of the pages at p's start that have data.
func dataPages(p []byte) int {
	n := 0
	for n < len(p) && !image.IsZero(p[n:min(n+page, len(p))]) {
		n = min(n+page, len(p))
	}
	return n
}
