package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// asMain in the environment makes the test binary holdfast itself.
const asMain = "HOLDFAST_TEST_AS_MAIN"

func TestMain(m *testing.M) {
	if os.Getenv(asMain) != "" {
		main()
	}
	for _, name := range []string{"HOLDFAST_DATA", "HOLDFAST_PASSPHRASE_FILE", "HOLDFAST_IDENTITY_FILE"} {
		os.Unsetenv(name)
	}
	os.Exit(m.Run())
}

// outcome is how a command line ended.
type outcome struct {
	code           int
	stdout, stderr string
}

// holdfast runs a command line in this process.
func holdfast(ctx context.Context, args ...string) outcome {
	var stdout, stderr bytes.Buffer
	code := run(ctx, args, &stdout, &stderr)
	return outcome{code, stdout.String(), stderr.String()}
}

// newRepo makes a repository with two points of the VM "web" and returns the folder,
// an image file and the points' ids.
func newRepo(t *testing.T) (data, image string, points []string) {
	t.Helper()
	data, image = filepath.Join(t.TempDir(), "data"), filepath.Join(t.TempDir(), "vda.raw")
	ok(t, "--data", data, "init")
	for _, content := range []string{"monday", "tuesday"} {
		if err := os.WriteFile(image, bytes.Repeat([]byte(content), 128*1024), 0o600); err != nil {
			t.Fatal(err)
		}
		var r struct{ Point string }
		decode(t, ok(t, "--data", data, "backup", "image", image, "--vm", "web", "--format", "raw", "--json"), &r)
		points = append(points, r.Point)
	}
	return data, image, points
}

// ok runs a command line that must succeed and returns its standard output.
func ok(t *testing.T, args ...string) string {
	t.Helper()
	got := holdfast(t.Context(), args...)
	if got.code != 0 || got.stderr != "" {
		t.Fatalf("holdfast %q: got %+v, want exit status 0 and nothing on standard error", args, got)
	}
	return got.stdout
}

func decode(t *testing.T, text string, v any) {
	t.Helper()
	if strings.Count(text, "\n") != 1 {
		t.Errorf("got %q, want one line of JSON", text)
	}
	if err := json.Unmarshal([]byte(text), v); err != nil {
		t.Fatalf("%v in %q", err, text)
	}
}

// TestExitStatus holds statuses, and errors to one line that names the thing.
func TestExitStatus(t *testing.T) {
	t.Parallel()
	data, image, points := newRepo(t)
	none := filepath.Join(t.TempDir(), "none")
	target := filepath.Join(t.TempDir(), "new\nname.raw")
	for _, tt := range []struct {
		args string // fields; @ stands for the image
		code int
		says string
	}{
		{"bakcup", exitUsage, "did you mean backup"},
		{"repo", exitUsage, "gc, quarantine, rebuild-index, repair, set, stats, verify"},
		{"repo frobnicate", exitUsage, "frobnicate"},
		{"help frobnicate", exitUsage, "frobnicate"},
		{"help repo frobnicate", exitUsage, "frobnicate"},
		{"point list --frobnicate", exitUsage, "--frobnicate"},
		{"point list more", exitUsage, "more"},
		{"point show", exitUsage, "POINT"},
		{"point show a b", exitUsage, "got 2 arguments"},
		{"point delete", exitUsage, "POINT…"},
		{"point diff web@latest", exitUsage, "POINT POINT"},
		{"point show web@yesterday", exitUsage, "yesterday"},
		{"point show 1234", exitUsage, "1234"},
		{"backup image @", exitUsage, "vm"},
		{"backup image --vm web", exitUsage, "FILE"},
		{"backup image @ --vm web --format floppy", exitUsage, "floppy"},
		{"backup image @ --vm web --disk a --disk b", exitUsage, "2 disk names"},
		{"restore image web@latest", exitUsage, "to"},
		{"export add web@latest --listen 127.0.0.1:0 --unix x", exitUsage, "unix"},
		{"repo verify --percent 0", exitUsage, "percent"},
		{"repo quarantine", exitUsage, "list, remove, restore"},
		{"repo quarantine restore", exitUsage, "STAMP"},
		{"repo quarantine remove 20260101T000000Z", exitNotFound, "20260101T000000Z"},
		{"repo quarantine restore ../segments", exitNotFound, "../segments"},
		{"repo verify --percent many", exitUsage, "many"},
		{"repo verify --percent 10 --resume", exitUsage, "resumed"},
		{"repo verify --vm web --percent 10", exitUsage, "share"},
		{"repo verify --rate fast", exitUsage, "fast"},
		{"repo verify --since=", exitUsage, "--since"},
		{"repo verify --vm=", exitUsage, "--vm"},
		{"point list --vm=", exitUsage, "--vm"},
		{"point lock web@latest --for 0", exitUsage, "to come"},
		{"point lock web@latest --until soon", exitUsage, "2027-01-31"},
		{"point lock web@latest --for 1d --guard /gone.sock", exitFailed, "not all of its files are immutable"},
		{"point list --storage-timeout 0", exitUsage, "--storage-timeout"},
		{"point list --storage-timeout -1s", exitUsage, "--storage-timeout"},
		{"point list --data " + image, exitFailed, "not a directory"},
		{"init --data " + none + " --identity-file id.txt", exitUsage, "--recipient"},
		{"repo verify --vm nobody", exitNotFound, "nobody"},
		{"repo gc --max-unused 200", exitUsage, "200"},
		{"init --chunk-size many", exitUsage, "many"},
		{"init --chunk-size 48KiB", exitUsage, "49152"},
		{"point show 0123456789abcdef", exitNotFound, "0123456789abcdef"},
		{"point delete 0123456789abcdef", exitNotFound, "0123456789abcdef"},
		{"point show db@latest", exitNotFound, "db@latest"},
		{"point diff web@latest web@latest --disk vdz", exitNotFound, "vdz"},
		{"restore image web@latest --disk vdz --to new.raw", exitNotFound, "vdz"},
		{"backup image /gone.raw --vm web", exitNotFound, "/gone.raw"},
		{"point list --data=", exitUsage, "--data"},
		{"init --data=", exitUsage, "--data"},
		{"point list --data " + none, exitNotFound, "init"},
		{"point list --passphrase-file " + none, exitNotFound, none},
		{"unmount " + none, exitNotFound, none},
		{"init", exitRefused, data},
		{"restore image web@latest --to @", exitRefused, "vda.raw"},
		{"export add web@latest --listen 0.0.0.0:0", exitRefused, "--allow-remote"},
		{"backup image @ --vm web --format qcow2", exitFailed, "vda.raw"},
	} {
		args := strings.Fields(tt.args)
		for i, arg := range args {
			if arg == "@" {
				args[i] = image
			}
		}
		got := holdfast(t.Context(), append([]string{"--data", data}, args...)...)
		if got.code != tt.code || got.stdout != "" || !strings.Contains(got.stderr, tt.says) ||
			!strings.HasPrefix(got.stderr, "holdfast: ") || strings.Count(got.stderr, "\n") != 1 {
			t.Errorf("holdfast %s: got %+v, want exit status %d and one line with %q", tt.args, got, tt.code, tt.says)
		}
	}

	// A line break in a name leaves the error one line.
	if err := os.WriteFile(target, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := holdfast(t.Context(), "--data", data, "restore", "image", points[0], "--to", target); got.code != exitRefused || strings.Count(got.stderr, "\n") != 1 {
		t.Errorf("an existing file with a line break in its name: got %+v, want exit status %d and one line", got, exitRefused)
	}
	interrupted, cancel := context.WithCancel(t.Context())
	cancel()
	if got := holdfast(interrupted, "--data", data, "backup", "image", image, "--vm", "web"); got.code != exitInterrupted ||
		got.stderr != "holdfast: backup image was interrupted\n" {
		t.Errorf("an interrupted backup: got %+v, want exit status %d", got, exitInterrupted)
	}
}

// TestResults runs every command that ends by itself, as text and as JSON.
func TestResults(t *testing.T) {
	t.Parallel()
	data, image, points := newRepo(t)
	folder := t.TempDir()
	for _, tt := range []struct {
		args []string
		text string   // is in the text
		keys []string // are in the JSON, no others
	}{
		{[]string{"version"}, "holdfast ", []string{"version", "go", "platform"}},
		{[]string{"init", "--data", filepath.Join(folder, "%")}, "64 KiB", []string{"data", "chunk_size", "encrypted", "delete_quarantine_seconds"}},
		{[]string{"backup", "image", image, "--vm", "db", "--format", "raw"}, "point ", []string{"point", "vm", "time", "mode", "consistency", "disks"}},
		{[]string{"point", "show", points[0]}, points[0], []string{"id", "vm", "time", "mode", "consistency", "disks", "config"}},
		{[]string{"point", "diff", points[0], points[1]}, "vda", []string{"disks"}},
		{[]string{"point", "delete", "db@latest"}, "deleted ", []string{"deleted"}},
		{[]string{"restore", "image", points[1], "--to", filepath.Join(folder, "%.qcow2")}, "qcow2", []string{"point", "vm", "disk", "file", "format", "size_bytes"}},
		{[]string{"repo", "stats"}, "64 KiB", []string{"points", "logical_bytes", "unique_bytes", "stored_bytes", "chunks", "segments", "chunk_size", "encrypted", "deleted_points", "delete_quarantine_seconds", "head"}},
		{[]string{"repo", "verify"}, "all good", []string{"began", "resumed", "checked_chunks", "checked_bytes", "damaged_chunks", "errors"}},
		{[]string{"repo", "repair"}, "nothing to repair", []string{"actions", "applied", "lost_chunks"}},
		{[]string{"repo", "gc", "--dry-run"}, "would free", []string{"live_chunks", "dead_chunks", "dead_bytes", "freed_bytes", "immutable_bytes"}},
		{[]string{"repo", "gc"}, "freed", []string{"live_chunks", "dead_chunks", "dead_bytes", "freed_bytes", "immutable_bytes"}},
		{[]string{"repo", "rebuild-index"}, "segments", []string{"segments", "records", "chunks"}},
	} {
		in := func(what string) []string { // a name of its own for each run
			args := []string{"--data", data}
			for _, arg := range tt.args {
				args = append(args, strings.ReplaceAll(arg, "%", what))
			}
			return args
		}
		if got := ok(t, in("text")...); !strings.Contains(got, tt.text) {
			t.Errorf("holdfast %q: got %q, want it to say %q", tt.args, got, tt.text)
		}
		if tt.args[0] == "point" && tt.args[1] == "delete" {
			ok(t, "--data", data, "backup", "image", image, "--vm", "db", "--format", "raw")
			ok(t, "--data", data, "backup", "image", image, "--vm", "db", "--format", "raw")
		}
		object := map[string]any{}
		decode(t, ok(t, append(in("json"), "--json")...), &object)
		for _, key := range tt.keys {
			if _, there := object[key]; !there {
				t.Errorf("holdfast %q --json: got %v, want it to have %q", tt.args, object, key)
			}
		}
		if len(object) != len(tt.keys) {
			t.Errorf("holdfast %q --json: got %v, want the keys %q alone", tt.args, object, tt.keys)
		}
	}
	var list []struct{ ID, VM string }
	decode(t, ok(t, "--data", data, "point", "list", "--vm", "web", "--json"), &list)
	if len(list) != 2 || list[0].ID != points[0] || list[1].ID != points[1] {
		t.Errorf("got points %+v, want %v", list, points)
	}
	if got := ok(t, "--data", data, "point", "list", "--vm", "nobody", "--json"); got != "[]\n" {
		t.Errorf("got points %q, want an empty list", got)
	}
}

// TestVerifyDamage has damage listed on standard output, and status 1.
func TestVerifyDamage(t *testing.T) {
	t.Parallel()
	data, _, points := newRepo(t)
	segments, err := filepath.Glob(filepath.Join(data, "segments", "*"))
	if err != nil || len(segments) == 0 {
		t.Fatal(segments, err)
	}
	for _, path := range segments {
		content, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		content[len(content)/4] ^= 1
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	got := holdfast(t.Context(), "--data", data, "--quiet", "repo", "verify", "--json")
	var r struct {
		Errors []struct{ Point, Reason string }
	}
	decode(t, got.stdout, &r)
	if got.code != exitFailed || len(r.Errors) == 0 || !slices.Contains(points, r.Errors[0].Point) || strings.Count(got.stderr, "\n") != 1 {
		t.Errorf("got %+v, want exit status %d, a damaged point and one line of error", got, exitFailed)
	}
}

// TestRepair repairs a damaged repository: first it only tells, then it does it, keeps what it replaced
// and puts it back.
func TestRepair(t *testing.T) {
	t.Parallel()
	data, image, points := newRepo(t)
	at := func(args ...string) []string { return append([]string{"--data", data, "--quiet", "--json"}, args...) }
	segments, err := filepath.Glob(filepath.Join(data, "segments", "*"))
	if err != nil || len(segments) == 0 {
		t.Fatal(segments, err)
	}
	content, err := os.ReadFile(segments[0])
	if err != nil {
		t.Fatal(err)
	}
	content[100] ^= 1 // the first record
	if err := os.WriteFile(segments[0], content, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := holdfast(t.Context(), at("repo", "verify", "--point", points[0], "--rate", "1GiB")...); got.code != exitFailed {
		t.Errorf("verify: got %+v, want exit status %d", got, exitFailed)
	}
	var r struct {
		Actions []struct {
			Kind, File, Reason, Action, Point string
			Done                              bool
		}
		Applied    bool
		Quarantine string
		LostChunks int `json:"lost_chunks"`
	}
	for _, apply := range []bool{false, true} {
		args := at("repo", "repair", fmt.Sprintf("--apply=%v", apply))
		got := holdfast(t.Context(), args...)
		decode(t, got.stdout, &r)
		if got.code != exitFailed || r.Applied != apply || r.LostChunks != 1 || len(r.Actions) < 2 || r.Actions[0].Done != apply || (r.Quarantine != "") != apply {
			t.Errorf("repair, apply %v: got %+v, want a segment that is replaced and a chunk that is lost", apply, got)
		}
	}
	if err := os.WriteFile(image, bytes.Repeat([]byte("monday"), 128*1024), 0o600); err != nil {
		t.Fatal(err)
	}
	ok(t, at("backup", "image", image, "--vm", "web", "--format", "raw")...)
	ok(t, at("repo", "repair", "--apply")...)
	ok(t, at("repo", "verify")...)
	var list []struct {
		Stamp string
		Files []string
	}
	decode(t, ok(t, at("repo", "quarantine", "list")...), &list)
	if len(list) != 1 || list[0].Stamp != r.Quarantine || len(list[0].Files) != 1 {
		t.Fatalf("got %+v, want one file in %s", list, r.Quarantine)
	}
	ok(t, at("repo", "quarantine", "restore", r.Quarantine)...)
	ok(t, at("repo", "verify")...)
	if got := ok(t, at("repo", "quarantine", "list")...); got != "[]\n" {
		t.Errorf("got %q, want nothing left in quarantine", got)
	}
}

// TestHelp wants an example of every command, its global flags and no hidden ones.
func TestHelp(t *testing.T) {
	t.Parallel()
	p := &program{console: newConsole(os.Stderr)}
	for _, noun := range p.rootCommand().Commands() {
		for _, cmd := range append(noun.Commands(), noun) {
			help := ok(t, append([]string{"help"}, strings.Fields(cmd.CommandPath())[1:]...)...)
			if !strings.Contains(help, "Examples:\n  ") || !strings.Contains(help, "--data folder") || strings.Contains(help, "detached") {
				t.Errorf("help %s: got\n%s\nwant examples and global flags", cmd.CommandPath(), help)
			}
		}
	}
	if got := ok(t); !strings.Contains(got, "130 interrupted") {
		t.Errorf("no command: got %q, want the help with the exit statuses", got)
	}
}

func TestDefaultData(t *testing.T) {
	t.Setenv("HOLDFAST_DATA", "/backup")
	if got := defaultData(); got != "/backup" {
		t.Errorf("HOLDFAST_DATA: got %s, want /backup", got)
	}
	t.Setenv("HOLDFAST_DATA", "")
	t.Setenv("XDG_DATA_HOME", "/xdg")
	want := "/xdg/holdfast"
	if os.Geteuid() == 0 {
		want = "/var/lib/holdfast"
	}
	if got := defaultData(); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// TestMountDetached mounts in the background: the command returns when the files
// are there, unmount when the data folder is free again.
func TestMountDetached(t *testing.T) {
	t.Parallel()
	data, image, _ := newRepo(t)
	dir := filepath.Join(t.TempDir(), "mnt")
	process := func(args ...string) outcome {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, "/proc/self/exe", append([]string{"--data", data}, args...)...)
		cmd.Env = append(os.Environ(), asMain+"=1")
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
			t.Fatal(err)
		}
		return outcome{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
	}
	t.Cleanup(func() { _ = syscall.Unmount(dir, syscall.MNT_DETACH) }) // after a failure
	// That Run returns tells that the background process holds neither output.
	if got := process("mount", dir, "--json"); got != (outcome{0, `{"mount":"` + dir + `"}` + "\n", ""}) {
		t.Fatalf("mount: got %+v, want the folder as JSON and nothing else", got)
	}
	want, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "web", "latest", "disks", "vda.raw")); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the disk differs (%v)", err)
	}
	if got := process("point", "list"); got.code != exitRefused || !strings.Contains(got.stderr, "in use") {
		t.Errorf("a command beside the mount: got %+v, want it refused", got)
	}
	if got := process("mount", dir); got.code != exitRefused || got.stdout != "" || strings.Count(got.stderr, "\n") != 1 {
		t.Errorf("a second mount: got %+v, want it refused in one line", got)
	}
	if got := process("unmount", dir); got.code != 0 {
		t.Errorf("unmount: got %+v, want exit status 0", got)
	}
	if got := process("point", "list"); got.code != 0 {
		t.Errorf("a command right after unmount: got %+v, want exit status 0", got)
	}
	if got := process("mount", filepath.Join(dir, "no", "parent")); got.code != exitNotFound || strings.Count(got.stderr, "\n") != 1 {
		t.Errorf("a folder without a parent: got %+v, want it not found", got)
	}
}

// TestServeUntilSignal ends what serves with either signal: no failure, no socket.
func TestServeUntilSignal(t *testing.T) {
	t.Parallel()
	data, _, _ := newRepo(t)
	for _, signal := range []os.Signal{os.Interrupt, syscall.SIGTERM} {
		folder, err := os.MkdirTemp("", "hf") // a socket's path is short
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(folder) })
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, "/proc/self/exe", "--data", data, "export", "add", "web@latest", "--json", "--unix", filepath.Join(folder, "s"))
		cmd.Env = append(os.Environ(), asMain+"=1")
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		stdout, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		var e struct {
			URI string `json:"uri"`
		}
		if err := json.NewDecoder(stdout).Decode(&e); err != nil || !strings.HasPrefix(e.URI, "nbd+unix:///web/") {
			t.Errorf("got %+v, %v, want an export with a URI", e, err)
		}
		if err := cmd.Process.Signal(signal); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err != nil || stderr.Len() > 0 {
			t.Errorf("%v: got %v and %q, want exit status 0 and nothing on standard error", signal, err, &stderr)
		}
		if left, err := os.ReadDir(folder); err != nil || len(left) != 0 {
			t.Errorf("%v: left %v, %v", signal, left, err)
		}
	}
}
