package fusefs_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/fusefs"
)

// serveEnv makes the test binary serve a mount at the folder that it names.
const serveEnv = "FUSEFS_TEST_SERVE"

// unmountEnv makes it unmount the mount of another process.
const unmountEnv = "FUSEFS_TEST_UNMOUNT"

func TestMain(m *testing.M) {
	if dir := os.Getenv(serveEnv); dir != "" {
		serve(dir)
		return
	}
	if dir := os.Getenv(unmountEnv); dir != "" {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if err := fusefs.Unmount(ctx, dir); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// serve mounts one disk at dir, says "ready", and waits until it is unmounted.
func serve(dir string) {
	m, err := fusefs.Mount(dir, oneDisk(newDisk(4*mib, 0, mib)), fusefs.Options{})
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("ready")
	if err := m.Wait(context.Background()); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

// startServer runs cmd, which serves a mount at dir in another process, and waits until it is there.
func startServer(t *testing.T, dir string, cmd *exec.Cmd) {
	t.Helper()
	cmd.Env = append(os.Environ(), serveEnv+"="+dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		forceUnmount(dir)
		cmd.Process.Kill()
		cmd.Wait()
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || line != "ready\n" {
		t.Fatalf("server: got %q, %v", line, err)
	}
}

// forceUnmount is for cleaning up after a test that failed.
func forceUnmount(dir string) { unix.Unmount(dir, unix.MNT_DETACH) }

// shortly returns a context that ends soon.
func shortly(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	t.Cleanup(cancel)
	return ctx
}

func TestMountPoint(t *testing.T) {
	t.Parallel()
	dir, src := t.TempDir(), oneDisk(newDisk(mib))
	file := filepath.Join(dir, "file")
	full := filepath.Join(dir, "full")
	used := filepath.Join(dir, "used")
	tmpfs := filepath.Join(dir, "tmpfs")
	for _, d := range []string{filepath.Join(full, "sub"), used, tmpfs} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", tmpfs, "tmpfs", 0, "size=4k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { forceUnmount(tmpfs) })
	mountAt(t, used, src, fusefs.Options{})
	for path, want := range map[string]string{
		file:                      file + " is not a folder",
		full:                      full + ` is not empty (it has "sub"); choose an empty folder`,
		used:                      used + " is already a mount (holdfast of type fuse.holdfast)",
		tmpfs:                     tmpfs + " is already a mount (tmpfs of type tmpfs)",
		filepath.Join(dir, "a/b"): "no such file or directory",
	} {
		m, err := fusefs.Mount(path, src, fusefs.Options{})
		if err == nil {
			m.Unmount(t.Context())
		}
		if !errors.Is(err, fusefs.ErrMountPoint) || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: got %v, want %q", path, err, want)
		}
	}
}

// A missing folder is made, a symbolic link followed, odd characters understood.
func TestMountPaths(t *testing.T) {
	t.Parallel()
	dir, src := t.TempDir(), oneDisk(newDisk(mib))
	odd := filepath.Join(dir, `new folder\040,x`)
	link := filepath.Join(dir, "link")
	if err := os.Symlink(odd, link); err != nil {
		t.Fatal(err)
	}
	mountAt(t, odd, src, fusefs.Options{FSName: `back\slash`})
	if _, err := os.Stat(filepath.Join(link, pointDir, "vm.xml")); err != nil {
		t.Error(err)
	}
	if err := fusefs.Unmount(t.Context(), link); err != nil {
		t.Errorf("unmount through a symbolic link: %v", err)
	}
	m := mountAt(t, link, src, fusefs.Options{})
	if m.Dir() != odd {
		t.Errorf("got %q, want %q", m.Dir(), odd)
	}
	if err := m.Unmount(t.Context()); err != nil {
		t.Error(err)
	}
	if names := readNames(t, odd); len(names) > 0 {
		t.Errorf("the folder has %q after unmounting", names)
	}
}

func TestUnmountBusy(t *testing.T) {
	t.Parallel()
	disk := newDisk(mib, 0, mib)
	m, _ := mount(t, oneDisk(disk))
	f := open(t, filepath.Join(m.Dir(), diskPath))
	for name, unmount := range map[string]func() error{
		"own mount": func() error { return m.Unmount(shortly(t)) },
		"by folder": func() error { return fusefs.Unmount(shortly(t), m.Dir()) },
	} {
		err := unmount()
		if want := fmt.Sprintf("%d (fusefs.test)", os.Getpid()); !errors.Is(err, fusefs.ErrBusy) || !errors.Is(err, context.DeadlineExceeded) ||
			!strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), m.Dir()) {
			t.Errorf("%s: got %v, want it busy with %s", name, err, want)
		}
	}
	p := make([]byte, 4096)
	if _, err := f.ReadAt(p, mib-4096); err != nil || string(p) != string(disk.data[mib-4096:]) {
		t.Errorf("read after the failed unmount: wrong bytes or %v", err)
	}
	// It succeeds as soon as the file is closed.
	result := make(chan error, 1)
	go func() { result <- m.Unmount(t.Context()) }()
	time.Sleep(50 * time.Millisecond)
	f.Close()
	if err := <-result; err != nil {
		t.Errorf("unmount after close: %v", err)
	}
	if err := m.Unmount(t.Context()); err != nil {
		t.Errorf("second unmount: %v", err)
	}
	if open, _ := disk.isOpen(); open != 0 {
		t.Errorf("after unmounting the disk is open %d times", open)
	}
}

// A mount that is torn away under open files closes its disks all the same.
func TestAbort(t *testing.T) {
	t.Parallel()
	disk := newDisk(mib, 0, mib)
	m, _ := mount(t, oneDisk(disk))
	f := open(t, filepath.Join(m.Dir(), diskPath))
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	control := filepath.Join(t.TempDir(), "fusectl")
	if err := os.Mkdir(control, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("fusectl", control, "fusectl", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer forceUnmount(control)
	abort := filepath.Join(control, fmt.Sprint(unix.Minor(st.Dev)), "abort")
	if err := os.WriteFile(abort, []byte("1"), 0); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := m.Wait(ctx); err != nil {
		t.Error(err)
	}
	if open, _ := disk.isOpen(); open != 0 {
		t.Errorf("the disk is open %d times", open)
	}
	// The dead mount is cleaned up by its own folder name too.
	if err := fusefs.Unmount(shortly(t), m.Dir()); err != nil {
		t.Error(err)
	}
}

func TestUnmountOfOthers(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	tmpfs := filepath.Join(dir, "tmpfs")
	if err := os.Mkdir(tmpfs, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", tmpfs, "tmpfs", 0, "size=4k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { forceUnmount(tmpfs) })
	for _, path := range []string{dir, tmpfs, filepath.Join(dir, "missing"), "/proc"} {
		if err := fusefs.Unmount(shortly(t), path); !errors.Is(err, fusefs.ErrNotMounted) {
			t.Errorf("%s: got %v, want ErrNotMounted", path, err)
		}
	}
	// What replaced our mount is not ours.
	m, _ := mount(t, oneDisk(newDisk(mib)))
	if err := fusefs.Unmount(t.Context(), m.Dir()); err != nil {
		t.Fatal(err)
	}
	if err := m.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	other := mountAt(t, m.Dir(), oneDisk(newDisk(mib)), fusefs.Options{})
	if err := m.Unmount(t.Context()); err != nil {
		t.Errorf("unmount of what is unmounted: %v", err)
	}
	if _, err := os.Stat(filepath.Join(other.Dir(), pointDir)); err != nil {
		t.Errorf("the other mount is gone: %v", err)
	}
}

func TestServerInAnotherProcess(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "mnt")
	cmd := exec.Command(os.Args[0])
	startServer(t, dir, cmd)
	if b, err := os.ReadFile(filepath.Join(dir, pointDir, "vm.xml")); err != nil || len(b) == 0 {
		t.Errorf("got %q, %v", b, err)
	}
	if err := fusefs.Unmount(t.Context(), dir); err != nil {
		t.Error(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("the server ended with %v", err)
	}
}

// Whatever a killed server leaves behind, the next mount works, even while somebody has a file of the dead one open.
func TestKilledServer(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "mnt")
	for round := range 2 {
		cmd := exec.Command(os.Args[0])
		startServer(t, dir, cmd)
		f := open(t, filepath.Join(dir, diskPath))
		cmd.Process.Kill()
		cmd.Wait()
		if err := unix.Statfs(dir, &unix.Statfs_t{}); err != unix.ENOTCONN {
			t.Fatalf("statfs after the kill: got %v, want ENOTCONN", err)
		}
		if round == 1 { // the second one is unmounted by hand
			if err := fusefs.Unmount(shortly(t), dir); err != nil {
				t.Errorf("unmount of a dead mount: %v", err)
			}
			continue
		}
		m := mountAt(t, dir, oneDisk(newDisk(mib, 0, mib)), fusefs.Options{})
		if _, err := os.ReadFile(filepath.Join(dir, diskPath)); err != nil {
			t.Error(err)
		}
		if err := m.Unmount(t.Context()); err != nil {
			t.Error(err)
		}
		f.Close()
	}
	if mounts, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(mounts), dir) {
		t.Errorf("something is still mounted at %s, or %v", dir, err)
	}
}

// Users other than root mount through fusermount3.
func TestUnprivileged(t *testing.T) {
	t.Parallel()
	base, err := os.MkdirTemp("", "fusefs-user")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(base) })
	dir, binary := filepath.Join(base, "mnt"), filepath.Join(base, "server")
	for _, err := range []error{os.Chmod(base, 0o755), os.Mkdir(dir, 0o700), os.Chown(dir, 65534, 65534), copyFile(binary, os.Args[0])} {
		if err != nil {
			t.Fatal(err)
		}
	}
	// A server in a mount namespace of its own, where everybody may use /dev/fuse, as udev
	// has it; the mount is seen through /proc/PID/root.
	script := `set -e
mount -t tmpfs tmpfs /dev/shm
mknod -m 666 /dev/shm/fuse c 10 229
mount --bind /dev/shm/fuse /dev/fuse
exec setpriv --reuid 65534 --regid 65534 --clear-groups "$0"`
	cmd := exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-c", script, binary)
	startServer(t, dir, cmd)
	seen := filepath.Join("/proc", fmt.Sprint(cmd.Process.Pid), "root", dir)
	mounts, err := os.ReadFile(filepath.Join("/proc", fmt.Sprint(cmd.Process.Pid), "mountinfo"))
	if err != nil {
		t.Fatal(err)
	}
	line := ""
	for l := range strings.Lines(string(mounts)) {
		if strings.Contains(l, " "+dir+" ") {
			line = l
		}
	}
	for _, want := range []string{" ro,nosuid,nodev,noexec", "fuse.holdfast holdfast", "user_id=65534", "default_permissions"} {
		if !strings.Contains(line, want) {
			t.Errorf("mountinfo has %q, want %q", line, want)
		}
	}
	// Not even root can look into the private mount of another user.
	if _, err := os.ReadDir(seen); !errors.Is(err, unix.EACCES) {
		t.Errorf("root lists the mount: got %v, want EACCES", err)
	}
	as := func(args ...string) ([]byte, error) {
		args = append([]string{
			"--target", fmt.Sprint(cmd.Process.Pid), "--mount", "setpriv",
			"--reuid", "65534", "--regid", "65534", "--clear-groups",
		}, args...)
		return exec.Command("nsenter", args...).CombinedOutput()
	}
	if out, err := as("cat", filepath.Join(dir, pointDir, "vm.xml")); string(out) != "<domain/>\n" {
		t.Errorf("the user reads %q, %v", out, err)
	}
	busy := fmt.Sprintf("exec 3<%s; %s=%s %s", filepath.Join(dir, pointDir, "vm.xml"), unmountEnv, dir, binary)
	if out, err := as("sh", "-c", busy); err == nil || !strings.Contains(string(out), "mount is in use") || !strings.Contains(string(out), "(sh)") {
		t.Errorf("unmount while in use: got %v, %s", err, out)
	}
	if out, err := as("env", unmountEnv+"="+dir, binary); err != nil {
		t.Errorf("unmount: %v, %s", err, out)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("the server ended with %v", err)
	}
}

func copyFile(to, from string) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(dst, src)
	return errors.Join(err, dst.Close())
}

// Nothing stays behind: not parallel, since it counts what the process has.
func TestNothingLeft(t *testing.T) {
	count := func() (fds, goroutines int) {
		return len(readNames(t, "/proc/self/fd")), runtime.NumGoroutine()
	}
	disk := newDisk(mib, 0, mib)
	// The first round sets up what the process keeps, such as the runtime's poller.
	var fds, goroutines int
	for range 4 {
		m, err := fusefs.Mount(filepath.Join(t.TempDir(), "mnt"), oneDisk(disk), fusefs.Options{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := os.ReadFile(filepath.Join(m.Dir(), diskPath)); err != nil {
			t.Error(err)
		}
		if err := m.Unmount(t.Context()); err != nil {
			t.Error(err)
			forceUnmount(m.Dir())
		}
		if fds == 0 {
			fds, goroutines = count()
		}
	}
	eventually(t, "files and goroutines are as few as before", func() bool {
		f, g := count()
		return f <= fds && g <= goroutines
	})
}

// One processor is where a server that waits for itself would show.
func TestOneProcessor(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, os.Args[0], "-test.run=^(TestTree|TestReads|TestParallelReads|TestTools|TestUnmountBusy|TestInterrupt)$")
	cmd.Env = append(os.Environ(), "GOMAXPROCS=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestParseMountinfo(t *testing.T) {
	t.Parallel()
	got := fusefs.ParseMountinfo(`22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
120 22 0:51 / /mnt/a\040b\134c rw,nosuid shared:7 master:2 - fuse.holdfast hold\011fast rw,user_id=0

garbage
1 2 3 - x
1 2 0:9 / /x\9 rw - t s\04
`)
	want := []string{"8:1 / ext4 /dev/sda1", "0:51 /mnt/a b\\c fuse.holdfast hold\tfast", `0:9 /x\9 t s\04`}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func FuzzParseMountinfo(f *testing.F) {
	f.Add("22 1 8:1 / / rw - ext4 /dev/sda1 rw\n")
	f.Add("120 22 0:51 / /a\\040b rw - fuse.x y\\1 rw\n")
	f.Fuzz(func(t *testing.T, text string) {
		if got := fusefs.ParseMountinfo(text); len(got) > strings.Count(text, "\n")+1 {
			t.Errorf("%d mounts in %q", len(got), text)
		}
	})
}
