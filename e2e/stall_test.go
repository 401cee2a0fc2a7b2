package e2e_test

import (
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// rule says what becomes of an operation on a file of a faultyMount, by the file's path in
// it: an error, a hang until the mount is healed, or neither.
type rule func(op, path string) (hang bool, fails syscall.Errno)

// hangs is the rule by which operations on files whose paths contain a text hang.
func hangs(op, name string) rule {
	return func(o, path string) (bool, syscall.Errno) {
		return (op == "" || o == op) && strings.Contains(path, name), 0
	}
}

// faultyMount is a folder on a FUSE file system whose operations hang or fail at will, as those of an
// NFS server do that is gone: nothing but the end of their process can interrupt them.
type faultyMount struct {
	fuse.RawFileSystem
	dir string

	mu    sync.Mutex // guards the fields below
	paths map[uint64]string
	rule  rule
	heals chan struct{} // closed when what hangs goes on
	hung  int           // operations that hang
}

// newFaultyMount mounts a file system until the end of the test.
func newFaultyMount(t *testing.T) *faultyMount {
	t.Helper()
	root, err := fs.NewLoopbackRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	m := &faultyMount{
		RawFileSystem: fs.NewNodeFS(root, &fs.Options{}), dir: t.TempDir(),
		paths: map[uint64]string{fuse.FUSE_ROOT_ID: ""}, heals: make(chan struct{}),
	}
	server, err := fuse.NewServer(m, m.dir, &fuse.MountOptions{
		FsName: "faulty", DirectMount: true, DisableXAttrs: true, DisableSplice: true, MaxBackground: 64,
		DisableReadDirPlus: true, // Lookup shall name the files
	})
	if err != nil {
		t.Fatal(err)
	}
	go server.Serve()
	if err := server.WaitMount(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		m.heal()
		if server.Unmount() != nil {
			_ = syscall.Unmount(m.dir, syscall.MNT_DETACH|syscall.MNT_FORCE)
		}
		server.Wait()
	})
	return m
}

// setRule has the rule be followed from now on.
func (m *faultyMount) setRule(r rule) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.rule = r
}

// heal lets everything go on that hangs, and nothing hang or fail from now on.
func (m *faultyMount) heal() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.rule = nil
	close(m.heals)
	m.heals = make(chan struct{})
}

// hanging returns how many operations hang.
func (m *faultyMount) hanging() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.hung
}

// gate does to an operation what the rule says.
func (m *faultyMount) gate(op string, h *fuse.InHeader, name string) fuse.Status {
	m.mu.Lock()
	r, heals := m.rule, m.heals
	full := path.Join(m.paths[h.NodeId], name)
	m.mu.Unlock()
	if r == nil {
		return fuse.OK
	}
	hang, errno := r(op, full)
	if !hang {
		return fuse.Status(errno)
	}
	m.mu.Lock()
	m.hung++
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		m.hung--
		m.mu.Unlock()
	}()
	for {
		select {
		case <-heals:
			return fuse.OK
		case <-time.After(20 * time.Millisecond):
			if killed(h.Pid) {
				return fuse.EINTR
			}
		}
	}
}

// killed reports whether a thread is gone, or is to end at once.
func killed(thread uint32) bool {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", thread))
	_, pending, _ := strings.Cut(string(status), "SigPnd:")
	signals, _ := strconv.ParseUint(strings.TrimSpace(strings.SplitN(pending, "\n", 2)[0]), 16, 64)
	return err != nil || signals&(1<<(syscall.SIGKILL-1)) != 0
}

// named notes which file a node is.
func (m *faultyMount) named(parent uint64, name string, out *fuse.EntryOut, s fuse.Status) fuse.Status {
	if s.Ok() {
		m.mu.Lock()
		m.paths[out.NodeId] = path.Join(m.paths[parent], name)
		m.mu.Unlock()
	}
	return s
}

func (m *faultyMount) Lookup(cancel <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	if s := m.gate("lookup", h, name); !s.Ok() {
		return s
	}
	return m.named(h.NodeId, name, out, m.RawFileSystem.Lookup(cancel, h, name, out))
}

func (m *faultyMount) Create(cancel <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	if s := m.gate("create", &in.InHeader, name); !s.Ok() {
		return s
	}
	s := m.RawFileSystem.Create(cancel, in, name, out)
	ask(&out.OpenOut)
	return m.named(in.NodeId, name, &out.EntryOut, s)
}

// ask has the kernel ask for reads and writes of a file, and not do them by itself.
func ask(out *fuse.OpenOut) {
	out.OpenFlags &^= fuse.FOPEN_PASSTHROUGH
	out.BackingID = 0
}

func (m *faultyMount) Mkdir(cancel <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	if s := m.gate("mkdir", &in.InHeader, name); !s.Ok() {
		return s
	}
	return m.named(in.NodeId, name, out, m.RawFileSystem.Mkdir(cancel, in, name, out))
}

func (m *faultyMount) Open(cancel <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	if s := m.gate("open", &in.InHeader, ""); !s.Ok() {
		return s
	}
	s := m.RawFileSystem.Open(cancel, in, out)
	ask(out)
	return s
}

func (m *faultyMount) Read(cancel <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	if s := m.gate("read", &in.InHeader, ""); !s.Ok() {
		return nil, s
	}
	return m.RawFileSystem.Read(cancel, in, buf)
}

func (m *faultyMount) Write(cancel <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	if s := m.gate("write", &in.InHeader, ""); !s.Ok() {
		return 0, s
	}
	return m.RawFileSystem.Write(cancel, in, data)
}

func (m *faultyMount) Writev(cancel <-chan struct{}, in *fuse.WriteIn, data [][]byte) (uint32, fuse.Status) {
	if s := m.gate("write", &in.InHeader, ""); !s.Ok() {
		return 0, s
	}
	return m.RawFileSystem.Writev(cancel, in, data)
}

func (m *faultyMount) Fsync(cancel <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	if s := m.gate("fsync", &in.InHeader, ""); !s.Ok() {
		return s
	}
	return m.RawFileSystem.Fsync(cancel, in)
}

func (m *faultyMount) FsyncDir(cancel <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	if s := m.gate("fsync", &in.InHeader, ""); !s.Ok() {
		return s
	}
	return m.RawFileSystem.FsyncDir(cancel, in)
}

func (m *faultyMount) Rename(cancel <-chan struct{}, in *fuse.RenameIn, from, to string) fuse.Status {
	if s := m.gate("rename", &in.InHeader, to); !s.Ok() {
		return s
	}
	return m.RawFileSystem.Rename(cancel, in, from, to)
}

func (m *faultyMount) Unlink(cancel <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	if s := m.gate("unlink", h, name); !s.Ok() {
		return s
	}
	return m.RawFileSystem.Unlink(cancel, h, name)
}

func (m *faultyMount) SetAttr(cancel <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	if s := m.gate("setattr", &in.InHeader, ""); !s.Ok() {
		return s
	}
	return m.RawFileSystem.SetAttr(cancel, in, out)
}

func (m *faultyMount) GetAttr(cancel <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	if s := m.gate("getattr", &in.InHeader, ""); !s.Ok() {
		return s
	}
	return m.RawFileSystem.GetAttr(cancel, in, out)
}

func (m *faultyMount) ReadDir(cancel <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	if s := m.gate("readdir", &in.InHeader, ""); !s.Ok() {
		return s
	}
	return m.RawFileSystem.ReadDir(cancel, in, out)
}

func (m *faultyMount) StatFs(cancel <-chan struct{}, h *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	if s := m.gate("statfs", h, ""); !s.Ok() {
		return s
	}
	return m.RawFileSystem.StatFs(cancel, h, out)
}

// Commands on storage that hangs fail in time and say which file it is; nothing that was listed
// is lost.
func TestStalledStorage(t *testing.T) {
	t.Parallel()
	source := noiseDisk(t, 2*miB, 1)
	changed := noiseDisk(t, 3*miB, 2)
	for _, tt := range []struct {
		name string
		rule rule
		args []string
		says string
	}{
		{"open, configuration", hangs("", "repository.json"), []string{"point", "list"}, "repository.json"},
		{"open, lock", hangs("", "data/lock"), []string{"point", "list"}, "lock"},
		{"open, points", hangs("readdir", "data/points"), []string{"point", "list"}, "points"},
		{"open, a point", hangs("open", "data/points"), []string{"point", "list"}, "points"},
		{"open, index", hangs("open", "data/index"), []string{"repo", "stats"}, "index"},
		{"open, index's pages", hangs("read", "data/index"), []string{"repo", "stats"}, "index"},
		{"open, space", hangs("statfs", ""), []string{"repo", "stats"}, "data"},
		{"backup, write", hangs("write", "data/segments"), []string{"backup", "image", changed, "--vm", "vm"}, "segments"},
		{"backup, sync", hangs("fsync", "data/segments"), []string{"backup", "image", changed, "--vm", "vm"}, "segments"},
		{"backup, index", hangs("fsync", "data/index"), []string{"backup", "image", changed, "--vm", "vm"}, "index"},
		{"backup, point", hangs("rename", "data/points"), []string{"backup", "image", changed, "--vm", "vm"}, "points"},
		{"backup, everything", hangs("", ""), []string{"backup", "image", changed, "--vm", "vm"}, "data"},
		{"restore", hangs("read", "data/segments"), []string{"restore", "image", "vm@latest", "--to", filepath.Join(t.TempDir(), "to.raw")}, "segments"},
		{"verify", hangs("read", "data/segments"), []string{"repo", "verify"}, "segments"},
		{"gc", hangs("open", "data/segments"), []string{"repo", "gc"}, "segments"},
		{"delete", hangs("", "data/points"), []string{"point", "delete", "vm@latest"}, "points"},
		{"rebuild", hangs("open", "data/segments"), []string{"repo", "rebuild-index"}, "segments"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			m := newFaultyMount(t)
			r := &repo{t: t, data: filepath.Join(m.dir, "data")}
			r.ok("init")
			point := r.backup(source).Point
			m.setRule(tt.rule)
			p := r.start(nil, append([]string{"--storage-timeout", "1s"}, tt.args...)...)
			code := ended(t, m, p)
			if code != exitFailed || !strings.Contains(p.stderr.String(), "does not answer") || !strings.Contains(p.stderr.String(), tt.says) {
				t.Errorf("got exit status %d and %s, want a failure that names %s", code, p.stderr, tt.says)
			}
			m.heal()
			r.intact(t, point, source)
			r.verified()
		})
	}
}

// A backup whose source hangs fails, and so does a restore to a file that does.
func TestStalledImage(t *testing.T) {
	t.Parallel()
	m := newFaultyMount(t)
	r := newRepo(t)
	source := noiseDisk(t, 2*miB, 3)
	point := r.backup(source).Point
	image := filepath.Join(m.dir, "image.raw")
	r.ok("restore", "image", point, "--to", image)
	for _, tt := range []struct {
		rule rule
		args []string
	}{
		{hangs("read", "image.raw"), []string{"backup", "image", image, "--vm", "other"}},
		{hangs("write", "new.raw"), []string{"restore", "image", point, "--to", filepath.Join(m.dir, "new.raw")}},
		{hangs("fsync", "new.raw"), []string{"restore", "image", point, "--to", filepath.Join(m.dir, "new.raw")}},
	} {
		m.setRule(tt.rule)
		p := r.start(nil, append([]string{"--storage-timeout", "1s"}, tt.args...)...)
		if code := ended(t, m, p); code != exitFailed || !strings.Contains(p.stderr.String(), m.dir) {
			t.Errorf("%q: got exit status %d and %s, want a failure that names the file", tt.args, code, p.stderr)
		}
		m.heal()
	}
	if points := r.points(); len(points) != 1 {
		t.Errorf("got points %+v, want the first alone", points)
	}
	r.intact(t, point, source)
}

// Ctrl-C ends a backup on storage that hangs before the storage counts as stalled.
func TestInterruptStalled(t *testing.T) {
	t.Parallel()
	m := newFaultyMount(t)
	r := &repo{t: t, data: filepath.Join(m.dir, "data")}
	r.ok("init")
	source := noiseDisk(t, 2*miB, 4)
	point := r.backup(source).Point
	m.setRule(hangs("fsync", "data/segments"))
	p := r.start(nil, "backup", "image", noiseDisk(t, 2*miB, 5), "--vm", "vm")
	p.until("a hang", func() bool { return m.hanging() > 0 })
	if err := p.cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if code := ended(t, m, p); code != exitInterrupted || !strings.Contains(p.stderr.String(), "does not answer") {
		t.Errorf("got exit status %d and %s, want it interrupted", code, p.stderr)
	}
	m.heal()
	r.intact(t, point, source)
	r.verified()
}

// Storage that fails fails what is done with it, with the file's name, and nothing counts as damaged
// once it works again.
func TestFailingStorage(t *testing.T) {
	t.Parallel()
	m := newFaultyMount(t)
	r := &repo{t: t, data: filepath.Join(m.dir, "data")}
	r.ok("init")
	source, changed := noiseDisk(t, 2*miB, 6), filepath.Join(t.TempDir(), "changed.raw")
	seed := uint64(7)
	point := r.backup(source).Point
	for _, errno := range []syscall.Errno{syscall.EIO, syscall.ENOTCONN, syscall.ESTALE, syscall.EROFS} {
		for _, tt := range []struct {
			op, name string
			args     []string
		}{
			{"write", "data/segments", []string{"backup", "image", changed, "--vm", "vm"}},
			{"fsync", "data/segments", []string{"backup", "image", changed, "--vm", "vm"}},
			{"rename", "data/points", []string{"backup", "image", changed, "--vm", "vm"}},
			{"read", "data/segments", []string{"restore", "image", point, "--to", filepath.Join(t.TempDir(), "to")}},
		} {
			seed++ // what a backup stored before it failed is found by the next
			if err := os.Rename(noiseDisk(t, 2*miB, seed), changed); err != nil {
				t.Fatal(err)
			}
			m.setRule(func(op, path string) (bool, syscall.Errno) {
				if op == tt.op && strings.Contains(path, tt.name) {
					return false, errno
				}
				return false, 0
			})
			res := r.run(tt.args...)
			if res.code == 0 || !strings.Contains(res.stderr, tt.name) && !strings.Contains(res.stderr, "segment") {
				t.Errorf("%v of a %s: %v\nwant a failure that names the file", errno, tt.op, res)
			}
			m.heal()
		}
		r.verified()
	}
	r.intact(t, point, source)
	if points := r.points(); len(points) != 1 {
		t.Errorf("got points %+v, want the first alone", points)
	}
	r.intact(t, r.backup(changed).Point, changed)
}

// ended waits for the end of a process that works with a mount, and returns its exit status.
func ended(t *testing.T, m *faultyMount, p *process) int {
	t.Helper()
	select {
	case <-p.done:
	case <-time.After(30 * time.Second):
		_ = p.cmd.Process.Signal(syscall.SIGQUIT)
		t.Errorf("%q runs on", p.cmd.Args[1:])
		time.Sleep(time.Second)
		_ = p.cmd.Process.Kill()
		m.heal()
		<-p.done
	}
	return p.cmd.ProcessState.ExitCode()
}
