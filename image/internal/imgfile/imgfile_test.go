package imgfile_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/internal/imgfile"
	"github.com/holdfast-backup/holdfast/image/internal/imgtest"
)

// TestCache reads a file of twice the cache's memory at random, from several
// goroutines, and past its end.
func TestCache(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "file")
	want := imgtest.Random(8<<20+100, 1)
	imgtest.WriteFile(t, path, want)
	f := imgtest.Open(t, path)
	defer f.Close()
	c := imgfile.NewCache(f)
	var g sync.WaitGroup
	for seed := range uint64(4) {
		g.Go(func() {
			rnd := rand.New(rand.NewPCG(seed, 0))
			for range 3000 {
				p := make([]byte, 1+rnd.IntN(9000))
				off := rnd.IntN(len(want))
				err := c.ReadFull(p, int64(off))
				if outside := off+len(p) > len(want); outside != errors.Is(err, image.ErrCorrupt) || !outside && err != nil {
					t.Errorf("%d bytes at %d: got %v", len(p), off, err)
				} else if !outside && !bytes.Equal(p, want[off:off+len(p)]) {
					t.Errorf("%d bytes at %d: wrong bytes", len(p), off)
				}
			}
		})
	}
	g.Wait()
}

// writes remembers what is written.
type writes struct {
	bytes []byte
	count int
}

func (w *writes) WriteAt(p []byte, off int64) (int, error) {
	w.count++
	return copy(w.bytes[off:], p), nil
}

func TestWriteSparse(t *testing.T) {
	t.Parallel()
	const page = 4 << 10
	for _, tt := range []struct {
		name  string
		size  int
		data  []int // places of bytes that are not zero
		count int   // of writes
	}{
		{"nothing", 0, nil, 0},
		{"zeros", 3*page + 5, nil, 0},
		{"neighbours", 4 * page, []int{page, 3*page - 1}, 1},
		{"apart", 4 * page, []int{0, 3 * page}, 2},
		{"part of a page at the end", page + 1, []int{page}, 1},
	} {
		p := make([]byte, tt.size)
		for _, at := range tt.data {
			p[at] = 1
		}
		w := &writes{bytes: make([]byte, tt.size)}
		if err := imgfile.WriteSparse(w, p, 0); err != nil || w.count != tt.count || !bytes.Equal(w.bytes, p) {
			t.Errorf("%s: got %d writes, %v, equal %v; want %d", tt.name, w.count, err, bytes.Equal(w.bytes, p), tt.count)
		}
	}
}

func TestSize(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, make([]byte, 77), 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]error{path: nil, t.TempDir(): image.ErrUnsupported, os.DevNull: image.ErrUnsupported} {
		f := imgtest.Open(t, path)
		defer f.Close()
		if size, err := imgfile.Size(f); !errors.Is(err, want) || want == nil && size != 77 {
			t.Errorf("%s: got %d, %v, want %v", path, size, err, want)
		}
	}
}

// TestExtents compares a file's extents, also as those of a disk, with where it
// was written.
func TestExtents(t *testing.T) {
	t.Parallel()
	const mib = 1 << 20
	data := make([]byte, 4*mib)
	copy(data[mib:], bytes.Repeat([]byte{1}, mib))
	f := imgtest.Open(t, imgtest.WriteFile(t, filepath.Join(t.TempDir(), "file"), data))
	defer f.Close()
	for _, tt := range []struct {
		place, length, off int64
		want               []image.Extent
	}{
		{0, 4 * mib, 0, []image.Extent{{Off: 0, Len: mib, Zero: true}, {Off: mib, Len: mib}, {Off: 2 * mib, Len: 2 * mib, Zero: true}}},
		{mib - 100, 300, 7, []image.Extent{{Off: 7, Len: 100, Zero: true}, {Off: 107, Len: 200}}},
		{2*mib - 1, 2, 9 * mib, []image.Extent{{Off: 9 * mib, Len: 1}, {Off: 9*mib + 1, Len: 1, Zero: true}}},
		{3 * mib, 0, 0, nil},
	} {
		var got []image.Extent
		for e, err := range imgfile.ExtentsAt(t.Context(), f, tt.place, tt.length, tt.off) {
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, e)
		}
		if !slices.Equal(got, tt.want) {
			t.Errorf("%d bytes at %d: got %v, want %v", tt.length, tt.place, got, tt.want)
		}
	}
	for _, err := range imgfile.Extents(t.Context(), f, 3*mib, 2*mib) {
		if !errors.Is(err, image.ErrCorrupt) {
			t.Errorf("past the end: got %v, want %v", err, image.ErrCorrupt)
		}
	}
}

func TestHas(t *testing.T) {
	t.Parallel()
	f, err := imgfile.NewFile(imgtest.Open(t, imgtest.WriteFile(t, filepath.Join(t.TempDir(), "file"), make([]byte, 100))))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, tt := range []struct {
		off, n int64
		want   error
	}{
		{0, 100, nil},
		{100, 0, nil},
		{99, 1, nil},
		{99, 2, image.ErrCorrupt},
		{101, 0, image.ErrCorrupt},
		{-1, 1, image.ErrCorrupt},
		{1, -1, image.ErrCorrupt},
		{1, 1<<63 - 1, image.ErrCorrupt},
	} {
		if err := f.Has(tt.off, tt.n); !errors.Is(err, tt.want) {
			t.Errorf("%d bytes at %d: got %v, want %v", tt.n, tt.off, err, tt.want)
		}
	}
}

// TestLRU asks for more values than the cache holds: what was asked for last is
// not loaded again, and a failure is not remembered.
func TestLRU(t *testing.T) {
	t.Parallel()
	c := imgfile.NewLRU[string, string](2)
	loads := ""
	get := func(key string) {
		v, err := c.Get(key, func() (string, error) { loads += key; return "value " + key, nil })
		if err != nil || v != "value "+key {
			t.Errorf("%s: got %q, %v", key, v, err)
		}
	}
	for _, key := range []string{"a", "b", "a", "c", "a", "b", "c"} {
		get(key)
	}
	if want := "abcbc"; loads != want {
		t.Errorf("loaded: got %s, want %s", loads, want)
	}
	boom := errors.New("boom")
	if _, err := c.Get("d", func() (string, error) { return "", boom }); !errors.Is(err, boom) {
		t.Errorf("failing: got %v, want %v", err, boom)
	}
	get("d")
}

// TestLRULoadsOnce has several goroutines want the same value at once.
func TestLRULoadsOnce(t *testing.T) {
	t.Parallel()
	c := imgfile.NewLRU[int, int](4)
	var loads atomic.Int64
	var g sync.WaitGroup
	for range 8 {
		g.Go(func() {
			for key := range 4 {
				if v, err := c.Get(key, func() (int, error) { loads.Add(1); return -key, nil }); v != -key || err != nil {
					t.Errorf("%d: got %d, %v, want %d", key, v, err, -key)
				}
			}
		})
	}
	g.Wait()
	if loads.Load() != 4 {
		t.Errorf("got %d loads, want 4", loads.Load())
	}
}
