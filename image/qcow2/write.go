package qcow2

import (
	"context"
	"fmt"
	"io"
	"os"
	"sync"

	"github.com/holdfast-backup/holdfast/image"
)

// Images are written with clusters of 64 KiB and reference counts of 16 bits,
// QEMU's defaults.
const (
	writeBits     = 16
	writeCluster  = 1 << writeBits
	writeBlock    = 16 * writeCluster // what is read and written at once
	countBits     = 4                 // 2^4 bits a reference count
	countsInBlock = writeCluster / 2
)

// Write writes disk d as a qcow2 image of version 3 into f, an empty regular
// file, which stays open and is not synced. The size of the disk is rounded
// up to a multiple of 512 bytes, since QEMU drops what is beyond one. Clusters of zeros take
// no space. Memory is that of [image.ForEachData] and 16 KiB a TiB of disk.
//
// The file is laid out as header, L1 table, clusters of data and L2 tables as they come,
// reference count blocks and table. The header is written last: an image that
// is not whole has no magic.
func Write(ctx context.Context, f *os.File, d image.Disk, o image.WriteOptions) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() || info.Size() != 0 {
		return fmt.Errorf("write a qcow2 image to %s: not an empty regular file", f.Name())
	}
	w := newWriter(f, d.Size())
	if err := image.ForEachData(ctx, d, writeBlock, o.Report, w.writeBlock); err != nil {
		return fmt.Errorf("write qcow2 image %s: %w", f.Name(), err)
	}
	if err := w.finish(); err != nil {
		return fmt.Errorf("write qcow2 image %s: %w", f.Name(), err)
	}
	return nil
}

type writer struct {
	f    io.WriterAt
	size int64 // of the disk

	mu   sync.Mutex // guards what follows
	next int64      // offset of the first cluster of the file not in use
	l1   []byte
}

// L2 tables have 8-byte entries and are one cluster long.
const writeSpan = writeCluster / 8 * writeCluster

func newWriter(f io.WriterAt, size int64) *writer {
	size = (size + sectorSize - 1) / sectorSize * sectorSize
	w := &writer{f: f, size: size, l1: make([]byte, (size+writeSpan-1)/writeSpan*8)}
	w.next = writeCluster + roundUp(int64(len(w.l1)))
	return w
}

// roundUp returns n rounded up to whole clusters.
func roundUp(n int64) int64 { return (n + writeCluster - 1) &^ (writeCluster - 1) }

// allocate returns places for n clusters in a row and for the entry of the
// first of them, which describes the disk at off.
func (w *writer) allocate(off, n int64) (host, entry int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	l1 := w.l1[off/writeSpan*8:]
	if order.Uint64(l1) == 0 {
		order.PutUint64(l1, uint64(w.next)|flagCopied)
		w.next += writeCluster
	}
	table := int64(order.Uint64(l1) & offsetMask)
	host = w.next
	w.next += n * writeCluster
	return host, table + off%writeSpan/writeCluster*8
}

// writeBlock writes the clusters of p that are not all zeros, each row of them at once.
// It is called from several goroutines.
func (w *writer) writeBlock(off int64, p []byte) error {
	for len(p) > 0 {
		n := dataPrefix(p)
		if n == 0 {
			n = min(writeCluster, len(p))
		} else if err := w.writeClusters(off, p[:n]); err != nil {
			return err
		}
		off, p = off+int64(n), p[n:]
	}
	return nil
}

// dataPrefix returns the length of the clusters at the start of p that are not all zeros.
func dataPrefix(p []byte) int {
	n := 0
	for n < len(p) {
		end := min(n+writeCluster, len(p))
		if image.IsZero(p[n:end]) {
			break
		}
		n = end
	}
	return n
}

// writeClusters writes data into new clusters, and their L2 entries straight into the
// file, where tables not yet written are holes. No table is held in memory; blocks are
// aligned, so p belongs to one table.
func (w *writer) writeClusters(off int64, p []byte) error {
	clusters := roundUp(int64(len(p))) / writeCluster
	host, entry := w.allocate(off, clusters)
	if _, err := w.f.WriteAt(p, host); err != nil {
		return err
	}
	entries := make([]byte, 8*clusters)
	for i := range clusters {
		order.PutUint64(entries[8*i:], uint64(host+i*writeCluster)|flagCopied)
	}
	_, err := w.f.WriteAt(entries, entry)
	return err
}

// finish writes everything but data and L2 tables.
func (w *writer) finish() error {
	if _, err := w.f.WriteAt(w.l1, writeCluster); err != nil {
		return err
	}
	table, tableClusters, err := w.writeCounts()
	if err != nil {
		return err
	}
	header := make([]byte, lengthV3+8) // with the mark that ends the extensions, eight zeros
	copy(header, magic)
	order.PutUint32(header[atVersion:], 3)
	order.PutUint32(header[atClusterBits:], writeBits)
	order.PutUint64(header[atSize:], uint64(w.size))
	order.PutUint32(header[atL1Entries:], uint32(len(w.l1)/8))
	order.PutUint64(header[atL1Offset:], writeCluster)
	order.PutUint64(header[atRefcountTable:], uint64(table))
	order.PutUint32(header[atRefcountClusters:], uint32(tableClusters))
	order.PutUint32(header[atRefcountOrder:], countBits)
	order.PutUint32(header[atHeaderLength:], lengthV3)
	_, err = w.f.WriteAt(header, 0)
	return err
}

// writeCounts writes the reference counts, one for each cluster up to the end of the
// file, which they end themselves: blocks of counts, then the table of blocks.
func (w *writer) writeCounts() (table, tableClusters int64, err error) {
	used := w.next / writeCluster
	var blocks, total int64
	for total = used; blocks*countsInBlock < total; total = used + blocks + tableClusters {
		blocks = (total + countsInBlock - 1) / countsInBlock
		tableClusters = roundUp(8*blocks) / writeCluster
	}
	entries := make([]byte, tableClusters*writeCluster)
	counts := make([]byte, writeCluster)
	for i := range countsInBlock {
		order.PutUint16(counts[2*i:], 1)
	}
	for i := range blocks {
		clear(counts[2*min(countsInBlock, total-i*countsInBlock):])
		at := w.next + i*writeCluster
		order.PutUint64(entries[8*i:], uint64(at))
		if _, err := w.f.WriteAt(counts, at); err != nil {
			return 0, 0, err
		}
	}
	table = w.next + blocks*writeCluster
	_, err = w.f.WriteAt(entries, table)
	return table, tableClusters, err
}
