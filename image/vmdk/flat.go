package vmdk

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

// file is one file of an image with the length it had when it was opened.
type file struct {
	*os.File
	size int64
}

func newFile(f *os.File) (file, error) {
	size, err := f.Seek(0, io.SeekEnd) // block devices too; Stat says 0 for them
	return file{f, size}, err
}

// has checks that n bytes from off on lie inside the file.
func (f file) has(off, n int64) error {
	if off < 0 || n < 0 || off > f.size || n > f.size-off {
		return fmt.Errorf("%w: %s ends at byte %d, before the %d bytes at %d", image.ErrCorrupt, f.Name(), f.size, n, off)
	}
	return nil
}

// read fills p from off on.
func (f file) read(p []byte, off int64) error {
	if err := f.has(off, int64(len(p))); err != nil {
		return err
	}
	n, err := f.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if errors.Is(err, io.EOF) {
		err = fmt.Errorf("%w: %s became shorter while it was open", image.ErrCorrupt, f.Name())
	}
	return err
}

// flat is an extent whose bytes lie in a file as they are, from start on.
type flat struct {
	file
	start int64
}

// openFlat takes ownership of f only when it succeeds.
func openFlat(f file, start, size int64) (*flat, error) {
	if err := f.has(start, size); err != nil {
		return nil, err
	}
	return &flat{f, start}, nil
}

func (e *flat) readAt(p []byte, off int64) error { return e.read(p, e.start+off) }

// extents yields the data and the holes that the file system knows of.
func (e *flat) extents(ctx context.Context, off, length int64) iter.Seq2[image.Extent, error] {
	return func(yield func(image.Extent, error) bool) {
		for end := off + length; off < end; {
			if err := ctx.Err(); err != nil {
				yield(image.Extent{}, err)
				return
			}
			data, hole, err := nextData(e.File, e.start+off, e.start+end)
			if err != nil {
				yield(image.Extent{}, err)
				return
			}
			data, hole = data-e.start, hole-e.start
			if data > off && !yield(image.Extent{Off: off, Len: data - off, Zero: true}, nil) {
				return
			}
			if hole > data && !yield(image.Extent{Off: data, Len: hole - data}, nil) {
				return
			}
			off = hole
		}
	}
}

// nextData returns the first range [data, hole) of f that holds data within
// [off, end), empty at end if there is none. Seeking is safe beside other
// goroutines' reads and seeks: all reads name their offset.
func nextData(f *os.File, off, end int64) (data, hole int64, err error) {
	data, err = f.Seek(off, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO):
		return end, end, nil
	case errors.Is(err, unix.EINVAL): // a block device or a file system without holes
		return off, end, nil
	case err != nil:
		return 0, 0, err
	case data >= end:
		return end, end, nil
	}
	hole, err = f.Seek(data, unix.SEEK_HOLE)
	if err != nil {
		return 0, 0, err
	}
	return data, min(hole, end), nil
}

// zeros is an extent without a file.
type zeros struct{}

func (zeros) readAt(p []byte, _ int64) error {
	clear(p)
	return nil
}

func (zeros) extents(_ context.Context, off, length int64) iter.Seq2[image.Extent, error] {
	return func(yield func(image.Extent, error) bool) {
		yield(image.Extent{Off: off, Len: length, Zero: true}, nil)
	}
}

func (zeros) Close() error { return nil }
