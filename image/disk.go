// Package image is the vocabulary of virtual disks: what every part of
// Holdfast reads, stores and serves.
//
// [Disk] is the narrow waist of the product. A hypervisor's snapshot, an image
// file, an NBD export and a restore point are all a Disk: bytes at random
// offsets, a size, and extents that say which ranges hold data and which read
// as zeros. Abilities that only some disks have (writing, trimming, closing)
// are small interfaces of their own, found by type assertion.
//
// The formats of image files live in subpackages, one a format; package
// diskfile opens and writes them by name.
package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
)

// MaxSize is the largest disk that any part accepts, in bytes (1 PiB). Sizes
// come from foreign headers; the limit keeps arithmetic on them and the walk
// over a disk's map bounded.
const MaxSize int64 = 1 << 50

// Errors that image readers return, wrapped with the name of the thing.
var (
	// ErrNotImage means that the bytes are not of the format asked for, or of
	// no format that is known.
	ErrNotImage = errors.New("not a disk image")
	// ErrUnsupported means a valid image that uses a feature Holdfast does not
	// read, such as encryption.
	ErrUnsupported = errors.New("unsupported image feature")
	// ErrCorrupt means an image whose metadata contradicts itself or that is
	// shorter than its metadata says.
	ErrCorrupt = errors.New("corrupt image")
)

// Disk is a disk at one moment: Size bytes at random offsets.
//
// ReadAt follows [io.ReaderAt]: it may be called from many goroutines at once,
// fills p or returns an error, and returns [io.EOF] when a read reaches past
// Size. Ranges that Extents calls zero read as zeros.
type Disk interface {
	io.ReaderAt

	// Size returns the disk's size in bytes, 0 to [MaxSize]. It need not be a
	// multiple of a sector.
	Size() int64

	// Extents yields what [off, off+length) holds, in order and without gaps,
	// clipped to that range and to the disk. Neighbours of the same kind may be
	// yielded apart; see [Coalesce]. An error ends the sequence. A caller
	// may stop early; work is done only as far as it reads.
	Extents(ctx context.Context, off, length int64) iter.Seq2[Extent, error]
}

// Writer is a disk that can be changed. Its methods may be called from many
// goroutines at once. Ranges must lie inside the disk. What calls that overlap
// and run at the same time leave in the overlap is undefined; bytes beside it are
// not touched.
//
// A write that finds no room fails with [syscall.ENOSPC] and leaves the disk
// usable.
type Writer interface {
	Disk
	io.WriterAt

	// Zero makes [off, off+length) read as zeros. It takes no room but for the
	// map, and is quicker than writing zeros.
	Zero(off, length int64) error

	// Trim says that the content of [off, off+length) does not matter any more.
	// Afterwards a byte of it reads as it was or as zero.
	Trim(off, length int64) error

	// Sync makes durable what every call that returned before it began has
	// changed.
	Sync() error
}

// Extent is the half-open byte range [Off, Off+Len) of a disk that is data, or
// reads as zeros.
type Extent struct {
	Off, Len int64
	Zero     bool
}

// End returns the offset of the first byte after the extent.
func (e Extent) End() int64 { return e.Off + e.Len }

// String returns the extent as "data [0, 65536)".
func (e Extent) String() string {
	kind := "data"
	if e.Zero {
		kind = "zero"
	}
	return fmt.Sprintf("%s [%d, %d)", kind, e.Off, e.End())
}

// Coalesce merges neighbouring extents of the same kind.
func Coalesce(seq iter.Seq2[Extent, error]) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		var held Extent
		for e, err := range seq {
			if err != nil {
				if held.Len == 0 || yield(held, nil) {
					yield(Extent{}, err)
				}
				return
			}
			if e.Len == 0 {
				continue
			}
			if held.Len > 0 && held.Zero == e.Zero && held.End() == e.Off {
				held.Len += e.Len
				continue
			}
			if held.Len > 0 && !yield(held, nil) {
				return
			}
			held = e
		}
		if held.Len > 0 {
			yield(held, nil)
		}
	}
}

// Clip returns the part of [off, off+length) that lies inside a disk of the
// given size; a length of 0 means none of it does.
func Clip(off, length, size int64) (int64, int64) {
	if off < 0 || length <= 0 || off >= size {
		return off, 0
	}
	return off, min(length, size-off)
}
