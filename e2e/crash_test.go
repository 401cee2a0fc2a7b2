package e2e_test

import (
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// TestKill kills backups with SIGKILL at 50 random moments: whatever is listed
// afterwards is whole, and the next backup succeeds.
func TestKill(t *testing.T) {
	t.Parallel()
	const size, changes, kills = 24 * miB, 8 * miB / chunk, 50
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := newRand(seed)
	r := newRepo(t)
	source := noiseDisk(t, size, seed)
	sources := map[string]string{} // the source of each listed point
	sources[r.backup(source).Point] = copyFile(t, source)

	killed, attempts, survived := 0, 0, 0
	usual := time.Minute // how long a backup takes; learnt from those that end
	for ; killed < kills && attempts < 4*kills; attempts++ {
		overwrite(t, source, rng, changes)
		p := r.start(nil, "backup", "image", source, "--vm", "vm")
		began := time.Now()
		timer := time.NewTimer(time.Duration(rng.Int64N(int64(usual))))
		select {
		case <-timer.C:
		case <-p.done:
			usual = time.Since(began)
		}
		_ = p.cmd.Process.Kill()
		if p.wait() == -1 {
			killed++
		}
		for _, listed := range r.points() {
			if sources[listed.ID] != "" {
				continue
			}
			survived++
			sources[listed.ID] = copyFile(t, source)
			r.intact(t, listed.ID, source)
		}
		if attempts%10 == 0 {
			r.verified()
		}
		if t.Failed() {
			t.Fatalf("after backup %d, seed %d", attempts+1, seed)
		}
	}
	t.Logf("%d of %d backups killed, %d points made meanwhile", killed, attempts, survived)
	if killed < kills {
		t.Errorf("only %d of %d backups met their kill, want %d", killed, attempts, kills)
	}
	last := r.backup(source)
	sources[last.Point] = source
	points := r.points()
	if len(points) != len(sources) {
		t.Errorf("got %d points, want %d", len(points), len(sources))
	}
	for _, listed := range points {
		r.intact(t, listed.ID, sources[listed.ID])
	}
	r.verified()
	r.ok("repo", "gc")
	r.verified()
	r.intact(t, last.Point, source)
}

// TestInterrupt ends a backup as Ctrl-C does: nothing is listed, nothing is
// broken, and the same backup succeeds afterwards.
func TestInterrupt(t *testing.T) {
	t.Parallel()
	r := newRepo(t)
	source := noiseDisk(t, 384*miB, 51)
	p := r.start(nil, "backup", "image", source, "--vm", "vm")
	segments := filepath.Join(r.data, "segments")
	p.until("chunks written", func() bool { return usage(t, segments) > 4*miB })
	if code := p.interrupt(); code != exitInterrupted {
		t.Errorf("got exit status %d, want %d\n%s", code, exitInterrupted, p.stderr)
	}
	if points := r.points(); len(points) != 0 {
		t.Errorf("got points %+v, want none", points)
	}
	if err := os.Truncate(source, 32*miB); err != nil {
		t.Fatal(err)
	}
	r.intact(t, r.backup(source).Point, source)
	r.verified()
}

// TestBitRot flips a bit in a segment: verify finds it, a restore fails rather
// than give wrong bytes, and the next backup of the same content heals it.
func TestBitRot(t *testing.T) {
	t.Parallel()
	r := newRepo(t)
	source := noiseDisk(t, 16*miB, 91)
	b := r.backup(source)
	flipBit(t, filepath.Join(r.data, "segments"))

	res := r.run("repo", "verify", "--json")
	if res.code != exitFailed {
		t.Fatalf("%v\nwant exit status %d", res, exitFailed)
	}
	found := decode[struct {
		Errors []struct {
			Point  string `json:"point"`
			Disk   string `json:"disk"`
			Offset int64  `json:"offset"`
			Reason string `json:"reason"`
		} `json:"errors"`
	}](t, res.stdout).Errors
	if len(found) != 1 || found[0].Point != b.Point || found[0].Disk != b.Disks[0].Name || found[0].Offset%chunk != 0 || found[0].Reason == "" {
		t.Fatalf("got errors %+v, want one that names the point, the disk and the chunk", found)
	}
	bad := found[0].Offset
	to := filepath.Join(t.TempDir(), "restored.raw")
	line := r.fails(exitFailed, "restore", "image", b.Point, "--to", to)
	if !strings.Contains(line, strconv.FormatInt(bad, 10)) || !strings.Contains(line, b.Disks[0].Name) {
		t.Errorf("got error %q, want it to name the disk %s and the offset %d", line, b.Disks[0].Name, bad)
	}
	if _, err := os.Stat(to); err == nil {
		t.Errorf("the failed restore left %s", to)
	}
	e := r.export(b.Point)
	read := func(off int64) error {
		return exec.CommandContext(t.Context(), "qemu-io", "-r", "-f", "raw", "-c", fmt.Sprintf("read %d 4k", off), e.URI).Run()
	}
	if err := read(bad); err == nil {
		t.Errorf("reading the bad chunk over NBD succeeded")
	}
	if err := read((bad + 4*miB) % (16 * miB)); err != nil {
		t.Errorf("reading a good chunk over NBD: %v", err)
	}
	e.stop()

	if d := r.backup(source).Disks[0]; d.NewBytes == 0 {
		t.Errorf("the backup after verify stored nothing anew, want the bad chunk's content")
	}
	r.intact(t, b.Point, source)
	r.verified()
}

// flipBit damages the middle of the largest file of a folder.
func flipBit(t *testing.T, folder string) {
	t.Helper()
	var path string
	var size int64
	err := filepath.WalkDir(folder, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		if info, err := d.Info(); err == nil && info.Size() > size {
			path, size = name, info.Size()
		}
		return nil
	})
	if err != nil || size == 0 {
		t.Fatalf("no segment in %s: %v", folder, err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var b [1]byte
	if _, err := f.ReadAt(b[:], size/2); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 0x10
	if _, err := f.WriteAt(b[:], size/2); err != nil {
		t.Fatal(err)
	}
}
