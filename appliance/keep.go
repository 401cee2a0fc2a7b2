package appliance

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/blockstore"
)

// DeletedPoint is a point that was deleted and that UndeletePoints can bring back.
type DeletedPoint struct {
	Point
	Deleted    time.Time `json:"deleted"`
	PurgeAfter time.Time `json:"purge_after"` // Collect purges it then, at the earliest
}

// DeletedPoints returns the deleted points of a VM that are not purged yet, oldest first; with the
// name "" those of all VMs.
func (a *Appliance) DeletedPoints(vm string) []DeletedPoint {
	points := []DeletedPoint{}
	for _, p := range a.repo.DeletedPoints() {
		if vm == "" || p.VM == vm {
			points = append(points, DeletedPoint{newPoint(p.Point), p.Deleted, p.PurgeAfter})
		}
	}
	return points
}

// UndeletePoints brings deleted points back, all of which must exist (see ResolvePoint), and returns
// their ids. After an error it returns those that are back already.
func (a *Appliance) UndeletePoints(ctx context.Context, refs []string) ([]string, error) {
	var ids []blockstore.PointID
	for _, ref := range refs {
		id, err := a.deletedID(ref)
		if err != nil {
			return []string{}, err
		}
		if !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
	}
	back := []string{}
	for _, id := range ids {
		err := ctx.Err()
		if err == nil {
			err = a.repo.UndeletePoint(id)
		}
		if err != nil {
			return back, fmt.Errorf("undelete point %s (%d of %d are back): %w", id, len(back), len(ids), err)
		}
		back = append(back, string(id))
	}
	return back, nil
}

// deletedID returns the id of the deleted point that ref names.
func (a *Appliance) deletedID(ref string) (blockstore.PointID, error) {
	var points []blockstore.Point
	var ids []blockstore.PointID
	for _, d := range a.repo.DeletedPoints() {
		points = append(points, d.Point)
		ids = append(ids, d.ID)
	}
	var id blockstore.PointID
	var err error
	if i := strings.LastIndexByte(ref, '@'); i >= 0 {
		var p blockstore.Point
		p, err = pointAt(points, ref[:i], ref[i+1:])
		id = p.ID
	} else {
		id, err = findID(ids, ref)
	}
	if KindOf(err) == NotFound {
		return "", notFound("deleted point %s: there is none; see point list --deleted", ref)
	}
	return id, err
}

// LockResult is a point's lock.
type LockResult struct {
	Point       string    `json:"point"`
	LockedUntil time.Time `json:"locked_until"` // by this machine's clock, if the machine stays on
	// Immutable tells whether until then the files that it needs cannot be removed by those who
	// write to the data folder either: see Options.Guard.
	Immutable bool `json:"immutable"`
}

// LockPoint locks a point for a time from now on, or, if that is set, until a time of this machine's clock. Until
// then nobody can delete it, and nobody shorten the lock. What the clock is set to meanwhile does not matter; time
// in which the machine is off may not count, so the lock may last longer. If there is a guard that
// fails to make its files immutable, that is an error, and the point is locked all the same.
func (a *Appliance) LockPoint(ctx context.Context, ref string, length time.Duration, until time.Time) (LockResult, error) {
	p, err := a.resolve(ref)
	if err != nil {
		return LockResult{}, err
	}
	if !until.IsZero() {
		length = time.Until(until)
	}
	if err := checkLock(length); err != nil {
		return LockResult{}, err
	}
	end, err := a.repo.LockPoint(p.ID, length)
	if err != nil {
		return LockResult{}, fmt.Errorf("lock: %w", err)
	}
	immutable, err := a.protect(ctx, p.ID, length)
	return LockResult{string(p.ID), end, immutable}, err
}

func checkLock(length time.Duration) error {
	switch {
	case length <= 0:
		return invalid("the lock would be over already; choose a time to come")
	case length > blockstore.MaxLock:
		return invalid("a lock lasts up to 100 years; choose a shorter time")
	}
	return nil
}

// SetDeleteQuarantine sets for how long points that are deleted from now on can be brought back at least,
// up to 10 years.
func (a *Appliance) SetDeleteQuarantine(length time.Duration) error {
	if err := checkQuarantine(length); err != nil {
		return err
	}
	if err := a.repo.SetDeleteQuarantine(length); err != nil {
		return fmt.Errorf("set the time for which deleted points are kept: %w", err)
	}
	return nil
}

func checkQuarantine(length time.Duration) error {
	if length < 0 || length > blockstore.MaxQuarantine {
		return invalid("deleted points are kept for up to 10 years; choose a shorter time")
	}
	return nil
}

// Change is one change of the points.
type Change = blockstore.Change

// Changes returns the last changes of the points, up to 1000, oldest first.
func (a *Appliance) Changes() []Change {
	return append([]Change{}, a.repo.Changes()...)
}

// descends tells whether the repository was once in the state that head names.
func (a *Appliance) descends(head string) error {
	err := a.repo.Descends(head)
	if errors.Is(err, blockstore.ErrHead) {
		return invalid("%v", err)
	}
	return err
}
