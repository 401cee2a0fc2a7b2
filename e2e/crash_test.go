package e2e_test

import (
	"math/rand/v2"
	"os"
	"path/filepath"
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
	began := time.Now()
	sources[r.backup(source).Point] = copyFile(t, source)
	overwrite(t, source, rng, changes)
	sources[r.backup(source).Point] = copyFile(t, source)
	usual := time.Since(began) / 2

	killed, survived := 0, 0
	for n := range kills {
		overwrite(t, source, rng, changes)
		p := r.start(nil, "backup", "image", source, "--vm", "vm")
		timer := time.NewTimer(time.Duration(rng.Int64N(int64(usual * 5 / 4))))
		select {
		case <-timer.C:
		case <-p.done:
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
		if n%10 == 0 {
			r.verified()
		}
		if t.Failed() {
			t.Fatalf("after kill %d, seed %d", n+1, seed)
		}
	}
	t.Logf("%d of %d backups killed, %d points made meanwhile", killed, kills, survived)
	if killed < kills/2 {
		t.Errorf("only %d of %d backups met their kill: the test tests little", killed, kills)
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
