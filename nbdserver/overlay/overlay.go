package overlay

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/internal/durable"
)

// NoLimit takes a limit away, when it is given to Open.
const NoLimit int64 = -1

// Options of an overlay. The zero value is good.
type Options struct {
	// FS is where the file lies; nil is the operating system.
	FS durable.FS
	// Limit is how many bytes of data the file may hold. It is kept in the
	// file. For Create 0 is no limit; for Open 0 is the one that is kept,
	// and any other value takes its place. Negative ones but NoLimit are an error.
	Limit int64
	// Reserve is how many bytes of the file system new data leaves free, so
	// that the map always finds room. 0 is 1 % of it, at most 256 MiB.
	Reserve int64
	// Meta is kept in the file by Create, up to MaxMeta bytes, and returned by
	// Stat.
	Meta []byte
	// Log hears of changes that were answered and turn out to be lost. Default
	// slog.Default().
	Log *slog.Logger

	random   io.Reader                // of the id; nil is crypto/rand
	boot     func() ([16]byte, error) // the id of this boot of the machine; nil is readBoot
	logLimit int64                    // of the log in bytes; 0 is what the reserve allows
}

func (o Options) withDefaults(path string) (Options, error) {
	if o.FS == nil {
		o.FS = durable.OS()
	}
	o.Log = cmp.Or(o.Log, slog.Default())
	if o.random == nil {
		o.random = rand.Reader
	}
	if o.boot == nil {
		o.boot = readBoot
	}
	if o.Limit < NoLimit || o.Reserve < 0 || len(o.Meta) > MaxMeta {
		return o, fmt.Errorf("overlay %s: limit %d, reserve %d or meta of %d bytes out of range", path, o.Limit, o.Reserve, len(o.Meta))
	}
	if o.Reserve == 0 {
		_, total, err := o.FS.Space(filepath.Dir(path))
		if err != nil {
			return o, fmt.Errorf("overlay %s: %w", path, err)
		}
		o.Reserve = min(total/100, 256<<20)
	}
	if o.logLimit == 0 {
		o.logLimit = max(minLog, min(maxLog, o.Reserve/4))
	}
	return o, nil
}

// Overlay is an open overlay. It implements [image.Writer].
type Overlay struct {
	file   durable.File
	path   string
	base   image.Disk
	header *header
	layout layout
	limit  int64

	log   *changeLog
	locks rangeLock // on blocks whose state changes
	room  room
	used  atomic.Int64 // bytes of data blocks, and of those about to be

	mu        sync.RWMutex           // not held during I/O
	blocks    *blockMap              // guarded by mu
	noHoles   atomic.Bool            // the file system cannot punch holes
	failed    atomic.Pointer[string] // why a Sync or a change failed; nil if none did
	making    sync.Mutex             // held while a page of the map is made
	changes   atomic.Uint64
	syncing   sync.Mutex    // held by the one that syncs
	synced    atomic.Uint64 // those of changes that are durable
	zeroBlock [blockSize]byte
}

// Info is what Stat tells.
type Info struct {
	Size  int64  // of the disk in bytes
	Limit int64  // of the data in bytes; 0 is none
	Used  int64  // bytes of data
	Meta  []byte // what Create was given
}

// Create makes the overlay's file, which must not exist, and opens it. The file
// is durable when it returns.
func Create(path string, disk image.Disk, o Options) (*Overlay, error) {
	o, err := o.withDefaults(path)
	if err != nil {
		return nil, err
	}
	if size := disk.Size(); size < 0 || size > image.MaxSize {
		return nil, fmt.Errorf("overlay %s: %w: a disk of %d bytes", path, image.ErrUnsupported, size)
	}
	h := &header{size: disk.Size(), limit: max(0, o.Limit), meta: o.Meta}
	if _, err := io.ReadFull(o.random, h.id[:]); err != nil {
		return nil, fmt.Errorf("overlay %s: %w", path, err)
	}
	if err := create(path, h, o.FS); err != nil {
		return nil, fmt.Errorf("create overlay %s: %w", path, err)
	}
	ov, err := Open(path, disk, o) // which makes the name durable
	if err != nil {
		_ = o.FS.Remove(path)
		return nil, err
	}
	return ov, nil
}

// create makes a file with an empty map. All but its name is durable when it returns
// nil.
func create(path string, h *header, fsys durable.FS) error {
	if f, err := fsys.Open(path); err == nil {
		return errors.Join(os.ErrExist, f.Close())
	} else if !errors.Is(err, os.ErrNotExist) {
		return err
	}
	temporary := path + ".tmp" // as those of durable.WriteFile
	if err := fsys.Remove(temporary); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	f, err := fsys.Create(temporary)
	if err != nil {
		return err
	}
	if err := errors.Join(writeEmpty(f, h), f.Close()); err != nil {
		_ = fsys.Remove(temporary) // what is left is removed by the next Create
		return err
	}
	// The content is durable under its temporary name. The rename commits it, once
	// the folder is synced.
	if err := fsys.Rename(temporary, path); err != nil {
		_, _ = fsys.Remove(temporary), fsys.Remove(path) // it may have its name all the same
		return err
	}
	return nil
}

func writeEmpty(f durable.File, h *header) error {
	l := newLayout(h.size)
	if err := f.Truncate(l.end()); errors.Is(err, syscall.EFBIG) {
		return fmt.Errorf("a disk of %d bytes needs a file of %d, larger than the file system has them: %w", h.size, l.end(), err)
	} else if err != nil {
		return err
	}
	if _, err := f.WriteAt(h.encode(), 0); err != nil {
		return err
	}
	for k := range l.dirPages {
		if _, err := f.WriteAt(encodePage(&states{}, 0, h.id, l.dirPage(k)), l.dirPage(k)); err != nil {
			return err
		}
	}
	return f.Sync()
}

// Open opens an overlay over the disk that it was made for. The overlay does not
// own the disk, which must stay open.
func Open(path string, disk image.Disk, o Options) (*Overlay, error) {
	o, err := o.withDefaults(path)
	if err != nil {
		return nil, err
	}
	f, err := o.FS.OpenWrite(path)
	if err != nil {
		return nil, fmt.Errorf("open overlay: %w", err)
	}
	ov, err := open(f, path, disk, o)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("open overlay %s: %w", path, err)
	}
	return ov, nil
}

func open(f durable.File, path string, disk image.Disk, o Options) (_ *Overlay, err error) {
	h, err := readHeader(f)
	if err != nil {
		return nil, err
	}
	if h.size != disk.Size() {
		return nil, fmt.Errorf("an overlay of %d bytes over a disk of %d", h.size, disk.Size())
	}
	boot, err := o.boot()
	if err != nil {
		return nil, err
	}
	log := &changeLog{fs: o.FS, path: path + logSuffix, limit: o.logLimit, id: h.id, boot: boot}
	defer func() {
		if err != nil {
			err = errors.Join(err, log.close())
		}
	}()
	logged, marked, err := log.recover(newLayout(h.size))
	if err != nil {
		return nil, err
	}
	// What a killed process wrote may be in the page cache alone, and the name
	// too. What it failed to sync may still be there, and never be written.
	trusted, err := settle(f, h.size, log, logged, marked)
	if err != nil {
		return nil, err
	}
	if logged != nil && !trusted {
		logged = nil
		o.Log.Error("the file system of an overlay has lost data: all that was written since the last flush is lost; its guest is to be reset",
			slog.String("overlay", path))
	}
	if err := o.FS.SyncDir(filepath.Dir(path)); err != nil {
		return nil, err
	}
	h, m, err := load(f)
	if err != nil {
		return nil, err
	}
	if limit := max(0, cmp.Or(o.Limit, h.limit)); limit != h.limit {
		h.limit = limit
		if _, err := f.WriteAt(h.encode()[:pageSize], 0); err != nil {
			return nil, err
		}
		if err := f.Sync(); err != nil {
			return nil, err
		}
	}
	ov := &Overlay{
		file: f, path: path, base: disk, header: h, layout: m.layout, limit: h.limit, blocks: m, log: log,
		room: room{fs: o.FS, dir: filepath.Dir(path), reserve: o.Reserve},
	}
	if logged != nil {
		if err := m.replay(logged); err != nil {
			return nil, err
		}
		ov.changes.Add(1)
		if err := ov.Sync(); err != nil { // all that can be read from here on is durable
			return nil, err
		}
	}
	ov.used.Store(m.count() * blockSize)
	return ov, nil
}

// readHeader reads the header and the meta.
func readHeader(f durable.File) (*header, error) {
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	b := make([]byte, dirStart)
	if err := readFull(f, b[:min(size, dirStart)], 0); err != nil {
		return nil, err
	}
	h, err := decodeHeader(b)
	if err != nil {
		return nil, err
	}
	if l := newLayout(h.size); size < l.end() {
		return nil, fmt.Errorf("%w: the file has %d bytes, not %d", image.ErrCorrupt, size, l.end())
	}
	return h, nil
}

// load reads the header and the map. A sector of the map whose checksum is wrong is
// none of its errors; one that cannot be read is.
func load(f durable.File) (*header, *blockMap, error) {
	h, err := readHeader(f)
	if err != nil {
		return nil, nil, err
	}
	m := newBlockMap(newLayout(h.size))
	b := make([]byte, pageSize)
	for k := range m.dirPages {
		if err := m.load(f, h.id, k, b); err != nil {
			return nil, nil, err
		}
	}
	return h, m, nil
}

// load reads a page of the directory and the pages of the map that it refers to.
func (m *blockMap) load(f durable.File, id [16]byte, k int64, buf []byte) error {
	if err := readFull(f, buf, m.dirPage(k)); err != nil {
		return err
	}
	var dir page
	dir.bad = decodePage(&dir.states, buf, id, m.dirPage(k))
	for i := k * pageStates; i < min((k+1)*pageStates, m.pages); i++ {
		s, _, err := dir.run(i-k*pageStates, i-k*pageStates+1)
		switch {
		case err != nil:
			m.table[i] = m.rotten
		case s == zero:
			m.table[i] = m.allZero
		case s == data:
			if err := readFull(f, buf, m.mapPage(i)); err != nil {
				return err
			}
			p := &page{}
			p.bad = decodePage(&p.states, buf, id, m.mapPage(i))
			m.table[i] = p
		}
	}
	return nil
}

// Stat tells of an overlay without its base, also while it is open: Used is
// as of the last Sync.
func Stat(path string, o Options) (Info, error) {
	fsys := o.FS
	if fsys == nil {
		fsys = durable.OS()
	}
	f, err := fsys.Open(path)
	if err != nil {
		return Info{}, fmt.Errorf("overlay: %w", err)
	}
	defer f.Close()
	h, m, err := load(f)
	if err != nil {
		return Info{}, fmt.Errorf("overlay %s: %w", path, err)
	}
	return Info{Size: h.size, Limit: h.limit, Used: m.count() * blockSize, Meta: h.meta}, nil
}

// Remove removes an overlay's files, durably. The overlay must not be open.
func Remove(path string, o Options) error {
	fsys := o.FS
	if fsys == nil {
		fsys = durable.OS()
	}
	if err := fsys.Remove(path); err != nil {
		return fmt.Errorf("remove overlay: %w", err)
	}
	// Without the overlay, nobody believes its log.
	if err := fsys.Remove(path + logSuffix); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove overlay %s: %w", path, err)
	}
	if err := fsys.SyncDir(filepath.Dir(path)); err != nil {
		return fmt.Errorf("remove overlay %s: %w", path, err)
	}
	return nil
}

// Close makes all changes durable and closes the files, in any case. An error is
// that of Sync. The base stays open.
func (o *Overlay) Close() error {
	return errors.Join(o.Sync(), o.file.Close(), o.log.close())
}

// Size implements [image.Disk].
func (o *Overlay) Size() int64 { return o.header.size }

// Used returns how many bytes of data the file holds, a multiple of 4096.
func (o *Overlay) Used() int64 { return o.used.Load() }

// Empty reports whether nothing was written, zeroed or trimmed since the overlay was made:
// it reads as its base. It does no I/O.
func (o *Overlay) Empty() bool {
	o.mu.RLock()
	defer o.mu.RUnlock()
	s, n, err := o.blocks.run(0, o.layout.blocks)
	return err == nil && s == base && n == o.layout.blocks
}

// run is that of the map, in bytes: what the disk holds from off on, up to end.
func (o *Overlay) run(off, end int64) (state, int64, error) {
	o.mu.RLock()
	defer o.mu.RUnlock()
	s, n, err := o.blocks.run(off/blockSize, divUp(end, blockSize))
	if err != nil {
		return 0, 0, fmt.Errorf("overlay %s at %d: %w", o.path, off, err)
	}
	return s, min(end, (off/blockSize+n)*blockSize) - off, nil
}

// ReadAt implements [image.Disk].
func (o *Overlay) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("overlay %s: negative offset", o.path)
	}
	_, length := image.Clip(off, int64(len(p)), o.Size())
	for done := int64(0); done < length; {
		s, n, err := o.run(off+done, off+length)
		if err == nil {
			err = o.readRun(s, p[done:done+n], off+done)
		}
		if err != nil {
			return int(done), err
		}
		done += n
	}
	if int(length) < len(p) {
		return int(length), io.EOF
	}
	return len(p), nil
}

func (o *Overlay) readRun(s state, p []byte, off int64) error {
	switch s {
	case data:
		return readFull(o.file, p, o.layout.block(0)+off)
	case base:
		return readFull(o.base, p, off)
	default:
		clear(p)
		return nil
	}
}

// readFull fills p.
func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// Extents implements [image.Disk]: of blocks that were not changed they are the
// base's.
func (o *Overlay) Extents(ctx context.Context, off, length int64) iter.Seq2[image.Extent, error] {
	off, length = image.Clip(off, length, o.Size())
	return image.Coalesce(func(yield func(image.Extent, error) bool) {
		for end := off + length; off < end; {
			s, n, err := o.run(off, end)
			if err = cmp.Or(err, ctx.Err()); err != nil {
				yield(image.Extent{}, err)
				return
			}
			if s != base {
				if !yield(image.Extent{Off: off, Len: n, Zero: s == zero}, nil) {
					return
				}
			} else {
				for e, err := range o.base.Extents(ctx, off, n) {
					if !yield(e, err) || err != nil {
						return
					}
				}
			}
			off += n
		}
	})
}

// Changed yields what of [off, off+length) was written, zeroed or trimmed since the
// overlay was made, in whole blocks clipped to that range and to the disk, in
// order. An error ends the sequence.
func (o *Overlay) Changed(off, length int64) iter.Seq2[image.Extent, error] {
	off, length = image.Clip(off, length, o.Size())
	return image.Coalesce(func(yield func(image.Extent, error) bool) {
		for end := off + length; off < end; {
			s, n, err := o.run(off, end)
			if err != nil {
				yield(image.Extent{}, err)
				return
			}
			if s != base && !yield(image.Extent{Off: off, Len: n, Zero: s == zero}, nil) {
				return
			}
			off += n
		}
	})
}
