package e2e_test

import (
	"encoding/json"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// export is a point served over NBD by a process of its own.
type export struct {
	*process
	Name      string `json:"name"`
	URI       string `json:"uri"`
	ReadOnly  bool   `json:"read_only"`
	SizeBytes int64  `json:"size_bytes"`
	printed   string // the object as it was printed
}

// export serves a point over a unix socket until stop or the test's end.
func (r *repo) export(point string, args ...string) *export {
	r.t.Helper()
	folder, err := os.MkdirTemp("", "hf") // a socket's path is short
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { os.RemoveAll(folder) })
	return r.serve(append([]string{"export", "add", point, "--json", "--unix", filepath.Join(folder, "nbd.sock")}, args...)...)
}

// serve runs an `export add` and reads the object it prints first.
func (r *repo) serve(args ...string) *export {
	r.t.Helper()
	stdout, w, err := os.Pipe()
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { stdout.Close() })
	e := &export{process: r.start(w, args...)}
	w.Close()
	var printed json.RawMessage
	err = json.NewDecoder(stdout).Decode(&printed)
	if err == nil {
		err = json.Unmarshal(printed, e)
	}
	if err != nil {
		code := e.interrupt()
		r.t.Fatalf("holdfast %s: %v, exit status %d\n%s", strings.Join(args, " "), err, code, e.stderr)
	}
	e.printed = string(printed)
	return e
}

// stop ends an export as Ctrl-C does.
func (e *export) stop() {
	e.t.Helper()
	if code := e.interrupt(); code != 0 && code != exitInterrupted {
		e.t.Errorf("an interrupted export: got exit status %d, want 0 or %d\n%s", code, exitInterrupted, e.stderr)
	}
}

// mount is a running `holdfast mount`.
type mount struct {
	*process
	r   *repo
	dir string
}

// mount mounts the repository on a new folder until unmount or the test's end.
func (r *repo) mount() *mount {
	r.t.Helper()
	m := &mount{r: r, dir: filepath.Join(r.t.TempDir(), "mnt")}
	if err := os.Mkdir(m.dir, 0o755); err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { // after the kill that start arranges
		if isMounted(r.t, m.dir) {
			unmount(r.t, m.dir)
		}
	})
	m.process = r.start(nil, "mount", m.dir, "--foreground")
	m.until("mount", func() bool { return isMounted(r.t, m.dir) })
	return m
}

// unmount ends the mount with the command for it.
func (m *mount) unmount() {
	m.t.Helper()
	m.r.ok("unmount", m.dir)
	if code := m.wait(); code != 0 {
		m.t.Errorf("mount after unmount: got exit status %d, want 0\n%s", code, m.stderr)
	}
	if isMounted(m.t, m.dir) {
		m.t.Errorf("%s is still mounted", m.dir)
	}
}

// unmount takes a file system away that a test leaves, in its cleanup.
func unmount(t *testing.T, dir string) {
	t.Helper()
	if out, err := exec.Command("umount", "-l", dir).CombinedOutput(); err != nil {
		t.Errorf("umount %s: %v\n%s", dir, err, out)
	}
}

func isMounted(t *testing.T, dir string) bool {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Contains(string(mounts), " "+dir+" ")
}

func TestExport(t *testing.T) {
	t.Parallel()
	r := newRepo(t)
	source := mixedDisk(t, 48*miB+1536, 11)
	b := r.backup(source)
	later := copyFile(t, source)
	overwrite(t, later, newRand(12), 9)
	r.backup(later)

	e := r.export(b.Point)
	if !e.ReadOnly || e.SizeBytes < 48*miB+1536 || e.Name == "" {
		t.Errorf("got export %+v, want a name, read-only, at least %d bytes", e, 48*miB+1536)
	}
	info := decode[struct {
		Exports []struct {
			Size       int64    `json:"export-size"`
			IsReadOnly bool     `json:"is_read_only"`
			Contexts   []string `json:"contexts"`
		} `json:"exports"`
	}](t, tool(t, "nbdinfo", "--json", e.URI))
	if len(info.Exports) != 1 || info.Exports[0].Size != e.SizeBytes || !info.Exports[0].IsReadOnly ||
		!slices.Contains(info.Exports[0].Contexts, "base:allocation") {
		t.Errorf("nbdinfo: got %+v, want one read-only export of %d bytes with base:allocation", info, e.SizeBytes)
	}
	identicalExport(t, e.URI, source)
	tool(t, "/usr/bin/python3", "testdata/nbd_reads.py", e.URI, source, "200", "42")
	copied := filepath.Join(t.TempDir(), "copied.raw")
	tool(t, "nbdcopy", e.URI, copied)
	identicalExport(t, copied, source)
	e.stop()

	// Over TCP, by name, the newest point.
	e = r.serve("export", "add", "vm@latest", "--json", "--listen", "127.0.0.1:0", "--name", "newest")
	if e.Name != "newest" || !strings.HasPrefix(e.URI, "nbd://127.0.0.1:") || !strings.HasSuffix(e.URI, "/newest") {
		t.Errorf("got export %q at %q, want newest at nbd://127.0.0.1:PORT/newest", e.Name, e.URI)
	}
	identicalExport(t, e.URI, later)
	e.stop()
}

func TestMount(t *testing.T) {
	t.Parallel()
	r := newRepo(t)
	source := mixedDisk(t, 48*miB+1536, 21)
	first := r.backup(source)
	later := copyFile(t, source)
	overwrite(t, later, newRand(22), 9)
	r.backup(later)

	m := r.mount()
	entries, err := os.ReadDir(filepath.Join(m.dir, "vm"))
	if err != nil {
		t.Fatal(err)
	}
	var folders []string
	for _, e := range entries {
		if e.IsDir() {
			folders = append(folders, e.Name())
		}
	}
	slices.Sort(folders)
	if len(folders) != 2 {
		t.Fatalf("vm/ holds the folders %q, want one a point", folders)
	}
	latest, err := os.Readlink(filepath.Join(m.dir, "vm", "latest"))
	if err != nil || filepath.Base(latest) != folders[1] {
		t.Errorf("vm/latest: got %q, %v, want a link to %q", latest, err, folders[1])
	}
	name := first.Disks[0].Name + ".raw"
	raw := filepath.Join(m.dir, "vm", folders[0], "disks", name)
	sameFile(t, raw, source)
	randomReads(t, raw, source, 200, 42)
	newest := filepath.Join(m.dir, "vm", "latest", "disks", name)
	sameFile(t, newest, later)
	tool(t, "cmp", newest, later)

	// Read-only: for root too.
	if err := os.WriteFile(raw, []byte("x"), 0o600); err == nil {
		t.Errorf("writing to %s succeeded", raw)
	}
	if err := os.Remove(raw); err == nil {
		t.Errorf("removing %s succeeded", raw)
	}
	if _, err := os.Stat(filepath.Join(m.dir, "nobody")); !os.IsNotExist(err) {
		t.Errorf("a folder of no VM: got %v, want %v", err, fs.ErrNotExist)
	}
	m.unmount()

	// Ctrl-C unmounts too.
	m = r.mount()
	if code := m.interrupt(); code != 0 && code != exitInterrupted {
		t.Errorf("an interrupted mount: got exit status %d, want 0 or %d", code, exitInterrupted)
	}
	if isMounted(t, m.dir) {
		t.Errorf("%s is still mounted after an interrupt", m.dir)
	}
}

// randomReads holds count random ranges of a file against another's.
func randomReads(t *testing.T, got, want string, count int, seed uint64) {
	t.Helper()
	f, err := os.Open(got)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	g, err := os.Open(want)
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	info, err := g.Stat()
	if err != nil {
		t.Fatal(err)
	}
	r := newRand(seed)
	for range count {
		off := r.Int64N(info.Size())
		length := min(1+r.Int64N(300*kiB), info.Size()-off)
		a, err := io.ReadAll(io.NewSectionReader(f, off, length))
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(io.NewSectionReader(g, off, length))
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(a, b) {
			t.Fatalf("%s differs in [%d, %d) (seed %d)", got, off, off+length, seed)
		}
	}
}
