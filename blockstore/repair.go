package blockstore

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// RepairOptions say what a repair does. The zero value only tells what one would do.
type RepairOptions struct {
	// Apply does what is to be done.
	Apply bool
	// Progress, if set, hears of segments looked at, and how many there are.
	Progress func(done, total int)
}

// The kinds of what a repair finds.
const (
	RepairSegment = "segment" // a file of segments
	RepairConfig  = "config"  // repository.json or its copy
	RepairCatalog = "catalog" // the list of points
	RepairPoint   = "point"   // a point's file
	RepairLost    = "lost"    // parts of a point's disk that nothing in the repository has
	RepairUnknown = "unknown" // a file that is not ours
)

// RepairAction is one thing that is not as it should be, and what is done about it.
type RepairAction struct {
	Kind   string    `json:"kind"`
	File   string    `json:"file"` // in the repository's folder; "" if it is of no file
	Reason string    `json:"reason"`
	Action string    `json:"action"` // what is done, or would be
	Done   bool      `json:"done"`
	Point  PointID   `json:"point,omitempty"`
	VM     string    `json:"vm,omitempty"`
	Time   time.Time `json:"time,omitzero"` // of the point
	Disk   string    `json:"disk,omitempty"`
	Offset int64     `json:"offset,omitempty"` // of the first byte that is lost
	Bytes  int64     `json:"bytes,omitempty"`  // of the disk that are lost
}

// RepairResult tells what a repair found and did.
type RepairResult struct {
	Actions    []RepairAction `json:"actions"`
	Applied    bool           `json:"applied"`
	LostChunks int64          `json:"lost_chunks"` // that points need and nothing has
	// Quarantine is the folder within quarantine/ that holds what was replaced; "" if nothing was.
	Quarantine string `json:"quarantine,omitempty"`
}

// Remains reports whether something is left to do.
func (r RepairResult) Remains() bool {
	return r.LostChunks > 0 || slices.ContainsFunc(r.Actions, func(a RepairAction) bool {
		return !a.Done && a.Kind != RepairUnknown
	})
}

// Repair sets right what Verify, reads and backups found, and what it finds itself around the
// records of segments and in the files of points. Nothing is changed in place: what is good is
// written anew, durably, and then the old file moves to quarantine/. It may be stopped at any
// moment and run again. Backups and reads may run meanwhile; a collection is refused.
func (r *Repository) Repair(ctx context.Context, o RepairOptions) (RepairResult, error) {
	p := &repair{r: r, o: o, result: RepairResult{Actions: []RepairAction{}, Applied: o.Apply}}
	if !r.maintenance.TryLock() {
		return p.result, ErrCollecting
	}
	defer r.maintenance.Unlock()
	if err := r.appender.finish(); err != nil {
		return p.result, err
	}
	for _, step := range []func(context.Context) error{p.config, p.points, p.segments, p.lost, p.unknown} {
		if err := step(ctx); err != nil {
			return p.result, err
		}
	}
	return p.result, nil
}

// repair is one run of Repair.
type repair struct {
	r      *Repository
	o      RepairOptions
	stamp  string // of the folder in quarantine/; "" until something is moved
	result RepairResult
}

func (p *repair) add(a RepairAction) {
	p.result.Actions = append(p.result.Actions, a)
}

// config writes the files of the configuration anew that are not what they should be.
func (p *repair) config(context.Context) error {
	for _, problem := range p.r.checkConfig() {
		if away(problem.Err) {
			return problem.Err
		}
		if p.o.Apply {
			if err := p.keep(problem.File); err != nil {
				return err
			}
			if err := p.r.restoreConfig(problem.File); err != nil {
				return err
			}
		}
		p.add(RepairAction{
			Kind: RepairConfig, File: problem.File, Reason: problem.Err.Error(),
			Action: "write it anew, as it was when the repository was opened or changed last", Done: p.o.Apply,
		})
	}
	return nil
}

// restoreConfig is rewriteConfig for a caller that does not hold r.configMu.
func (r *Repository) restoreConfig(name string) error {
	r.configMu.Lock()
	defer r.configMu.Unlock()
	return r.rewriteConfig(name)
}

// lost tells which disks need chunks that nothing has any more.
func (p *repair) lost(ctx context.Context) error {
	v := newVerification(p.r, VerifyOptions{Percent: 100})
	v.needed, v.walked = marks{}, walkedNodes{}
	points := p.r.keptPoints()
	disks := v.open(points)
	defer closeDisks(disks)
	for _, d := range disks {
		if err := v.mark(ctx, p.r.tree(d.m)); err != nil {
			return err
		}
	}
	if err := v.flushLost(); err != nil {
		return err
	}
	for _, id := range p.r.damaged.list() {
		if _, known := v.bad[id]; !known && len(v.bad) < maxBadRecords {
			v.bad[id] = badRecord{reason: "no good record of it is in any segment"}
		}
	}
	lost := map[ID]struct{}{}
	at := map[string]int{} // of the action for a disk of a point
	v.tell = func(id ID, e VerifyError) {
		lost[id] = struct{}{}
		key := string(e.Point) + e.Disk
		i, ok := at[key]
		if !ok {
			i = len(p.result.Actions)
			at[key] = i
			n := slices.IndexFunc(points, func(q Point) bool { return q.ID == e.Point })
			p.add(RepairAction{
				Kind: RepairLost, Point: e.Point, VM: e.VM, Time: points[n].Time, Disk: e.Disk, Offset: e.Offset, Reason: e.Reason,
				Action: "none: the rest of the disk can be restored, and a backup that meets the same content heals it",
			})
		}
		p.result.Actions[i].Bytes += e.Length
	}
	err := v.report(ctx, points)
	p.result.LostChunks = int64(len(lost))
	return err
}

// quarantine moves a file of the repository's folder, durably, to where the repair keeps what it
// replaced.
func (p *repair) quarantine(file string) error {
	to, err := p.quarantined(file)
	if err != nil {
		return err
	}
	from := filepath.Join(p.r.dir, file)
	if err := p.r.fs.Rename(from, to); err != nil {
		return fmt.Errorf("move %s to the quarantine: %w", file, err)
	}
	return errors.Join(p.r.fs.SyncDir(filepath.Dir(to)), p.r.fs.SyncDir(filepath.Dir(from)))
}

// quarantined returns the path at which the repair keeps a file, in a folder that it makes.
func (p *repair) quarantined(file string) (string, error) {
	r := p.r
	top := filepath.Join(r.dir, quarantineDir)
	if p.stamp == "" {
		if err := r.makeDir(top); err != nil {
			return "", err
		}
		there, err := r.fs.ReadDir(top)
		if err != nil {
			return "", err
		}
		now := time.Now().UTC().Format(quarantineStamp)
		name := now
		for n := 2; slices.ContainsFunc(there, func(e os.DirEntry) bool { return e.Name() == name }); n++ {
			name = fmt.Sprintf("%s-%d", now, n)
		}
		if err := r.makeDir(filepath.Join(top, name)); err != nil {
			return "", err
		}
		p.stamp, p.result.Quarantine = name, name
	}
	to := filepath.Join(top, p.stamp, file)
	return to, r.makeDir(filepath.Dir(to))
}

// makeDir makes a folder, durably.
func (r *Repository) makeDir(path string) error {
	if err := r.fs.Mkdir(path); err != nil {
		return noSpace(err)
	}
	return r.fs.SyncDir(filepath.Dir(path))
}
