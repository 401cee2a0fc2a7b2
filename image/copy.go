package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync"
	"unsafe"

	"golang.org/x/sync/errgroup"
)

// WriteOptions are what every writer of an image format takes.
type WriteOptions struct {
	// Progress, if set, is called with the number of bytes of the disk that
	// are done since the last call, zeros included; from several goroutines.
	Progress func(n int64)
}

// Report calls Progress if it is set.
func (o WriteOptions) Report(n int64) {
	if o.Progress != nil {
		o.Progress(n)
	}
}

// ForEachData reads a disk's data in parallel: it calls fn for every block
// (blockSize bytes, aligned, the disk's last one maybe shorter) that has at
// least one byte that is not zero, from a few goroutines at once and in no
// order. p is fn's only until it returns. report is told of every byte of the disk once,
// as it is done. Blocks that read as zeros are passed over. Memory is twice the number of
// processors times blockSize.
func ForEachData(ctx context.Context, d Disk, blockSize int64, report func(n int64), fn func(off int64, p []byte) error) error {
	if blockSize <= 0 {
		panic(fmt.Sprintf("image: internal error: block size %d", blockSize))
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(2 * runtime.GOMAXPROCS(0))
	buffers := sync.Pool{New: func() any { b := make([]byte, blockSize); return &b }}
	block := func(off int64) error {
		b := buffers.Get().(*[]byte)
		defer buffers.Put(b)
		p := (*b)[:min(blockSize, d.Size()-off)]
		if err := ReadFull(d, p, off); err != nil {
			return err
		}
		if !IsZero(p) {
			if err := fn(off, p); err != nil {
				return err
			}
		}
		report(int64(len(p)))
		return nil
	}
	next := int64(0) // the first byte not yet given to a worker or reported
	walk := func() error {
		for e, err := range Coalesce(d.Extents(ctx, 0, d.Size())) {
			if err != nil {
				return err
			}
			if e.Zero {
				continue
			}
			first := e.Off - e.Off%blockSize
			if first > next {
				report(first - next)
				next = first
			}
			for ; next < e.End(); next = min(next+blockSize, d.Size()) {
				if err := ctx.Err(); err != nil {
					return err
				}
				off := next
				g.Go(func() error { return block(off) })
			}
		}
		report(d.Size() - next)
		return nil
	}
	walkErr := walk()
	if err := g.Wait(); err != nil {
		return err // the workers' error is the cause; the walk saw only the cancelled context
	}
	return walkErr
}

// ReadFull reads len(p) bytes at off, which must lie inside the disk.
func ReadFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil // io.EOF beside a full read is no error
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("read %d bytes at offset %d: %w", len(p), off, err)
}

// IsZero reports whether p holds only zeros. It reads 32 bytes a step.
func IsZero(p []byte) bool {
	for len(p) >= 32 {
		w := (*[4]uint64)(unsafe.Pointer(unsafe.SliceData(p)))
		if w[0]|w[1]|w[2]|w[3] != 0 {
			return false
		}
		p = p[32:]
	}
	var rest byte
	for _, b := range p {
		rest |= b
	}
	return rest == 0
}
