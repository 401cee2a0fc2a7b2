package image

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// DiskCloser is a Disk that holds files or connections.
type DiskCloser interface {
	Disk
	io.Closer
}

// OpenOptions say how far an image may reach. The zero value is the safe one.
type OpenOptions struct {
	// AllowOutside lets the paths inside an image (backing files, extent
	// files, parents) name files outside the image's own folder.
	AllowOutside bool
	// OpenBacking opens the file that an image names as its backing file or
	// parent and takes ownership of f, also when it fails. format is the
	// image's word for its format, "" where it has none. Nil refuses images
	// that have a backing file. The one that package diskfile sets bounds the
	// depth of the chain.
	OpenBacking func(f *os.File, format string) (DiskCloser, error)
}

// OpenReferenced opens for reading the file that the image at imagePath names
// as ref (a backing file, an extent file or a parent), relative to the image's
// folder. Unless allowOutside is set, a path or a symbolic link that leads out
// of that folder is refused. Only regular files are opened; with
// allowOutside also block devices.
func OpenReferenced(imagePath, ref string, allowOutside bool) (*os.File, error) {
	if ref == "" || strings.ContainsRune(ref, 0) {
		return nil, fmt.Errorf("%w: %s names a file with an empty or broken name", ErrCorrupt, imagePath)
	}
	folder, err := filepath.Abs(filepath.Dir(imagePath))
	if err != nil {
		return nil, err
	}
	path := ref
	if !filepath.IsAbs(path) {
		path = filepath.Join(folder, path)
	}
	if allowOutside {
		return openRegular(path, func() (*os.File, error) { return os.Open(path) }, true)
	}
	rel, err := filepath.Rel(folder, filepath.Clean(path))
	if err != nil || !filepath.IsLocal(rel) {
		return nil, outsideError(imagePath, ref)
	}
	f, err := openRegular(path, func() (*os.File, error) { return os.OpenInRoot(folder, rel) }, false)
	if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, os.ErrPermission) && !errors.Is(err, ErrUnsupported) {
		// os.Root has no sentinel for a symbolic link that leaves the folder.
		return nil, fmt.Errorf("%w (%w)", outsideError(imagePath, ref), err)
	}
	return f, err
}

func outsideError(imagePath, ref string) error {
	return fmt.Errorf("%w: %s refers to %q outside its own folder; allow outside references if you trust the image",
		ErrUnsupported, imagePath, ref)
}

// openRegular looks before it opens: opening a named pipe would wait for ever.
func openRegular(path string, open func() (*os.File, error), devices bool) (*os.File, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	isBlock := info.Mode()&os.ModeDevice != 0 && info.Mode()&os.ModeCharDevice == 0
	if !info.Mode().IsRegular() && !(devices && isBlock) {
		return nil, fmt.Errorf("%w: %s is not a regular file", ErrUnsupported, path)
	}
	return open()
}
