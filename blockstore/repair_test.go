package blockstore

import (
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/durable"
	"github.com/holdfast-backup/holdfast/internal/faultfs"
)

// listFiles lists the files below a folder but for the index, with their sizes.
func listFiles(t *testing.T, dir string) []string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && d.Name() == indexDir {
			return filepath.SkipDir
		}
		if name, err := filepath.Rel(dir, path); err == nil && !d.IsDir() {
			out = append(out, name)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// readable counts the chunks of a disk that cannot be read, and checks the others.
func unreadable(t *testing.T, r *Repository, id PointID, c content) int {
	t.Helper()
	d, err := r.OpenDisk(id, "vda", DiskOptions{Whole: true})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	lost := 0
	b := make([]byte, testChunk)
	for i := range c {
		if _, err := d.ReadAt(b, int64(i)*testChunk); err != nil && int64(i+1)*testChunk < d.Size() {
			lost++
			if !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "disk vda") || !strings.Contains(err.Error(), "offset") {
				t.Errorf("chunk %d: got %v, want an ErrDamaged that names disk and offset", i, err)
			}
		} else if err == nil && string(b) != string(chunkOf(c[i])) {
			t.Errorf("chunk %d has other bytes", i)
		}
	}
	return lost
}

// Whatever is wrong with a segment: a repair first tells what it would do and does nothing, then
// stores what is good anew and keeps the old file. A collection works then; what is lost is named
// until a backup heals it, and then nothing is left to do.
func TestRepairSegments(t *testing.T) {
	t.Parallel()
	c := numbers(1, 80)
	for _, passphrase := range []string{"", "secret"} {
		base := createIn(t, memoryDir(t), CreateOptions{Passphrase: passphrase})
		o := Options{Passphrase: passphrase, SegmentSize: 64 << 10}
		r := open(t, base, o)
		doomed := mustBackup(t, r, "x", numbers(500, 3))
		p := mustBackup(t, r, "vm", c)
		loc, ok, err := r.find(r.ID(chunkOf(40)))
		if err != nil || !ok {
			t.Fatal(ok, err)
		}
		closeOnce(t, r)
		must := func(err error) {
			if err != nil {
				t.Fatal(err)
			}
		}
		sick := &badSectors{FS: durable.OS()}
		for _, tt := range []struct {
			name  string
			harm  func(file, other string, size int64)
			lost  [2]int // at least, at most
			moved int
		}{
			{"header", func(file, _ string, _ int64) { flip(t, file, 20) }, [2]int{}, 1},
			{"contents", func(file, _ string, size int64) { flip(t, file, size-100) }, [2]int{}, 1},
			{"footer", func(file, _ string, size int64) { flip(t, file, size-5) }, [2]int{}, 1},
			{"record", func(file, _ string, _ int64) { flip(t, file, int64(loc.Off)+70) }, [2]int{1, 1}, 1},
			{"record's header", func(file, _ string, _ int64) { flip(t, file, int64(loc.Off)+13) }, [2]int{1, 1}, 1},
			{"contents and record", func(file, _ string, size int64) {
				flip(t, file, int64(loc.Off)+70)
				flip(t, file, size-100)
			}, [2]int{1, 1}, 1},
			{"truncated", func(file, _ string, size int64) { must(os.Truncate(file, size/2)) }, [2]int{2, 6}, 1},
			{"folder", func(file, _ string, _ int64) { must(os.Remove(file)); must(os.Mkdir(file, 0o700)) }, [2]int{6, 9}, 1},
			{"deleted", func(file, _ string, _ int64) { must(os.Remove(file)) }, [2]int{6, 9}, 0},
			{"unreadable", func(file, _ string, size int64) { sick.file, sick.from, sick.to = file, size/2, size/2+1 }, [2]int{1, 1}, 1},
			{"swapped", func(file, other string, _ int64) {
				must(os.Rename(file, file+"x"))
				must(os.Rename(other, file))
				must(os.Rename(file+"x", other))
			}, [2]int{}, 2},
		} {
			if passphrase != "" && tt.moved == 1 && tt.name != "contents and record" && !extended() {
				continue
			}
			dir := crash(t, base)
			sick.file = ""
			o.fs = sick
			r := open(t, dir, o)
			file := filepath.Join(dir, segmentsDir, segmentName(loc.Segment, loc.Generation, segmentSuffix))
			files := segmentFiles(t, dir, segmentSuffix)
			info, err := os.Stat(file)
			must(err)
			tt.harm(file, files[len(files)-2], info.Size())
			fail := func(format string, args ...any) {
				t.Helper()
				t.Errorf("%s, passphrase %q: "+format, append([]any{tt.name, passphrase}, args...)...)
			}
			if v, err := r.Verify(t.Context(), VerifyOptions{}); err != nil || len(v.Errors) == 0 {
				fail("verify: got %+v, %v, want errors", v, err)
			}
			before := listFiles(t, dir)
			got, err := r.Repair(t.Context(), RepairOptions{})
			if err != nil || !got.Remains() || got.Applied || !slices.Equal(listFiles(t, dir), before) {
				fail("dry run: got %+v, %v, want something to do and nothing done", got, err)
			}
			got, err = r.Repair(t.Context(), RepairOptions{Apply: true})
			if err != nil || int(got.LostChunks) < tt.lost[0] || int(got.LostChunks) > tt.lost[1] || got.Remains() != (got.LostChunks > 0) {
				fail("repair: got %+v, %v, want %v lost", got, err, tt.lost)
			}
			if kept, err := ListQuarantine(dir); err != nil || (len(kept) > 0) != (tt.moved > 0) || tt.moved > 0 && len(kept[0].Files) != tt.moved {
				fail("quarantine: got %+v, %v, want %d files", kept, err, tt.moved)
			}
			sick.file = ""
			emptyCache(r)
			for range 2 {
				if n := unreadable(t, r, p.ID, c); n != int(got.LostChunks) {
					fail("%d chunks are lost, want %d", n, got.LostChunks)
				}
				v, err := r.Verify(t.Context(), VerifyOptions{})
				if err != nil || v.DamagedChunks != got.LostChunks || len(v.Errors) != int(got.LostChunks) {
					fail("verify after the repair: got %+v, %v", v, err)
				}
				closeOnce(t, r)
				r = open(t, dir, o)
			}
			must(r.DeletePoint(doomed.ID))
			if _, err := r.Collect(t.Context(), CollectOptions{}); err != nil {
				fail("collect: %v", err)
			}
			mustBackup(t, r, "vm", c)
			checkDisk(t, r, p.ID, c)
			checkSound(t, r)
			if got, err := r.Repair(t.Context(), RepairOptions{Apply: true}); err != nil || len(got.Actions) > 0 || got.Remains() {
				fail("another repair: got %+v, %v, want nothing to do", got, err)
			}
			closeOnce(t, r)
		}
	}
}

// Files of points and of the catalog: what can be known is written anew, what can't be is struck
// off the list and kept.
func TestRepairPoints(t *testing.T) {
	t.Parallel()
	base := createIn(t, memoryDir(t), CreateOptions{})
	r := open(t, base, Options{})
	p := mustBackup(t, r, "vm", numbers(1, 3))
	other := mustBackup(t, r, "vm", numbers(2, 4))
	closeOnce(t, r)
	name := string(p.ID) + pointSuffix
	for _, tt := range []struct {
		name   string
		harm   func(folder string) error
		points int
		kept   []string
	}{
		{"one copy", func(f string) error { flip(t, filepath.Join(f, name), 60); return nil }, 2, []string{"points/" + name}},
		{"both copies", func(f string) error {
			flip(t, filepath.Join(f, name), 60)
			flip(t, filepath.Join(f, name), 60+envelopeAlign)
			return nil
		}, 1, []string{"points/" + name}},
		{"missing", func(f string) error { return os.Remove(filepath.Join(f, name)) }, 1, nil},
		{"swapped", func(f string) error {
			data, err := os.ReadFile(filepath.Join(f, string(other.ID)+pointSuffix))
			return errors.Join(err, os.WriteFile(filepath.Join(f, name), data, 0o600))
		}, 1, []string{"points/" + name}},
		{"catalog", func(f string) error { flip(t, filepath.Join(f, catalogFile), 60); return nil }, 2, []string{"points/catalog"}},
		{"both catalogs", func(f string) error {
			return errors.Join(os.Remove(filepath.Join(f, catalogFile)), os.Truncate(filepath.Join(f, catalogCopyFile), 5))
		}, 2, nil},
		{"configuration", func(f string) error { flip(t, filepath.Join(f, "..", configFile), 9); return nil }, 2, []string{configFile}},
		{"foreign file", func(f string) error { return os.WriteFile(filepath.Join(f, "notes"), nil, 0o600) }, 2, nil},
	} {
		dir := crash(t, base)
		if err := tt.harm(filepath.Join(dir, pointsDir)); err != nil {
			t.Fatal(err)
		}
		r := open(t, dir, Options{})
		before := listFiles(t, dir)
		got, err := r.Repair(t.Context(), RepairOptions{})
		if err != nil || got.Remains() != (tt.name != "foreign file") || len(got.Actions) == 0 || !slices.Equal(listFiles(t, dir), before) {
			t.Errorf("%s, dry run: got %+v, %v", tt.name, got, err)
		}
		got, err = r.Repair(t.Context(), RepairOptions{Apply: true})
		if err != nil || got.Remains() {
			t.Errorf("%s: got %+v, %v", tt.name, got, err)
		}
		if tt.points == 1 && (got.Actions[0].VM != "vm" || !got.Actions[0].Time.Equal(p.Time)) {
			t.Errorf("%s: got %+v, want what is lost", tt.name, got.Actions)
		}
		kept, err := ListQuarantine(dir)
		var files []string
		for _, k := range kept {
			files = append(files, k.Files...)
		}
		if err != nil || !slices.Equal(files, tt.kept) && tt.name != "both catalogs" {
			t.Errorf("%s: kept %v, %v, want %v", tt.name, files, err, tt.kept)
		}
		for range 2 {
			checkSound(t, r)
			if n := len(r.Points()); n != tt.points {
				t.Errorf("%s: got %d points, want %d", tt.name, n, tt.points)
			}
			checkDisk(t, r, other.ID, numbers(2, 4))
			if _, err := r.Collect(t.Context(), CollectOptions{}); err != nil {
				t.Errorf("%s: collect: %v", tt.name, err)
			}
			closeOnce(t, r)
			r = open(t, dir, Options{})
		}
		closeOnce(t, r)
	}
}

// A dry run knows as well as a repair that a locked point stays, and a segment that was cut is told of.
func TestRepairLockedPoint(t *testing.T) {
	t.Parallel()
	dir := createIn(t, memoryDir(t), CreateOptions{})
	r := open(t, dir, Options{})
	p := mustBackup(t, r, "vm", numbers(1, 3))
	if _, err := r.LockPoint(p.ID, time.Hour); err != nil {
		t.Fatal(err)
	}
	if err := r.Deletable(p.ID); !errors.Is(err, ErrLocked) {
		t.Errorf("got %v, want ErrLocked", err)
	}
	closeOnce(t, r)
	if err := os.Remove(filepath.Join(dir, pointsDir, string(p.ID)+pointSuffix)); err != nil {
		t.Fatal(err)
	}
	segments := listFiles(t, filepath.Join(dir, segmentsDir))
	if err := os.Truncate(filepath.Join(dir, segmentsDir, segments[0]), 5000); err != nil {
		t.Fatal(err)
	}
	w := newWarnings()
	r = open(t, dir, Options{Log: slog.New(w)})
	if !w.has("not the length") {
		t.Errorf("a segment that was cut: got warnings %q", *w.text)
	}
	for _, apply := range []bool{false, true} {
		got, err := r.Repair(t.Context(), RepairOptions{Apply: apply})
		if err != nil || len(got.Actions) != 1 || got.Actions[0].Done || !strings.Contains(got.Actions[0].Action, "is locked") {
			t.Errorf("apply %v: got %+v, %v, want a point that is locked", apply, got, err)
		}
	}
}

// The power goes away at any change that a repair makes: nothing is lost, and the next one goes on.
func TestRepairPowerLoss(t *testing.T) {
	t.Parallel()
	c := numbers(1, 20)
	base := newMachine(machineFolder(t), "")
	if err := errors.Join(base.create(), base.open()); err != nil {
		t.Fatal(err)
	}
	p := mustBackup(t, base.r, "vm", c)
	if err := base.close(); err != nil {
		t.Fatal(err)
	}
	folder := filepath.Join(base.dir, segmentsDir)
	files, err := base.fs.ReadDir(folder)
	if err != nil {
		t.Fatal(err)
	}
	rot := func(name string, off int64) {
		f, err := base.fs.OpenWrite(name)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if size, err := f.Size(); err != nil || off < 0 {
			off += size
		}
		b := make([]byte, 1)
		_, readErr := f.ReadAt(b, off)
		_, writeErr := f.WriteAt([]byte{b[0] ^ 1}, off)
		if err := errors.Join(readErr, writeErr, f.Sync()); err != nil {
			t.Fatal(err)
		}
	}
	rot(filepath.Join(folder, files[0].Name()), 20)
	rot(filepath.Join(folder, files[1].Name()), segmentHeaderSize+recordHeaderSize+9)
	rot(filepath.Join(folder, files[2].Name()), -90)
	rot(filepath.Join(base.dir, pointsDir, string(p.ID)+pointSuffix), 60)
	rot(filepath.Join(base.dir, configFile), 9)
	step := 7
	if extended() {
		step = 1
	}
	for n, stopped := 1, true; stopped && !t.Failed(); n += step {
		for _, loss := range []faultfs.Loss{faultfs.LoseAll, faultfs.LoseNothing, faultfs.Loss(n)} {
			stopped = repairStopped(t, base.powerLoss(faultfs.LoseNothing), n, loss, p, c)
			if t.Failed() {
				t.Fatalf("change %d, loss %v", n, loss)
			}
		}
	}
}

// repairStopped repairs m, a chunk of whose point p is damaged, until the n-th change, and then what
// is left of it. It reports whether there was an n-th.
func repairStopped(t *testing.T, m *machine, n int, loss faultfs.Loss, p Point, c content) bool {
	if err := m.open(); err != nil {
		t.Fatal(err)
	}
	if _, err := m.r.Verify(t.Context(), VerifyOptions{}); err != nil {
		t.Fatal(err)
	}
	m.fs.Fail(faultfs.Fault{N: n, Kill: true})
	_, err := m.r.Repair(t.Context(), RepairOptions{Apply: true})
	stopped := m.fs.Hit()
	if err == nil && stopped {
		t.Error("a repair that was stopped says that it is done")
	}
	after := m.powerLoss(loss)
	m.kill()
	if err := after.open(); err != nil {
		t.Fatal(err)
	}
	defer after.kill()
	if lost := unreadable(t, after.r, p.ID, c); lost > 1 {
		t.Errorf("%d chunks are lost, want 1", lost)
	}
	if v, err := after.r.Verify(t.Context(), VerifyOptions{}); err != nil || v.DamagedChunks != 1 {
		t.Errorf("verify: got %+v, %v", v, err)
	}
	if got, err := after.r.Repair(t.Context(), RepairOptions{Apply: true}); err != nil || got.LostChunks != 1 {
		t.Errorf("repair: got %+v, %v", got, err)
	}
	if v, err := after.r.Verify(t.Context(), VerifyOptions{}); err != nil || len(v.Errors) != 1 {
		t.Errorf("verify of what was repaired: got %+v, %v", v, err)
	}
	mustBackup(t, after.r, "vm", c)
	checkSound(t, after.r)
	checkDisk(t, after.r, p.ID, c)
	return stopped
}

// What a repair replaced can be put back, and be removed for good.
func TestQuarantineFolder(t *testing.T) {
	t.Parallel()
	dir := create(t, CreateOptions{})
	if got, err := ListQuarantine(dir); err != nil || len(got) != 0 {
		t.Errorf("got %v, %v, want nothing", got, err)
	}
	o := Options{SegmentSize: 64 << 10}
	r := open(t, dir, o)
	c := numbers(1, 30)
	p := mustBackup(t, r, "vm", c)
	if err := r.appender.finish(); err != nil {
		t.Fatal(err)
	}
	file := segmentFiles(t, dir, segmentSuffix)[1]
	whole := mustRead(t, file)
	flip(t, file, segmentHeaderSize+recordHeaderSize+9)
	if _, err := r.Verify(t.Context(), VerifyOptions{}); err != nil {
		t.Fatal(err)
	}
	got, err := r.Repair(t.Context(), RepairOptions{Apply: true})
	if err != nil || got.Quarantine == "" || got.LostChunks != 1 {
		t.Fatalf("got %+v, %v", got, err)
	}
	mustBackup(t, r, "vm", c)
	list, err := ListQuarantine(dir)
	name := filepath.Join(segmentsDir, filepath.Base(file))
	if err != nil || len(list) != 1 || list[0].Stamp != got.Quarantine || !slices.Equal(list[0].Files, []string{name}) || list[0].Bytes != int64(len(whole)) {
		t.Fatalf("got %+v, %v", list, err)
	}
	for _, f := range []func() error{
		func() error { _, _, err := RestoreQuarantine(dir, got.Quarantine); return err },
		func() error { _, err := RemoveQuarantine(dir, got.Quarantine); return err },
	} {
		if _, locked := errors.AsType[*LockedError](f()); !locked {
			t.Error("the quarantine of an open repository was changed")
		}
	}
	closeOnce(t, r)
	for _, stamp := range []string{"", ".", "..", "../segments", "20000101T000000Z"} {
		if _, err := RemoveQuarantine(dir, stamp); !errors.Is(err, ErrNotFound) {
			t.Errorf("remove %q: got %v, want %v", stamp, err, ErrNotFound)
		}
	}
	if err := os.WriteFile(file, []byte("in the way"), 0o600); err != nil {
		t.Fatal(err)
	}
	if restored, kept, err := RestoreQuarantine(dir, got.Quarantine); err != nil || len(restored) != 0 || !slices.Equal(kept, []string{name}) {
		t.Errorf("with a file in the way: got %v, %v, %v", restored, kept, err)
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if restored, kept, err := RestoreQuarantine(dir, got.Quarantine); err != nil || len(kept) != 0 || !slices.Equal(restored, []string{name}) {
		t.Errorf("got %v, %v, %v", restored, kept, err)
	}
	r = open(t, dir, o)
	checkDisk(t, r, p.ID, c) // though there is a bad record of it again
	checkSound(t, r)
	flip(t, file, 20)
	if got, err = r.Repair(t.Context(), RepairOptions{Apply: true}); err != nil || got.Remains() {
		t.Errorf("got %+v, %v", got, err)
	}
	closeOnce(t, r)
	if removed, err := RemoveQuarantine(dir, got.Quarantine); err != nil || len(removed.Files) != 1 {
		t.Errorf("remove: got %+v, %v", removed, err)
	}
	if list, err := ListQuarantine(dir); err != nil || len(list) != 0 {
		t.Errorf("got %v, %v, want nothing", list, err)
	}
}
