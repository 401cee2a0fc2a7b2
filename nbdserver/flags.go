package nbdserver

import (
	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/nbdserver/internal/wire"
)

// writer returns the export's disk if clients may change it, and nil if not.
func (x *export) writer() image.Writer {
	if w, ok := x.Disk.(image.Writer); ok && !x.ReadOnly {
		return w
	}
	return nil
}

// transmissionFlags tells what clients may ask of an export. A read-only one has
// nothing to flush, so a flush is done at once. A flush of a disk that can be
// written covers what all connections have written, so clients may use several.
//
// Source: NBD doc/proto.md, "Transmission flags".
func (x *export) transmissionFlags(structured, extended bool) uint16 {
	flags := wire.FlagHasFlags | wire.FlagSendFlush | wire.FlagCanMultiConn | wire.FlagSendCache
	if x.writer() == nil {
		flags |= wire.FlagReadOnly
	} else {
		flags |= wire.FlagSendFUA | wire.FlagSendTrim | wire.FlagSendWriteZeroes | wire.FlagSendFastZero
	}
	if x.Rotational {
		flags |= wire.FlagRotational
	}
	if structured || extended {
		flags |= wire.FlagSendDF
	}
	if extended {
		flags |= wire.FlagBlockStatPayload
	}
	return flags
}
