package vmdk

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"runtime"

	"github.com/klauspost/compress/zlib"
	"golang.org/x/sync/errgroup"

	"github.com/holdfast-backup/holdfast/image"
)

const (
	writeGrain     = 64 << 10
	batchGrains    = 8 // a power of two, so that no batch spans two tables
	writeOverhead  = 128
	descriptorArea = 20 // sectors
	writeLevel     = zlib.BestSpeed
)

// Write writes d as a stream-optimized image to w, which is empty. The grains
// are compressed in parallel and written in the disk's order; grains of zeros
// and tables without grains are left out. Memory is about 3 MiB a processor,
// and 128 KiB a TiB of disk for the grain directory. The caller syncs
// and closes w. A size that is no multiple of 512 is rounded up with zeros.
func Write(ctx context.Context, w *os.File, d image.Disk, o image.WriteOptions) error {
	s := newStream(w, d.Size())
	err := s.start()
	if err == nil {
		err = compress(ctx, d, func(b *batch) error {
			if err := s.add(b); err != nil {
				return err
			}
			o.Report(b.end - s.done)
			s.done = b.end
			return nil
		})
	}
	if err == nil {
		err = s.finish()
	}
	if err != nil {
		return fmt.Errorf("vmdk %s: write: %w", w.Name(), err)
	}
	o.Report(d.Size() - s.done)
	return nil
}

// batch is some grains on their way through the writer. Batches are reused.
type batch struct {
	start, end int64 // on the disk; start is a grain's first byte
	raw        []byte
	packed     bytes.Buffer
	grains     []packedGrain
	err        error
	ready      chan struct{} // receives when the fields above are set
}

// packedGrain says where a grain's marker stands in the batch's packed bytes.
type packedGrain struct{ number, place int64 }

// compress cuts the disk's data into batches, compresses them in parallel and
// calls add for one after the other in the disk's order.
func compress(ctx context.Context, d image.Disk, add func(*batch) error) error {
	workers := runtime.GOMAXPROCS(0)
	depth := 2*workers + 1
	free := make(chan *batch, depth)  // bounds the memory
	work := make(chan *batch, depth)  // to the workers
	order := make(chan *batch, depth) // to add, in the disk's order
	for range depth {
		free <- &batch{ready: make(chan struct{}, 1)}
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer close(work)
		defer close(order)
		return cut(ctx, d, func(start, end int64) error {
			select {
			case b := <-free:
				b.start, b.end = start, end
				work <- b
				order <- b
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		})
	})
	for range workers {
		g.Go(func() error {
			z, err := zlib.NewWriterLevel(nil, writeLevel)
			if err != nil {
				return err
			}
			for b := range work {
				if b.err = ctx.Err(); b.err == nil {
					b.err = b.fill(d, z)
				}
				b.ready <- struct{}{}
			}
			return nil
		})
	}
	g.Go(func() error {
		for b := range order {
			<-b.ready
			if b.err != nil {
				return b.err
			}
			if err := add(b); err != nil {
				return err
			}
			free <- b
		}
		return nil
	})
	return g.Wait()
}

// cut calls emit for ranges of whole grains that hold all data of the disk, in
// order; a range lies inside one aligned batch.
func cut(ctx context.Context, d image.Disk, emit func(start, end int64) error) error {
	const batchBytes = batchGrains * writeGrain
	next := int64(0) // what is before it has been emitted or is zero
	for e, err := range image.Coalesce(d.Extents(ctx, 0, d.Size())) {
		if err != nil {
			return err
		}
		if e.Zero {
			continue
		}
		next = max(next, e.Off-e.Off%writeGrain)
		for next < e.End() {
			lastGrain := (e.End() + writeGrain - 1) / writeGrain * writeGrain
			end := min(next-next%batchBytes+batchBytes, lastGrain, d.Size())
			if err := emit(next, end); err != nil {
				return err
			}
			next = end
		}
	}
	return nil
}

// fill reads the batch's range and packs its grains that are not zero.
func (b *batch) fill(d image.Disk, z *zlib.Writer) error {
	if b.raw == nil {
		b.raw = make([]byte, batchGrains*writeGrain)
	}
	b.packed.Reset()
	b.grains = b.grains[:0]
	n := b.end - b.start
	if err := image.ReadFull(d, b.raw[:n], b.start); err != nil {
		return err
	}
	clear(b.raw[n:]) // the disk's last grain is written whole
	for at := int64(0); at < n; at += writeGrain {
		p := b.raw[at : at+writeGrain]
		if image.IsZero(p) {
			continue
		}
		place := b.packed.Len()
		b.grains = append(b.grains, packedGrain{(b.start + at) / writeGrain, int64(place)})
		var head [grainMarkerLen]byte
		b.packed.Write(head[:])
		z.Reset(&b.packed)
		if _, err := z.Write(p); err != nil {
			return err
		}
		if err := z.Close(); err != nil {
			return err
		}
		m := b.packed.Bytes()[place:]
		binary.LittleEndian.PutUint64(m, uint64(b.start+at)/sectorSize)
		binary.LittleEndian.PutUint32(m[8:], uint32(len(m)-grainMarkerLen))
		var pad [sectorSize]byte
		b.packed.Write(pad[:-b.packed.Len()&(sectorSize-1)])
	}
	return nil
}

// stream writes the parts of a stream-optimized image one after the other.
type stream struct {
	w         *os.File
	capacity  int64 // sectors of the disk
	done      int64 // bytes of the disk that are reported
	sector    int64 // of the file, where the next part goes
	directory []uint32
	number    int64 // of the table that is being filled
	table     [tableEntries]uint32
}

func newStream(w *os.File, size int64) *stream {
	const covered = writeGrain * tableEntries
	return &stream{
		w:         w,
		capacity:  (size + sectorSize - 1) / sectorSize,
		directory: make([]uint32, (size+covered-1)/covered),
	}
}

// write writes p, which is whole sectors.
func (s *stream) write(p []byte) error {
	n, err := s.w.Write(p)
	s.sector += int64(n) / sectorSize
	if err == nil && s.sector > math.MaxUint32 {
		return fmt.Errorf("%w: more than 2 TiB of compressed data", image.ErrUnsupported)
	}
	return err
}

func (s *stream) header(directory uint64) header {
	return header{
		Magic:         [4]byte([]byte(sparseMagic)),
		Version:       3,
		Flags:         flagNewlines | flagCompressed | flagMarkers,
		Capacity:      uint64(s.capacity),
		Grain:         writeGrain / sectorSize,
		Descriptor:    1,
		DescriptorLen: descriptorArea,
		TableEntries:  tableEntries,
		Directory:     directory,
		Overhead:      writeOverhead,
		Newlines:      newlines,
		Compression:   deflate,
	}
}

// start writes the header and the descriptor.
func (s *stream) start() error {
	p := make([]byte, writeOverhead*sectorSize)
	encode(p, s.header(directoryAtEnd))
	copy(p[sectorSize:(1+descriptorArea)*sectorSize], s.descriptor())
	return s.write(p)
}

// descriptor returns the embedded descriptor. Readers take the extent from the
// file that they have, whatever its name. The geometry is that of a SCSI disk.
func (s *stream) descriptor() string {
	const heads, sectorsPerTrack = 255, 63
	return fmt.Sprintf(textMagic+`
version=1
CID=%08x
parentCID=ffffffff
createType="streamOptimized"

# Extent description
RW %d SPARSE "disk.vmdk"

# The Disk Data Base
#DDB

ddb.virtualHWVersion = "4"
ddb.geometry.cylinders = "%d"
ddb.geometry.heads = "%d"
ddb.geometry.sectors = "%d"
ddb.adapterType = "lsilogic"
`, rand.Uint32N(noParent-1), s.capacity, s.capacity/(heads*sectorsPerTrack), heads, sectorsPerTrack)
}

// add writes a batch and enters its grains in their table.
func (s *stream) add(b *batch) error {
	if len(b.grains) == 0 {
		return nil
	}
	if number := b.grains[0].number / tableEntries; number != s.number {
		if err := s.flushTable(); err != nil {
			return err
		}
		s.number = number
	}
	for _, g := range b.grains {
		s.table[g.number%tableEntries] = uint32(s.sector + g.place/sectorSize)
	}
	return s.write(b.packed.Bytes())
}

// flushTable writes the table that is being filled, unless it is empty.
func (s *stream) flushTable() error {
	if s.table == ([tableEntries]uint32{}) {
		return nil
	}
	s.directory[s.number] = uint32(s.sector) + 1
	err := s.metadata(markerTable, s.table[:])
	clear(s.table[:])
	return err
}

// metadata writes a marker and what it announces, padded to a sector.
func (s *stream) metadata(kind uint32, data any) error {
	sectors := (binary.Size(data) + sectorSize - 1) / sectorSize
	p := make([]byte, (1+sectors)*sectorSize)
	marker{value: uint64(sectors), kind: kind}.encode(p)
	encode(p[sectorSize:], data)
	return s.write(p)
}

// finish writes the last table, the directory, the footer and the end.
func (s *stream) finish() error {
	if err := s.flushTable(); err != nil {
		return err
	}
	directory := s.sector + 1
	if err := s.metadata(markerDirectory, s.directory); err != nil {
		return err
	}
	if err := s.metadata(markerFooter, s.header(uint64(directory))); err != nil {
		return err
	}
	return s.metadata(markerEnd, []byte{})
}

func encode(p []byte, data any) {
	if _, err := binary.Encode(p, binary.LittleEndian, data); err != nil {
		panic("vmdk: internal error: " + err.Error())
	}
}
