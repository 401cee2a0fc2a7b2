package faultfs

import (
	"io"
	"os"
	"syscall"
)

// file is a handle.
type file struct {
	fs       *FS
	name     string
	node     *node
	writable bool
	closed   bool // guarded by fs.mu
}

// step is stepLocked for a handle; the error may be that it is closed.
func (h *file) step(kind Kind, off, length int64) (Effect, error) {
	op := Op{Kind: kind, Name: h.name, Off: off, Len: length}
	var err error
	switch {
	case h.closed:
		err = os.ErrClosed
	case off < 0 || length < 0:
		err = syscall.EINVAL
	case !h.writable && kind&(Write|Truncate|PunchHole) != 0:
		err = syscall.EBADF
	default:
		return h.fs.stepLocked(op)
	}
	return Nothing, &os.PathError{Op: kind.String(), Path: h.name, Err: err}
}

func (h *file) Name() string { return h.name }

func (h *file) Size() (int64, error) {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	if h.closed {
		return 0, os.ErrClosed
	}
	return h.node.length, nil
}

func (h *file) ReadAt(p []byte, off int64) (int, error) {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	if _, err := h.step(Read, off, int64(len(p))); err != nil {
		return 0, err
	}
	n := h.node.read(p, off)
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (h *file) WriteAt(p []byte, off int64) (int, error) {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	effect, err := h.step(Write, off, int64(len(p)))
	switch effect {
	case Nothing:
		return 0, err
	case Half:
		p = p[:len(p)/2]
	case Whole:
	}
	if fits := h.fs.fitsLocked(h.node, p, off); fits < len(p) {
		p = p[:fits]
		err = &os.PathError{Op: Write.String(), Path: h.name, Err: syscall.ENOSPC}
	}
	h.fs.used += h.node.write(p, off)
	return len(p), err
}

// fitsLocked returns how many bytes of p there is room for at off.
func (f *FS) fitsLocked(n *node, p []byte, off int64) int {
	if f.size == 0 {
		return len(p)
	}
	free := f.size - f.used
	for done := 0; done < len(p); {
		at := off + int64(done)
		if !n.has(at / sectorSize) {
			if free < sectorSize {
				return done
			}
			free -= sectorSize
		}
		done = min(len(p), done+int(sectorSize-at%sectorSize))
	}
	return len(p)
}

func (h *file) Truncate(size int64) error {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	effect, err := h.step(Truncate, 0, size)
	if effect == Whole {
		h.fs.used += h.node.truncate(size)
	}
	return err
}

func (h *file) PunchHole(off, length int64) error {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	effect, err := h.step(PunchHole, off, length)
	switch effect {
	case Nothing:
		return err
	case Half:
		length /= 2
	case Whole:
	}
	h.fs.used += h.node.punch(off, length)
	return err
}

func (h *file) Sync() error {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	if _, err := h.step(Sync, 0, 0); err != nil {
		if !h.fs.fault.Kill {
			h.node.dropDirty()
		}
		return err
	}
	h.node.sync()
	return nil
}

func (h *file) NextHole(off int64) (int64, error) {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	if h.closed {
		return 0, os.ErrClosed
	}
	for off < h.node.length && h.node.has(off/sectorSize) {
		off = (off/sectorSize + 1) * sectorSize
	}
	return min(off, h.node.length), nil
}

func (h *file) DropCache() error {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	if h.closed {
		return os.ErrClosed
	}
	h.fs.used += h.node.dropCache()
	return nil
}

func (h *file) Close() error {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	if h.closed {
		return os.ErrClosed
	}
	h.closed = true
	h.node.opened--
	h.fs.releaseLocked(h.node)
	return nil
}
