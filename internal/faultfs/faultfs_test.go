package faultfs_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/holdfast-backup/holdfast/internal/durable"
	"github.com/holdfast-backup/holdfast/internal/faultfs"
)

const sector = 512

// fill returns n sectors of one byte.
func fill(b byte, sectors int) []byte { return bytes.Repeat([]byte{b}, sectors*sector) }

func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func create(t *testing.T, fsys durable.FS, name string) durable.File {
	t.Helper()
	f, err := fsys.Create(name)
	ok(t, err)
	return f
}

func write(t *testing.T, f durable.File, p []byte, off int64) {
	t.Helper()
	n, err := f.WriteAt(p, off)
	ok(t, err)
	if n != len(p) {
		t.Fatalf("got %d bytes written, want %d", n, len(p))
	}
}

// read returns a file's content, nil if there is no such file.
func read(t *testing.T, fsys durable.FS, name string) []byte {
	t.Helper()
	data, err := durable.ReadFile(fsys, name, 1<<20)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	ok(t, err)
	return data
}

// TestLikeOS does the same to the double and to the operating system.
func TestLikeOS(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	ok(t, os.Mkdir(filepath.Join(dir, "old"), 0o700))
	ok(t, os.WriteFile(filepath.Join(dir, "old", "file"), []byte("imported"), 0o600))
	double := faultfs.New()
	ok(t, double.Import(dir))
	path := func(name string) string { return filepath.Join(dir, name) }
	var got [2][]string
	for i, fsys := range []durable.FS{durable.OS(), double} {
		note := func(format string, args ...any) { got[i] = append(got[i], fmt.Sprintf(format, args...)) }
		class := func(err error) error {
			if errno, ok := errors.AsType[syscall.Errno](err); ok {
				return errno
			}
			return err
		}
		note("import %q", read(t, fsys, path("old/file")))
		f := create(t, fsys, path("a"))
		write(t, f, fill('a', 3), 100)
		ok(t, f.PunchHole(300, 600))
		ok(t, f.PunchHole(1<<40, 1<<40))
		ok(t, f.Truncate(1300))
		ok(t, f.Truncate(1700))
		size, err := f.Size()
		note("size %d %v", size, err)
		buf := make([]byte, 1000)
		n, err := f.ReadAt(buf, 1000)
		note("short %d %v", n, err)
		n, err = f.ReadAt(buf, 5000)
		note("beyond %d %v", n, err)
		ok(t, f.Sync())
		ok(t, f.Close())
		note("closed %v", errors.Is(f.Close(), os.ErrClosed))
		note("content %x", read(t, fsys, path("a")))
		_, err = fsys.Create(path("a"))
		note("again %v", class(err))
		_, err = fsys.Create(path("none/a"))
		note("no folder %v", class(err))
		_, err = fsys.Open(path("b"))
		note("open %v", class(err))
		f, err = fsys.Open(path("a"))
		ok(t, err)
		_, err = f.WriteAt(buf, 0)
		note("read only %v", class(err))
		ok(t, f.Close())
		ok(t, fsys.Mkdir(path("d")))
		ok(t, fsys.Mkdir(path("d")))
		ok(t, durable.WriteFile(fsys, path("d/x"), []byte("x")))
		ok(t, durable.WriteFile(fsys, path("d/x"), []byte("longer")))
		ok(t, fsys.Rename(path("a"), path("d/a")))
		note("rename %v", class(fsys.Rename(path("a"), path("d/a"))))
		note("remove %v", class(fsys.Remove(path("a"))))
		_, err = fsys.ReadDir(path("a"))
		note("no such %v", class(err))
		entries, err := fsys.ReadDir(path("d"))
		ok(t, err)
		for _, e := range entries {
			info, err := e.Info()
			ok(t, err)
			note("entry %s %v %d %v", e.Name(), e.IsDir(), info.Size(), info.Mode())
		}
		f, err = fsys.OpenWrite(path("d/x"))
		ok(t, err)
		ok(t, fsys.Remove(path("d/x")))
		n, err = f.ReadAt(buf[:6], 0)
		note("removed and open %q %v", buf[:n], err)
		ok(t, f.Close())
		ok(t, fsys.SyncDir(path("d")))
		ok(t, fsys.Remove(path("d/a")))
		entries, err = fsys.ReadDir(dir)
		ok(t, err)
		for _, e := range entries {
			note("entry %s %v", e.Name(), e.IsDir())
		}
	}
	if !slices.Equal(got[0], got[1]) {
		for i := range got[0] {
			if got[0][i] != got[1][i] {
				t.Errorf("got %s, want %s", got[1][i], got[0][i])
			}
		}
	}
}

// powerLosses returns what is found of a file after losses of power, by seed,
// "none" where it is missing.
func powerLosses(t *testing.T, f *faultfs.FS, name string, seeds int) map[string]bool {
	t.Helper()
	found := map[string]bool{}
	for seed := 1; seed <= seeds; seed++ {
		data := read(t, f.PowerLoss(faultfs.Loss(seed)), name)
		s := "none"
		if data != nil {
			s = ""
			for part := range slices.Chunk(data, sector) {
				s += string(part[:1])
				if !bytes.Equal(part, bytes.Repeat(part[:1], len(part))) {
					t.Fatalf("a torn sector: %q", part)
				}
			}
		}
		found[s] = true
	}
	return found
}

// wantFound compares exactly.
func wantFound(t *testing.T, got map[string]bool, want ...string) {
	t.Helper()
	for _, s := range want {
		if !got[s] {
			t.Errorf("never found %q", s)
		}
		delete(got, s)
	}
	for s := range got {
		t.Errorf("found %q, which cannot be", s)
	}
}

func TestPowerLossBytes(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name   string
		change func(t *testing.T, f durable.File)
		all    string   // what is found when everything not durable is lost
		found  []string // what is found with seeds
	}{
		{"nothing", func(*testing.T, durable.File) {}, "abc", []string{"abc"}},
		{"write", func(t *testing.T, f durable.File) {
			write(t, f, []byte(string(fill('x', 1))+string(fill('y', 1))), sector)
		}, "abc", []string{"abc", "axc", "aby", "axy"}},
		{"twice", func(t *testing.T, f durable.File) {
			write(t, f, fill('x', 1), 0)
			write(t, f, fill('y', 1), 0)
		}, "abc", []string{"abc", "xbc", "ybc"}},
		{"synced", func(t *testing.T, f durable.File) {
			write(t, f, fill('x', 1), 0)
			ok(t, f.Sync())
			write(t, f, fill('y', 1), 0)
		}, "xbc", []string{"xbc", "ybc"}},
		{"append", func(t *testing.T, f durable.File) { write(t, f, fill('d', 1), 3*sector) }, "abc", []string{"abc", "abc\x00", "abcd"}},
		{"punch", func(t *testing.T, f durable.File) { ok(t, f.PunchHole(0, 2*sector)) }, "abc", []string{"abc", "\x00bc", "a\x00c", "\x00\x00c"}},
		{"truncate", func(t *testing.T, f durable.File) { ok(t, f.Truncate(2*sector)) }, "abc", []string{"abc", "ab", "ab\x00"}},
		{"and back", func(t *testing.T, f durable.File) {
			ok(t, f.Truncate(2*sector))
			ok(t, f.Truncate(3*sector))
		}, "abc", []string{"abc", "ab", "ab\x00"}},
		{"failed sync", func(t *testing.T, f durable.File) {
			write(t, f, fill('x', 1), 0)
			if err := f.Sync(); !errors.Is(err, syscall.EIO) {
				t.Fatalf("got %v, want %v", err, syscall.EIO)
			}
			ok(t, f.Sync())
		}, "abc", []string{"abc", "xbc"}},
		{"failed sync, cache dropped", func(t *testing.T, f durable.File) {
			write(t, f, fill('x', 2), 0)
			if err := f.Sync(); !errors.Is(err, syscall.EIO) {
				t.Fatalf("got %v, want %v", err, syscall.EIO)
			}
			ok(t, f.Sync())
			ok(t, f.DropCache())
		}, "axc", []string{"axc"}},
		{"failed sync, written again", func(t *testing.T, f durable.File) {
			write(t, f, fill('x', 1), 0)
			if err := f.Sync(); !errors.Is(err, syscall.EIO) {
				t.Fatalf("got %v, want %v", err, syscall.EIO)
			}
			write(t, f, fill('x', 1), 0)
			ok(t, f.Sync())
		}, "xbc", []string{"xbc"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			fsys := faultfs.New("/dir")
			f := create(t, fsys, "/dir/f")
			write(t, f, fill('a', 1), 0)
			write(t, f, fill('b', 1), sector)
			write(t, f, fill('c', 1), 2*sector)
			ok(t, f.Sync())
			ok(t, fsys.SyncDir("/dir"))
			if strings.HasPrefix(tt.name, "failed sync") {
				fsys.Fail(faultfs.Fault{Kinds: faultfs.Sync, N: 1})
			}
			tt.change(t, f)
			wantFound(t, powerLosses(t, fsys, "/dir/f", 400), tt.found...)
			if got := powerLosses(t, fsys.PowerLoss(faultfs.LoseAll), "/dir/f", 1); !got[tt.all] {
				t.Errorf("all lost: got %v, want %q", got, tt.all)
			}
			kept := read(t, fsys.PowerLoss(faultfs.LoseNothing), "/dir/f")
			if want := read(t, fsys, "/dir/f"); !bytes.Equal(kept, want) {
				t.Errorf("nothing lost: got %q, want %q", kept, want)
			}
		})
	}
}

func TestPowerLossNames(t *testing.T) {
	t.Parallel()
	put := func(t *testing.T, fsys durable.FS, name string, b byte) {
		f := create(t, fsys, name)
		write(t, f, fill(b, 1), 0)
		ok(t, f.Sync())
		ok(t, f.Close())
	}
	for _, tt := range []struct {
		name   string
		change func(t *testing.T, fsys durable.FS)
		want   []string // "content of /d/a, content of /d/b"
	}{
		{"create", func(t *testing.T, fsys durable.FS) { put(t, fsys, "/d/b", 'b') }, []string{"a none", "a b"}},
		{"create, synced", func(t *testing.T, fsys durable.FS) {
			put(t, fsys, "/d/b", 'b')
			ok(t, fsys.SyncDir("/d"))
		}, []string{"a b"}},
		{"remove", func(t *testing.T, fsys durable.FS) { ok(t, fsys.Remove("/d/a")) }, []string{"a none", "none none"}},
		{"rename", func(t *testing.T, fsys durable.FS) { ok(t, fsys.Rename("/d/a", "/d/b")) }, []string{"a none", "none a"}},
		{"independent", func(t *testing.T, fsys durable.FS) {
			put(t, fsys, "/d/b", 'b')
			ok(t, fsys.Remove("/d/a"))
		}, []string{"a none", "a b", "none none", "none b"}},
		{"replace", func(t *testing.T, fsys durable.FS) {
			put(t, fsys, "/d/b", 'b')
			ok(t, fsys.SyncDir("/d"))
			ok(t, fsys.Rename("/d/b", "/d/a"))
		}, []string{"a b", "b none"}},
		{"unsynced bytes", func(t *testing.T, fsys durable.FS) {
			f := create(t, fsys, "/d/b")
			write(t, f, fill('b', 1), 0)
			ok(t, fsys.SyncDir("/d"))
		}, []string{"a ", "a \x00", "a b"}},
		{"folder lost", func(t *testing.T, fsys durable.FS) {
			ok(t, fsys.Mkdir("/d/e"))
			put(t, fsys, "/d/e/x", 'x')
			ok(t, fsys.SyncDir("/d/e"))
			ok(t, fsys.Rename("/d/e/x", "/d/b"))
			ok(t, fsys.SyncDir("/d"))
		}, []string{"a x"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			fsys := faultfs.New("/d")
			put(t, fsys, "/d/a", 'a')
			ok(t, fsys.SyncDir("/d"))
			tt.change(t, fsys)
			found := map[string]bool{}
			for seed := range 200 {
				after := fsys.PowerLoss(faultfs.Loss(seed + 1))
				var s strings.Builder
				for _, name := range []string{"/d/a", "/d/b"} {
					switch data := read(t, after, name); {
					case data == nil:
						s.WriteString(" none")
					case len(data) == 0:
						s.WriteString(" ")
					default:
						s.WriteString(" " + string(data[:1]))
					}
				}
				found[s.String()[1:]] = true
			}
			wantFound(t, found, tt.want...)
		})
	}
}

func TestFail(t *testing.T) {
	t.Parallel()
	fsys := faultfs.New("/d")
	f := create(t, fsys, "/d/f")
	var calls int
	for _, tt := range []struct {
		fault faultfs.Fault
		want  string // what happened to four writes of an own sector each
		bytes string
	}{
		{faultfs.Fault{}, "....", "wwww"},
		{faultfs.Fault{N: 2}, ".E..", "w-ww"},
		{faultfs.Fault{N: 2, Forever: true}, ".EEE", "w---"},
		{faultfs.Fault{N: 2, Effect: faultfs.Whole}, ".E..", "wwww"},
		{faultfs.Fault{N: 3, Err: syscall.ENOSPC, Effect: faultfs.Half}, "..S.", "wwhw"},
		{faultfs.Fault{N: 1, Kinds: faultfs.Sync | faultfs.Create}, "....", "wwww"},
	} {
		ok(t, f.Truncate(0))
		ok(t, f.Truncate(4*sector))
		fsys.Fail(tt.fault)
		var got, data string
		for i := range int64(4) {
			_, err := f.WriteAt(fill('w', 1), i*sector)
			calls++
			switch {
			case err == nil:
				got += "."
			case errors.Is(err, syscall.ENOSPC):
				got += "S"
			case errors.Is(err, syscall.EIO):
				got += "E"
			}
		}
		if hit := fsys.Hit(); hit != (got != "....") {
			t.Errorf("%+v: got hit %v", tt.fault, hit)
		}
		fsys.Fail(faultfs.Fault{})
		for part := range slices.Chunk(read(t, fsys, "/d/f"), sector) {
			switch bytes.Count(part, []byte{'w'}) {
			case 0:
				data += "-"
			case sector / 2:
				data += "h"
			case sector:
				data += "w"
			}
		}
		if got != tt.want || data != tt.bytes {
			t.Errorf("%+v: got %s, bytes %s, want %s, bytes %s", tt.fault, got, data, tt.want, tt.bytes)
		}
	}
	trace := fsys.Trace(faultfs.Write)
	if got, want := len(trace), calls; got != want {
		t.Errorf("got %d writes traced, want %d", got, want)
	}
	if got, want := trace[1].String(), "write /d/f [512, 1024)"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	// Names: with Whole the file is there in spite of the error.
	fsys.Fail(faultfs.Fault{N: 1, Effect: faultfs.Whole})
	if err := fsys.Rename("/d/f", "/d/g"); !errors.Is(err, syscall.EIO) || read(t, fsys, "/d/g") == nil {
		t.Errorf("rename: got %v, file %v, want an error and the file", err, read(t, fsys, "/d/g") != nil)
	}
}

// TestKill ends a process in a Sync: nothing of it or after it is done, and what was
// written before can be read, but for a loss of power.
func TestKill(t *testing.T) {
	t.Parallel()
	f := faultfs.New("/d")
	file := create(t, f, "/d/a")
	write(t, file, fill('a', 2), 0)
	f.Fail(faultfs.Fault{Kinds: faultfs.Sync, N: 1, Kill: true, Effect: faultfs.Whole})
	if err := file.Sync(); err == nil || !f.Hit() {
		t.Errorf("sync: got %v, want an error", err)
	}
	if err := file.Sync(); err == nil {
		t.Error("sync again: got nil, want an error")
	}
	f.Fail(faultfs.Fault{N: 1, Kill: true, Effect: faultfs.Half})
	if n, err := file.WriteAt(fill('b', 2), 0); n != sector || err == nil {
		t.Errorf("write: got %d, %v, want half and an error", n, err)
	}
	if n, err := file.WriteAt(fill('c', 2), 0); n != 0 || err == nil {
		t.Errorf("write after the end: got %d, %v, want 0 and an error", n, err)
	}
	f.Fail(faultfs.Fault{})
	ok(t, file.DropCache())
	want := append(fill('b', 1), fill('a', 1)...)
	if got := read(t, f, "/d/a"); !bytes.Equal(got, want) {
		t.Errorf("got %q…, want %q…", got[:1], want[:1])
	}
	ok(t, file.Sync()) // which now covers all
	ok(t, f.SyncDir("/d"))
	after := f.PowerLoss(faultfs.LoseAll)
	if got := read(t, after, "/d/a"); !bytes.Equal(got, want) {
		t.Error("a sync after a kill left bytes out")
	}
	before, err := f.Boot()
	ok(t, err)
	if boot, err := after.Boot(); err != nil || boot == before {
		t.Errorf("boot after a loss of power: got %v, %v, want another", boot, err)
	}
}

func TestSpace(t *testing.T) {
	t.Parallel()
	fsys := faultfs.New("/d")
	fsys.SetSize(4 * sector)
	free := func(want int64) {
		t.Helper()
		got, total, err := fsys.Space("/d")
		ok(t, err)
		if got != want*sector || total != 4*sector {
			t.Errorf("got %d of %d bytes free, want %d sectors of 4", got, total, want)
		}
	}
	f := create(t, fsys, "/d/f")
	ok(t, f.Truncate(100*sector))
	free(4)
	if n, err := f.WriteAt(fill('x', 6), 10); n != 4*sector-10 || !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("got %d, %v, want what fits and %v", n, err, syscall.ENOSPC)
	}
	free(0)
	if _, err := fsys.Create("/d/g"); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("create: got %v, want %v", err, syscall.ENOSPC)
	}
	write(t, f, fill('y', 4), 0) // over what is there
	ok(t, f.PunchHole(sector, sector))
	free(1)
	ok(t, f.Truncate(3*sector+1))
	free(1)
	ok(t, f.Truncate(0))
	free(4)
	write(t, f, fill('y', 4), 0)
	ok(t, fsys.Remove("/d/f"))
	free(0)
	if _, err := f.ReadAt(make([]byte, sector), 0); err != nil && !errors.Is(err, io.EOF) {
		t.Error(err)
	}
	ok(t, f.Close())
	free(4)
}

func TestConcurrent(t *testing.T) {
	t.Parallel()
	fsys := faultfs.New("/d")
	fsys.SetSize(1 << 20)
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			name := fmt.Sprintf("/d/%d", i)
			for range 20 {
				if err := durable.WriteFile(fsys, name, fill(byte(i), 5)); err != nil {
					t.Error(err)
				}
				fsys.PowerLoss(faultfs.Loss(i + 1))
			}
		})
	}
	wg.Wait()
	for i := range 4 {
		if got := read(t, fsys.PowerLoss(faultfs.LoseAll), fmt.Sprintf("/d/%d", i)); !bytes.Equal(got, fill(byte(i), 5)) {
			t.Errorf("file %d: got %d bytes, want all", i, len(got))
		}
	}
}

// TestImmutable: what carries the attribute stays, over a loss of power too.
func TestImmutable(t *testing.T) {
	t.Parallel()
	fsys := faultfs.New("/d")
	ok(t, durable.WriteFile(fsys, "/d/a", []byte("a")))
	ok(t, durable.WriteFile(fsys, "/d/b", []byte("b")))
	ok(t, fsys.SetImmutable("/d/a", true))
	for i := range 2 {
		_, openErr := fsys.OpenWrite("/d/a")
		for op, err := range map[string]error{
			"open":    openErr,
			"rename":  fsys.Rename("/d/a", "/d/c"),
			"replace": fsys.Rename("/d/b", "/d/a"),
			"remove":  fsys.Remove("/d/a"),
		} {
			if !errors.Is(err, syscall.EPERM) {
				t.Errorf("%s, after %d losses of power: got %v, want EPERM", op, i, err)
			}
		}
		if got, err := fsys.Immutable("/d/a"); !got || err != nil {
			t.Errorf("after %d losses of power: got immutable %v %v, want true", i, got, err)
		}
		fsys = fsys.PowerLoss(faultfs.LoseAll)
	}
	ok(t, fsys.SetImmutable("/d/a", false))
	ok(t, fsys.Remove("/d/a"))
}
