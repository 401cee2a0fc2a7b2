package e2e_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"
)

// guestKernel is the folder where scripts/guest-kernel puts what guests boot from.
const guestKernel = "../.cache/guest"

// guestTimeout limits each wait for a guest. One boots in 10 s, without KVM, where
// nothing else runs.
const guestTimeout = 3 * time.Minute

// guest is a virtual machine that runs beside the test, seen through its
// serial console.
type guest struct {
	t       *testing.T
	cmd     *exec.Cmd
	stdin   io.WriteCloser // the console's keyboard
	console *console
	read    int           // how much of the console await has passed
	done    chan struct{} // closed when QEMU has ended
}

// boot starts a guest whose initramfs runs job, a script of testdata; args are QEMU's.
// Words of env, NAME=VALUE, are in the job's environment. The guest ends with
// the test at the latest.
func boot(t *testing.T, job, env string, args ...string) *guest {
	t.Helper()
	tool(t, "../scripts/guest-kernel", guestKernel)
	// TCG, for machines where /dev/kvm is absent or runs no guest. A guest that gets little
	// of the processor would take its timer to be broken: no_timer_check.
	args = append([]string{
		"-machine", "accel=tcg", "-cpu", "max", "-m", "256", "-nodefaults", "-display", "none", "-serial", "stdio",
		"-kernel", guestKernel + "/vmlinuz", "-initrd", initrd(t, job), "-append", "console=ttyS0 quiet no_timer_check " + env,
	}, args...)
	g := &guest{t: t, cmd: exec.Command("qemu-system-x86_64", args...), console: new(console), done: make(chan struct{})}
	g.cmd.Stdout, g.cmd.Stderr = g.console, g.console
	stdin, err := g.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	g.stdin = stdin
	if err := g.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(g.done)
		_ = g.cmd.Wait() // the state is read from ProcessState
	}()
	t.Cleanup(func() {
		g.kill()
		if t.Failed() {
			t.Logf("console of %s:\n%s", job, g.console.text())
		}
	})
	return g
}

// initrd returns the guests' initramfs with a script of testdata as its /job, in
// an archive behind it that begins at a multiple of 4 bytes, as the kernel demands.
func initrd(t *testing.T, job string) string {
	t.Helper()
	base, err := os.ReadFile(guestKernel + "/initrd.gz")
	if err != nil {
		t.Fatal(err)
	}
	for len(base)%4 != 0 {
		base = append(base, 0)
	}
	folder := t.TempDir()
	tool(t, "cp", filepath.Join("testdata", job), filepath.Join(folder, "job"))
	archive := tool(t, "sh", "-c", `cd "$1" && echo job | cpio -o -H newc --quiet`, "sh", folder)
	path := filepath.Join(folder, "initrd")
	if err := os.WriteFile(path, append(base, archive...), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// await waits for a line of the console behind those of the last await. It returns
// what the groups of the pattern, which stands for a whole line, match.
func (g *guest) await(pattern string) []string {
	g.t.Helper()
	line := regexp.MustCompile(`(?m)^` + pattern + `\r?\n`)
	deadline := time.Now().Add(guestTimeout)
	for ended := false; ; {
		text := g.console.text()
		if at := line.FindStringSubmatchIndex(text[g.read:]); at != nil {
			found := line.FindStringSubmatch(text[g.read:])
			g.read += at[1]
			return found[1:]
		}
		switch {
		case strings.Contains(text, "Kernel panic"): // init has ended: a command of the job failed
			g.t.Fatalf("the guest failed before %q", pattern)
		case ended:
			g.t.Fatalf("qemu: %v before %q", g.cmd.ProcessState, pattern)
		case time.Now().After(deadline):
			g.t.Fatalf("no %q on the console in %v", pattern, guestTimeout)
		}
		select {
		case <-g.done:
			ended = true // one more look at what came last
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// enter types a line at the console.
func (g *guest) enter(line string) {
	g.t.Helper()
	if _, err := io.WriteString(g.stdin, line+"\n"); err != nil {
		g.t.Fatal(err)
	}
}

// off waits until the guest has powered off.
func (g *guest) off() {
	g.t.Helper()
	select {
	case <-g.done:
	case <-time.After(guestTimeout):
		g.t.Fatalf("the guest is not off after %v", guestTimeout)
	}
	if !g.cmd.ProcessState.Success() {
		g.t.Errorf("qemu: %v", g.cmd.ProcessState)
	}
	g.unharmed()
}

// kill takes the guest's power away.
func (g *guest) kill() {
	_ = g.cmd.Process.Kill() // it may have ended
	<-g.done
}

// unharmed holds that the guest saw no error of a disk.
func (g *guest) unharmed() {
	g.t.Helper()
	for _, bad := range []string{"I/O error", "EXT4-fs error", "Kernel panic", "blocked for more than"} {
		if strings.Contains(g.console.text(), bad) {
			g.t.Errorf("got %q on the console, want a disk without errors", bad)
		}
	}
}

// consoleLimit ends a guest that prints without end.
const consoleLimit = 4 * miB

// console keeps what a guest prints; its methods may be called at any time.
type console struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.buf.Len()+len(p) > consoleLimit {
		return 0, errors.New("the console is full")
	}
	return c.buf.Write(p)
}

func (c *console) text() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.buf.String()
}
