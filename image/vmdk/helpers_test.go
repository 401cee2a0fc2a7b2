package vmdk_test

import (
	"path/filepath"
	"testing"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/internal/imgtest"
	"github.com/holdfast-backup/holdfast/image/vmdk"
)

const (
	kib = 1 << 10
	mib = 1 << 20
	gib = 1 << 30
)

// open opens the image at path, for the test's duration.
func open(t testing.TB, path string) (*vmdk.Image, error) {
	t.Helper()
	return imgtest.OpenImage(t, path, vmdk.Open, image.OpenOptions{})
}

func mustOpen(t testing.TB, path string) *vmdk.Image {
	t.Helper()
	return imgtest.MustOpen(t, path, vmdk.Open)
}

// writeFile writes a file in folder and returns its path.
func writeFile(t testing.TB, folder, name string, data []byte) string {
	t.Helper()
	return imgtest.WriteFile(t, filepath.Join(folder, name), data)
}
