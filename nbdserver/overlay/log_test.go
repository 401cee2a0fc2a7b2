package overlay_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/durable"
	"github.com/holdfast-backup/holdfast/internal/faultfs"
	"github.com/holdfast-backup/holdfast/nbdserver/overlay"
)

// answered leaves each sector with what it holds after a kill: the content that was
// answered, or if the operation that was killed concerns it, any mixture of that and of
// what would have come.
func (m *model) answered() {
	for _, h := range m.sectors {
		keep := 1
		if h.unsure {
			keep = 2
		}
		h.versions = h.versions[max(0, len(h.versions)-keep):]
	}
}

// TestKilled kills the process in every operation on files in turn: what was answered is
// there, synced or not. The next process is killed as it opens, again and again.
func TestKilled(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name   string
		effect faultfs.Effect
		limit  int64 // of the log
		holes  bool
	}{
		{"nothing done", faultfs.Nothing, 0, true},
		{"half done, small log", faultfs.Half, overlay.LogRoom(3), true},
		{"done, no holes", faultfs.Whole, overlay.LogRoom(2), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			for n := 1; ; n++ {
				fsys, o := inMemory()
				o = overlay.WithLogLimit(o, tt.limit)
				if !tt.holes {
					o.FS = noHoles{fsys}
				}
				disk := pattern(crashSize)
				r := &crashRun{model: newModel(t, disk), disk: disk, o: o, fsys: fsys, kill: true}
				fault := faultfs.Fault{N: n, Kill: true, Effect: tt.effect}
				fsys.Fail(fault)
				r.run(t)
				if !fsys.Hit() {
					return
				}
				r.model.answered()
				r.recoverKilled(t, fault)
				if t.Failed() {
					trace := fsys.Trace(faultfs.Changes)
					t.Fatalf("killed in operation %d, %v", n, trace[n-1])
				}
			}
		})
	}
}

// recoverKilled opens the overlay, killed in the first operation that this takes, in the
// second, and so on until it is open.
func (r *crashRun) recoverKilled(t *testing.T, fault faultfs.Fault) {
	t.Helper()
	for fault.N = 1; ; fault.N++ {
		r.fsys.Fail(fault)
		ov, err := overlay.Open(crashPath, r.disk, r.o)
		if r.fsys.Hit() {
			continue
		}
		if err != nil && !r.created {
			return // Create was killed: there is none
		}
		ok(t, err)
		r.model.check(t, ov, true)
		r.model.take(t, ov)
		// What can be read is durable.
		after := open(t, crashPath, r.disk, options(r.fsys.PowerLoss(faultfs.LoseAll)))
		r.model.check(t, after, false)
		return
	}
}

// TestModelKilled has many write next to each other and to sync, and opens the overlay
// without closing it.
func TestModelKilled(t *testing.T) {
	t.Parallel()
	for _, seed := range []uint64{1, 2, rand.Uint64()} {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "overlay")
			disk := pattern(page + 300*kib + 123)
			start := int64(page - 300*kib)
			want := read(t, disk, start, disk.Size()-start)
			o := overlay.WithLogLimit(overlay.Options{}, overlay.LogRoom(40))
			ok(t, create(t, path, disk, o).Close())
			const workers = 6
			for round := range uint64(6) {
				ov := open(t, path, disk, o)
				wantBytes(t, ov, start, want)
				var wg sync.WaitGroup
				for i := range int64(workers) {
					from, to := int64(len(want))*i/workers, int64(len(want))*(i+1)/workers
					wg.Go(func() {
						work(t, ov, rand.New(rand.NewPCG(seed, round<<8|uint64(i))), want[from:to], start+from)
					})
				}
				wg.Wait()
				if t.Failed() {
					return
				}
			}
			ov := open(t, path, disk, o)
			wantBytes(t, ov, start, want)
			ok(t, ov.Close())
		})
	}
}

// hooked is a file system that calls before each Sync of a file and each write to one
// that it creates, which is a log's.
type hooked struct {
	durable.FS
	sync, log func()
}

type hookedFile struct {
	durable.File
	sync, write func()
}

func (h hooked) OpenWrite(name string) (durable.File, error) {
	f, err := h.FS.OpenWrite(name)
	if err != nil {
		return nil, err
	}
	return hookedFile{f, h.sync, func() {}}, nil
}

func (h hooked) Create(name string) (durable.File, error) {
	f, err := h.FS.Create(name)
	if err != nil {
		return nil, err
	}
	return hookedFile{f, func() {}, h.log}, nil
}

func (f hookedFile) Sync() error {
	f.sync()
	return f.File.Sync()
}

func (f hookedFile) WriteAt(p []byte, off int64) (int, error) {
	f.write()
	return f.File.WriteAt(p, off)
}

// TestSyncedInChange has a Sync begin while a change is logged: it covers the change,
// or leaves it in the log.
func TestSyncedInChange(t *testing.T) {
	t.Parallel()
	fsys, o := inMemory()
	disk := pattern(mib)
	var ov *overlay.Overlay
	var once sync.Once
	synced := make(chan error, 1)
	o.FS = hooked{fsys, func() {}, func() {
		if ov != nil {
			once.Do(func() {
				go func() { synced <- ov.Sync() }()
				time.Sleep(50 * time.Millisecond) // it waits for the log now, or has gone too far
			})
		}
	}}
	opened := create(t, "/d/o", disk, o)
	write(t, opened, bytesOf(1, block), 0)
	ov = opened
	write(t, ov, bytesOf(2, block), block)
	ok(t, <-synced)
	wantBytes(t, open(t, "/d/o", disk, options(fsys)), 0, append(bytesOf(1, block), bytesOf(2, block)...))
}

// TestWriteInChange has two write to one block, and a kill before the change of the
// first is logged: the second is not answered, or is there.
func TestWriteInChange(t *testing.T) {
	t.Parallel()
	fsys, o := inMemory()
	disk := pattern(mib)
	var ov *overlay.Overlay
	second := make(chan error, 1)
	var once sync.Once
	answered := false
	o.FS = hooked{fsys, func() {}, func() {
		if ov != nil {
			once.Do(func() {
				go func() {
					_, err := ov.WriteAt(bytesOf(2, sector), 4*sector)
					second <- err
				}()
				select {
				case err := <-second:
					answered = err == nil
					second <- err
				case <-time.After(50 * time.Millisecond):
				}
				fsys.Fail(faultfs.Fault{N: 1, Kill: true})
			})
		}
	}}
	opened := create(t, "/d/o", disk, o)
	write(t, opened, bytesOf(1, block), 5*block)
	ov = opened
	if _, err := ov.WriteAt(bytesOf(1, sector), 0); err == nil || !fsys.Hit() {
		t.Fatalf("got %v from a write without its log", err)
	}
	if err := <-second; !answered && err == nil {
		t.Error("a write was answered after the kill")
	}
	fsys.Fail(faultfs.Fault{})
	want := read(t, disk, 4*sector, sector)
	if answered {
		want = bytesOf(2, sector)
	}
	wantBytes(t, open(t, "/d/o", disk, options(fsys)), 4*sector, want)
}

// TestChangedInSync changes blocks while a Sync is under way, the same ones and others.
func TestChangedInSync(t *testing.T) {
	t.Parallel()
	fsys, o := inMemory()
	disk := pattern(mib)
	changes := []func(*overlay.Overlay) error{
		func(ov *overlay.Overlay) error { return ov.Zero(0, block) },
		func(ov *overlay.Overlay) error { _, err := ov.WriteAt(bytesOf(2, block), 0); return err },
		func(ov *overlay.Overlay) error { _, err := ov.WriteAt(bytesOf(3, 10), 5*block); return err },
	}
	for n := range len(changes) + 1 {
		path := fmt.Sprint("/d/o", n)
		var ov *overlay.Overlay
		todo := changes[:n]
		o.FS = hooked{fsys, func() {
			if ov != nil && len(todo) > 0 {
				ok(t, todo[0](ov))
				todo = todo[1:]
			}
		}, func() {}}
		opened := create(t, path, disk, o)
		write(t, opened, bytesOf(1, 2*block), 0)
		ov = opened
		ok(t, ov.Sync()) // in which three Syncs of the file are
		want := read(t, ov, 0, mib)
		ov = nil
		wantBytes(t, open(t, path, disk, options(fsys)), 0, want)
	}
}

// TestBoot tells by the boot's id whether the log is believed.
func TestBoot(t *testing.T) {
	t.Parallel()
	disk := pattern(mib)
	boots := func(id byte, err error) func() ([16]byte, error) {
		return func() ([16]byte, error) { return [16]byte{id}, err }
	}
	for _, tt := range []struct {
		name          string
		before, after func() ([16]byte, error)
		kept          bool
	}{
		{"same", boots(1, nil), boots(1, nil), true},
		{"this", overlay.ReadBoot, overlay.ReadBoot, true},
		{"other", boots(1, nil), boots(2, nil), false},
	} {
		fsys, o := inMemory()
		ov := create(t, "/d/o", disk, overlay.WithBoot(o, tt.before))
		write(t, ov, bytesOf(1, block), block)
		ok(t, ov.Sync())
		write(t, ov, bytesOf(2, 10), 0)
		ok(t, ov.Zero(block, block))
		want := read(t, ov, 0, mib)
		if !tt.kept {
			copy(want, read(t, disk, 0, block))
		}
		ov = open(t, "/d/o", disk, overlay.WithBoot(o, tt.after))
		wantBytes(t, ov, 0, want[:block])
		wantBytes(t, ov, 2*block, want[2*block:])
		if got := read(t, ov, block, 1)[0]; tt.kept && got != 0 {
			t.Errorf("%s: got byte %d of a block that was zeroed", tt.name, got)
		}
		if got := ov.Used(); tt.kept && got != block {
			t.Errorf("%s: got %d bytes used, want %d", tt.name, got, block)
		}
		if size := logSize(t, fsys); size != 0 {
			t.Errorf("%s: got a log of %d bytes after opening, want 0", tt.name, size)
		}
	}
	fsys, o := inMemory()
	unknown := errors.New("no /proc")
	if _, err := overlay.Create("/d/o", disk, overlay.WithBoot(o, boots(0, unknown))); !errors.Is(err, unknown) {
		t.Errorf("create without a boot's id: got %v, want %v", err, unknown)
	}
	ok(t, create(t, "/d/o", disk, options(fsys)).Close())
	if _, err := overlay.Open("/d/o", disk, overlay.WithBoot(o, boots(0, unknown))); !errors.Is(err, unknown) {
		t.Errorf("open without a boot's id: got %v, want %v", err, unknown)
	}
}

// logSize returns the length of the log of /d/o, 0 if there is none.
func logSize(t *testing.T, fsys *faultfs.FS) int64 {
	t.Helper()
	f, err := fsys.Open("/d/o.log")
	if errors.Is(err, os.ErrNotExist) {
		return 0
	}
	ok(t, err)
	defer f.Close()
	size, err := f.Size()
	ok(t, err)
	return size
}

// TestLogFiles follows the log from nothing to its end.
func TestLogFiles(t *testing.T) {
	t.Parallel()
	fsys, o := inMemory()
	disk := pattern(mib)
	o = overlay.WithLogLimit(o, overlay.LogRoom(5))
	ov := create(t, "/d/o", disk, o)
	_ = read(t, ov, 0, mib)
	ok(t, ov.Sync())
	if entries, err := fsys.ReadDir("/d"); err != nil || len(entries) != 1 {
		t.Errorf("without a change: got %v, %v, want one file", entries, err)
	}
	for n := range int64(23) {
		write(t, ov, bytesOf(1, block), n*block)
		write(t, ov, bytesOf(2, block), n*block) // which changes no state
		if got, want := logSize(t, fsys), overlay.LogRoom(n%5+1); got != want {
			t.Errorf("after %d changes: got a log of %d bytes, want %d", n+1, got, want)
		}
	}
	ok(t, ov.Close())
	if got := logSize(t, fsys); got != 0 {
		t.Errorf("closed: got a log of %d bytes, want 0", got)
	}
	ov = open(t, "/d/o", disk, o)
	write(t, ov, bytesOf(3, block), 200*kib)
	// Another overlay of the name does not believe it, nor is it left.
	ok(t, fsys.Remove("/d/o"))
	ov = create(t, "/d/o", disk, o)
	wantBytes(t, ov, 0, read(t, disk, 0, mib))
	write(t, ov, bytesOf(3, block), 0)
	ok(t, overlay.Remove("/d/o", o))
	if entries, err := fsys.ReadDir("/d"); err != nil || len(entries) != 0 {
		t.Errorf("removed: got %v, %v, want nothing", entries, err)
	}
}

// TestLogFails has operations on the log fail.
func TestLogFails(t *testing.T) {
	t.Parallel()
	disk := pattern(mib)
	for _, tt := range []struct {
		name  string
		fault faultfs.Fault
		want  error
	}{
		{"create", faultfs.Fault{Kinds: faultfs.Create, N: 1, Err: syscall.EACCES}, syscall.EIO},
		{"create, full", faultfs.Fault{Kinds: faultfs.Create, N: 1, Err: syscall.ENOSPC}, syscall.ENOSPC},
		{"write", faultfs.Fault{Kinds: faultfs.Write, N: 3, Effect: faultfs.Whole}, syscall.EIO},
		{"write, full", faultfs.Fault{Kinds: faultfs.Write, N: 3, Err: syscall.ENOSPC}, syscall.ENOSPC},
	} {
		fsys, o := inMemory()
		ov := create(t, "/d/o", disk, o)
		fsys.Fail(tt.fault)
		_, err := ov.WriteAt(bytesOf(1, 10), block)
		if !errors.Is(err, tt.want) || !fsys.Hit() {
			t.Errorf("%s: got %v, want %v", tt.name, err, tt.want)
		}
		wantBytes(t, ov, 0, read(t, disk, 0, mib))
		_, err = ov.WriteAt(bytesOf(2, 10), 2*block)
		if failed := errors.Is(tt.want, syscall.EIO); (err != nil) != failed {
			t.Errorf("%s: the next write: got %v, want failed %v", tt.name, err, failed)
		}
		want := read(t, ov, 0, mib)
		wantBytes(t, open(t, "/d/o", disk, o), 0, want)
	}
}

// TestLogRot replays a log onto a map of which a sector is bad, or one of the directory:
// it stays so, and what it refers to is not written.
func TestLogRot(t *testing.T) {
	t.Parallel()
	disk := pattern(page)
	dir, pages, data := overlay.Places(page)
	for _, tt := range []struct {
		name string
		off  int64
		good bool // the next sector of the map
	}{
		{"map", pages + 20, true},
		{"directory", dir + 20, false},
	} {
		fsys, o := inMemory()
		ov := create(t, "/d/o", disk, o)
		write(t, ov, bytesOf(1, block), 0)
		ok(t, ov.Sync())
		write(t, ov, bytesOf(2, 3*block), 1983*block) // the last of a sector, and the next
		f, err := fsys.OpenWrite("/d/o")
		ok(t, err)
		_, err = f.WriteAt([]byte{0xff}, tt.off)
		ok(t, err)
		before := make([]byte, data-pages)
		_, err = f.ReadAt(before, pages)
		ok(t, err)
		ov = open(t, "/d/o", disk, o)
		if tt.good {
			wantBytes(t, ov, 1984*block, bytesOf(2, 2*block))
		} else {
			after := make([]byte, len(before))
			_, err = f.ReadAt(after, pages)
			ok(t, err)
			if !bytes.Equal(after, before) {
				t.Errorf("%s: the map was written", tt.name)
			}
		}
		if _, err := ov.ReadAt(make([]byte, 1), 1983*block); err == nil {
			t.Errorf("%s: a bad sector became good", tt.name)
		}
		ok(t, ov.Close())
	}
}

// TestGoldenLog makes the same log as ever.
func TestGoldenLog(t *testing.T) {
	t.Parallel()
	fsys, o := inMemory()
	o = overlay.WithRandom(o, strings.NewReader("0123456789abcdef"))
	o = overlay.WithBoot(o, func() ([16]byte, error) { return [16]byte([]byte("the id of a boot")), nil })
	ov := create(t, "/d/o", pattern(page), o)
	write(t, ov, []byte("changed"), 2*block+10)
	ok(t, ov.Zero(300*block, 257*block))
	got, err := durable.ReadFile(fsys, "/d/o.log", mib)
	ok(t, err)
	golden := filepath.Join("testdata", "v1.log")
	if *update {
		ok(t, os.WriteFile(golden, got, 0o644))
	}
	want, err := os.ReadFile(golden)
	ok(t, err)
	if !bytes.Equal(got, want) {
		t.Errorf("got\n%x, want\n%x", got, want)
	}
}

// What is believed of any log is of the disk, and of records before the first bad one.
func FuzzLog(f *testing.F) {
	id, boot := [16]byte{1}, [16]byte{2}
	good := overlay.EncodeLog(id, boot, [3]int64{5, 2, 1}, [3]int64{6, 1, 2}, [3]int64{99, 1, 1})
	f.Add(good, uint16(0), byte(0))
	f.Add(good, uint16(70), byte(1))
	f.Add(overlay.EncodeLog(id, boot, [3]int64{99, 2, 1}), uint16(63), byte(1))
	f.Add(overlay.EncodeLog(id, boot, [3]int64{-1, 2, 1}, [3]int64{1, -1, 1}), uint16(0), byte(0))
	f.Add(overlay.EncodeLog(boot, id, [3]int64{5, 2, 1}), uint16(0), byte(0))
	f.Fuzz(func(t *testing.T, b []byte, at uint16, flip byte) {
		if int(at) < len(b) {
			b[at] ^= flip
		}
		runs, marked := overlay.DecodeLog(b, id, boot, 100)
		if runs == "" && marked {
			t.Error("an empty log has a mark")
		}
		if other, _ := overlay.DecodeLog(b, id, [16]byte{3}, 100); other != "" {
			t.Errorf("got %s of another boot", other)
		}
	})
}
