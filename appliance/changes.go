package appliance

import (
	"context"
	"errors"
	"iter"
	"log/slog"
	"slices"
	"strings"
	"sync"

	"github.com/holdfast-backup/holdfast/blockstore"
	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/nbdserver"
)

// changedPrefix begins the metadata contexts that tell in what an exported disk
// differs from the same disk in another point, whose id follows.
const changedPrefix = "holdfast:changed:"

// stateChanged is the flag of extents that differ, the same as in QEMU's contexts
// of dirty bitmaps.
const stateChanged = 1 << 0

// changes are the metadata contexts of an exported disk: one for each other point of
// the VM that has the disk. Points that clients compare with stay readable until
// close, also if they are deleted meanwhile.
type changes struct {
	a       *Appliance
	point   blockstore.Point
	disk    blockstore.PointDisk
	written func(off, length int64) iter.Seq2[image.Extent, error] // by clients since; nil if nobody can

	mu     sync.Mutex // guards others
	others map[blockstore.PointID]*blockstore.Disk
}

func (a *Appliance) newChanges(p blockstore.Point, d blockstore.PointDisk) *changes {
	return &changes{a: a, point: p, disk: d, others: map[blockstore.PointID]*blockstore.Disk{}}
}

// List implements [nbdserver.Contexts]: it names the points before the exported one, and that one itself
// if it can have been changed.
func (c *changes) List() []string {
	names := []string{}
	for _, p := range c.a.repo.Points() {
		earlier := p.Time.Before(c.point.Time) || p.ID == c.point.ID && c.written != nil
		if p.VM == c.point.VM && earlier && hasDisk(p, c.disk.Name) {
			names = append(names, changedPrefix+string(p.ID))
		}
	}
	return names
}

// Open implements [nbdserver.Contexts]. Any point of the VM that has the disk will do, by its id or the
// first digits of it.
func (c *changes) Open(name string) (nbdserver.Context, bool) {
	prefix, ok := strings.CutPrefix(name, changedPrefix)
	if !ok {
		return nil, false
	}
	id, err := c.a.pointID(prefix)
	if err != nil {
		return nil, false
	}
	p, err := c.a.repo.Point(id)
	if err != nil || p.VM != c.point.VM || !hasDisk(p, c.disk.Name) {
		return nil, false
	}
	other, err := c.open(id)
	if err != nil {
		c.a.log.Warn("cannot compare an export with a point", slog.String("point", string(id)), slog.Any("error", err))
		return nil, false
	}
	return &changedSince{c, other.Map()}, true
}

// open returns the disk in another point, held open until close.
func (c *changes) open(id blockstore.PointID) (*blockstore.Disk, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if d := c.others[id]; d != nil {
		return d, nil
	}
	d, err := c.a.repo.OpenDisk(id, c.disk.Name, blockstore.DiskOptions{})
	if err == nil {
		c.others[id] = d
	}
	return d, err
}

// close lets go of the other points.
func (c *changes) close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	var err error
	for _, d := range c.others {
		err = errors.Join(err, d.Close())
	}
	clear(c.others)
	return err
}

func hasDisk(p blockstore.Point, name string) bool {
	return slices.ContainsFunc(p.Disks, func(d blockstore.PointDisk) bool { return d.Name == name })
}

// changedSince is the metadata context of one other point.
type changedSince struct {
	*changes
	other blockstore.Map
}

// Status implements [nbdserver.Context]. What clients wrote counts as changed.
func (c *changedSince) Status(ctx context.Context, off, length int64) iter.Seq2[nbdserver.Status, error] {
	return func(yield func(nbdserver.Status, error) bool) {
		pos := off
		for e, err := range c.differences(ctx, off, length) {
			if err != nil {
				yield(nbdserver.Status{}, err)
				return
			}
			if e.Off > pos && !yield(nbdserver.Status{Off: pos, Len: e.Off - pos}, nil) {
				return
			}
			if !yield(nbdserver.Status{Off: e.Off, Len: e.Len, Flags: stateChanged}, nil) {
				return
			}
			pos = e.End()
		}
		if end := off + length; pos < end {
			yield(nbdserver.Status{Off: pos, Len: end - pos}, nil)
		}
	}
}

// differences yields in order and without overlap what differs in [off, off+length),
// in the points or because clients wrote it.
func (c *changedSince) differences(ctx context.Context, off, length int64) iter.Seq2[image.Extent, error] {
	points := c.a.repo.Diff(ctx, c.other, c.disk.Map, off, length)
	if c.written == nil {
		return points
	}
	return func(yield func(image.Extent, error) bool) {
		next, stop := iter.Pull2(c.written(off, length))
		defer stop()
		w, werr, more := next()
		pos := off // all before is told
		tell := func(e image.Extent, err error) bool {
			if err != nil {
				yield(image.Extent{}, err)
				return false
			}
			if from := max(e.Off, pos); from < e.End() {
				pos = e.End()
				return yield(image.Extent{Off: from, Len: e.End() - from}, nil)
			}
			return true
		}
		for e, err := range points {
			for ; more && err == nil && w.Off < e.Off; w, werr, more = next() {
				if !tell(w, werr) {
					return
				}
			}
			if !tell(e, err) {
				return
			}
		}
		for ; more; w, werr, more = next() {
			if !tell(w, werr) {
				return
			}
		}
	}
}
