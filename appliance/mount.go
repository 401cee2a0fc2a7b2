package appliance

import (
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/blockstore"
	"github.com/holdfast-backup/holdfast/fusefs"
	"github.com/holdfast-backup/holdfast/image"
)

const (
	// unmountPatience is how long unmounting waits for those who use the mount.
	unmountPatience = 10 * time.Second
	// unlockPatience is how long Unmount waits for the data folder to be let go of.
	unlockPatience = 5 * time.Second
	unlockRetry    = 20 * time.Millisecond
	// pointFile is the file of a mounted point that describes it.
	pointFile = "point.json"
)

// MountOptions say how points are mounted.
type MountOptions struct {
	// AllowOther lets other users in.
	AllowOther bool
}

// Mount is a mount that is being served.
type Mount struct {
	Dir string `json:"mount"`
}

// Mount shows all points as files at dir until ctx ends or somebody unmounts
// it, neither of which is an error. It calls ready once the files are there; an
// error of ready ends it. If ctx ends while the mount is in use, it is given
// 10 s.
func (a *Appliance) Mount(ctx context.Context, dir string, o MountOptions, ready func(Mount) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	options := fusefs.Options{AllowOther: o.AllowOther, Logger: a.log}
	m, err := fusefs.Mount(dir, pointTree{a.repo}, options) //nolint:contextcheck // it waits for nothing but the kernel
	if err != nil {
		return err
	}
	err = ready(Mount{Dir: m.Dir()})
	if err == nil && m.Wait(ctx) == nil {
		return nil
	}
	ending, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), unmountPatience,
		fmt.Errorf("still in use after %v", unmountPatience))
	defer cancel()
	if unmountErr := m.Unmount(ending); unmountErr != nil {
		return unmountErr
	}
	return err
}

// Unmount ends the mount at dir, whichever process serves it, and waits until the
// data folder, if that is what it served, can be opened again.
func Unmount(ctx context.Context, data, dir string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, unmountPatience, fmt.Errorf("still in use after %v", unmountPatience))
	defer cancel()
	if err := fusefs.Unmount(ctx, dir); err != nil {
		return err
	}
	ctx, cancelUnlock := context.WithTimeout(ctx, unlockPatience)
	defer cancelUnlock()
	for locked(data) {
		select {
		case <-time.After(unlockRetry):
		case <-ctx.Done():
			return nil // it is unmounted; something else has the data folder open
		}
	}
	return nil
}

// locked reports whether a process has the data folder open.
func locked(data string) bool {
	f, err := os.Open(filepath.Join(data, "lock"))
	if err != nil {
		return false
	}
	defer f.Close() // which also unlocks
	return unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB) != nil
}

// pointTree is the repository as a mount shows it.
type pointTree struct {
	repo *blockstore.Repository
}

var _ fusefs.Source = pointTree{}

// VMs returns the names of all VMs with points, in alphabetical order.
func (t pointTree) VMs(context.Context) ([]string, error) {
	names := map[string]struct{}{}
	for _, p := range t.repo.Points() {
		names[p.VM] = struct{}{}
	}
	return slices.Sorted(maps.Keys(names)), nil
}

// Points returns a VM's points, oldest first.
func (t pointTree) Points(_ context.Context, vm string) ([]fusefs.Point, error) {
	var points []fusefs.Point
	for _, p := range t.repo.Points() {
		if p.VM == vm {
			points = append(points, fusefs.Point{ID: string(p.ID), Time: p.Time})
		}
	}
	return points, nil
}

// Contents returns a point's disks, its saved configuration and its description.
func (t pointTree) Contents(_ context.Context, id string) (fusefs.Contents, error) {
	p, err := t.repo.Point(blockstore.PointID(id))
	if err != nil {
		return fusefs.Contents{}, fmt.Errorf("%w: %w", fs.ErrNotExist, err)
	}
	description, err := json.MarshalIndent(newPoint(p), "", "  ")
	if err != nil {
		return fusefs.Contents{}, err
	}
	c := fusefs.Contents{Files: map[string][]byte{pointFile: append(description, '\n')}}
	maps.Copy(c.Files, p.Config) // the VM's own files come first
	for _, d := range p.Disks {
		c.Disks = append(c.Disks, fusefs.DiskInfo{Name: d.Name, Size: d.Map.Size, DataBytes: d.Map.Data})
	}
	return c, nil
}

// OpenDisk opens a disk for random reads.
func (t pointTree) OpenDisk(_ context.Context, id, disk string) (image.DiskCloser, error) {
	d, err := t.repo.OpenDisk(blockstore.PointID(id), disk, blockstore.DiskOptions{})
	if err != nil {
		if KindOf(err) == NotFound {
			err = fmt.Errorf("%w: %w", fs.ErrNotExist, err)
		}
		return nil, err // not d: an interface that holds a nil pointer is not nil
	}
	return d, nil
}
