package appliance

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/blockstore"
	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/ingest"
	"github.com/holdfast-backup/holdfast/internal/durable"
	"github.com/holdfast-backup/holdfast/nbdserver/overlay"
)

const (
	// overlayFolder, in the data folder, holds what clients wrote to writable exports: one
	// file each.
	overlayFolder = "overlays"
	overlaySuffix = ".overlay"
	// maxOverlayName is the longest name of an overlay's file, in bytes: package overlay has
	// files beside it with an extension of 4 bytes more, and file systems take 255.
	maxOverlayName = 255 - 4
)

// overlayMeta is what an overlay's file tells of the export.
type overlayMeta struct {
	Name  string             `json:"name"` // of the export
	Point blockstore.PointID `json:"point"`
	Disk  string             `json:"disk"`
}

// WritableExport is what clients wrote to an export, kept until it is removed.
type WritableExport struct {
	Name    string `json:"name"`
	VM      string `json:"vm"` // "" if the point is gone
	Point   string `json:"point"`
	Disk    string `json:"disk"`
	Size    int64  `json:"size_bytes"`
	Written int64  `json:"written_bytes"` // what it takes on disk
	Limit   int64  `json:"limit_bytes"`   // of Written; 0 is none
}

// overlayPath returns the file of a writable export.
func (a *Appliance) overlayPath(export string) (string, error) {
	file := url.PathEscape(export) + overlaySuffix
	if export == "" || len(file) > maxOverlayName {
		return "", invalid("export name %q: that of a writable export has 1 to %d bytes, characters other than letters and digits counting thrice; "+
			"choose one with --name", export, maxOverlayName-len(overlaySuffix))
	}
	return filepath.Join(a.dir, overlayFolder, file), nil
}

// fs returns the file system of overlays.
func (a *Appliance) fs() durable.FS { return a.watch.FS(durable.OS()) }

// hold takes an overlay for one user; a second one is refused until release.
func (a *Appliance) hold(export string) (release func(), err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.held[export] {
		return nil, refused("export %s is being served or committed; end that first", export)
	}
	a.held[export] = true
	return func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		delete(a.held, export)
	}, nil
}

// kept returns what is known of a writable export; os.ErrNotExist if there is none.
func (a *Appliance) kept(name string) (overlayMeta, error) {
	path, err := a.overlayPath(name)
	if err != nil {
		return overlayMeta{}, err
	}
	meta, _, err := a.statOverlay(path)
	return meta, err
}

// statOverlay reads what an overlay's file tells of itself.
func (a *Appliance) statOverlay(path string) (meta overlayMeta, info overlay.Info, err error) {
	if info, err = overlay.Stat(path, overlay.Options{FS: a.fs()}); err != nil {
		return meta, info, err
	}
	if err := json.Unmarshal(info.Meta, &meta); err != nil {
		return meta, info, fmt.Errorf("%s is of no export of ours: %w", path, err)
	}
	return meta, info, nil
}

// goOn returns the disk that an export is of: that of the point, or, if clients wrote to a
// writable export of the name before, the one that lies below what they wrote. The two
// may differ only where the point was named by its time: VM@latest moves on.
func (a *Appliance) goOn(ctx context.Context, o ExportOptions, p blockstore.Point, d blockstore.PointDisk) (
	blockstore.Point, blockstore.PointDisk, error,
) {
	meta, err := a.kept(o.Name)
	switch {
	case !o.Writable && (errors.Is(err, errInvalid) || errors.Is(err, os.ErrNotExist)):
		return p, d, nil
	case errors.Is(err, os.ErrNotExist):
		a.warnOfOther(ctx, p, d)
		return p, d, nil
	case err != nil:
		return p, d, fmt.Errorf("export %s: %w", o.Name, err)
	case !o.Writable:
		return p, d, refused("export %s is a writable one: say --writable to go on with what was written to it, or give this one another name", o.Name)
	case meta.Point == p.ID && meta.Disk == d.Name:
		return p, d, nil
	}
	below, err := a.repo.Point(meta.Point)
	if err == nil && below.VM == p.VM && meta.Disk == d.Name && strings.Contains(o.Point, "@") {
		d, err = below.Disk(meta.Disk)
		return below, d, err
	}
	return p, d, refused("export %s holds what was written to disk %s of point %s; go on with it by export add %.12s --disk %s --writable --name %s, "+
		"or give this one another name", o.Name, meta.Disk, meta.Point, meta.Point, meta.Disk, o.Name)
}

// warnOfOther tells of a writable export of the same disk of another point: it may
// be the one that is meant.
func (a *Appliance) warnOfOther(ctx context.Context, p blockstore.Point, d blockstore.PointDisk) {
	exports, err := a.WritableExports()
	if err != nil {
		return // which the export itself will meet
	}
	for _, w := range exports {
		if w.VM == p.VM && w.Disk == d.Name && w.Written > 0 {
			a.log.WarnContext(ctx, "this is a new writable export; another one of the disk has been written to, --name goes on with it",
				slog.String("name", w.Name), slog.Int64("written_bytes", w.Written))
		}
	}
}

// openOverlay opens what clients wrote to an export of a disk so far, over base,
// which is that disk; the first time it makes an empty one.
func (a *Appliance) openOverlay(meta overlayMeta, base image.Disk, limit int64) (*overlay.Overlay, error) {
	path, err := a.overlayPath(meta.Name)
	if err != nil {
		return nil, err
	}
	if _, err := a.kept(meta.Name); errors.Is(err, os.ErrNotExist) {
		return a.createOverlay(path, meta, base, max(limit, 0))
	}
	return overlay.Open(path, base, overlay.Options{FS: a.fs(), Limit: limit, Log: a.log})
}

// closeOverlay closes what clients wrote to an export; if they wrote nothing, it
// goes, and with it what keeps the point from being deleted.
func (a *Appliance) closeOverlay(export string, o *overlay.Overlay) error {
	empty := o.Empty()
	if err := o.Close(); err != nil || !empty {
		return err
	}
	path, err := a.overlayPath(export)
	if err != nil {
		return err
	}
	return overlay.Remove(path, overlay.Options{FS: a.fs()})
}

func (a *Appliance) createOverlay(path string, meta overlayMeta, base image.Disk, limit int64) (*overlay.Overlay, error) {
	if err := a.fs().Mkdir(filepath.Dir(path)); err != nil {
		return nil, err
	}
	if err := a.fs().SyncDir(a.dir); err != nil {
		return nil, err
	}
	encoded, err := json.Marshal(meta)
	if err != nil {
		return nil, err
	}
	a.binding.Lock()
	defer a.binding.Unlock()
	if _, err := a.repo.Point(meta.Point); err != nil {
		return nil, err
	}
	return overlay.Create(path, base, overlay.Options{FS: a.fs(), Limit: limit, Meta: encoded, Log: a.log})
}

// WritableExports lists what is kept of writable exports, by name. What can't be
// read is logged and left out.
func (a *Appliance) WritableExports() ([]WritableExport, error) {
	found, unreadable, err := a.writableExports()
	for _, err := range unreadable {
		a.log.Error("a writable export cannot be read", slog.Any("error", err))
	}
	if err != nil {
		return nil, fmt.Errorf("list writable exports: %w", err)
	}
	return found, nil
}

// writableExports is WritableExports that returns why some can't be read.
func (a *Appliance) writableExports() (found []WritableExport, unreadable []error, err error) {
	found = []WritableExport{}
	folder := filepath.Join(a.dir, overlayFolder)
	files, err := a.fs().ReadDir(folder)
	if errors.Is(err, os.ErrNotExist) {
		return found, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	for _, f := range files {
		if !strings.HasSuffix(f.Name(), overlaySuffix) {
			continue
		}
		meta, info, err := a.statOverlay(filepath.Join(folder, f.Name()))
		if err != nil {
			unreadable = append(unreadable, err)
			continue
		}
		w := WritableExport{
			Name: meta.Name, Point: string(meta.Point), Disk: meta.Disk,
			Size: info.Size, Written: info.Used, Limit: info.Limit,
		}
		if p, err := a.repo.Point(meta.Point); err == nil {
			w.VM = p.VM
		}
		found = append(found, w)
	}
	slices.SortFunc(found, func(a, b WritableExport) int { return strings.Compare(a.Name, b.Name) })
	return found, unreadable, nil
}

// RemoveExport discards what clients wrote to a writable export.
func (a *Appliance) RemoveExport(name string) error {
	path, err := a.overlayPath(name)
	if err != nil {
		return err
	}
	release, err := a.hold(name)
	if err != nil {
		return err
	}
	defer release()
	err = overlay.Remove(path, overlay.Options{FS: a.fs()})
	if errors.Is(err, os.ErrNotExist) {
		return notFound("export %s: nothing is kept of such a writable export; see export list", name)
	}
	if err != nil {
		return fmt.Errorf("remove export %s: %w", name, err)
	}
	return nil
}

// CommitExport makes a restore point of what a writable export shows: the point's
// disks, one of them as clients left it. The point belongs to vm, "" for the VM of
// the export's point. What was written stays with the export.
func (a *Appliance) CommitExport(ctx context.Context, name, vm string, progress func(Progress)) (_ BackupResult, err error) {
	path, err := a.overlayPath(name)
	if err != nil {
		return BackupResult{}, err
	}
	release, err := a.hold(name)
	if err != nil {
		return BackupResult{}, err
	}
	defer release()
	meta, err := a.kept(name)
	if errors.Is(err, os.ErrNotExist) {
		return BackupResult{}, notFound("export %s: nothing is kept of such a writable export; see export list", name)
	}
	if err != nil {
		return BackupResult{}, fmt.Errorf("commit export %s: %w", name, err)
	}
	point, err := a.repo.Point(meta.Point)
	if err != nil {
		return BackupResult{}, fmt.Errorf("commit export %s: %w", name, err)
	}
	if vm == "" {
		vm = point.VM
	}
	if err := checkVM(vm); err != nil {
		return BackupResult{}, err
	}
	request := ingest.Request{VM: vm, Time: time.Now().UTC(), Consistency: crashConsistent, Config: point.Config}
	var opened closers
	defer func() { err = errors.Join(err, opened.close()) }()
	for _, d := range point.Disks {
		disk, err := a.repo.OpenDisk(point.ID, d.Name, blockstore.DiskOptions{})
		if err != nil {
			return BackupResult{}, fmt.Errorf("commit export %s: %w", name, err)
		}
		opened = append(opened, disk.Close)
		source := ingest.Source{Name: d.Name, Disk: disk, Changed: []image.Extent{}, Since: point.ID}
		if d.Name == meta.Disk {
			o, err := overlay.Open(path, disk, overlay.Options{FS: a.fs(), Log: a.log})
			if err != nil {
				return BackupResult{}, fmt.Errorf("commit export %s: %w", name, err)
			}
			opened = append(opened, o.Close)
			source.Disk = o
			if source.Changed, err = changedExtents(o, int64(a.repo.ChunkSize())); err != nil {
				return BackupResult{}, fmt.Errorf("commit export %s: %w", name, err)
			}
		}
		request.Disks = append(request.Disks, source)
	}
	return a.ingest(ctx, request, progress)
}

// changedExtents returns what clients wrote, in extents that are a chunk or more
// apart: no chunk lies whole in a shorter gap, and there are not more of them than chunks,
// however scattered the writes were.
func changedExtents(o *overlay.Overlay, chunk int64) ([]image.Extent, error) {
	extents := []image.Extent{}
	for e, err := range o.Changed(0, o.Size()) {
		if err != nil {
			return nil, err
		}
		if n := len(extents); n > 0 && e.Off-extents[n-1].End() < chunk {
			extents[n-1].Len = e.End() - extents[n-1].Off
			continue
		}
		extents = append(extents, e)
	}
	return extents, nil
}

// needed refuses if a writable export lies over a point, or may: what was written
// to it is worth nothing without the point.
func (a *Appliance) needed(id blockstore.PointID) error {
	exports, unreadable, err := a.writableExports()
	if err != nil {
		return fmt.Errorf("delete point %s: look for writable exports over it: %w", id, err)
	}
	for _, w := range exports {
		if w.Point == string(id) {
			return refused("point %s: what was written to export %s lies over it; commit and remove that first (export commit, export remove)", id, w.Name)
		}
	}
	if len(unreadable) > 0 {
		return refused("point %s: a writable export may lie over it, but one cannot be read: %v; mend or remove that file first", id, unreadable[0])
	}
	return nil
}
