package main

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// holdfast runs the command line on a data folder and returns its JSON.
type holdfast struct {
	t                    *testing.T
	binary, data, socket string
}

func (h holdfast) run(result any, args ...string) {
	h.t.Helper()
	args = append([]string{"--data", h.data, "--guard", h.socket, "--json"}, args...)
	out, err := exec.CommandContext(h.t.Context(), h.binary, args...).Output()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		h.t.Fatalf("holdfast %q: %v\n%s", args, err, exit.Stderr)
	}
	ok(h.t, err)
	if result != nil {
		ok(h.t, json.Unmarshal(out, result))
	}
}

// files returns the files of points and segments, relative to the data folder.
func (h holdfast) files() []string {
	h.t.Helper()
	var files []string
	for _, pattern := range []string{"points/*.point", "segments/*.seg"} {
		found, err := filepath.Glob(filepath.Join(h.data, pattern))
		ok(h.t, err)
		for _, path := range found {
			name, err := filepath.Rel(h.data, path)
			ok(h.t, err)
			files = append(files, name)
		}
	}
	return files
}

// newHoldfast makes a repository on a file system of a kind, with a guard whose time a test sets.
func newHoldfast(t *testing.T, binary, kind string) (holdfast, *machine) {
	t.Helper()
	h := holdfast{t, binary, filepath.Join(mounted(t, kind), "data"), filepath.Join(t.TempDir(), "socket")}
	h.run(nil, "init")
	m := newMachine()
	startedAt(t, h.data, filepath.Join(t.TempDir(), "state"), h.socket, m)
	return h, m
}

// TestAppliance runs the command line of the appliance with a guard.
func TestAppliance(t *testing.T) {
	t.Parallel()
	binary := filepath.Join(t.TempDir(), "holdfast")
	command(t, "go", "build", "-o", binary, "../holdfast")
	t.Run("locked backup", func(t *testing.T) { testLockedBackup(t, binary) })
	t.Run("lock ends", func(t *testing.T) { testLockEnds(t, binary) })
}

// testLockedBackup: the files of a locked backup resist root and collections until its time is over, and then
// all that nobody needs goes.
func testLockedBackup(t *testing.T, binary string) {
	h, _ := newHoldfast(t, binary, "ext4")
	image := filepath.Join(t.TempDir(), "vda.raw")
	ok(t, os.WriteFile(image, []byte(strings.Repeat("backup.\n", 1<<16)), 0o600))
	var doomed, locked struct {
		Point     string `json:"point"`
		Immutable bool   `json:"immutable"`
	}
	h.run(&doomed, "backup", "image", image, "--vm", "doomed")
	before := h.files()
	ok(t, os.WriteFile(image, []byte(strings.Repeat("locked.\n", 1<<16)), 0o600))
	h.run(&locked, "backup", "image", image, "--vm", "locked", "--lock", "3s")
	if !locked.Immutable || doomed.Immutable {
		t.Errorf("got immutable %v with a lock, %v without", locked.Immutable, doomed.Immutable)
	}
	h.run(nil, "point", "delete", doomed.Point)
	h.run(nil, "repo", "gc")
	protected := h.files()
	if slices.ContainsFunc(before, func(name string) bool { return slices.Contains(protected, name) }) {
		t.Errorf("after gc: got %v, want nothing of %v", protected, before)
	}
	for _, name := range protected {
		if err := os.Remove(filepath.Join(h.data, name)); !errors.Is(err, unix.EPERM) {
			t.Errorf("remove %s: got %v, want EPERM", name, err)
		}
	}
	if err := os.RemoveAll(h.data); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("remove all: got %v, want EPERM", err)
	}
	if got := h.files(); !slices.Equal(got, protected) {
		t.Errorf("after an attempt to remove all: got %v, want %v", got, protected)
	}
}

// testLockEnds: once a lock is over in the repository and for the guard, its space comes back.
func testLockEnds(t *testing.T, binary string) {
	h, m := newHoldfast(t, binary, "xfs")
	image := filepath.Join(t.TempDir(), "vda.raw")
	ok(t, os.WriteFile(image, []byte(strings.Repeat("locked.\n", 1<<16)), 0o600))
	var p struct {
		Point string `json:"point"`
	}
	h.run(&p, "backup", "image", image, "--vm", "vm")
	h.run(nil, "point", "lock", p.Point, "--for", "1s")
	time.Sleep(1100 * time.Millisecond) // the repository's clock is the kernel's
	h.run(nil, "point", "delete", p.Point)
	before := h.files()
	var gc struct {
		Freed int64 `json:"freed_bytes"`
		Stays int64 `json:"immutable_bytes"`
	}
	h.run(&gc, "repo", "gc") // the guard's time is not over yet
	if gc.Freed != 0 || !slices.Equal(h.files(), before) {
		t.Errorf("gc before the guard's time: got %+v, files %v, want all there", gc, h.files())
	}
	m.pass(time.Second)
	h.run(&gc, "repo", "gc")
	if gc.Freed == 0 || gc.Stays != 0 || len(h.files()) != 0 {
		t.Errorf("gc after the guard's time: got %+v, files %v, want none", gc, h.files())
	}
}
