package blockstore

import (
	"context"
	"fmt"
	"io"
	"iter"
	"os"
	"sync"
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
	closed atomic.Bool // set with r.ahead.mu held

	last  atomic.Pointer[diskLeaf] // the leaf that was read last
	ahead sync.WaitGroup           // chunks that are in the queue of r.ahead, or being read ahead
}

// diskLeaf is a leaf of a disk; nil if it is all zeros.
type diskLeaf struct {
	index int64
	node  Node
}

// Size returns the disk's size in bytes.
func (d *Disk) Size() int64 { return d.m.Size }

// Map returns the map that the disk reads.
func (d *Disk) Map() Map { return d.m }

// Close lets a collection have what no point needs any more. It waits for what
// Prefetch began.
func (d *Disk) Close() error {
	d.unpin()
	return nil
}

func (d *Disk) unpin() {
	d.r.ahead.mu.Lock()
	was := d.closed.Swap(true)
	d.r.ahead.mu.Unlock()
	if !was {
		d.ahead.Wait()
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
	p = p[:len(p):len(p)]
	for n := 0; n < len(p); {
		at := off + int64(n)
		within := at % chunkSize
		part := p[n:min(len(p), n+int(chunkSize-within))]
		id, err := d.chunkAt(at)
		if err == nil {
			err = d.readChunk(part, id, within)
		}
		if err != nil {
			return n, fmt.Errorf("%s, offset %d: %w", d.label, at, err)
		}
		n += len(part)
	}
	return len(p), end
}

// chunkAt returns the id of the chunk that holds the byte at off.
func (d *Disk) chunkAt(off int64) (ID, error) {
	i := off / d.r.LeafSpan()
	leaf := d.last.Load()
	if leaf == nil || leaf.index != i {
		n, err := d.r.Leaf(d.m, i)
		if err != nil {
			return ID{}, err
		}
		leaf = &diskLeaf{i, n}
		d.last.Store(leaf)
	}
	if leaf.node == nil {
		return ID{}, nil
	}
	return leaf.node.Child(int(off / int64(d.r.chunkSize) % Fanout)), nil
}

// readChunk fills p from a chunk, starting within it. What lies in p's capacity
// behind it is undefined afterwards.
func (d *Disk) readChunk(p []byte, id ID, within int64) error {
	if id.IsNull() {
		clear(p)
		return nil
	}
	if d.o.Whole {
		if len(p) == d.r.chunkSize {
			return d.r.load(id, chunkRecord, p, true)
		}
		data := make([]byte, d.r.chunkSize, d.r.chunkSize+decodeSlack)
		err := d.r.load(id, chunkRecord, data, true)
		if err == nil {
			copy(p, data[within:])
		}
		return err
	}
	chunk, err := d.r.chunks.acquire(id, len(p) == d.r.chunkSize)
	if err != nil {
		return err
	}
	copy(p, chunk.data[within:])
	d.r.chunks.release(chunk)
	return nil
}
