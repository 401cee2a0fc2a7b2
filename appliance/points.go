package appliance

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/blockstore"
	"github.com/holdfast-backup/holdfast/image"
)

// minPrefix is how many digits of an id name a point, at least.
const minPrefix = 8

// Point is a restore point.
type Point struct {
	ID          string    `json:"id"`
	VM          string    `json:"vm"`
	Time        time.Time `json:"time"`
	Mode        string    `json:"mode"`        // how the disks were read: full, incremental or scan
	Consistency string    `json:"consistency"` // what the guest's data can be trusted for, such as "crash"
	Disks       []Disk    `json:"disks"`
	Config      []string  `json:"config"` // names of the saved configuration files
	// LockedUntil is when the point's lock ends by this machine's clock, if the machine stays on; zero
	// if it is not locked.
	LockedUntil time.Time `json:"locked_until,omitzero"`
}

// Disk is one disk of a restore point.
type Disk struct {
	Name string `json:"name"`
	Size int64  `json:"size_bytes"`
	Data int64  `json:"data_bytes"` // bytes of its chunks that are not zero
}

func newPoint(p blockstore.Point) Point {
	point := Point{
		ID: string(p.ID), VM: p.VM, Time: p.Time.UTC(), Mode: p.Mode, Consistency: p.Consistency,
		Disks: []Disk{}, Config: slices.AppendSeq([]string{}, maps.Keys(p.Config)), LockedUntil: p.LockedUntil,
	}
	slices.Sort(point.Config)
	for _, d := range p.Disks {
		point.Disks = append(point.Disks, Disk{Name: d.Name, Size: d.Map.Size, Data: d.Map.Data})
	}
	return point
}

// Points returns the restore points of a VM, oldest first; with the name "" those
// of all VMs.
func (a *Appliance) Points(vm string) []Point {
	points := []Point{}
	for _, p := range a.repo.Points() {
		if vm == "" || p.VM == vm {
			points = append(points, newPoint(p))
		}
	}
	return points
}

// ResolvePoint returns the point that ref names: an id, or the first 8 or more
// digits of only one; VM@latest; or VM@TIME, the newest point at or before an RFC
// 3339 time. A VM's name may contain "@".
func (a *Appliance) ResolvePoint(ref string) (Point, error) {
	p, err := a.resolve(ref)
	if err != nil {
		return Point{}, err
	}
	return newPoint(p), nil
}

func (a *Appliance) resolve(ref string) (blockstore.Point, error) {
	if i := strings.LastIndexByte(ref, '@'); i >= 0 {
		return pointAt(a.repo.Points(), ref[:i], ref[i+1:])
	}
	id, err := a.pointID(ref)
	if err != nil {
		return blockstore.Point{}, err
	}
	for _, d := range a.repo.DamagedPoints() {
		if d.ID == id {
			return blockstore.Point{}, fmt.Errorf("point %s cannot be read: %w; other points are not affected", id, d.Err)
		}
	}
	return a.repo.Point(id)
}

// pointAt returns a VM's newest point, of points in the order of time, at or before a time.
func pointAt(points []blockstore.Point, vm, at string) (blockstore.Point, error) {
	latest := at == "latest"
	limit, err := time.Parse(time.RFC3339, at)
	if err != nil && !latest {
		return blockstore.Point{}, invalid("point %s@%s: want VM@latest or VM@TIME with a time such as 2026-01-31T18:00:00Z", vm, at)
	}
	known := false
	for _, p := range slices.Backward(points) {
		if p.VM != vm {
			continue
		}
		if latest || !p.Time.After(limit) {
			return p, nil
		}
		known = true
	}
	if known {
		return blockstore.Point{}, notFound("point %s@%s: the VM's points are all newer; see point list --vm", vm, at)
	}
	return blockstore.Point{}, notFound("point %s@%s: no VM of that name has points; see point list", vm, at)
}

// pointID returns the id of the point, damaged or not, that a prefix names.
func (a *Appliance) pointID(prefix string) (blockstore.PointID, error) {
	var ids []blockstore.PointID
	for _, p := range a.repo.Points() {
		ids = append(ids, p.ID)
	}
	for _, d := range a.repo.DamagedPoints() {
		ids = append(ids, d.ID)
	}
	return findID(ids, prefix)
}

// findID returns the only one of ids that begins with a prefix.
func findID(ids []blockstore.PointID, prefix string) (blockstore.PointID, error) {
	digits := strings.ToLower(prefix)
	if len(digits) < minPrefix || strings.Trim(digits, "0123456789abcdef") != "" {
		return "", invalid("point %q: want %d or more digits of a point's id, VM@latest or VM@TIME; see point list", prefix, minPrefix)
	}
	var found []blockstore.PointID
	for _, id := range ids {
		if strings.HasPrefix(string(id), digits) {
			found = append(found, id)
		}
	}
	switch len(found) {
	case 0:
		return "", notFound("point %s: there is none; see point list", prefix)
	case 1:
		return found[0], nil
	}
	return "", invalid("point %s: %d points begin so, %s and %s among them; give more digits", prefix, len(found), found[0], found[1])
}

// resolveDisk returns a point and one of its disks; disk may be "" if it has only
// one.
func (a *Appliance) resolveDisk(ref, disk string) (blockstore.Point, blockstore.PointDisk, error) {
	p, err := a.resolve(ref)
	if err != nil {
		return p, blockstore.PointDisk{}, err
	}
	if disk == "" && len(p.Disks) > 1 {
		names := make([]string, len(p.Disks))
		for i, d := range p.Disks {
			names[i] = d.Name
		}
		return p, blockstore.PointDisk{}, invalid("point %.8s of %s has %d disks: %s; say which with --disk",
			p.ID, p.VM, len(names), strings.Join(names, ", "))
	}
	d, err := p.Disk(disk)
	return p, d, err
}

// DeletePoints deletes the points that refs name, all of which must exist, and
// returns their ids. After an error it returns those that are deleted already.
// UndeletePoints brings them back until Collect purges them, which gives the space back.
func (a *Appliance) DeletePoints(ctx context.Context, refs []string) ([]string, error) {
	var ids []blockstore.PointID
	for _, ref := range refs {
		var id blockstore.PointID
		var err error
		if strings.Contains(ref, "@") {
			var p blockstore.Point
			p, err = a.resolve(ref)
			id = p.ID
		} else {
			id, err = a.pointID(ref) // a damaged one, too
		}
		if err != nil {
			return []string{}, err
		}
		if !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
	}
	a.binding.Lock()
	defer a.binding.Unlock()
	for _, id := range ids {
		if err := a.needed(id); err != nil {
			return []string{}, err
		}
		if err := a.repo.Deletable(id); err != nil {
			return []string{}, fmt.Errorf("nothing was deleted: %w", err)
		}
	}
	deleted := []string{}
	for _, id := range ids {
		err := ctx.Err()
		if err == nil {
			err = a.repo.DeletePoint(id)
		}
		if err != nil {
			return deleted, fmt.Errorf("delete point %s (%d of %d are deleted): %w", id, len(deleted), len(ids), err)
		}
		deleted = append(deleted, string(id))
	}
	return deleted, nil
}

// Diff tells in what two points differ.
type Diff struct {
	Disks []DiskDiff `json:"disks"`
}

// DiskDiff tells in what two disks of the same name differ.
type DiskDiff struct {
	Name    string   `json:"name"`
	Extents []Extent `json:"extents"` // in order, in whole chunks
	Bytes   int64    `json:"bytes"`   // of all extents
}

// Extent is a range of a disk.
type Extent struct {
	Offset int64 `json:"offset"`
	Length int64 `json:"length"`
}

// DiffPoints compares the disks of two points by their names, or only the one
// named disk. A disk that one of them lacks is compared with an empty one.
func (a *Appliance) DiffPoints(ctx context.Context, from, to, disk string) (Diff, error) {
	p, err := a.resolve(from)
	if err != nil {
		return Diff{}, err
	}
	q, err := a.resolve(to)
	if err != nil {
		return Diff{}, err
	}
	names := diskNames(p, q)
	if disk != "" {
		if !slices.Contains(names, disk) {
			return Diff{}, notFound("disk %q: neither point has it; they have %s", disk, strings.Join(names, ", "))
		}
		names = []string{disk}
	}
	diff := Diff{Disks: []DiskDiff{}}
	for _, name := range names {
		d := DiskDiff{Name: name, Extents: []Extent{}}
		for e, err := range a.repo.Diff(ctx, diskMap(p, name), diskMap(q, name), 0, image.MaxSize) {
			if err != nil {
				return Diff{}, fmt.Errorf("compare disk %s of points %.8s and %.8s: %w", name, p.ID, q.ID, err)
			}
			d.Extents = append(d.Extents, Extent{e.Off, e.Len})
			d.Bytes += e.Len
		}
		diff.Disks = append(diff.Disks, d)
	}
	return diff, nil
}

// diskNames returns the names of the disks that either point has.
func diskNames(points ...blockstore.Point) []string {
	var names []string
	for _, p := range points {
		for _, d := range p.Disks {
			if !slices.Contains(names, d.Name) {
				names = append(names, d.Name)
			}
		}
	}
	return names
}

// diskMap returns the map of a disk, that of an empty disk if p has none.
func diskMap(p blockstore.Point, name string) blockstore.Map {
	for _, d := range p.Disks {
		if d.Name == name {
			return d.Map
		}
	}
	return blockstore.Map{}
}
