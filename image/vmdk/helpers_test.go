package vmdk_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"iter"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/vmdk"
)

const (
	kib = 1 << 10
	mib = 1 << 20
	gib = 1 << 30
)

// run runs a tool, which must be there and succeed.
func run(t testing.TB, name string, args ...string) []byte {
	t.Helper()
	var stderr bytes.Buffer
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s%s", name, args, err, out, stderr.Bytes())
	}
	return out
}

// open opens the image at path, for the test's duration.
func open(t testing.TB, path string) (*vmdk.Image, error) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	m, err := vmdk.Open(f, image.OpenOptions{})
	if err == nil {
		t.Cleanup(func() { m.Close() })
	} else if _, err := f.Stat(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Open failed and left the file open: %v", err)
	}
	return m, err
}

func mustOpen(t testing.TB, path string) *vmdk.Image {
	t.Helper()
	m, err := open(t, path)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// extents returns a disk's map, merged.
func extents(t testing.TB, d image.Disk) []image.Extent {
	t.Helper()
	var got []image.Extent
	for e, err := range image.Coalesce(d.Extents(t.Context(), 0, d.Size())) {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, e)
	}
	return got
}

// qemuMap returns what qemu-img says about an image, merged.
func qemuMap(t testing.TB, path string) []image.Extent {
	t.Helper()
	var list []struct {
		Start, Length int64
		Zero, Data    bool
	}
	if err := json.Unmarshal(run(t, "qemu-img", "map", "--output=json", "-f", "vmdk", path), &list); err != nil {
		t.Fatal(err)
	}
	var merged []image.Extent
	for _, e := range list {
		zero := e.Zero || !e.Data
		if n := len(merged); n > 0 && merged[n-1].Zero == zero {
			merged[n-1].Len += e.Length
			continue
		}
		merged = append(merged, image.Extent{Off: e.Start, Len: e.Length, Zero: zero})
	}
	return merged
}

// checkSame compares all bytes of a disk with those of a raw file, by reads of
// changing length and alignment.
func checkSame(t testing.TB, d image.Disk, rawPath string) {
	t.Helper()
	raw, err := os.Open(rawPath)
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	info, err := raw.Stat()
	if err != nil {
		t.Fatal(err)
	}
	if d.Size() != info.Size() {
		t.Fatalf("size: got %d, want %d", d.Size(), info.Size())
	}
	steps := []int{4 * kib, 300*kib + 17, 64 * kib, 2 * mib, 511, 1 * mib}
	got, want := make([]byte, 2*mib), make([]byte, 2*mib)
	old := bytes.Repeat([]byte{0xee}, 2*mib) // reads of zeros must write them, too
	for off, i := int64(0), 0; off < d.Size(); i++ {
		n := min(int64(steps[i%len(steps)]), d.Size()-off)
		copy(got, old[:n])
		if err := image.ReadFull(d, got[:n], off); err != nil {
			t.Fatal(err)
		}
		if err := image.ReadFull(raw, want[:n], off); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got[:n], want[:n]) {
			t.Fatalf("the %d bytes at %d differ", n, off)
		}
		off += n
	}
	if n, err := d.ReadAt(got[:10], d.Size()-4); n != 4 || err != io.EOF {
		t.Errorf("read across the end: got %d, %v, want 4, EOF", n, err)
	}
}

// checkAgainstQEMU compares an image's bytes and map with what QEMU makes of it.
func checkAgainstQEMU(t *testing.T, path string) {
	t.Helper()
	raw := filepath.Join(t.TempDir(), "qemu.raw")
	run(t, "qemu-img", "convert", "-f", "vmdk", "-O", "raw", path, raw)
	d := mustOpen(t, path)
	checkSame(t, d, raw)
	if got, want := extents(t, d), qemuMap(t, path); !slices.Equal(got, want) {
		t.Errorf("extents: got %v, want %v", got, want)
	}
}

// memory is a disk of which the blocks of 4 KiB that are not zero are data.
type memory struct{ *bytes.Reader }

func (m memory) Extents(_ context.Context, off, length int64) iter.Seq2[image.Extent, error] {
	return func(yield func(image.Extent, error) bool) {
		p, zeros := make([]byte, 4*kib), make([]byte, 4*kib)
		off, length := image.Clip(off, length, m.Size())
		for end := off + length; off < end; {
			n := min(4*kib-off%(4*kib), end-off)
			err := image.ReadFull(m, p[:n], off)
			if !yield(image.Extent{Off: off, Len: n, Zero: bytes.Equal(p[:n], zeros[:n])}, err) {
				return
			}
			off += n
		}
	}
}

var (
	noise = sync.OnceValue(func() []byte {
		p := make([]byte, mib)
		rand.NewChaCha8([32]byte{}).Read(p)
		return p
	})
	text = bytes.Repeat([]byte("some text of a guest's log file\n"), 8*kib)
)

// pattern returns size bytes with runs of zeros, of text and of noise, the
// same for the same size.
func pattern(size int) []byte {
	r := rand.New(rand.NewPCG(1, uint64(size)))
	p := make([]byte, size)
	for off := 0; off < size; {
		n := min(1+r.IntN(200*kib), size-off)
		switch r.IntN(3) {
		case 0:
			copy(p[off:off+n], noise()[r.IntN(mib-n):])
		case 1:
			copy(p[off:off+n], text)
		case 2: // half of a small disk, most of a large one
			n = min(n+size/10, size-off)
		}
		off += n
	}
	if size > 0 {
		p[size-1] = 1
	}
	return p
}

// writeFile writes a file in folder and returns its path.
func writeFile(t testing.TB, folder, name string, data []byte) string {
	t.Helper()
	path := filepath.Join(folder, name)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
