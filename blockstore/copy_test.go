package blockstore

import (
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
)

// TestCopyWhileBackingUp copies a repository file by file, slowly and its folders in any order,
// while backups run. The copy opens, and every point that was listed when the copy began is
// whole in it; a later one is whole, missing, or known to be damaged.
func TestCopyWhileBackingUp(t *testing.T) {
	t.Parallel()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	rounds := 4
	if extended() {
		rounds = 400
	}
	for range rounds {
		parent := memoryDir(t)
		dir := createIn(t, parent, CreateOptions{})
		r := open(t, dir, Options{SegmentSize: machineSegment})
		made := map[PointID]content{}
		backUp := func() {
			c := numbers(rng.Uint32N(200), 1+rng.Uint32N(12))
			made[mustBackup(t, r, "vm", c).ID] = c
		}
		for range 1 + rng.IntN(5) {
			backUp()
		}
		before := r.Points()
		to := filepath.Join(parent, "copy")
		slowCopy(t, rng, dir, to, func() {
			switch rng.IntN(12) {
			case 0:
				backUp()
			case 1:
				if err := r.appender.finish(); err != nil { // seals
					t.Fatal(err)
				}
			}
		})
		closeOnce(t, r)
		copied := open(t, to, Options{})
		for _, p := range before {
			checkDisk(t, copied, p.ID, made[p.ID])
		}
		v, err := copied.Verify(t.Context(), VerifyOptions{})
		if err != nil {
			t.Fatal(err)
		}
		reported := map[PointID]bool{}
		for _, e := range v.Errors {
			reported[e.Point] = true
		}
		for _, p := range before {
			if reported[p.ID] {
				t.Errorf("point %s, listed before the copy began: got errors %+v", p.ID, v.Errors)
			}
		}
		for _, p := range copied.Points() {
			if !reported[p.ID] {
				checkDisk(t, copied, p.ID, made[p.ID])
			}
		}
		mustBackup(t, copied, "vm", numbers(1, 20))
		closeOnce(t, copied)
		if t.Failed() {
			return
		}
	}
}

// slowCopy copies a folder with all below it, calling meanwhile before each piece of a
// file. Files that vanish are passed over.
func slowCopy(t *testing.T, rng *rand.Rand, from, to string, meanwhile func()) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.Mkdir(to, 0o700))
	entries, err := os.ReadDir(from)
	must(err)
	rng.Shuffle(len(entries), func(i, j int) { entries[i], entries[j] = entries[j], entries[i] })
	for _, e := range entries {
		meanwhile()
		if e.IsDir() {
			slowCopy(t, rng, filepath.Join(from, e.Name()), filepath.Join(to, e.Name()), meanwhile)
			continue
		}
		in, err := os.Open(filepath.Join(from, e.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		must(err)
		out, err := os.Create(filepath.Join(to, e.Name()))
		must(err)
		for err == nil {
			meanwhile()
			_, err = io.CopyN(out, in, 1+rng.Int64N(48<<10))
		}
		if !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
		must(errors.Join(in.Close(), out.Close()))
	}
}
