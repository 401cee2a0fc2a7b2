package blockstore

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/holdfast-backup/holdfast/internal/durable"
)

const (
	quarantineDir   = "quarantine"       // holds a folder for each repair
	quarantineStamp = "20060102T150405Z" // its name, in UTC; "-2" and so on is added where one is there
)

// Replaced is what one repair has replaced.
type Replaced struct {
	Stamp string   `json:"stamp"`
	Files []string `json:"files"` // where they were in the repository's folder
	Bytes int64    `json:"bytes"`
}

// ListQuarantine returns what repairs of the repository in dir have replaced, oldest first.
func ListQuarantine(dir string) ([]Replaced, error) {
	top := filepath.Join(dir, quarantineDir)
	folders, err := os.ReadDir(top)
	if errors.Is(err, os.ErrNotExist) {
		_, err = os.Stat(dir)
		return []Replaced{}, err
	}
	if err != nil {
		return nil, err
	}
	out := []Replaced{}
	for _, folder := range folders {
		r, err := replaced(filepath.Join(top, folder.Name()))
		if err != nil {
			return nil, err
		}
		out = append(out, r)
	}
	return out, nil
}

// replaced lists one repair's folder.
func replaced(folder string) (Replaced, error) {
	r := Replaced{Stamp: filepath.Base(folder), Files: []string{}}
	err := filepath.WalkDir(folder, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() && strings.Count(path[len(folder):], string(filepath.Separator)) < 2 {
			return err
		}
		name, err := filepath.Rel(folder, path)
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		r.Files = append(r.Files, name)
		if d.IsDir() {
			return filepath.SkipDir // it was in the place of a file
		}
		r.Bytes += info.Size()
		return nil
	})
	return r, err
}

// openQuarantine locks the repository and finds one repair's folder.
func openQuarantine(dir, stamp string) (r Replaced, unlock func(), err error) {
	unlock, err = lock(dir, nil)
	if err != nil {
		return r, nil, err
	}
	all, err := ListQuarantine(dir)
	for _, r := range all {
		if r.Stamp == stamp {
			return r, unlock, nil
		}
	}
	unlock()
	if err == nil {
		err = fmt.Errorf("quarantine %s: %w; quarantine list shows those that are there", stamp, ErrNotFound)
	}
	return r, nil, err
}

// RestoreQuarantine puts the files that a repair replaced back to where they were, as far as no file of
// the name is there, and no segment of the number: those stay in quarantine, and are returned. Nobody may have the repository
// open. Its index is made anew at the next opening.
func RestoreQuarantine(dir, stamp string) (restored, kept []string, err error) {
	r, unlock, err := openQuarantine(dir, stamp)
	if err != nil {
		return nil, nil, err
	}
	defer unlock()
	restored, kept = []string{}, []string{}
	fsys := durable.OS()
	folder := filepath.Join(dir, quarantineDir, stamp)
	for _, name := range r.Files {
		from, to := filepath.Join(folder, name), filepath.Join(dir, name)
		taken, err := isTaken(to)
		if err != nil {
			return restored, kept, err
		}
		if taken {
			kept = append(kept, name)
			continue
		}
		// Old records must not count where newer ones do: the index, made anew, takes the newer.
		if _, err := emptyIndex(filepath.Join(dir, indexDir)); err != nil {
			return restored, kept, err
		}
		if err := fsys.Rename(from, to); err != nil {
			return restored, kept, err
		}
		if err := errors.Join(fsys.SyncDir(filepath.Dir(to)), fsys.SyncDir(filepath.Dir(from))); err != nil {
			return restored, kept, err
		}
		restored = append(restored, name)
	}
	if len(kept) > 0 {
		return restored, kept, nil
	}
	return restored, kept, removeFolder(fsys, folder)
}

// isTaken reports whether something has a file's name, or a segment its number: of two segments of a number only
// one counts.
func isTaken(path string) (bool, error) {
	if _, err := os.Lstat(path); err == nil || !errors.Is(err, os.ErrNotExist) {
		return err == nil, err
	}
	number, _, ok := parseSegmentName(filepath.Base(path))
	if !ok {
		return false, nil
	}
	others, err := os.ReadDir(filepath.Dir(path))
	return slices.ContainsFunc(others, func(e os.DirEntry) bool {
		other, _, ok := parseSegmentName(e.Name())
		return ok && other == number
	}), err
}

// RemoveQuarantine removes what a repair replaced for good. Nobody may have the repository open.
func RemoveQuarantine(dir, stamp string) (Replaced, error) {
	r, unlock, err := openQuarantine(dir, stamp)
	if err != nil {
		return r, err
	}
	defer unlock()
	return r, removeFolder(durable.OS(), filepath.Join(dir, quarantineDir, stamp))
}

func removeFolder(fsys durable.FS, folder string) error {
	if err := os.RemoveAll(folder); err != nil {
		return err
	}
	return fsys.SyncDir(filepath.Dir(folder))
}
