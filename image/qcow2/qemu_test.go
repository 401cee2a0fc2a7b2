package qcow2_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/internal/imgtest"
	"github.com/holdfast-backup/holdfast/image/qcow2"
	"github.com/holdfast-backup/holdfast/image/raw"
)

const (
	KiB = 1 << 10
	MiB = 1 << 20
)

// qemuIO runs qemu-io commands on an image.
func qemuIO(t testing.TB, path string, commands ...string) {
	t.Helper()
	imgtest.QEMUIO(t, "qcow2", path, commands...)
}

// options opens backing files as qcow2 or raw.
func options() image.OpenOptions {
	var o image.OpenOptions
	o.OpenBacking = func(f *os.File, format string) (image.DiskCloser, error) {
		if format == "qcow2" {
			return qcow2.Open(f, o)
		}
		return raw.Open(f, o)
	}
	return o
}

func open(t testing.TB, path string) (*qcow2.Image, error) {
	t.Helper()
	return imgtest.OpenImage(t, path, qcow2.Open, options())
}

func mustOpen(t testing.TB, path string) *qcow2.Image {
	t.Helper()
	m, err := open(t, path)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// compareWithQEMU holds all bytes and extents of an image against what QEMU reads.
func compareWithQEMU(t testing.TB, path string) {
	t.Helper()
	imgtest.CheckLikeQEMU(t, mustOpen(t, path), "qcow2", path)
}

// patterns returns random qemu-io commands for a disk: data, zeros of every
// kind, discards. Every offset and length is a multiple of 512.
func patterns(seed uint64, size int64, kinds ...string) []string {
	rnd := rand.New(rand.NewPCG(seed, 7))
	var commands []string
	for i := range 40 {
		off := rnd.Int64N(size/512) * 512
		most := min(size-off, 1<<(10+rnd.IntN(10)))
		length := (rnd.Int64N(most/512) + 1) * 512
		c := kinds[rnd.IntN(len(kinds))]
		if c == "write" {
			c = fmt.Sprintf("write -P %d", i+1)
		}
		commands = append(commands, fmt.Sprintf("%s %d %d", c, off, length))
	}
	return commands
}

var everyKind = []string{"write", "write", "write", "write -z", "write -z -u", "discard"}

func TestReadLikeQEMU(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name       string
		o          string
		size       int64
		made       bool // as QEMU makes it, it has more than an empty map
		compressed bool
	}{
		{name: "default", size: 4 * MiB},
		{name: "version 2", o: "compat=0.10", size: 4 * MiB},
		{name: "512 byte clusters", o: "cluster_size=512", size: 2 * MiB},
		{name: "1 KiB clusters, version 2", o: "cluster_size=1k,compat=0.10", size: 2 * MiB},
		{name: "4 KiB clusters, several L2 tables", o: "cluster_size=4k", size: 6 * MiB},
		{name: "2 MiB clusters", o: "cluster_size=2M", size: 6 * MiB},
		{name: "extended L2", o: "extended_l2=on", size: 4 * MiB},
		{name: "extended L2, 16 KiB clusters", o: "extended_l2=on,cluster_size=16k", size: 4*MiB + 512},
		{name: "extended L2, 2 MiB clusters", o: "extended_l2=on,cluster_size=2M", size: 6 * MiB},
		{name: "extended L2, preallocated", o: "extended_l2=on,preallocation=metadata", size: 4*MiB + 1536, made: true},
		{name: "1-bit reference counts", o: "refcount_bits=1", size: 2 * MiB},
		{name: "lazy 64-bit reference counts", o: "lazy_refcounts=on,refcount_bits=64", size: 2 * MiB},
		{name: "preallocated metadata", o: "preallocation=metadata", size: 4*MiB + 512, made: true},
		{name: "preallocated with fallocate", o: "preallocation=falloc", size: 4*MiB + 4096, made: true},
		{name: "preallocated in full", o: "preallocation=full", size: 4*MiB + 512, made: true},
		{name: "odd size", size: 5*MiB + 1536},
		{name: "one sector", size: 512, made: true},
		{name: "compressed, 512 byte clusters", o: "cluster_size=512", size: 1 * MiB, compressed: true},
		{name: "compressed, 2 MiB clusters", o: "cluster_size=2M", size: 5 * MiB, compressed: true},
		{name: "compressed, version 2", o: "compat=0.10", size: 3 * MiB, compressed: true},
		{name: "compressed, extended L2", o: "extended_l2=on", size: 3 * MiB, compressed: true},
		{name: "zstd", o: "compression_type=zstd", size: 3*MiB + 512, compressed: true},
		{name: "zstd, 2 MiB clusters", o: "compression_type=zstd,cluster_size=2M", size: 5 * MiB, compressed: true},
		{name: "zstd, extended L2", o: "compression_type=zstd,extended_l2=on,cluster_size=16k", size: 3 * MiB, compressed: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "disk.qcow2")
			if tt.compressed {
				path = convertCompressed(t, tt.o, tt.size)
			} else {
				create(t, path, tt.o, tt.size)
			}
			if tt.made || tt.compressed {
				compareWithQEMU(t, path)
			}
			qemuIO(t, path, patterns(uint64(tt.size), tt.size, everyKind...)...)
			compareWithQEMU(t, path)
		})
	}
}

func create(t testing.TB, path, o string, size int64) {
	t.Helper()
	args := []string{"create", "-q", "-f", "qcow2"}
	if o != "" {
		args = append(args, "-o", o)
	}
	imgtest.Run(t, "qemu-img", append(args, path, fmt.Sprint(size))...)
}

// convertCompressed makes a compressed image of noise, of what compresses, and zeros.
func convertCompressed(t testing.TB, o string, size int64) string {
	t.Helper()
	args := []string{"-c"}
	if o != "" {
		args = append(args, "-o", o)
	}
	return imgtest.Convert(t, imgtest.Random(size, uint64(size)), "qcow2", args...)
}

// TestBackingChains reads chains three deep, of different formats, cluster sizes
// and disk sizes.
func TestBackingChains(t *testing.T) {
	t.Parallel()
	type layer struct {
		o    string
		size int64
	}
	for _, tt := range []struct {
		name     string
		baseSize int64 // of the raw base
		layers   []layer
	}{
		{"same size", 4 * MiB, []layer{{"", 4 * MiB}, {"cluster_size=4k", 4 * MiB}}},
		{"growing", 1*MiB + 700, []layer{{"extended_l2=on", 2*MiB + 512}, {"", 5 * MiB}}},
		{"shrinking", 6 * MiB, []layer{{"cluster_size=512", 5*MiB + 512}, {"extended_l2=on,cluster_size=16k", 3*MiB + 1024}}},
		{"short in the middle", 6 * MiB, []layer{{"", 1*MiB + 512}, {"compression_type=zstd", 6 * MiB}}},
		{"version 2", 3 * MiB, []layer{{"compat=0.10", 4 * MiB}, {"compat=0.10,cluster_size=2M", 5 * MiB}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			folder := t.TempDir()
			base, err := os.Create(filepath.Join(folder, "base.raw"))
			if err != nil {
				t.Fatal(err)
			}
			defer base.Close()
			for off := int64(0); off < tt.baseSize; off += 700 * KiB {
				if _, err := base.WriteAt(bytes.Repeat([]byte{0xba}, 300*KiB), off); err != nil {
					t.Fatal(err)
				}
			}
			if err := base.Truncate(tt.baseSize); err != nil {
				t.Fatal(err)
			}
			below, format := "base.raw", "raw"
			for i, l := range tt.layers {
				name := fmt.Sprintf("layer%d.qcow2", i)
				path := filepath.Join(folder, name)
				args := []string{"create", "-q", "-f", "qcow2", "-b", below, "-F", format}
				if l.o != "" {
					args = append(args, "-o", l.o)
				}
				imgtest.Run(t, "qemu-img", append(args, path, fmt.Sprint(l.size))...)
				qemuIO(t, path, patterns(uint64(i), l.size, everyKind...)...)
				compareWithQEMU(t, path)
				below, format = name, "qcow2"
			}
		})
	}
}

// TestSnapshots reads the current state of an image with internal snapshots,
// which share clusters with it and keep others.
func TestSnapshots(t *testing.T) {
	t.Parallel()
	for _, o := range []string{"compat=1.1", "compat=0.10", "extended_l2=on"} {
		t.Run(o, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "disk.qcow2")
			create(t, path, o, 2*MiB)
			for i := range uint64(2) {
				qemuIO(t, path, patterns(i, 2*MiB, everyKind...)...)
				imgtest.Run(t, "qemu-img", "snapshot", "-c", fmt.Sprint("s", i), path)
			}
			compareWithQEMU(t, path)
			qemuIO(t, path, patterns(9, 2*MiB, everyKind...)...)
			compareWithQEMU(t, path)
			imgtest.Run(t, "qemu-img", "snapshot", "-a", "s0", path)
			compareWithQEMU(t, path)
		})
	}
}

// TestResizedPreallocated reads an image whose file was grown with metadata alone.
func TestResizedPreallocated(t *testing.T) {
	t.Parallel()
	for _, o := range []string{"compat=1.1", "extended_l2=on", "cluster_size=2M"} {
		t.Run(o, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "disk.qcow2")
			create(t, path, o, 1*MiB+512)
			qemuIO(t, path, "write -P 1 0 1M")
			imgtest.Run(t, "qemu-img", "resize", "-q", "--preallocation=metadata", path, fmt.Sprint(9*MiB+512))
			compareWithQEMU(t, path)
			qemuIO(t, path, "write -P 2 9M 512", "write -P 3 5M 1k")
			compareWithQEMU(t, path)
		})
	}
}

// TestSparseIsQuick walks and reads disks that only a reader that skips what is not
// allocated gets through.
func TestSparseIsQuick(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		size, off int64
	}{
		{1 << 40, 1<<39 + 1234*64*KiB},
		{1 << 50, 1<<50 - 64*KiB},
	} {
		path := filepath.Join(t.TempDir(), "disk.qcow2")
		create(t, path, "", tt.size)
		qemuIO(t, path, fmt.Sprintf("write -P 5 %d 64k", tt.off))
		m := mustOpen(t, path)
		start := time.Now()
		want := []image.Extent{{Len: tt.off, Zero: true}, {Off: tt.off, Len: 64 * KiB}}
		if rest := tt.size - tt.off - 64*KiB; rest > 0 {
			want = append(want, image.Extent{Off: tt.size - rest, Len: rest, Zero: true})
		}
		if got := imgtest.Extents(t, m, 0, m.Size()); !slices.Equal(got, want) {
			t.Errorf("extents: got %v, want %v", got, want)
		}
		count := 0
		for range m.Extents(t.Context(), 0, m.Size()) {
			count++
		}
		if count > 5 { // zeros, the L2 table's zeros, data, the same again
			t.Errorf("got %d extents before they are merged, want 5 at most", count)
		}
		if took := time.Since(start); took > 5*time.Second { // a walk by clusters takes minutes
			t.Errorf("the walk took %v", took)
		}
		p := make([]byte, 64*KiB)
		if n, err := m.ReadAt(p, tt.off); n != len(p) || !bytes.Equal(p, bytes.Repeat([]byte{5}, len(p))) {
			t.Errorf("read at %d: got %d bytes, %v, not those written", tt.off, n, err)
		}
	}
}

func TestExtentsStop(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	create(t, path, "", 4*MiB)
	qemuIO(t, path, "write 0 64k", "write 128k 64k")
	m := mustOpen(t, path)
	for range m.Extents(t.Context(), 0, m.Size()) {
		break // must not go on yielding, which panics
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for e, err := range m.Extents(ctx, 0, m.Size()) {
		if !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled: got %v, %v, want %v", e, err, context.Canceled)
		}
	}
}
