package ingest_test

import (
	"bytes"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/blockstore"
	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/ingest"
)

const mib = 1 << 20

// open makes and opens a repository that is closed at the end of the test.
func open(t *testing.T, o blockstore.CreateOptions) *blockstore.Repository {
	t.Helper()
	dir := t.TempDir()
	if err := blockstore.Create(dir, o); err != nil {
		t.Fatal(err)
	}
	r, err := blockstore.Open(t.Context(), dir, blockstore.Options{Passphrase: o.Passphrase})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// fill writes n bytes of data that compresses by about half at off.
func fill(disk []byte, rng *rand.Rand, off, n int) {
	for i := off; i < off+n; i++ {
		disk[i] = byte(rng.Uint32()) & 0x0f
	}
}

func backup(t *testing.T, r *blockstore.Repository, sources ...ingest.Source) ingest.Result {
	t.Helper()
	got, err := ingest.Run(t.Context(), r, ingest.Request{VM: "vm", Time: time.Now(), Consistency: "crash", Disks: sources}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// check compares a disk of a point with what it should be.
func check(t *testing.T, r *blockstore.Repository, p blockstore.Point, name string, want []byte) {
	t.Helper()
	d, err := r.OpenDisk(p.ID, name, blockstore.DiskOptions{Whole: true})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if d.Size() != int64(len(want)) {
		t.Fatalf("size: got %d, want %d", d.Size(), len(want))
	}
	got := make([]byte, len(want))
	if len(got) > 0 {
		if err := image.ReadFull(d, got, 0); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(got, want) {
		t.Fatal("the disk of the point differs from what was backed up")
	}
}
