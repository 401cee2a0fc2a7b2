package main

import (
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/durable"
	"github.com/holdfast-backup/holdfast/internal/faultfs"
	"github.com/holdfast-backup/holdfast/internal/guard"
)

// fakeFiles are files that exist, true if immutable.
type fakeFiles map[string]bool

func (f fakeFiles) immutable(name string) (bool, error) {
	immutable, found := f[name]
	if !found {
		return false, fmt.Errorf("%s: %w", name, fs.ErrNotExist)
	}
	return immutable, nil
}

func (f fakeFiles) set(name string, immutable bool) error {
	if _, err := f.immutable(name); err != nil {
		return err
	}
	f[name] = immutable
	return nil
}

const fakeState = "/state/" + stateName

func open(fsys durable.FS, files attributes, m *machine) (*keeper, error) {
	return openKeeper(fsys, fakeState, files, m, slog.New(slog.DiscardHandler))
}

// TestStateOutlivesPowerLoss walks over every operation of protections, an extension and a
// release: whatever fails, and whatever a loss of power takes, what was promised holds.
func TestStateOutlivesPowerLoss(t *testing.T) {
	t.Parallel()
	protect := func(hours int64) guard.Request {
		return guard.Request{Op: guard.Protect, Files: []string{pointFile, segmentFile}, Seconds: hours * 3600}
	}
	// Two hours pass before each request.
	for _, requests := range [][]guard.Request{
		{protect(1)},
		{protect(1), protect(3)},
		{protect(1), protect(3), {Op: guard.Release}},
		{protect(1), {Op: guard.Release}, protect(1)},
	} {
		for n, hit := 1, true; hit; n++ {
			hit = false
			for loss := range faultfs.Loss(6) {
				for _, effect := range []faultfs.Effect{faultfs.Nothing, faultfs.Half, faultfs.Whole} {
					hit = loseAt(t, requests, faultfs.Fault{N: n, Effect: effect}, loss) || hit
				}
			}
			if !hit && n < 6 {
				t.Fatalf("the walk ended at operation %d", n)
			}
		}
	}
}

// loseAt loses power after requests, during which something may fail, and reports whether it did.
func loseAt(t *testing.T, requests []guard.Request, fault faultfs.Fault, loss faultfs.Loss) (hit bool) {
	t.Helper()
	fsys, m := faultfs.New("/state"), newMachine()
	files := fakeFiles{pointFile: false, segmentFile: false}
	k, err := open(fsys, files, m)
	ok(t, err)
	fsys.Fail(fault)
	var promised time.Time // until when the files are protected
	for _, r := range requests {
		m.pass(2 * time.Hour)
		if reply := k.do(r); reply.Error == "" && r.Op == guard.Protect {
			promised = m.Wall().Add(time.Duration(r.Seconds) * time.Second)
		}
	}
	k, err = open(fsys.PowerLoss(loss), files, m)
	if err != nil {
		t.Fatalf("fault %v, loss %d: %v", fault, loss, err)
	}
	if left := promised.Sub(m.Wall()); left > 0 {
		m.pass(left - time.Millisecond)
		if got := k.do(guard.Request{Op: guard.Release, Files: []string{pointFile}}).Code; got != guard.Protected {
			t.Errorf("fault %v, loss %d: release before its time: got code %q, want %q", fault, loss, got, guard.Protected)
		}
		if !files[pointFile] || !files[segmentFile] {
			t.Errorf("fault %v, loss %d: got files %v, want both immutable", fault, loss, files)
		}
	}
	m.pass(24 * time.Hour)
	if reply := k.do(guard.Request{Op: guard.Release}); reply.Error != "" || reply.Protected != 0 {
		t.Errorf("fault %v, loss %d: release after its time: got %+v, want all", fault, loss, reply)
	}
	if files[pointFile] || files[segmentFile] {
		t.Errorf("fault %v, loss %d: got files %v, want none immutable", fault, loss, files)
	}
	return fsys.Hit()
}

// stopping stops the guard at the n-th change of an attribute, from 1.
type stopping struct {
	fakeFiles
	n int
}

type stopped struct{}

func (s *stopping) set(name string, immutable bool) error {
	if s.n--; s.n == 0 {
		panic(stopped{})
	}
	return s.fakeFiles.set(name, immutable)
}

// TestStopBetweenStateAndAttribute: the next start sets what was written down.
func TestStopBetweenStateAndAttribute(t *testing.T) {
	t.Parallel()
	for n := 1; n <= 2; n++ {
		fsys, m := faultfs.New("/state"), newMachine()
		files := fakeFiles{pointFile: false, segmentFile: false}
		k, err := open(fsys, &stopping{files, n}, m)
		ok(t, err)
		func() {
			defer func() {
				if r := recover(); r != (stopped{}) {
					t.Fatalf("got %v, want to be stopped", r)
				}
			}()
			k.do(guard.Request{Op: guard.Protect, Files: []string{pointFile, segmentFile}, Seconds: 60})
		}()
		_, err = open(fsys.PowerLoss(faultfs.LoseAll), files, m)
		ok(t, err)
		if !files[pointFile] || !files[segmentFile] {
			t.Errorf("stopped at file %d: got %v, want both immutable", n, files)
		}
	}
}

// TestDamagedState: no protection is forgotten because its record is damaged or lost.
func TestDamagedState(t *testing.T) {
	t.Parallel()
	fsys, m := faultfs.New("/state"), newMachine()
	files := fakeFiles{pointFile: false, segmentFile: false}
	k, err := open(fsys, files, m)
	ok(t, err)
	if reply := k.do(guard.Request{Op: guard.Protect, Files: []string{pointFile}, Seconds: 60}); reply.Error != "" {
		t.Fatal(reply.Error)
	}
	good, err := durable.ReadFile(fsys, fakeState, maxStateFile)
	ok(t, err)
	damage := func(data []byte) {
		ok(t, durable.WriteFile(fsys, fakeState, data))
		if _, err := open(fsys, files, m); err == nil || !strings.Contains(err.Error(), "is damaged") {
			t.Errorf("state %.40q of %d bytes: got %v, want that it is damaged", data, len(data), err)
		}
		if !files[pointFile] {
			t.Fatalf("state %.40q: the attribute is gone", data)
		}
	}
	for i := range good {
		bad := append([]byte(nil), good...)
		bad[i] ^= 1
		damage(bad)
		damage(good[:i])
	}
	damage(append(good, '\n'))

	ok(t, fsys.Remove(fakeState))
	k, err = open(fsys, files, m)
	ok(t, err)
	m.pass(time.Hour)
	for _, r := range []guard.Request{
		{Op: guard.Release, Files: []string{pointFile}},
		{Op: guard.Protect, Files: []string{pointFile}, Seconds: 1}, // or it would end in a second
	} {
		if got := k.do(r).Code; got != guard.Protected {
			t.Errorf("%s without a state: got code %q, want %q", r.Op, got, guard.Protected)
		}
	}
	if reply := k.do(guard.Request{Op: guard.Release}); reply.Released != 0 || !files[pointFile] {
		t.Errorf("release all without a state: got %+v, files %v", reply, files)
	}
}

// TestClocks: only time that passed while the machine was on counts.
func TestClocks(t *testing.T) {
	t.Parallel()
	fsys, m := faultfs.New("/state"), newMachine()
	files := fakeFiles{pointFile: false}
	k, err := open(fsys, files, m)
	ok(t, err)
	k.do(guard.Request{Op: guard.Protect, Files: []string{pointFile}, Seconds: 3600})
	m.pass(30 * time.Minute)
	ok(t, k.save())
	m.mu.Lock()
	m.boot, m.up, m.wall = "two", time.Hour, m.wall.Add(1000*time.Hour)
	m.mu.Unlock()
	k, err = open(fsys, files, m)
	ok(t, err)
	m.pass(30*time.Minute - time.Millisecond)
	release := func() guard.Code {
		return k.do(guard.Request{Op: guard.Release, Files: []string{pointFile}}).Code
	}
	if got := release(); got != guard.Protected {
		t.Errorf("a moment before its time: got code %q, want %q", got, guard.Protected)
	}
	m.pass(time.Millisecond)
	if got := release(); got != "" || files[pointFile] {
		t.Errorf("at its time: got code %q, immutable %v, want released", got, files[pointFile])
	}
}

func TestRepliesOfKeeper(t *testing.T) {
	t.Parallel()
	k, err := open(faultfs.New("/state"), fakeFiles{pointFile: false, segmentFile: true}, newMachine())
	ok(t, err)
	for _, tt := range []struct {
		op   guard.Op
		file string
		want guard.Code
	}{
		{guard.Protect, otherFile, guard.Missing},
		{guard.Protect, segmentFile, guard.Protected},
		{guard.Release, segmentFile, guard.Protected},
		{guard.Release, pointFile, ""}, // it is not protected: nothing to do
		{guard.Release, otherFile, ""},
		{guard.Status, otherFile, guard.Missing},
		{guard.Status, segmentFile, ""},
	} {
		reply := k.do(guard.Request{Op: tt.op, Files: []string{tt.file}, Seconds: 60})
		if reply.Code != tt.want || reply.Protected != 0 || reply.Released != 0 {
			t.Errorf("%s %s: got %+v, want code %q", tt.op, tt.file, reply, tt.want)
		}
	}
}

// TestStateFolder: the guard keeps its promises where nobody else can change them.
func TestStateFolder(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	open := filepath.Join(dir, "open")
	ok(t, os.Mkdir(open, 0o755))
	foreign := filepath.Join(dir, "foreign")
	ok(t, os.Mkdir(foreign, 0o700))
	ok(t, os.Chown(foreign, 1, 1))
	linked := filepath.Join(dir, "linked")
	ok(t, os.Symlink(t.TempDir(), linked))
	file := filepath.Join(dir, "file")
	ok(t, os.WriteFile(file, nil, 0o600))
	used := filepath.Join(dir, "new", "used")
	unlock, err := lockState(used)
	ok(t, err)
	for _, path := range []string{open, foreign, linked, file, used} {
		if unlock, err := lockState(path); err == nil {
			unlock()
			t.Errorf("%s was taken", path)
		}
	}
	unlock()
	unlock, err = lockState(used)
	ok(t, err)
	unlock()
	var st unix.Stat_t
	ok(t, unix.Stat(used, &st))
	if got := st.Mode & 0o777; got != 0o700 {
		t.Errorf("got mode %#o, want 0700", got)
	}
}
