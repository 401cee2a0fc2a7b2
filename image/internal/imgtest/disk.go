package imgtest

import (
	"bytes"
	"context"
	"io"
	"iter"
	"maps"
	"slices"

	"github.com/holdfast-backup/holdfast/image"
)

// Disk returns an [image.Disk] of these bytes; its pages of zeros are its zero
// extents.
func Disk(data []byte) image.Disk { return memory{bytes.NewReader(data), data} }

type memory struct {
	*bytes.Reader
	data []byte
}

func (m memory) Extents(_ context.Context, off, length int64) iter.Seq2[image.Extent, error] {
	off, length = image.Clip(off, length, m.Size())
	return func(yield func(image.Extent, error) bool) {
		for end := off + length; off < end; {
			next := min(end, off-off%page+page)
			if !yield(image.Extent{Off: off, Len: next - off, Zero: image.IsZero(m.data[off:next])}, nil) {
				return
			}
			off = next
		}
	}
}

// Sparse is an [image.Disk], as large as need be, with data at a few offsets.
type Sparse struct {
	Bytes int64            // the disk's size
	Data  map[int64][]byte // by offset; the pieces do not overlap
}

// Size implements [image.Disk].
func (d Sparse) Size() int64 { return d.Bytes }

// ReadAt implements [image.Disk].
func (d Sparse) ReadAt(p []byte, off int64) (int, error) {
	_, n := image.Clip(off, int64(len(p)), d.Bytes)
	clear(p)
	for at, data := range d.Data {
		if start, end := max(at, off), min(at+int64(len(data)), off+n); start < end {
			copy(p[start-off:end-off], data[start-at:])
		}
	}
	if int(n) < len(p) {
		return int(n), io.EOF
	}
	return len(p), nil
}

// Extents implements [image.Disk]: the pieces are data.
func (d Sparse) Extents(_ context.Context, off, length int64) iter.Seq2[image.Extent, error] {
	return func(yield func(image.Extent, error) bool) {
		off, length := image.Clip(off, length, d.Bytes)
		end := off + length
		for _, at := range slices.Sorted(maps.Keys(d.Data)) {
			start, stop := max(at, off), min(at+int64(len(d.Data[at])), end)
			if start >= stop {
				continue
			}
			if start > off && !yield(image.Extent{Off: off, Len: start - off, Zero: true}, nil) ||
				!yield(image.Extent{Off: start, Len: stop - start}, nil) {
				return
			}
			off = stop
		}
		if off < end {
			yield(image.Extent{Off: off, Len: end - off, Zero: true}, nil)
		}
	}
}

// Failing is a disk of which no byte at or behind From can be read.
type Failing struct {
	image.Disk
	From int64
	Err  error
}

// ReadAt implements [image.Disk].
func (d Failing) ReadAt(p []byte, off int64) (int, error) {
	if off+int64(len(p)) > d.From {
		return 0, d.Err
	}
	return d.Disk.ReadAt(p, off)
}
