// Package vmdk reads VMware virtual disks and writes stream-optimized ones.
//
// # On-disk format
//
// An image is a text descriptor and one or more extents that follow each other
// on the disk. All numbers are little-endian and count sectors of 512 bytes.
// The descriptor is a file of its own that names its extent files
// (monolithicFlat, twoGbMaxExtentFlat, twoGbMaxExtentSparse, vmfs), or it is
// embedded in the one sparse extent that is the image (monolithicSparse,
// streamOptimized). An extent is
//
//   - flat: its bytes as they are in a file, from an offset on; in a disk from
//     an ESXi datastore (kind VMFS) from the start on;
//   - zero: it reads as zeros and has no file;
//   - sparse: a [header], a grain directory, grain tables of 512 entries and
//     grains of 64 KiB. A directory entry is the sector of a table, a table
//     entry the sector of a grain; 0 means that there is none, and where the
//     header allows it a table entry of 1 means a grain of zeros.
//
// In a stream-optimized extent each grain is a marker (grain's first sector on
// the disk, 8 bytes; compressed length, 4 bytes) and a zlib stream, padded to a
// sector. Tables, directory, footer and end of stream have markers of a whole
// sector. The footer is the header again with the directory's place filled in.
//
// Source: VMware, Virtual Disk Format 5.0 (technical note, 2011).
//
// # Limits
//
// Disks that depend on a parent, ESXi's sparse kinds of extents (VMFSSPARSE,
// SESPARSE), raw devices (VMFSRAW, VMFSRDM) and encrypted disks are refused with [image.ErrUnsupported]. So are extents that
// their descriptor calls NOACCESS. Files outside the image's folder need
// [image.OpenOptions] AllowOutside. A grain, table or flat extent past
// the end of its file is [image.ErrCorrupt], never zeros.
//
// The header's mark of an unclean shutdown is no reason to refuse: the last
// writer did not close the image, as in every copy of a running machine's
// disk. Its tables are updated in place and every entry is checked against the
// file here, so what is read is what the crashed writer had stored.
//
// Nothing is allocated by the image's numbers: directories and tables are read
// in pieces of 2 KiB through a cache of at most 4 MiB an image, and one of at most
// 16 inflated grains serves small reads.
package vmdk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"sort"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/internal/imgfile"
)

const (
	sectorSize = 512

	textMagic   = "# Disk DescriptorFile"
	sparseMagic = "KDMV"
	cowdMagic   = "COWD" // sparse extents of ESX and of VMware 3
)

// Match reports whether a file that starts with head is a VMDK: a sparse extent
// or a text descriptor. 32 bytes are enough.
func Match(head []byte) bool {
	return bytes.HasPrefix(head, []byte(sparseMagic)) || bytes.HasPrefix(head, []byte(cowdMagic)) ||
		bytes.HasPrefix(head, []byte(textMagic))
}

// Image is an open VMDK, an [image.DiskCloser]. It is read-only and safe for
// use by several goroutines; Close must come last.
type Image struct {
	spans []span
	size  int64
}

// span is an extent and its place on the disk.
type span struct {
	extent
	start, end int64
}

// extent is one piece of a disk, with offsets from its own start.
type extent interface {
	// readAt fills p from off on; the range lies inside the extent.
	readAt(p []byte, off int64) error
	// extents is image.Disk's, for a range inside the extent.
	extents(ctx context.Context, off, length int64) iter.Seq2[image.Extent, error]
	io.Closer
}

// Open opens the image in f and the extent files that it names. It takes
// ownership of f, also when it fails.
func Open(f *os.File, o image.OpenOptions) (*Image, error) {
	m := &Image{}
	if err := m.open(f, o); err != nil {
		err = errors.Join(err, m.Close())
		f.Close() // once more if it is an extent, which does no harm
		return nil, fmt.Errorf("vmdk %s: %w", f.Name(), err)
	}
	return m, nil
}

func (m *Image) open(f *os.File, o image.OpenOptions) error {
	file, err := imgfile.NewFile(f)
	if err != nil {
		return err
	}
	head := make([]byte, min(int64(len(textMagic)), file.Size))
	if err := imgfile.ReadFull(f, head, 0); err != nil {
		return err
	}
	switch {
	case bytes.HasPrefix(head, []byte(sparseMagic)):
		return m.openMonolithic(file)
	case bytes.HasPrefix(head, []byte(textMagic)):
		return m.openDescribed(file, o)
	case bytes.HasPrefix(head, []byte(cowdMagic)):
		return fmt.Errorf("%w: COWD sparse extent of ESX", image.ErrUnsupported)
	}
	return fmt.Errorf("%w: no VMDK magic", image.ErrNotImage)
}

// openMonolithic opens an image whose descriptor is embedded in its one extent.
func (m *Image) openMonolithic(f imgfile.File) error {
	s, err := openSparse(f, newCaches())
	if err != nil {
		return err
	}
	m.add(s, s.size)
	if s.descriptorLen == 0 {
		return fmt.Errorf("%w: one extent of a split disk; open its descriptor file instead", image.ErrUnsupported)
	}
	d, err := readDescriptor(f, s.descriptor, s.descriptorLen)
	if err != nil {
		return err
	}
	if err := d.check("monolithicSparse", "streamOptimized"); err != nil {
		return err
	}
	if len(d.extents) != 1 {
		return fmt.Errorf("%w: embedded descriptor with %d extents", image.ErrUnsupported, len(d.extents))
	}
	return nil
}

// openDescribed opens the extents that the descriptor file f names, and closes f.
func (m *Image) openDescribed(f imgfile.File, o image.OpenOptions) error {
	d, err := readDescriptor(f, 0, f.Size)
	if err != nil {
		return err
	}
	if err := d.check("monolithicFlat", "twoGbMaxExtentFlat", "twoGbMaxExtentSparse", "vmfs"); err != nil {
		return err
	}
	c := newCaches()
	for _, line := range d.extents {
		e, err := openExtent(f.Name(), line, c, o)
		if err != nil {
			return err
		}
		m.add(e, line.size)
		if m.size > image.MaxSize {
			return fmt.Errorf("%w: larger than %d bytes", image.ErrUnsupported, image.MaxSize)
		}
	}
	return f.Close()
}

func openExtent(imagePath string, line extentLine, c *caches, o image.OpenOptions) (extent, error) {
	if line.kind == kindZero {
		return zeros{}, nil
	}
	opened, err := image.OpenReferenced(imagePath, line.name, o.AllowOutside)
	if err != nil {
		return nil, err
	}
	f, err := imgfile.NewFile(opened)
	if err != nil {
		opened.Close()
		return nil, err
	}
	var e extent
	if line.kind == kindSparse {
		e, err = openSparsePart(f, line.size, c)
	} else {
		e, err = openFlat(f, line.offset, line.size)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("extent %s: %w", line.name, err)
	}
	return e, nil
}

func (m *Image) add(e extent, size int64) {
	m.spans = append(m.spans, span{e, m.size, m.size + size})
	m.size += size
}

// Size implements [image.Disk].
func (m *Image) Size() int64 { return m.size }

// find returns the number of the span that holds off.
func (m *Image) find(off int64) int {
	return sort.Search(len(m.spans), func(i int) bool { return off < m.spans[i].end })
}

// ReadAt implements [image.Disk].
func (m *Image) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("vmdk: read at negative offset %d", off)
	}
	_, length := image.Clip(off, int64(len(p)), m.size)
	done := int64(0)
	for i := m.find(off); done < length; i++ {
		s := m.spans[i]
		at := off + done
		n := min(length-done, s.end-at)
		if err := s.readAt(p[done:done+n], at-s.start); err != nil {
			return int(done), fmt.Errorf("vmdk: read at offset %d: %w", at, err)
		}
		done += n
	}
	if done < int64(len(p)) {
		return int(done), io.EOF
	}
	return int(done), nil
}

// Extents implements [image.Disk]. Sparse extents
// answer from their tables, flat ones from the holes of their files. A map
// that points past the end of a file is an error that wraps [image.ErrCorrupt].
func (m *Image) Extents(ctx context.Context, off, length int64) iter.Seq2[image.Extent, error] {
	return func(yield func(image.Extent, error) bool) {
		off, length := image.Clip(off, length, m.size)
		end := off + length
		for i := m.find(off); off < end; i++ {
			s := m.spans[i]
			n := min(end, s.end) - off
			for e, err := range s.extents(ctx, off-s.start, n) {
				if err != nil {
					yield(image.Extent{}, fmt.Errorf("vmdk: map: %w", err))
					return
				}
				e.Off += s.start
				if !yield(e, nil) {
					return
				}
			}
			off += n
		}
	}
}

// Close closes the image's files.
func (m *Image) Close() error {
	var errs []error
	for _, s := range m.spans {
		errs = append(errs, s.Close())
	}
	return errors.Join(errs...)
}
