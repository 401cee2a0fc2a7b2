package appliance_test

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/appliance"
)

// shortFolder returns a folder whose path leaves room for a socket's name.
func shortFolder(t *testing.T) string {
	t.Helper()
	folder, err := os.MkdirTemp("", "hf")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(folder) })
	return folder
}

// serving runs do while an export is served over a unix socket.
func serving(t *testing.T, a *appliance.Appliance, o appliance.ExportOptions, do func(e appliance.Export)) {
	t.Helper()
	o.Unix = filepath.Join(shortFolder(t), "nbd")
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	err := a.Export(ctx, o, func(e appliance.Export) error {
		defer cancel()
		do(e)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// qemuIO runs commands of qemu-io on an export.
func qemuIO(t *testing.T, uri string, commands ...string) {
	t.Helper()
	args := []string{"-f", "raw"}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	out, err := exec.CommandContext(t.Context(), "qemu-io", append(args, uri)...).CombinedOutput()
	if err != nil || bytes.Contains(out, []byte("failed")) {
		t.Fatalf("qemu-io %q: %v\n%s", commands, err, out)
	}
}

// read returns what an export serves.
func read(t *testing.T, uri string) []byte {
	t.Helper()
	var stderr bytes.Buffer
	cmd := exec.CommandContext(t.Context(), "nbdcopy", uri, "-")
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("nbdcopy %s: %v\n%s", uri, err, stderr.Bytes())
	}
	return out
}

// TestWritableExport writes to an export, goes on with it, commits it and
// discards it. The point it lies over never changes and can't be deleted.
func TestWritableExport(t *testing.T) {
	t.Parallel()
	data := newData(t)
	a := open(t, data)
	vda, vdb := noise(miB, 1), noise(miB/2, 2)
	base, err := a.BackupImages(t.Context(), appliance.ImageBackup{
		VM: "web", Files: []string{write(t, "vda.raw", vda), write(t, "vdb.raw", vdb)}, ConfigFiles: []string{write(t, "vm.xml", []byte("<domain/>"))},
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	o := appliance.ExportOptions{Point: base.Point, Disk: "vda", Name: "try it/1", Writable: true, Limit: 4 * miB}
	serving(t, a, o, func(e appliance.Export) { read(t, e.URI) })
	if exports, err := a.WritableExports(); err != nil || len(exports) != 0 {
		t.Errorf("got %v, %v, want nothing kept of an export that nobody wrote to", exports, err)
	}
	want := bytes.Clone(vda)
	serving(t, a, o, func(e appliance.Export) {
		if e.ReadOnly || e.Size != miB {
			t.Errorf("got %+v, want a writable disk", e)
		}
		qemuIO(t, e.URI, "write -P 7 1000 5000", "write -z -u 128k 64k", "flush")
		if err := a.RemoveExport(o.Name); appliance.KindOf(err) != appliance.Refused {
			t.Errorf("removing an export in use: got %v, want a refusal", err)
		}
	})
	for i := range 5000 {
		want[1000+i] = 7
	}
	clear(want[128*kiB : 192*kiB])
	serving(t, a, o, func(e appliance.Export) {
		if got := read(t, e.URI); !bytes.Equal(got, want) {
			t.Error("what was written is not there in the second export")
		}
		out, err := exec.CommandContext(t.Context(), "nbdinfo", "--map=holdfast:changed:"+base.Point, e.URI).CombinedOutput()
		if fields := strings.Fields(string(out)); err != nil || len(fields) < 3 || strings.Join(fields[:3], " ") != "0 8192 1" {
			t.Errorf("nbdinfo: got %v\n%s\nwant the first 8192 bytes changed", err, out)
		}
	})

	exports, err := a.WritableExports()
	if err != nil || len(exports) != 1 {
		t.Fatalf("got %v, %v, want one writable export", exports, err)
	}
	e := exports[0]
	if e.Name != o.Name || e.VM != "web" || e.Point != base.Point || e.Disk != "vda" || e.Size != miB || e.Limit != 4*miB || e.Written != 8*kiB {
		t.Errorf("got %+v, want that of disk vda with 8 KiB written", e)
	}
	if _, err := a.DeletePoints(t.Context(), []string{base.Point}); appliance.KindOf(err) != appliance.Refused || !strings.Contains(err.Error(), o.Name) {
		t.Errorf("deleting the point: got %v, want a refusal that names the export", err)
	}
	other := o
	other.Disk = "vdb"
	if err := a.Export(t.Context(), other, func(appliance.Export) error { return nil }); appliance.KindOf(err) != appliance.Refused {
		t.Errorf("the same name for another disk: got %v, want a refusal", err)
	}

	committed, err := a.CommitExport(t.Context(), o.Name, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	if committed.Mode != "incremental" || committed.VM != "web" || len(committed.Disks) != 2 ||
		committed.Disks[0].Read > 3*chunk || committed.Disks[1].Read != 0 {
		t.Errorf("got %+v, want an incremental point that cost what was written", committed)
	}
	holds := func(point, disk string, want []byte) {
		t.Helper()
		serving(t, a, appliance.ExportOptions{Point: point, Disk: disk}, func(e appliance.Export) {
			if !bytes.Equal(read(t, e.URI), want) {
				t.Errorf("disk %s of point %.8s is wrong", disk, point)
			}
		})
	}
	holds(committed.Point, "vda", want)
	holds(committed.Point, "vdb", vdb)
	holds(base.Point, "vda", vda)
	if p, err := a.ResolvePoint(committed.Point); err != nil || len(p.Config) != 1 {
		t.Errorf("got %+v, %v, want the saved configuration too", p, err)
	}
	elsewhere, err := a.CommitExport(t.Context(), o.Name, "web-repaired", nil)
	if err != nil || elsewhere.VM != "web-repaired" || elsewhere.Disks[0].New != 0 || elsewhere.Disks[0].Read > 3*chunk || elsewhere.Disks[1].Read != 0 {
		t.Errorf("commit to another VM: got %+v, %v", elsewhere, err)
	}
	holds(elsewhere.Point, "vda", want)

	// VM@latest is another point by now; the name goes on with its own.
	again := o
	again.Point = "web@latest"
	serving(t, a, again, func(e appliance.Export) {
		if e.Point != base.Point || !bytes.Equal(read(t, e.URI), want) {
			t.Errorf("got %+v, want to go on with what was written", e)
		}
	})
	again.Point = committed.Point
	if err := a.Export(t.Context(), again, func(appliance.Export) error { return nil }); appliance.KindOf(err) != appliance.Refused ||
		!strings.Contains(err.Error(), "export add "+base.Point[:12]+" --disk vda --writable --name "+o.Name) {
		t.Errorf("the same name for another point: got %v, want a refusal that tells the command", err)
	}
	again.Point, again.Writable, again.Limit = base.Point, false, 0
	if err := a.Export(t.Context(), again, func(appliance.Export) error { return nil }); appliance.KindOf(err) != appliance.Refused {
		t.Errorf("the bare point by the name of a writable export: got %v, want a refusal", err)
	}

	if err := a.RemoveExport(o.Name); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(filepath.Join(data, "overlays")); err != nil || len(left) != 0 {
		t.Errorf("got %v, %v left, want nothing", left, err)
	}
	if _, err := a.CommitExport(t.Context(), o.Name, "", nil); appliance.KindOf(err) != appliance.NotFound {
		t.Errorf("commit of a removed export: got %v, want that there is none", err)
	}
	if err := a.RemoveExport(o.Name); appliance.KindOf(err) != appliance.NotFound {
		t.Errorf("removing it again: got %v, want that there is none", err)
	}
	if _, err := a.DeletePoints(t.Context(), []string{base.Point}); err != nil {
		t.Error(err)
	}
	holds(committed.Point, "vda", want)
}

// TestWritableExportLimit has a client meet the limit: it gets an error, what
// was written before stays.
func TestWritableExportLimit(t *testing.T) {
	t.Parallel()
	a := open(t, newData(t))
	b := backup(t, a, "web", write(t, "vda.raw", noise(miB, 1)))
	o := appliance.ExportOptions{Point: b.Point, Name: "small", Writable: true, Limit: 64 * kiB}
	serving(t, a, o, func(e appliance.Export) {
		qemuIO(t, e.URI, "write -P 1 0 32k", "flush")
		out, err := exec.CommandContext(t.Context(), "qemu-io", "-f", "raw", "-c", "write -P 2 512k 256k", e.URI).CombinedOutput()
		if err == nil || !bytes.Contains(out, []byte("No space left")) {
			t.Errorf("writing past the limit: got %v\n%s\nwant no space left", err, out)
		}
		qemuIO(t, e.URI, "read -P 1 0 32k", "write -P 3 0 32k", "flush", "read -P 3 0 32k")
	})
	o.Limit = appliance.NoLimit
	serving(t, a, o, func(e appliance.Export) {
		qemuIO(t, e.URI, "write -P 2 512k 256k", "flush", "read -P 2 512k 256k", "read -P 3 0 32k")
	})
}

// TestDeleteUnderUnreadable does not delete a point while it is unknown whether
// somebody's writes lie over it.
func TestDeleteUnderUnreadable(t *testing.T) {
	t.Parallel()
	data := newData(t)
	a := open(t, data)
	b := backup(t, a, "web", write(t, "vda.raw", noise(chunk, 1)))
	o := appliance.ExportOptions{Point: b.Point, Name: "need", Writable: true}
	serving(t, a, o, func(e appliance.Export) { qemuIO(t, e.URI, "write 0 4k") })
	file := filepath.Join(data, "overlays", "need.overlay")
	if err := os.Rename(file, file+".away"); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(file, file); err != nil { // a loop, which nobody can open
		t.Fatal(err)
	}
	if _, err := a.DeletePoints(t.Context(), []string{b.Point}); appliance.KindOf(err) != appliance.Refused || !strings.Contains(err.Error(), file) {
		t.Errorf("got %v, want a refusal that names %s", err, file)
	}
	if err := os.Rename(file+".away", file); err != nil {
		t.Fatal(err)
	}
	serving(t, a, o, func(e appliance.Export) { read(t, e.URI) })
}
