package qcow2_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/qcow2"
	"github.com/holdfast-backup/holdfast/image/raw"
)

const (
	KiB = 1 << 10
	MiB = 1 << 20
)

// run runs a command and returns its output.
func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s%s", name, args, err, out, &stderr)
	}
	return string(out)
}

// qemuIO runs qemu-io commands on an image.
func qemuIO(t testing.TB, path string, commands ...string) {
	t.Helper()
	args := []string{"-f", "qcow2", "-d", "unmap"}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	// qemu-io's exit status does not tell of failed commands.
	out := run(t, "qemu-io", append(args, path)...)
	if strings.Contains(out, "failed") || strings.Contains(out, "error") {
		t.Fatalf("qemu-io %q: %s", commands, out)
	}
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

func open(path string) (*qcow2.Image, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	return qcow2.Open(f, options())
}

func mustOpen(t testing.TB, path string) *qcow2.Image {
	t.Helper()
	m, err := open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

// extents returns the merged extents of a range.
func extents(t testing.TB, d image.Disk, off, length int64) []image.Extent {
	t.Helper()
	var all []image.Extent
	for e, err := range image.Coalesce(d.Extents(t.Context(), off, length)) {
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, e)
	}
	return all
}

// qemuMap returns the extents that qemu-img tells of.
func qemuMap(t testing.TB, path string) []image.Extent {
	t.Helper()
	var entries []struct {
		Start, Length int64
		Zero, Data    bool
	}
	if err := json.Unmarshal([]byte(run(t, "qemu-img", "map", "--output=json", path)), &entries); err != nil {
		t.Fatal(err)
	}
	seq := func(yield func(image.Extent, error) bool) {
		for _, e := range entries {
			if !yield(image.Extent{Off: e.Start, Len: e.Length, Zero: e.Zero || !e.Data}, nil) {
				return
			}
		}
	}
	var all []image.Extent
	for e := range image.Coalesce(seq) {
		all = append(all, e)
	}
	return all
}

// compareWithQEMU holds all bytes and extents of an image against what QEMU reads.
func compareWithQEMU(t testing.TB, path string) {
	t.Helper()
	plain := filepath.Join(t.TempDir(), "plain.raw")
	run(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, plain)
	want, err := os.ReadFile(plain)
	if err != nil {
		t.Fatal(err)
	}
	m := mustOpen(t, path)
	if m.Size() != int64(len(want)) {
		t.Fatalf("size: got %d, want %d", m.Size(), len(want))
	}
	compareReads(t, m, want)
	got, wantMap := extents(t, m, 0, m.Size()), qemuMap(t, path)
	if !slices.Equal(got, wantMap) {
		t.Errorf("extents:\ngot  %v\nwant %v", got, wantMap)
	}
	for _, e := range got {
		if e.Zero && !image.IsZero(want[e.Off:e.End()]) {
			t.Errorf("%v holds data", e)
		}
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 20 { // parts of the map are parts of the whole
		off := rnd.Int64N(m.Size() + 1)
		length := rnd.Int64N(m.Size() + 1)
		if part, want := extents(t, m, off, length), clip(wantMap, off, off+length); !slices.Equal(part, want) {
			t.Errorf("extents of %d bytes at %d:\ngot  %v\nwant %v", length, off, part, want)
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

// compareReads reads a disk in order and at random, from several goroutines.
func compareReads(t testing.TB, d image.Disk, want []byte) {
	t.Helper()
	var g sync.WaitGroup
	for seed := range uint64(4) {
		g.Go(func() {
			rnd := rand.New(rand.NewPCG(seed, 0))
			next := func(i int) (int, int) { return i * 300_001, 300_001 }
			if seed > 0 {
				next = func(int) (int, int) { return rnd.IntN(len(want) + 1), rnd.IntN(200 * KiB) }
			}
			for i := 0; i*300_001 <= len(want); i++ {
				off, n := next(i)
				p := bytes.Repeat([]byte{0xee}, n)
				left := want[min(off, len(want)):]
				n, err := d.ReadAt(p, int64(off))
				wantN, wantErr := len(p), error(nil)
				if len(p) > len(left) {
					wantN, wantErr = len(left), io.EOF
				}
				if n != wantN || !errors.Is(err, wantErr) || !bytes.Equal(p[:n], left[:wantN]) {
					t.Errorf("read %d bytes at %d: got %d, %v, equal bytes: %v; want %d, %v", len(p), off, n, err, bytes.Equal(p[:n], left[:n]), wantN, wantErr)
					return
				}
			}
		})
	}
	g.Wait()
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
		name  string
		o     string
		size  int64
		kinds []string
	}{
		{name: "default", size: 4 * MiB},
		{name: "version 2", o: "compat=0.10", size: 4 * MiB},
		{name: "512 byte clusters", o: "cluster_size=512", size: 2 * MiB},
		{name: "1 KiB clusters, version 2", o: "cluster_size=1k,compat=0.10", size: 2 * MiB},
		{name: "4 KiB clusters", o: "cluster_size=4k", size: 4 * MiB},
		{name: "32 KiB clusters", o: "cluster_size=32k", size: 4 * MiB},
		{name: "1 MiB clusters", o: "cluster_size=1M", size: 10 * MiB},
		{name: "2 MiB clusters", o: "cluster_size=2M", size: 10 * MiB},
		{name: "several L2 tables", o: "cluster_size=4k", size: 6 * MiB},
		{name: "extended L2", o: "extended_l2=on", size: 4 * MiB},
		{name: "extended L2, 16 KiB clusters", o: "extended_l2=on,cluster_size=16k", size: 4*MiB + 512},
		{name: "extended L2, 2 MiB clusters", o: "extended_l2=on,cluster_size=2M", size: 10 * MiB},
		{name: "extended L2, preallocated", o: "extended_l2=on,preallocation=metadata", size: 4*MiB + 1536},
		{name: "lazy reference counts", o: "lazy_refcounts=on", size: 4 * MiB},
		{name: "1-bit reference counts", o: "refcount_bits=1", size: 4 * MiB},
		{name: "64-bit reference counts", o: "refcount_bits=64", size: 4 * MiB},
		{name: "preallocated metadata", o: "preallocation=metadata", size: 4 * MiB},
		{name: "preallocated metadata, odd size", o: "preallocation=metadata", size: 4*MiB + 512},
		{name: "preallocated with fallocate", o: "preallocation=falloc", size: 4*MiB + 4096},
		{name: "preallocated in full", o: "preallocation=full", size: 4*MiB + 512},
		{name: "odd size", size: 5*MiB + 1536},
		{name: "one sector", size: 512},
		{name: "compressed", size: 4 * MiB, kinds: []string{"compressed"}},
		{name: "compressed, 512 byte clusters", o: "cluster_size=512", size: 1 * MiB, kinds: []string{"compressed"}},
		{name: "compressed, 2 MiB clusters", o: "cluster_size=2M", size: 6 * MiB, kinds: []string{"compressed"}},
		{name: "compressed, version 2", o: "compat=0.10", size: 4 * MiB, kinds: []string{"compressed"}},
		{name: "compressed, extended L2", o: "extended_l2=on", size: 4 * MiB, kinds: []string{"compressed"}},
		{name: "zstd", o: "compression_type=zstd", size: 4*MiB + 512, kinds: []string{"compressed"}},
		{name: "zstd, 2 MiB clusters", o: "compression_type=zstd,cluster_size=2M", size: 6 * MiB, kinds: []string{"compressed"}},
		{name: "zstd, extended L2", o: "compression_type=zstd,extended_l2=on,cluster_size=16k", size: 4 * MiB, kinds: []string{"compressed"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "disk.qcow2")
			if slices.Contains(tt.kinds, "compressed") {
				convertCompressed(t, path, tt.o, tt.size)
			} else {
				create(t, path, tt.o, tt.size)
			}
			compareWithQEMU(t, path)
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
	run(t, "qemu-img", append(args, path, fmt.Sprint(size))...)
}

// convertCompressed makes a compressed image of text, random bytes and zeros.
func convertCompressed(t testing.TB, path, o string, size int64) {
	t.Helper()
	content := make([]byte, size)
	rnd := rand.New(rand.NewPCG(uint64(size), 3))
	for i := range content {
		switch i / (150 * KiB) % 4 {
		case 0:
			content[i] = "the quick brown fox jumps over the lazy dog. "[i%45] ^ byte(i>>15)
		case 1:
			content[i] = byte(rnd.Uint32())
		case 2:
			content[i] = byte(rnd.Uint32()) & 3
		}
	}
	plain := path + ".raw"
	if err := os.WriteFile(plain, content, 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{"convert", "-c", "-f", "raw", "-O", "qcow2"}
	if o != "" {
		args = append(args, "-o", o)
	}
	run(t, "qemu-img", append(args, plain, path)...)
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
				run(t, "qemu-img", append(args, path, fmt.Sprint(l.size))...)
				compareWithQEMU(t, path)
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
	for _, o := range []string{"", "compat=0.10", "extended_l2=on"} {
		path := filepath.Join(t.TempDir(), "disk.qcow2")
		create(t, path, o, 4*MiB)
		for i := range uint64(3) {
			qemuIO(t, path, patterns(i, 4*MiB, everyKind...)...)
			run(t, "qemu-img", "snapshot", "-c", fmt.Sprint("s", i), path)
		}
		compareWithQEMU(t, path)
		qemuIO(t, path, patterns(9, 4*MiB, everyKind...)...)
		compareWithQEMU(t, path)
		run(t, "qemu-img", "snapshot", "-a", "s1", path)
		compareWithQEMU(t, path)
	}
}

// TestResizedPreallocated reads an image whose file was grown with metadata alone.
func TestResizedPreallocated(t *testing.T) {
	t.Parallel()
	for _, o := range []string{"", "extended_l2=on", "cluster_size=2M"} {
		path := filepath.Join(t.TempDir(), "disk.qcow2")
		create(t, path, o, 1*MiB+512)
		qemuIO(t, path, "write -P 1 0 1M")
		run(t, "qemu-img", "resize", "-q", "--preallocation=metadata", path, fmt.Sprint(9*MiB+512))
		compareWithQEMU(t, path)
		qemuIO(t, path, "write -P 2 9M 512", "write -P 3 5M 1k")
		compareWithQEMU(t, path)
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
		if got := extents(t, m, 0, m.Size()); !slices.Equal(got, want) {
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
