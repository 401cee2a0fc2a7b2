package vdi_test

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/vdi"
)

const (
	kib = 1 << 10
	mib = 1 << 20
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
func open(t testing.TB, path string) (*vdi.Image, error) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	m, err := vdi.Open(f, image.OpenOptions{})
	if err == nil {
		t.Cleanup(func() { m.Close() })
	} else if _, err := f.Stat(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Open failed and left the file open: %v", err)
	}
	return m, err
}

func mustOpen(t testing.TB, path string) *vdi.Image {
	t.Helper()
	m, err := open(t, path)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func writeFile(t testing.TB, folder, name string, data []byte) string {
	t.Helper()
	path := filepath.Join(folder, name)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// pattern returns size bytes with holes of many lengths in noise.
func pattern(size int) []byte {
	r := rand.New(rand.NewPCG(1, uint64(size)))
	noise := rand.NewChaCha8([32]byte{byte(size)})
	p := make([]byte, size)
	for off := 0; off < size; {
		n := min(1+r.IntN(4*mib), size-off)
		if r.IntN(2) == 0 {
			noise.Read(p[off : off+n])
		}
		off += n
	}
	p[size-1] = 1
	return p
}

// create converts data to an image and returns its path.
func create(t testing.TB, data []byte, options string) string {
	t.Helper()
	folder := t.TempDir()
	raw := writeFile(t, folder, "disk.raw", data)
	path := filepath.Join(folder, "disk.vdi")
	run(t, "qemu-img", "convert", "-f", "raw", "-O", "vdi", "-o", options, raw, path)
	return path
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
	if err := json.Unmarshal(run(t, "qemu-img", "map", "--output=json", "-f", "vdi", path), &list); err != nil {
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

// checkSame compares all bytes of a disk with want, by reads of changing length and alignment.
func checkSame(t testing.TB, d image.Disk, want []byte) {
	t.Helper()
	if d.Size() != int64(len(want)) {
		t.Fatalf("size: got %d, want %d", d.Size(), len(want))
	}
	steps := []int64{4 * kib, 300*kib + 17, 3 * mib, 511, mib}
	got, old := make([]byte, 3*mib), bytes.Repeat([]byte{0xee}, 3*mib)
	for off, i := int64(0), 0; off < d.Size(); i++ {
		p := got[:min(steps[i%len(steps)], d.Size()-off)]
		copy(p, old) // zeros must be written, too
		if err := image.ReadFull(d, p, off); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(p, want[off:off+int64(len(p))]) {
			t.Fatalf("the %d bytes at %d differ", len(p), off)
		}
		off += int64(len(p))
	}
	if n, err := d.ReadAt(got[:10], d.Size()-4); n != 4 || err != io.EOF {
		t.Errorf("read across the end: got %d, %v, want 4, EOF", n, err)
	}
}

func TestRead(t *testing.T) {
	t.Parallel()
	for _, options := range []string{"static=off", "static=on"} {
		for _, size := range []int{512, mib, 9*mib + 3*512} {
			t.Run(fmt.Sprintf("%s,size=%d", options, size), func(t *testing.T) {
				t.Parallel()
				data := pattern(size)
				path := create(t, data, options)
				d := mustOpen(t, path)
				checkSame(t, d, data)
				if got, want := extents(t, d), qemuMap(t, path); !slices.Equal(got, want) {
					t.Errorf("extents: got %v, want %v", got, want)
				}
			})
		}
	}
}

// TestReadRewritten reads a dynamic image whose blocks are not in order.
func TestReadRewritten(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "disk.vdi")
	run(t, "qemu-img", "create", "-f", "vdi", path, "20M")
	run(t, "qemu-io", "-f", "vdi", "-c", "write -P 3 15M 1M", "-c", "write -P 2 7M 3M", "-c", "write -P 1 512k 1M", path)
	want := make([]byte, 20*mib)
	copy(want[15*mib:], bytes.Repeat([]byte{3}, mib))
	copy(want[7*mib:], bytes.Repeat([]byte{2}, 3*mib))
	copy(want[512*kib:], bytes.Repeat([]byte{1}, mib))
	d := mustOpen(t, path)
	checkSame(t, d, want)
	if got, want := extents(t, d), qemuMap(t, path); !slices.Equal(got, want) {
		t.Errorf("extents: got %v, want %v", got, want)
	}
}

// TestExtentsClip asks for parts of a map.
func TestExtentsClip(t *testing.T) {
	t.Parallel()
	data := make([]byte, 4*mib)
	copy(data[mib:], bytes.Repeat([]byte{7}, mib))
	for _, options := range []string{"static=off", "static=on"} {
		d := mustOpen(t, create(t, data, options))
		for _, tt := range []struct {
			off, length int64
			want        []image.Extent
		}{
			{mib - 100, 300, []image.Extent{{Off: mib - 100, Len: 100, Zero: true}, {Off: mib, Len: 200}}},
			{mib + 5, 7, []image.Extent{{Off: mib + 5, Len: 7}}},
			{4 * mib, 1, nil},
			{-1, 10, nil},
		} {
			var got []image.Extent
			for e, err := range image.Coalesce(d.Extents(t.Context(), tt.off, tt.length)) {
				if err != nil {
					t.Fatal(err)
				}
				got = append(got, e)
			}
			// The file system may know data only in pages.
			if options == "static=off" && !slices.Equal(got, tt.want) {
				t.Errorf("%s, [%d, +%d): got %v, want %v", options, tt.off, tt.length, got, tt.want)
			}
			covered := int64(0)
			for _, e := range got {
				covered += e.Len
			}
			if _, want := image.Clip(tt.off, tt.length, d.Size()); covered != want {
				t.Errorf("%s, [%d, +%d): got %d bytes, want %d", options, tt.off, tt.length, covered, want)
			}
		}
	}
}

// TestConcurrentReads reads small pieces from many goroutines at once, beside a walk over the map.
func TestConcurrentReads(t *testing.T) {
	t.Parallel()
	data := pattern(9 * mib)
	for _, options := range []string{"static=off", "static=on"} {
		d := mustOpen(t, create(t, data, options))
		var wg sync.WaitGroup
		for worker := range 8 {
			wg.Go(func() {
				p := make([]byte, 9*kib)
				for off := int64(worker * 1000); off+int64(len(p)) < d.Size(); off += 37 * kib {
					if err := image.ReadFull(d, p, off); err != nil {
						t.Error(err)
					} else if !bytes.Equal(p, data[off:off+int64(len(p))]) {
						t.Errorf("the bytes at %d differ", off)
					}
				}
			})
		}
		wg.Go(func() {
			for _, err := range d.Extents(t.Context(), 0, d.Size()) {
				if err != nil {
					t.Error(err)
				}
			}
		})
		wg.Wait()
	}
}

// TestHuge walks the map of an empty disk of 1 TiB.
func TestHuge(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "disk.vdi")
	run(t, "qemu-img", "create", "-f", "vdi", path, "1T")
	want := []image.Extent{{Len: 1 << 40, Zero: true}}
	if got := extents(t, mustOpen(t, path)); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// TestTruncated cuts images at many places: each must fail, none may read as zeros.
func TestTruncated(t *testing.T) {
	t.Parallel()
	for _, options := range []string{"static=off", "static=on"} {
		path := create(t, pattern(9*mib), options)
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		for i, cut := range []int64{1, info.Size() / 3, info.Size() * 2 / 3, info.Size() - 1024, info.Size() - 513, info.Size() - 500, info.Size() - 70} {
			if err := os.Truncate(path, info.Size()-cut); err != nil {
				t.Fatal(err)
			}
			d, err := open(t, path)
			if err == nil {
				_, err = io.Copy(io.Discard, io.NewSectionReader(d, 0, d.Size()))
			}
			if !errors.Is(err, image.ErrCorrupt) {
				t.Errorf("%s, cut %d, %d of %d bytes: got %v, want %v", options, i, info.Size()-cut, info.Size(), err, image.ErrCorrupt)
			}
		}
	}
}

// The tiny image is handmade: a disk of 5 blocks of 4 KiB, the last one cut,
// in the order data 1, unallocated, discarded, data 0, unallocated.
const (
	offSignature = 0x40
	offVersion   = 0x44
	offType      = 0x4c
	offMap       = 0x154
	offData      = 0x158
	offSector    = 0x168
	offSize      = 0x170
	offBlockSize = 0x178
	offExtra     = 0x17c
	offBlocks    = 0x180
	offLink      = 0x1a8
	offParent    = 0x1b8
)

func tiny() []byte {
	p := make([]byte, 1024+2*4096)
	le := binary.LittleEndian
	for off, value := range map[int]uint32{
		offSignature: 0xbeda107f, offVersion: 0x10001, offType: 1, offMap: 512, offData: 1024, offSector: 512,
		offSize: 4*4096 + 100, offBlockSize: 4096, offBlocks: 5,
	} {
		le.PutUint32(p[off:], value)
	}
	for i, entry := range []uint32{1, 0xffffffff, 0xfffffffe, 0, 0xffffffff} {
		le.PutUint32(p[512+4*i:], entry)
	}
	copy(p[1024:], bytes.Repeat([]byte{0xaa}, 4096))
	copy(p[1024+4096:], bytes.Repeat([]byte{0xbb}, 4096))
	return p
}

func TestTiny(t *testing.T) {
	t.Parallel()
	want := make([]byte, 4*4096+100)
	copy(want, bytes.Repeat([]byte{0xbb}, 4096))
	copy(want[3*4096:], bytes.Repeat([]byte{0xaa}, 4096))
	d := mustOpen(t, writeFile(t, t.TempDir(), "tiny.vdi", tiny()))
	checkSame(t, d, want)
	wantExtents := []image.Extent{
		{Off: 0, Len: 4096},
		{Off: 4096, Len: 8192, Zero: true},
		{Off: 12288, Len: 4096},
		{Off: 16384, Len: 100, Zero: true},
	}
	if got := extents(t, d); !slices.Equal(got, wantExtents) {
		t.Errorf("got %v, want %v", got, wantExtents)
	}
}

// TestRefused damages the tiny image.
func TestRefused(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name  string
		off   int
		value uint32
		want  error
	}{
		{"signature", offSignature, 1, image.ErrNotImage},
		{"version", offVersion, 0x10000, image.ErrUnsupported},
		{"undo image", offType, 3, image.ErrUnsupported},
		{"differencing image", offType, 4, image.ErrUnsupported},
		{"link", offLink + 12, 1, image.ErrUnsupported},
		{"parent", offParent, 1, image.ErrUnsupported},
		{"sector size", offSector, 4096, image.ErrUnsupported},
		{"no block size", offBlockSize, 0, image.ErrUnsupported},
		{"odd block size", offBlockSize, 5000, image.ErrUnsupported},
		{"huge blocks", offBlockSize, 1 << 31, image.ErrUnsupported},
		{"extra bytes", offExtra, 512, image.ErrUnsupported},
		{"huge disk", offSize + 4, 1 << 31, image.ErrUnsupported},
		{"few blocks", offBlocks, 4, image.ErrCorrupt},
		{"map in the header", offMap, 100, image.ErrCorrupt},
		{"data in the header", offData, 0, image.ErrCorrupt},
		{"map past the end", offMap, 1 << 20, image.ErrCorrupt},
		{"data past the end", offData, 1 << 20, image.ErrCorrupt},
		{"entry past the end", 512, 2, image.ErrCorrupt},
		{"large entry", 512, 0xfffffffd, image.ErrCorrupt},
	} {
		data := tiny()
		binary.LittleEndian.PutUint32(data[tt.off:], tt.value)
		d, err := open(t, writeFile(t, t.TempDir(), "tiny.vdi", data))
		if err == nil {
			_, err = d.ReadAt(make([]byte, d.Size()), 0)
		}
		if !errors.Is(err, tt.want) {
			t.Errorf("%s: got %v, want %v", tt.name, err, tt.want)
		}
	}
	if _, err := open(t, writeFile(t, t.TempDir(), "empty", nil)); !errors.Is(err, image.ErrNotImage) {
		t.Errorf("empty file: got %v, want %v", err, image.ErrNotImage)
	}
}

func TestMatch(t *testing.T) {
	t.Parallel()
	data := tiny()
	for length, want := range map[int]bool{0: false, 0x43: false, 0x44: true, 512: true} {
		if got := vdi.Match(data[:length]); got != want {
			t.Errorf("%d bytes: got %v, want %v", length, got, want)
		}
	}
	if vdi.Match(make([]byte, 512)) {
		t.Error("zeros: got true")
	}
}

// FuzzOpen opens, maps and reads whatever comes.
func FuzzOpen(f *testing.F) {
	f.Add(tiny())
	static := tiny()
	static[offType] = 2
	f.Add(static)
	folder := f.TempDir()
	f.Fuzz(func(t *testing.T, data []byte) {
		d, err := open(t, writeFile(t, folder, "disk.vdi", data))
		if err != nil {
			return
		}
		if d.Size() < 0 || d.Size() > image.MaxSize {
			t.Fatalf("size %d", d.Size())
		}
		p := make([]byte, 64*kib)
		d.ReadAt(p, 0)
		d.ReadAt(p, max(0, d.Size()-4000))
		next, count := int64(0), 0
		for e, err := range d.Extents(t.Context(), 0, d.Size()) {
			if err != nil {
				return
			}
			if e.Off != next || e.Len <= 0 || e.End() > d.Size() {
				t.Fatalf("got %v of %d bytes, want one from %d", e, d.Size(), next)
			}
			if next = e.End(); e.Zero {
				q := p[:min(e.Len, int64(len(p)))]
				if n, err := d.ReadAt(q, e.Off); n != len(q) || !image.IsZero(q) {
					t.Fatalf("%v: read %d, %v, zero %v", e, n, err, image.IsZero(q))
				}
			}
			if count++; count == 1000 {
				return
			}
		}
		if next != d.Size() {
			t.Fatalf("map ends at %d of %d", next, d.Size())
		}
	})
}

func BenchmarkRead(b *testing.B) {
	d := mustOpen(b, create(b, pattern(64*mib), "static=off"))
	p := make([]byte, mib)
	b.SetBytes(d.Size())
	b.ReportAllocs()
	for b.Loop() {
		for off := int64(0); off < d.Size(); off += int64(len(p)) {
			if err := image.ReadFull(d, p, off); err != nil {
				b.Fatal(err)
			}
		}
	}
}
