package overlay_test

import (
	"bytes"
	"compress/gzip"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/internal/faultfs"
	"github.com/holdfast-backup/holdfast/nbdserver/overlay"
)

var update = flag.Bool("update", false, "write the golden files")

var _ image.Writer = (*overlay.Overlay)(nil)

// TestStates walks one overlay through all changes of state, on the real file system.
func TestStates(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "overlay")
	disk := pattern(200*kib + 1000)
	want := read(t, disk, 0, disk.Size())
	ov := create(t, path, disk, overlay.Options{Meta: []byte("point"), Limit: mib})
	wantBytes(t, ov, 0, want)
	wantExtents(t, "nothing changed", ov.Changed(0, ov.Size()))
	wantExtents(t, "base", ov.Extents(t.Context(), 0, disk.Size()), collect(t, image.Coalesce(disk.Extents(t.Context(), 0, disk.Size())))...)

	for _, tt := range []struct {
		op       string
		off, len int64
		used     int64 // blocks
	}{
		{"write", 10, 20, 1},                   // part of a block of the base
		{"write", block, 2 * block, 3},         // whole blocks
		{"write", 2*block + 100, 2 * block, 5}, // from data into the base, both ends in part
		{"write", 48 * kib, block / 2, 6},      // the start of a block
		{"write", disk.Size() - 10, 10, 7},     // the last, short block
		{"zero", block, block, 6},
		{"zero", 2*block - 10, 20, 6},                 // across zero and data
		{"zero", 5*block - 7, 3*block + 20, 7},        // both edges are written
		{"trim", disk.Size() - 100, 100, 7},           // less than a block
		{"trim", disk.Size() - 5000, 5000, 6},         // the whole last block, and less than the one before
		{"write", disk.Size() - 20, 10, 7},            // zero to data, in part
		{"trim", 0, 5 * block, 3},                     // the first blocks, of all states
		{"write", 0, 100, 4},                          // zero to data
		{"zero", 100 * kib, 0, 4},                     // nothing
		{"write", disk.Size(), 0, 4},                  // nothing
		{"zero", 0, disk.Size(), 0},                   // everything
		{"write", 3, disk.Size() - 3, 51},             // almost everything
		{"trim", 1, disk.Size() - 2, 2},               // all but the first and the last block
		{"zero", disk.Size() - 999, 999, 2},           // the end of the last block: it is shorter than that
		{"zero", disk.Size() - 1000, 1000, 1},         // the last block
		{"write", block + 512, 512, 2},                // and some more
		{"zero", block + 100, 100, 2},                 // inside a block
		{"zero", 9*block + 100, 100, 2},               // inside a block that is zero
		{"write", 60*kib - 1, 64*kib + 2, 2 + 18},     // across runs of the base
		{"zero", 60*kib - 1, 64*kib + 2, 2 + 18 - 16}, // and its edges stay
	} {
		name := fmt.Sprintf("%s %d+%d", tt.op, tt.off, tt.len)
		first, end := (tt.off+block-1)/block*block, (tt.off+tt.len)/block*block
		if tt.off+tt.len == disk.Size() {
			end = disk.Size()
		}
		switch tt.op {
		case "write":
			p := bytesOf(byte('a'+tt.used%20), int(tt.len))
			write(t, ov, p, tt.off)
			copy(want[tt.off:], p)
		case "zero":
			ok(t, ov.Zero(tt.off, tt.len))
			clear(want[tt.off : tt.off+tt.len])
		case "trim":
			ok(t, ov.Trim(tt.off, tt.len))
			if first < end {
				clear(want[first:end])
			}
		}
		wantBytes(t, ov, 0, want)
		if got := ov.Used(); got != tt.used*block {
			t.Errorf("%s: got %d blocks used, want %d", name, got/block, tt.used)
		}
		if tt.used%3 == 0 {
			ok(t, ov.Close())
			ov = open(t, path, disk, overlay.Options{})
			wantBytes(t, ov, 0, want)
		}
	}
	checkExtents(t, ov)
	ok(t, ov.Close())
	info, err := overlay.Stat(path, overlay.Options{})
	ok(t, err)
	if string(info.Meta) != "point" || info.Size != disk.Size() || info.Limit != mib || info.Used != 4*block {
		t.Errorf("got %+v", info)
	}
	ok(t, overlay.Remove(path, overlay.Options{}))
	if _, err := overlay.Stat(path, overlay.Options{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after removal: got %v, want %v", err, os.ErrNotExist)
	}
}

// checkExtents holds the extents against the bytes, in whole and in parts.
func checkExtents(t *testing.T, d image.Disk) {
	t.Helper()
	for _, r := range []image.Extent{{Off: 0, Len: d.Size()}, {Off: 100, Len: 70 * kib}, {Off: d.Size() - 10, Len: 100}} {
		at := r.Off
		for _, e := range collect(t, d.Extents(t.Context(), r.Off, r.Len)) {
			if e.Off != at || e.Len <= 0 {
				t.Fatalf("got %v after %d", e, at)
			}
			at = e.End()
			if zero := len(bytes.Trim(read(t, d, e.Off, e.Len), "\x00")) == 0; e.Zero && !zero {
				t.Errorf("%v has bytes", e)
			}
		}
		if want := min(r.End(), d.Size()); at != want {
			t.Errorf("extents end at %d, want %d", at, want)
		}
	}
}

func TestExtents(t *testing.T) {
	t.Parallel()
	_, o := inMemory()
	disk := pattern(256 * kib)
	ov := create(t, "/d/o", disk, o)
	write(t, ov, bytesOf(1, 2*block), 60*kib) // a block in the zeros of the base, one after
	ok(t, ov.Trim(100*kib, 8*kib))
	wantExtents(t, "extents", ov.Extents(t.Context(), 0, mib),
		image.Extent{Off: 0, Len: 48 * kib}, image.Extent{Off: 48 * kib, Len: 12 * kib, Zero: true},
		image.Extent{Off: 60 * kib, Len: 40 * kib}, image.Extent{Off: 100 * kib, Len: 8 * kib, Zero: true},
		image.Extent{Off: 108 * kib, Len: 4 * kib}, image.Extent{Off: 112 * kib, Len: 16 * kib, Zero: true},
		image.Extent{Off: 128 * kib, Len: 48 * kib}, image.Extent{Off: 176 * kib, Len: 16 * kib, Zero: true},
		image.Extent{Off: 192 * kib, Len: 48 * kib}, image.Extent{Off: 240 * kib, Len: 16 * kib, Zero: true})
	wantExtents(t, "changed", ov.Changed(0, ov.Size()),
		image.Extent{Off: 60 * kib, Len: 8 * kib}, image.Extent{Off: 100 * kib, Len: 8 * kib, Zero: true})
	ok(t, ov.Close())
}

// TestRefuses tells what is refused, and that nothing comes of it.
func TestRefuses(t *testing.T) {
	t.Parallel()
	fsys, o := inMemory()
	disk := pattern(mib)
	ov := create(t, "/d/o", disk, o)
	for name, err := range map[string]error{
		"write":    func() error { _, err := ov.WriteAt(bytesOf(1, 2), mib-1); return err }(),
		"negative": func() error { _, err := ov.WriteAt(bytesOf(1, 2), -1); return err }(),
		"zero":     ov.Zero(mib-1, 2),
		"trim":     ov.Trim(0, mib+1),
		"length":   ov.Trim(0, -1),
		"overflow": ov.Zero(2, 1<<63-1),
	} {
		if !errors.Is(err, syscall.EINVAL) {
			t.Errorf("%s: got %v, want %v", name, err, syscall.EINVAL)
		}
	}
	if n, err := ov.ReadAt(make([]byte, 10), mib-3); n != 3 || !errors.Is(err, io.EOF) {
		t.Errorf("read past the end: got %d, %v, want 3, %v", n, err, io.EOF)
	}
	wantExtents(t, "changed", ov.Changed(0, ov.Size()))
	ok(t, ov.Close())
	if _, err := overlay.Create("/d/o", disk, o); !errors.Is(err, os.ErrExist) {
		t.Errorf("create again: got %v, want %v", err, os.ErrExist)
	}
	if _, err := overlay.Open("/d/o", pattern(2*mib), o); err == nil {
		t.Error("opened over a disk of another size")
	}
	if _, err := overlay.Create("/d/meta", disk, overlay.Options{FS: fsys, Meta: make([]byte, overlay.MaxMeta+1)}); err == nil {
		t.Error("created with too much meta")
	}
	fsys.Fail(faultfs.Fault{Kinds: faultfs.Truncate, N: 1, Err: syscall.EFBIG})
	if _, err := overlay.Create("/d/big", pattern(tib), o); !errors.Is(err, syscall.EFBIG) || !strings.Contains(fmt.Sprint(err), "larger than the file system") {
		t.Errorf("a file too large: got %v", err)
	}
	if names, _ := fsys.ReadDir("/d"); len(names) != 1 {
		t.Errorf("got %d files, want what was refused to leave none", len(names))
	}
}

// TestModel has many write next to each other, and holds what comes of it against
// plain bytes.
func TestModel(t *testing.T) {
	t.Parallel()
	for _, seed := range []uint64{1, 2, rand.Uint64()} {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "overlay")
			disk := pattern(page + 300*kib + 123) // the interesting part is around the map's page
			start := int64(page - 300*kib)
			want := read(t, disk, start, disk.Size()-start)
			ov := create(t, path, disk, overlay.Options{})
			const workers = 6
			for round := range uint64(3) {
				var wg sync.WaitGroup
				for i := range int64(workers) {
					from, to := int64(len(want))*i/workers, int64(len(want))*(i+1)/workers // not at blocks
					wg.Go(func() {
						work(t, ov, rand.New(rand.NewPCG(seed, round<<8|uint64(i))), want[from:to], start+from)
					})
				}
				wg.Wait()
				wantBytes(t, ov, start, want)
				wantBytes(t, ov, 0, read(t, disk, 0, mib))
				if t.Failed() {
					return
				}
				used := ov.Used()
				ok(t, ov.Close())
				ov = open(t, path, disk, overlay.Options{})
				wantBytes(t, ov, start, want)
				if got := ov.Used(); got != used {
					t.Errorf("used: got %d after opening, want %d", got, used)
				}
			}
			ok(t, ov.Close())
		})
	}
}

// work changes and reads a range of the disk that is its own.
func work(t *testing.T, ov *overlay.Overlay, rng *rand.Rand, want []byte, start int64) {
	for range 150 {
		off := rng.IntN(len(want))
		n := 1 + rng.IntN(min(len(want)-off, []int{100, block, 40 * kib}[rng.IntN(3)]))
		if rng.IntN(3) == 0 { // whole blocks, if the range has some
			from := (start+int64(off)+block-1)/block*block - start
			if to := (start+int64(off+n))/block*block - start; from < to {
				off, n = int(from), int(to-from)
			}
		}
		part, at := want[off:off+n], start+int64(off)
		var err error
		switch rng.IntN(8) {
		case 0, 1, 2:
			for i := range part {
				part[i] = byte(rng.Uint32())
			}
			_, err = ov.WriteAt(part, at)
		case 3:
			err = ov.Zero(at, int64(n))
			clear(part)
		case 4:
			err = ov.Trim(at, int64(n))
			from, to := (at+block-1)/block*block, (at+int64(n))/block*block
			if at+int64(n) == ov.Size() {
				to = ov.Size()
			}
			if from < to {
				clear(want[from-start : to-start])
			}
		case 5:
			if rng.IntN(8) == 0 {
				err = ov.Sync()
			}
		default:
			got := make([]byte, n)
			if _, err = ov.ReadAt(got, at); err == nil && !bytes.Equal(got, part) {
				t.Errorf("%d bytes at %d differ", n, at)
				return
			}
		}
		if err != nil {
			t.Error(err)
			return
		}
	}
}

// TestNeighbours writes both halves of many blocks of the base at once: none may
// write back what it read of the other's.
func TestNeighbours(t *testing.T) {
	t.Parallel()
	_, o := inMemory()
	disk := pattern(4 * mib)
	ov := create(t, "/d/o", disk, o)
	want := make([]byte, disk.Size())
	var wg sync.WaitGroup
	for part := range int64(4) {
		wg.Go(func() {
			for off := part * kib; off < disk.Size(); off += block {
				if off/block%2 == 1 && part == 3 {
					if err := ov.Zero(off, kib); err != nil {
						t.Error(err)
					}
					continue
				}
				if _, err := ov.WriteAt(bytesOf(byte(part+1), kib), off); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	for off := range want {
		want[off] = byte(off/kib%4 + 1)
		if off/block%2 == 1 && want[off] == 4 {
			want[off] = 0
		}
	}
	wantBytes(t, ov, 0, want)
	ok(t, ov.Close())
}

// TestHuge trims all of a large disk and a block in the middle of it is written.
func TestHuge(t *testing.T) {
	t.Parallel()
	fsys, o := inMemory()
	disk := pattern(16*tib + 5)
	ov := create(t, "/d/o", disk, o)
	ok(t, ov.Trim(0, disk.Size()))
	ok(t, ov.Sync())
	write(t, ov, []byte("x"), 8*tib)
	ok(t, ov.Close())
	if n := len(fsys.Trace(faultfs.Write)); n > 64 {
		t.Errorf("got %d writes, want few", n)
	}
	ov = open(t, "/d/o", disk, o)
	wantExtents(t, "changed", ov.Changed(0, ov.Size()), image.Extent{Off: 0, Len: 8 * tib, Zero: true},
		image.Extent{Off: 8 * tib, Len: block}, image.Extent{Off: 8*tib + block, Len: 8*tib + 5 - block, Zero: true})
	wantBytes(t, ov, 8*tib-1, []byte("\x00x\x00"))
	wantBytes(t, ov, disk.Size()-5, make([]byte, 5))
	ok(t, ov.Close())
}

func TestLimit(t *testing.T) {
	t.Parallel()
	_, o := inMemory()
	o.Limit = 3 * block
	disk := pattern(mib)
	ov := create(t, "/d/o", disk, o)
	write(t, ov, bytesOf(1, 2*block), 0)
	full := func() {
		t.Helper()
		if _, err := ov.WriteAt(bytesOf(2, 3*block), block); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("got %v, want %v", err, syscall.ENOSPC)
		}
		wantBytes(t, ov, 0, append(bytesOf(1, 2*block), read(t, disk, 2*block, block)...))
	}
	full()
	write(t, ov, bytesOf(1, 2*block), 0) // over what there is
	ok(t, ov.Zero(100*kib, 64*kib))
	write(t, ov, bytesOf(3, 10), 100*kib)
	full()
	ok(t, ov.Close())
	ov = open(t, "/d/o", disk, overlay.Options{FS: o.FS})
	full() // the limit is kept
	ok(t, ov.Close())
	ov = open(t, "/d/o", disk, overlay.Options{FS: o.FS, Limit: overlay.NoLimit})
	write(t, ov, bytesOf(4, 64*kib), 0)
	ok(t, ov.Close())
	if info, err := overlay.Stat("/d/o", o); err != nil || info.Limit != 0 {
		t.Errorf("got %+v, %v, want no limit", info, err)
	}
}

// TestNoHoles is on a file system that gives no room back: zeros are zeros all the
// same.
func TestNoHoles(t *testing.T) {
	t.Parallel()
	fsys, _ := inMemory()
	o := overlay.Options{FS: noHoles{fsys}}
	disk := pattern(mib)
	ov := create(t, "/d/o", disk, o)
	write(t, ov, bytesOf(1, 4*block), 0)
	ok(t, ov.Zero(0, 2*block))
	ok(t, ov.Trim(2*block, block))
	want := append(make([]byte, 3*block), bytesOf(1, block)...)
	wantBytes(t, ov, 0, want)
	write(t, ov, []byte("x"), 5) // the rest of the block is zero, not what the file has
	want[5] = 'x'
	wantBytes(t, ov, 0, want)
	ok(t, ov.Close())
	ov = open(t, "/d/o", disk, o)
	wantBytes(t, ov, 0, want)
	ok(t, ov.Close())
}

// TestHoles looks at the room that a real file takes.
func TestHoles(t *testing.T) {
	t.Parallel()
	path := filepath.Join(tmpfs(t, "64m"), "overlay") // which has no blocks of its own for a file's map
	disk := pattern(1 << 30)
	ov := create(t, path, disk, overlay.Options{})
	taken := func() int64 {
		t.Helper()
		info, err := os.Stat(path)
		ok(t, err)
		return info.Sys().(*syscall.Stat_t).Blocks * 512
	}
	write(t, ov, []byte{1}, 0) // which takes the page of the map
	before := taken()
	write(t, ov, bytesOf(1, 8*mib), 10*mib)
	if got, want := taken()-before, int64(8*mib); got != want {
		t.Errorf("got %d bytes taken by data, want %d", got, want)
	}
	ok(t, ov.Zero(10*mib+1, 8*mib-2))
	if got, want := taken()-before, int64(2*block); got != want {
		t.Errorf("got %d bytes taken after zeroing, want %d", got, want)
	}
	ok(t, ov.Close())
}

// TestGolden makes the same overlay as ever.
func TestGolden(t *testing.T) {
	t.Parallel()
	fsys, o := inMemory()
	o.Meta, o.Limit = []byte("meta of the caller"), 1<<40
	o = overlay.WithRandom(o, strings.NewReader("0123456789abcdef"))
	disk := pattern(2*page + 5*block + 100)
	ov := create(t, "/d/o", disk, o)
	write(t, ov, []byte("changed"), 2*block+10)
	ok(t, ov.Trim(page, page))
	ok(t, ov.Zero(3*block, 2*block))
	write(t, ov, []byte("end"), disk.Size()-3)
	ok(t, ov.Close())
	dump := dumpSparse(t, fsys, "/d/o")

	golden := filepath.Join("testdata", "v1.gz")
	if *update {
		var b bytes.Buffer
		z := gzip.NewWriter(&b)
		_, err := z.Write(dump)
		ok(t, errors.Join(err, z.Close(), os.MkdirAll("testdata", 0o755), os.WriteFile(golden, b.Bytes(), 0o644)))
	}
	f, err := os.Open(golden)
	ok(t, err)
	defer f.Close()
	z, err := gzip.NewReader(f)
	ok(t, err)
	want, err := io.ReadAll(z)
	ok(t, err)
	if !bytes.Equal(dump, want) {
		t.Errorf("the file differs from %s, in %d or %d bytes that are not zero", golden, len(dump), len(want))
	}
}

// dumpSparse returns the blocks of a file that are not zero, each after its number, and its length.
func dumpSparse(t *testing.T, fsys *faultfs.FS, name string) []byte {
	t.Helper()
	f, err := fsys.Open(name)
	ok(t, err)
	defer f.Close()
	size, err := f.Size()
	ok(t, err)
	dump := fmt.Appendf(nil, "%d bytes\n", size)
	b, empty := make([]byte, mib), make([]byte, block)
	for off := int64(0); off < size; off += mib {
		b := b[:min(mib, size-off)]
		_, err := f.ReadAt(b, off)
		ok(t, err)
		for i := 0; i < len(b); i += block {
			if b := b[i:min(len(b), i+block)]; !bytes.Equal(b, empty[:len(b)]) {
				dump = append(fmt.Appendf(dump, "at %d\n", off+int64(i)), b...)
			}
		}
	}
	return dump
}
