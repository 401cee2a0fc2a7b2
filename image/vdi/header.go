package vdi

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/internal/imgfile"
)

const (
	signature    = 0xbeda107f
	signatureOff = 0x40
	version11    = 1<<16 | 1

	typeDynamic = 1
	typeStatic  = 2

	// Blocks of other sizes than 1 MiB are rare; these are all powers of two that make sense.
	minBlock = 4 << 10
	maxBlock = 256 << 20
)

// header is the start of the file.
type header struct {
	Text            [0x40]byte // "<<< Oracle VM VirtualBox Disk Image >>>" and the like
	Signature       uint32
	Version         uint32
	HeaderSize      uint32
	Type            uint32
	Flags           uint32
	Description     [256]byte
	Map             uint32 // place in the file, bytes
	Data            uint32 // place of block 0, bytes
	Geometry        [3]uint32
	SectorSize      uint32
	_               uint32
	Size            uint64 // of the disk, bytes
	BlockSize       uint32
	BlockExtra      uint32 // bytes before each block
	Blocks          uint32 // entries of the map
	BlocksAllocated uint32
	ID, SnapshotID  [16]byte
	Link, Parent    [16]byte // not zero in differencing images
}

// readHeader reads and checks the start of the file.
func readHeader(f imgfile.File) (h header, err error) {
	buf := make([]byte, binary.Size(h))
	n, err := f.ReadAt(buf, 0)
	switch {
	case err != nil && !errors.Is(err, io.EOF):
		return h, err
	case !Match(buf[:n]):
		return h, fmt.Errorf("%w: no VDI signature", image.ErrNotImage)
	case n < len(buf):
		return h, fmt.Errorf("%w: ends within its header", image.ErrCorrupt)
	}
	if _, err := binary.Decode(buf, binary.LittleEndian, &h); err != nil {
		panic("vdi: internal error: " + err.Error())
	}
	return h, h.check()
}

// check refuses headers that contradict themselves or need what is not read.
func (h header) check() error {
	zero := [16]byte{}
	headerEnd := uint32(binary.Size(h))
	switch {
	case h.Version != version11:
		return fmt.Errorf("%w: version %d.%d", image.ErrUnsupported, h.Version>>16, h.Version&0xffff)
	case h.Type != typeDynamic && h.Type != typeStatic, h.Link != zero, h.Parent != zero:
		return fmt.Errorf("%w: differencing image (type %d), which needs its parent; merge the snapshots first", image.ErrUnsupported, h.Type)
	case h.SectorSize != 512:
		return fmt.Errorf("%w: sectors of %d bytes", image.ErrUnsupported, h.SectorSize)
	case bits.OnesCount32(h.BlockSize) != 1 || h.BlockSize < minBlock || h.BlockSize > maxBlock:
		return fmt.Errorf("%w: blocks of %d bytes", image.ErrUnsupported, h.BlockSize)
	case h.BlockExtra != 0:
		return fmt.Errorf("%w: %d extra bytes a block", image.ErrUnsupported, h.BlockExtra)
	case h.Size > uint64(image.MaxSize):
		return fmt.Errorf("%w: disk of %d bytes", image.ErrUnsupported, h.Size)
	case h.Size > uint64(h.Blocks)*uint64(h.BlockSize):
		return fmt.Errorf("%w: map of %d blocks for a disk of %d bytes", image.ErrCorrupt, h.Blocks, h.Size)
	case h.Map < headerEnd || h.Data < headerEnd:
		return fmt.Errorf("%w: map at byte %d, data at byte %d overlap the header", image.ErrCorrupt, h.Map, h.Data)
	}
	return nil
}
