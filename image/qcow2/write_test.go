package qcow2_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"iter"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/qcow2"
)

// pieces is a Disk of a given size with data at a few offsets.
type pieces struct {
	size int64
	data map[int64][]byte
	fail error // of every read
}

func (d pieces) Size() int64 { return d.size }

func (d pieces) ReadAt(p []byte, off int64) (int, error) {
	if d.fail != nil {
		return 0, d.fail
	}
	_, n := image.Clip(off, int64(len(p)), d.size)
	clear(p)
	for at, data := range d.data {
		if start, end := max(at, off), min(at+int64(len(data)), off+n); start < end {
			copy(p[start-off:end-off], data[start-at:])
		}
	}
	if int(n) < len(p) {
		return int(n), io.EOF
	}
	return len(p), nil
}

func (d pieces) Extents(_ context.Context, off, length int64) iter.Seq2[image.Extent, error] {
	return func(yield func(image.Extent, error) bool) {
		end := off + length
		for _, at := range slices.Sorted(func(yield func(int64) bool) {
			for at := range d.data {
				if !yield(at) {
					return
				}
			}
		}) {
			stop := at + int64(len(d.data[at]))
			if stop <= off || at >= end {
				continue
			}
			if at > off && !yield(image.Extent{Off: off, Len: at - off, Zero: true}, nil) {
				return
			}
			start := max(at, off)
			off = min(stop, end)
			if !yield(image.Extent{Off: start, Len: off - start}, nil) {
				return
			}
		}
		if off < end {
			yield(image.Extent{Off: off, Len: end - off, Zero: true}, nil)
		}
	}
}

// writeImage writes a disk and returns the path of the image.
func writeImage(t testing.TB, d image.Disk) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "out.qcow2")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var done atomic.Int64
	if err := qcow2.Write(t.Context(), f, d, image.WriteOptions{Progress: func(n int64) { done.Add(n) }}); err != nil {
		t.Fatal(err)
	}
	if done.Load() != d.Size() {
		t.Errorf("progress: got %d bytes, want %d", done.Load(), d.Size())
	}
	return path
}

func TestWrite(t *testing.T) {
	t.Parallel()
	noise := make([]byte, 3*MiB+100)
	rand.NewChaCha8([32]byte{}).Read(noise)
	clear(noise[1*MiB+10*KiB : 2*MiB+20*KiB]) // zeros that the extents call data
	for _, tt := range []struct {
		name     string
		disk     pieces
		clusters int64 // of data
	}{
		{"empty", pieces{}, 0},
		{"one byte", pieces{size: 1, data: map[int64][]byte{0: {1}}}, 1},
		{"all zeros", pieces{size: 5 * MiB}, 0},
		{"zeros called data", pieces{size: 5 * MiB, data: map[int64][]byte{0: make([]byte, 5*MiB)}}, 0},
		{"data", pieces{size: 3*MiB + 100, data: map[int64][]byte{0: noise}}, 16 + 1 + 16 + 1},
		{"odd ends", pieces{size: 3*MiB + 513, data: map[int64][]byte{70: noise[:70*KiB], 3*MiB + 512: {9}}}, 2 + 1},
		{"several L2 tables", pieces{size: 3<<30 + 512, data: map[int64][]byte{1<<29 - 100: noise[:200], 2 << 30: noise[:MiB], 3 << 30: noise[:512]}}, 2 + 16 + 1},
		{"1 TiB", pieces{size: 1 << 40, data: map[int64][]byte{1 << 39: noise[:MiB], 1<<40 - 64*KiB: noise[:1]}}, 16 + 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			path := writeImage(t, tt.disk)
			run(t, "qemu-img", "check", "-f", "qcow2", path)
			m := mustOpen(t, path)
			if want := (tt.disk.size + 511) / 512 * 512; m.Size() != want {
				t.Fatalf("size: got %d, want %d", m.Size(), want)
			}
			var data int64
			for _, e := range extents(t, m, 0, m.Size()) {
				if e.Zero {
					continue
				}
				data += (e.Len + 64*KiB - 1) / (64 * KiB)
				got, want := make([]byte, e.Len), make([]byte, e.Len)
				if _, err := m.ReadAt(got, e.Off); err != nil {
					t.Fatal(err)
				}
				if _, err := tt.disk.ReadAt(want, e.Off); err != nil && err != io.EOF {
					t.Fatal(err)
				}
				if !bytes.Equal(got, want) {
					t.Errorf("%v differs from what was written", e)
				}
			}
			if data != tt.clusters {
				t.Errorf("got %d clusters of data, want %d", data, tt.clusters)
			}
			if tt.disk.size <= 8*MiB {
				compareWithDisk(t, path, tt.disk)
			}
		})
	}
}

// compareWithDisk lets QEMU compare an image with the disk that it was written from.
func compareWithDisk(t *testing.T, path string, d image.Disk) {
	t.Helper()
	plain := make([]byte, d.Size())
	if err := image.ReadFull(d, plain, 0); err != nil {
		t.Fatal(err)
	}
	raw := filepath.Join(t.TempDir(), "plain.raw")
	if err := os.WriteFile(raw, plain, 0o600); err != nil {
		t.Fatal(err)
	}
	if d.Size() > 0 {
		run(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, path)
		compareWithQEMU(t, path)
	}
}

// TestCopy writes what QEMU made, chain and all, as one new image.
func TestCopy(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	base, top := filepath.Join(folder, "base.qcow2"), filepath.Join(folder, "top.qcow2")
	convertCompressed(t, base, "", 4*MiB)
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "-o", "extended_l2=on", top, "5M")
	qemuIO(t, top, patterns(4, 5*MiB, everyKind...)...)
	path := writeImage(t, mustOpen(t, top))
	run(t, "qemu-img", "check", "-f", "qcow2", path)
	run(t, "qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", top, path)

	// QEMU goes on writing where the image ends: what is not in use counts as free.
	qemuIO(t, path, "write 0 5M")
	run(t, "qemu-img", "check", "-f", "qcow2", path)
	if info, err := os.Stat(path); err != nil || info.Size() > 12*MiB {
		t.Errorf("after more writes: got a file of %d bytes, %v, want 12 MiB at most", info.Size(), err)
	}
}

func TestWriteFails(t *testing.T) {
	t.Parallel()
	boom := errors.New("boom")
	f, err := os.Create(filepath.Join(t.TempDir(), "out.qcow2"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	d := pieces{size: MiB, data: map[int64][]byte{0: {1}}, fail: boom}
	if err := qcow2.Write(t.Context(), f, d, image.WriteOptions{}); !errors.Is(err, boom) {
		t.Errorf("a disk that fails: got %v, want %v", err, boom)
	}
	if head, err := os.ReadFile(f.Name()); err != nil || qcow2.Match(head) {
		t.Errorf("a disk that fails: %v, the rest of the image has a magic", err)
	}
	d.fail = nil
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := qcow2.Write(ctx, f, d, image.WriteOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: got %v, want %v", err, context.Canceled)
	}
	if _, err := f.WriteString("something"); err != nil {
		t.Fatal(err)
	}
	if err := qcow2.Write(t.Context(), f, d, image.WriteOptions{}); err == nil || !strings.Contains(err.Error(), "not an empty") {
		t.Errorf("a file in use: got %v, want a refusal", err)
	}
}

// BenchmarkRead reads 256 MiB in order, 1 MiB a read, from a raw file and images
// of it.
func BenchmarkRead(b *testing.B) {
	const size = 256 * MiB
	plain := filepath.Join(b.TempDir(), "plain.raw")
	noise := make([]byte, size)
	rand.NewChaCha8([32]byte{}).Read(noise)
	for i := range noise {
		noise[i] &= 15 // compresses to a half
	}
	if err := os.WriteFile(plain, noise, 0o600); err != nil {
		b.Fatal(err)
	}
	for _, bb := range []struct {
		name string
		args []string
	}{
		{"raw", nil},
		{"default", []string{"-o", "cluster_size=64k"}},
		{"4KiB", []string{"-o", "cluster_size=4k"}},
		{"512B", []string{"-o", "cluster_size=512"}},
		{"extended", []string{"-o", "extended_l2=on"}},
		{"zlib", []string{"-c"}},
		{"zstd", []string{"-c", "-o", "compression_type=zstd"}},
	} {
		b.Run(bb.name, func(b *testing.B) {
			var r io.ReaderAt
			if bb.args == nil {
				f, err := os.Open(plain)
				if err != nil {
					b.Fatal(err)
				}
				defer f.Close()
				r = f
			} else {
				path := filepath.Join(b.TempDir(), "disk.qcow2")
				run(b, "qemu-img", append(append([]string{"convert", "-f", "raw", "-O", "qcow2"}, bb.args...), plain, path)...)
				r = mustOpen(b, path)
			}
			p := make([]byte, MiB)
			b.SetBytes(MiB)
			b.ReportAllocs()
			off := int64(0)
			for b.Loop() {
				if err := image.ReadFull(r, p, off); err != nil {
					b.Fatal(err)
				}
				off = (off + MiB) % size
			}
		})
	}
}
