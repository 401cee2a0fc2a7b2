package fusefs_test

import (
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/fusefs"
)

func TestTree(t *testing.T) {
	t.Parallel()
	disk := newDisk(3*mib+100, 0, 64<<10, mib, mib+64<<10)
	m, _ := mount(t, oneDisk(disk))
	var got []string
	err := filepath.WalkDir(m.Dir(), func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		line := fmt.Sprintf("%v %s", info.Mode(), strings.TrimPrefix(path, m.Dir()))
		if info.Mode().IsRegular() {
			line += fmt.Sprintf(" %d %s", info.Size(), info.ModTime().UTC().Format(time.RFC3339))
		}
		got = append(got, line)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"dr-xr-x--- ",
		"dr-xr-x--- /web",
		"dr-xr-x--- /" + pointDir,
		"dr-xr-x--- /" + pointDir + "/disks",
		"-r--r----- /" + pointDir + "/disks/vda.raw 3145828 2026-11-22T01:02:03Z",
		"-r--r----- /" + pointDir + "/point.json 3 2026-11-22T01:02:03Z",
		"-r--r----- /" + pointDir + "/vm.xml 10 2026-11-22T01:02:03Z",
		"Lrwxrwxrwx /web/latest",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if b, err := os.ReadFile(filepath.Join(m.Dir(), "web/latest/vm.xml")); string(b) != "<domain/>\n" || err != nil {
		t.Errorf("vm.xml: got %q, %v", b, err)
	}
	if _, err := os.Stat(filepath.Join(m.Dir(), pointDir, "disks/vdb.raw")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing disk: got %v, want not exist", err)
	}
	if open, opens := disk.isOpen(); open != 0 || opens != 0 {
		t.Errorf("looking at the tree opened the disk %d times", opens)
	}
}

func TestAllowOther(t *testing.T) {
	t.Parallel()
	m := mountAt(t, t.TempDir(), oneDisk(newDisk(mib)), fusefs.Options{AllowOther: true, FSName: "holdfast:/var/lib/x y"})
	for name, want := range map[string]fs.FileMode{"": 0o555, "web": 0o555, pointDir + "/vm.xml": 0o444} {
		info, err := os.Stat(filepath.Join(m.Dir(), name))
		if err != nil || info.Mode().Perm() != want {
			t.Errorf("%q: got %v, %v, want %v", name, info.Mode(), err, want)
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(fusefs.ParseMountinfo(string(mounts)), func(s string) bool {
		return strings.Contains(s, " "+m.Dir()+" fuse.holdfast holdfast:/var/lib/x y")
	})
	if i < 0 {
		t.Errorf("mountinfo lacks the mount with its source:\n%s", mounts)
	}
}

func TestStatfs(t *testing.T) {
	t.Parallel()
	m, _ := mount(t, oneDisk(newDisk(mib)))
	var st unix.Statfs_t
	if err := unix.Statfs(filepath.Join(m.Dir(), pointDir), &st); err != nil {
		t.Fatal(err)
	}
	wantFlags := int64(unix.ST_RDONLY | unix.ST_NOSUID | unix.ST_NODEV | unix.ST_NOEXEC)
	if st.Bsize != 4096 || st.Bavail != 0 || st.Namelen != 255 || st.Flags&wantFlags != wantFlags {
		t.Errorf("got %+v, want blocks of 4096, none free, names of 255, flags %#x", st, wantFlags)
	}
}

// The lists follow the source, and what stays keeps its identity.
func TestPointsComeAndGo(t *testing.T) {
	t.Parallel()
	src := oneDisk(newDisk(mib, 0, mib))
	m, _ := mount(t, src)
	exists := func(name string) bool {
		_, err := os.Lstat(filepath.Join(m.Dir(), name))
		return err == nil
	}
	latest := func() string {
		target, _ := os.Readlink(filepath.Join(m.Dir(), "web/latest"))
		return target
	}
	const first, second = "web/2026-11-22T01:02:03Z", "web/2026-11-22T02:02:03.5Z"
	if !exists(first) || exists(second) || latest() != filepath.Base(first) {
		t.Fatalf("at first: got latest %q", latest())
	}
	before, err := os.Stat(filepath.Join(m.Dir(), first, "vm.xml"))
	if err != nil {
		t.Fatal(err)
	}
	src.add("web", memPoint{Point: fusefs.Point{ID: "2", Time: pointTime.Add(time.Hour + time.Second/2)}})
	src.add("db", memPoint{Point: fusefs.Point{ID: "3", Time: pointTime}})
	if !exists(second) || !exists("db/latest/disks") {
		t.Error("a new point or VM is not there at once when it is looked up for the first time")
	}
	eventually(t, "latest names the new point", func() bool { return latest() == filepath.Base(second) })
	if names := readNames(t, filepath.Join(m.Dir(), "web")); !slices.Equal(names, []string{filepath.Base(first), filepath.Base(second), "latest"}) {
		t.Errorf("list: got %q", names)
	}
	src.remove("web", "2")
	eventually(t, "the deleted point vanishes", func() bool { return !exists(second) })
	eventually(t, "latest goes back", func() bool { return latest() == filepath.Base(first) })
	after, err := os.Stat(filepath.Join(m.Dir(), first, "vm.xml"))
	if err != nil || !os.SameFile(before, after) {
		t.Errorf("a file of a point that stayed became another one: %v", err)
	}
	// The same name, another point: not the old one's files.
	src.remove("web", "1f00aa27c0ffee")
	src.add("web", memPoint{Point: fusefs.Point{ID: "4", Time: pointTime}, files: map[string][]byte{"vm.xml": []byte("another")}})
	eventually(t, "the new point takes the name", func() bool {
		b, _ := os.ReadFile(filepath.Join(m.Dir(), first, "vm.xml"))
		return string(b) == "another"
	})
}

func TestSourceErrors(t *testing.T) {
	t.Parallel()
	src := oneDisk(newDisk(mib, 0, mib))
	m, log := mount(t, src)
	src.fail(errors.New("repository went away"))
	if _, err := os.ReadDir(m.Dir()); !errors.Is(err, syscall.EIO) {
		t.Errorf("list: got %v, want EIO", err)
	}
	if _, err := os.Stat(filepath.Join(m.Dir(), "web")); !errors.Is(err, syscall.EIO) {
		t.Errorf("lookup: got %v, want EIO", err)
	}
	if !strings.Contains(log.String(), "repository went away") {
		t.Errorf("log lacks the cause: %s", log)
	}
	src.fail(nil)
	if _, err := os.Stat(filepath.Join(m.Dir(), pointDir, "vm.xml")); err != nil {
		t.Errorf("after the error: %v", err)
	}
	// A point that is deleted between list and look.
	dir := open(t, filepath.Join(m.Dir(), pointDir, "disks"))
	src.remove("web", "1f00aa27c0ffee")
	var st unix.Stat_t
	if err := unix.Fstatat(int(dir.Fd()), "vda.raw", &st, 0); err != nil {
		t.Errorf("what is known stays visible through an open folder: %v", err)
	}
	if _, err := unix.Openat(int(dir.Fd()), "vda.raw", unix.O_RDONLY, 0); !errors.Is(err, unix.ENOENT) {
		t.Errorf("open of a disk of a deleted point: got %v, want ENOENT", err)
	}
}

// There is nothing to write back, so fsync succeeds as it does on any read-only file.
func TestFsync(t *testing.T) {
	t.Parallel()
	m, _ := mount(t, oneDisk(newDisk(mib)))
	for _, name := range []string{"", "web", pointDir + "/vm.xml", diskPath} {
		if err := open(t, filepath.Join(m.Dir(), name)).Sync(); err != nil {
			t.Error(err)
		}
	}
}

func TestReadOnly(t *testing.T) {
	t.Parallel()
	m, _ := mount(t, oneDisk(newDisk(mib, 0, mib)))
	dir := filepath.Join(m.Dir(), pointDir)
	file, missing := filepath.Join(dir, "disks/vda.raw"), filepath.Join(dir, "new")
	create := func(flags int) func() error {
		return func() error { _, err := unix.Open(missing, flags, 0o600); return err }
	}
	write := func(flags int) func() error {
		return func() error { _, err := unix.Open(file, flags, 0); return err }
	}
	calls := map[string]func() error{
		"open for writing":  write(unix.O_WRONLY),
		"open read-write":   write(unix.O_RDWR),
		"open for append":   write(unix.O_WRONLY | unix.O_APPEND),
		"open and truncate": write(unix.O_WRONLY | unix.O_TRUNC),
		"create":            create(unix.O_CREAT | unix.O_WRONLY),
		"create exclusive":  create(unix.O_CREAT | unix.O_EXCL | unix.O_RDWR),
		"tmpfile":           func() error { _, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR, 0o600); return err },
		"truncate":          func() error { return unix.Truncate(file, 0) },
		"mkdir":             func() error { return unix.Mkdir(missing, 0o700) },
		"mknod":             func() error { return unix.Mknod(missing, unix.S_IFIFO|0o600, 0) },
		"symlink":           func() error { return unix.Symlink("x", missing) },
		"link":              func() error { return unix.Link(file, missing) },
		"unlink":            func() error { return unix.Unlink(file) },
		"rmdir":             func() error { return unix.Rmdir(filepath.Join(dir, "disks")) },
		"rename":            func() error { return unix.Rename(file, missing) },
		"rename exchange": func() error {
			return unix.Renameat2(unix.AT_FDCWD, file, unix.AT_FDCWD, filepath.Join(dir, "vm.xml"), unix.RENAME_EXCHANGE)
		},
		"chmod":         func() error { return unix.Chmod(file, 0o777) },
		"chown":         func() error { return unix.Lchown(file, 1, 1) },
		"utimes":        func() error { return unix.Utimes(file, make([]unix.Timeval, 2)) },
		"setxattr":      func() error { return unix.Setxattr(file, "user.x", []byte("1"), 0) },
		"removexattr":   func() error { return unix.Removexattr(file, "user.x") },
		"mkdir at root": func() error { return unix.Mkdir(filepath.Join(m.Dir(), "vm"), 0o700) },
		"unlink latest": func() error { return unix.Unlink(filepath.Join(m.Dir(), "web/latest")) },
		"access for w":  func() error { return unix.Access(file, unix.W_OK) },
	}
	for name, call := range calls {
		if err := call(); err != unix.EROFS {
			t.Errorf("%s: got %v, want EROFS", name, err)
		}
	}
}

func TestFileName(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("x", 300)
	tests := []struct{ name, suffix, want string }{
		{"web", "", "web"},
		{"web", ".raw", "web.raw"},
		{"", "", "%"},
		{"", ".raw", "%.raw"},
		{".", "", "%2E"},
		{"..", "", "%2E."},
		{"..", ".raw", "...raw"},
		{"...", "", "..."},
		{"a/b", "", "a%2Fb"},
		{"../../etc/passwd", "", "..%2F..%2Fetc%2Fpasswd"},
		{"nul\x00 esc\x1b[2J nl\n del\x7f", "", "nul%00 esc%1B[2J nl%0A del%7F"},
		{"100%", "", "100%25"},
		{"a%2Fb", "", "a%252Fb"},
		{"disks", "", "%64isks"},
		{"Grüße 🦊", "", "Grüße 🦊"},
		{"\xff\xfe", "", "\xff\xfe"},
		{long[:255], "", long[:255]},
		{long[:256], "", long[:221] + "%~85e62acd750c4eb56b7b6a1d66dca5bf"},
		{long[:255], ".raw", long[:217] + "%~d22609da3ae3956ca4877056a8e580ee.raw"},
	}
	seen := make(map[string]string)
	for _, tt := range tests {
		got := fusefs.FileName(tt.name, tt.suffix, "disks")
		if got != tt.want {
			t.Errorf("FileName(%q, %q): got %q, want %q", tt.name, tt.suffix, got, tt.want)
		}
		if other, ok := seen[got]; ok {
			t.Errorf("%q and %q are both %q", tt.name, other, got)
		}
		seen[got] = tt.name
	}
}

// Whatever the name: a valid file name, from which the name comes back.
func FuzzFileName(f *testing.F) {
	for _, s := range []string{"", ".", "..", "a/b", "%", "%2F", "%~", "disks", "\x00", strings.Repeat("/", 100)} {
		f.Add(s, "")
		f.Add(s, ".raw")
	}
	f.Fuzz(func(t *testing.T, name, suffix string) {
		if suffix != "" && suffix != ".raw" {
			return
		}
		got := fusefs.FileName(name, suffix, "disks")
		if got == "" || got == "." || got == ".." || got == "disks" || len(got) > 255 || strings.ContainsAny(got, "/\x00") {
			t.Fatalf("FileName(%q, %q): %q is not a usable file name", name, suffix, got)
		}
		base := strings.TrimSuffix(got, suffix)
		if base == "%" || strings.Contains(base, "%~") {
			if base == "%" && name != "" || base != "%" && len(base)+len(suffix) != 255 {
				t.Fatalf("FileName(%q, %q): got %q", name, suffix, got)
			}
			return
		}
		if back, err := url.PathUnescape(base); err != nil || back != name {
			t.Fatalf("FileName(%q, %q): %q decodes to %q, %v", name, suffix, got, back, err)
		}
	})
}

func TestPointNames(t *testing.T) {
	t.Parallel()
	at := func(id string, d time.Duration) fusefs.Point {
		return fusefs.Point{ID: id, Time: pointTime.Add(d).In(time.FixedZone("", 3600))}
	}
	got := fusefs.PointNames([]fusefs.Point{
		at("aaaaaaaaaa", 0), at("bbbbbbbbbb", 0), at("bbbbbbbbbc", 0), at("x/y", 0),
		at("d", 123456789), at("e", time.Second/2), at("f", time.Second),
	})
	want := []string{
		"2026-11-22T01:02:03Z", "2026-11-22T01:02:03Z-bbbbbbbb", "2026-11-22T01:02:03Z-bbbbbbbbbc", "2026-11-22T01:02:03Z-x%2Fy",
		"2026-11-22T01:02:03.123456789Z", "2026-11-22T01:02:03.5Z", "2026-11-22T01:02:04Z",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// Odd names, through the kernel.
func TestOddNames(t *testing.T) {
	t.Parallel()
	src := &memSource{}
	names := []string{"", ".", "..", "a/b", "nul\x00nl\n", "50%", "latest", "disks", "💾", strings.Repeat("long ", 60)}
	disk := newDisk(4096, 0, 4096)
	for i, name := range names {
		src.add(name, memPoint{
			Point: fusefs.Point{ID: fmt.Sprint("id", i), Time: pointTime},
			disks: map[string]*memDisk{name: disk},
			files: map[string][]byte{name: []byte(name)},
		})
	}
	m, _ := mount(t, src)
	vms := readNames(t, m.Dir())
	if len(vms) != len(names) {
		t.Errorf("got VMs %q, want %d", vms, len(names))
	}
	for _, name := range names {
		point := filepath.Join(m.Dir(), fusefs.FileName(name, ""), "latest")
		if b, err := os.ReadFile(filepath.Join(point, fusefs.FileName(name, "", "disks"))); string(b) != name || err != nil {
			t.Errorf("file %q: got %q, %v", name, b, err)
		}
		if b, err := os.ReadFile(filepath.Join(point, "disks", fusefs.FileName(name, ".raw"))); string(b) != string(disk.data) || err != nil {
			t.Errorf("disk %q: got %d bytes, %v", name, len(b), err)
		}
	}
}

func readNames(t testing.TB, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}
