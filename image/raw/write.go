package raw

import (
	"context"
	"fmt"
	"os"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/internal/imgfile"
)

const (
	// blockSize is how much of the disk is read at once.
	blockSize = 1 << 20
	// zeroStep is how much of a device is zeroed between two looks at the context.
	zeroStep = 256 << 20
)

// Write writes d into f, which is an empty regular file or a block device.
// The file is sparse and has d's size afterwards. On a device the whole of
// d's range is written, zeros included; what lies behind it stays. A device
// smaller than d is refused before anything is written. The caller syncs and
// closes f.
func Write(ctx context.Context, f *os.File, d image.Disk, o image.WriteOptions) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if imgfile.IsBlockDevice(info.Mode()) {
		return writeDevice(ctx, f, d, o)
	}
	if err := f.Truncate(d.Size()); err != nil {
		return err
	}
	return image.ForEachData(ctx, d, blockSize, o.Report, func(off int64, p []byte) error {
		return imgfile.WriteSparse(f, p, off)
	})
}

// writeDevice writes the blocks that have data and then zeroes the others, for
// a device keeps what it held before.
func writeDevice(ctx context.Context, f *os.File, d image.Disk, o image.WriteOptions) error {
	size, err := imgfile.Size(f)
	if err != nil {
		return err
	}
	if size < d.Size() {
		return fmt.Errorf("device %s has %d bytes, too few for a disk of %d", f.Name(), size, d.Size())
	}
	var mu sync.Mutex
	written := make([]bool, (d.Size()+blockSize-1)/blockSize) // guarded by mu until ForEachData returns
	err = image.ForEachData(ctx, d, blockSize, o.Report, func(off int64, p []byte) error {
		if _, err := f.WriteAt(p, off); err != nil {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		written[off/blockSize] = true
		return nil
	})
	if err != nil {
		return err
	}
	for first := 0; first < len(written); {
		last := first
		for last < len(written) && !written[last] {
			last++
		}
		off, end := int64(first)*blockSize, min(int64(last)*blockSize, d.Size())
		if err := zero(ctx, f, off, end); err != nil {
			return err
		}
		first = last + 1
	}
	return nil
}

// zero fills [off, end) of a block device with zeros: by the device itself
// where it can, else by writing them.
func zero(ctx context.Context, f *os.File, off, end int64) error {
	for off < end {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(zeroStep, end-off)
		if err := zeroOut(f, off, n); err != nil {
			// Refused: no support in the device, or the disk's end is inside
			// one of the device's sectors.
			n = min(blockSize, n)
			if _, err := f.WriteAt(make([]byte, n), off); err != nil {
				return err
			}
		}
		off += n
	}
	return nil
}

// zeroOut asks the device to zero [off, off+n).
func zeroOut(f *os.File, off, n int64) error {
	span := [2]uint64{uint64(off), uint64(n)}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.BLKZEROOUT, uintptr(unsafe.Pointer(&span)))
	if errno != 0 {
		return errno
	}
	return nil
}
