package image_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/holdfast-backup/holdfast/image"
)

// memory is a Disk over bytes, cut into given extents.
type memory struct {
	*bytes.Reader
	extents []image.Extent
}

func (m memory) Extents(_ context.Context, off, length int64) iter.Seq2[image.Extent, error] {
	return func(yield func(image.Extent, error) bool) {
		for _, e := range m.extents {
			start, end := max(e.Off, off), min(e.End(), off+length)
			if start < end && !yield(image.Extent{Off: start, Len: end - start, Zero: e.Zero}, nil) {
				return
			}
		}
	}
}

func TestCoalesce(t *testing.T) {
	boom := errors.New("boom")
	seq := func(yield func(image.Extent, error) bool) {
		_ = yield(image.Extent{Off: 0, Len: 4}, nil) &&
			yield(image.Extent{Off: 4, Len: 4}, nil) &&
			yield(image.Extent{Off: 8, Len: 2, Zero: true}, nil) &&
			yield(image.Extent{Off: 10, Len: 2, Zero: true}, nil) &&
			yield(image.Extent{}, boom)
	}
	var got []image.Extent
	var gotErr error
	for e, err := range image.Coalesce(seq) {
		if gotErr = err; err == nil {
			got = append(got, e)
		}
	}
	want := []image.Extent{{Off: 0, Len: 8}, {Off: 8, Len: 4, Zero: true}}
	if !slices.Equal(got, want) || !errors.Is(gotErr, boom) {
		t.Errorf("got %v, %v, want %v, %v", got, gotErr, want, boom)
	}
}

func TestForEachData(t *testing.T) {
	const block = 16
	data := make([]byte, 5*block+3)
	copy(data[2:], "first")
	copy(data[3*block+15:], "spans two blocks")
	data[5*block+2] = 1
	disk := memory{bytes.NewReader(data), []image.Extent{
		{Off: 0, Len: 8},
		{Off: 8, Len: 2*block - 8, Zero: true},
		{Off: 2 * block, Len: int64(len(data)) - 2*block},
	}}
	var mu sync.Mutex
	got := make([]byte, len(data))
	var blocks, reported int64
	err := image.ForEachData(t.Context(), disk, block,
		func(n int64) { mu.Lock(); defer mu.Unlock(); reported += n },
		func(off int64, p []byte) error {
			mu.Lock()
			defer mu.Unlock()
			blocks++
			copy(got[off:], p)
			return nil
		})
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, data) || blocks != 4 || reported != int64(len(data)) {
		t.Errorf("got %q in %d blocks, %d bytes reported, want %q in 4 blocks, %d bytes", got, blocks, reported, data, len(data))
	}

	boom := errors.New("boom")
	err = image.ForEachData(t.Context(), disk, block, func(int64) {}, func(int64, []byte) error { return boom })
	if !errors.Is(err, boom) {
		t.Errorf("a failing consumer: got %v, want %v", err, boom)
	}
}

func TestReadFull(t *testing.T) {
	r := bytes.NewReader([]byte("abcdef"))
	p := make([]byte, 6)
	if err := image.ReadFull(r, p, 0); err != nil {
		t.Error(err)
	}
	if err := image.ReadFull(r, p, 1); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("short read: got %v, want %v", err, io.ErrUnexpectedEOF)
	}
}

func TestIsZero(t *testing.T) {
	for size := range 100 {
		p := make([]byte, size)
		if !image.IsZero(p) {
			t.Fatalf("%d zeros: got false", size)
		}
		for i := range p {
			p[i] = 0x80
			if image.IsZero(p) {
				t.Fatalf("byte %d of %d set: got true", i, size)
			}
			p[i] = 0
		}
	}
}

func TestOpenReferenced(t *testing.T) {
	outer := t.TempDir()
	folder := filepath.Join(outer, "vm")
	if err := os.Mkdir(folder, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{filepath.Join(outer, "secret"), filepath.Join(folder, "base")} {
		if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("../secret", filepath.Join(folder, "link")); err != nil {
		t.Fatal(err)
	}
	img := filepath.Join(folder, "disk.qcow2")
	for _, tt := range []struct {
		ref     string
		outside bool
		want    error
	}{
		{"base", false, nil},
		{filepath.Join(folder, "base"), false, nil},
		{"../vm/base", false, nil},
		{"../secret", false, image.ErrUnsupported},
		{"link", false, image.ErrUnsupported},
		{"link", true, nil},
		{"../secret", true, nil},
		{"/dev/zero", true, image.ErrUnsupported},
		{".", false, image.ErrUnsupported},
		{"missing", false, os.ErrNotExist},
		{"", true, image.ErrCorrupt},
	} {
		f, err := image.OpenReferenced(img, tt.ref, tt.outside)
		if !errors.Is(err, tt.want) {
			t.Errorf("%q, outside %v: got %v, want %v", tt.ref, tt.outside, err, tt.want)
		}
		if err == nil {
			f.Close()
		}
	}
}
