package e2e_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
)

const (
	kiB   = 1 << 10
	miB   = 1 << 20
	giB   = 1 << 30
	chunk = 64 * kiB // the default chunk size
)

// noise fills p with bytes that neither compress nor repeat.
func noise(r *rand.Rand, p []byte) {
	for i := 0; i+8 <= len(p); i += 8 {
		v := r.Uint64()
		for k := range 8 {
			p[i+k] = byte(v >> (8 * k))
		}
	}
}

func newRand(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 0x686f6c6466617374)) }

// mixedDisk writes a raw disk with a bit of everything: noise, text, zeros
// that are written, holes, chunks that repeat, and data in the last, partial
// chunk. size is a multiple of 512.
func mixedDisk(t *testing.T, size int64, seed uint64) string {
	t.Helper()
	r := newRand(seed)
	path := filepath.Join(t.TempDir(), "disk.raw")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	piece := make([]byte, miB)
	repeated := make([]byte, chunk)
	noise(r, repeated)
	for off := int64(0); off < size; off += miB {
		p := piece[:min(miB, size-off)]
		switch kind := r.IntN(10); {
		case off == 0 || off+miB >= size || kind < 3:
			noise(r, p)
			p[len(p)-1] = 1 // the disk's last byte counts
		case kind < 6:
			for i := range p {
				p[i] = "It was a dark and stormy night; "[i%32]
			}
			copy(p[r.IntN(len(p)-16):], fmt.Sprint(off))
		case kind < 7:
			clear(p)
			copy(p[chunk:], repeated)
			copy(p[5*chunk:], repeated)
		case kind < 8:
			clear(p)
			p[r.IntN(len(p))] = 7 // one byte in a chunk of zeros
		default:
			continue // a hole
		}
		if _, err := f.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

// noiseDisk writes a raw disk that is noise from start to end.
func noiseDisk(t *testing.T, size int64, seed uint64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.raw")
	p := make([]byte, size)
	noise(newRand(seed), p)
	if err := os.WriteFile(path, p, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// overwrite replaces count chunks of the disk, picked by r, with noise and
// returns how many distinct ones.
func overwrite(t *testing.T, path string, r *rand.Rand, count int) map[int64]bool {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	changed := map[int64]bool{}
	p := make([]byte, chunk)
	for len(changed) < count {
		n := r.Int64N(info.Size() / chunk)
		if changed[n] {
			continue
		}
		changed[n] = true
		noise(r, p)
		if _, err := f.WriteAt(p, n*chunk); err != nil {
			t.Fatal(err)
		}
	}
	return changed
}

// copyFile copies a file, holes kept, and returns the copy's path.
func copyFile(t *testing.T, path string) string {
	t.Helper()
	to := filepath.Join(t.TempDir(), "copy.raw")
	tool(t, "cp", "--sparse=always", "--reflink=auto", path, to)
	return to
}

// changedChunks returns the numbers of the chunks in which two files of the
// same size differ, in order.
func changedChunks(t *testing.T, a, b string) []int64 {
	t.Helper()
	var changed []int64
	var n int64
	compare(t, a, b, func(p, q []byte) bool {
		if !bytes.Equal(p, q) {
			changed = append(changed, n)
		}
		n++
		return true
	})
	return changed
}

// sameFile holds a file's bytes against another's.
func sameFile(t *testing.T, got, want string) {
	t.Helper()
	var off int64
	compare(t, got, want, func(p, q []byte) bool {
		if !bytes.Equal(p, q) {
			t.Errorf("%s differs from %s in [%d, %d)", got, want, off, off+int64(len(q)))
			return false
		}
		off += int64(len(q))
		return true
	})
}

// compare reads two files chunk by chunk, to the end of the longer one.
func compare(t *testing.T, a, b string, fn func(p, q []byte) bool) {
	t.Helper()
	f, err := os.Open(a)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	g, err := os.Open(b)
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	p, q := make([]byte, chunk), make([]byte, chunk)
	for {
		n, err := io.ReadFull(f, p)
		if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("read %s: %v", a, err)
		}
		m, err := io.ReadFull(g, q)
		if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("read %s: %v", b, err)
		}
		if n == 0 && m == 0 || !fn(p[:n], q[:m]) {
			return
		}
	}
}

// identicalExport is identical for an export, which may be rounded up with
// zeros to a size that every client's block size divides.
func identicalExport(t *testing.T, uri, raw string) {
	t.Helper()
	tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", uri, raw)
}

// identical holds a disk image against a raw file with qemu-img, sizes
// included.
func identical(t *testing.T, format, image, raw string) {
	t.Helper()
	tool(t, "qemu-img", "compare", "-f", format, "-F", "raw", image, raw)
	got := decode[struct {
		Size int64 `json:"virtual-size"`
	}](t, tool(t, "qemu-img", "info", "--output=json", "-f", format, image)).Size
	info, err := os.Stat(raw)
	if err != nil {
		t.Fatal(err)
	}
	if got != info.Size() {
		t.Errorf("%s: got a disk of %d bytes, want %d", image, got, info.Size())
	}
}
