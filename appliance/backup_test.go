package appliance_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/appliance"
)

// TestBackupRestore brings two disks of one point back, byte for byte.
func TestBackupRestore(t *testing.T) {
	t.Parallel()
	a := open(t, newData(t))
	disks := [][]byte{noise(3*miB, 1), append(make([]byte, miB), noise(512, 2)...)}
	files := []string{write(t, "system.raw", disks[0]), write(t, "data.raw", disks[1])}
	var last appliance.Progress
	b, err := a.BackupImages(t.Context(), appliance.ImageBackup{
		VM: "web", Files: files, ConfigFiles: []string{write(t, "vm.xml", []byte("<domain/>"))},
	}, func(p appliance.Progress) { last = p })
	if err != nil {
		t.Fatal(err)
	}
	if b.VM != "web" || b.Mode != "full" || b.Consistency != "crash" || len(b.Disks) != 2 || b.Disks[0].Size != 3*miB || b.Disks[1].Name != "data" {
		t.Errorf("got %+v, want a full point of the disks system and data", b)
	}
	if last.Done != 4*miB+512 || last.Total != last.Done || last.Unit != appliance.Bytes {
		t.Errorf("got the last progress %+v, want all %d bytes done", last, 4*miB+512)
	}
	if p, err := a.ResolvePoint(b.Point); err != nil || !slices.Equal(p.Config, []string{"vm.xml"}) || p.Disks[1].Data != chunk {
		t.Errorf("got point %+v, %v, want vm.xml saved, and a chunk of data on the second disk", p, err)
	}
	for i, name := range []string{"system", "data"} {
		var done int64
		to := filepath.Join(t.TempDir(), "restored.img")
		r, err := a.RestoreImage(t.Context(), appliance.ImageRestore{Point: "web@latest", Disk: name, To: to},
			func(p appliance.Progress) { done = p.Done })
		if err != nil || r.Format != "raw" || r.Size != int64(len(disks[i])) || done != r.Size {
			t.Errorf("restore %s: got %+v, %v, %d bytes of progress, want %d", name, r, err, done, len(disks[i]))
		}
		if got, err := os.ReadFile(to); err != nil || !bytes.Equal(got, disks[i]) {
			t.Errorf("restore %s: the file differs (%v)", name, err)
		}
	}
}

func TestDiskNames(t *testing.T) {
	t.Parallel()
	a := open(t, newData(t))
	small, large := noise(chunk, 1), noise(2*chunk, 2)
	for _, tt := range []struct {
		name  string
		files []string
		disks []string
		want  []string
	}{
		{"of the file", []string{write(t, "vda.img", small)}, nil, []string{"vda"}},
		{"kept: the same disk from another file", []string{write(t, "tuesday.img", small)}, nil, []string{"vda"}},
		{"said", []string{write(t, "tuesday.img", small)}, []string{"sda"}, []string{"sda"}},
		{"not kept: another size", []string{write(t, "db.v2.img", large)}, nil, []string{"db.v2"}},
		{"twice the same", []string{write(t, "d.img", small), write(t, "d.raw", small), write(t, "d", small)}, nil, []string{"d", "d-2", "d-3"}},
		{"no stem", []string{write(t, ".raw", small)}, nil, []string{".raw"}},
	} {
		b, err := a.BackupImages(t.Context(), appliance.ImageBackup{VM: "web", Files: tt.files, Disks: tt.disks}, nil)
		if err != nil {
			t.Fatalf("%s: %v", tt.name, err)
		}
		var got []string
		for _, d := range b.Disks {
			got = append(got, d.Name)
		}
		if !slices.Equal(got, tt.want) {
			t.Errorf("%s: got disks %q, want %q", tt.name, got, tt.want)
		}
	}
}

func TestBackupRefuses(t *testing.T) {
	t.Parallel()
	a := open(t, newData(t))
	file, config := write(t, "vda.raw", noise(chunk, 1)), write(t, "vm.xml", []byte("<domain/>"))
	huge := write(t, "huge.xml", make([]byte, 5*miB))
	one := []string{file}
	for _, tt := range []struct {
		name string
		b    appliance.ImageBackup
		want appliance.Kind
		says string
	}{
		{"no VM", appliance.ImageBackup{Files: one}, appliance.Invalid, "VM name"},
		{"a VM with a line break", appliance.ImageBackup{VM: "a\nb", Files: one}, appliance.Invalid, "VM name"},
		{"a VM that is not UTF-8", appliance.ImageBackup{VM: "\xff", Files: one}, appliance.Invalid, "VM name"},
		{"a long VM", appliance.ImageBackup{VM: strings.Repeat("x", 256), Files: one}, appliance.Invalid, "VM name"},
		{"no file", appliance.ImageBackup{VM: "web"}, appliance.Invalid, "file"},
		{"unknown format", appliance.ImageBackup{VM: "web", Files: one, Format: "floppy"}, appliance.Invalid, "floppy"},
		{"too many disks", appliance.ImageBackup{VM: "web", Files: one, Disks: []string{"a", "b"}}, appliance.Invalid, "2 disk names"},
		{"a disk twice", appliance.ImageBackup{VM: "web", Files: []string{file, file}, Disks: []string{"a", "a"}}, appliance.Invalid, `"a"`},
		{"a disk with a separator", appliance.ImageBackup{VM: "web", Files: one, Disks: []string{"../a"}}, appliance.Invalid, "../a"},
		{"missing file", appliance.ImageBackup{VM: "web", Files: []string{file, "/gone.raw"}}, appliance.NotFound, "gone.raw"},
		{"not that format", appliance.ImageBackup{VM: "web", Files: one, Format: "qcow2"}, appliance.Failed, "vda.raw"},
		{"missing configuration", appliance.ImageBackup{VM: "web", Files: one, ConfigFiles: []string{"/gone.xml"}}, appliance.NotFound, "gone.xml"},
		{"configuration twice", appliance.ImageBackup{VM: "web", Files: one, ConfigFiles: []string{config, config}}, appliance.Invalid, "vm.xml"},
		{"huge configuration", appliance.ImageBackup{VM: "web", Files: one, ConfigFiles: []string{huge}}, appliance.Failed, "huge.xml"},
	} {
		_, err := a.BackupImages(t.Context(), tt.b, nil)
		if err == nil || appliance.KindOf(err) != tt.want || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s: got %v, want kind %d and a text with %q", tt.name, err, tt.want, tt.says)
		}
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := a.BackupImages(ended, appliance.ImageBackup{VM: "web", Files: one}, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("after an interrupt: got %v, want %v", err, context.Canceled)
	}
	if points := a.Points(""); len(points) != 0 {
		t.Errorf("got points %+v, want none", points)
	}
}

func TestRestoreRefuses(t *testing.T) {
	t.Parallel()
	a := open(t, newData(t))
	backup(t, a, "web", write(t, "vda.raw", noise(chunk, 1)), write(t, "vdb.raw", noise(chunk, 2)))
	folder := t.TempDir()
	existing := write(t, "precious.raw", []byte("precious"))
	fresh := filepath.Join(folder, "new.raw")
	for _, tt := range []struct {
		name string
		r    appliance.ImageRestore
		want appliance.Kind
		says string
	}{
		{"no target", appliance.ImageRestore{Point: "web@latest", Disk: "vda"}, appliance.Invalid, "file"},
		{"which disk", appliance.ImageRestore{Point: "web@latest", To: fresh}, appliance.Invalid, "vda, vdb"},
		{"no such disk", appliance.ImageRestore{Point: "web@latest", Disk: "vdc", To: fresh}, appliance.NotFound, "vdc"},
		{"no such point", appliance.ImageRestore{Point: "db@latest", To: fresh}, appliance.NotFound, "db"},
		{"unknown format", appliance.ImageRestore{Point: "web@latest", Disk: "vda", To: fresh, Format: "floppy"}, appliance.Invalid, "floppy"},
		{"extension of a format only read", appliance.ImageRestore{Point: "web@latest", Disk: "vda", To: filepath.Join(folder, "x.VHD")}, appliance.Invalid, "vhd"},
		{"existing target", appliance.ImageRestore{Point: "web@latest", Disk: "vda", To: existing, Overwrite: true}, appliance.Refused, "precious.raw"},
		{"a folder", appliance.ImageRestore{Point: "web@latest", Disk: "vda", To: folder}, appliance.Refused, folder},
		{"a character device", appliance.ImageRestore{Point: "web@latest", Disk: "vda", To: os.DevNull, Overwrite: true}, appliance.Refused, os.DevNull},
		{"no such folder", appliance.ImageRestore{Point: "web@latest", Disk: "vda", To: "/nonexistent/new.raw"}, appliance.NotFound, "nonexistent"},
	} {
		_, err := a.RestoreImage(t.Context(), tt.r, nil)
		if err == nil || appliance.KindOf(err) != tt.want || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s: got %v, want kind %d and a text with %q", tt.name, err, tt.want, tt.says)
		}
	}
	if got, err := os.ReadFile(existing); err != nil || string(got) != "precious" {
		t.Errorf("the existing file: got %q, %v, want it untouched", got, err)
	}
	if entries, err := os.ReadDir(folder); err != nil || len(entries) != 0 {
		t.Errorf("restores that failed left %v, %v", entries, err)
	}
}

// TestBackupFromNBD backs up an export: what it holds is there already.
func TestBackupFromNBD(t *testing.T) {
	t.Parallel()
	a := open(t, newData(t))
	b := backup(t, a, "web", write(t, "vda.raw", append(noise(miB, 1), make([]byte, miB)...)))
	serving(t, a, appliance.ExportOptions{Point: b.Point, Name: "backups/copy"}, func(e appliance.Export) {
		copied, err := a.BackupImages(t.Context(), appliance.ImageBackup{VM: "copy", Files: []string{e.URI}}, nil)
		if err != nil {
			t.Error(err)
			return
		}
		if d := copied.Disks[0]; d.Name != "copy" || d.Size != 2*miB || d.Read != miB || d.Changed != miB || d.New != 0 {
			t.Errorf("got %+v, want a disk of 2 MiB, half of it read and nothing new", d)
		}
		named, err := a.BackupImages(t.Context(), appliance.ImageBackup{VM: "named", Files: []string{e.URI}, Disks: []string{"vda"}}, nil)
		if err != nil {
			t.Error(err)
			return
		}
		diff, err := a.DiffPoints(t.Context(), b.Point, named.Point, "")
		if err != nil || len(diff.Disks) != 1 || diff.Disks[0].Bytes != 0 {
			t.Errorf("got %+v, %v, want the same disk", diff, err)
		}
	})
	for _, tt := range []struct {
		name, uri, format string
		want              appliance.Kind
	}{
		{"no server", "nbd+unix:///?socket=/nonexistent/socket", "", appliance.NotFound},
		{"no URI", "nbd+unix:///", "", appliance.Invalid},
		{"a format", "nbd+unix:///?socket=/nonexistent/socket", "qcow2", appliance.Invalid},
	} {
		_, err := a.BackupImages(t.Context(), appliance.ImageBackup{VM: "copy", Files: []string{tt.uri}, Format: tt.format}, nil)
		if err == nil || appliance.KindOf(err) != tt.want {
			t.Errorf("%s: got %v, want kind %d", tt.name, err, tt.want)
		}
	}
}

// TestBackupFromNBDInterrupted ends a backup whose server has stopped to answer.
func TestBackupFromNBDInterrupted(t *testing.T) {
	t.Parallel()
	a := open(t, newData(t))
	socket := filepath.Join(shortFolder(t), "nbd")
	server := exec.Command("nbdkit", "--foreground", "--unix", socket, "--filter=delay", "pattern", "1M", "rdelay=3600")
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Process.Kill(); server.Wait() })
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(socket); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("nbdkit does not listen")
		}
	}
	interrupted := errors.New("interrupted")
	ctx, cancel := context.WithCancelCause(t.Context())
	time.AfterFunc(200*time.Millisecond, func() { cancel(interrupted) })
	_, err := a.BackupImages(ctx, appliance.ImageBackup{VM: "web", Files: []string{"nbd+unix:///?socket=" + socket}}, nil)
	if !errors.Is(err, interrupted) {
		t.Errorf("got %v, want the cause of the interruption", err)
	}
}
