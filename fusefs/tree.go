package fusefs

import (
	"context"
	"errors"
	iofs "io/fs"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

const (
	// living is how long a list of VMs or points may be remembered, by the
	// kernel and by a folder.
	living = time.Second
	// forever is how long the kernel may remember what never changes.
	forever = 365 * 24 * time.Hour
)

// tree is one mount's tree of nodes.
type tree struct {
	src      Source
	log      *slog.Logger
	disks    diskTable
	owner    fuse.Owner
	fileMode uint32 // permission bits
	dirMode  uint32
	mounted  time.Time
}

// node is a file, a folder or a link. What it shows never changes, lists of
// living folders excepted.
type node interface {
	fs.InodeEmbedder
	fs.NodeGetattrer
	// attr returns the node's attributes without its inode number.
	attr() fuse.Attr
}

// entry is a name in a folder.
type entry struct {
	name string
	// key says what the name stands for. A name that reappears with another key is another node.
	key  string
	node node
}

// root returns the folder of all VMs.
func (t *tree) root() *folder {
	return t.folder(t.mounted, living, func(ctx context.Context) ([]entry, error) {
		vms, err := t.src.VMs(ctx)
		if err != nil {
			return nil, t.failed(ctx, err, "list virtual machines")
		}
		entries := make([]entry, len(vms))
		for i, vm := range vms {
			entries[i] = entry{name: fileName(vm, ""), key: vm, node: t.vmFolder(vm)}
		}
		return entries, nil
	})
}

func (t *tree) vmFolder(vm string) *folder {
	return t.folder(t.mounted, living, func(ctx context.Context) ([]entry, error) {
		points, err := t.src.Points(ctx, vm)
		if err != nil {
			return nil, t.failed(ctx, err, "list restore points", slog.String("vm", vm))
		}
		names := pointNames(points)
		entries := make([]entry, len(points), len(points)+1)
		for i, p := range points {
			entries[i] = entry{name: names[i], key: p.ID, node: t.pointFolder(vm, p)}
		}
		if n := len(points); n > 0 {
			latest := &link{base: t.base(points[n-1].Time), target: names[n-1]}
			entries = append(entries, entry{name: "latest", key: latest.target, node: latest})
		}
		return entries, nil
	})
}

func (t *tree) pointFolder(vm string, p Point) *folder {
	return t.folder(p.Time, forever, func(ctx context.Context) ([]entry, error) {
		c, err := t.src.Contents(ctx, p.ID)
		if err != nil {
			return nil, t.failed(ctx, err, "read a restore point",
				slog.String("vm", vm), slog.String("point", p.ID))
		}
		entries := []entry{{name: "disks", node: t.disksFolder(vm, p, c.Disks)}}
		for _, name := range slices.Sorted(maps.Keys(c.Files)) {
			file := &smallFile{base: t.base(p.Time), data: c.Files[name]}
			entries = append(entries, entry{name: fileName(name, "", "disks"), node: file})
		}
		return entries, nil
	})
}

func (t *tree) disksFolder(vm string, p Point, disks []DiskInfo) *folder {
	entries := make([]entry, len(disks))
	for i, d := range disks {
		entries[i] = entry{name: fileName(d.Name, ".raw"), node: &diskFile{base: t.base(p.Time), vm: vm, pointID: p.ID, info: d}}
	}
	return t.folder(p.Time, forever, func(context.Context) ([]entry, error) { return entries, nil })
}

// failed returns the errno for an error of the source, after logging it if
// it is neither a killed caller's nor a thing that went away.
func (t *tree) failed(ctx context.Context, err error, doing string, attrs ...slog.Attr) syscall.Errno {
	switch {
	case ctx.Err() != nil:
		return syscall.EINTR
	case errors.Is(err, iofs.ErrNotExist):
		return syscall.ENOENT
	}
	attrs = append(attrs, slog.String("doing", doing), slog.Any("error", err))
	t.log.LogAttrs(ctx, slog.LevelError, "a mount cannot show a restore point", attrs...)
	return syscall.EIO
}

// base is what all nodes have.
type base struct {
	fs.Inode
	tree  *tree
	mtime time.Time
}

func (t *tree) base(mtime time.Time) base { return base{tree: t, mtime: mtime} }

// baseAttr returns the attributes of a node, its inode number excepted.
func (b *base) baseAttr(mode uint32, size int64) fuse.Attr {
	a := fuse.Attr{Mode: mode, Size: uint64(size), Nlink: 1, Owner: b.tree.owner, Blksize: blockSize, Blocks: blocks(size)}
	a.SetTimes(&b.mtime, &b.mtime, &b.mtime)
	return a
}

// Fsync implements [fs.NodeFsyncer]: the kernel takes this errno to mean that
// there is never anything to do, and lets fsync succeed.
func (b *base) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno { return syscall.ENOSYS }

// blocks returns a number of bytes in the 512-byte units of st_blocks.
func blocks(bytes int64) uint64 { return uint64(bytes+511) / 512 }

func getattr(n node, out *fuse.AttrOut) syscall.Errno {
	out.Attr = n.attr()
	out.SetTimeout(forever)
	return 0
}

// folder is a folder whose entries come from a function.
type folder struct {
	base
	ttl time.Duration // how long a list holds: living or forever
	// list returns the entries in the order to show them. Its errors are errnos.
	list func(ctx context.Context) ([]entry, error)

	mu      sync.Mutex
	known   map[string]entry // the last list; nil before the first one. Guarded by mu
	fetched time.Time        // when known was. Guarded by mu
}

var (
	_ fs.NodeLookuper    = (*folder)(nil)
	_ fs.NodeReaddirer   = (*folder)(nil)
	_ fs.NodeStatfser    = (*folder)(nil)
	_ fs.NodeOnForgetter = (*folder)(nil)
)

func (t *tree) folder(mtime time.Time, ttl time.Duration, list func(ctx context.Context) ([]entry, error)) *folder {
	return &folder{base: t.base(mtime), ttl: ttl, list: list}
}

func (d *folder) attr() fuse.Attr {
	// One link, whatever the number of folders inside: find(1) takes that to mean "unknown".
	return d.baseAttr(syscall.S_IFDIR|d.tree.dirMode, 0)
}

// Getattr implements [fs.NodeGetattrer].
func (d *folder) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	return getattr(d, out)
}

// refresh lists the folder and returns the entries in order and by name. Entries that
// it knows already keep their nodes, and with them what the kernel cached.
func (d *folder) refresh(ctx context.Context) ([]entry, map[string]entry, error) {
	started := time.Now()
	entries, err := d.list(ctx)
	if err != nil {
		return nil, nil, err
	}
	known := make(map[string]entry, len(entries))
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, e := range entries {
		if old, ok := d.known[e.name]; ok && old.key == e.key {
			entries[i] = old
		}
		known[e.name] = entries[i]
	}
	d.known, d.fetched = known, started
	return entries, known, nil
}

// find returns the entry of that name from the last list if that still holds, else from a new one.
func (d *folder) find(ctx context.Context, name string) (entry, error) {
	d.mu.Lock()
	known := d.known // never written to once it is here
	fresh := known != nil && time.Since(d.fetched) < d.ttl
	d.mu.Unlock()
	e, ok := known[name]
	// A name that a living list lacks may have appeared since.
	if !fresh || (!ok && d.ttl != forever) {
		_, known, err := d.refresh(ctx)
		if err != nil {
			return entry{}, err
		}
		e, ok = known[name]
	}
	if !ok {
		return entry{}, syscall.ENOENT
	}
	return e, nil
}

// Lookup implements [fs.NodeLookuper].
func (d *folder) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	ctx, cancel := untilKilled(ctx)
	defer cancel()
	e, err := d.find(ctx, name)
	if err != nil {
		return nil, fs.ToErrno(err)
	}
	out.Attr = e.node.attr()
	out.SetAttrTimeout(forever)
	out.SetEntryTimeout(d.ttl)
	// The lock keeps two lookups from making the same node known at once.
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.NewInode(ctx, e.node, fs.StableAttr{Mode: out.Mode & syscall.S_IFMT}), 0
}

// Readdir implements [fs.NodeReaddirer].
func (d *folder) Readdir(ctx context.Context) (fs.DirStream, syscall.Errno) {
	ctx, cancel := untilKilled(ctx)
	defer cancel()
	entries, _, err := d.refresh(ctx)
	if err != nil {
		return nil, fs.ToErrno(err)
	}
	list := make([]fuse.DirEntry, len(entries))
	for i, e := range entries {
		list[i] = fuse.DirEntry{Name: e.name, Mode: e.node.attr().Mode}
	}
	return fs.NewListDirStream(list), 0
}

// Statfs implements [fs.NodeStatfser]: nothing is free, and how much there is would cost a
// walk over all points to say.
func (d *folder) Statfs(_ context.Context, out *fuse.StatfsOut) syscall.Errno {
	*out = fuse.StatfsOut{Bsize: 4096, Frsize: 4096, NameLen: maxName}
	return 0
}

// OnForget implements [fs.NodeOnForgetter]: what the kernel has forgotten takes
// no memory here either.
func (d *folder) OnForget() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.known = nil
}

// link is a symbolic link.
type link struct {
	base
	target string
}

var _ fs.NodeReadlinker = (*link)(nil)

func (l *link) attr() fuse.Attr {
	return l.baseAttr(syscall.S_IFLNK|0o777, int64(len(l.target)))
}

// Getattr implements [fs.NodeGetattrer].
func (l *link) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	return getattr(l, out)
}

// Readlink implements [fs.NodeReadlinker].
func (l *link) Readlink(context.Context) ([]byte, syscall.Errno) {
	return []byte(l.target), 0
}

// smallFile is a file held in memory.
type smallFile struct {
	base
	data []byte
}

var (
	_ fs.NodeOpener = (*smallFile)(nil)
	_ fs.NodeReader = (*smallFile)(nil)
)

func (f *smallFile) attr() fuse.Attr {
	return f.baseAttr(syscall.S_IFREG|f.tree.fileMode, int64(len(f.data)))
}

// Getattr implements [fs.NodeGetattrer].
func (f *smallFile) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	return getattr(f, out)
}

// Open implements [fs.NodeOpener].
func (f *smallFile) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, openFlags, 0
}

// Read implements [fs.NodeReader].
func (f *smallFile) Read(_ context.Context, _ fs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	start := min(max(off, 0), int64(len(f.data)))
	end := min(start+int64(len(dest)), int64(len(f.data)))
	return fuse.ReadResultData(f.data[start:end]), 0
}
