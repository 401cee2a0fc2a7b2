// Package diskfile opens and writes disk image files by the name of their
// format: it knows all formats and the file below them.
//
// # Finding the format
//
// Without a stated format the file's magic decides. A file without one that we
// know is a raw disk if its size is a positive multiple of 512 bytes. So a
// guest that owns a raw disk can make it look like another format by what it
// writes to its first sector, or, less its last sector, like a VHD of fixed
// size; state [Raw] for a file that is known to be raw.
//
// # Backing files and parents
//
// An image may name another file that it is based on, and that one the
// next: at most 32 in all. A format that the image states is taken at its
// word. Where it states none the format is found as above, as QEMU does; a raw backing
// file with a guest's forged header could then name a further file. That
// stays harmless here: files outside the folder of the image that names them
// are refused unless [Options].AllowOutside is set.
//
// # Durability
//
// [Write] makes an image under a temporary name in the target's folder, syncs
// it, renames it unless the target exists by then, and syncs the folder. A
// file with the target's name is whole. A crash leaves at most a file
// ".NAME.partial-RANDOM".
package diskfile

import (
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/internal/imgfile"
	"github.com/holdfast-backup/holdfast/image/qcow2"
	"github.com/holdfast-backup/holdfast/image/raw"
	"github.com/holdfast-backup/holdfast/image/vdi"
	"github.com/holdfast-backup/holdfast/image/vhd"
	"github.com/holdfast-backup/holdfast/image/vhdx"
	"github.com/holdfast-backup/holdfast/image/vmdk"
)

// Format names a format of image files.
type Format string

// The formats. All can be read; [Write] says which can be written.
const (
	Auto  Format = "auto" // find it out
	Raw   Format = "raw"
	QCOW2 Format = "qcow2"
	VMDK  Format = "vmdk"
	VHD   Format = "vhd"
	VHDX  Format = "vhdx"
	VDI   Format = "vdi"
)

const (
	maxChain   = 32 // images in a chain of backing files
	headSize   = 4096
	footSize   = 512
	sectorSize = 512
)

// driver is what a format can do.
type driver struct {
	format Format
	match  func(probed) bool // nil: has no magic
	open   func(*os.File, image.OpenOptions) (image.DiskCloser, error)
	write  func(context.Context, *os.File, image.Disk, image.WriteOptions) error // nil: read only
}

// drivers has the formats in the order in which they are looked for.
var drivers = []driver{
	{QCOW2, atStart(qcow2.Match), opener(qcow2.Open), qcow2.Write},
	{VHDX, atStart(vhdx.Match), opener(vhdx.Open), vhdx.Write},
	{VMDK, atStart(vmdk.Match), opener(vmdk.Open), vmdk.Write},
	{VDI, atStart(vdi.Match), opener(vdi.Open), nil},
	{VHD, func(p probed) bool { return vhd.Match(p.head) || vhd.MatchFooter(p.foot, p.size) }, opener(vhd.Open), nil},
	{Raw, nil, opener(raw.Open), raw.Write},
}

// probed is what a format is found by.
type probed struct {
	size       int64
	head, foot []byte // of the file, 4096 and 512 bytes or all of it
}

func atStart(match func(head []byte) bool) func(probed) bool {
	return func(p probed) bool { return match(p.head) }
}

// opener turns the Open of a format into one that returns the interface.
func opener[D image.DiskCloser](open func(*os.File, image.OpenOptions) (D, error)) func(*os.File, image.OpenOptions) (image.DiskCloser, error) {
	return func(f *os.File, o image.OpenOptions) (image.DiskCloser, error) {
		d, err := open(f, o)
		if err != nil {
			return nil, err // not d: an interface that holds a nil pointer is not nil
		}
		return d, nil
	}
}

// driverOf returns the driver of a format; "vpc" is QEMU's word for VHD.
func driverOf(format Format) (driver, error) {
	if format == "vpc" {
		format = VHD
	}
	i := slices.IndexFunc(drivers, func(d driver) bool { return d.format == format })
	if i < 0 {
		return driver{}, fmt.Errorf("%w: unknown format %q; known are %s", image.ErrUnsupported, format,
			names(func(driver) bool { return true }))
	}
	return drivers[i], nil
}

// names lists the formats whose drivers are wanted, as "a, b and c".
func names(wanted func(driver) bool) string {
	var list []string
	for _, d := range drivers {
		if wanted(d) {
			list = append(list, string(d.format))
		}
	}
	last := len(list) - 1
	return strings.Join(list[:last], ", ") + " and " + list[last]
}

// Options say how [Open] takes a file. The zero value finds the format out and
// is the safe one.
type Options struct {
	// Format is the file's format; "" and [Auto] find it out.
	Format Format
	// AllowOutside lets the image, and those that it is based on, name files
	// outside their own folders.
	AllowOutside bool
}

// File is an open image file with all that it is based on.
type File struct {
	image.DiskCloser
	format Format
}

// Format returns the format that the file has, or was said to have.
func (f *File) Format() Format { return f.format }

// Open opens the image file or block device at path for reading. Errors name
// the file; they wrap [os.ErrNotExist], [image.ErrNotImage] (a folder, an
// empty file, no known format), [image.ErrUnsupported] or [image.ErrCorrupt].
func Open(path string, o Options) (*File, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.IsDir() {
		return nil, fmt.Errorf("%w: %s is a folder", image.ErrNotImage, path)
	}
	if !info.Mode().IsRegular() && !imgfile.IsBlockDevice(info.Mode()) {
		return nil, fmt.Errorf("%w: %s is neither a file nor a block device", image.ErrNotImage, path) // opening a pipe would wait for ever
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	return open(f, o, 1)
}

// open takes ownership of f, the image number depth of a chain.
func open(f *os.File, o Options, depth int) (*File, error) {
	d, err := choose(f, o.Format, depth)
	if err != nil {
		f.Close()
		return nil, err
	}
	disk, err := d.open(f, image.OpenOptions{
		AllowOutside: o.AllowOutside,
		OpenBacking: func(f *os.File, format string) (image.DiskCloser, error) {
			backing, err := open(f, Options{Format: Format(format), AllowOutside: o.AllowOutside}, depth+1)
			if err != nil {
				return nil, err // not backing: an interface that holds a nil pointer is not nil
			}
			return backing, nil
		},
	})
	if err != nil {
		return nil, err
	}
	return &File{DiskCloser: disk, format: d.format}, nil
}

// choose returns the driver for f.
func choose(f *os.File, format Format, depth int) (driver, error) {
	if depth > maxChain {
		return driver{}, fmt.Errorf("%w: %s is number %d of a chain of backing files, %d are the most; does the chain loop?",
			image.ErrUnsupported, f.Name(), depth, maxChain)
	}
	size, err := imgfile.Size(f)
	if err != nil {
		return driver{}, err
	}
	if size == 0 {
		return driver{}, fmt.Errorf("%w: %s is empty", image.ErrNotImage, f.Name())
	}
	if format == "" || format == Auto {
		return probe(f, size)
	}
	return driverOf(format)
}

// probe finds the format of a file that is not empty.
func probe(f *os.File, size int64) (driver, error) {
	head, err := readUpTo(f, 0, min(headSize, size))
	if err != nil {
		return driver{}, err
	}
	foot, err := readUpTo(f, max(0, size-footSize), min(footSize, size))
	if err != nil {
		return driver{}, err
	}
	for _, d := range drivers {
		if d.match != nil && d.match(probed{size, head, foot}) {
			return d, nil
		}
	}
	if size%sectorSize != 0 {
		return driver{}, fmt.Errorf("%w: %s has no sign of %s, and its size, %d bytes, is no multiple of %d; if it is a raw disk, say so with --format raw",
			image.ErrNotImage, f.Name(), names(func(d driver) bool { return d.match != nil }), size, sectorSize)
	}
	return driverOf(Raw)
}

func readUpTo(f *os.File, off, n int64) ([]byte, error) {
	return io.ReadAll(io.NewSectionReader(f, off, n))
}
