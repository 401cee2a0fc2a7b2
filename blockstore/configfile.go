package blockstore

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/holdfast-backup/holdfast/internal/durable"
)

// configFiles hold the same configuration, and are written in this order.
var configFiles = [...]string{configFile, configCopy}

// configState is what one of the two files holds.
type configState struct {
	name   string
	config config
	err    error // nil if it is whole; wraps os.ErrNotExist if there is none
}

// readConfigs reads both files.
func readConfigs(fsys durable.FS, dir string) []configState {
	states := make([]configState, len(configFiles))
	for i, name := range configFiles {
		states[i].name = name
		data, err := durable.ReadFile(fsys, filepath.Join(dir, name), maxConfigFile)
		if err == nil {
			states[i].config, err = decodeConfig(data)
		}
		states[i].err = err
	}
	return states
}

// wholeConfigs returns the files that can count, the one that counts first: one with
// keys never gives way to one without, the newer goes before the older. Without any
// the error says why.
func wholeConfigs(fsys durable.FS, dir string, states []configState) ([]*configState, error) {
	var whole []*configState
	missing := 0
	var damage error
	for i := range states {
		switch s := &states[i]; {
		case s.err == nil:
			whole = append(whole, s)
		case errors.Is(s.err, os.ErrNotExist):
			missing++
		case errors.Is(s.err, os.ErrPermission), errors.Is(s.err, syscall.ENOTDIR):
			return nil, s.err // no damage
		default:
			damage = errors.Join(damage, fmt.Errorf("%s: %w", filepath.Join(dir, s.name), s.err))
		}
	}
	if missing > 0 && damage == nil {
		used, err := hasContent(fsys, dir)
		switch {
		case err != nil:
			return nil, err
		case missing == len(states) && used:
			return nil, fmt.Errorf("%s: %w: %s and %s are gone; bring one back", dir, ErrNotRepository, configFile, configCopy)
		case missing == len(states):
			return nil, fmt.Errorf("%s: %w; make one with init", dir, ErrNotRepository)
		case !used && states[0].err != nil: // see Create
			return nil, fmt.Errorf("%s: %w: init was interrupted; run it again", dir, ErrNotRepository)
		}
	}
	if len(whole) == 0 {
		return nil, fmt.Errorf("%w; bring a copy of one of them back", damage)
	}
	if a, b := whole[0].config.ID, whole[len(whole)-1].config.ID; a != b {
		return nil, fmt.Errorf("%s: %s is of repository %s and %s of %s; take the one away that is not of this repository",
			dir, whole[0].name, a, whole[1].name, b)
	}
	slices.SortStableFunc(whole, func(a, b *configState) int {
		return cmp.Or(
			cmp.Compare(min(len(b.config.Keys), 1), min(len(a.config.Keys), 1)),
			cmp.Compare(b.config.Revision, a.config.Revision))
	})
	return whole, nil
}

// loadConfig reads the configuration and opens the repository key.
func (r *Repository) loadConfig(o Options) error {
	if err := durable.RemoveTemporary(r.fs, r.dir); err != nil {
		return err
	}
	// The names may be there and not be durable yet, if who gave them was stopped.
	if err := r.fs.SyncDir(r.dir); err != nil {
		return err
	}
	states := readConfigs(r.fs, r.dir)
	whole, err := wholeConfigs(r.fs, r.dir, states)
	if err != nil {
		return err
	}
	var failed error
	for _, s := range whole {
		r.keys, r.openedBy, s.err = s.config.open(o)
		// The newest decides who may open the repository: an older one may have a key
		// that was removed.
		if s.err == nil || errors.Is(s.err, ErrWrongKey) {
			failed, r.config = s.err, s.config
			break
		}
		if failed == nil {
			failed = fmt.Errorf("%s: %w", filepath.Join(r.dir, s.name), s.err)
		}
	}
	if failed != nil {
		return failed
	}
	r.healConfig(states)
	return nil
}

// healConfig writes a file anew that a crash left behind the other, or that is gone.
// What is damaged stays for a repair to look at.
func (r *Repository) healConfig(states []configState) {
	for _, s := range states {
		err := configProblem(s, r.config)
		if err == nil {
			continue
		}
		path := attrPath(filepath.Join(r.dir, s.name))
		stale := s.err == nil && s.config.Revision < r.config.Revision
		if !stale && !errors.Is(s.err, os.ErrNotExist) {
			r.log.Error("a file of the configuration is damaged; its twin is used", path, attrErr(err))
			continue
		}
		if err := r.rewriteConfig(s.name); err != nil {
			r.log.Error("a file of the configuration cannot be brought up to date", path, attrErr(err))
			continue
		}
		r.log.Warn("wrote a file of the configuration anew", path, slog.String("it", err.Error()))
	}
}

// configProblem returns what is wrong with a file where want should be in it.
func configProblem(s configState, want config) error {
	switch {
	case errors.Is(s.err, os.ErrNotExist):
		return errors.New("was missing")
	case s.err != nil:
		return s.err
	case bytes.Equal(s.config.Checksum, want.Checksum):
		return nil
	case s.config.ID != want.ID:
		return fmt.Errorf("is of repository %s", s.config.ID)
	case s.config.Revision < want.Revision:
		return fmt.Errorf("was older, revision %d instead of %d", s.config.Revision, want.Revision)
	}
	return errors.New("differs from what counts")
}

// ConfigProblem is what is wrong with a file of the configuration.
type ConfigProblem struct {
	File string // its name in the repository's folder
	Err  error
}

// checkConfig reads repository.json and its copy back and returns what is wrong with
// them. What is in memory counts.
func (r *Repository) checkConfig() []ConfigProblem {
	r.configMu.Lock()
	defer r.configMu.Unlock()
	var out []ConfigProblem
	for _, s := range readConfigs(r.fs, r.dir) {
		if err := configProblem(s, r.config); err != nil {
			out = append(out, ConfigProblem{s.name, err})
		}
	}
	return out
}

// rewriteConfig writes one of the files of the configuration anew, durably. r.configMu is
// held, or nobody else has the repository yet.
func (r *Repository) rewriteConfig(name string) error {
	c := r.config
	data, err := c.encode(r.keys)
	if err != nil {
		return err
	}
	return noSpace(durable.WriteFile(r.fs, filepath.Join(r.dir, name), data))
}

// changeConfig makes a change durable in both files. When it fails, the change may have been
// made or not; the next opening knows.
func (r *Repository) changeConfig(change func(*config) error) error {
	r.configMu.Lock()
	defer r.configMu.Unlock()
	if r.configFailed != nil {
		return fmt.Errorf("an earlier change failed, and may have been made; open the repository again: %w", r.configFailed)
	}
	c := r.config
	c.Keys = slices.Clone(c.Keys)
	if err := change(&c); err != nil {
		return err
	}
	c.Revision++
	data, err := c.encode(r.keys)
	if err != nil {
		return err
	}
	// Stopped after the first file, the next opening takes it, the newer, and writes the
	// second anew. The change counts for the caller when both have it: no copy of what
	// was removed may be left to fall back upon.
	for _, name := range configFiles {
		if err := noSpace(durable.WriteFile(r.fs, filepath.Join(r.dir, name), data)); err != nil {
			r.configFailed = err
			return fmt.Errorf("whether the change was made shows at the next opening: %w", err)
		}
	}
	r.config = c
	return nil
}
