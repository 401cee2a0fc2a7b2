package e2e_test

import (
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestBoot boots a guest from an export to write to, kills the server twice
// while the guest writes, and then the guest: what the guest had on its disk is
// there, its file system is sound, and the result becomes a point.
//
// A guest outlives a server that is killed. What the server had answered must be there,
// flushed or not: the guest does not write it again, and a later flush succeeds.
func TestBoot(t *testing.T) {
	t.Parallel()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := newRand(seed)
	disk := rootDisk(t)
	folder, err := os.MkdirTemp("", "hf") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(folder) })
	socket := filepath.Join(folder, "nbd.sock")
	r := newRepo(t)
	point := r.backup(disk).Point
	serve := func() *export {
		return r.serve("export", "add", point, "--json", "--writable", "--name", "guest", "--unix", socket)
	}
	start := func() *guest {
		return boot(t, "boot.sh", "", "-blockdev", "driver=nbd,node-name=disk,server.type=unix,server.path="+socket+
			",export=guest,reconnect-delay=60,discard=unmap", "-device", "virtio-blk-pci,drive=disk")
	}
	want := files{}

	e := serve()
	g := start()
	g.checked(false)
	g.await("FILES end")
	for range 2 {
		g.written(10)
		g.await("WRITTEN .*") // the server's, no flush has followed yet
		time.Sleep(time.Duration(rng.Int64N(int64(100 * time.Millisecond))))
		_ = e.cmd.Process.Kill()
		e.wait()
		time.Sleep(time.Duration(rng.Int64N(int64(time.Second))))
		g.read = len(g.console.text())
		e = serve()
	}
	g.written(10)
	g.enter("reboot")

	// After an orderly end: nothing to mend.
	g.checked(false)
	g.await("FILES end")
	g.written(10)
	time.Sleep(time.Duration(rng.Int64N(int64(time.Second))))
	g.kill()
	want.read(g)
	e.stop()

	// After a power loss: nothing but the journal.
	e = serve()
	g = start()
	g.checked(true)
	g.await("FILES end")
	g.written(10)
	g.enter("poweroff")
	g.off()
	want.read(g)
	e.stop()

	changed := filepath.Join(folder, "changed.raw")
	r.ok("restore", "image", r.commit("guest"), "--to", changed)
	tool(t, "e2fsck", "-fn", changed)
	data := filepath.Join(dump(t, changed), "data")
	for name, hash := range want {
		if got := sum(t, filepath.Join(data, name)); got != hash {
			t.Errorf("%s in the new point: got sum %s, want %s", name, got, hash)
		}
	}
	r.intact(t, point, disk)
	r.verified()
}

// rootDisk makes a disk, without partitions, that has a guest's ext4 root.
func rootDisk(t *testing.T) string {
	t.Helper()
	folder := t.TempDir()
	root := filepath.Join(folder, "root")
	for _, name := range []string{"bin", "sbin", "data", "dev", "proc", "run"} {
		if err := os.MkdirAll(filepath.Join(root, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	tool(t, "sh", "-c", `cp "$(command -v busybox)" "$1/bin/busybox" && install testdata/init.sh "$1/sbin/init"`, "sh", root)
	tool(t, "split", "--bytes=64K", "--suffix-length=3", "--numeric-suffixes", noiseDisk(t, 120*64*kiB, 111), filepath.Join(root, "data", "old-"))
	disk := filepath.Join(folder, "root.raw")
	tool(t, "mkfs.ext4", "-q", "-E", "root_owner=0:0", "-d", root, disk, "192M")
	return disk
}

// written waits until the guest has synced n more files.
func (g *guest) written(n int) {
	g.t.Helper()
	for range n {
		g.await(`SYNCED \S+ .*`)
	}
}

// checked waits for the guest's check of its disk; only after a power loss
// may there be something to mend, and then by the journal alone.
func (g *guest) checked(lost bool) {
	g.t.Helper()
	g.await("FSCK begins")
	from := g.read
	g.await("FSCK ends")
	report := g.console.text()[from:g.read]
	if got := strings.Contains(report, "recovering journal"); got != lost {
		g.t.Errorf("journal recovered: got %v, want %v\n%s", got, lost, report)
	}
	usual := regexp.MustCompile(`^(|e2fsck .*|Pass [1-5]: .*|/dev/vda: (recovering journal|Clearing orphaned inode .*|\d+/\d+ files .* blocks)|FSCK ends)$`)
	for line := range strings.Lines(report) {
		if !usual.MatchString(strings.TrimSpace(line)) {
			g.t.Errorf("the guest's e2fsck says %q", line)
		}
	}
	g.await("BOOTED")
}

// files are those that must be on a guest's disk: the sum of each, by name.
type files map[string]string

// read takes the reports of a guest's console: what it had on its disk must be what
// it finds there whenever it looks.
func (want files) read(g *guest) {
	g.t.Helper()
	report := regexp.MustCompile(`(?m)^(SYNCED|WRITTEN|FILE|CHANGING|FILES) (?:([0-9a-f]{64})  )?(\S+)\r?$`)
	got := files{}
	looks, written := 0, 0
	for _, line := range report.FindAllStringSubmatch(g.console.text(), -1) {
		switch hash, name := line[2], line[3]; line[1] {
		case "SYNCED", "WRITTEN":
			want[name] = hash
			written++
		case "CHANGING":
			delete(want, name)
		case "FILE":
			got[name] = hash
		case "FILES":
			looks++
			for _, name := range slices.Sorted(maps.Keys(want)) {
				if got[name] != want[name] {
					g.t.Errorf("look %d of the guest: %s has sum %q, want %s", looks, name, got[name], want[name])
					delete(want, name) // once is enough
				}
			}
			got = files{}
		}
	}
	g.unharmed()
	g.t.Logf("%d files written, %d looks at the disk, %d files now", written, looks, len(want))
}
