package fusefs

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/image"
)

const (
	// maxRead is the largest read that the kernel sends, in bytes.
	maxRead = 1 << 20
	// blockSize is st_blksize, the size of reads that suits disks, in bytes.
	blockSize = 128 << 10
	// holeBlock is the size of the blocks that holes consist of, in bytes.
	holeBlock = 4096
	// openFlags let the kernel keep what it read when a file is opened again, and
	// close files without telling us twice.
	openFlags = fuse.FOPEN_KEEP_CACHE | fuse.FOPEN_NOFLUSH
)

// diskFile is the file of a whole disk.
type diskFile struct {
	base
	vm, pointID string
	info        DiskInfo
}

var _ fs.NodeOpener = (*diskFile)(nil)

func (f *diskFile) attr() fuse.Attr {
	a := f.baseAttr(syscall.S_IFREG|f.tree.fileMode, f.info.Size)
	a.Blocks = blocks(f.info.DataBytes)
	return a
}

// Getattr implements [fs.NodeGetattrer].
func (f *diskFile) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	return getattr(f, out)
}

// Open implements [fs.NodeOpener].
func (f *diskFile) Open(ctx context.Context, _ uint32) (fs.FileHandle, uint32, syscall.Errno) {
	ctx, cancel := untilKilled(ctx)
	defer cancel()
	h, err := f.tree.disks.open(ctx, f)
	if err != nil {
		return nil, 0, f.tree.failed(ctx, err, "open a disk", f.logAttrs()...)
	}
	return h, openFlags, 0
}

func (f *diskFile) logAttrs() []slog.Attr {
	return []slog.Attr{slog.String("vm", f.vm), slog.String("point", f.pointID), slog.String("disk", f.info.Name)}
}

// diskTable holds the disks that are open, each once however often its file is.
type diskTable struct {
	reads sync.WaitGroup // reads that run, abandoned ones included

	mu      sync.Mutex
	disks   map[diskKey]*openDisk // guarded by mu
	handles map[*handle]struct{}  // open file handles; guarded by mu
}

type diskKey struct{ pointID, disk string }

// openDisk is a disk in use. The last user closes it.
type openDisk struct {
	table *diskTable
	key   diskKey
	users int // handles, openers and reads; guarded by table.mu

	opening chan struct{}    // a lock that a waiter can give up on: whoever put a value in holds it
	disk    image.DiskCloser // nil until opened; guarded by opening, and constant afterwards
}

// open returns a new handle of the file's disk, opening the disk if no other
// handle has.
func (t *diskTable) open(ctx context.Context, f *diskFile) (*handle, error) {
	key := diskKey{f.pointID, f.info.Name}
	t.mu.Lock()
	d := t.disks[key]
	if d == nil {
		d = &openDisk{table: t, key: key, opening: make(chan struct{}, 1)}
		t.disks[key] = d
	}
	d.users++
	t.mu.Unlock()
	if err := d.ensureOpen(ctx, f); err != nil {
		d.release()
		return nil, err
	}
	h := &handle{file: f, disk: d}
	t.mu.Lock()
	t.handles[h] = struct{}{}
	t.mu.Unlock()
	return h, nil
}

func (d *openDisk) ensureOpen(ctx context.Context, f *diskFile) error {
	select {
	case d.opening <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-d.opening }()
	if d.disk != nil {
		return nil
	}
	disk, err := f.tree.src.OpenDisk(ctx, d.key.pointID, d.key.disk)
	if err != nil {
		return err
	}
	if disk.Size() != f.info.Size {
		disk.Close()
		return fmt.Errorf("disk has %d bytes where the restore point lists %d", disk.Size(), f.info.Size)
	}
	d.disk = disk
	return nil
}

// release ends one use of the disk.
func (d *openDisk) release() {
	d.table.mu.Lock()
	d.users--
	last := d.users == 0
	if last {
		delete(d.table.disks, d.key)
	}
	d.table.mu.Unlock()
	if last && d.disk != nil {
		d.disk.Close() // opened for reading only: nothing is lost with the error
	}
}

// closeAll closes the disks of all handles, which nobody may use any more, and
// waits for abandoned reads. The kernel says nothing of the handles that were
// open when a mount was torn down.
func (t *diskTable) closeAll() {
	t.mu.Lock()
	left := t.handles
	t.handles = nil
	t.mu.Unlock()
	for h := range left {
		h.disk.release()
	}
	t.reads.Wait()
}

// handle is one open file of a disk.
type handle struct {
	file *diskFile
	disk *openDisk
}

var (
	_ fs.FileReader   = (*handle)(nil)
	_ fs.FileLseeker  = (*handle)(nil)
	_ fs.FileReleaser = (*handle)(nil)
)

// Release implements [fs.FileReleaser].
func (h *handle) Release(context.Context) syscall.Errno {
	t := h.disk.table
	t.mu.Lock()
	delete(t.handles, h)
	t.mu.Unlock()
	h.disk.release()
	return 0
}

// Read implements [fs.FileReader]. The disk is read in a goroutine and into a
// buffer of our own, so that a killed caller can be let go while the
// storage hangs: without an answer the kernel keeps it.
func (h *handle) Read(ctx context.Context, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	_, n := image.Clip(off, int64(len(dest)), h.file.info.Size)
	if n == 0 {
		return fuse.ReadResultData(nil), 0
	}
	d, res := h.disk, newReadResult(n)
	d.table.mu.Lock()
	d.users++
	d.table.mu.Unlock()
	done := make(chan error, 1)
	d.table.reads.Go(func() {
		defer d.release()
		done <- image.ReadFull(d.disk, res.data, off)
	})
	var err error
	select {
	case err = <-done:
	case <-ctx.Done():
		killed, cancel := untilKilled(ctx)
		defer cancel()
		select {
		case err = <-done:
		case <-killed.Done():
			return nil, syscall.EINTR // the buffer stays with the read
		}
	}
	if err != nil {
		res.Done()
		h.file.tree.log.LogAttrs(ctx, slog.LevelError, "a mount cannot read a disk",
			append(h.file.logAttrs(), slog.Int64("offset", off), slog.Int64("length", n), slog.Any("error", err))...)
		return nil, syscall.EIO
	}
	return res, 0
}

// Lseek implements [fs.FileLseeker] for SEEK_DATA and SEEK_HOLE, the only ones
// that the kernel passes on. The end of the disk counts as a hole. As in other
// file systems holes consist of whole blocks: QEMU loses data next to holes that start or end inside
// a sector. Source: lseek(2).
func (h *handle) Lseek(ctx context.Context, off uint64, whence uint32) (uint64, syscall.Errno) {
	size := h.file.info.Size
	if off >= uint64(size) {
		return 0, syscall.ENXIO
	}
	if whence != unix.SEEK_DATA && whence != unix.SEEK_HOLE {
		return 0, syscall.EINVAL
	}
	ctx, cancel := untilKilled(ctx)
	defer cancel()
	from := int64(off)
	start := from - from%holeBlock
	for e, err := range image.Coalesce(h.disk.disk.Extents(ctx, start, size-start)) {
		if err != nil {
			return 0, h.file.tree.failed(ctx, err, "read the extents of a disk",
				append(h.file.logAttrs(), slog.Uint64("offset", off))...)
		}
		switch {
		case whence == unix.SEEK_DATA && !e.Zero:
			return uint64(max(from, e.Off-e.Off%holeBlock)), 0
		case whence == unix.SEEK_HOLE && e.Zero:
			first, end := (e.Off+holeBlock-1)/holeBlock*holeBlock, e.End()
			if end < size {
				end -= end % holeBlock
			}
			if first < end {
				return uint64(max(from, first)), 0
			}
		}
	}
	if whence == unix.SEEK_DATA {
		return 0, syscall.ENXIO
	}
	return uint64(size), 0
}

// readResult is the answer to a read. Its buffer goes back to the pool when the
// kernel has taken it.
type readResult struct {
	buf  *[]byte // maxRead bytes
	data []byte  // the part that was asked for
}

var buffers = sync.Pool{New: func() any { b := make([]byte, maxRead); return &b }}

func newReadResult(n int64) *readResult {
	buf := buffers.Get().(*[]byte)
	return &readResult{buf: buf, data: (*buf)[:n]}
}

// Size implements [fuse.ReadResult].
func (r *readResult) Size() int { return len(r.data) }

// Bytes implements [fuse.ReadResult] by copying: the bytes outlive Done.
func (r *readResult) Bytes(p []byte) ([]byte, fuse.Status) {
	return p[:copy(p, r.data)], fuse.OK
}

// Slices lets the server write straight from the buffer; it calls Done only
// after that.
func (r *readResult) Slices() ([][]byte, fuse.Status) { return [][]byte{r.data}, fuse.OK }

// Done implements [fuse.ReadResult].
func (r *readResult) Done() { buffers.Put(r.buf) }
