package appliance

import (
	"context"
	"fmt"

	"github.com/holdfast-backup/holdfast/blockstore"
)

// Results of repairs.
type (
	// RepairResult tells what a repair found and did.
	RepairResult = blockstore.RepairResult
	// Replaced is what one repair has replaced and keeps.
	Replaced = blockstore.Replaced
)

// Repair sets right what Verify, reads and backups found damaged, and what it finds itself in the
// files of the repository. With apply false it only tells what it would do. What it replaces it
// keeps: see Quarantine. progress may be nil.
func (a *Appliance) Repair(ctx context.Context, apply bool, progress func(Progress)) (RepairResult, error) {
	o := blockstore.RepairOptions{Apply: apply}
	if progress != nil {
		o.Progress = func(done, total int) {
			progress(Progress{Subject: "repair", Done: int64(done), Total: int64(total), Unit: Segments})
		}
	}
	result, err := a.repo.Repair(ctx, o)
	if err != nil {
		return result, fmt.Errorf("repair %s: %w", a.dir, err)
	}
	return result, nil
}

// Quarantine returns what repairs of the repository in dir have replaced and keep, oldest first.
func Quarantine(dir string) ([]Replaced, error) {
	dir, err := dataFolder(dir)
	if err != nil {
		return nil, err
	}
	list, err := blockstore.ListQuarantine(dir)
	if err != nil {
		return nil, fmt.Errorf("list the quarantine of %s: %w", dir, err)
	}
	return list, nil
}

// PutBackResult tells what RestoreQuarantine did. Names are relative to the data folder.
type PutBackResult struct {
	Restored []string `json:"restored"`
	Kept     []string `json:"kept"` // a file of that name is there
}

// RestoreQuarantine puts the files that one repair replaced back, as far as no file of the name is
// there. Nobody may have the repository in dir open.
func RestoreQuarantine(dir, stamp string) (PutBackResult, error) {
	dir, err := dataFolder(dir)
	if err != nil {
		return PutBackResult{}, err
	}
	restored, kept, err := blockstore.RestoreQuarantine(dir, stamp)
	if err != nil {
		return PutBackResult{restored, kept}, fmt.Errorf("restore from the quarantine of %s: %w", dir, err)
	}
	return PutBackResult{restored, kept}, nil
}

// RemoveQuarantine removes what one repair replaced for good. Nobody may have the repository in
// dir open.
func RemoveQuarantine(dir, stamp string) (Replaced, error) {
	dir, err := dataFolder(dir)
	if err != nil {
		return Replaced{}, err
	}
	removed, err := blockstore.RemoveQuarantine(dir, stamp)
	if err != nil {
		return removed, fmt.Errorf("remove from the quarantine of %s: %w", dir, err)
	}
	return removed, nil
}
