// Package durable is the one way in which Holdfast writes files that must
// survive a crash of the process and a loss of power.
//
// Everything that the repository writes itself goes through [FS], so that a
// test can put a double in its place that fails or forgets what was not synced.
// (BadgerDB writes its own files; the index can be rebuilt.)
//
// # Durability
//
// Bytes of a file are durable once Sync has returned nil. A name (created,
// renamed, removed) is durable once SyncDir of its folder has returned nil. A
// Sync that failed may have dropped the bytes, and a second one that succeeds
// proves nothing: the file is then lost to its writer.
package durable

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// File is an open file.
type File interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	// Name returns the path that the file was opened by.
	Name() string
	// Size returns the file's length in bytes.
	Size() (int64, error)
	// Sync makes all bytes written so far durable.
	Sync() error
	// Truncate sets the file's length.
	Truncate(size int64) error
	// PunchHole makes [off, off+length) read as zeros and gives its room back.
	// The file keeps its length. Where the file system cannot do it, the error
	// is [errors.ErrUnsupported] and nothing has changed.
	PunchHole(off, length int64) error
	// NextHole returns the offset of the first byte at or after off that the file
	// system keeps no room for, and the file's length if there is none before.
	// Where the file system cannot tell, there is none.
	NextHole(off int64) (int64, error)
	// DropCache makes reads from now on see what the disk holds, after a Sync
	// that succeeded. Bytes that an earlier Sync failed to write can be read
	// until then, and are not written any more.
	DropCache() error
}

// FS is the set of operations on files that durable state is made of. Errors
// wrap those of package os and name the path.
type FS interface {
	// Open opens a file for reading.
	Open(name string) (File, error)
	// OpenWrite opens an existing file for reading and writing.
	OpenWrite(name string) (File, error)
	// Create makes a new file for reading and writing; an existing one is an
	// error.
	Create(name string) (File, error)
	// Rename gives a file a new name, replacing what had that name.
	Rename(oldName, newName string) error
	// Remove removes a file.
	Remove(name string) error
	// ReadDir lists a folder, sorted by name.
	ReadDir(name string) ([]os.DirEntry, error)
	// Mkdir makes a folder; one that exists is no error.
	Mkdir(name string) error
	// SyncDir makes the names in a folder durable.
	SyncDir(name string) error
	// Space returns the bytes that the file system of name has free for us and
	// in all.
	Space(name string) (free, total int64, err error)
	// Immutable reports whether a file carries the immutable attribute: then nobody
	// can write, rename, link or remove it, which fails with EPERM. Where the file
	// system has no such attribute, no file carries it.
	Immutable(name string) (bool, error)
}

// OS returns the operating system's file system.
func OS() FS { return osFS{} }

type osFS struct{}

type osFile struct{ *os.File }

func (f osFile) Size() (int64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

// Sync leaves out the times of the file, which need a commit of the file
// system's journal and mean nothing to us. The length is not left out.
// Source: fdatasync(2).
func (f osFile) Sync() error { return f.call("fdatasync", unix.Fdatasync) }

// Source: fallocate(2), "Deallocating file space".
func (f osFile) PunchHole(off, length int64) error {
	return f.call("punch hole", func(fd int) error {
		return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, length)
	})
}

// Source: lseek(2), "Seeking file data and holes": the end of the file is a hole, and
// to begin there is ENXIO.
func (f osFile) NextHole(off int64) (hole int64, err error) {
	size, err := f.Size()
	if err != nil || off >= size {
		return size, err
	}
	err = f.call("seek hole", func(fd int) error {
		hole, err = unix.Seek(fd, off, unix.SEEK_HOLE)
		return err
	})
	return hole, err
}

// Source: posix_fadvise(2): clean pages are dropped, and those that could not be
// written count as clean.
func (f osFile) DropCache() error {
	return f.call("drop cache", func(fd int) error {
		return unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED)
	})
}

// call runs a system call on the file, again when a signal interrupts it.
func (f osFile) call(op string, call func(fd int) error) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return &os.PathError{Op: op, Path: f.Name(), Err: err}
	}
	var failed error
	err = conn.Control(func(fd uintptr) {
		for failed = unix.EINTR; errors.Is(failed, unix.EINTR); {
			failed = call(int(fd))
		}
	})
	if err = cmp.Or(err, failed); err != nil {
		return &os.PathError{Op: op, Path: f.Name(), Err: err}
	}
	return nil
}

func open(name string, flag int) (File, error) {
	f, err := os.OpenFile(name, flag, 0o600)
	if err != nil {
		return nil, err
	}
	return osFile{f}, nil
}

func (osFS) Open(name string) (File, error)       { return open(name, os.O_RDONLY) }
func (osFS) OpenWrite(name string) (File, error)  { return open(name, os.O_RDWR) }
func (osFS) Create(name string) (File, error)     { return open(name, os.O_RDWR|os.O_CREATE|os.O_EXCL) }
func (osFS) Rename(oldName, newName string) error { return os.Rename(oldName, newName) }
func (osFS) Remove(name string) error             { return os.Remove(name) }

func (osFS) ReadDir(name string) ([]os.DirEntry, error) { return os.ReadDir(name) }

func (osFS) Mkdir(name string) error {
	err := os.Mkdir(name, 0o700)
	if errors.Is(err, os.ErrExist) {
		return nil
	}
	return err
}

func (osFS) SyncDir(name string) error {
	d, err := os.Open(name)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

func (osFS) Space(name string) (free, total int64, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(name, &st); err != nil {
		return 0, 0, &os.PathError{Op: "statfs", Path: name, Err: err}
	}
	return int64(st.Bavail) * st.Bsize, int64(st.Blocks) * st.Bsize, nil
}

// Source: statx(2), "File attributes".
func (osFS) Immutable(name string) (bool, error) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, name, unix.AT_SYMLINK_NOFOLLOW, 0, &st); err != nil {
		return false, &os.PathError{Op: "statx", Path: name, Err: err}
	}
	return st.Attributes&unix.STATX_ATTR_IMMUTABLE != 0, nil
}

// MkdirAll makes a folder and those above it that are missing. The folder's name and
// those that it made are durable when it returns nil.
func MkdirAll(fsys FS, name string) error {
	name = filepath.Clean(name)
	parent := filepath.Dir(name)
	err := fsys.Mkdir(name)
	if errors.Is(err, os.ErrNotExist) && parent != name {
		if err := MkdirAll(fsys, parent); err != nil {
			return err
		}
		err = fsys.Mkdir(name)
	}
	if err != nil {
		return err
	}
	return fsys.SyncDir(parent)
}

// temporarySuffix marks a file that is being written. What a crash leaves of
// it is not part of any state: see RemoveTemporary.
const temporarySuffix = ".tmp"

// WriteFile makes data the content of name, durable when it returns nil. A
// crash at any moment leaves the old content or the new, whole.
func WriteFile(fsys FS, name string, data []byte) (err error) {
	temporary := name + temporarySuffix
	if err := fsys.Remove(temporary); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	f, err := fsys.Create(temporary)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = fsys.Remove(temporary) // what is left is removed at the next opening
		}
	}()
	if _, err := f.WriteAt(data, 0); err != nil {
		return errors.Join(err, f.Close())
	}
	if err := f.Sync(); err != nil {
		return errors.Join(err, f.Close())
	}
	if err := f.Close(); err != nil {
		return err
	}
	// The content is durable under its temporary name; the rename is what
	// commits it.
	if err := fsys.Rename(temporary, name); err != nil {
		return err
	}
	return fsys.SyncDir(filepath.Dir(name))
}

// ReadFile returns the content of name; a file longer than limit bytes is an
// error.
func ReadFile(fsys FS, name string, limit int64) ([]byte, error) {
	f, err := fsys.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	if size > limit {
		return nil, fmt.Errorf("%s has %d bytes, more than the %d that it may have", name, size, limit)
	}
	data := make([]byte, size)
	if n, err := f.ReadAt(data, 0); n < len(data) {
		if err == nil || errors.Is(err, io.EOF) {
			err = fmt.Errorf("read %s: %w", name, io.ErrUnexpectedEOF)
		}
		return nil, err
	}
	return data, nil
}

// IsTemporary reports whether a file has the name of one that WriteFile is writing.
func IsTemporary(name string) bool { return filepath.Ext(name) == temporarySuffix }

// RemoveTemporary removes the files that interrupted calls of WriteFile left
// in a folder.
func RemoveTemporary(fsys FS, folder string) error {
	entries, err := fsys.ReadDir(folder)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if IsTemporary(e.Name()) {
			if err := fsys.Remove(filepath.Join(folder, e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}
