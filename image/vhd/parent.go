package vhd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"unicode/utf16"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/internal/imgfile"
)

const (
	locatorsAt   = 576 // in the dynamic header
	locatorSize  = 24
	locatorCount = 8
	maxPath      = 64 << 10 // bytes; Windows' own limit

	codeRelative = "W2ru" // path relative to the child, UTF-16LE
	codeAbsolute = "W2ku" // absolute path, UTF-16LE
)

// parentRef is what a dynamic header says about the disk's parent.
type parentRef struct {
	id       identity
	name     string // the parent's file name, or its path
	locators []locator
}

// locator says where in the file a path to the parent stands.
type locator struct {
	code string
	len  uint32
	at   uint64
}

func parseParentRef(header []byte) parentRef {
	ref := parentRef{id: identity(header[40:56]), name: text(header[64:576], binary.BigEndian)}
	for i := range locatorCount {
		b := header[locatorsAt+i*locatorSize:]
		ref.locators = append(ref.locators, locator{
			code: string(b[:4]),
			len:  binary.BigEndian.Uint32(b[8:]),
			at:   binary.BigEndian.Uint64(b[16:]),
		})
	}
	return ref
}

// text decodes UTF-16 up to its end or the first NUL.
func text(b []byte, order binary.ByteOrder) string {
	var units []uint16
	for ; len(b) >= 2; b = b[2:] {
		unit := order.Uint16(b)
		if unit == 0 {
			break
		}
		units = append(units, unit)
	}
	return string(utf16.Decode(units))
}

// openParent opens the first of the parent's paths that leads to the disk with
// the recorded identity. If none does, the error is that of the first
// path that led anywhere.
func openParent(f *os.File, h header, o image.OpenOptions) (image.DiskCloser, error) {
	if o.OpenBacking == nil {
		return nil, fmt.Errorf("%w: %s is a differencing disk, and its parent may not be opened here", image.ErrUnsupported, f.Name())
	}
	paths, err := parentPaths(f, h.parent)
	if err != nil {
		return nil, err
	}
	if len(paths) == 0 {
		return nil, corrupt(f, "a differencing disk that does not name its parent")
	}
	var failed error
	for _, path := range paths {
		parent, err := openParentAt(f, path, h.parent.id, o)
		if err == nil {
			return parent, nil
		}
		if failed == nil || errors.Is(failed, os.ErrNotExist) && !errors.Is(err, os.ErrNotExist) {
			failed = err
		}
	}
	return nil, fmt.Errorf("parent of %s: %w", f.Name(), failed)
}

// openParentAt opens the parent at path, if its identity is id.
func openParentAt(child *os.File, path string, id identity, o image.OpenOptions) (image.DiskCloser, error) {
	f, err := image.OpenReferenced(child.Name(), path, o.AllowOutside)
	if err != nil {
		return nil, err
	}
	fileSize, err := imgfile.Size(f)
	if err == nil {
		var ft footer
		if ft, err = readFooter(f, fileSize); err == nil && ft.id != id {
			err = corrupt(f, "its identity is %v, but the differencing disk was made over %v: the parent was replaced", ft.id, id)
		}
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return o.OpenBacking(f, "vhd")
}

// parentPaths returns the paths by which the image names its parent, most
// telling first. Paths are Windows paths: of one with a drive or a server, which
// means nothing here, the file name is taken.
func parentPaths(f *os.File, ref parentRef) ([]string, error) {
	var relative, absolute []string
	for _, l := range ref.locators {
		if l.code != codeRelative && l.code != codeAbsolute {
			continue
		}
		if l.len > maxPath || l.at > uint64(image.MaxSize) {
			return nil, corrupt(f, "a parent locator of %d bytes at byte %d", l.len, l.at)
		}
		b := make([]byte, l.len)
		if err := imgfile.ReadFull(f, b, int64(l.at)); err != nil {
			return nil, err
		}
		if path := localPath(text(b, binary.LittleEndian)); l.code == codeRelative {
			relative = append(relative, path)
		} else {
			absolute = append(absolute, path)
		}
	}
	var paths []string
	for _, path := range append(append(relative, absolute...), localPath(ref.name)) {
		if path != "" {
			paths = append(paths, path)
		}
	}
	return paths, nil
}

// localPath turns a Windows path into one that can be looked for here.
func localPath(path string) string {
	path = strings.ReplaceAll(path, `\`, "/")
	if drive := len(path) > 1 && path[1] == ':'; drive || strings.HasPrefix(path, "//") {
		return path[strings.LastIndexAny(path, "/:")+1:]
	}
	return path
}
