package blockstore

import (
	"os"
	"path/filepath"
	"testing"
)

// What is known to be bad stays known when the index is lost, until a backup that meets the same
// content heals it.
func TestDamageIsRemembered(t *testing.T) {
	t.Parallel()
	for _, passphrase := range []string{"", "secret"} {
		t.Run("passphrase="+passphrase, func(t *testing.T) {
			t.Parallel()
			dir := create(t, CreateOptions{Passphrase: passphrase})
			o := Options{Passphrase: passphrase}
			c := numbers(1, 40)
			r := open(t, dir, o)
			p := mustBackup(t, r, "vm", c)
			bad := r.ID(chunkOf(7))
			loc, ok, err := r.find(bad)
			if err != nil || !ok {
				t.Fatal(ok, err)
			}
			closeOnce(t, r)
			flip(t, segmentFiles(t, dir, segmentSuffix)[0], int64(loc.Off)+recordHeaderSize+9)
			r = open(t, dir, o)
			if _, err := readDisk(r, p.ID); err == nil {
				t.Error("a damaged disk was read")
			}
			killed := crash(t, dir)
			closeOnce(t, r)

			for name, dir := range map[string]string{"closed": dir, "killed": killed} {
				if err := os.RemoveAll(filepath.Join(dir, indexDir)); err != nil {
					t.Fatal(err)
				}
				r := open(t, dir, o)
				if got := r.damaged.list(); len(got) != 1 || got[0] != bad {
					t.Errorf("%s: got %v, want %v", name, got, bad)
				}
				again := mustBackup(t, r, "vm", c)
				checkDisk(t, r, again.ID, c)
				closeOnce(t, r)
				r = open(t, dir, o)
				if r.AnyDamaged() {
					t.Errorf("%s: %v are damaged after a backup has healed them", name, r.damaged.list())
				}
				checkSound(t, r)
				closeOnce(t, r)
			}
		})
	}
}

// A list of damaged chunks that rotted is no hindrance.
func TestDamageListRots(t *testing.T) {
	t.Parallel()
	dir := create(t, CreateOptions{})
	r := open(t, dir, Options{})
	if err := r.markDamaged([]ID{{1}, {2}}); err != nil {
		t.Fatal(err)
	}
	closeOnce(t, r)
	path := filepath.Join(dir, damagedFile)
	flip(t, path, 50) // in the first of two copies
	r = open(t, dir, Options{})
	if got := len(r.damaged.list()); got != 2 {
		t.Errorf("got %d damaged chunks, want 2", got)
	}
	closeOnce(t, r)
	for _, content := range [][]byte{nil, []byte("garbage"), make([]byte, 10_000)} {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		r = open(t, dir, Options{})
		if r.AnyDamaged() {
			t.Errorf("%d bytes that are no list give %v", len(content), r.damaged.list())
		}
		checkDisk(t, r, mustBackup(t, r, "vm", numbers(1, 5)).ID, numbers(1, 5))
		closeOnce(t, r)
	}
}
