package diskfile

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/internal/imgfile"
)

// Write writes d as a new image file at path: raw, qcow2, vmdk or vhdx. When
// it returns nil the file is whole and on stable storage; when it fails, or
// ctx ends, there is none. A file that is there already is left alone; the
// error then wraps [os.ErrExist]. A block device takes a raw disk in place, if
// it is large enough and nobody uses it; what an error leaves on it is neither
// the old nor the new disk.
func Write(ctx context.Context, path string, d image.Disk, format Format, o image.WriteOptions) error {
	if err := write(ctx, path, d, format, o); err != nil {
		return fmt.Errorf("write disk image %s: %w", path, err)
	}
	return nil
}

func write(ctx context.Context, path string, d image.Disk, format Format, o image.WriteOptions) error {
	driver, err := driverOf(format)
	if err == nil && driver.write == nil {
		err = fmt.Errorf("%w: format %s can only be read", image.ErrUnsupported, format)
	}
	if err != nil {
		return fmt.Errorf("%w; %s can be written", err, writable())
	}
	if info, err := os.Stat(path); err == nil && imgfile.IsBlockDevice(info.Mode()) {
		if format != Raw {
			return fmt.Errorf("%w: a block device takes format raw, not %s", image.ErrUnsupported, format)
		}
		return writeDevice(ctx, path, d, driver, o)
	}
	if _, err := os.Lstat(path); err == nil { // before hours of work; publish looks again
		return os.ErrExist
	} else if !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return writeFile(ctx, path, d, driver, o)
}

func writable() string {
	return names(func(d driver) bool { return d.write != nil })
}

// writeDevice writes to a device that nobody has mounted or holds.
func writeDevice(ctx context.Context, path string, d image.Disk, driver driver, o image.WriteOptions) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_EXCL, 0) // O_EXCL: the kernel refuses a device in use
	if err != nil {
		return err
	}
	if err := driver.write(ctx, f, d, o); err != nil {
		f.Close()
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

func writeFile(ctx context.Context, path string, d image.Disk, driver driver, o image.WriteOptions) (err error) {
	folder, name := filepath.Split(path)
	f, err := os.CreateTemp(filepath.Clean(folder), "."+name+".partial-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Close()           // again where it was closed: harmless
			os.Remove(f.Name()) // not there once it has the target's name
		}
	}()
	if err := driver.write(ctx, f, d, o); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := publish(f.Name(), path); err != nil {
		return err
	}
	return syncFolder(filepath.Dir(path))
}

// publish renames a finished file; it never replaces one. On a file system
// that cannot promise that in a rename, a second link does.
func publish(temporary, path string) error {
	err := unix.Renameat2(unix.AT_FDCWD, temporary, unix.AT_FDCWD, path, unix.RENAME_NOREPLACE)
	if !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOSYS) {
		return err
	}
	if err := os.Link(temporary, path); err != nil {
		return err
	}
	return os.Remove(temporary)
}

func syncFolder(path string) error {
	folder, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(folder.Sync(), folder.Close())
}
