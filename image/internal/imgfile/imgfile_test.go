package imgfile_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
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
