package e2e_test

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// write makes a file with the content and returns its path.
func write(t *testing.T, name, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestErrors holds statuses and messages: one line that names the thing.
func TestErrors(t *testing.T) {
	t.Parallel()
	r := newRepo(t)
	source := mixedDisk(t, 4*miB, 61)
	b := r.backup(source)
	text := write(t, "letter.txt", strings.Repeat("not a disk at all\n", 1000))
	existing := write(t, "existing.raw", "precious")
	qcow2 := filepath.Join(t.TempDir(), "cut.qcow2")
	tool(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", source, qcow2)
	if err := os.Truncate(qcow2, 2*miB); err != nil {
		t.Fatal(err)
	}
	vmdk := filepath.Join(t.TempDir(), "cut.vmdk")
	tool(t, "qemu-img", "convert", "-f", "raw", "-O", "vmdk", source, vmdk)
	if err := os.Truncate(vmdk, miB); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		code int
		says string // what the error line names
		args []string
	}{
		{"missing file", exitNotFound, "gone.raw", []string{"backup", "image", "/gone.raw", "--vm", "vm"}},
		{"missing second file", exitNotFound, "gone.raw", []string{"backup", "image", source, "/gone.raw", "--vm", "vm"}},
		{"not a qcow2", exitFailed, "letter.txt", []string{"backup", "image", text, "--vm", "vm", "--format", "qcow2"}},
		{"not a vhdx", exitFailed, "letter.txt", []string{"backup", "image", text, "--vm", "vm", "--format", "vhdx"}},
		{"truncated qcow2", exitFailed, "cut.qcow2", []string{"backup", "image", qcow2, "--vm", "vm"}},
		{"truncated vmdk", exitFailed, "cut.vmdk", []string{"backup", "image", vmdk, "--vm", "vm"}},
		{"a folder", exitFailed, filepath.Base(r.data), []string{"backup", "image", r.data, "--vm", "vm"}},
		{"unknown id", exitNotFound, "0123456789abcdef", []string{"point", "show", "0123456789abcdef"}},
		{"unknown vm", exitNotFound, "nobody", []string{"restore", "image", "nobody@latest", "--to", existing + ".new"}},
		{"before the first point", exitNotFound, "vm@2001", []string{"point", "show", "vm@2001-01-01T00:00:00Z"}},
		{"unknown disk", exitNotFound, "nodisk", []string{"restore", "image", b.Point, "--disk", "nodisk", "--to", existing + ".new"}},
		{"delete an unknown point", exitNotFound, "0123456789abcdef", []string{"point", "delete", "0123456789abcdef"}},
		{"existing target", exitRefused, "existing.raw", []string{"restore", "image", b.Point, "--to", existing}},
		{"init twice", exitRefused, r.data, []string{"init"}},
		{"no command of that name", exitUsage, "bakcup", []string{"bakcup"}},
		{"no verb of that name", exitUsage, "frobnicate", []string{"repo", "frobnicate"}},
		{"unknown flag", exitUsage, "--frobnicate", []string{"point", "list", "--frobnicate"}},
		{"missing argument", exitUsage, "", []string{"point", "show"}},
		{"missing flag", exitUsage, "vm", []string{"backup", "image", source}},
		{"missing target", exitUsage, "to", []string{"restore", "image", b.Point}},
		{"unknown format", exitUsage, "floppy", []string{"backup", "image", source, "--vm", "vm", "--format", "floppy"}},
		{"short prefix", exitUsage, b.Point[:4], []string{"point", "show", b.Point[:4]}},
		{"bad time", exitUsage, "yesterday", []string{"point", "show", "vm@yesterday"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			sub := *r
			sub.t = t
			if line := sub.fails(tt.code, tt.args...); !strings.Contains(line, tt.says) {
				t.Errorf("got error %q, want it to name %q", line, tt.says)
			}
		})
	}
	if points := r.points(); len(points) != 1 {
		t.Errorf("got points %+v, want the first alone", points)
	}
	if got, err := os.ReadFile(existing); err != nil || string(got) != "precious" {
		t.Errorf("the existing target: got %q, %v, want it untouched", got, err)
	}
	if _, err := os.Stat(existing + ".new"); err == nil {
		t.Errorf("a restore that failed left its target")
	}
	r.intact(t, b.Point, source)

	none := &repo{t: t, data: filepath.Join(t.TempDir(), "nowhere")}
	if line := none.fails(exitNotFound, "point", "list"); !strings.Contains(line, "init") {
		t.Errorf("no repository: got error %q, want it to say what to do: init", line)
	}
}

// TestChunkSize refuses what is no chunk size and takes what is one.
func TestChunkSize(t *testing.T) {
	t.Parallel()
	for _, size := range []string{"100", "48KiB", "8MiB", "many"} {
		r := &repo{t: t, data: filepath.Join(t.TempDir(), "data")}
		r.fails(exitUsage, "init", "--chunk-size", size)
		if _, err := os.Stat(filepath.Join(r.data, "repository.json")); err == nil {
			t.Errorf("init --chunk-size %s left a repository", size)
		}
	}
	for size, want := range map[string]int64{"16KiB": 16 * kiB, "1MiB": miB} {
		r := newRepo(t, "--chunk-size", size)
		source := mixedDisk(t, 5*miB+512, 62)
		r.intact(t, r.backup(source).Point, source)
		if stats := decode[statsResult](t, r.ok("repo", "stats", "--json")); stats.ChunkSize != want {
			t.Errorf("got chunk size %d, want %d", stats.ChunkSize, want)
		}
	}
}

// TestPassphrase keeps an encrypted repository from those without the key,
// and its content out of the files.
func TestPassphrase(t *testing.T) {
	t.Parallel()
	key, wrong := write(t, "key", "correct horse battery staple\n"), write(t, "wrong", "incorrect\n")
	r := newRepo(t, "--passphrase-file", key)
	source := mixedDisk(t, 8*miB, 63)
	secret := strings.Repeat("the secret of the guest ", 4000)
	overwriteAt(t, source, 3*miB, secret)

	open := *r
	open.args = []string{"--passphrase-file", key}
	b := decode[backupResult](t, open.ok("backup", "image", source, "--vm", "tell-nobody", "--json"))
	open.intact(t, b.Point, source)

	for _, args := range [][]string{nil, {"--passphrase-file", wrong}} {
		closed := *r
		closed.args = args
		closed.fails(exitRefused, "point", "list")
		closed.fails(exitRefused, "restore", "image", b.Point, "--to", filepath.Join(t.TempDir(), "x"))
		closed.fails(exitRefused, "backup", "image", source, "--vm", "vm")
	}
	missing := *r
	missing.args = []string{"--passphrase-file", "/gone"}
	missing.fails(exitNotFound, "point", "list")

	for _, folder := range []string{"segments", "points", "index", "repository.json", "repository.json.copy"} {
		for _, word := range []string{"the secret of the guest", "tell-nobody"} {
			if found := grep(t, filepath.Join(r.data, folder), word); found != "" {
				t.Errorf("%q stands in plain text in %s", word, found)
			}
		}
	}
	t.Run("environment", func(t *testing.T) {
		cmd := r.command(t.Context(), "point", "list", "--json")
		cmd.Env = append(cmd.Env, "HOLDFAST_PASSPHRASE_FILE="+key)
		out, err := cmd.Output()
		if points := decode[[]point](t, string(out)); err != nil || len(points) != 1 {
			t.Errorf("with HOLDFAST_PASSPHRASE_FILE: got %s, %v, want one point", out, err)
		}
	})
}

// TestReadOnlyFolder runs on a file system that is mounted read-only.
func TestReadOnlyFolder(t *testing.T) {
	t.Parallel()
	dir := tmpfs(t, "64m")
	r := &repo{t: t, data: filepath.Join(dir, "data")}
	r.ok("init")
	source := mixedDisk(t, 4*miB, 64)
	r.backup(source)
	tool(t, "mount", "-o", "remount,bind,ro", dir)
	if line := r.fails(exitRefused, "backup", "image", source, "--vm", "vm"); !strings.Contains(line, r.data) {
		t.Errorf("got error %q, want it to name %s", line, r.data)
	}
	fresh := &repo{t: t, data: filepath.Join(dir, "fresh")}
	fresh.fails(exitRefused, "init")
	tool(t, "mount", "-o", "remount,bind,rw", dir)
	r.verified()
}

// TestFullDisk fills the repository's disk: the backup fails, what was there
// stays, and what frees space works.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	dir := tmpfs(t, "160m")
	r := &repo{t: t, data: filepath.Join(dir, "data")}
	r.ok("init")
	source := noiseDisk(t, 24*miB, 65)
	first := r.backup(source)
	second := copyFile(t, source)
	overwrite(t, second, newRand(66), 16*miB/chunk)
	last := r.backup(second)
	big := noiseDisk(t, 256*miB, 67)
	for range 2 {
		if line := r.fails(exitFailed, "backup", "image", big, "--vm", "big"); !strings.Contains(line, "space") {
			t.Errorf("got error %q, want it to tell of space", line)
		}
		if points := r.points(); len(points) != 2 {
			t.Errorf("got points %+v, want the first two", points)
		}
		r.intact(t, first.Point, source)
		r.intact(t, last.Point, second)
	}
	other := fill(t, dir, 20*miB)
	r.ok("point", "delete", first.Point)
	if got := decode[gcResult](t, r.ok("repo", "gc", "--json")); got.FreedBytes <= 0 {
		t.Errorf("gc on the full disk: got %+v, want bytes freed", got)
	}
	r.intact(t, last.Point, second)
	if err := os.Truncate(other, 0); err != nil {
		t.Fatal(err)
	}
	again := noiseDisk(t, 24*miB, 68)
	r.intact(t, r.backup(again).Point, again)
	r.verified()
}

// fill leaves room for so many bytes in a file system, and returns the file that has the rest.
func fill(t *testing.T, dir string, left int64) string {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "other")
	if err := os.WriteFile(path, make([]byte, max(0, int64(st.Bavail)*st.Bsize-left)), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestSecondProcess finds the repository in use: the error names who has it.
func TestSecondProcess(t *testing.T) {
	t.Parallel()
	r := newRepo(t)
	source := mixedDisk(t, 4*miB, 69)
	b := r.backup(source)
	e := r.export(b.Point)
	line := r.fails(exitRefused, "backup", "image", source, "--vm", "vm")
	if pid := strconv.Itoa(e.cmd.Process.Pid); !strings.Contains(line, pid) {
		t.Errorf("got error %q, want it to name process %s", line, pid)
	}
	identicalExport(t, e.URI, source)
	e.stop()
	r.backup(source)
}

// tmpfs mounts a file system of the size until the test's end.
func tmpfs(t *testing.T, size string) string {
	t.Helper()
	dir := t.TempDir()
	tool(t, "mount", "-t", "tmpfs", "-o", "size="+size, "none", dir)
	t.Cleanup(func() { unmount(t, dir) })
	return dir
}

// overwriteAt writes text into a disk.
func overwriteAt(t *testing.T, path string, off int64, text string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte(text), off); err != nil {
		t.Fatal(err)
	}
}

// grep returns the first file under path that holds the word.
func grep(t *testing.T, path, word string) string {
	t.Helper()
	var found string
	err := filepath.WalkDir(path, func(name string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		content, err := os.ReadFile(name)
		if strings.Contains(name, word) || strings.Contains(string(content), word) {
			found = name
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}
