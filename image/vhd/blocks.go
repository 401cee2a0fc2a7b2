package vhd

import (
	"context"
	"encoding/binary"
	"iter"
	"math/bits"
	"os"

	"github.com/holdfast-backup/holdfast/image/internal/imgfile"
)

const (
	sector     = 512
	tableEntry = 4
	unused     = 1<<32 - 1 // table entry of a block that is not in the file

	maxBlockSize = 256 << 20
	bitmapPiece  = 512 // bytes of a bitmap that are looked at together: 2 MiB of the disk
)

// absent is the file offset of what is not in the file.
const absent = -1

// run is a range of the disk that is in one piece in the file, or absent.
type run struct {
	off, len int64
	at       int64
}

// blocks is the table of a dynamic disk and what it leads to.
type blocks struct {
	f          *os.File
	fileSize   int64
	diskSize   int64
	tableAt    int64
	blockSize  int64
	bitmapSize int64          // of a block, padded
	cache      *imgfile.Cache // for table entries and bitmaps
}

func newBlocks(f *os.File, fileSize int64, h header, diskSize int64) (*blocks, error) {
	b := &blocks{f: f, fileSize: fileSize, diskSize: diskSize, blockSize: int64(h.blockSize), cache: imgfile.NewCache(f)}
	if b.blockSize < sector || b.blockSize > maxBlockSize || b.blockSize&(b.blockSize-1) != 0 {
		return nil, corrupt(f, "blocks of %d bytes", b.blockSize)
	}
	if int64(h.entries)*b.blockSize < diskSize {
		return nil, corrupt(f, "its table has %d entries, too few for a disk of %d bytes", h.entries, diskSize)
	}
	used := (diskSize + b.blockSize - 1) / b.blockSize * tableEntry
	if h.tableAt > uint64(max(0, fileSize-used)) {
		return nil, corrupt(f, "its table at byte %d is outside the file, which has %d bytes; it may have been truncated", h.tableAt, fileSize)
	}
	b.tableAt = int64(h.tableAt)
	b.bitmapSize = (b.blockSize/sector/8 + sector - 1) / sector * sector
	return b, nil
}

// at returns the run that starts at off, clipped to end and to off's block.
func (b *blocks) at(off, end int64) (run, error) {
	n := off / b.blockSize
	end = min(end, (n+1)*b.blockSize)
	var e [tableEntry]byte
	if err := b.cache.ReadFull(e[:], b.tableAt+n*tableEntry); err != nil {
		return run{}, err
	}
	entry := binary.BigEndian.Uint32(e[:])
	if entry == unused {
		return run{off: off, len: end - off, at: absent}, nil
	}
	return b.in(n, entry, off, end)
}

// in returns the run that starts at off in block n, which is in the file where
// the table's entry says; [off, end) lies inside the block. The run may be shorter
// than it could: one look at the bitmap reaches no further than bitmapPiece.
func (b *blocks) in(n int64, entry uint32, off, end int64) (run, error) {
	at := int64(entry) * sector
	if last := at + b.bitmapSize + min(b.blockSize, b.diskSize-n*b.blockSize); last > b.fileSize {
		return run{}, corrupt(b.f, "block %d reaches to byte %d of a file that has %d; it may have been truncated", n, last, b.fileSize)
	}
	inBlock := off - n*b.blockSize
	first, last := inBlock/sector, (inBlock+end-off-1)/sector
	piece := first / 8 / bitmapPiece * bitmapPiece
	size := min(bitmapPiece, last/8+1-piece)
	var bitmap [bitmapPiece]byte
	if err := b.cache.ReadFull(bitmap[:size], at+piece); err != nil {
		return run{}, err
	}
	set, next := bitRun(bitmap[:size], first-piece*8)
	r := run{off: off, len: min(end-off, (piece*8+next)*sector-inBlock), at: absent}
	if set {
		r.at = at + b.bitmapSize + inBlock
	}
	return r, nil
}

// bitRun returns bit i of bitmap, counted from the highest of the first byte,
// and the number of the first bit behind it that differs.
func bitRun(bitmap []byte, i int64) (set bool, next int64) {
	var flip byte
	if set = bitmap[i/8]&(0x80>>(i%8)) != 0; set {
		flip = 0xff
	}
	mask := byte(0xff) >> (i % 8)
	for n := i / 8; n < int64(len(bitmap)); n++ {
		if differ := (bitmap[n] ^ flip) & mask; differ != 0 {
			return set, n*8 + int64(bits.LeadingZeros8(differ))
		}
		mask = 0xff
	}
	return set, int64(len(bitmap)) * 8
}

// runs walks the table, a piece at a time, and yields the runs of [off, end);
// neighbours that are absent are one.
func (b *blocks) runs(ctx context.Context, off, end int64) iter.Seq2[run, error] {
	return func(yield func(run, error) bool) {
		gap := run{off: off, at: absent} // not yielded yet
		for off < end {
			first, entries, err := b.tablePiece(ctx, off, end)
			if err != nil {
				yield(run{}, err)
				return
			}
			pieceEnd := min(end, (first+int64(len(entries)/tableEntry))*b.blockSize)
			for off < pieceEnd {
				n := off / b.blockSize
				r := run{off: off, len: min(end, (n+1)*b.blockSize) - off, at: absent}
				if entry := binary.BigEndian.Uint32(entries[(n-first)*tableEntry:]); entry != unused {
					if r, err = b.in(n, entry, off, off+r.len); err != nil {
						yield(run{}, err)
						return
					}
				}
				off += r.len
				if r.at == absent {
					gap.len += r.len
					continue
				}
				if gap.len > 0 && !yield(gap, nil) || !yield(r, nil) {
					return
				}
				gap = run{off: off, at: absent}
			}
		}
		if gap.len > 0 {
			yield(gap, nil)
		}
	}
}

// tablePiece returns the table's entries from the block at off on: up to the
// one before end, or 32 KiB. first is the number of the first.
func (b *blocks) tablePiece(ctx context.Context, off, end int64) (first int64, entries []byte, err error) {
	if err := ctx.Err(); err != nil {
		return 0, nil, err
	}
	first = off / b.blockSize
	entries = make([]byte, min(32<<10, ((end-1)/b.blockSize-first+1)*tableEntry))
	return first, entries, imgfile.ReadFull(b.f, entries, b.tableAt+first*tableEntry)
}
