package e2e_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// extended reports whether tests are to take their time: HOLDFAST_EXTENDED is set.
func extended() bool { return os.Getenv("HOLDFAST_EXTENDED") != "" }

// times returns how often something is done, usually and in the extended form.
func times(usual, long int) int {
	if extended() {
		return long
	}
	return usual
}

// chronicle is a repository whose commands are cut short, and what they promised.
type chronicle struct {
	*repo
	t       *testing.T
	rng     *rand.Rand
	source  string            // the disk that is backed up
	sources map[string]string // what each point that must be there holds
	gone    map[string]bool   // points that were deleted
	doomed  string            // the point that a command is deleting
	usual   map[string]time.Duration
}

func newChronicle(t *testing.T, r *repo, seed uint64) *chronicle {
	c := &chronicle{
		repo: r, t: t, rng: newRand(seed), source: noiseDisk(t, 4*miB, seed),
		sources: map[string]string{}, gone: map[string]bool{}, usual: map[string]time.Duration{},
	}
	c.sources[r.backup(c.source).Point] = copyFile(t, c.source)
	return c
}

// pick returns a command, and changes the disk before a backup.
func (c *chronicle) pick() []string {
	kind := c.rng.IntN(8)
	if kind < 2 && len(c.sources) > 1 {
		for c.doomed = range c.sources {
			break
		}
		return []string{"point", "delete", c.doomed}
	}
	switch kind {
	case 3:
		return []string{"repo", "gc"}
	case 4:
		return []string{"repo", "verify"}
	case 5:
		return []string{"repo", "rebuild-index"}
	}
	overwrite(c.t, c.source, c.rng, 10)
	return []string{"backup", "image", c.source, "--vm", "vm", "--json"}
}

// cut starts a command and calls stop at a random moment of it, and reports whether the
// command was still running.
func (c *chronicle) cut(stop func(p *process)) bool {
	c.t.Helper()
	args := c.pick()
	name := args[1]
	out, err := os.Create(filepath.Join(c.t.TempDir(), "out"))
	if err != nil {
		c.t.Fatal(err)
	}
	defer out.Close()
	began := time.Now()
	p := c.start(out, args...)
	usual := max(c.usual[name], 50*time.Millisecond)
	running := true
	select {
	case <-time.After(time.Duration(c.rng.Int64N(int64(usual)))):
	case <-p.done:
		running = false
		c.usual[name] = time.Since(began)
	}
	stop(p)
	if p.wait() == 0 {
		if running { // it ended by itself, later than it was waited for
			c.usual[name] = time.Since(began) + usual/4
		}
		c.acknowledged(name, out.Name())
	}
	return running
}

// acknowledged notes what a command has promised that ended well.
func (c *chronicle) acknowledged(name, out string) {
	switch name {
	case "image":
		text, err := os.ReadFile(out)
		if err != nil {
			c.t.Fatal(err)
		}
		c.sources[decode[backupResult](c.t, string(text)).Point] = copyFile(c.t, c.source)
	case "delete":
		delete(c.sources, c.doomed)
		c.gone[c.doomed] = true
	}
	c.doomed = ""
}

// check compares what is listed with what was promised; what was not is settled now. With
// whole set, everything is read.
func (c *chronicle) check(whole bool) {
	c.t.Helper()
	listed := map[string]bool{}
	for _, p := range c.points() {
		listed[p.ID] = true
		if c.gone[p.ID] {
			c.t.Errorf("point %s is listed, and was deleted", p.ID)
		}
		if c.sources[p.ID] == "" {
			c.sources[p.ID] = copyFile(c.t, c.source)
			c.intact(c.t, p.ID, c.source)
		}
	}
	if c.doomed != "" && !listed[c.doomed] {
		delete(c.sources, c.doomed)
		c.gone[c.doomed] = true
	}
	c.doomed = ""
	for id := range c.sources {
		if !listed[id] {
			c.t.Errorf("point %s was made and is not listed", id)
		}
	}
	if !whole {
		return
	}
	for id, source := range c.sources {
		c.intact(c.t, id, source)
	}
	c.verified()
}

// TestKillAny kills commands of all kinds at random moments.
func TestKillAny(t *testing.T) {
	t.Parallel()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	c := newChronicle(t, newRepo(t), seed)
	want := times(24, 1000)
	killed, attempts := 0, 0
	for ; killed < want && attempts < 10*want; attempts++ {
		if c.cut(func(p *process) { _ = p.cmd.Process.Kill() }) {
			killed++
		}
		c.check(attempts%20 == 0)
		if t.Failed() {
			t.Fatalf("after command %d", attempts+1)
		}
	}
	t.Logf("%d of %d commands killed", killed, attempts)
	if killed < want {
		t.Errorf("only %d of %d commands met their kill, want %d", killed, attempts, want)
	}
	c.check(true)
	c.ok("repo", "gc")
	c.check(true)
}

// TestKillInit kills the making of a repository: it is there afterwards, or can be made.
func TestKillInit(t *testing.T) {
	t.Parallel()
	rng := newRand(rand.Uint64())
	usual := 100 * time.Millisecond
	for range times(5, 100) {
		r := &repo{t: t, data: filepath.Join(t.TempDir(), "new", "data")}
		began := time.Now()
		p := r.start(nil, "init")
		select {
		case <-time.After(time.Duration(rng.Int64N(int64(usual)))):
		case <-p.done:
			usual = time.Since(began)
		}
		_ = p.cmd.Process.Kill()
		_ = p.wait()
		if res := r.run("point", "list"); res.code != 0 {
			r.ok("init")
		}
		source := noiseDisk(t, miB, rng.Uint64())
		r.intact(t, r.backup(source).Point, source)
	}
}

// mountLoop makes a file system of some MiB and mounts it until the test ends. It returns
// its folder and a function that mounts it anew, from a copy of the image: a mount namespace
// of somebody else may keep the old one, and what it does not write any more.
func mountLoop(t *testing.T, size int64, mkfs ...string) (dir string, again func()) {
	t.Helper()
	image, dir := filepath.Join(t.TempDir(), "image"), filepath.Join(t.TempDir(), "mounted")
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, size*miB), os.Mkdir(dir, 0o700)); err != nil {
		t.Fatal(err)
	}
	run := func(args ...string) error {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("%v: %w: %s (the test must run as root, with loop devices)", args, err, out)
		}
		return nil
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(run(append(mkfs, image)...))
	must(run("mount", "-o", "loop", image, dir))
	t.Cleanup(func() {
		if err := run("umount", "--lazy", dir); err != nil {
			t.Error(err)
		}
	})
	return dir, func() {
		t.Helper()
		must(run("umount", dir))
		must(run("cp", "--sparse=always", image, image+"-next"))
		must(os.Rename(image+"-next", image))
		must(run("mount", "-o", "loop", image, dir))
	}
}

// TestFileSystemShutDown has a real file system stop at random moments and forget what its
// journal has not written, as a loss of power has it.
func TestFileSystemShutDown(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		mkfs []string
	}{
		{"ext4", []string{"mkfs.ext4", "-q"}},
		{"xfs", []string{"mkfs.xfs", "-q"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			dir, again := mountLoop(t, 400, tt.mkfs...)
			r := &repo{t: t, data: filepath.Join(dir, "data")}
			r.ok("init")
			c := newChronicle(t, r, seed)
			want := times(2, 20)
			shut, attempts := 0, 0
			for ; shut < want && attempts < 20*want; attempts++ {
				if c.cut(func(*process) { shutDown(t, dir) }) {
					shut++
				}
				again()
				c.check(attempts%5 == 0)
				if t.Failed() {
					t.Fatalf("after command %d", attempts+1)
				}
			}
			t.Logf("%d of %d commands met a shutdown", shut, attempts)
			if shut < want {
				t.Errorf("only %d of %d commands met a shutdown, want %d", shut, attempts, want)
			}
			c.check(true)
		})
	}
}

// shutDown stops a file system without writing its journal.
func shutDown(t *testing.T, dir string) {
	t.Helper()
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	// Source: ext4.h, EXT4_IOC_SHUTDOWN, and xfs_fs.h, XFS_IOC_GOINGDOWN, which are the
	// same; 2 flushes no log.
	if err := unix.IoctlSetPointerInt(int(f.Fd()), 0x8004587d, 2); err != nil {
		t.Fatal(err)
	}
}

// TestCopyWhileBackingUp copies a repository's folder with cp while backups run: what was
// listed when the copy began is whole in it.
func TestCopyWhileBackingUp(t *testing.T) {
	t.Parallel()
	r := newRepo(t)
	source := noiseDisk(t, 32*miB, 71)
	sources := map[string]string{r.backup(source).Point: copyFile(t, source)}
	rng := newRand(72)
	overwrite(t, source, rng, 100)
	sources[r.backup(source).Point] = copyFile(t, source)
	for range times(2, 20) {
		listed := map[string]bool{}
		for id := range sources {
			listed[id] = true
		}
		overwrite(t, source, rng, 300)
		p := r.start(nil, "backup", "image", source, "--vm", "vm")
		to := &repo{t: t, data: filepath.Join(t.TempDir(), "copy")}
		// A temporary file may go while it is copied; cp then says so and goes on.
		out, err := exec.CommandContext(t.Context(), "cp", "-r", r.data, to.data).CombinedOutput()
		if _, ok := errors.AsType[*exec.ExitError](err); err != nil && !ok {
			t.Fatalf("cp: %v\n%s", err, out)
		}
		if code := p.wait(); code != 0 {
			t.Fatalf("backup: exit status %d\n%s", code, p.stderr)
		}
		for _, point := range r.points() {
			if sources[point.ID] == "" {
				sources[point.ID] = copyFile(t, source)
			}
		}
		for id := range listed {
			to.intact(t, id, sources[id])
		}
		if t.Failed() {
			t.Fatalf("cp: %v\n%s", err, out)
		}
	}
}
