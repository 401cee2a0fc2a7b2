package imgtest

import (
	"bytes"
	"encoding/json"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/image"
)

// Run runs a command and returns its output. A failure ends the test.
func Run(t testing.TB, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s%s", name, args, err, out, &stderr)
	}
	return string(out)
}

// QEMUIO has qemu-io run commands on an image, such as "write -P 7 3M 64k". It
// does not wait for the host's disk.
func QEMUIO(t testing.TB, format, path string, commands ...string) {
	t.Helper()
	args := []string{"-f", format, "-t", "unsafe", "-d", "unmap"}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	out := Run(t, "qemu-io", append(args, path)...)
	if strings.Contains(out, "failed") || strings.Contains(out, "error") { // its exit status does not tell
		t.Fatalf("qemu-io %q: %s", commands, out)
	}
}

// Convert has qemu-img make an image of a disk in a new folder and returns its
// path, which ends in "disk." and the format. args are further arguments, such
// as "-o" and options.
func Convert(t testing.TB, disk []byte, format string, args ...string) string {
	t.Helper()
	plain := WriteFile(t, filepath.Join(t.TempDir(), "plain"), disk)
	path := filepath.Join(t.TempDir(), "disk."+format)
	Run(t, "qemu-img", append(append([]string{"convert", "-f", "raw", "-O", format}, args...), plain, path)...)
	return path
}

// QEMUBytes returns the disk that qemu-img reads from an image.
func QEMUBytes(t testing.TB, format, path string) []byte {
	t.Helper()
	plain := filepath.Join(t.TempDir(), "plain")
	Run(t, "qemu-img", "convert", "-f", format, "-O", "raw", path, plain)
	return ReadFile(t, plain)
}

// QEMUMap returns the extents that qemu-img sees in an image. format is QEMU's
// name of the format.
func QEMUMap(t testing.TB, format, path string) []image.Extent {
	t.Helper()
	var entries []struct {
		Start, Length int64
		Zero, Data    bool
	}
	if err := json.Unmarshal([]byte(Run(t, "qemu-img", "map", "-f", format, "--output=json", path)), &entries); err != nil {
		t.Fatal(err)
	}
	return collect(t, func(yield func(image.Extent, error) bool) {
		for _, e := range entries {
			if !yield(image.Extent{Off: e.Start, Len: e.Length, Zero: e.Zero || !e.Data}, nil) {
				return
			}
		}
	})
}

// CheckLikeQEMU holds an image that was opened as d against all that QEMU reads
// from it: bytes and extents. It returns the bytes.
func CheckLikeQEMU(t testing.TB, d image.Disk, format, path string) []byte {
	t.Helper()
	want := QEMUBytes(t, format, path)
	Check(t, d, want)
	if got, want := Extents(t, d, 0, d.Size()), QEMUMap(t, format, path); !slices.Equal(got, want) {
		t.Errorf("extents:\ngot  %v\nwant %v", got, want)
	}
	return want
}

// QEMUCompare has qemu-img check an image and compare it with a disk's bytes.
func QEMUCompare(t testing.TB, format, path string, want []byte) {
	t.Helper()
	plain := WriteFile(t, filepath.Join(t.TempDir(), "plain"), want)
	Run(t, "qemu-img", "check", "-f", format, path)
	Run(t, "qemu-img", "compare", "-f", format, "-F", "raw", path, plain)
}
