package vmdk_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"path/filepath"
	"slices"
	"testing"

	"github.com/klauspost/compress/zlib"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/internal/imgtest"
	"github.com/holdfast-backup/holdfast/image/vmdk"
)

// The tiny images are handmade: 40 sectors of disk, grains of 8, of which the
// first and the third hold data. Sectors of the file: 0 header, 1 and 2
// descriptor, 3 directory, 4 to 7 table, from 8 on grains.
const (
	tinyVersion    = 4
	tinyFlags      = 8
	tinyCapacity   = 12
	tinyGrain      = 20
	tinyDescriptor = 28
	tinyDescLen    = 36
	tinyEntries    = 44
	tinyGD         = 56
	tinyNewlines   = 73
	tinyCompressed = 77
	tinyDirectory  = 3 * 512
	tinyTable      = 4 * 512
	tinyGrains     = 8 * 512
)

func tinyData() []byte {
	return slices.Concat(bytes.Repeat([]byte{0xaa}, 4096), make([]byte, 4096), bytes.Repeat([]byte{0xbb}, 4096))
}

func tinyHeader(createType string) []byte {
	p := make([]byte, tinyGrains)
	le := binary.LittleEndian
	copy(p, "KDMV")
	le.PutUint32(p[tinyVersion:], 1)
	le.PutUint32(p[tinyFlags:], 1)
	le.PutUint64(p[tinyCapacity:], 40)
	le.PutUint64(p[tinyGrain:], 8)
	le.PutUint64(p[tinyDescriptor:], 1)
	le.PutUint64(p[tinyDescLen:], 2)
	le.PutUint32(p[tinyEntries:], 512)
	le.PutUint64(p[tinyGD:], 3)
	copy(p[tinyNewlines:], "\n \r\n")
	copy(p[512:], "# Disk DescriptorFile\ncreateType=\""+createType+"\"\nparentCID=ffffffff\nRW 40 SPARSE \"tiny.vmdk\"\n")
	le.PutUint32(p[tinyDirectory:], 4)
	le.PutUint32(p[tinyTable:], 8)
	le.PutUint32(p[tinyTable+8:], 16)
	return p
}

func tinySparse() []byte {
	data := tinyData()
	return slices.Concat(tinyHeader("monolithicSparse"), data[:4096], data[8192:])
}

// tinyStream has its two grains compressed in 4096 bytes of file each.
func tinyStream(t testing.TB) []byte {
	p := tinyHeader("streamOptimized")
	binary.LittleEndian.PutUint32(p[tinyVersion:], 3)
	binary.LittleEndian.PutUint32(p[tinyFlags:], 1|1<<16|1<<17)
	binary.LittleEndian.PutUint16(p[tinyCompressed:], 1)
	data := tinyData()
	return slices.Concat(p, packed(t, 0, data[:4096]), packed(t, 16, data[8192:]))
}

// packed returns a compressed grain of 4096 bytes, marker and padding included.
func packed(t testing.TB, sector uint64, data []byte) []byte {
	var b bytes.Buffer
	b.Write(make([]byte, 12))
	z := zlib.NewWriter(&b)
	if _, err := z.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	binary.LittleEndian.PutUint64(b.Bytes(), sector)
	binary.LittleEndian.PutUint32(b.Bytes()[8:], uint32(b.Len()-12))
	return append(b.Bytes(), make([]byte, 4096-b.Len())...)
}

func TestTiny(t *testing.T) {
	t.Parallel()
	want := make([]byte, 40*512)
	copy(want, tinyData())
	for name, data := range map[string][]byte{"sparse": tinySparse(), "stream": tinyStream(t)} {
		imgtest.Check(t, mustOpen(t, writeFile(t, t.TempDir(), name+".vmdk", data)), want)
	}
}

// TestRefusedSparse damages the tiny images.
func TestRefusedSparse(t *testing.T) {
	t.Parallel()
	put := func(off int, value uint32) func([]byte) {
		return func(p []byte) { binary.LittleEndian.PutUint32(p[off:], value) }
	}
	set := func(off int, data ...byte) func([]byte) {
		return func(p []byte) { copy(p[off:], data) }
	}
	grain := func(data []byte) func([]byte) {
		return func(p []byte) { copy(p[tinyGrains:], packed(t, 0, data)) }
	}
	for _, tt := range []struct {
		name   string
		stream bool
		damage func([]byte)
		want   error
	}{
		{"version", false, put(tinyVersion, 4), image.ErrUnsupported},
		{"flags", false, put(tinyFlags, 1<<5), image.ErrUnsupported},
		{"capacity", false, put(tinyCapacity+4, 1<<31), image.ErrUnsupported},
		{"capacity for its directory", false, put(tinyCapacity+4, 1), image.ErrCorrupt},
		{"grain of nothing", false, put(tinyGrain, 0), image.ErrUnsupported},
		{"grain of 12", false, put(tinyGrain, 12), image.ErrUnsupported},
		{"huge grain", false, put(tinyGrain, 1<<31), image.ErrUnsupported},
		{"table entries", false, put(tinyEntries, 1<<30), image.ErrUnsupported},
		{"no descriptor", false, put(tinyDescriptor, 0), image.ErrUnsupported},
		{"descriptor length", false, put(tinyDescLen+4, 1<<31), image.ErrCorrupt},
		{"descriptor type", false, set(512, tinyHeader("custom")[512:1024]...), image.ErrUnsupported},
		{"text transfer", false, set(tinyNewlines, []byte("\n \n\n")...), image.ErrCorrupt},
		{"directory place", false, put(tinyGD, 1<<20), image.ErrCorrupt},
		{"directory entry", false, put(tinyDirectory, 1<<20), image.ErrCorrupt},
		{"table entry", false, put(tinyTable, 1<<20), image.ErrCorrupt},
		{"zeroed grain without the flag", false, put(tinyTable, 1), image.ErrCorrupt},
		{"compression", true, set(tinyCompressed, 2), image.ErrUnsupported},
		{"no markers", true, put(tinyFlags, 1|1<<16), image.ErrUnsupported},
		{"no footer", true, set(tinyGD, bytes.Repeat([]byte{0xff}, 8)...), image.ErrCorrupt},
		{"other grain's marker", true, put(tinyTable, 16), image.ErrCorrupt},
		{"grain of no data", true, put(tinyGrains+8, 0), image.ErrCorrupt},
		{"grain of much data", true, put(tinyGrains+8, 1<<31), image.ErrCorrupt},
		{"cut grain", true, put(tinyGrains+8, 15), image.ErrCorrupt},
		{"no zlib", true, put(tinyGrains+12, 0), image.ErrCorrupt},
		{"wrong checksum", true, func(p []byte) { p[tinyGrains+8+4+int(p[tinyGrains+8])-1] ^= 1 }, image.ErrCorrupt},
		{"short grain", true, grain(make([]byte, 4095)), image.ErrCorrupt},
		{"empty grain", true, grain(nil), image.ErrCorrupt},
		{"long grain", true, grain(make([]byte, 4097)), image.ErrCorrupt},
		{"bomb", true, grain(make([]byte, mib)), image.ErrCorrupt},
	} {
		data := tinySparse()
		if tt.stream {
			data = tinyStream(t)
		}
		tt.damage(data)
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			path := writeFile(t, t.TempDir(), "tiny.vmdk", data)
			if d, err := open(t, path); err == nil {
				if _, err := d.ReadAt(make([]byte, 100), 50); !errors.Is(err, tt.want) {
					t.Errorf("small read: got %v, want %v", err, tt.want)
				}
			}
			imgtest.CheckDamaged(t, path, vmdk.Open, nil, tt.want, "")
		})
	}
}

// TestUncleanShutdown reads an image that its last writer did not close.
func TestUncleanShutdown(t *testing.T) {
	t.Parallel()
	data := tinySparse()
	data[72] = 1
	if err := imgtest.FirstError(t.Context(), mustOpen(t, writeFile(t, t.TempDir(), "tiny.vmdk", data))); err != nil {
		t.Error(err)
	}
}

// TestHugeSparse walks the map of an empty disk of 256 GiB.
func TestHugeSparse(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "disk.vmdk")
	imgtest.Run(t, "qemu-img", "create", "-f", "vmdk", "-o", "subformat=streamOptimized", path, "256G")
	d := mustOpen(t, path)
	want := []image.Extent{{Len: 256 * gib, Zero: true}}
	if got := imgtest.Extents(t, d, 0, d.Size()); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// FuzzOpen opens, maps and reads whatever comes.
func FuzzOpen(f *testing.F) {
	f.Add(tinySparse())
	f.Add(tinyStream(f))
	f.Add([]byte("# Disk DescriptorFile\ncreateType=\"twoGbMaxExtentFlat\"\nparentCID=ffffffff\nRW 2 FLAT \"disk.vmdk\" 0\nRW 9 ZERO\n"))
	self := tinySparse()
	binary.LittleEndian.PutUint32(self[tinyDirectory:], 3)
	f.Add(self)
	folder := f.TempDir()
	f.Fuzz(func(t *testing.T, data []byte) {
		if d, err := open(t, writeFile(t, folder, "disk.vmdk", data)); err == nil {
			imgtest.Exercise(t, d)
		}
	})
}
