package vdi

import (
	"errors"

	"golang.org/x/sys/unix"
)

// shorten ends a run of data where the file system's data ends, or turns it
// into one of zeros up to there, if it starts in a hole of the file. Seeking is safe
// beside other goroutines' reads and seeks: all reads name their offset.
func (m *Image) shorten(r *run) error {
	data, err := m.file.Seek(r.place, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO):
		r.zero = true // no data up to the end of the file
		return nil
	case errors.Is(err, unix.EINVAL):
		return nil // a block device, or a file system without holes
	case err != nil:
		return err
	case data > r.place:
		r.zero = true
		r.length = min(r.length, data-r.place)
		return nil
	}
	hole, err := m.file.Seek(r.place, unix.SEEK_HOLE)
	if err != nil {
		return err
	}
	r.length = min(r.length, hole-r.place)
	return nil
}
