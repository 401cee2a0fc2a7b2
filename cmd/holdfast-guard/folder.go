package main

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/guard"
)

// immutableFlag is FS_IMMUTABLE_FL of linux/fs.h.
const immutableFlag = 0x10

var (
	// errUnsupported means that the file system has no immutable attribute.
	errUnsupported = errors.New("this file system has no immutable attribute; use ext4, XFS or Btrfs")
	// errNotOurs means that a name stands for something that the guard does not touch.
	errNotOurs = errors.New("not a plain file of the repository")
	errInUse   = errors.New("a process has the file open for writing; it is immutable, but what is open can still be written to; ask again once it is closed")
)

// folder is the data folder. Nothing outside it is ever opened.
type folder struct {
	fd    int
	id    string // guard.FolderID
	owner uint32
}

func openFolder(path string) (*folder, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		_ = unix.Close(fd) // it was only looked at
		return nil, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return &folder{fd, guard.FolderID(&st), st.Uid}, nil
}

func (f *folder) close() { _ = unix.Close(f.fd) }

// open opens a file beneath the folder and makes sure that it is one of the repository's: a
// plain file of the folder's owner or of root, with no other name. Its path has no
// symbolic link and crosses into no other file system.
// Source: openat2(2). O_NONBLOCK: no FIFO and no lease makes us wait.
func (f *folder) open(name string) (*os.File, error) {
	fd, err := unix.Openat2(f.fd, name, &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_NONBLOCK | unix.O_NOFOLLOW | unix.O_NOCTTY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV,
	})
	if errors.Is(err, unix.ELOOP) || errors.Is(err, unix.EXDEV) || errors.Is(err, unix.ENXIO) {
		err = fmt.Errorf("%w: %w", errNotOurs, err)
	}
	if err != nil {
		return nil, err
	}
	file := os.NewFile(uintptr(fd), name)
	var st unix.Stat_t
	err = unix.Fstat(fd, &st)
	if err == nil && (st.Mode&unix.S_IFMT != unix.S_IFREG || st.Nlink != 1 || st.Uid != f.owner && st.Uid != 0) {
		err = fmt.Errorf("%w: mode %#o, %d links, user %d", errNotOurs, st.Mode, st.Nlink, st.Uid)
	}
	if err != nil {
		file.Close()
		return nil, err
	}
	return file, nil
}

// immutable reports whether a file carries the attribute.
func (f *folder) immutable(name string) (bool, error) {
	file, err := f.open(name)
	if err != nil {
		return false, err
	}
	defer file.Close()
	flags, err := getFlags(int(file.Fd()))
	return flags&immutableFlag != 0, err
}

// set makes a file carry the attribute, or not. That it does not is durable on return. On
// errInUse it carries it all the same.
func (f *folder) set(name string, immutable bool) error {
	file, err := f.open(name)
	if err != nil {
		return err
	}
	defer file.Close()
	fd := int(file.Fd())
	flags, err := getFlags(fd)
	if err != nil {
		return err
	}
	want := flags &^ immutableFlag
	if immutable {
		want |= immutableFlag
	}
	if want != flags {
		if err := supported(unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, int(want))); err != nil {
			return err
		}
		if flags, err = getFlags(fd); err != nil || flags != want {
			return errors.Join(err, errUnsupported)
		}
	}
	if !immutable {
		// Nobody would know of a file whose attribute came back with a loss of power.
		return unix.Fsync(fd)
	}
	// Some file systems look at the attribute only when a file is opened. A read lease
	// is given only where nobody has the file open for writing.
	// Source: fcntl(2), "Leases". Closing the file gives the lease back.
	_, err = unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_RDLCK)
	if errors.Is(err, unix.EAGAIN) {
		return errInUse
	}
	return err
}

// getFlags returns a file's attributes.
// Source: ioctl_iflags(2).
func getFlags(fd int) (uint32, error) {
	flags, err := unix.IoctlGetUint32(fd, unix.FS_IOC_GETFLAGS)
	return flags, supported(err)
}

// supported turns what file systems answer that have no attributes into errUnsupported.
func supported(err error) error {
	if errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
		return errUnsupported
	}
	return err
}
