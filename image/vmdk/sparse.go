package vmdk

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"sync"

	"github.com/klauspost/compress/zlib"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/internal/imgfile"
)

// sparse is an extent made of grains. Sizes and places are in bytes.
type sparse struct {
	imgfile.File
	size          int64 // of the extent on the disk
	grain         int64
	directory     int64 // place in the file
	tables        int64 // entries of the directory
	descriptor    int64 // place in the file
	descriptorLen int64 // 0 if there is none
	zeroGrains    bool
	compressed    bool
	caches        *caches
}

// caches are shared by all extents of an image.
type caches struct {
	tables *imgfile.LRU[cacheKey, []uint32] // pieces of directories, and tables: 2 KiB each
	grains *imgfile.LRU[cacheKey, []byte]   // inflated grains
}

type cacheKey struct {
	s   *sparse
	off int64 // of entries in the file, of a grain on the disk
	n   int64 // entries or bytes: a directory may name itself as a table
}

func newCaches() *caches {
	return &caches{imgfile.NewLRU[cacheKey, []uint32](2048), imgfile.NewLRU[cacheKey, []byte](16)}
}

// openSparse takes ownership of f only when it succeeds.
func openSparse(f imgfile.File, c *caches) (*sparse, error) {
	h, err := readHeader(f)
	if err != nil {
		return nil, err
	}
	// Places are compared in sectors: in bytes they may not fit 64 bits.
	sectors := uint64(f.Size) / sectorSize
	if h.Directory > sectors || h.Descriptor > sectors || h.DescriptorLen > sectors {
		return nil, fmt.Errorf("%w: %s ends before its directory or descriptor", image.ErrCorrupt, f.Name())
	}
	s := &sparse{
		File:       f,
		size:       int64(h.Capacity) * sectorSize,
		grain:      int64(h.Grain) * sectorSize,
		directory:  int64(h.Directory) * sectorSize,
		tables:     h.tables(),
		zeroGrains: h.Flags&flagZeroGrains != 0,
		compressed: h.Flags&flagCompressed != 0,
		caches:     c,
	}
	if h.Descriptor != 0 {
		s.descriptor = int64(h.Descriptor) * sectorSize
		s.descriptorLen = int64(h.DescriptorLen) * sectorSize
	}
	return s, f.Has(s.directory, s.tables*4)
}

// openSparsePart opens an extent of which the descriptor says that it has size
// bytes. The header may say more, as it may count whole grains.
func openSparsePart(f imgfile.File, size int64, c *caches) (*sparse, error) {
	s, err := openSparse(f, c)
	if err != nil {
		return nil, err
	}
	if s.size < size {
		return nil, fmt.Errorf("%w: %d bytes, the descriptor says %d", image.ErrCorrupt, s.size, size)
	}
	s.size = size
	return s, nil
}

// entries returns n entries of a directory or a table, at off in the file.
func (s *sparse) entries(off, n int64) ([]uint32, error) {
	return s.caches.tables.Get(cacheKey{s, off, n}, func() ([]uint32, error) {
		var buf [tableBytes]byte
		if err := imgfile.ReadFull(s.File.File, buf[:4*n], off); err != nil {
			return nil, err
		}
		entries := make([]uint32, n)
		for i := range entries {
			entries[i] = binary.LittleEndian.Uint32(buf[4*i:])
		}
		return entries, nil
	})
}

// run is a range that is all zeros, or data that is in one piece at place in
// the file: plain bytes from there on, or a compressed grain's marker.
type run struct {
	length int64
	zero   bool
	place  int64
}

// find returns the run that starts at off, at most length long. Runs end with
// their table; what is missing in the directory ends with its piece of 512 entries.
func (s *sparse) find(off, length int64) (run, error) {
	covered := s.grain * tableEntries // by one table
	number := off / covered
	first := number - number%tableEntries
	directory, err := s.entries(s.directory+4*first, min(tableEntries, s.tables-first))
	if err != nil {
		return run{}, err
	}
	next := number - first
	if directory[next] == 0 {
		for next < int64(len(directory)) && directory[next] == 0 {
			next++
		}
		return run{length: min(length, (first+next)*covered-off), zero: true}, nil
	}
	table, err := s.entries(int64(directory[next])*sectorSize, tableEntries)
	if err != nil {
		return run{}, err
	}
	i, inGrain := off%covered/s.grain, off%s.grain
	n := int64(1)
	for n*s.grain-inGrain < length && i+n < tableEntries && s.follows(table[i], table[i+n], n) {
		n++
	}
	r := run{length: min(length, n*s.grain-inGrain), zero: s.isZero(table[i])}
	if r.zero {
		return r, nil
	}
	if table[i] == entryZero {
		return r, fmt.Errorf("%w: table of %s marks a grain of zeros, its header does not allow it", image.ErrCorrupt, s.Name())
	}
	r.place = int64(table[i]) * sectorSize
	if s.compressed {
		return r, s.Has(r.place, grainMarkerLen)
	}
	r.place += inGrain
	return r, s.Has(r.place, r.length)
}

func (s *sparse) isZero(entry uint32) bool {
	return entry == 0 || entry == entryZero && s.zeroGrains
}

// follows reports whether the grain of entry b continues the run that starts
// with entry a, n grains before.
func (s *sparse) follows(a, b uint32, n int64) bool {
	if s.isZero(a) || s.isZero(b) {
		return s.isZero(a) && s.isZero(b)
	}
	return !s.compressed && int64(b) == int64(a)+n*s.grain/sectorSize
}

func (s *sparse) extents(ctx context.Context, off, length int64) iter.Seq2[image.Extent, error] {
	return func(yield func(image.Extent, error) bool) {
		for end := off + length; off < end; {
			r, err := s.find(off, end-off)
			if err == nil {
				err = ctx.Err()
			}
			if err != nil {
				yield(image.Extent{}, err)
				return
			}
			if !yield(image.Extent{Off: off, Len: r.length, Zero: r.zero}, nil) {
				return
			}
			off += r.length
		}
	}
}

func (s *sparse) readAt(p []byte, off int64) error {
	for len(p) > 0 {
		r, err := s.find(off, int64(len(p)))
		if err != nil {
			return err
		}
		part := p[:r.length]
		switch {
		case r.zero:
			clear(part)
		case s.compressed:
			err = s.readGrain(part, off, r.place)
		default:
			err = imgfile.ReadFull(s.File.File, part, r.place)
		}
		if err != nil {
			return err
		}
		p, off = p[r.length:], off+r.length
	}
	return nil
}

// readGrain fills p from the compressed grain at place; p lies inside the
// grain. Reads of whole grains go past the cache: nobody reads them twice soon.
func (s *sparse) readGrain(p []byte, off, place int64) error {
	inGrain := off % s.grain
	start := off - inGrain
	if int64(len(p)) == s.grain {
		return s.inflate(p, start, place)
	}
	data, err := s.caches.grains.Get(cacheKey{s, start, s.grain}, func() ([]byte, error) {
		data := make([]byte, s.grain)
		return data, s.inflate(data, start, place)
	})
	if err != nil {
		return err
	}
	copy(p, data[inGrain:])
	return nil
}

// inflater is what inflating one grain takes.
type inflater struct {
	packed []byte
	src    bytes.Reader
	zlib   io.ReadCloser // nil until the first use
}

var inflaters = sync.Pool{New: func() any { return new(inflater) }}

// inflate fills p, a whole grain, from the compressed one at place, whose marker must say
// that it belongs at start on the disk.
func (s *sparse) inflate(p []byte, start, place int64) error {
	var m [grainMarkerLen]byte
	if err := imgfile.ReadFull(s.File.File, m[:], place); err != nil {
		return err
	}
	sector := binary.LittleEndian.Uint64(m[:])
	size := int64(binary.LittleEndian.Uint32(m[8:]))
	if sector != uint64(start/sectorSize) || size == 0 || size > 2*s.grain {
		return fmt.Errorf("%w: marker at byte %d of %s is of sector %d with %d bytes, not of sector %d",
			image.ErrCorrupt, place, s.Name(), sector, size, start/sectorSize)
	}
	in := inflaters.Get().(*inflater)
	defer inflaters.Put(in)
	if int64(cap(in.packed)) < size {
		in.packed = make([]byte, size)
	}
	packed := in.packed[:size]
	if err := imgfile.ReadFull(s.File.File, packed, place+grainMarkerLen); err != nil {
		return err
	}
	n, err := in.inflate(p, packed)
	if err != nil {
		return fmt.Errorf("%w: compressed grain at byte %d of %s: %w", image.ErrCorrupt, place, s.Name(), err)
	}
	// Only the disk's last grain may be short: QEMU ends it with the disk.
	if int64(n) < min(s.grain, s.size-start) {
		return fmt.Errorf("%w: grain at byte %d of %s inflates to %d bytes", image.ErrCorrupt, place, s.Name(), n)
	}
	return nil
}

// inflate returns how much of p the stream filled; a longer stream is an error.
func (in *inflater) inflate(p, packed []byte) (int, error) {
	in.src.Reset(packed)
	var err error
	if in.zlib == nil {
		in.zlib, err = zlib.NewReader(&in.src)
	} else {
		err = in.zlib.(zlib.Resetter).Reset(&in.src, nil)
	}
	if err != nil {
		return 0, err
	}
	n, err := io.ReadFull(in.zlib, p)
	switch {
	case (err == nil || errors.Is(err, io.ErrUnexpectedEOF)) && in.ended():
		return n, nil
	case err == nil:
		err = fmt.Errorf("more than %d bytes, or a wrong checksum", len(p))
	case errors.Is(err, io.EOF): // an empty stream; the disk is not at its end
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// ended reports whether the stream is at its end with a right checksum.
func (in *inflater) ended() bool {
	var more [1]byte
	n, err := in.zlib.Read(more[:])
	return n == 0 && err == io.EOF
}
