// Package faultfs is a file system in memory that fails and forgets: the
// double of [durable.OS] in tests of what must survive a crash.
//
// [FS.Fail] makes one operation fail, or all from there, or kills the process. [FS.PowerLoss] returns
// the file system as it would be found after a loss of power. [FS.Trace] tells
// what was done, so that a test can walk over every operation. [FS.SetSize] makes
// the file system small.
//
// # What a loss of power takes
//
// The rules are those that package durable names, and no others: what a
// particular file system does beyond them (ext4 makes a new file's name durable
// with its bytes, every journal keeps operations in order) is not to be relied
// on.
//
//   - Bytes are kept in sectors of 512. A sector that was written, cut off by
//     Truncate or punched since the file's last Sync has afterwards any of the
//     contents that it had since then, whatever its neighbours have. A sector
//     is never torn.
//   - The length is any of the lengths since the last Sync, independently of the
//     bytes. What lies beyond it is gone; what lies below it and was never
//     written is zero.
//   - A name that was created, renamed or removed since its folder's last
//     SyncDir has been or has not been, each one for itself. A rename is one change, of
//     the new name's folder. A folder that is forgotten takes along what was in it.
//   - A failed Sync drops the dirty bytes: they may or may not have reached the
//     disk, they still can be read, as from a page cache, and a later Sync
//     succeeds without them. Only bytes written again count for it. DropCache
//     makes it plain: half of the sectors are then as on disk before.
//
// # Concurrency
//
// All methods may be called from many goroutines at once; one lock makes each
// operation atomic. PowerLoss may be called while others work, and leaves the
// file system as it is.
//
// # Limits
//
// Folders cannot be renamed or removed. There are no links and no permissions. A
// file that was removed is gone at once for PowerLoss, but not for those who have
// it open.
package faultfs

import (
	"encoding/binary"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/holdfast-backup/holdfast/internal/durable"
)

// Kind is a set of kinds of operations.
type Kind uint16

// The operations of [durable.FS] and [durable.File]. Create and the others of
// Changes are those that change what is stored or make it durable.
const (
	Create Kind = 1 << iota
	Write
	Truncate
	PunchHole
	Sync
	Rename
	Remove
	Mkdir
	SyncDir
	Open // also for writing
	Read
	ReadDir
	Space

	Changes = Create | Write | Truncate | PunchHole | Sync | Rename | Remove | Mkdir | SyncDir
	All     = Changes | Open | Read | ReadDir | Space
)

var kindNames = [...]string{
	"create", "write", "truncate", "punch", "sync", "rename", "remove", "mkdir", "syncdir",
	"open", "read", "readdir", "space",
}

// String returns the name of a single kind, such as "punch".
func (k Kind) String() string {
	for i, name := range kindNames {
		if k == 1<<i {
			return name
		}
	}
	return fmt.Sprintf("Kind(%#x)", uint16(k))
}

// Op is an operation that was asked for, whether it failed or not.
type Op struct {
	Kind     Kind
	Name     string // the file's or folder's path
	Off, Len int64  // of Write, Read and PunchHole; Len is the length of Truncate
}

// String returns the operation as "write dir/file [512, 1024)".
func (o Op) String() string {
	switch o.Kind {
	case Write, Read, PunchHole:
		return fmt.Sprintf("%v %s [%d, %d)", o.Kind, o.Name, o.Off, o.Off+o.Len)
	case Truncate:
		return fmt.Sprintf("%v %s %d", o.Kind, o.Name, o.Len)
	default:
		return fmt.Sprintf("%v %s", o.Kind, o.Name)
	}
}

// Effect is what an operation that fails has done all the same.
type Effect int

// The effects. Half is the first half of the bytes of a Write or a PunchHole,
// which may end inside a sector; of other operations it is Nothing. A Sync never has
// one but to drop the dirty bytes.
const (
	Nothing Effect = iota
	Half
	Whole
)

// Fault is what fails, and how.
type Fault struct {
	Kinds   Kind  // 0 is Changes
	N       int   // the N-th operation of these kinds from now on fails, from 1; 0 is none
	Err     error // nil is syscall.EIO
	Forever bool  // and so do all later ones of these kinds
	Effect  Effect
	// Kill means that the process is killed in that operation, and not that the disk
	// fails: later ones have no effect either, and a Sync drops no dirty bytes.
	Kill bool
}

// FS is a file system in memory. It implements [durable.FS].
type FS struct {
	mu     sync.Mutex
	names  map[string]*node // what there is, by cleaned path
	synced map[string]*node // what is durable of it
	// pending is what happened to names and is not durable, in order.
	pending []change
	size    int64 // bytes that fit; 0 is no limit
	used    int64
	losses  uint64 // of power, before
	fault   Fault
	left    int // operations until the fault; 0 is past it or none
	hit     bool
	trace   []Op
}

// node is a file or a folder.
type node struct {
	folder  bool
	content      // of a file
	opened  int  // handles
	linked  bool // it has a name
	// immutable is the attribute that SetImmutable sets.
	immutable bool
}

// change is what happened to a name.
type change struct {
	node     *node
	old, now string // "" if there is none
}

// folder returns the folder whose SyncDir makes the change durable.
func (c change) folder() string {
	if c.now == "" {
		return filepath.Dir(c.old)
	}
	return filepath.Dir(c.now)
}

func (c change) apply(names map[string]*node) {
	if c.old != "" && names[c.old] == c.node {
		delete(names, c.old)
	}
	if c.now != "" {
		names[c.now] = c.node
	}
}

// New returns a file system that has the given folders, and those above them.
func New(folders ...string) *FS {
	f := &FS{names: map[string]*node{}, synced: map[string]*node{}}
	for _, name := range folders {
		f.addFolder(filepath.Clean(name))
	}
	return f
}

func (f *FS) addFolder(name string) {
	for f.names[name] == nil {
		n := &node{folder: true, linked: true}
		f.names[name], f.synced[name] = n, n
		name = filepath.Dir(name)
	}
}

// Import copies a folder of the operating system with all below it to the same
// path. The copy is durable.
func (f *FS) Import(folder string) error {
	return filepath.WalkDir(folder, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		f.mu.Lock()
		defer f.mu.Unlock()
		path = filepath.Clean(path)
		if d.IsDir() {
			f.addFolder(path)
			return nil
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		n := &node{linked: true}
		f.used += n.write(data, 0)
		n.sync()
		f.names[path], f.synced[path] = n, n
		return nil
	})
}

// Fail replaces the fault, and counts from here.
func (f *FS) Fail(fault Fault) {
	if fault.Kinds == 0 {
		fault.Kinds = Changes
	}
	if fault.Err == nil {
		fault.Err = syscall.EIO
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fault, f.left, f.hit = fault, fault.N, false
}

// Hit reports whether the fault has happened.
func (f *FS) Hit() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.hit
}

// Boot returns the id of the machine's boot. It is another after each PowerLoss.
func (f *FS) Boot() (id [16]byte, err error) {
	binary.LittleEndian.PutUint64(id[:], f.losses)
	return id, nil
}

// Trace returns all operations of some kinds so far, in order.
func (f *FS) Trace(kinds Kind) []Op {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(f.trace), func(o Op) bool { return o.Kind&kinds == 0 })
}

// SetSize lets no more than size bytes be stored from here on; 0 is no limit.
// Writes that find no room fail with [syscall.ENOSPC] after what fits, as do names
// that are created when nothing is free.
func (f *FS) SetSize(size int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.size = size
}

// stepLocked notes an operation and returns what it is to do, and its error.
func (f *FS) stepLocked(op Op) (Effect, error) {
	f.trace = append(f.trace, op)
	if f.fault.Kinds&op.Kind == 0 {
		return Whole, nil
	}
	if f.left > 0 {
		f.left--
		f.hit = f.left == 0
		if f.hit {
			return f.fault.Effect, &os.PathError{Op: op.Kind.String(), Path: op.Name, Err: f.fault.Err}
		}
	} else if f.hit && f.fault.Kill {
		return Nothing, &os.PathError{Op: op.Kind.String(), Path: op.Name, Err: f.fault.Err}
	} else if f.hit && f.fault.Forever {
		return f.fault.Effect, &os.PathError{Op: op.Kind.String(), Path: op.Name, Err: f.fault.Err}
	}
	return Whole, nil
}

// findLocked returns the node of a name.
func (f *FS) findLocked(op Kind, name string, folder bool) (*node, error) {
	n := f.names[name]
	var err error
	switch {
	case n == nil:
		err = syscall.ENOENT
	case folder && !n.folder:
		err = syscall.ENOTDIR
	case !folder && n.folder:
		err = syscall.EISDIR
	default:
		return n, nil
	}
	return nil, &os.PathError{Op: op.String(), Path: name, Err: err}
}

// changeLocked carries out a change of names, not durably.
func (f *FS) changeLocked(c change) {
	if before := f.names[c.now]; before != nil && before != c.node {
		f.unlinkLocked(before)
	}
	c.apply(f.names)
	c.node.linked = c.now != ""
	f.pending = append(f.pending, c)
	f.releaseLocked(c.node)
}

func (f *FS) unlinkLocked(n *node) {
	n.linked = false
	f.releaseLocked(n)
}

// releaseLocked gives the room of a file back that nobody can reach. The bytes
// stay: a loss of power may bring the name back.
func (f *FS) releaseLocked(n *node) {
	if !n.linked && n.opened == 0 {
		f.used -= n.stored()
	}
}

func (f *FS) open(name string, writable bool) (durable.File, error) {
	name = filepath.Clean(name)
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, err := f.stepLocked(Op{Kind: Open, Name: name}); err != nil {
		return nil, err
	}
	n, err := f.findLocked(Open, name, false)
	if err != nil {
		return nil, err
	}
	if writable && n.immutable {
		return nil, &os.PathError{Op: Open.String(), Path: name, Err: syscall.EPERM}
	}
	n.opened++
	return &file{fs: f, name: name, node: n, writable: writable}, nil
}

// Open implements [durable.FS].
func (f *FS) Open(name string) (durable.File, error) { return f.open(name, false) }

// OpenWrite implements [durable.FS].
func (f *FS) OpenWrite(name string) (durable.File, error) { return f.open(name, true) }

// makeLocked makes a file or folder, as the step's effect allows.
func (f *FS) makeLocked(kind Kind, name string, n *node) error {
	effect, failed := f.stepLocked(Op{Kind: kind, Name: name})
	if effect != Whole {
		return failed
	}
	if _, err := f.findLocked(kind, filepath.Dir(name), true); err != nil {
		return err
	}
	if f.names[name] != nil {
		return &os.PathError{Op: kind.String(), Path: name, Err: syscall.EEXIST}
	}
	if f.size > 0 && f.used >= f.size {
		return &os.PathError{Op: kind.String(), Path: name, Err: syscall.ENOSPC}
	}
	f.changeLocked(change{node: n, now: name})
	return failed
}

// Create implements [durable.FS].
func (f *FS) Create(name string) (durable.File, error) {
	name = filepath.Clean(name)
	f.mu.Lock()
	defer f.mu.Unlock()
	n := &node{}
	if err := f.makeLocked(Create, name, n); err != nil {
		return nil, err
	}
	n.opened++
	return &file{fs: f, name: name, node: n, writable: true}, nil
}

// Mkdir implements [durable.FS].
func (f *FS) Mkdir(name string) error {
	name = filepath.Clean(name)
	f.mu.Lock()
	defer f.mu.Unlock()
	if n := f.names[name]; n != nil && n.folder {
		_, err := f.stepLocked(Op{Kind: Mkdir, Name: name})
		return err
	}
	return f.makeLocked(Mkdir, name, &node{folder: true})
}

// Rename implements [durable.FS].
func (f *FS) Rename(oldName, newName string) error {
	oldName, newName = filepath.Clean(oldName), filepath.Clean(newName)
	f.mu.Lock()
	defer f.mu.Unlock()
	effect, failed := f.stepLocked(Op{Kind: Rename, Name: oldName})
	if effect != Whole {
		return failed
	}
	n, err := f.findLocked(Rename, oldName, false)
	if err != nil {
		return err
	}
	if _, err := f.findLocked(Rename, filepath.Dir(newName), true); err != nil {
		return err
	}
	before := f.names[newName]
	if before != nil && before.folder {
		return &os.LinkError{Op: "rename", Old: oldName, New: newName, Err: syscall.EISDIR}
	}
	if n.immutable || before != nil && before.immutable {
		return &os.LinkError{Op: "rename", Old: oldName, New: newName, Err: syscall.EPERM}
	}
	f.changeLocked(change{node: n, old: oldName, now: newName})
	return failed
}

// Remove implements [durable.FS].
func (f *FS) Remove(name string) error {
	name = filepath.Clean(name)
	f.mu.Lock()
	defer f.mu.Unlock()
	effect, failed := f.stepLocked(Op{Kind: Remove, Name: name})
	if effect != Whole {
		return failed
	}
	n, err := f.findLocked(Remove, name, false)
	if err != nil {
		return err
	}
	if n.immutable {
		return &os.PathError{Op: Remove.String(), Path: name, Err: syscall.EPERM}
	}
	f.changeLocked(change{node: n, old: name})
	return failed
}

// SyncDir implements [durable.FS].
func (f *FS) SyncDir(name string) error {
	name = filepath.Clean(name)
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, err := f.stepLocked(Op{Kind: SyncDir, Name: name}); err != nil {
		return err
	}
	if _, err := f.findLocked(SyncDir, name, true); err != nil {
		return err
	}
	// What happened before to the same files is settled with it.
	settled := map[*node]int{}
	for i, c := range f.pending {
		if c.folder() == name {
			settled[c.node] = i
		}
	}
	var rest []change
	for i, c := range f.pending {
		if last, ok := settled[c.node]; ok && i <= last {
			c.apply(f.synced)
		} else {
			rest = append(rest, c)
		}
	}
	f.pending = rest
	return nil
}

// ReadDir implements [durable.FS].
func (f *FS) ReadDir(name string) ([]os.DirEntry, error) {
	name = filepath.Clean(name)
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, err := f.stepLocked(Op{Kind: ReadDir, Name: name}); err != nil {
		return nil, err
	}
	if _, err := f.findLocked(ReadDir, name, true); err != nil {
		return nil, err
	}
	var entries []os.DirEntry
	for path, n := range f.names {
		if filepath.Dir(path) == name && path != name {
			entries = append(entries, entry{name: filepath.Base(path), folder: n.folder, size: n.length})
		}
	}
	slices.SortFunc(entries, func(a, b os.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	return entries, nil
}

// Space implements [durable.FS]. Without a limit, an exbibyte is free.
func (f *FS) Space(name string) (free, total int64, err error) {
	name = filepath.Clean(name)
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, err := f.stepLocked(Op{Kind: Space, Name: name}); err != nil {
		return 0, 0, err
	}
	if f.names[name] == nil {
		return 0, 0, &os.PathError{Op: Space.String(), Path: name, Err: syscall.ENOENT}
	}
	if f.size == 0 {
		return 1 << 60, 1 << 60, nil
	}
	return max(0, f.size-f.used), f.size, nil
}

// SetImmutable sets or clears a file's immutable attribute, durably. It keeps the file
// from being opened for writing, renamed, replaced and removed; handles that are open for
// writing go on, as on most file systems.
func (f *FS) SetImmutable(name string, immutable bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	n, err := f.findLocked(Open, filepath.Clean(name), false)
	if err == nil {
		n.immutable = immutable
	}
	return err
}

// Immutable implements [durable.FS].
func (f *FS) Immutable(name string) (bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n, err := f.findLocked(Open, filepath.Clean(name), false)
	return err == nil && n.immutable, err
}
