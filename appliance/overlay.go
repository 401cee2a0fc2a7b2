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
	"github.com/holdfast-backup/holdfast/nbdserver/overlay"
)

const (
	// overlayFolder, in the data folder, holds what clients wrote to writable exports: one
	// file each.
	overlayFolder = "overlays"
	overlaySuffix = ".overlay"
	maxFileName   = 255 // bytes, what file systems take
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
	if export == "" || len(file) > maxFileName {
		return "", invalid("export name %q: a writable export needs a name of 1 to about %d bytes; choose one with --name",
			export, maxFileName-len(overlaySuffix))
	}
	return filepath.Join(a.dir, overlayFolder, file), nil
}

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

// openOverlay opens what clients wrote to an export of a disk so far, over base,
// which is that disk; the first time it makes an empty one.
func (a *Appliance) openOverlay(meta overlayMeta, base image.Disk, limit int64) (*overlay.Overlay, error) {
	path, err := a.overlayPath(meta.Name)
	if err != nil {
		return nil, err
	}
	info, err := overlay.Stat(path, overlay.Options{})
	if errors.Is(err, os.ErrNotExist) {
		return a.createOverlay(path, meta, base, limit)
	}
	if err != nil {
		return nil, err
	}
	kept, err := decodeMeta(path, info.Meta)
	if err != nil {
		return nil, err
	}
	if kept != meta {
		return nil, refused("%s holds what was written to disk %s of point %.8s; give this export another name, or remove that one",
			meta.Name, kept.Disk, kept.Point)
	}
	return overlay.Open(path, base, overlay.Options{Limit: limit})
}

func (a *Appliance) createOverlay(path string, meta overlayMeta, base image.Disk, limit int64) (*overlay.Overlay, error) {
	if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil && !errors.Is(err, os.ErrExist) {
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
	return overlay.Create(path, base, overlay.Options{Limit: limit, Meta: encoded})
}

func decodeMeta(path string, encoded []byte) (overlayMeta, error) {
	var meta overlayMeta
	if err := json.Unmarshal(encoded, &meta); err != nil {
		return meta, fmt.Errorf("%s is of no export of ours: %w", path, err)
	}
	return meta, nil
}

// WritableExports lists what is kept of writable exports, by name. What can't be
// read is logged and left out.
func (a *Appliance) WritableExports() ([]WritableExport, error) {
	found := []WritableExport{}
	folder := filepath.Join(a.dir, overlayFolder)
	files, err := os.ReadDir(folder)
	if errors.Is(err, os.ErrNotExist) {
		return found, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list writable exports: %w", err)
	}
	for _, f := range files {
		if !strings.HasSuffix(f.Name(), overlaySuffix) {
			continue
		}
		path := filepath.Join(folder, f.Name())
		info, err := overlay.Stat(path, overlay.Options{})
		var meta overlayMeta
		if err == nil {
			meta, err = decodeMeta(path, info.Meta)
		}
		if err != nil {
			a.log.Error("a writable export cannot be read", slog.String("file", path), slog.Any("error", err))
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
	return found, nil
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
	err = overlay.Remove(path, overlay.Options{})
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
	info, err := overlay.Stat(path, overlay.Options{})
	if errors.Is(err, os.ErrNotExist) {
		return BackupResult{}, notFound("export %s: nothing is kept of such a writable export; see export list", name)
	}
	if err != nil {
		return BackupResult{}, fmt.Errorf("commit export %s: %w", name, err)
	}
	meta, err := decodeMeta(path, info.Meta)
	if err != nil {
		return BackupResult{}, err
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
		disk, err := a.repo.OpenDisk(point.ID, d.Name, blockstore.DiskOptions{Whole: true})
		if err != nil {
			return BackupResult{}, fmt.Errorf("commit export %s: %w", name, err)
		}
		opened = append(opened, disk.Close)
		source := ingest.Source{Name: d.Name, Disk: disk, Changed: []image.Extent{}, Since: point.ID}
		if d.Name == meta.Disk {
			o, err := overlay.Open(path, disk, overlay.Options{})
			if err != nil {
				return BackupResult{}, fmt.Errorf("commit export %s: %w", name, err)
			}
			opened = append(opened, o.Close)
			source.Disk = o
			for e, err := range o.Changed(0, o.Size()) {
				if err != nil {
					return BackupResult{}, fmt.Errorf("commit export %s: %w", name, err)
				}
				source.Changed = append(source.Changed, e)
			}
		}
		request.Disks = append(request.Disks, source)
	}
	return a.ingest(ctx, request, progress)
}

// needed returns the names of the writable exports that lie over a point.
func (a *Appliance) needed(id blockstore.PointID) ([]string, error) {
	exports, err := a.WritableExports()
	var names []string
	for _, w := range exports {
		if w.Point == string(id) {
			names = append(names, w.Name)
		}
	}
	return names, err
}
