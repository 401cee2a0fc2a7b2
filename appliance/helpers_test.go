package appliance_test

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/appliance"
	"github.com/holdfast-backup/holdfast/blockstore"
)

const (
	kiB   = 1 << 10
	miB   = 1 << 20
	chunk = 64 * kiB
)

// newData makes a repository and returns its folder.
func newData(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "data")
	if _, err := appliance.Init(dir, appliance.InitOptions{}); err != nil {
		t.Fatal(err)
	}
	return dir
}

// open opens a data folder until the test's end.
func open(t *testing.T, dir string) *appliance.Appliance {
	t.Helper()
	a, err := appliance.Open(t.Context(), dir, appliance.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	})
	return a
}

// noise returns bytes that are the same for the same seed.
func noise(size int, seed byte) []byte {
	r := rand.NewChaCha8([32]byte{seed})
	p := make([]byte, size)
	_, _ = r.Read(p) // never fails
	return p
}

// write makes a file in a folder of its own and returns its path.
func write(t *testing.T, name string, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// backup backs image files up as a point of a VM.
func backup(t *testing.T, a *appliance.Appliance, vm string, files ...string) appliance.BackupResult {
	t.Helper()
	r, err := a.BackupImages(t.Context(), appliance.ImageBackup{VM: vm, Files: files}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// commit lists a point of one empty disk with an id and a time of our choice.
func commit(t *testing.T, dir string, id blockstore.PointID, vm string, at time.Time) {
	t.Helper()
	repo, err := blockstore.Open(t.Context(), dir, blockstore.Options{})
	if err != nil {
		t.Fatal(err)
	}
	s := repo.Begin()
	_, err = s.Commit(t.Context(), blockstore.Point{
		ID: id, VM: vm, Time: at, Mode: "full", Consistency: "crash",
		Disks: []blockstore.PointDisk{{Name: "vda", Map: blockstore.Map{Size: miB}}},
	})
	s.Close()
	if closeErr := repo.Close(); err != nil || closeErr != nil {
		t.Fatal(err, closeErr)
	}
}
