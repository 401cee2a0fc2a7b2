package blockstore

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/holdfast-backup/holdfast/internal/durable"
)

// Head names the state that the points are in: a number that every change adds to, and a hash of all
// changes. Noted elsewhere, it tells with Descends whether the repository was put back.
func (r *Repository) Head() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.catalog.head()
}

// Descends returns nil if the repository was in the state that a head names, and all that
// happened since was added to it. It knows the last 1000 changes.
func (r *Repository) Descends(head string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.catalog.descends(r.sealer, head)
}

// Changes returns the last changes of the points, up to 1000, oldest first.
func (r *Repository) Changes() []Change {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.catalog.Changes)
}

// CheckPoints reads the files of the catalog and of all listed points again, for PointProblems. A
// point that was withheld and whose file is back is listed again.
func (r *Repository) CheckPoints(ctx context.Context) error {
	r.mu.Lock()
	ids := slices.Sorted(maps.Keys(r.catalog.points))
	r.mu.Unlock()
	for _, id := range ids {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := r.checkPoint(id); err != nil {
			return err
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.catalogUnsettled || r.copyErr != nil || r.catalog.Lost != "" {
		return nil
	}
	return r.checkCatalog()
}

// checkCatalog reads the files of a catalog that are what is in memory, or should be. r.mu is held.
func (r *Repository) checkCatalog() error {
	r.catalogErrs = nil
	for _, name := range []string{catalogFile, catalogCopyFile} {
		c, worn, err := r.readCatalog(name)
		switch {
		case away(err):
			return err
		case err != nil:
		case worn:
			err = errors.New("one of its two copies is damaged")
		case c.Chain != r.catalog.Chain:
			err = errors.New("it is another than was written last: it was put back")
		}
		if err != nil {
			r.catalogErrs = append(r.catalogErrs, catalogProblem{name, err})
			r.catalogUnsettled = true // the next change writes both
		}
	}
	return nil
}

// checkPoint reads the file of a listed point. The error means that storage is away.
func (r *Repository) checkPoint(id PointID) error {
	p, err := r.readPoint(id)
	if away(err) {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if l, ok := r.catalog.points[id]; ok && !l.Purged {
		r.place(l, readPoint{p, err})
	}
	return nil
}

// RewritePoint writes a point's file anew, durably, if what the point holds is known: for
// a point that is worn.
func (r *Repository) RewritePoint(id PointID) error {
	p, err := r.readPoint(id)
	r.mu.Lock()
	defer r.mu.Unlock()
	l, listed := r.catalog.points[id]
	if !listed || l.Purged {
		return r.noPointLocked(id)
	}
	data := twice(p.one)
	if err != nil || p.hash != l.Hash {
		if !r.knownLocked(id) {
			return fmt.Errorf("rewrite point %s: %w", id, r.damagedPoints[id])
		}
		// Nothing of the file is left, but it is in memory.
		f, live := r.points[id]
		if !live {
			f = r.deleted[id]
		}
		var hash ID
		if data, hash, err = r.sealer.encodePoint(f); err != nil {
			return err
		}
		if hash != l.Hash {
			return fmt.Errorf("rewrite point %s: %w", id, errSwapped)
		}
	}
	// A crash leaves the old file or the new one, and the catalog says the same of both.
	if err := durable.WriteFile(r.fs, r.pointPath(id), data); err != nil {
		return fmt.Errorf("rewrite point %s: %w", id, noSpace(err))
	}
	delete(r.worn, id)
	return nil
}

// RepairCatalog writes the catalog anew, durably, from what is in memory, and accepts a loss.
func (r *Repository) RepairCatalog() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.catalog.Lost == "" {
		return r.writeCatalog(r.nextCatalog())
	}
	next := r.nextCatalog()
	next.Lost = ""
	if err := next.rebuilt(r.sealer, r.clock.Now()); err != nil {
		return err
	}
	return r.writeCatalog(next)
}
