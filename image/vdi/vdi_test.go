package vdi_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"path/filepath"
	"slices"
	"testing"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/internal/imgtest"
	"github.com/holdfast-backup/holdfast/image/vdi"
)

const (
	kib = 1 << 10
	mib = 1 << 20
)

func open(t testing.TB, path string) (*vdi.Image, error) {
	t.Helper()
	return imgtest.OpenImage(t, path, vdi.Open, image.OpenOptions{})
}

func mustOpen(t testing.TB, path string) *vdi.Image {
	t.Helper()
	return imgtest.MustOpen(t, path, vdi.Open)
}

// file writes a file and returns its path.
func file(t testing.TB, data []byte) string {
	t.Helper()
	return imgtest.WriteFile(t, filepath.Join(t.TempDir(), "disk.vdi"), data)
}

func TestRead(t *testing.T) {
	t.Parallel()
	for _, options := range []string{"static=off", "static=on"} {
		for _, size := range []int64{512, mib, 9*mib + 3*512} {
			t.Run(fmt.Sprintf("%s,size=%d", options, size), func(t *testing.T) {
				t.Parallel()
				data := imgtest.Random(size, 1)
				path := imgtest.Convert(t, data, "vdi", "-o", options)
				if got := imgtest.CheckLikeQEMU(t, mustOpen(t, path), "vdi", path); !bytes.Equal(got, data) {
					t.Error("QEMU reads something else")
				}
			})
		}
	}
}

// TestReadRewritten reads a dynamic image whose blocks are not in order.
func TestReadRewritten(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "disk.vdi")
	imgtest.Run(t, "qemu-img", "create", "-f", "vdi", path, "20M")
	imgtest.QEMUIO(t, "vdi", path, "write -P 3 15M 1M", "write -P 2 7M 3M", "write -P 1 512k 1M")
	want := make([]byte, 20*mib)
	copy(want[15*mib:], bytes.Repeat([]byte{3}, mib))
	copy(want[7*mib:], bytes.Repeat([]byte{2}, 3*mib))
	copy(want[512*kib:], bytes.Repeat([]byte{1}, mib))
	d := mustOpen(t, path)
	imgtest.Check(t, d, want)
	imgtest.CheckLikeQEMU(t, d, "vdi", path)
}

// TestHuge walks the map of an empty disk of 1 TiB.
func TestHuge(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "disk.vdi")
	imgtest.Run(t, "qemu-img", "create", "-f", "vdi", path, "1T")
	want := []image.Extent{{Len: 1 << 40, Zero: true}}
	if got := imgtest.Extents(t, mustOpen(t, path), 0, 1<<40); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// TestTruncated cuts images at many places: each must fail, none may read as zeros.
func TestTruncated(t *testing.T) {
	t.Parallel()
	for _, options := range []string{"static=off", "static=on"} {
		path := imgtest.Convert(t, imgtest.Random(9*mib, 1), "vdi", "-o", options)
		size := int64(len(imgtest.ReadFile(t, path)))
		imgtest.CheckTruncated(t, path, path, vdi.Open, size-1, size-70, size-500, size-513, size-1024, 1024, 300)
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
	d := mustOpen(t, file(t, tiny()))
	imgtest.Check(t, d, want)
	wantExtents := []image.Extent{
		{Off: 0, Len: 4096},
		{Off: 4096, Len: 8192, Zero: true},
		{Off: 12288, Len: 4096},
		{Off: 16384, Len: 100, Zero: true},
	}
	if got := imgtest.Extents(t, d, 0, d.Size()); !slices.Equal(got, wantExtents) {
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
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			data := tiny()
			binary.LittleEndian.PutUint32(data[tt.off:], tt.value)
			imgtest.CheckDamaged(t, file(t, data), vdi.Open, nil, tt.want, "")
		})
	}
	imgtest.CheckDamaged(t, file(t, nil), vdi.Open, nil, image.ErrNotImage, "")
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
	f.Fuzz(func(t *testing.T, data []byte) {
		if d, err := open(t, file(t, data)); err == nil {
			imgtest.Exercise(t, d)
		}
	})
}

func BenchmarkRead(b *testing.B) {
	imgtest.ReadInOrder(b, mustOpen(b, imgtest.Convert(b, imgtest.Random(64*mib, 1), "vdi")))
}
