package blockstore

import (
	"context"
	"fmt"
	"io"
	"iter"
	"os"
	"sync/atomic"

	"github.com/holdfast-backup/holdfast/image"
)

// DiskOptions say how a disk will be read. The zero value serves random reads.
type DiskOptions struct {
	// Whole is for reading a disk once from end to end, such as a restore: the
	// hash of every chunk is checked, and chunks are not kept in the cache.
	Whole bool
}

// Disk is one disk of a restore point. It is safe for concurrent use and
// must be closed. It implements [image.Disk].
type Disk struct {
	r      *Repository
	m      Map
	o      DiskOptions
	label  string
	closed atomic.Bool
}

// Size returns the disk's size in bytes.
func (d *Disk) Size() int64 { return d.m.Size }

// Map returns the map that the disk reads.
func (d *Disk) Map() Map { return d.m }

// Close lets a collection have what no point needs any more.
func (d *Disk) Close() error {
	d.unpin()
	return nil
}

func (d *Disk) unpin() {
	if !d.closed.Swap(true) {
		d.r.unpin(d.m)
	}
}

// Extents yields data and zeros in whole chunks. See [image.Disk].
func (d *Disk) Extents(ctx context.Context, off, length int64) iter.Seq2[image.Extent, error] {
	return func(yield func(image.Extent, error) bool) {
		off, length := image.Clip(off, length, d.m.Size)
		for e, err := range image.Coalesce(func(yield func(image.Extent, error) bool) {
			d.r.walk(ctx, d.r.tree(d.m), 0, off, off+length, yield)
		}) {
			if err != nil {
				err = fmt.Errorf("%s: %w", d.label, err)
			}
			if !yield(e, err) {
				return
			}
		}
	}
}

// ReadAt reads from the disk; see [io.ReaderAt]. The error for bytes that
// can't be had names the disk, the offset and the segment, and wraps
// [ErrDamaged].
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	if d.closed.Load() {
		return 0, fmt.Errorf("%s: %w", d.label, os.ErrClosed)
	}
	if off < 0 {
		return 0, fmt.Errorf("%s: read at offset %d", d.label, off)
	}
	if off >= d.m.Size {
		return 0, io.EOF
	}
	var end error
	if int64(len(p)) > d.m.Size-off {
		p, end = p[:d.m.Size-off], io.EOF
	}
	chunkSize := int64(d.r.chunkSize)
	var leaf Node
	leafIndex := int64(-1)
	for n := 0; n < len(p); {
		at := off + int64(n)
		if i := at / d.r.LeafSpan(); i != leafIndex {
			var err error
			if leaf, err = d.r.Leaf(d.m, i); err != nil {
				return n, fmt.Errorf("%s, offset %d: %w", d.label, at, err)
			}
			leafIndex = i
		}
		within := at % chunkSize
		part := p[n:min(len(p), n+int(chunkSize-within))]
		var id ID
		if leaf != nil {
			id = leaf.Child(int(at / chunkSize % Fanout))
		}
		if err := d.readChunk(part, id, within); err != nil {
			return n, fmt.Errorf("%s, offset %d: %w", d.label, at, err)
		}
		n += len(part)
	}
	return len(p), end
}

// readChunk fills p from a chunk, starting within it.
func (d *Disk) readChunk(p []byte, id ID, within int64) error {
	if id.IsNull() {
		clear(p)
		return nil
	}
	if d.o.Whole {
		if len(p) == d.r.chunkSize {
			_, err := d.r.load(id, chunkRecord, p, true)
			return err
		}
		data, err := d.r.load(id, chunkRecord, make([]byte, d.r.chunkSize), true)
		if err == nil {
			copy(p, data[within:])
		}
		return err
	}
	data, err := d.r.cache.get(id, func() ([]byte, error) {
		return d.r.load(id, chunkRecord, make([]byte, d.r.chunkSize), false)
	})
	if err == nil {
		copy(p, data[within:])
	}
	return err
}
