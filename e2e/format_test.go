package e2e_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestFormats backs a disk up from every format and brings it back in every
// format, over NBD and as a file, identical each time.
func TestFormats(t *testing.T) {
	t.Parallel()
	source := mixedDisk(t, 64*miB+2560, 1)
	for _, tt := range []struct {
		name, format string
		options      []string // of qemu-img convert
	}{
		{"raw", "raw", nil},
		{"qcow2", "qcow2", nil},
		{"qcow2 compressed", "qcow2", []string{"-c"}},
		{"qcow2 4 KiB clusters", "qcow2", []string{"-o", "cluster_size=4096"}},
		{"vmdk sparse", "vmdk", nil},
		{"vmdk stream", "vmdk", []string{"-o", "subformat=streamOptimized"}},
		{"vmdk two files", "vmdk", []string{"-o", "subformat=twoGbMaxExtentSparse"}},
		{"vhdx dynamic", "vhdx", nil},
		{"vhdx fixed", "vhdx", []string{"-o", "subformat=fixed"}},
		{"vhd dynamic", "vpc", []string{"-o", "force_size=on"}},
		{"vhd fixed", "vpc", []string{"-o", "force_size=on,subformat=fixed"}},
		{"vdi", "vdi", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			folder := t.TempDir()
			image := filepath.Join(folder, "image."+tt.format)
			tool(t, "qemu-img", slices.Concat([]string{"convert", "-f", "raw", "-O", tt.format}, tt.options, []string{source, image})...)
			r := newRepo(t)
			b := r.backup(image)
			if len(b.Disks) != 1 || b.Disks[0].SizeBytes != 64*miB+2560 {
				t.Fatalf("got disks %+v, want one of %d bytes", b.Disks, 64*miB+2560)
			}
			for _, out := range []string{"raw", "qcow2", "vmdk", "vhdx"} {
				restored := filepath.Join(folder, "restored."+out)
				r.ok("restore", "image", b.Point, "--to", restored, "--format", out)
				identical(t, out, restored, source)
				if out != "raw" {
					continue
				}
				sameFile(t, restored, source)
				onlyData(t, restored, source)
			}
			e := r.export(b.Point)
			identicalExport(t, e.URI, source)
			e.stop()
			m := r.mount()
			latest := filepath.Join(m.dir, "vm", "latest", "disks", b.Disks[0].Name+".raw")
			tool(t, "cmp", latest, source)
			m.unmount()
		})
	}
}

// onlyData checks that a restored raw file is sparse: it takes no more of the
// disk than the source, whose holes and zeros are known, plus a little.
func onlyData(t *testing.T, restored, source string) {
	t.Helper()
	got, want := usage(t, restored), usage(t, source)
	if got > want+miB {
		t.Errorf("the restored file takes %d bytes of disk, want at most the source's %d", got, want)
	}
}

// TestFormatNamed reads an image whose first bytes look like another format:
// --format says what it is.
func TestFormatNamed(t *testing.T) {
	t.Parallel()
	r := newRepo(t)
	inner := mixedDisk(t, 2*miB, 2)
	image := filepath.Join(t.TempDir(), "disk.qcow2")
	tool(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", inner, image)
	auto := r.backup(image)
	r.intact(t, auto.Point, inner)
	raw := decode[backupResult](t, r.ok("backup", "image", image, "--format", "raw", "--vm", "vm", "--json"))
	r.intact(t, raw.Point, image)
}

// TestSeveralDisks makes one point of several images, of several formats.
func TestSeveralDisks(t *testing.T) {
	t.Parallel()
	r := newRepo(t)
	folder := t.TempDir()
	system, data := mixedDisk(t, 20*miB, 3), mixedDisk(t, 9*miB+512, 4)
	systemImage, dataImage := filepath.Join(folder, "system.qcow2"), filepath.Join(folder, "data.vmdk")
	tool(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", system, systemImage)
	tool(t, "qemu-img", "convert", "-f", "raw", "-O", "vmdk", data, dataImage)
	b := r.backup(systemImage, dataImage)
	if len(b.Disks) != 2 || b.Disks[0].Name == b.Disks[1].Name {
		t.Fatalf("got disks %+v, want two of different names", b.Disks)
	}
	if points := r.points(); len(points) != 1 || len(points[0].Disks) != 2 {
		t.Errorf("got points %+v, want one with two disks", points)
	}
	sources := []string{system, data}
	for i, d := range b.Disks {
		sameFile(t, r.restored(b.Point, "--disk", d.Name), sources[i])
		e := r.export(b.Point, "--disk", d.Name)
		identicalExport(t, e.URI, sources[i])
		e.stop()
	}
	m := r.mount()
	for i, d := range b.Disks {
		sameFile(t, filepath.Join(m.dir, "vm", "latest", "disks", d.Name+".raw"), sources[i])
	}
	m.unmount()

	// Which disk is meant has to be said.
	to := filepath.Join(folder, "which.raw")
	line := r.fails(exitUsage, "restore", "image", b.Point, "--to", to)
	for _, d := range b.Disks {
		if !strings.Contains(line, d.Name) {
			t.Errorf("got error %q, want it to name the disk %q", line, d.Name)
		}
	}
	if _, err := os.Stat(to); err == nil {
		t.Errorf("%s was made", to)
	}
}
