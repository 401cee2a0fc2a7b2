package ingest_test

import (
	"bytes"
	"context"
	"iter"
	"math/rand/v2"
	"testing"

	"github.com/holdfast-backup/holdfast/blockstore"
	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/ingest"
)

// memory is a Disk over bytes whose extents are found by looking, in steps of a
// sector.
type memory []byte

func (m memory) ReadAt(p []byte, off int64) (int, error) { return bytes.NewReader(m).ReadAt(p, off) }
func (m memory) Size() int64                             { return int64(len(m)) }

func (m memory) Extents(_ context.Context, off, length int64) iter.Seq2[image.Extent, error] {
	return func(yield func(image.Extent, error) bool) {
		off, length := image.Clip(off, length, m.Size())
		for end := off + length; off < end; {
			n := min(512-off%512, end-off)
			if !yield(image.Extent{Off: off, Len: n, Zero: image.IsZero(m[off : off+n])}, nil) {
				return
			}
			off += n
		}
	}
}

func TestModes(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(1, 2))
	r := open(t, blockstore.CreateOptions{ChunkSize: 16 << 10})
	disk := make([]byte, 70*mib+12345)
	fill(disk, rng, 0, 3*mib)
	fill(disk, rng, 20*mib+777, mib)
	fill(disk, rng, len(disk)-100, 100)
	first := bytes.Clone(disk)

	full := backup(t, r, ingest.Source{Name: "a", Disk: memory(disk)})
	if d := full.Disks[0]; full.Point.Mode != "full" || d.New < 4*mib || d.Read > 5*mib || d.Changed != d.New-(16<<10)+int64(len(disk)%(16<<10)) {
		t.Errorf("full: got %+v", full)
	}
	check(t, r, full.Point, "a", first)

	same := backup(t, r, ingest.Source{Name: "a", Disk: memory(disk)})
	if d := same.Disks[0]; d.Mode != ingest.Scan || d.New != 0 || d.Stored != 0 || d.Changed != 0 || d.Read != full.Disks[0].Read {
		t.Errorf("unchanged: got %+v", d)
	}

	fill(disk, rng, 30*mib, 100)
	clear(disk[mib : mib+64<<10])
	changed := []image.Extent{{Off: 30 * mib, Len: 100}, {Off: mib, Len: 64 << 10}}
	incremental := backup(t, r, ingest.Source{Name: "a", Disk: memory(disk), Changed: changed, Since: same.Point.ID})
	if d := incremental.Disks[0]; d.Mode != ingest.Incremental || d.Read > 16<<10 || d.New != 16<<10 || d.Changed != 80<<10 {
		t.Errorf("incremental: got %+v", d)
	}
	check(t, r, incremental.Point, "a", disk)
	check(t, r, full.Point, "a", first)

	older := backup(t, r, ingest.Source{Name: "a", Disk: memory(disk), Changed: changed, Since: same.Point.ID})
	if d := older.Disks[0]; d.Mode != ingest.Incremental || d.Read > 16<<10 || d.New != 0 || d.Changed != 80<<10 {
		t.Errorf("changes since a point that is not the last: got %+v", d)
	}
	check(t, r, older.Point, "a", disk)
	gone := backup(t, r, ingest.Source{Name: "a", Disk: memory(disk), Changed: []image.Extent{}, Since: blockstore.NewPointID()})
	if d := gone.Disks[0]; d.Mode != ingest.Scan || d.Changed != 0 {
		t.Errorf("changes since a point that is gone: got %+v, want a scan", d)
	}
	nothing := backup(t, r, ingest.Source{Name: "a", Disk: memory(disk), Changed: []image.Extent{}, Since: gone.Point.ID})
	if d := nothing.Disks[0]; d.Read != 0 || d.Stored != 0 {
		t.Errorf("incremental without changes: got %+v", d)
	}
	check(t, r, nothing.Point, "a", disk)

	last := nothing.Point.ID
	for _, size := range []int{5*mib + 1, 200 * mib, 0, 3 * mib} {
		resized := make([]byte, size)
		copy(resized, disk)
		got := backup(t, r, ingest.Source{Name: "a", Disk: memory(resized), Changed: []image.Extent{}, Since: last})
		last = got.Point.ID
		if got.Disks[0].Mode != ingest.Scan {
			t.Errorf("resized to %d: got mode %s, want a scan", size, got.Disks[0].Mode)
		}
		check(t, r, got.Point, "a", resized)
		if want, err := r.DataBytes(t.Context(), got.Point.Disks[0].Map); err != nil || want != got.Point.Disks[0].Map.Data {
			t.Errorf("resized to %d: data bytes %d, counted %d, %v", size, got.Point.Disks[0].Map.Data, want, err)
		}
	}
	v, err := r.Verify(t.Context(), blockstore.VerifyOptions{})
	if err != nil || len(v.Errors) != 0 {
		t.Errorf("verify: %+v, %v", v, err)
	}
}

// gappy is a disk whose extents leave something out.
type gappy struct {
	memory
	extents []image.Extent
}

func (g gappy) Extents(context.Context, int64, int64) iter.Seq2[image.Extent, error] {
	return func(yield func(image.Extent, error) bool) {
		for _, e := range g.extents {
			if !yield(e, nil) {
				return
			}
		}
	}
}

// Extents that don't cover the disk are an error: what they leave out would be taken for
// zeros, or for unchanged.
func TestIncompleteExtents(t *testing.T) {
	t.Parallel()
	r := open(t, blockstore.CreateOptions{})
	for _, extents := range [][]image.Extent{
		nil,
		{{Off: 0, Len: mib}},
		{{Off: 0, Len: mib / 2}, {Off: mib, Len: mib, Zero: true}},
		{{Off: 0, Len: 3 * mib}},
		{{Off: mib, Len: mib}},
	} {
		disk := gappy{make(memory, 2*mib), extents}
		_, err := ingest.Run(t.Context(), r, ingest.Request{VM: "vm", Disks: []ingest.Source{{Name: "a", Disk: disk}}}, nil)
		if err == nil || len(r.Points()) != 0 {
			t.Errorf("%v: got %v, want an error and no point", extents, err)
		}
	}
}
