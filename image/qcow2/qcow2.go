// Package qcow2 reads and writes QEMU's image format qcow2.
//
// # On-disk format
//
// A file is an array of clusters of 512 bytes to 2 MiB; all numbers are big
// endian. The first cluster holds the header (see header.go). It points to
// the L1 table, whose entries point to L2 tables of one cluster each, whose
// entries describe one guest cluster each:
//
//	L1 entry   bits 9–55   offset of an L2 table, 0: none
//	L2 entry   bit  0      the cluster reads as zeros (version 3)
//	           bits 9–55   offset of the cluster in the file, 0: none
//	           bit  62     compressed: bits 0–61 are a descriptor, see compress.go
//	           bit  63     the reference count is exactly one (writers only)
//
// An extended L2 entry is followed by 64 bits about the 32 subclusters of its
// cluster: bits 0–31 say which are allocated, bits 32–63 which read as zeros.
// What is neither comes from the backing file, and beyond it reads as zeros.
// Reference counts matter to writers alone; the reader does not look at them.
//
// Source: QEMU docs/interop/qcow2.txt.
//
// # Invariants
//
//   - Bytes that the tables place beyond the end of the file are an error, never
//     zeros. QEMU pads such reads with zeros; yet all that it writes lies
//     inside the file, up to the end of the disk.
//   - Nothing but the image's own file and the one that it names as its backing file
//     is read.
//
// # Concurrency
//
// An [Image] may be read from many goroutines at once.
//
// # Limits
//
// The L1 table has at most 32 MiB, as in QEMU. An open image holds it, and caches of
// at most 8 MiB of L2 tables and 8 MiB of decompressed clusters.
package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/internal/imgfile"
)

const (
	magic = "QFI\xfb"

	minClusterBits = 9
	maxClusterBits = 21
	maxL1Bytes     = 32 << 20
	cacheBytes     = 8 << 20

	subclusters = 32 // of a cluster with an extended L2 entry

	offsetMask     = 0x00ff_ffff_ffff_fe00 // bits 9–55 of an L1 or L2 entry
	flagZero       = 1 << 0
	flagCompressed = 1 << 62
	flagCopied     = 1 << 63
)

// Match reports whether head, the first bytes of a file, is that of a qcow2
// image. It needs 4 bytes.
func Match(head []byte) bool { return bytes.HasPrefix(head, []byte(magic)) }

// Image is an open qcow2 image with its backing files: an [image.DiskCloser].
type Image struct {
	header
	file     *os.File
	fileSize int64
	sparse   bool             // the file has holes worth asking for
	backing  image.DiskCloser // nil if there is none
	l1       []byte           // entries for the whole disk, as in the file
	tables   *blockCache      // L2 tables by offset
	clusters *blockCache      // decompressed clusters by descriptor
}

type blockCache = imgfile.LRU[uint64, []byte]

// Open opens the image in f, with its backing files. It takes ownership of f,
// also when it fails. Errors wrap [image.ErrNotImage], [image.ErrUnsupported]
// (encryption, external data files, unknown features, images that were not
// closed cleanly) or [image.ErrCorrupt].
func Open(f *os.File, o image.OpenOptions) (*Image, error) {
	m := &Image{file: f}
	if err := m.open(o); err != nil {
		f.Close()
		return nil, err
	}
	return m, nil
}

func (m *Image) open(o image.OpenOptions) (err error) {
	if m.fileSize, err = imgfile.Size(m.file); err != nil {
		return err
	}
	if m.header, err = readHeader(m.file, m.fileSize); err != nil {
		return err
	}
	if m.sparse, err = isSparse(m.file, m.fileSize, m.clusterSize()); err != nil {
		return err
	}
	m.l1 = make([]byte, 8*m.l1Entries)
	if err := imgfile.ReadFull(m.file, m.l1, m.l1Offset); err != nil {
		return fmt.Errorf("read the L1 table of %s: %w", m.name, err)
	}
	blocks := max(4, int(cacheBytes/m.clusterSize()))
	m.tables = imgfile.NewLRU[uint64, []byte](blocks)
	m.clusters = imgfile.NewLRU[uint64, []byte](blocks)
	if m.backingName != "" {
		m.backing, err = m.openBacking(o)
	}
	return err
}

// openBacking opens the file that the header names. Names with a protocol, such as
// "nbd://host/disk" and "json:{…}", are QEMU's own world.
func (m *Image) openBacking(o image.OpenOptions) (image.DiskCloser, error) {
	if o.OpenBacking == nil {
		return nil, fmt.Errorf("%w: %s has the backing file %q", image.ErrUnsupported, m.name, m.backingName)
	}
	path := strings.TrimPrefix(m.backingName, "file:")
	if colon := strings.IndexAny(path, ":/"); colon >= 0 && path[colon] == ':' {
		return nil, fmt.Errorf("%w: the backing file %q of %s is not a plain path", image.ErrUnsupported, m.backingName, m.name)
	}
	f, err := image.OpenReferenced(m.name, path, o.AllowOutside)
	if err != nil {
		return nil, fmt.Errorf("backing file of %s: %w", m.name, err)
	}
	backing, err := o.OpenBacking(f, m.backingFormat)
	if err != nil {
		return nil, fmt.Errorf("backing file of %s: %w", m.name, err)
	}
	return backing, nil
}

// Close closes the image and its backing files.
func (m *Image) Close() error {
	err := m.file.Close()
	if m.backing != nil {
		err = errors.Join(err, m.backing.Close())
	}
	return err
}

// Size implements [image.Disk].
func (m *Image) Size() int64 { return m.size }
