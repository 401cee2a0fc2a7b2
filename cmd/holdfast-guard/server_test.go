package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/guard"
)

// plainGuard starts a guard over a folder of files that no test protects.
func plainGuard(t *testing.T) (guard.Client, func()) {
	t.Helper()
	data := t.TempDir()
	repository(t, data)
	return started(t, data, filepath.Join(t.TempDir(), "state"), newMachine())
}

func TestHostileLines(t *testing.T) {
	t.Parallel()
	c, _ := plainGuard(t)
	for name, line := range map[string]string{
		"nothing":        "",
		"half a line":    `{"version":1,"op":"status"}`,
		"empty line":     "\n",
		"too long":       strings.Repeat(" ", guard.MaxLine+1) + "\n",
		"endless":        strings.Repeat("x", 4*guard.MaxLine),
		"no JSON":        "status\n",
		"two values":     `{"version":1,"op":"status"}{}` + "\n",
		"unknown field":  `{"version":1,"op":"status","force":true}` + "\n",
		"other version":  `{"version":2,"op":"status"}` + "\n",
		"deep":           strings.Repeat("[", 100000) + "\n",
		"no operation":   `{"version":1}` + "\n",
		"too many files": `{"version":1,"op":"status","files":["` + strings.Repeat(pointFile+`","`, guard.MaxFiles) + pointFile + `"]}` + "\n",
		"no folder":      `{"version":1,"op":"release"}` + "\n",
		"no files":       `{"version":1,"op":"protect","folder":"1:2","seconds":5}` + "\n",
		"no time":        `{"version":1,"op":"protect","folder":"1:2","files":["` + pointFile + `"]}` + "\n",
		"negative time":  `{"version":1,"op":"protect","folder":"1:2","files":["` + pointFile + `"],"seconds":-1}` + "\n",
		"too much time":  `{"version":1,"op":"protect","folder":"1:2","files":["` + pointFile + `"],"seconds":9223372036854775807}` + "\n",
	} {
		if got := send(t, c, line).Code; got != guard.Invalid {
			t.Errorf("%s: got code %q, want %q", name, got, guard.Invalid)
		}
	}
	for _, name := range []string{
		"", ".", "..", "/etc/passwd", "../" + pointFile, "/" + pointFile, "./" + pointFile, "segments/../" + pointFile,
		"points//" + filepath.Base(pointFile), "points", "repository.json", pointFile + "\x00", pointFile + "\n", "x" + pointFile,
		pointFile + ".tmp", strings.ToUpper(pointFile), "segments/" + filepath.Base(pointFile), "index/" + filepath.Base(pointFile),
	} {
		r := guard.Request{Op: guard.Protect, Files: []string{segmentFile, name}, Seconds: 60}
		if got := ask(t, c, r); got.Code != guard.Invalid || got.Protected != 0 {
			t.Errorf("file %q: got %+v, want code %q", name, got, guard.Invalid)
		}
	}
	if got := send(t, c, `{"version":1,"op":"release","folder":"1:2"}`+"\n").Code; got != guard.Foreign {
		t.Errorf("another data folder: got code %q, want %q", got, guard.Foreign)
	}
	if got := ask(t, c, guard.Request{Op: guard.Status}); got.Error != "" {
		t.Errorf("afterwards: got %+v, want a status", got)
	}
}

// TestLargestRequest: what the limits allow fits into a line, both ways.
func TestLargestRequest(t *testing.T) {
	t.Parallel()
	c, _ := plainGuard(t)
	files := make([]string, guard.MaxFiles)
	for i := range files {
		files[i] = segmentFile
	}
	reply, err := c.Status(t.Context(), files...)
	if err != nil || len(reply.Files) != guard.MaxFiles {
		t.Errorf("got %d files, %v, want %d", len(reply.Files), err, guard.MaxFiles)
	}
}

// TestManyClients: silent clients hold up others only until their time is over, and all are
// answered in the end.
func TestManyClients(t *testing.T) {
	t.Parallel()
	c, stop := plainGuard(t)
	var silent []net.Conn
	for range maxClients - 1 {
		conn, err := net.Dial("unix", c.Socket)
		ok(t, err)
		defer conn.Close()
		_, err = io.WriteString(conn, `{"version":1,`)
		ok(t, err)
		silent = append(silent, conn)
	}
	var clients sync.WaitGroup
	for range 50 {
		clients.Go(func() {
			if _, err := c.Status(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	clients.Wait()
	stop() // does not wait for them
	for _, conn := range silent {
		if n, err := conn.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("silent client: got %d bytes, %v, want the end", n, err)
		}
	}
	if _, err := c.Status(t.Context()); err == nil {
		t.Error("a guard that was stopped answers")
	}
}

// TestOtherUser: others than root and the owner of the data folder learn nothing.
func TestOtherUser(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "guard") // where any user may go
	ok(t, err)
	defer os.RemoveAll(dir)
	ok(t, os.Chmod(dir, 0o711))
	data := t.TempDir()
	ok(t, os.Chown(data, 1, 1))
	socket, program := filepath.Join(dir, "socket"), filepath.Join(dir, "program")
	startedAt(t, data, filepath.Join(t.TempDir(), "state"), socket, newMachine())
	self, err := os.ReadFile(os.Args[0])
	ok(t, err)
	ok(t, os.WriteFile(program, self, 0o755))
	for uid, want := range map[uint32]guard.Code{0: "", 1: "", 2: guard.Denied, 65534: guard.Denied} {
		cmd := exec.CommandContext(t.Context(), program)
		cmd.Env = append(os.Environ(), childVariable+"="+socket)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: 1}}
		out, err := cmd.Output()
		var reply guard.Reply
		if err == nil {
			err = json.Unmarshal(out, &reply)
		}
		if err != nil || reply.Code != want {
			t.Errorf("user %d: got %q %v, want code %q", uid, out, err, want)
		}
	}
}

// TestProgram runs the command line.
func TestProgram(t *testing.T) {
	t.Parallel()
	data := mounted(t, "ext4")
	repository(t, data)
	state, socket := filepath.Join(t.TempDir(), "state"), filepath.Join(t.TempDir(), "socket")
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket})
	ok(t, err)
	stale.SetUnlinkOnClose(false)
	ok(t, stale.Close()) // what a guard leaves that was killed
	args := []string{"serve", "--data", data, "--state", state, "--socket", socket}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- run(ctx, args, io.Discard, t.Output()) }()
	c, err := guard.New(socket, data)
	ok(t, err)
	waitFor(t, c)
	if err := run(t.Context(), args, io.Discard, t.Output()); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("a second guard: got %v, want that the state is in use", err)
	}
	protect(t, c, []string{pointFile}, time.Hour)
	var out bytes.Buffer
	ok(t, run(t.Context(), []string{"status", "--socket", socket, pointFile, segmentFile}, &out, io.Discard))
	for _, want := range []string{"1 files are protected", pointFile + "\tuntil 2", segmentFile + "\tnot protected\timmutable false"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("status: got\n%s\nwant %q in it", &out, want)
		}
	}
	cancel()
	ok(t, <-done)
	for _, args := range [][]string{{}, {"serve", "more"}, {"stop"}, {"serve", "--none"}} {
		if err := run(t.Context(), args, io.Discard, io.Discard); !errors.Is(err, errUsage) {
			t.Errorf("%q: got %v, want wrong usage", args, err)
		}
	}
	for _, args := range [][]string{{"--help"}, {"serve", "--help"}, {"help"}} {
		if err := run(t.Context(), args, &out, io.Discard); err == nil || !strings.Contains(out.String(), "protections") && !strings.Contains(out.String(), "--state") {
			t.Errorf("%q: got %v and\n%s", args, err, &out)
		}
	}
}

// waitFor waits until a guard answers.
func waitFor(t *testing.T, c guard.Client) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; {
		_, err := c.Status(t.Context())
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// TestCapabilities runs the program with no other capabilities than its unit has, for a data
// folder that is another user's.
func TestCapabilities(t *testing.T) {
	t.Parallel()
	unit, err := os.ReadFile("../../systemd/holdfast-guard.service")
	ok(t, err)
	set := regexp.MustCompile(`(?m)^CapabilityBoundingSet=(.*)$`).FindSubmatch(unit)
	if set == nil {
		t.Fatal("the unit has no CapabilityBoundingSet")
	}
	var bounding strings.Builder
	bounding.WriteString("-all")
	for name := range strings.FieldsSeq(strings.ToLower(string(set[1]))) {
		bounding.WriteString(",+" + strings.TrimPrefix(name, "cap_"))
	}
	data := mounted(t, "xfs")
	repository(t, data)
	command(t, "chown", "-R", "1:1", data)
	ok(t, os.Chmod(data, 0o700))
	state, socket := filepath.Join(t.TempDir(), "state"), filepath.Join(t.TempDir(), "socket")
	cmd := exec.CommandContext(t.Context(), "setpriv", "--bounding-set", bounding.String(), "--",
		os.Args[0], "serve", "--data", data, "--state", state, "--socket", socket)
	cmd.Env = append(os.Environ(), mainVariable+"=1")
	cmd.Stdout, cmd.Stderr = t.Output(), t.Output()
	ok(t, cmd.Start())
	defer func() {
		ok(t, cmd.Process.Signal(syscall.SIGTERM))
		ok(t, cmd.Wait())
	}()
	c, err := guard.New(socket, data)
	ok(t, err)
	waitFor(t, c)
	protect(t, c, []string{pointFile}, time.Second)
	untouchable(t, data, []string{pointFile})
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		n, err := c.Release(t.Context())
		ok(t, err)
		if n == 1 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the protection does not end")
		}
	}
	ok(t, os.Remove(filepath.Join(data, pointFile)))
}
