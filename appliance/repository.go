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
	// CollectResult tells what a collection found and did.
	CollectResult = blockstore.CollectResult
	// RebuildResult tells what was entered in a new index.
	RebuildResult = blockstore.RebuildStats
)

// Stats returns figures of the repository.
func (a *Appliance) Stats() Stats {
	return a.repo.Stats()
}

// Verify reads percent (above 0, up to 100) of the stored bytes back, those first
// that were verified longest ago. What is damaged is in the result and no
// error. progress may be nil.
func (a *Appliance) Verify(ctx context.Context, percent float64, progress func(Progress)) (VerifyResult, error) {
	if !(percent > 0 && percent <= 100) { // NaN neither
		return VerifyResult{}, invalid("%v percent: want more than 0, up to 100", percent)
	}
	o := blockstore.VerifyOptions{Percent: percent}
	if progress != nil {
		o.Progress = func(done, total int64) {
			progress(Progress{Subject: "verify", Done: done, Total: total, Unit: Bytes})
		}
	}
	result, err := a.repo.Verify(ctx, o)
	if err != nil {
		return result, fmt.Errorf("verify %s: %w", a.dir, err)
	}
	return result, nil
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
	result, err := a.repo.Collect(ctx, options)
	if err != nil {
		return result, fmt.Errorf("collect garbage in %s: %w", a.dir, err)
	}
	return result, nil
}

// RebuildIndex makes the index of the repository in dir, which nobody may have
// open, anew from its segments.
func RebuildIndex(ctx context.Context, dir string, o Options) (RebuildResult, error) {
	dir, err := dataFolder(dir)
	if err != nil {
		return RebuildResult{}, err
	}
	keys, err := o.store()
	if err != nil {
		return RebuildResult{}, err
	}
	result, err := blockstore.RebuildIndex(ctx, dir, keys)
	if err != nil {
		return result, openError(dir, err)
	}
	return result, nil
}
