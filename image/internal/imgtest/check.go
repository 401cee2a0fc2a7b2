package imgtest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"iter"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"github.com/holdfast-backup/holdfast/image"
)

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

// Check holds a disk against the bytes that it should have: its size, reads in
// order, at random, small and past the end, by several goroutines at once and
// beside a walk over the extents; extents without gaps, zero only where the
// bytes are, and those of a range being those of the whole.
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
	g.Go(func() {
		for _, err := range d.Extents(t.Context(), 0, size) {
			if err != nil {
				t.Errorf("extents beside reads: %v", err)
			}
		}
	})
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
	for _, off := range []int64{-1, size, size + 1} {
		if got := Extents(t, d, off, 10); len(got) > 0 {
			t.Errorf("extents of 10 bytes at %d: got %v, want none", off, got)
		}
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 20 {
		off, length := rnd.Int64N(size+1), rnd.Int64N(size+1)
		if got, want := Extents(t, d, off, length), clip(all, off, off+length); !slices.Equal(got, want) {
			t.Errorf("extents of %d bytes at %d: got %v, want %v", length, off, got, want)
		}
	}
}

// checkReads reads all of a disk in order with seed 0, else at random, in large
// pieces with seed 1.
func checkReads(t testing.TB, d image.Disk, want []byte, seed uint64) {
	step := 300_001
	if seed > 1 {
		step = 30_001
	}
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

// Exercise is for fuzzing: it walks the start of a disk's map and reads where
// it leads. Any error is fine; gaps, zeros that read as something else and
// sizes out of bounds are not.
func Exercise(t testing.TB, d image.Disk) {
	t.Helper()
	if d.Size() < 0 || d.Size() > image.MaxSize {
		t.Fatalf("size %d", d.Size())
	}
	p := make([]byte, 64<<10)
	_, _ = d.ReadAt(p, 0)
	if n, err := d.ReadAt(p, max(0, d.Size()-10)); err == nil || n > 10 {
		t.Fatalf("read over the end: got %d, %v, want %v", n, err, io.EOF)
	}
	next, count := int64(0), 0
	for e, err := range d.Extents(t.Context(), 0, d.Size()) {
		if err != nil {
			return
		}
		if e.Off != next || e.Len <= 0 || e.End() > d.Size() {
			t.Fatalf("got %v of %d bytes, want one from %d", e, d.Size(), next)
		}
		next = e.End()
		q := p[:min(e.Len, page)]
		if n, err := d.ReadAt(q, e.Off); e.Zero && (n != len(q) || !image.IsZero(q)) {
			t.Fatalf("%v: read %d, %v, zero %v", e, n, err, image.IsZero(q))
		}
		if count++; count == 200 {
			return
		}
	}
	if next != d.Size() {
		t.Fatalf("extents end at %d of %d", next, d.Size())
	}
}

// ReadInOrder is a benchmark's loop: it reads all of d, 1 MiB a read.
func ReadInOrder(b *testing.B, d image.Disk) {
	p := make([]byte, 1<<20)
	b.SetBytes(d.Size())
	b.ReportAllocs()
	for b.Loop() {
		for off := int64(0); off < d.Size(); off += int64(len(p)) {
			if err := image.ReadFull(d, p[:min(int64(len(p)), d.Size()-off)], off); err != nil {
				b.Fatal(err)
			}
		}
	}
}
