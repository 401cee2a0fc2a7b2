package e2e_test

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"testing"
)

// TestGuestReads boots a guest whose disk is an export, and has it read all of
// it through virtio.
func TestGuestReads(t *testing.T) {
	t.Parallel()
	r := newRepo(t)
	source := mixedDisk(t, 24*miB, 81)
	e := r.export(r.backup(source).Point)

	g := boot(t, "read.sh", "", "-drive", "file="+e.URI+",format=raw,if=virtio,readonly=on")
	if got, want := g.await("SHA256 /dev/vda ([0-9a-f]+) .*")[0], sum(t, source); got != want {
		t.Errorf("got sum %s in the guest, want %s", got, want)
	}
	g.off()
	e.stop()
}

// sum returns a file's SHA-256 in hex.
func sum(t *testing.T, path string) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// TestMainJob is the product's day: a guest's disk of real file systems is
// backed up, the guest works, it is backed up again; both points come back as
// image, block device and file, and their file systems are sound.
func TestMainJob(t *testing.T) {
	t.Parallel()
	const size = 512 * miB
	folder := t.TempDir()
	monday, tuesday := filepath.Join(folder, "monday.raw"), filepath.Join(folder, "tuesday.raw")
	tool(t, "../scripts/make-guest-disk", monday, fmt.Sprint(size))
	tool(t, "cp", "--sparse=always", monday, tuesday)
	tool(t, "../scripts/change-guest-disk", tuesday)
	image := filepath.Join(folder, "disk.qcow2")
	convert := func(raw string) { tool(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image) }

	r := newRepo(t)
	convert(monday)
	first := r.backup(image)
	convert(tuesday)
	second := r.backup(image)
	full, increment := first.Disks[0], second.Disks[0]
	t.Logf("first %+v, second %+v", full, increment)
	changed := changedChunks(t, monday, tuesday)
	if want := int64(len(changed)) * chunk; increment.ChangedBytes != want {
		t.Errorf("got %d changed bytes, want %d", increment.ChangedBytes, want)
	}
	if len(changed) == 0 || increment.StoredBytes > int64(len(changed))*chunk+4*chunk || increment.StoredBytes > full.StoredBytes/4 {
		t.Errorf("the second backup stored %d bytes for %d changed chunks, the first %d", increment.StoredBytes, len(changed), full.StoredBytes)
	}
	if full.StoredBytes > usage(t, monday)*3/4 {
		t.Errorf("the first backup stored %d bytes of a guest's files that take %d, want it to compress", full.StoredBytes, usage(t, monday))
	}
	diff := decode[diffResult](t, r.ok("point", "diff", first.Point, second.Point, "--json"))
	if diff.Disks[0].Bytes != int64(len(changed))*chunk {
		t.Errorf("diff: got %d bytes, want %d", diff.Disks[0].Bytes, len(changed)*chunk)
	}

	restored := r.restored(first.Point)
	sameFile(t, restored, monday)
	sound(t, restored)
	qcow2 := filepath.Join(folder, "restored.qcow2")
	r.ok("restore", "image", second.Point, "--to", qcow2, "--format", "qcow2")
	identical(t, "qcow2", qcow2, tuesday)

	m := r.mount()
	disk := filepath.Join(m.dir, "vm", "latest", "disks", increment.Name+".raw")
	tool(t, "cmp", disk, tuesday)
	sound(t, disk)
	m.unmount()
	e := r.export(first.Point)
	identicalExport(t, e.URI, monday)
	e.stop()
	r.verified()
}

// sound checks a guest disk's table and its ext4 file system.
func sound(t *testing.T, disk string) {
	t.Helper()
	tool(t, "e2fsck", "-fn", ext4(t, disk))
}

// ext4 returns the name by which e2fsck and debugfs open the first of a guest
// disk's two partitions.
func ext4(t *testing.T, disk string) string {
	t.Helper()
	starts := regexp.MustCompile(`start= *([0-9]+)`).FindAllStringSubmatch(tool(t, "sfdisk", "--dump", disk), -1)
	if len(starts) != 2 {
		t.Fatalf("%s: got %d partitions, want 2", disk, len(starts))
	}
	var first int64
	fmt.Sscan(starts[0][1], &first)
	return fmt.Sprintf("%s?offset=%d", disk, first*512)
}
