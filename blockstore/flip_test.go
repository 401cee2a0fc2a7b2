package blockstore

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// TestFlips flips one bit in a random place of any file but those of the index. Verify finds it,
// or nothing needs it; no read gives wrong bytes; a backup and a repair, in any order, heal it.
//
//	HOLDFAST_EXTENDED=1 FLIP_SEED=7 go test -run TestFlips ./blockstore
func TestFlips(t *testing.T) {
	t.Parallel()
	seed, rounds := rand.Uint64(), 40
	if s := os.Getenv("FLIP_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	if extended() {
		rounds = 1000
	}
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	parent := memoryDir(t)
	for _, passphrase := range []string{"", "secret"} {
		f := &flips{
			o: Options{Passphrase: passphrase, SegmentSize: 96 << 10}, points: map[PointID]content{},
			base: createIn(t, filepath.Join(parent, "p"+passphrase), CreateOptions{Passphrase: passphrase}),
		}
		r := open(t, f.base, f.o)
		gone := mustBackup(t, r, "gone", numbers(200, 4))
		for vm, c := range map[string]content{"vm": append(numbers(1, 16), make(content, Fanout)...), "db": numbers(10, 12)} {
			f.points[mustBackup(t, r, vm, c).ID] = c
		}
		if err := r.DeletePoint(gone.ID); err != nil {
			t.Fatal(err)
		}
		closeOnce(t, r)
		f.files = listFiles(t, f.base)
		for n := range rounds / 2 {
			f.round(t, rng)
			if t.Failed() {
				t.Fatalf("seed %d, passphrase %q, round %d", seed, passphrase, n)
			}
		}
		t.Logf("passphrase %q: %d flips found, %d of no effect", passphrase, f.found, f.unused)
	}
}

type flips struct {
	o             Options
	base          string
	files         []string
	points        map[PointID]content
	found, unused int
}

// pick returns a random bit: half of the time in any file, half of the time in any byte.
func (f *flips) pick(t *testing.T, rng *rand.Rand) (name string, off int64, bit int) {
	t.Helper()
	for {
		name = f.files[rng.IntN(len(f.files))]
		info, err := os.Stat(filepath.Join(f.base, name))
		if err != nil {
			t.Fatal(err)
		}
		small := strings.HasPrefix(name, segmentsDir) == (rng.IntN(4) > 0)
		if name == lockFile || info.Size() == 0 || !small {
			continue
		}
		off = rng.Int64N(info.Size())
		if rng.IntN(4) == 0 && strings.HasPrefix(name, segmentsDir) { // what is around the records
			off = max(0, info.Size()-1-rng.Int64N(800))
		}
		return name, off, rng.IntN(8)
	}
}

func (f *flips) round(t *testing.T, rng *rand.Rand) {
	t.Helper()
	name, off, bit := f.pick(t, rng)
	what := fmt.Sprintf("bit %d of byte %d of %s", bit, off, name)
	dir := crash(t, f.base)
	defer os.RemoveAll(dir)
	while := rng.IntN(2) == 0
	if !while {
		flipBit(t, filepath.Join(dir, name), off, bit)
	}
	r := open(t, dir, f.o)
	defer func() { closeOnce(t, r) }()
	if while {
		what += ", while it is open"
		flipBit(t, filepath.Join(dir, name), off, bit)
	}
	v, err := r.Verify(t.Context(), VerifyOptions{})
	if err != nil {
		t.Errorf("%s: verify: %v", what, err)
		return
	}
	emptyCache(r)
	lost := f.lost(t, r)
	if len(v.Errors) == 0 {
		f.unused++
		if lost > 0 {
			t.Errorf("%s: verify does not find it, and %d chunks cannot be read", what, lost)
		}
	} else if f.found++; lost > 0 && v.DamagedChunks == 0 {
		t.Errorf("%s: %d chunks cannot be read; verify: %+v", what, lost, v)
	}
	backup := func() {
		for id, c := range f.points {
			mustBackup(t, r, "again-"+string(id), c)
		}
	}
	repair := func() {
		if got, err := r.Repair(t.Context(), RepairOptions{Apply: true}); err != nil {
			t.Errorf("%s: repair: got %+v, %v", what, got, err)
		}
	}
	steps := []func(){backup, repair}
	first := rng.IntN(2)
	steps[first]()
	if v, err := r.Verify(t.Context(), VerifyOptions{}); err != nil || first == 0 && v.DamagedChunks > 0 {
		t.Errorf("%s: verify after the first step, %d: got %+v, %v", what, first, v, err)
	}
	steps[1-first]()
	for range 2 {
		if v, err := r.Verify(t.Context(), VerifyOptions{}); err != nil || len(v.Errors) > 0 || v.DamagedChunks > 0 {
			t.Errorf("%s: verify at the end: got %+v, %v", what, v, err)
		}
		if got, err := r.Repair(t.Context(), RepairOptions{}); err != nil || got.Remains() {
			t.Errorf("%s: a repair at the end has to do: %+v, %v", what, got, err)
		}
		if n := f.lost(t, r); n > 0 {
			t.Errorf("%s: %d chunks cannot be read at the end", what, n)
		}
		closeOnce(t, r)
		r = open(t, dir, f.o)
	}
}

// lost reads all points and returns how many chunks cannot be read.
func (f *flips) lost(t *testing.T, r *Repository) int {
	t.Helper()
	n := 0
	for id, c := range f.points {
		n += unreadable(t, r, id, c)
	}
	return n
}

// flipBit flips one bit of a file.
func flipBit(t *testing.T, path string, off int64, bit int) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var b [1]byte
	if _, err := f.ReadAt(b[:], off); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1 << bit
	if _, err := f.WriteAt(b[:], off); err != nil {
		t.Fatal(err)
	}
}
