package blockstore

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/durable"
)

// awayErrors are what the system says when storage is away, or not to be had at
// this moment: they tell nothing of the bytes there. Others, EIO and EUCLEAN among them,
// are of one place: its bytes are lost.
var awayErrors = []syscall.Errno{
	// A disk that was pulled, a file server or a FUSE process that ended.
	unix.ENODEV, unix.ENXIO, unix.ENOTCONN, unix.ESTALE, unix.ESHUTDOWN, unix.ETIMEDOUT, unix.ENOLINK, unix.EPIPE,
	unix.ECONNABORTED, unix.ECONNREFUSED, unix.ECONNRESET,
	unix.EHOSTDOWN, unix.EHOSTUNREACH, unix.ENETDOWN, unix.ENETUNREACH,
	// Rights that a mount has lost.
	unix.EACCES, unix.EPERM, unix.EROFS, unix.EKEYEXPIRED, unix.EKEYREVOKED, unix.EKEYREJECTED, unix.ENOKEY,
	// What the system is short of.
	unix.ENOSPC, unix.EDQUOT, unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.EBUSY, unix.EAGAIN, unix.EINTR,
}

// away reports whether err says that storage cannot be had at this moment.
func away(err error) bool {
	errno, ok := errors.AsType[syscall.Errno](err)
	return ok && slices.Contains(awayErrors, errno)
}

// damage returns e, but if storage is away an error that is no ErrDamaged: nothing may be
// remembered as lost then.
func damage(e *CorruptError) error {
	if away(e.Err) {
		return fmt.Errorf("segment %s, offset %d: %w", e.Segment, e.Off, e.Err)
	}
	return e
}

// readFailures remembers the first read of a file that failed otherwise than by the
// file's end.
type readFailures struct {
	durable.File
	err error
}

func (f *readFailures) ReadAt(p []byte, off int64) (int, error) {
	n, err := f.File.ReadAt(p, off)
	if err != nil && !errors.Is(err, io.EOF) && f.err == nil {
		f.err = err
	}
	return n, err
}
