package e2e_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

// usage returns how many bytes of disk a file or folder takes.
func usage(t *testing.T, path string) int64 {
	t.Helper()
	var sum int64
	err := filepath.WalkDir(path, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		sum += info.Sys().(*syscall.Stat_t).Blocks * 512
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return sum
}

// TestUnchanged backs the same gigabyte up twice.
func TestUnchanged(t *testing.T) {
	t.Parallel()
	r := newRepo(t)
	source := mixedDisk(t, 96*miB, 31)
	if err := os.Truncate(source, giB); err != nil {
		t.Fatal(err)
	}
	first := r.backup(source)
	if d := first.Disks[0]; d.NewBytes <= 0 || d.StoredBytes <= 0 || d.StoredBytes >= d.NewBytes {
		t.Errorf("first backup: got %+v, want new bytes that compress", d)
	}
	before := usage(t, filepath.Join(r.data, "segments"))
	second := r.backup(source)
	d := second.Disks[0]
	if d.ChangedBytes != 0 || d.NewBytes != 0 || d.StoredBytes >= 100*kiB {
		t.Errorf("second backup: got %+v, want nothing changed, nothing new, less than 100 KiB stored", d)
	}
	if grown := usage(t, filepath.Join(r.data, "segments")) - before; grown >= 100*kiB {
		t.Errorf("an unchanged backup grew the segments by %d bytes, want less than 100 KiB", grown)
	}
	r.intact(t, first.Point, source)
	r.intact(t, second.Point, source)
}

// TestOnePercent changes 1 % of a disk's chunks at random.
func TestOnePercent(t *testing.T) {
	t.Parallel()
	r := newRepo(t)
	const size, changes = 128 * miB, 20
	source := noiseDisk(t, size, 32)
	first := r.backup(source)
	original := copyFile(t, source)
	overwrite(t, source, newRand(33), changes)
	second := r.backup(source)
	d := second.Disks[0]
	if d.ChangedBytes != changes*chunk {
		t.Errorf("got %d changed bytes, want %d", d.ChangedBytes, changes*chunk)
	}
	// New are the chunks and the map nodes above them: 32 KiB a node, 2048
	// chunks below three of them.
	if low, high := int64(changes*chunk), int64(changes*chunk+4*chunk); d.NewBytes < low || d.NewBytes > high {
		t.Errorf("got %d new bytes, want %d to %d", d.NewBytes, low, high)
	}
	if low, high := int64(changes*chunk), int64(changes*chunk*11/10+4*chunk); d.StoredBytes < low || d.StoredBytes > high {
		t.Errorf("got %d stored bytes, want %d to %d", d.StoredBytes, low, high)
	}
	r.intact(t, first.Point, original)
	r.intact(t, second.Point, source)
}

// TestDeduplicates stores the same content once, whichever VM has it.
func TestDeduplicates(t *testing.T) {
	t.Parallel()
	r := newRepo(t)
	source := noiseDisk(t, 32*miB, 34)
	r.backup(source)
	twin := decode[backupResult](t, r.ok("backup", "image", source, "--vm", "twin", "--json"))
	if d := twin.Disks[0]; d.NewBytes != 0 || d.ReadBytes != 32*miB {
		t.Errorf("the twin: got %+v, want everything read and nothing new", d)
	}
}

// TestDeleteFirst deletes the older of two points that share half.
func TestDeleteFirst(t *testing.T) {
	t.Parallel()
	r := newRepo(t)
	const size, rewritten = 96 * miB, 48 * miB
	source := noiseDisk(t, size, 35)
	first := r.backup(source)
	overwrite(t, source, newRand(36), rewritten/chunk)
	second := r.backup(source)
	before := usage(t, r.data+"/segments")

	dry := decode[gcResult](t, r.ok("repo", "gc", "--dry-run", "--json"))
	if dry.DeadChunks != 0 {
		t.Errorf("with both points: got %d dead chunks, want 0", dry.DeadChunks)
	}
	r.ok("point", "delete", first.Point)
	dry = decode[gcResult](t, r.ok("repo", "gc", "--dry-run", "--json"))
	if now := usage(t, r.data+"/segments"); now < before {
		t.Errorf("a dry run freed %d bytes", before-now)
	}
	got := decode[gcResult](t, r.ok("repo", "gc", "--json"))
	if got.DeadChunks != dry.DeadChunks || got.DeadChunks < rewritten/chunk {
		t.Errorf("got %d dead chunks, want %d as in the dry run, at least %d", got.DeadChunks, dry.DeadChunks, rewritten/chunk)
	}
	// Only the first had the rewritten half, and a few map nodes.
	if low, high := int64(rewritten*9/10), int64(rewritten*11/10); got.FreedBytes < low || got.FreedBytes > high {
		t.Errorf("got %d freed bytes, want %d to %d", got.FreedBytes, low, high)
	}
	if freed := before - usage(t, r.data+"/segments"); freed < rewritten*8/10 {
		t.Errorf("the segments shrank by %d bytes, want about %d", freed, rewritten)
	}
	if points := r.points(); len(points) != 1 || points[0].ID != second.Point {
		t.Errorf("got points %+v, want %s alone", points, second.Point)
	}
	r.intact(t, second.Point, source)
	r.verified()
}

// TestIndexIsACache takes the index away, and rebuilds it while it is there.
func TestIndexIsACache(t *testing.T) {
	t.Parallel()
	r := newRepo(t)
	source := mixedDisk(t, 48*miB, 37)
	first := r.backup(source)
	original := copyFile(t, source)
	overwrite(t, source, newRand(38), 30)
	second := r.backup(source)
	check := func() {
		t.Helper()
		r.intact(t, first.Point, original)
		r.intact(t, second.Point, source)
		if d := r.backup(source).Disks[0]; d.NewBytes != 0 {
			t.Errorf("after the index came back: got %d new bytes, want 0: content is not found again", d.NewBytes)
		}
	}
	if err := os.RemoveAll(filepath.Join(r.data, "index")); err != nil {
		t.Fatal(err)
	}
	check()
	r.ok("repo", "rebuild-index")
	check()
	if err := os.RemoveAll(filepath.Join(r.data, "index")); err != nil {
		t.Fatal(err)
	}
	r.ok("repo", "rebuild-index")
	check()
	r.verified()
}
