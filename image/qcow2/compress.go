package qcow2

import (
	"bytes"
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"

	"github.com/holdfast-backup/holdfast/image/internal/imgfile"
)

const (
	sectorSize = 512
	// maxZstdWindow is what RFC 8878 asks decoders to support; no encoder
	// needs more than a cluster, 2 MiB.
	maxZstdWindow = 8 << 20
)

// Decoders are kept: each has tables and buffers that are dear to make.
var (
	inflaters = sync.Pool{New: func() any { return flate.NewReader(nil) }}
	unzstds   = sync.Pool{New: func() any {
		// With a concurrency of one a decoder starts no goroutines and needs no Close.
		d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxZstdWindow))
		if err != nil {
			panic(fmt.Sprintf("qcow2: internal error: %v", err))
		}
		return d
	}}
)

// cluster returns the decompressed cluster of a descriptor, which belongs to
// the cache. A descriptor is, with x = 70 − cluster bits:
//
//	bits 0 to x-1   offset in the file, to the byte
//	bits x to 61    number of 512-byte sectors that follow the one with the first byte
//
// Where the compressed bytes end inside the last sector is for the decoder to
// find; other clusters may begin there, or the file may end.
func (m *Image) cluster(descriptor uint64) ([]byte, error) {
	return m.clusters.Get(descriptor, func() ([]byte, error) {
		x := 70 - m.clusterBits
		offset := int64(descriptor & (1<<x - 1))
		length := int64(descriptor>>x+1)*sectorSize - offset%sectorSize
		if offset >= m.fileSize {
			return nil, m.corrupt("a compressed cluster at %d, beyond the end of the file (%d)", offset, m.fileSize)
		}
		packed := make([]byte, min(length, m.fileSize-offset))
		if err := imgfile.ReadFull(m.file, packed, offset); err != nil {
			return nil, err
		}
		plain := make([]byte, m.clusterSize())
		decompress := inflate
		if m.zstd {
			decompress = unzstd
		}
		if err := decompress(plain, packed); err != nil {
			return nil, m.corrupt("the compressed cluster at %d: %v", offset, err)
		}
		return plain, nil
	})
}

// inflate fills plain from a raw deflate stream, which QEMU calls zlib.
func inflate(plain, packed []byte) error {
	r := inflaters.Get().(io.ReadCloser)
	defer inflaters.Put(r)
	if err := r.(flate.Resetter).Reset(bytes.NewReader(packed), nil); err != nil {
		return err
	}
	_, err := io.ReadFull(r, plain)
	return err
}

// unzstd fills plain from one or more zstd frames.
func unzstd(plain, packed []byte) error {
	d := unzstds.Get().(*zstd.Decoder)
	defer unzstds.Put(d)
	if err := d.Reset(bytes.NewReader(packed)); err != nil {
		return err
	}
	_, err := io.ReadFull(d, plain)
	return err
}
