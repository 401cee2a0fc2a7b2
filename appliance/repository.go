package appliance

import (
	"context"
	"fmt"

	"github.com/holdfast-backup/holdfast/blockstore"
)

// Results of work on the repository.
type (
	// Stats are figures of the repository.
	Stats = blockstore.Stats
	// VerifyResult tells what was read back and what is wrong.
	VerifyResult = blockstore.VerifyResult
	// VerifyError is one place that is damaged.
	VerifyError = blockstore.VerifyError
	// CollectResult tells what a collection found and did.
	CollectResult = blockstore.CollectResult
	// RebuildResult tells what was entered in a new index.
	RebuildResult = blockstore.RebuildStats
)

// Stats returns figures of the repository.
func (a *Appliance) Stats() Stats {
	return a.repo.Stats()
}

// VerifyOptions say how much is verified. The zero value verifies everything. Of Percent,
// Points with VM, and Resume only one may be given.
type VerifyOptions struct {
	// Percent is the share of the stored bytes to read, above 0 up to 100; 0 is 100.
	// Those that were verified longest ago come first.
	Percent float64
	// Points (see ResolvePoint) and those of VM are verified, and only what they need; if none is
	// named, all.
	Points []string
	VM     string
	// Resume goes on with a verification of everything that was interrupted; if there is none,
	// one begins.
	Resume bool
	// Rate bounds the bytes that are read in a second; 0 is no bound.
	Rate int64
	// Since, if set, is the Head of Stats that was noted before: that the repository was put back to an
	// earlier state is damage, too.
	Since string
}

// Verify reads stored bytes back and compares them with their hashes. What is damaged is in the
// result and no error. progress may be nil.
func (a *Appliance) Verify(ctx context.Context, o VerifyOptions, progress func(Progress)) (VerifyResult, error) {
	options := blockstore.VerifyOptions{Percent: o.Percent, Resume: o.Resume, Rate: o.Rate}
	var rolledBack error
	if o.Since != "" {
		if rolledBack = a.descends(o.Since); KindOf(rolledBack) == Invalid {
			return VerifyResult{}, rolledBack
		}
	}
	switch {
	case o.Percent != 0 && !(o.Percent > 0 && o.Percent <= 100): // NaN neither
		return VerifyResult{}, invalid("%v percent: want more than 0, up to 100", o.Percent)
	case o.Rate < 0:
		return VerifyResult{}, invalid("%d bytes a second: want a rate above 0", o.Rate)
	case o.Resume && o.Percent != 0 && o.Percent != 100:
		return VerifyResult{}, invalid("only a verification of everything can be resumed; leave the share out")
	case o.VM != "" || len(o.Points) > 0:
		if o.Resume || o.Percent != 0 && o.Percent != 100 {
			return VerifyResult{}, invalid("a verification of points is one of all that they need; leave the share, and resuming, out")
		}
		var err error
		if options.Points, err = a.selectPoints(o.Points, o.VM); err != nil {
			return VerifyResult{}, err
		}
	}
	if progress != nil {
		options.Progress = func(done, total int64) {
			progress(Progress{Subject: "verify", Done: done, Total: total, Unit: Bytes})
		}
	}
	result, err := a.repo.Verify(ctx, options)
	if err != nil {
		return result, fmt.Errorf("verify %s: %w", a.dir, err)
	}
	if rolledBack != nil {
		result.Errors = append(result.Errors, VerifyError{Reason: rolledBack.Error()})
	}
	return result, nil
}

// selectPoints returns the points that refs name and those of a VM, if one is named.
func (a *Appliance) selectPoints(refs []string, vm string) ([]blockstore.PointID, error) {
	ids := []blockstore.PointID{}
	for _, ref := range refs {
		p, err := a.resolve(ref)
		if err != nil {
			return nil, err
		}
		ids = append(ids, p.ID)
	}
	if vm == "" {
		return ids, nil
	}
	named := len(ids)
	for _, p := range a.repo.Points() {
		if p.VM == vm {
			ids = append(ids, p.ID)
		}
	}
	if len(ids) == named {
		return nil, notFound("VM %s has no restore points; point list shows those that have", vm)
	}
	return ids, nil
}

// CollectOptions say how much a collection does. The zero value gives back
// every byte that no point needs.
type CollectOptions struct {
	// DryRun only tells what would be freed.
	DryRun bool
	// MaxUnusedPercent is the share of dead bytes, 0 to 100, that a segment may
	// keep; a higher one copies less.
	MaxUnusedPercent float64
}

// Collect gives back the space of what no point needs any more. It may be
// stopped at any moment. progress may be nil.
func (a *Appliance) Collect(ctx context.Context, o CollectOptions, progress func(Progress)) (CollectResult, error) {
	if !(o.MaxUnusedPercent >= 0 && o.MaxUnusedPercent <= 100) { // NaN neither
		return CollectResult{}, invalid("%v percent unused: want 0 to 100", o.MaxUnusedPercent)
	}
	options := blockstore.CollectOptions{DryRun: o.DryRun, MaxUnused: o.MaxUnusedPercent / 100}
	if progress != nil {
		options.Progress = func(now blockstore.CollectProgress) {
			unit := Nodes
			if now.Phase == blockstore.PhaseSweep {
				unit = Bytes
			}
			progress(Progress{Subject: "collect: " + string(now.Phase), Done: now.Done, Total: now.Total, Unit: unit})
		}
	}
	if !o.DryRun {
		a.releaseEnded(ctx)
	}
	result, err := a.repo.Collect(ctx, options)
	if err != nil {
		return result, fmt.Errorf("collect garbage in %s: %w", a.dir, err)
	}
	return result, nil
}

// RebuildIndex makes the index of the repository in dir, which nobody may have
// open, anew from its segments. It may be stopped at any moment: the next opening goes on.
// progress may be nil.
func RebuildIndex(ctx context.Context, dir string, o Options, progress func(Progress)) (RebuildResult, error) {
	dir, err := dataFolder(dir)
	if err != nil {
		return RebuildResult{}, err
	}
	keys, err := o.store()
	if err != nil {
		return RebuildResult{}, err
	}
	var entered func(done, total int)
	if progress != nil {
		entered = func(done, total int) {
			progress(Progress{Subject: "rebuild index", Done: int64(done), Total: int64(total), Unit: Segments})
		}
	}
	result, err := blockstore.RebuildIndex(ctx, dir, keys, entered)
	if err != nil {
		return result, openError(dir, err)
	}
	return result, nil
}
