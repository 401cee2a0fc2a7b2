package vmdk

import (
	"context"
	"iter"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/internal/imgfile"
)

// flat is an extent whose bytes lie in a file as they are, from start on.
type flat struct {
	imgfile.File
	start int64
}

// openFlat takes ownership of f only when it succeeds.
func openFlat(f imgfile.File, start, size int64) (*flat, error) {
	if err := f.Has(start, size); err != nil {
		return nil, err
	}
	return &flat{f, start}, nil
}

func (e *flat) readAt(p []byte, off int64) error {
	return imgfile.ReadFull(e.File.File, p, e.start+off)
}

// extents yields the data and the holes that the file system knows of.
func (e *flat) extents(ctx context.Context, off, length int64) iter.Seq2[image.Extent, error] {
	return imgfile.ExtentsAt(ctx, e.File.File, e.start+off, length, off)
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
