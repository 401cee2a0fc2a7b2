package ingest_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/holdfast-backup/holdfast/blockstore"
	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/ingest"
)

// broken is a disk that cannot be read from an offset on.
type broken struct {
	memory
	from int64
	err  error
	hit  func()
}

func (b broken) ReadAt(p []byte, off int64) (int, error) {
	if off+int64(len(p)) > b.from {
		b.hit()
		return 0, b.err
	}
	return b.memory.ReadAt(p, off)
}

// A disk that fails in the middle, as the first or a later one of a point, leaves no point, and
// the next backup works.
func TestFailingDisk(t *testing.T) {
	t.Parallel()
	r := open(t, blockstore.CreateOptions{})
	rng := rand.New(rand.NewPCG(5, 6))
	good := make([]byte, 4*mib)
	fill(good, rng, 0, len(good))
	boom := errors.New("boom")
	bad := broken{memory: good, from: 3 * mib, err: boom, hit: func() {}}
	for _, disks := range [][]ingest.Source{
		{{Name: "a", Disk: bad}},
		{{Name: "a", Disk: memory(good)}, {Name: "b", Disk: bad}},
	} {
		_, err := ingest.Run(t.Context(), r, ingest.Request{VM: "vm", Disks: disks}, nil)
		if !errors.Is(err, boom) {
			t.Errorf("got %v, want %v", err, boom)
		}
		if got := r.Points(); len(got) != 0 {
			t.Errorf("got points %v, want none", got)
		}
	}
	got := backup(t, r, ingest.Source{Name: "a", Disk: memory(good)}, ingest.Source{Name: "b", Disk: memory(good[:mib])})
	check(t, r, got.Point, "a", good)
	check(t, r, got.Point, "b", good[:mib])
}

// Cancelling leaves nothing listed.
func TestCancel(t *testing.T) {
	t.Parallel()
	r := open(t, blockstore.CreateOptions{})
	ctx, cancel := context.WithCancel(t.Context())
	disk := broken{memory: make([]byte, 64*mib), from: 32 * mib, err: errors.New("read after cancelling"), hit: cancel}
	for i := range disk.memory {
		disk.memory[i] = byte(i>>14) | 1
	}
	_, err := ingest.Run(ctx, r, ingest.Request{VM: "vm", Disks: []ingest.Source{{Name: "a", Disk: disk}}}, nil)
	if err == nil || len(r.Points()) != 0 {
		t.Errorf("got %v and points %v, want an error and none", err, r.Points())
	}
	cancelled, stop := context.WithCancel(t.Context())
	stop()
	_, err = ingest.Run(cancelled, r, ingest.Request{VM: "vm", Disks: []ingest.Source{{Name: "a", Disk: disk.memory}}}, nil)
	if !errors.Is(err, context.Canceled) || len(r.Points()) != 0 {
		t.Errorf("got %v and points %v, want %v and none", err, r.Points(), context.Canceled)
	}
}

// Progress ends with everything done, and never goes back.
func TestProgress(t *testing.T) {
	t.Parallel()
	r := open(t, blockstore.CreateOptions{})
	disk := make([]byte, 3*mib+5)
	disk[2*mib] = 1
	var last ingest.Progress
	_, err := ingest.Run(t.Context(), r, ingest.Request{
		VM: "vm", Disks: []ingest.Source{{Name: "a", Disk: memory(disk)}, {Name: "b", Disk: memory(disk)}},
	}, func(p ingest.Progress) {
		if p.Done < last.Done {
			t.Errorf("done went from %d back to %d", last.Done, p.Done)
		}
		last = p
	})
	if want := int64(2 * len(disk)); err != nil || last.Done != want || last.Total != want {
		t.Errorf("got %+v, %v, want %d done", last, err, want)
	}
}

// Damage in the last point heals when the same content is backed up again: a chunk, a
// leaf, and the root above.
func TestHeal(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := blockstore.Create(dir, blockstore.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	disk := make([]byte, 130*mib) // three leaves
	rng := rand.New(rand.NewPCG(7, 8))
	for _, off := range []int{0, mib, 70 * mib, 129 * mib} {
		fill(disk, rng, off, 100_000)
	}
	var last blockstore.PointID
	run := func(source ingest.Source) {
		r, err := blockstore.Open(t.Context(), dir, blockstore.Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		source.Since = last
		p := backup(t, r, source).Point
		last = p.ID
		check(t, r, p, "a", disk)
		v, err := r.Verify(t.Context(), blockstore.VerifyOptions{})
		if err != nil || len(v.Errors) > 0 {
			t.Errorf("verify after a backup: %+v, %v", v.Errors, err)
		}
	}
	run(ingest.Source{Name: "a", Disk: memory(disk)})
	files, err := filepath.Glob(filepath.Join(dir, "segments", "*.seg"))
	if err != nil || len(files) != 1 {
		t.Fatal(files, err)
	}
	data, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	// The payload of every record is damaged, but for the last one's (type 3), the
	// table of contents.
	for off := bytes.Index(data, []byte("HFR1")); data[off+4] != 3; {
		data[off+60] ^= 1
		off += 52 + bytes.Index(data[off+52:], []byte("HFR1"))
	}
	if err := os.WriteFile(files[0], data, 0o600); err != nil {
		t.Fatal(err)
	}
	r, err := blockstore.Open(t.Context(), dir, blockstore.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if v, err := r.Verify(t.Context(), blockstore.VerifyOptions{}); err != nil || len(v.Errors) == 0 {
		t.Errorf("verify of the damaged repository: got %+v, %v, want errors", v, err)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	// Though nothing is said to have changed but one byte: what can't be compared is read.
	run(ingest.Source{Name: "a", Disk: memory(disk), Changed: []image.Extent{{Off: 0, Len: 1}, {Off: 70 * mib, Len: 1}, {Off: 129 * mib, Len: 1}}})
	run(ingest.Source{Name: "a", Disk: memory(disk)})
}

// spoil flips a bit in the n-th record of a type in the only segment; from the end if n is negative.
func spoil(t *testing.T, dir string, kind byte, n int) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "segments", "*.seg"))
	if err != nil || len(files) != 1 {
		t.Fatal(files, err)
	}
	data, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	var records []int
	for off := 0; ; off += 4 {
		next := bytes.Index(data[off:], []byte("HFR1"))
		if next < 0 {
			break
		}
		if off += next; data[off+4] == kind {
			records = append(records, off)
		}
	}
	if n < 0 {
		n += len(records)
	}
	data[records[n]+60] ^= 1
	if err := os.WriteFile(files[0], data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// Whatever a backup reads, and though nothing is said to have changed: what is damaged of the last point is
// read from the disk and stored anew, and of an incremental backup no more than that if it is known. The
// old point is whole again, though the bad record is still there. Damage to another disk changes nothing.
func TestHealModes(t *testing.T) {
	t.Parallel()
	disk := make([]byte, 34*mib) // three leaves
	fill(disk, rand.New(rand.NewPCG(7, 8)), 0, 2*mib)
	fill(disk, rand.New(rand.NewPCG(9, 8)), 17*mib, mib)
	fill(disk, rand.New(rand.NewPCG(9, 9)), 33*mib, mib)
	for _, damage := range []struct {
		name string
		kind byte
		n    int
		most int64 // bytes that an incremental backup reads if the damage is known
	}{{"chunk", 1, 5, 128 << 10}, {"leaf", 2, 0, 16 * mib}, {"root", 2, -1, 34 * mib}} {
		for _, mode := range []ingest.Mode{ingest.Scan, ingest.Incremental} {
			for _, known := range []bool{true, false} {
				if !known && (damage.kind == 1 || damage.name == "leaf" && mode == ingest.Incremental) {
					continue // nothing of it is read
				}
				name := fmt.Sprintf("%s, %s, known %v", damage.name, mode, known)
				dir := t.TempDir()
				if err := blockstore.Create(dir, blockstore.CreateOptions{ChunkSize: 16 << 10}); err != nil {
					t.Fatal(err)
				}
				use := func(fn func(r *blockstore.Repository)) {
					r, err := blockstore.Open(t.Context(), dir, blockstore.Options{})
					if err != nil {
						t.Fatal(err)
					}
					defer r.Close()
					fn(r)
				}
				var first blockstore.Point
				use(func(r *blockstore.Repository) {
					first = backup(t, r, ingest.Source{Name: "a", Disk: memory(disk)}).Point
				})
				spoil(t, dir, damage.kind, damage.n)
				use(func(r *blockstore.Repository) {
					if known {
						if v, err := r.Verify(t.Context(), blockstore.VerifyOptions{}); err != nil || v.DamagedChunks != 1 {
							t.Errorf("%s: verify: got %+v, %v", name, v, err)
						}
					}
					src := ingest.Source{Name: "a", Disk: memory(disk)}
					if mode == ingest.Incremental {
						src.Changed, src.Since = []image.Extent{{Off: 0, Len: 1}}, first.ID
					}
					got := backup(t, r, src)
					if read := got.Disks[0].Read; mode == ingest.Incremental && known && (got.Disks[0].Mode != mode || read > damage.most+64<<10) {
						t.Errorf("%s: got mode %s, %d bytes read, want %s and up to %d", name, got.Disks[0].Mode, read, mode, damage.most)
					}
					check(t, r, got.Point, "a", disk)
					check(t, r, first, "a", disk)
					if v, err := r.Verify(t.Context(), blockstore.VerifyOptions{}); err != nil || len(v.Errors) > 0 {
						t.Errorf("%s: verify after the backup: %+v, %v", name, v, err)
					}
				})
			}
		}
	}
}
