package qcow2_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/internal/imgtest"
	"github.com/holdfast-backup/holdfast/image/qcow2"
)

func TestWrite(t *testing.T) {
	t.Parallel()
	noise := make([]byte, 3*MiB+100)
	rand.NewChaCha8([32]byte{}).Read(noise)
	clear(noise[1*MiB+10*KiB : 2*MiB+20*KiB]) // zeros that the extents call data
	for _, tt := range []struct {
		name     string
		disk     imgtest.Sparse
		clusters int64 // of data
	}{
		{"empty", imgtest.Sparse{}, 0},
		{"one byte", imgtest.Sparse{Bytes: 1, Data: map[int64][]byte{0: {1}}}, 1},
		{"all zeros", imgtest.Sparse{Bytes: 5 * MiB}, 0},
		{"zeros called data", imgtest.Sparse{Bytes: 5 * MiB, Data: map[int64][]byte{0: make([]byte, 5*MiB)}}, 0},
		{"data", imgtest.Sparse{Bytes: 3*MiB + 100, Data: map[int64][]byte{0: noise}}, 16 + 1 + 16 + 1},
		{"odd ends", imgtest.Sparse{Bytes: 3*MiB + 513, Data: map[int64][]byte{70: noise[:70*KiB], 3*MiB + 512: {9}}}, 2 + 1},
		{"several L2 tables", imgtest.Sparse{Bytes: 3<<30 + 512, Data: map[int64][]byte{1<<29 - 100: noise[:200], 2 << 30: noise[:MiB], 3 << 30: noise[:512]}}, 2 + 16 + 1},
		{"1 TiB", imgtest.Sparse{Bytes: 1 << 40, Data: map[int64][]byte{1 << 39: noise[:MiB], 1<<40 - 64*KiB: noise[:1]}}, 16 + 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			path := imgtest.WriteImage(t, tt.disk, qcow2.Write)
			imgtest.Run(t, "qemu-img", "check", "-f", "qcow2", path)
			m := mustOpen(t, path)
			if want := (tt.disk.Bytes + 511) / 512 * 512; m.Size() != want {
				t.Fatalf("size: got %d, want %d", m.Size(), want)
			}
			var data int64
			for _, e := range imgtest.Extents(t, m, 0, m.Size()) {
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
			if tt.disk.Bytes > 0 && tt.disk.Bytes <= 8*MiB {
				plain := make([]byte, tt.disk.Bytes)
				if err := image.ReadFull(tt.disk, plain, 0); err != nil {
					t.Fatal(err)
				}
				imgtest.QEMUCompare(t, "qcow2", path, plain)
				compareWithQEMU(t, path)
			}
		})
	}
}

// TestCopy writes what QEMU made, chain and all, as one new image.
func TestCopy(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	base, top := filepath.Join(folder, "base.qcow2"), filepath.Join(folder, "top.qcow2")
	imgtest.WriteFile(t, base, imgtest.ReadFile(t, convertCompressed(t, "", 4*MiB)))
	imgtest.Run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "-o", "extended_l2=on", top, "5M")
	qemuIO(t, top, patterns(4, 5*MiB, everyKind...)...)
	path := imgtest.WriteImage(t, mustOpen(t, top), qcow2.Write)
	imgtest.Run(t, "qemu-img", "check", "-f", "qcow2", path)
	imgtest.Run(t, "qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", top, path)

	// QEMU goes on writing where the image ends: what is not in use counts as free.
	qemuIO(t, path, "write 0 5M")
	imgtest.Run(t, "qemu-img", "check", "-f", "qcow2", path)
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
	d := imgtest.Sparse{Bytes: MiB, Data: map[int64][]byte{0: {1}}}
	if err := qcow2.Write(t.Context(), f, imgtest.Failing{Disk: d, Err: boom}, image.WriteOptions{}); !errors.Is(err, boom) {
		t.Errorf("a disk that fails: got %v, want %v", err, boom)
	}
	if head, err := os.ReadFile(f.Name()); err != nil || qcow2.Match(head) {
		t.Errorf("a disk that fails: %v, the rest of the image has a magic", err)
	}
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
				imgtest.Run(b, "qemu-img", append(append([]string{"convert", "-f", "raw", "-O", "qcow2"}, bb.args...), plain, path)...)
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
