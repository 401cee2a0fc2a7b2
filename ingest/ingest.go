// Package ingest turns snapshots of disks into a restore point.
//
// A disk is read in stripes of 1 MiB by a few workers. Each cuts its stripe
// into chunks, hashes them, compares them with the same chunks of the VM's
// last point, and stores what the repository does not have. Leaves of the map
// are put together as their stripes finish, in any order; the nodes above
// them at the end.
//
// # Invariants
//
//   - A point is listed whole or not at all: all disks, every chunk durable.
//   - What the source calls zero is not read; what the last point's map
//     says is never taken without a read, unless the caller vouches for it
//     with [Source.Changed].
//   - A chunk of the last point that is known to be damaged counts as
//     changed, and so does all that lies under a map node that cannot be read.
//
// # Limits
//
// Memory is bounded by workers times a stripe, and by 40 bytes for every 64 MiB of
// disk (at the default chunk size) that is not taken over from the last point
// whole: a few MiB for a disk of 10 TiB.
package ingest

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/holdfast-backup/holdfast/blockstore"
	"github.com/holdfast-backup/holdfast/image"
)

// Mode says how much of a disk is read.
type Mode string

// The modes. A disk of another size than in the last point is scanned. Of an incremental one, what is
// known to be damaged in the last point is read too: only that can heal it.
const (
	Full        Mode = "full"        // all data is read and nothing is compared
	Scan        Mode = "scan"        // all data is read and compared with the last point
	Incremental Mode = "incremental" // only what the source calls changed is read
)

// Source is one disk to back up.
type Source struct {
	Name string
	Disk image.Disk
	// Changed vouches that outside these extents the disk is as the disk of that
	// name was in the point Since, of any VM. Nil means that nobody knows; an empty slice
	// that nothing changed. It is not used if Since is gone.
	Changed []image.Extent
	Since   blockstore.PointID
}

// Request is one backup. All disks are of the same moment.
type Request struct {
	VM          string
	Time        time.Time
	Consistency string
	Disks       []Source
	Config      map[string][]byte // the VM's configuration: file name to content
	Lock        time.Duration     // for which the point is locked from its commit on; 0 is not
}

// DiskResult tells what a backup of a disk took, in bytes.
type DiskResult struct {
	Name    string `json:"name"`
	Mode    Mode   `json:"mode"`
	Size    int64  `json:"size_bytes"`
	Read    int64  `json:"read_bytes"`    // fetched from the source
	Changed int64  `json:"changed_bytes"` // differ from the last point, or from Since, in whole chunks
	New     int64  `json:"new_bytes"`     // were not in the repository yet
	Stored  int64  `json:"stored_bytes"`  // what those and the map take in the repository
}

// Result is a point and what it took.
type Result struct {
	Point blockstore.Point
	Disks []DiskResult
}

// Progress tells how far a backup is, in bytes of all its disks. Bytes that
// need no reading count as done.
type Progress struct {
	Done, Total int64
	DiskResult  // sums over all disks; its Name is the disk being read
}

// Run backs up a VM's disks into one point. progress may be nil; otherwise it is called
// now and then, from one goroutine at a time. If ctx ends or anything fails, no
// point is listed.
func Run(ctx context.Context, repo *blockstore.Repository, req Request, progress func(Progress)) (Result, error) {
	if len(req.Disks) == 0 {
		return Result{}, errors.New("no disks to back up")
	}
	s := repo.Begin()
	defer s.Close()
	if err := s.LockFor(req.Lock); err != nil {
		return Result{}, fmt.Errorf("back up %s: %w", req.VM, err)
	}
	report := newReporter(req.Disks, progress)
	point := blockstore.Point{
		ID: blockstore.NewPointID(), VM: req.VM, Time: req.Time, Mode: string(Full),
		Consistency: req.Consistency, Config: req.Config,
	}
	var disks []DiskResult
	for _, src := range req.Disks {
		m, result, err := backUp(ctx, repo, s, req.VM, src, report)
		if err != nil {
			return Result{}, fmt.Errorf("back up disk %s of %s: %w", src.Name, req.VM, err)
		}
		point.Disks = append(point.Disks, blockstore.PointDisk{Name: src.Name, Map: m})
		point.Mode = string(weaker(Mode(point.Mode), result.Mode))
		disks = append(disks, result)
	}
	point, err := s.Commit(ctx, point)
	if err != nil {
		return Result{}, fmt.Errorf("back up %s: %w", req.VM, err)
	}
	report.finish()
	return Result{Point: point, Disks: disks}, nil
}

// weaker returns the mode that names a point whose disks were read in two: one
// incremental disk makes an incremental point, one scanned disk a scan.
func weaker(a, b Mode) Mode {
	for _, m := range []Mode{Incremental, Scan} {
		if a == m || b == m {
			return m
		}
	}
	return Full
}
