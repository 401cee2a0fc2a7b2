// Package imgtest is what the tests of image formats share: disks with random
// contents, QEMU's view of an image, and a check of everything that an
// [image.Disk] promises.
package imgtest

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
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/internal/imgfile"
)

const (
	page   = 4 << 10
	sector = 512
)

// Run runs a command and returns its output. A failure ends the test, and so
// does a message of qemu-io, whose exit status does not tell.
func Run(t testing.TB, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil || name == "qemu-io" && strings.Contains(string(out), "failed") {
		t.Fatalf("%s %q: %v\n%s%s", name, args, err, out, &stderr)
	}
	return string(out)
}

// Random returns a disk of size bytes: about thirty stretches of data, from
// one sector to a tenth of the disk, the first and the last sector among
// them, and zeros.
func Random(size int64, seed uint64) []byte {
	source := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	rnd := rand.New(source)
	disk := make([]byte, size)
	fill := func(off, n int64) {
		_, _ = source.Read(disk[off:min(off+n, size)]) // never fails
	}
	for range 30 {
		longest := max(1, size/10>>rnd.IntN(8))
		fill(rnd.Int64N(size/sector+1)*sector, (1+rnd.Int64N(longest)/sector)*sector)
	}
	fill(0, sector)
	fill(max(0, size-sector), sector)
	return disk
}

// Disk returns an [image.Disk] of these bytes; its pages of zeros are its zero
// extents.
func Disk(data []byte) image.Disk { return memory{bytes.NewReader(data), data} }

type memory struct {
	*bytes.Reader
	data []byte
}

func (m memory) Extents(_ context.Context, off, length int64) iter.Seq2[image.Extent, error] {
	off, length = image.Clip(off, length, m.Size())
	return func(yield func(image.Extent, error) bool) {
		for end := off + length; off < end; {
			next := min(end, off-off%page+page)
			if !yield(image.Extent{Off: off, Len: next - off, Zero: image.IsZero(m.data[off:next])}, nil) {
				return
			}
			off = next
		}
	}
}

// WriteFile writes a file, with holes for its pages of zeros.
func WriteFile(t testing.TB, path string, data []byte) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := errors.Join(f.Truncate(int64(len(data))), imgfile.WriteSparse(f, data, 0)); err != nil {
		t.Fatal(err)
	}
}

// Open opens a file for reading.
func Open(t testing.TB, path string) *os.File {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// Extents returns the merged extents of a range.
func Extents(t testing.TB, d image.Disk, off, length int64) []image.Extent {
	t.Helper()
	return collect(t, d.Extents(t.Context(), off, length))
}

func collect(t testing.TB, seq iter.Seq2[image.Extent, error]) []image.Extent {
	t.Helper()
	var all []image.Extent
	for e, err := range image.Coalesce(seq) {
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, e)
	}
	return all
}

// QEMUMap returns the extents that qemu-img sees in an image. format is QEMU's
// name of the format.
func QEMUMap(t testing.TB, format, path string) []image.Extent {
	t.Helper()
	var entries []struct {
		Start, Length int64
		Zero, Data    bool
	}
	if err := json.Unmarshal([]byte(Run(t, "qemu-img", "map", "-f", format, "--output=json", path)), &entries); err != nil {
		t.Fatal(err)
	}
	return collect(t, func(yield func(image.Extent, error) bool) {
		for _, e := range entries {
			if !yield(image.Extent{Off: e.Start, Len: e.Length, Zero: e.Zero || !e.Data}, nil) {
				return
			}
		}
	})
}

// Check holds a disk against the bytes that it should have: its size, reads in
// order, at random and past the end, by several goroutines at once; extents
// without gaps, zero only where the bytes are, and those of a range being
// those of the whole.
func Check(t testing.TB, d image.Disk, want []byte) {
	t.Helper()
	size := int64(len(want))
	if d.Size() != size {
		t.Fatalf("size: got %d, want %d", d.Size(), size)
	}
	var g sync.WaitGroup
	for seed := range uint64(4) {
		g.Go(func() { checkReads(t, d, want, seed) })
	}
	g.Wait()
	if n, err := d.ReadAt(make([]byte, 1), -1); n != 0 || err == nil || errors.Is(err, io.EOF) {
		t.Errorf("read at -1: got %d, %v, want an error", n, err)
	}

	all := Extents(t, d, 0, size)
	end := int64(0)
	for _, e := range all {
		if e.Off != end || e.Len <= 0 {
			t.Fatalf("extent %v does not follow on byte %d", e, end)
		}
		end = e.End()
		if e.Zero && !image.IsZero(want[e.Off:min(end, size)]) {
			t.Errorf("extent %v has data", e)
		}
	}
	if end != size {
		t.Fatalf("extents end at %d, want %d", end, size)
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 20 {
		off, length := rnd.Int64N(size+1), rnd.Int64N(size+1)
		if got, want := Extents(t, d, off, length), clip(all, off, off+length); !slices.Equal(got, want) {
			t.Errorf("extents of %d bytes at %d: got %v, want %v", length, off, got, want)
		}
	}
}

// checkReads reads all of a disk in order with seed 0, else at random.
func checkReads(t testing.TB, d image.Disk, want []byte, seed uint64) {
	const step = 300_001
	rnd := rand.New(rand.NewPCG(seed, 0))
	for i := 0; i*step <= len(want); i++ {
		off, n := i*step, step
		if seed > 0 {
			off, n = rnd.IntN(len(want)+1), rnd.IntN(step)
		}
		part := want[off:min(off+n, len(want))]
		wantErr := error(nil)
		if len(part) < n {
			wantErr = io.EOF
		}
		p := bytes.Repeat([]byte{0xee}, n)
		got, err := d.ReadAt(p, int64(off))
		if got != len(part) || !(errors.Is(err, wantErr) || errors.Is(err, io.EOF) && off+n == len(want)) || !bytes.Equal(p[:got], part) {
			t.Errorf("read %d bytes at %d: got %d bytes, %v, equal %v; want %d, %v", n, off, got, err, bytes.HasPrefix(part, p[:got]), len(part), wantErr)
			return
		}
	}
}

func clip(all []image.Extent, off, end int64) []image.Extent {
	var part []image.Extent
	for _, e := range all {
		if start, end := max(e.Off, off), min(e.End(), end); start < end {
			part = append(part, image.Extent{Off: start, Len: end - start, Zero: e.Zero})
		}
	}
	return part
}

// FirstError reads a disk whole, bytes and extents, and returns what fails.
func FirstError(ctx context.Context, d image.Disk) error {
	for _, err := range d.Extents(ctx, 0, d.Size()) {
		if err != nil {
			return err
		}
	}
	buf := make([]byte, 64<<10)
	for off := int64(0); off < d.Size(); off += int64(len(buf)) {
		if _, err := d.ReadAt(buf, off); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
	}
	return nil
}
