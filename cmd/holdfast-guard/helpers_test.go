package main

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/durable"
	"github.com/holdfast-backup/holdfast/internal/guard"
)

// TestMain runs the tests in a mount namespace of their own: what they mount and attach goes
// with it, even if they are killed.
func TestMain(m *testing.M) {
	const inside = "HOLDFAST_GUARD_TEST_INSIDE"
	if os.Getenv(childVariable) != "" {
		os.Exit(runChild())
	}
	if os.Getenv(mainVariable) != "" {
		main()
		return
	}
	if os.Getenv(inside) == "" {
		unshare, err := exec.LookPath("unshare")
		if err == nil {
			args := append([]string{unshare, "--mount", "--propagation", "private", "--"}, os.Args...)
			err = syscall.Exec(unshare, args, append(os.Environ(), inside+"=1"))
		}
		panic(err)
	}
	os.Exit(m.Run())
}

// Names of files that the guard takes.
const (
	pointFile   = "points/00112233445566778899aabbccddeeff.point"
	segmentFile = "segments/0000000000000001-00112233445566aa.seg"
	otherFile   = "segments/0000000000000002-00112233445566bb.seg"
)

// mounted returns an empty file system of a kind that is mounted for the test.
func mounted(t *testing.T, kind string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test mounts file systems and sets the immutable attribute: run it as root")
	}
	dir := t.TempDir()
	mount := []string{"mount", "-t", kind, "none", dir}
	if kind != "ramfs" {
		image := filepath.Join(t.TempDir(), "image")
		ok(t, os.WriteFile(image, nil, 0o600))
		ok(t, os.Truncate(image, 320<<20)) // XFS needs 300 MiB
		command(t, "mkfs."+kind, "-q", image)
		mount = []string{"mount", "-o", "loop", image, dir}
	}
	command(t, mount...)
	t.Cleanup(func() {
		_ = exec.Command("chattr", "-R", "-i", dir).Run() // for what a failed test left
		command(t, "umount", dir)
	})
	return dir
}

func command(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%q: %v\n%s", args, err, out)
	}
}

func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// repository makes the files of a repository in dir.
func repository(t *testing.T, dir string) {
	t.Helper()
	for _, name := range []string{pointFile, segmentFile, otherFile} {
		ok(t, os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o700))
		ok(t, os.WriteFile(filepath.Join(dir, name), []byte(name), 0o600))
	}
}

// machine is a steady.Source whose clocks a test sets.
type machine struct {
	mu   sync.Mutex
	wall time.Time
	boot string
	up   time.Duration
}

func newMachine() *machine {
	return &machine{wall: time.Date(2026, 1, 31, 18, 0, 0, 0, time.UTC), boot: "one", up: time.Hour}
}

func (m *machine) Wall() time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.wall
}

func (m *machine) Boot() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.boot
}

func (m *machine) Uptime() time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.up
}

// pass lets time pass.
func (m *machine) pass(d time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.wall, m.up = m.wall.Add(d), m.up+d
}

// setWall sets the clock that people can set.
func (m *machine) setWall(t time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.wall = t
}

// started starts a guard for a data folder and returns its client, and what ends it.
func started(t *testing.T, data, state string, m *machine) (guard.Client, func()) {
	t.Helper()
	return startedAt(t, data, state, state+".socket", m)
}

func startedAt(t *testing.T, data, state, socket string, m *machine) (guard.Client, func()) {
	t.Helper()
	unlock, err := lockState(state)
	ok(t, err)
	folder, err := openFolder(data)
	ok(t, err)
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	k, err := openKeeper(durable.OS(), filepath.Join(state, stateName), folder, m, log)
	ok(t, err)
	l, err := listen(nil, socket)
	ok(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- (&server{keeper: k, folder: folder, log: log}).serve(ctx, l) }()
	stop := sync.OnceFunc(func() {
		cancel()
		if err := errors.Join(<-done, k.save()); err != nil {
			t.Errorf("the guard ended with %v", err)
		}
		folder.close()
		unlock()
	})
	t.Cleanup(stop)
	return guard.Client{Socket: socket, Folder: folder.id}, stop
}

// protect protects files, which a process that another test is starting may have open for
// writing for a moment.
func protect(t *testing.T, c guard.Client, files []string, d time.Duration) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		err := c.Protect(t.Context(), files, d)
		if err == nil {
			return
		}
		if codeOf(t, err) != guard.Busy || time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

// codeOf returns the code of a guard's error, "" of no error.
func codeOf(t *testing.T, err error) guard.Code {
	t.Helper()
	if err == nil {
		return ""
	}
	e, ok := errors.AsType[*guard.Error](err)
	if !ok {
		t.Fatalf("got %v, want an answer of the guard", err)
	}
	return e.Code
}

// ask sends a request as it is.
func ask(t *testing.T, c guard.Client, r guard.Request) guard.Reply {
	t.Helper()
	r.Version, r.Folder = guard.Version, c.Folder
	line, err := json.Marshal(r)
	ok(t, err)
	return send(t, c, string(line)+"\n")
}

// send sends bytes and returns the reply to them.
func send(t *testing.T, c guard.Client, bytes string) guard.Reply {
	t.Helper()
	conn, err := net.Dial("unix", c.Socket)
	ok(t, err)
	defer conn.Close()
	_, _ = conn.Write([]byte(bytes)) // a line that is too long is not read to its end
	ok(t, conn.(*net.UnixConn).CloseWrite())
	line, err := guard.ReadLine(conn)
	ok(t, err)
	var reply guard.Reply
	ok(t, json.Unmarshal(line, &reply))
	return reply
}

const (
	childVariable = "HOLDFAST_GUARD_TEST_SOCKET" // makes the test binary a client of that socket
	mainVariable  = "HOLDFAST_GUARD_TEST_MAIN"   // makes it the program itself
)

func runChild() int {
	conn, err := net.Dial("unix", os.Getenv(childVariable))
	if err != nil {
		return 2
	}
	defer conn.Close()
	_, _ = conn.Write([]byte(`{"version":1,"op":"status"}` + "\n"))
	line, err := guard.ReadLine(conn)
	if err != nil {
		return 3
	}
	if _, err := os.Stdout.Write(line); err != nil {
		return 4
	}
	return 0
}
