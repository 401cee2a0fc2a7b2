package appliance_test

import (
	"encoding/json"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/appliance"
	"github.com/holdfast-backup/holdfast/internal/guard"
)

// fakeGuard answers requests as a test says, and notes them.
type fakeGuard struct {
	socket string

	mu       sync.Mutex
	requests []guard.Request
	answers  []guard.Reply // to the next requests; then all is done
}

func newFakeGuard(t *testing.T, answers ...guard.Reply) *fakeGuard {
	t.Helper()
	f := &fakeGuard{socket: filepath.Join(t.TempDir(), "guard"), answers: answers}
	l, err := net.Listen("unix", f.socket)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			f.answer(t, conn)
			conn.Close()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	return f
}

func (f *fakeGuard) answer(t *testing.T, conn net.Conn) {
	line, err := guard.ReadLine(conn)
	var r guard.Request
	if err == nil {
		r, err = guard.ParseRequest(line)
	}
	if err != nil {
		t.Errorf("the guard got %.200q: %v", line, err)
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.requests = append(f.requests, r)
	var reply guard.Reply
	if len(f.answers) > 0 {
		reply, f.answers = f.answers[0], f.answers[1:]
	}
	line, err = json.Marshal(reply)
	if err == nil {
		_, err = conn.Write(append(line, '\n'))
	}
	if err != nil {
		t.Error(err)
	}
}

// asked returns the requests so far.
func (f *fakeGuard) asked() []guard.Request {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.requests)
}

func openGuarded(t *testing.T, f *fakeGuard) *appliance.Appliance {
	t.Helper()
	a, err := appliance.Open(t.Context(), newData(t), appliance.Options{Guard: f.socket})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	})
	return a
}

// TestGuardProtectsLockedPoints: locking asks for the files of the point, for as long as the lock
// lasts, and says what came of it.
func TestGuardProtectsLockedPoints(t *testing.T) {
	t.Parallel()
	fail := func(code guard.Code) guard.Reply { return guard.Reply{Code: code, Error: "it is " + string(code)} }
	for name, tt := range map[string]struct {
		answers   []guard.Reply
		immutable bool
		err       string
	}{
		"protected":         {nil, true, ""},
		"collected":         {[]guard.Reply{fail(guard.Missing)}, true, ""},
		"open for writing":  {[]guard.Reply{fail(guard.Busy)}, true, ""},
		"no such attribute": {[]guard.Reply{fail(guard.Unsupported)}, false, ""},
		"failed":            {[]guard.Reply{fail(guard.Failed)}, false, "it is failed"},
		"another's guard":   {[]guard.Reply{fail(guard.Foreign)}, false, "it is foreign"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFakeGuard(t, tt.answers...)
			a := openGuarded(t, f)
			p := backup(t, a, "vm", write(t, "vda.raw", noise(3*chunk, 1)))
			if got := f.asked(); len(got) != 0 {
				t.Errorf("before the lock: got requests %+v, want none", got)
			}
			r, err := a.LockPoint(t.Context(), p.Point, time.Hour, time.Time{})
			if r.Immutable != tt.immutable || (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
				t.Errorf("lock: got %+v, %v, want immutable %v, error %q", r, err, tt.immutable, tt.err)
			}
			requests := f.asked()
			if len(requests) != len(tt.answers)+1 && tt.immutable {
				t.Fatalf("got %d requests, want %d", len(requests), len(tt.answers)+1)
			}
			for _, r := range requests {
				if r.Op != guard.Protect || r.Seconds != 3600 || len(r.Files) != 2 || !slices.Contains(r.Files, "points/"+p.Point+".point") {
					t.Errorf("got request %+v, want the point's two files for an hour", r)
				}
			}
			if got, err := a.ResolvePoint(p.Point); err != nil || got.LockedUntil.IsZero() {
				t.Errorf("after the lock: got %+v, %v, want that it is locked all the same", got, err)
			}
		})
	}
}

func TestGuardProtectsLockedBackups(t *testing.T) {
	t.Parallel()
	f := newFakeGuard(t)
	a := openGuarded(t, f)
	files := []string{write(t, "vda.raw", noise(3*chunk, 1))}
	p, err := a.BackupImages(t.Context(), appliance.ImageBackup{VM: "vm", Files: files, Lock: time.Minute}, nil)
	if err != nil || !p.Immutable {
		t.Errorf("backup: got %+v, %v, want it immutable", p, err)
	}
	if got := f.asked(); len(got) != 1 || got[0].Seconds != 60 {
		t.Errorf("got requests %+v, want one for a minute", got)
	}
}

// TestGuardReleases: a collection first gets back what it may remove.
func TestGuardReleases(t *testing.T) {
	t.Parallel()
	f := newFakeGuard(t, guard.Reply{Released: 3})
	a := openGuarded(t, f)
	if _, err := a.Collect(t.Context(), appliance.CollectOptions{DryRun: true}, nil); err != nil || len(f.asked()) != 0 {
		t.Errorf("dry run: got %v, %d requests, want none", err, len(f.asked()))
	}
	if _, err := a.Collect(t.Context(), appliance.CollectOptions{}, nil); err != nil {
		t.Error(err)
	}
	if got := f.asked(); len(got) != 2 || got[0].Op != guard.Release || len(got[0].Files) != 0 {
		t.Errorf("got requests %+v, want releases until there is nothing left", got)
	}
}
