package appliance

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/holdfast-backup/holdfast/blockstore"
	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/diskfile"
	"github.com/holdfast-backup/holdfast/internal/durable"
)

// WriteFormats are the formats of image files that a restore can write.
var WriteFormats = []string{"raw", "qcow2", "vmdk", "vhdx"}

// ImageRestore says which disk of a point is written to which file.
type ImageRestore struct {
	Point string // see ResolvePoint
	Disk  string // "" if the point has only one
	To    string // the new file, or a block device
	// Format is one of WriteFormats; "" takes it from To's extension, and is raw if
	// that names none.
	Format string
	// Overwrite permits writing to a block device, whose content is then lost.
	// A file that exists is never overwritten.
	Overwrite bool
}

// RestoreResult tells what was restored.
type RestoreResult struct {
	Point  string `json:"point"`
	VM     string `json:"vm"`
	Disk   string `json:"disk"`
	File   string `json:"file"`
	Format string `json:"format"`
	Size   int64  `json:"size_bytes"`
}

// RestoreImage writes a disk of a point as an image file; every chunk's hash is
// checked on the way. progress may be nil. If it fails or ctx ends, there is no file.
func (a *Appliance) RestoreImage(ctx context.Context, r ImageRestore, progress func(Progress)) (_ RestoreResult, err error) {
	looking := a.watch.Begin(durable.Opening, &r.To)
	format, err := r.check()
	looking.End()
	if err != nil {
		return RestoreResult{}, err
	}
	p, d, err := a.resolveDisk(r.Point, r.Disk)
	if err != nil {
		return RestoreResult{}, err
	}
	disk, err := a.repo.OpenDisk(p.ID, d.Name, blockstore.DiskOptions{Whole: true})
	if err != nil {
		return RestoreResult{}, err
	}
	defer func() { err = errors.Join(err, disk.Close()) }()
	count := counter{tell: progress, now: Progress{Subject: "disk " + d.Name + " of " + p.VM, Total: disk.Size(), Unit: Bytes}}
	written, end := writing(a.watch, r.To, disk.Size())
	defer end()
	o := image.WriteOptions{Progress: func(n int64) { written(n); count.add(n) }}
	if err := diskfile.Write(ctx, r.To, disk, diskfile.Format(format), o); err != nil {
		return RestoreResult{}, fmt.Errorf("restore disk %s of %s: %w", d.Name, p.VM, err)
	}
	return RestoreResult{Point: string(p.ID), VM: p.VM, Disk: d.Name, File: r.To, Format: format, Size: disk.Size()}, nil
}

// check holds a request to what can be done and returns the format to write.
func (r ImageRestore) check() (string, error) {
	if r.To == "" {
		return "", invalid("no file to restore to")
	}
	format := r.Format
	if format == "" {
		format = formatOf(r.To)
	}
	if !slices.Contains(WriteFormats, format) {
		return "", invalid("image format %q cannot be written; choose one with --format: %s", format, strings.Join(WriteFormats, ", "))
	}
	switch info, err := os.Stat(r.To); {
	case errors.Is(err, os.ErrNotExist):
		return format, nil
	case err != nil:
		return "", fmt.Errorf("restore to %s: %w", r.To, err)
	case info.Mode()&os.ModeDevice == 0 || info.Mode()&os.ModeCharDevice != 0:
		return "", fmt.Errorf("restore to %s: %w; choose another name or remove it first", r.To, os.ErrExist)
	case !r.Overwrite:
		return "", refused("%s is a block device; its content would be lost: say --overwrite if it may", r.To)
	}
	return format, nil
}

// formatOf returns the format that a file's name tells.
func formatOf(path string) string {
	extension := strings.TrimPrefix(strings.ToLower(filepath.Ext(path)), ".")
	if slices.Contains(ReadFormats, extension) && extension != "auto" {
		return extension
	}
	return "raw"
}
