package blockstore

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/holdfast-backup/holdfast/internal/durable"
)

// Bounds of the times for which points are locked, and kept when they are deleted.
const (
	MaxLock       = 100 * 365 * 24 * time.Hour
	MaxQuarantine = 10 * 365 * 24 * time.Hour
)

// Errors for states of points that callers tell apart.
var (
	// ErrLocked means that a point is locked and cannot be deleted, and its lock
	// not be shortened.
	ErrLocked = errors.New("locked")
	// ErrCatalogLost means that the catalog of points was lost, and that what would make the
	// loss worse waits for a repair.
	ErrCatalogLost = errors.New("the catalog of points was lost; repair it first")
	// ErrHead means that what was given is no head of a repository.
	ErrHead = errors.New("not a head of a repository")
)

// writePoint makes a point's file and then lists the point. r.mu is held.
func (r *Repository) writePoint(p Point, lock time.Duration) error {
	if err := r.settleLocked(); err != nil {
		return fmt.Errorf("the folder of points cannot be brought in order: %w", err)
	}
	if r.catalog.size > maxCatalog {
		return fmt.Errorf("the catalog has no room for more than its %d points; delete points and collect", len(r.catalog.points))
	}
	f := pointFile{Point: p, Seq: r.catalog.Seq + 1, Prev: r.catalog.Chain, Committed: r.clock.Now()}
	if lock > 0 {
		f.LockedUntil = f.Committed.Add(lock)
	}
	data, hash, err := r.sealer.encodePoint(f)
	if err != nil {
		return err
	}
	// Every chunk and node of the point is durable here.
	path := r.pointPath(p.ID)
	if err := durable.WriteFile(r.fs, path, data); err != nil {
		// The rename may have happened all the same. What is not acknowledged must not
		// be listed; until that is sure, nothing is collected.
		r.unsettled[p.ID] = struct{}{}
		r.trySettleLocked()
		return noSpace(err)
	}
	// Stopped here, the next opening finds a file that follows on the catalog, and lists it.
	next := r.nextCatalog()
	next.commit(r.sealer, f, hash)
	if err := r.writeCatalog(next); err != nil {
		r.unsettled[p.ID] = struct{}{}
		r.trySettleLocked()
		return noSpace(err)
	}
	r.points[p.ID] = f
	return nil
}

// nextCatalog returns a copy of the catalog to be changed.
func (r *Repository) nextCatalog() *catalog {
	next := r.catalog.clone()
	next.Clock = r.clock.Base()
	return next
}

// change makes a change of the catalog durable. After an error nothing has changed, unless
// the disk that failed also keeps us from undoing it; then the next opening may find it done. r.mu is held.
func (r *Repository) change(edit func(next *catalog)) error {
	if err := r.settleLocked(); err != nil {
		return fmt.Errorf("the folder of points cannot be brought in order: %w", err)
	}
	next := r.nextCatalog()
	edit(next)
	if err := r.writeCatalog(next); err != nil {
		r.trySettleLocked()
		return noSpace(err)
	}
	return nil
}

// writeCatalog makes next the catalog, durably, and then its copy. r.mu is held.
func (r *Repository) writeCatalog(next *catalog) error {
	data, err := r.sealer.encodeCatalog(next)
	if err != nil {
		return err
	}
	if r.catalogUnread {
		if err := r.setAside(); err != nil {
			return err
		}
	}
	folder := filepath.Join(r.dir, pointsDir)
	if err := durable.WriteFile(r.fs, filepath.Join(folder, catalogFile), data); err != nil {
		r.catalogUnsettled = true // it may be written all the same
		return err
	}
	// The change is made here. The copy may stay behind: it only counts if the catalog is
	// damaged, and of what it lacks the points' files tell the commits.
	r.catalog, r.catalogUnsettled = next, false
	r.copyErr = durable.WriteFile(r.fs, filepath.Join(folder, catalogCopyFile), data)
	if r.copyErr == nil {
		r.catalogErrs = nil
	} else {
		r.log.Error("the copy of the catalog cannot be written; the next change tries again", attrErr(r.copyErr))
	}
	return nil
}

// setAside keeps the files of a catalog that was lost: somebody may know how to read them.
func (r *Repository) setAside() error {
	for _, name := range []string{catalogFile, catalogCopyFile} {
		path := filepath.Join(r.dir, pointsDir, name)
		if err := r.fs.Rename(path, path+damagedSuffix); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	r.catalogUnread = false
	return nil
}

// trySettleLocked settles after a failure, or leaves it to the next change.
func (r *Repository) trySettleLocked() {
	if err := r.settleLocked(); err != nil {
		r.log.Error("what failed cannot be undone yet", attrErr(err))
	}
}

// settle is settleLocked for a caller that does not hold r.mu.
func (r *Repository) settle() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.settleLocked()
}

// settleLocked makes sure that the catalog's files say what is in memory, and then that
// points which are not listed have no files. r.mu is held.
func (r *Repository) settleLocked() error {
	if r.catalogUnsettled {
		if err := r.writeCatalog(r.nextCatalog()); err != nil {
			return err
		}
	}
	if len(r.unsettled) == 0 {
		return nil
	}
	if err := r.removeFiles(slices.Collect(maps.Keys(r.unsettled))); err != nil {
		return err
	}
	clear(r.unsettled)
	return nil
}

// removeFiles removes the files of points, durably.
func (r *Repository) removeFiles(ids []PointID) error {
	for _, id := range ids {
		if err := r.fs.Remove(r.pointPath(id)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return r.fs.SyncDir(filepath.Join(r.dir, pointsDir))
}

// DeletePoint deletes a point, durably. Until it is purged, UndeletePoint brings it back: the first
// collection after the time set with SetDeleteQuarantine purges it and gives its space back. What has the
// point's disks open keeps reading them. A locked point is not deleted: ErrLocked. One
// that is damaged can be, and need not be kept.
func (r *Repository) DeletePoint(id PointID) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	damage, damaged := r.damagedPoints[id]
	l, listed := r.catalog.points[id]
	switch _, live := r.points[id]; {
	case !live && !damaged:
		return r.noPointLocked(id)
	case r.catalog.Lost != "":
		return fmt.Errorf("point %s: %w", id, ErrCatalogLost)
	case !listed:
		r.log.Warn("the file of a point that is not listed and cannot be read is removed", attrPath(r.pointPath(id)), attrErr(damage))
		r.unsettled[id] = struct{}{}
		delete(r.damagedPoints, id)
		return r.settleLocked()
	}
	if err := r.deletableLocked(id); err != nil {
		return err
	}
	now := r.clock.Now()
	l.Deleted, l.PurgeAfter = now, now
	if !damaged {
		l.PurgeAfter = now.Add(r.catalog.Quarantine)
	}
	err := r.change(func(c *catalog) {
		c.points[id] = l
		c.record(r.sealer, Change{Op: OpDelete, Point: id, At: now, Until: l.PurgeAfter})
	})
	if f, live := r.points[id]; err == nil && live {
		r.deleted[id] = f
		delete(r.points, id)
	}
	return err
}

// Deletable returns an ErrLocked if a point is locked.
func (r *Repository) Deletable(id PointID) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.deletableLocked(id)
}

func (r *Repository) deletableLocked(id PointID) error {
	until := r.lockedUntil(id)
	if until.IsZero() {
		return nil
	}
	return fmt.Errorf("point %s: %w until %s; it can be deleted then", id, ErrLocked, stamp(until))
}

// UndeletePoint brings a deleted point back that is not purged yet.
func (r *Repository) UndeletePoint(id PointID) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	f, ok := r.deleted[id]
	if !ok {
		return fmt.Errorf("deleted point %s: %w", id, ErrNotFound)
	}
	l := r.catalog.points[id]
	l.Deleted, l.PurgeAfter = time.Time{}, time.Time{}
	err := r.change(func(c *catalog) {
		c.points[id] = l
		c.record(r.sealer, Change{Op: OpUndelete, Point: id, At: r.clock.Now()})
	})
	if err != nil {
		return err
	}
	r.points[id] = f
	delete(r.deleted, id)
	return nil
}

// DeletedPoint is a point that is deleted and not purged yet.
type DeletedPoint struct {
	Point
	Deleted    time.Time // both by this machine's clock
	PurgeAfter time.Time // at the earliest
}

// DeletedPoints returns the points that UndeletePoint can bring back, oldest first.
func (r *Repository) DeletedPoints() []DeletedPoint {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]DeletedPoint, 0, len(r.deleted))
	for id, f := range r.deleted {
		l := r.catalog.points[id]
		out = append(out, DeletedPoint{f.Point, r.clock.Wall(l.Deleted), r.clock.Wall(l.PurgeAfter)})
	}
	slices.SortFunc(out, func(a, b DeletedPoint) int { return a.compare(b.Point) })
	return out
}

// LockPoint locks a point for a time from now on, more than 0, up to 100 years, and returns when that
// ends by this machine's clock. Until then nothing deletes the point, and nothing shortens the
// lock: not setting the clock (see package steady), and not another LockPoint, for which
// the error is ErrLocked.
func (r *Repository) LockPoint(id PointID, length time.Duration) (time.Time, error) {
	if err := checkLock(length); err != nil {
		return time.Time{}, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	l := r.catalog.points[id]
	if _, ok := r.points[id]; !ok {
		return time.Time{}, r.noPointLocked(id)
	}
	now := r.clock.Now()
	until := now.Add(length)
	if !until.After(l.LockedUntil) {
		return time.Time{}, fmt.Errorf("point %s: %w until %s already, which is later; a lock is never shortened", id, ErrLocked, stamp(r.clock.Wall(l.LockedUntil)))
	}
	l.LockedUntil = until
	err := r.change(func(c *catalog) {
		c.points[id] = l
		c.record(r.sealer, Change{Op: OpLock, Point: id, At: now, Until: until})
	})
	return r.clock.Wall(until), err
}

func checkLock(length time.Duration) error {
	if length <= 0 || length > MaxLock {
		return fmt.Errorf("lock for %v: want more than 0, up to %d years", length, MaxLock/(365*24*time.Hour))
	}
	return nil
}

// lockedUntil returns when a point's lock ends by this machine's clock; zero if it has
// none, or none any more. r.mu is held.
func (r *Repository) lockedUntil(id PointID) time.Time {
	if until := r.catalog.points[id].LockedUntil; r.clock.Now().Before(until) {
		return r.clock.Wall(until)
	}
	return time.Time{}
}

// SetDeleteQuarantine sets for how long, at least, points that are deleted from now on are kept,
// up to 10 years.
func (r *Repository) SetDeleteQuarantine(length time.Duration) error {
	if err := checkQuarantine(length); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if length == r.catalog.Quarantine {
		return nil
	}
	return r.change(func(c *catalog) {
		c.Quarantine = length
		c.record(r.sealer, Change{Op: OpSet, At: r.clock.Now(), Quarantine: length})
	})
}

// DeleteQuarantine returns for how long deleted points are kept.
func (r *Repository) DeleteQuarantine() time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.catalog.Quarantine
}

func checkQuarantine(length time.Duration) error {
	if length < 0 || length > MaxQuarantine {
		return fmt.Errorf("keep deleted points for %v: want 0 up to %d years", length, MaxQuarantine/(365*24*time.Hour))
	}
	return nil
}

// purge brings the deleted points whose time has passed to their end. Their chunks may be collected
// once it returns nil.
func (r *Repository) purge() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := r.clock.Now()
	var due, gone []PointID
	for _, l := range r.catalog.sorted() {
		if l.due(now) {
			immutable, err := r.fs.Immutable(r.pointPath(l.ID))
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
			if immutable {
				continue // so are its segments
			}
			due = append(due, l.ID)
		}
		if l.due(now) || l.Purged && !l.gone {
			gone = append(gone, l.ID)
		}
	}
	if len(gone) == 0 {
		return nil
	}
	if len(due) > 0 || r.copyErr != nil {
		err := r.change(func(c *catalog) {
			for _, id := range due {
				l := c.points[id]
				l.Purged = true
				l.LockedUntil, l.Deleted, l.PurgeAfter = time.Time{}, time.Time{}, time.Time{} // a purge always has room
				c.points[id] = l
				c.record(r.sealer, Change{Op: OpPurge, Point: id, At: now})
			}
		})
		if err != nil {
			return err
		}
		for _, id := range due {
			delete(r.deleted, id)
			delete(r.damagedPoints, id)
			delete(r.worn, id)
		}
		if r.copyErr != nil {
			return fmt.Errorf("the copy of the catalog still lists them: %w", r.copyErr)
		}
	}
	// Stopped here, the files are no points any more, and the next collection removes them.
	if err := r.removeFiles(gone); err != nil {
		return err
	}
	for _, id := range gone {
		l := r.catalog.points[id]
		l.gone = true
		r.catalog.points[id] = l // it is left out of the next catalog
	}
	return nil
}

// due reports whether a deleted point is to be purged.
func (l listing) due(now time.Time) bool {
	return !l.Purged && !l.Deleted.IsZero() && !now.Before(l.PurgeAfter)
}

// kept returns the points whose chunks a collection keeps; those before a purge leave out what it would
// purge. r.mu is held.
func (r *Repository) kept(beforePurge bool) []Point {
	now := r.clock.Now()
	var out []Point
	for _, f := range r.points {
		out = append(out, f.Point)
	}
	for id, f := range r.deleted {
		if !beforePurge || !r.catalog.points[id].due(now) {
			out = append(out, f.Point)
		}
	}
	return out
}

// collectable reports whether it is known what all points need.
func (r *Repository) collectable() error {
	if bad := r.DamagedPoints(); len(bad) > 0 {
		return fmt.Errorf("point %s cannot be read (%w), so nobody knows which chunks it needs; nothing was collected; bring its file back, or delete the point",
			bad[0].ID, bad[0].Err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.catalog.Lost != "" {
		return fmt.Errorf("%w; nothing was collected", ErrCatalogLost)
	}
	return nil
}

// waitsForTime reports whether anything ends with time. r.mu is held.
func (r *Repository) waitsForTime() bool {
	now := r.clock.Now()
	for _, l := range r.catalog.points {
		if now.Before(l.LockedUntil) || now.Before(l.PurgeAfter) {
			return true
		}
	}
	return false
}

// keepTime writes down where the clock stands, if anything waits for it: after a
// reboot it goes on from there.
func (r *Repository) keepTime() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.waitsForTime() {
		return nil
	}
	payload, err := json.Marshal(r.clock.Base())
	if err != nil {
		return err
	}
	data, err := r.sealer.encode(clockKind, clockFile, payload)
	if err != nil {
		return err
	}
	return durable.WriteFile(r.fs, filepath.Join(r.dir, pointsDir, clockFile), data)
}

func stamp(t time.Time) string { return t.Format(time.RFC3339) }

func attrPoint(p Point) slog.Attr {
	return slog.Group("point", slog.String("id", string(p.ID)), slog.String("vm", p.VM), slog.Time("time", p.Time))
}
