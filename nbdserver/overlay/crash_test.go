package overlay_test

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/internal/durable"
	"github.com/holdfast-backup/holdfast/internal/faultfs"
	"github.com/holdfast-backup/holdfast/nbdserver/overlay"
)

const (
	sector    = 512
	crashSize = 2*page + 40*block + 1000
)

// watched are the blocks that the crash tests look at: of three pages of the map and
// several sectors of it.
func watched() []int64 {
	var all []int64
	for _, r := range [][2]int64{{0, 6}, {1982, 1986}, {15870, 15876}, {2*15872 - 2, 2*15872 + 4}, {2*15872 + 38, 2*15872 + 41}} {
		for b := r[0]; b < r[1]; b++ {
			all = append(all, b)
		}
	}
	return all
}

// history is what a sector has held since it last was certain to be durable.
type history struct {
	versions [][]byte // the durable one first; the last is what it holds now
	// unsure means that the last operation on some of it failed: any byte may be
	// of any version. mixed means that it was so since it last was durable.
	unsure, mixed bool
}

func (h *history) now() []byte { return h.versions[len(h.versions)-1] }

// may reports whether the sector may hold some bytes, now or after a crash.
func (h *history) may(got []byte, crashed bool) bool {
	if !crashed && !h.unsure {
		return bytes.Equal(got, h.now())
	}
	if slices.ContainsFunc(h.versions, func(v []byte) bool { return bytes.Equal(v, got) }) {
		return true
	}
	for i, b := range got {
		if !h.mixed || !slices.ContainsFunc(h.versions, func(v []byte) bool { return v[i] == b }) {
			return false
		}
	}
	return true
}

// model is the expected content of the watched blocks.
type model struct {
	sectors map[int64]*history
}

func newModel(t *testing.T, disk image.Disk) *model {
	m := &model{map[int64]*history{}}
	for _, b := range watched() {
		for off := b * block; off < min((b+1)*block, disk.Size()); off += sector {
			m.sectors[off] = &history{versions: [][]byte{read(t, disk, off, min(sector, disk.Size()-off))}}
		}
	}
	return m
}

// change notes a write of a byte to a range.
func (m *model) change(off, length int64, b byte, err error) {
	for at, h := range m.sectors {
		from, to := max(off, at), min(off+length, at+int64(len(h.now())))
		if from >= to {
			continue
		}
		v := bytes.Clone(h.now())
		for i := from; i < to; i++ {
			v[i-at] = b
		}
		h.versions = append(h.versions, v)
		if err != nil {
			h.unsure, h.mixed = true, true
		} else if int(to-from) == len(v) {
			h.unsure = false
		}
	}
}

// synced notes that all is durable.
func (m *model) synced() {
	for _, h := range m.sectors {
		if !h.unsure {
			*h = history{versions: [][]byte{h.now()}}
		}
	}
}

// check compares. After a crash any version may be found, and is from then on
// what the sector holds.
func (m *model) check(t *testing.T, d image.Disk, crashed bool) {
	t.Helper()
	for _, b := range watched() {
		got := read(t, d, b*block, min(block, d.Size()-b*block))
		for i, part := range slices.Collect(slices.Chunk(got, sector)) {
			if h := m.sectors[b*block+int64(i)*sector]; !h.may(part, crashed) {
				t.Fatalf("block %d, sector %d: got %x…, want one of %d versions, now %x…, unsure %v",
					b, i, part[:4], len(h.versions), h.now()[:4], h.unsure)
			}
		}
	}
}

// take makes what a disk holds the durable content.
func (m *model) take(t *testing.T, d image.Disk) {
	for at, h := range m.sectors {
		*h = history{versions: [][]byte{read(t, d, at, int64(len(h.now())))}}
	}
}

// step is one of the operations that the crash tests do.
type step struct {
	op       string
	off, len int64
}

// steps have all changes of state, each in the same Sync as others and in one of its
// own, and pages of the map that come, go and come again.
var steps = []step{
	{"write", 0, 2 * block},
	{"write", 2*block + 700, 100},
	{"sync", 0, 0},
	{"write", 512, 1024},
	{"zero", block, block},
	{"sync", 0, 0},
	{"write", block + 100, 50},
	{"write", 15870 * block, 4 * block},
	{"sync", 0, 0}, // across pages
	{"zero", 15871*block + 1, 2*block + 5},
	{"write", 15872*block - 600, 1200},
	{"trim", 0, 2 * block},
	{"sync", 0, 0},
	{"write", 1983*block - 10, 20},
	{"write", 100, 3000},
	{"zero", 3*block + 10, 20},
	{"zero", 0, page},
	{"sync", 0, 0},
	{"sync", 0, 0}, // a page goes
	{"write", 4 * block, block},
	{"sync", 0, 0}, // and comes again
	{"trim", 0, page},
	{"write", 1984*block + 5, 10},
	{"sync", 0, 0}, // in one
	{"write", crashSize - 500, 500},
	{"trim", page, crashSize - page},
	{"sync", 0, 0},
	{"reopen", 0, 0},
	{"write", 2*page + 7, 2 * block},
	{"zero", crashSize - 999, 999},
	{"write", 100, 2 * block},
	{"sync", 0, 0},
	{"write", 0, block},
	{"write", 3 * block, block},
	{"zero", 0, block / 2},
	{"trim", 3 * block, block},
}

// crashRun is a run of the steps over a file system.
type crashRun struct {
	model *model
	disk  image.Disk
	o     overlay.Options
	// created and stopped tell that Create returned nil, and that a Sync failed.
	created, stopped bool
	fsys             *faultfs.FS
	kill             bool  // nothing is done after the fault
	untrimmed        error // why a Trim may have left all as it was
}

const crashPath = "/d/o"

// run does the steps, until one fails that ends the overlay.
func (r *crashRun) run(t *testing.T) {
	t.Helper()
	ov, err := overlay.Create(crashPath, r.disk, r.o)
	if err != nil {
		return
	}
	r.created = true
	for i, s := range steps {
		if r.stopped || r.fsys.Hit() && r.kill {
			break
		}
		b := byte(i + 1)
		switch s.op {
		case "write":
			_, err = ov.WriteAt(bytesOf(b, int(s.len)), s.off)
			r.model.change(s.off, s.len, b, err)
		case "zero":
			err = ov.Zero(s.off, s.len)
			r.model.change(s.off, s.len, 0, err)
		case "trim":
			err = ov.Trim(s.off, s.len)
			r.model.change(s.off, s.len, 0, cmp.Or(err, r.untrimmed))
		case "sync":
			if err = ov.Sync(); err == nil {
				r.model.synced()
			}
			r.stopped = err != nil && !errors.Is(err, syscall.ENOSPC)
		case "reopen":
			if err = ov.Close(); err == nil {
				r.model.synced()
				ov, err = overlay.Open(crashPath, r.disk, r.o)
			}
			if err != nil {
				return // as if the process had ended
			}
		}
		if !r.stopped && err == nil {
			r.model.check(t, ov, false)
		}
	}
	if r.stopped && !r.kill {
		r.checkFailed(t, ov)
	}
}

// checkFailed checks that after a failed Sync nothing can be changed, and reads go on.
func (r *crashRun) checkFailed(t *testing.T, ov *overlay.Overlay) {
	t.Helper()
	_, err := ov.WriteAt([]byte{1}, 0)
	for what, err := range map[string]error{"write": err, "zero": ov.Zero(0, 1), "trim": ov.Trim(0, block), "sync": ov.Sync()} {
		if !errors.Is(err, syscall.EIO) || errors.Is(err, syscall.ENOSPC) {
			t.Errorf("%s after a failed sync: got %v, want %v alone", what, err, syscall.EIO)
		}
	}
}

// recover opens what a crash left, checks it, goes on with it, and takes the power once
// more.
func (r *crashRun) recover(t *testing.T, wrap func(*faultfs.FS) durable.FS, after *faultfs.FS, model *model) {
	t.Helper()
	o := options(after)
	o.FS = wrap(after)
	ov, err := overlay.Open(crashPath, r.disk, o)
	if err != nil && !r.created {
		ov, err = overlay.Create(crashPath, r.disk, o) // what there is does not stop it
	}
	ok(t, err)
	model.check(t, ov, true)
	model.take(t, ov)
	for i, s := range []step{{"write", 3*block + 5, 10}, {"zero", block, 2 * block}, {"write", 15871 * block, 2 * block}} {
		b := byte(0xf0 + i)
		if s.op == "write" {
			write(t, ov, bytesOf(b, int(s.len)), s.off)
		} else {
			ok(t, ov.Zero(s.off, s.len))
			b = 0
		}
		model.change(s.off, s.len, b, nil)
	}
	model.check(t, ov, false)
	ok(t, ov.Sync())
	model.synced()
	ov = open(t, crashPath, r.disk, options(after.PowerLoss(faultfs.LoseAll)))
	model.check(t, ov, true)
	ok(t, ov.Close())
}

func (m *model) clone() *model {
	c := &model{map[int64]*history{}}
	for at, h := range m.sectors {
		c.sectors[at] = &history{slices.Clone(h.versions), h.unsure, h.mixed}
	}
	return c
}

// TestCrash fails every operation on files in turn, or all from one on, and takes the
// power then.
func TestCrash(t *testing.T) {
	t.Parallel()
	withHoles := func(f *faultfs.FS) durable.FS { return f }
	without := func(f *faultfs.FS) durable.FS { return noHoles{f} }
	for _, tt := range []struct {
		name  string
		fault faultfs.Fault
		wrap  func(*faultfs.FS) durable.FS
		step  int
	}{
		{"power", faultfs.Fault{Err: syscall.EIO, Forever: true, Effect: faultfs.Nothing}, withHoles, 1},
		{"power, half written", faultfs.Fault{Err: syscall.EIO, Forever: true, Effect: faultfs.Half}, without, 1},
		{"power, no holes", faultfs.Fault{Err: syscall.EIO, Forever: true, Effect: faultfs.Whole}, without, 2},
		{"EIO", faultfs.Fault{Err: syscall.EIO}, withHoles, 1},
		{"EIO, done", faultfs.Fault{Err: syscall.EIO, Effect: faultfs.Whole}, without, 2},
		{"ENOSPC", faultfs.Fault{Err: syscall.ENOSPC, Effect: faultfs.Half}, withHoles, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			for n := 1; ; n += tt.step {
				if !crashAt(t, tt.fault, n, tt.wrap) {
					break
				}
				if t.Failed() {
					t.Fatalf("with operation %d failing", n)
				}
			}
		})
	}
}

// crashAt runs the steps with the n-th operation failing and reports whether there
// was an n-th.
func crashAt(t *testing.T, fault faultfs.Fault, n int, wrap func(*faultfs.FS) durable.FS) bool {
	t.Helper()
	fsys := faultfs.New("/d")
	disk := pattern(crashSize)
	r := &crashRun{model: newModel(t, disk), disk: disk, o: options(fsys), fsys: fsys}
	r.o.FS, r.o.Meta = wrap(fsys), []byte("meta")
	if errors.Is(fault.Err, syscall.ENOSPC) {
		r.untrimmed = fault.Err
	}
	fault.N = n
	fsys.Fail(fault)
	defer func() {
		if t.Failed() {
			trace := fsys.Trace(faultfs.Changes)
			t.Logf("operation %d is %v", n, trace[min(n, len(trace))-1])
		}
	}()
	r.run(t)
	hit := fsys.Hit()
	fsys.Fail(faultfs.Fault{})
	for _, loss := range []faultfs.Loss{faultfs.LoseAll, faultfs.LoseNothing, faultfs.Loss(2*n + 1), faultfs.Loss(2*n + 2)} {
		r.recover(t, wrap, fsys.PowerLoss(loss), r.model.clone())
	}
	r.recover(t, wrap, fsys, r.model.clone()) // the process gave up
	return hit
}

// TestOpenSyncs reads what a killed process had not synced: once it is seen, and Sync
// has been asked for, it stays.
func TestOpenSyncs(t *testing.T) {
	t.Parallel()
	fsys, o := inMemory()
	disk := pattern(mib)
	ov := create(t, "/d/o", disk, o)
	write(t, ov, bytesOf(1, block), 0)
	ok(t, ov.Sync())
	write(t, ov, bytesOf(2, block), 0)
	ov = open(t, "/d/o", disk, o) // without Close
	want := read(t, ov, 0, block)
	ok(t, ov.Sync())
	wantBytes(t, open(t, "/d/o", disk, options(fsys.PowerLoss(faultfs.LoseAll))), 0, want)
}

// TestKept takes the power after what has no Sync of its caller's.
func TestKept(t *testing.T) {
	t.Parallel()
	fsys, o := inMemory()
	disk := pattern(mib)
	stat := func() (overlay.Info, error) {
		return overlay.Stat("/d/o", options(fsys.PowerLoss(faultfs.LoseAll)))
	}
	ov := create(t, "/d/o", disk, overlay.Options{FS: fsys, Meta: []byte("meta"), Limit: 5})
	if info, err := stat(); err != nil || string(info.Meta) != "meta" || info.Limit != 5 || info.Size != mib {
		t.Errorf("created: got %+v, %v", info, err)
	}
	ok(t, ov.Close())
	ov = open(t, "/d/o", disk, overlay.Options{FS: fsys, Limit: 7 * block})
	if info, err := stat(); err != nil || info.Limit != 7*block {
		t.Errorf("a new limit: got %+v, %v", info, err)
	}
	write(t, ov, []byte("x"), 0)
	ok(t, ov.Close())
	if info, err := stat(); err != nil || info.Used != block {
		t.Errorf("closed: got %+v, %v", info, err)
	}
	ok(t, overlay.Remove("/d/o", o))
	if info, err := stat(); err == nil {
		t.Errorf("removed: got %+v", info)
	}
}

// TestSyncOperations holds what a Sync does against what the package says.
func TestSyncOperations(t *testing.T) {
	t.Parallel()
	fsys, o := inMemory()
	ov := create(t, "/d/o", pattern(mib), o)
	for _, tt := range []struct {
		name   string
		change func()
		want   string
	}{
		{"nothing", func() {}, "[]"},
		{"first data", func() { write(t, ov, bytesOf(1, block), 0) }, "[write write create.log write.log mark sync write sync write sync truncate.log sync.log]"},
		{"overwritten", func() { write(t, ov, bytesOf(2, 10), 0) }, "[write sync]"},
		{"more data", func() { write(t, ov, bytesOf(2, block), block) }, "[write write.log mark sync write sync truncate.log sync.log]"},
		{"synced", func() {}, "[]"},
		{"trim", func() { ok(t, ov.Trim(0, block)) }, "[write.log punch mark sync write sync truncate.log sync.log]"},
		{"trimmed again", func() { ok(t, ov.Trim(0, block)) }, "[]"},
		{"all", func() { ok(t, ov.Zero(0, mib)) }, "[write.log punch mark sync write sync truncate.log sync.log]"},
	} {
		before := len(fsys.Trace(faultfs.Changes))
		tt.change()
		ok(t, ov.Sync())
		var got []string
		for _, op := range fsys.Trace(faultfs.Changes)[before:] {
			name := op.Kind.String() + strings.TrimPrefix(op.Name, "/d/o")
			if name == "write.log" && op.Len == 1 {
				name = "mark"
			}
			got = append(got, name)
		}
		if fmt.Sprint(got) != tt.want {
			t.Errorf("%s: got %v, want %s", tt.name, got, tt.want)
		}
	}
	ok(t, ov.Close())
}

// TestRot flips a byte of every kind. What it tells of is an error, or the same
// bytes as before; never others.
func TestRot(t *testing.T) {
	t.Parallel()
	disk := pattern(page + 10*block)
	dir, pages, _ := overlay.Places(disk.Size())
	for _, tt := range []struct {
		name string
		off  int64
		open bool
		bad  []int64 // of the blocks 1, 2000, 15873
	}{
		{"header", 20, false, nil},
		{"unused header", 300, false, nil},
		{"meta", block + 1, false, nil},
		{"directory", dir + 16, true, []int64{1, 2000, 15873}},
		{"unused directory", dir + 7*512, true, nil},
		{"map", pages + 20, true, []int64{1}},
		{"next sector", pages + 512, true, []int64{2000}},
		{"other page", pages + 4096 + 511, true, []int64{15873}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			fsys, o := inMemory()
			o.Meta = []byte("meta")
			ov := create(t, "/d/o", disk, o)
			blocks := []int64{1, 2000, 15873}
			for _, b := range blocks {
				write(t, ov, bytesOf(byte(b), block), b*block)
			}
			ok(t, ov.Close())
			f, err := fsys.OpenWrite("/d/o")
			ok(t, err)
			b := make([]byte, 1)
			_, err = f.ReadAt(b, tt.off)
			ok(t, err)
			b[0] ^= 0x10
			_, err = f.WriteAt(b, tt.off)
			ok(t, errors.Join(err, f.Sync(), f.Close()))
			ov, err = overlay.Open("/d/o", disk, o)
			if !tt.open {
				if !errors.Is(err, image.ErrCorrupt) {
					t.Errorf("open: got %v, want %v", err, image.ErrCorrupt)
				}
				return
			}
			ok(t, err)
			for range 2 { // and when its neighbours have been written
				for _, b := range blocks {
					if !slices.Contains(tt.bad, b) {
						wantBytes(t, ov, b*block, bytesOf(byte(b), block))
						write(t, ov, bytesOf(byte(b), block), (b+1)*block)
						continue
					}
					_, readErr := ov.ReadAt(make([]byte, 2), b*block)
					_, writeErr := ov.WriteAt(make([]byte, block), b*block)
					_, whole := ov.ReadAt(make([]byte, 2*block), (b-1)*block)
					for what, err := range map[string]error{"read": readErr, "write": writeErr, "zero": ov.Zero(b*block, block), "read across": whole} {
						if !errors.Is(err, image.ErrCorrupt) {
							t.Errorf("%s of block %d: got %v, want %v", what, b, err, image.ErrCorrupt)
						}
					}
				}
				ok(t, ov.Close())
				ov = open(t, "/d/o", disk, o)
			}
			ok(t, ov.Close())
		})
	}
}
