package appliance

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/holdfast-backup/holdfast/blockstore"
	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/diskfile"
	"github.com/holdfast-backup/holdfast/ingest"
	"github.com/holdfast-backup/holdfast/nbdserver/nbdclient"
)

const (
	// maxVMName is the longest name of a VM, bytes.
	maxVMName = 255
	// maxConfig bounds the configuration files of a point together, bytes: mounts
	// keep them in memory.
	maxConfig = 4 << 20
)

// crashConsistent is what an image file of unknown history can be trusted for:
// its bytes are of one moment only if nobody wrote to it.
const crashConsistent = "crash"

// ReadFormats are the formats of image files that can be backed up; the first
// stands for finding it out.
var ReadFormats = []string{"auto", "raw", "qcow2", "vmdk", "vhd", "vhdx", "vdi"}

// ImageBackup says which image files become a restore point.
type ImageBackup struct {
	VM    string
	Files []string
	// Disks names the files' disks, one a file. Without it a disk has the
	// name of its file without the extension; where several files have the
	// same, "-2" and so on follows. But a single file keeps the name of the
	// single disk in the VM's last point if that has the same size: the files
	// of a disk's snapshots are often named by date.
	Disks []string
	// Format is one of ReadFormats, for all files; "" is auto.
	Format string
	// AllowOutside lets an image name files outside its folder: backing files,
	// extents, parents.
	AllowOutside bool
	// ConfigFiles are saved with the point under their base names.
	ConfigFiles []string
	// Lock, if not 0, is how long the point will be locked: see LockPoint.
	Lock time.Duration
}

// DiskBackup tells what the backup of one disk took.
type DiskBackup = ingest.DiskResult

// BackupResult is a new restore point and what it took.
type BackupResult struct {
	Point       string       `json:"point"`
	VM          string       `json:"vm"`
	Time        time.Time    `json:"time"`
	Mode        string       `json:"mode"`
	Consistency string       `json:"consistency"`
	Disks       []DiskBackup `json:"disks"`
	LockedUntil time.Time    `json:"locked_until,omitzero"`
	Immutable   bool         `json:"immutable,omitzero"` // until then: see LockResult
}

// BackupImages backs image files up as the disks of one restore point. progress
// may be nil. If it fails or ctx ends, no point is listed, unless all that failed is to make the
// files of a locked point immutable.
func (a *Appliance) BackupImages(ctx context.Context, b ImageBackup, progress func(Progress)) (_ BackupResult, err error) {
	names, err := b.check()
	if err != nil {
		return BackupResult{}, err
	}
	request := ingest.Request{VM: b.VM, Time: time.Now().UTC(), Consistency: crashConsistent, Lock: b.Lock}
	if request.Config, err = readConfig(b.ConfigFiles); err != nil {
		return BackupResult{}, fmt.Errorf("back up %s: %w", b.VM, err)
	}
	files, err := b.open(ctx, names, a)
	defer func() {
		for _, f := range files {
			err = errors.Join(err, f.Close())
		}
	}()
	if err != nil {
		return BackupResult{}, err
	}
	for i, f := range files {
		request.Disks = append(request.Disks, ingest.Source{Name: names[i], Disk: f})
	}
	if len(b.Disks) == 0 {
		a.keepName(ctx, b.VM, request.Disks)
	}
	return a.ingest(ctx, request, progress)
}

// ingest runs a backup.
func (a *Appliance) ingest(ctx context.Context, request ingest.Request, progress func(Progress)) (BackupResult, error) {
	var tell func(ingest.Progress)
	if progress != nil {
		tell = func(p ingest.Progress) {
			progress(Progress{Subject: "disk " + p.Name + " of " + request.VM, Done: p.Done, Total: p.Total, Unit: Bytes})
		}
	}
	result, err := ingest.Run(ctx, a.repo, request, tell)
	if err != nil && ctx.Err() != nil {
		err = errors.Join(context.Cause(ctx), err) // sources say it in their own words
	}
	if err != nil {
		return BackupResult{}, err
	}
	p := result.Point
	immutable := false
	if request.Lock > 0 {
		immutable, err = a.protect(ctx, p.ID, request.Lock)
	}
	return BackupResult{
		Point: string(p.ID), VM: p.VM, Time: p.Time, Mode: p.Mode, Consistency: p.Consistency, Disks: result.Disks,
		LockedUntil: p.LockedUntil, Immutable: immutable,
	}, err
}

// open opens the image files and NBD exports. After an error it returns those that are open
// already.
func (b ImageBackup) open(ctx context.Context, names []string, a *Appliance) ([]image.DiskCloser, error) {
	var files []image.DiskCloser
	for i, path := range b.Files {
		f, err := openWatched(a.watch, path, func() (image.DiskCloser, error) { return b.openOne(ctx, path, a.log) })
		if err != nil {
			return files, fmt.Errorf("back up disk %s of %s: %w", names[i], b.VM, err)
		}
		files = append(files, f)
	}
	return files, nil
}

func (b ImageBackup) openOne(ctx context.Context, path string, log *slog.Logger) (image.DiskCloser, error) {
	if !isNBD(path) {
		return diskfile.Open(path, diskfile.Options{Format: diskfile.Format(b.Format), AllowOutside: b.AllowOutside})
	}
	o, err := nbdclient.ParseURI(path)
	if err != nil {
		return nil, invalid("%v", err)
	}
	o.Log = log
	o.NoReconnect = true // what comes back may serve another moment of the disk
	c, err := nbdclient.Dial(ctx, o)
	if err != nil {
		return nil, err
	}
	// The end of ctx ends reads that wait for a silent server.
	return &export{c, context.AfterFunc(ctx, func() { _ = c.Close() })}, nil
}

// export is an NBD export that is being backed up.
type export struct {
	*nbdclient.Client
	release func() bool // no longer closed when the context ends
}

// Close ends the connections.
func (e *export) Close() error {
	e.release()
	return e.Client.Close()
}

// isNBD reports whether the name of a file is the URI of an NBD export.
func isNBD(path string) bool {
	scheme, _, ok := strings.Cut(path, "://")
	return ok && slices.Contains([]string{"nbd", "nbds", "nbd+unix", "nbds+unix"}, scheme)
}

// keepName gives a single disk that nobody named the name it had before.
func (a *Appliance) keepName(ctx context.Context, vm string, disks []ingest.Source) {
	last, ok := a.repo.Latest(vm)
	if !ok || len(disks) != 1 || len(last.Disks) != 1 {
		return
	}
	name := last.Disks[0].Name
	if disks[0].Name == name || disks[0].Disk.Size() != last.Disks[0].Map.Size {
		return
	}
	a.log.WarnContext(ctx, "the disk keeps its name from the last point; --disk names it otherwise",
		slog.String("vm", vm), slog.String("disk", name))
	disks[0].Name = name
}

// check holds a request to what can be done and returns the names of its disks.
func (b ImageBackup) check() ([]string, error) {
	if err := checkVM(b.VM); err != nil {
		return nil, err
	}
	if b.Lock != 0 {
		if err := checkLock(b.Lock); err != nil {
			return nil, err
		}
	}
	switch {
	case len(b.Files) == 0:
		return nil, invalid("no image file to back up")
	case b.Format != "" && !slices.Contains(ReadFormats, b.Format):
		return nil, invalid("unknown image format %q; known are %s", b.Format, strings.Join(ReadFormats, ", "))
	case slices.ContainsFunc(b.Files, isNBD) && b.Format != "" && b.Format != "auto" && b.Format != "raw":
		return nil, invalid("image format %s: an NBD export is a disk's bytes; want raw", b.Format)
	case len(b.Disks) > 0 && len(b.Disks) != len(b.Files):
		return nil, invalid("%d disk names for %d image files; name each disk or none", len(b.Disks), len(b.Files))
	}
	names := b.Disks
	if len(names) == 0 {
		names = defaultNames(b.Files)
	}
	for i, name := range names {
		if !blockstore.ValidFileName(name) || !printable(name) {
			return nil, invalid("disk name %q: want a file name of UTF-8 without control characters; choose one with --disk", name)
		}
		if slices.Contains(names[:i], name) {
			return nil, invalid("two disks are named %q; give each a name of its own", name)
		}
	}
	return names, nil
}

func checkVM(name string) error {
	if name == "" || len(name) > maxVMName || !printable(name) {
		return invalid("VM name %q: want 1 to %d bytes of UTF-8 without control characters", name, maxVMName)
	}
	return nil
}

// defaultNames names disks for their files.
func defaultNames(files []string) []string {
	names := make([]string, len(files))
	for i, path := range files {
		if u, err := url.Parse(path); err == nil && isNBD(path) {
			path = u.Path // the export's name
		}
		base := filepath.Base(path)
		if base == "/" || base == "." {
			base = "disk" // an export without a name
		}
		stem := strings.TrimSuffix(base, filepath.Ext(base))
		if stem == "" {
			stem = base
		}
		name := stem
		for n := 2; slices.Contains(names[:i], name); n++ {
			name = fmt.Sprintf("%s-%d", stem, n)
		}
		names[i] = name
	}
	return names
}

// readConfig reads the files that are saved with a point.
func readConfig(paths []string) (map[string][]byte, error) {
	var total int64
	config := map[string][]byte{}
	for _, path := range paths {
		name := filepath.Base(path)
		if _, twice := config[name]; twice || !blockstore.ValidFileName(name) || !printable(name) {
			return nil, invalid("configuration file %s: want file names that are valid and each used once", path)
		}
		data, err := readSmall(path, maxConfig-total)
		if err != nil {
			return nil, fmt.Errorf("read configuration file: %w", err)
		}
		total += int64(len(data))
		config[name] = data
	}
	return config, nil
}

// printable reports whether s can be shown and written as JSON as it is.
func printable(s string) bool {
	return utf8.ValidString(s) && !strings.ContainsFunc(s, unicode.IsControl)
}
