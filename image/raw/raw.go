// Package raw reads and writes disks as plain bytes: regular files and block
// devices.
//
// # Format
//
// Byte n of the file is byte n of the disk. There is no header, and any file
// is a raw disk; the size is the file's. Holes of the file are the disk's zero
// extents.
//
// # Limits
//
// The size is taken when the file is opened. A file that grows keeps it; one
// that shrinks fails with [image.ErrCorrupt] where bytes are missing.
package raw

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/internal/imgfile"
)

// Image is a raw disk in a file or on a block device.
type Image struct {
	f    *os.File
	size int64
}

// Open returns f's bytes as a disk. It takes ownership of f, also when it
// fails. The options have no meaning here: a raw disk refers to nothing.
func Open(f *os.File, _ image.OpenOptions) (*Image, error) {
	size, err := imgfile.Size(f)
	if err == nil && size > image.MaxSize {
		err = fmt.Errorf("%w: %s has %d bytes, more than the largest disk, %d", image.ErrUnsupported, f.Name(), size, image.MaxSize)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return &Image{f: f, size: size}, nil
}

// Size implements [image.Disk].
func (im *Image) Size() int64 { return im.size }

// Close closes the file.
func (im *Image) Close() error { return im.f.Close() }

// ReadAt implements [image.Disk].
func (im *Image) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, errors.New("raw: negative offset")
	}
	_, n := image.Clip(off, int64(len(p)), im.size)
	if err := imgfile.ReadFull(im.f, p[:n], off); err != nil {
		return 0, err
	}
	if int(n) < len(p) {
		return int(n), io.EOF
	}
	return len(p), nil
}

// Extents implements [image.Disk]: holes of the file are zero. Where the file
// system or the device has no notion of holes, all is data.
func (im *Image) Extents(ctx context.Context, off, length int64) iter.Seq2[image.Extent, error] {
	off, length = image.Clip(off, length, im.size)
	return imgfile.Extents(ctx, im.f, off, length)
}
