// Package fusefs shows restore points as a read-only tree of files that the
// kernel mounts through FUSE:
//
//	VM/POINT-TIME/disks/NAME.raw   a whole disk, sparse
//	VM/POINT-TIME/vm.xml           what else the point holds: small files
//	VM/latest                      symbolic link to the newest POINT-TIME
//
// The package knows disks ([image.Disk]) and a [Source] that lists them, not
// where they are stored.
//
// # Names
//
// POINT-TIME is the point's time in UTC in RFC 3339 form, with as many
// fractional digits as the time has: 2026-11-22T01:02:03Z. Of several points
// with the same time all but the oldest carry the first 8 characters of their
// id as well: 2026-11-22T01:02:03Z-1f00aa27.
//
// In names of VMs, disks and files, "/", "%", NUL and other control characters
// are written as % and two hex digits, as is the first character of "." and
// "..", and of "disks" beside the disks folder; percent-decoding gives the name
// back. A name too long for a file name is cut and ends in "%~" and 32 hex
// digits of the SHA-256 of the whole name. The empty name is "%".
//
// # Invariants
//
//   - What a node shows never changes: a file's bytes, its size and its times
//     are those of the restore point. The kernel may therefore cache contents
//     and attributes for as long as it likes. Only the lists of VMs and of
//     points change; the kernel asks again for them after a second, so that new
//     points appear and deleted ones vanish within two.
//   - A read returns the disk's bytes or EIO, never fewer bytes than asked for
//     inside the disk.
//   - A disk is opened when its first file handle is, shared by all handles, and
//     closed after the last handle and the last read.
//   - The mount is ro, nosuid, nodev and noexec: the kernel answers every
//     modifying call with EROFS, and nothing that comes out of a guest runs or
//     gains rights on this machine.
//   - Without [Options.AllowOther] only the user who mounted can enter, and files
//     have mode 0440, folders 0550, so that copies which keep the mode stay private
//     too. With it everyone can, with modes 0444 and 0555.
//
// # Concurrency
//
// The kernel's requests are answered in parallel, each in a goroutine of its own; reads
// of up to [maxRead] bytes each. A request whose caller is being killed is answered
// with EINTR at once; the disk read that it started ends by itself. Other signals
// interrupt nothing, as on a disk's file system.
package fusefs

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/holdfast-backup/holdfast/image"
)

// Errors of mounting and unmounting, wrapped with the folder's name and what to do.
var (
	// ErrMountPoint means a folder that cannot be mounted on.
	ErrMountPoint = errors.New("cannot mount here")
	// ErrNoFUSE means that this machine lacks FUSE, or this user the right to it.
	ErrNoFUSE = errors.New("FUSE is not available")
	// ErrNotMounted means that no Holdfast mount is at the folder.
	ErrNotMounted = errors.New("not a holdfast mount")
	// ErrBusy means that processes still use the mount.
	ErrBusy = errors.New("mount is in use")
)

// Source is what a mount shows. Its methods are called from many goroutines at
// once. Their context ends when the process that asked is killed; it must not be
// used after they return. An error that wraps
// [io/fs.ErrNotExist] (the point was deleted meanwhile) becomes ENOENT; any
// other is logged and becomes EIO.
type Source interface {
	// VMs returns the names of all virtual machines that have restore points,
	// each once, in the order to list them.
	VMs(ctx context.Context) ([]string, error)
	// Points returns the restore points of a VM, oldest first.
	Points(ctx context.Context, vm string) ([]Point, error)
	// Contents returns what a restore point holds; it never changes.
	Contents(ctx context.Context, pointID string) (Contents, error)
	// OpenDisk opens a disk of a restore point.
	OpenDisk(ctx context.Context, pointID, disk string) (image.DiskCloser, error)
}

// Point is a restore point in a list.
type Point struct {
	ID   string // unique among all points
	Time time.Time
}

// Contents is what a restore point holds. The mount keeps it and only reads it.
type Contents struct {
	Disks []DiskInfo
	Files map[string][]byte // small files by name, such as vm.xml; at most a few MiB together
}

// DiskInfo describes a disk without opening it.
type DiskInfo struct {
	Name      string // unique in its point
	Size      int64  // bytes
	DataBytes int64  // bytes that are not known to be zero, 0 to Size: the space the file seems to take
}

// Options of a mount. The zero value is a private mount.
type Options struct {
	// AllowOther lets other users into the mount, such as the one that QEMU
	// runs as. For users other than root it needs the line user_allow_other in /etc/fuse.conf.
	AllowOther bool
	// FSName is what mount and df show as the device; "holdfast" if empty.
	FSName string
	// Logger is told of errors of the source and its disks; [slog.Default] if nil.
	Logger *slog.Logger
}
