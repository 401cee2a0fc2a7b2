package qcow2

import (
	"context"
	"fmt"
	"io"
	"iter"
	"os"
	"syscall"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/internal/imgfile"
)

// ReadAt implements [image.Disk]. Runs of clusters that are neighbours in the
// file too are read at once.
func (m *Image) ReadAt(p []byte, off int64) (n int, err error) {
	if off < 0 {
		return 0, fmt.Errorf("read %s at negative offset %d", m.name, off)
	}
	_, length := image.Clip(off, int64(len(p)), m.size)
	for int64(n) < length {
		r, err := m.lookup(off+int64(n), off+length)
		if err != nil {
			return n, err
		}
		if err := m.readRun(p[n:][:r.len], r); err != nil {
			return n, err
		}
		n += int(r.len)
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// readRun fills p, which is as long as the run.
func (m *Image) readRun(p []byte, r run) error {
	switch r.kind {
	case kindData:
		return imgfile.ReadFull(m.file, p, r.host)
	case kindCompressed:
		plain, err := m.cluster(r.descriptor)
		if err != nil {
			return err
		}
		copy(p, plain[r.off&(m.clusterSize()-1):])
		return nil
	case kindBacking:
		_, length := image.Clip(r.off, r.len, m.backing.Size())
		clear(p[length:])
		return image.ReadFull(m.backing, p[:length], r.off)
	default:
		clear(p)
		return nil
	}
}

// Extents implements [image.Disk]: the map that `qemu-img map` shows. Parts of
// the disk without L2 tables are passed over at once.
func (m *Image) Extents(ctx context.Context, off, length int64) iter.Seq2[image.Extent, error] {
	return func(yield func(image.Extent, error) bool) {
		off, length := image.Clip(off, length, m.size)
		for end := off + length; off < end; {
			r, err := m.lookup(off, end)
			if err == nil {
				err = ctx.Err()
			}
			if err != nil {
				yield(image.Extent{}, err)
				return
			}
			for e, err := range m.runExtents(ctx, r) {
				if !yield(e, err) || err != nil {
					return
				}
			}
			off = r.end()
		}
	}
}

func (m *Image) runExtents(ctx context.Context, r run) iter.Seq2[image.Extent, error] {
	switch {
	case r.kind == kindBacking:
		return m.backingExtents(ctx, r)
	case r.kind == kindData && m.sparse:
		return imgfile.ExtentsAt(ctx, m.file, r.host, r.len, r.off)
	default:
		return func(yield func(image.Extent, error) bool) {
			yield(image.Extent{Off: r.off, Len: r.len, Zero: r.kind == kindZero}, nil)
		}
	}
}

// backingExtents yields what the backing file has of the run, and zeros after
// its end.
func (m *Image) backingExtents(ctx context.Context, r run) iter.Seq2[image.Extent, error] {
	return func(yield func(image.Extent, error) bool) {
		_, length := image.Clip(r.off, r.len, m.backing.Size())
		for e, err := range m.backing.Extents(ctx, r.off, length) {
			if !yield(e, err) || err != nil {
				return
			}
		}
		if length < r.len {
			yield(image.Extent{Off: r.off + length, Len: r.len - length, Zero: true}, nil)
		}
	}
}

// isSparse reports whether a file has so many holes that its clusters must have been
// allocated in advance, without being written (preallocation=metadata). We
// then take its holes for zeros; in other images asking for holes would cost
// more than it finds. QEMU does the same but counts only clusters in use, so
// that we may find holes in a file with many free clusters where it does not.
//
// Source: QEMU block/qcow2-refcount.c, qcow2_detect_metadata_preallocation.
func isSparse(f *os.File, fileSize, clusterSize int64) (bool, error) {
	info, err := f.Stat()
	if err != nil {
		return false, err
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok || !info.Mode().IsRegular() {
		return false, nil
	}
	clusters := (fileSize + clusterSize - 1) / clusterSize
	written := stat.Blocks * 512 / clusterSize
	return clusters >= max(written*10/9, written+2), nil
}
