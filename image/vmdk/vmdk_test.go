package vmdk_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/internal/imgtest"
	"github.com/holdfast-backup/holdfast/image/vmdk"
)

// checkLikeQEMU compares an image's bytes and map with what QEMU makes of it,
// and the bytes with want.
func checkLikeQEMU(t *testing.T, path string, want []byte) {
	t.Helper()
	if got := imgtest.CheckLikeQEMU(t, mustOpen(t, path), "vmdk", path); !bytes.Equal(got, want) {
		t.Error("QEMU reads something else than what was written")
	}
}

func TestReadSubformats(t *testing.T) {
	t.Parallel()
	for _, options := range []string{
		"subformat=monolithicSparse",
		"subformat=monolithicSparse,adapter_type=lsilogic,zeroed_grain=on",
		"subformat=monolithicSparse,adapter_type=buslogic,compat6=on",
		"subformat=monolithicFlat,adapter_type=legacyESX",
		"subformat=twoGbMaxExtentSparse,hwversion=7",
		"subformat=twoGbMaxExtentFlat",
		"subformat=streamOptimized",
		"subformat=streamOptimized,zeroed_grain=on",
	} {
		for _, size := range []int64{512, 3*mib + 3*512} {
			t.Run(fmt.Sprintf("%s,size=%d", options, size), func(t *testing.T) {
				t.Parallel()
				data := imgtest.Random(size, 1)
				checkLikeQEMU(t, imgtest.Convert(t, data, "vmdk", "-o", options), data)
			})
		}
	}
}

// large returns a disk of 32 MiB or more with data at its end and at 32 MiB,
// where the second grain table begins.
func large(size int64) []byte {
	data := make([]byte, size)
	copy(data[size-mib:], imgtest.Random(mib, 2))
	copy(data[32*mib-100*kib:], bytes.Repeat([]byte("across the border"), 12*kib))
	return data
}

// TestReadTables reads disks of more than one grain table.
func TestReadTables(t *testing.T) {
	t.Parallel()
	for _, subformat := range []string{"monolithicSparse", "streamOptimized"} {
		t.Run(subformat, func(t *testing.T) {
			t.Parallel()
			data := large(33*mib + 3*512)
			checkLikeQEMU(t, imgtest.Convert(t, data, "vmdk", "-o", "subformat="+subformat), data)
		})
	}
}

// TestReadSplit reads disks of several extents, with data across their borders.
func TestReadSplit(t *testing.T) {
	t.Parallel()
	for _, subformat := range []string{"twoGbMaxExtentSparse", "twoGbMaxExtentFlat"} {
		t.Run(subformat, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "disk.vmdk")
			imgtest.Run(t, "qemu-img", "create", "-f", "vmdk", "-o", "subformat="+subformat, path, "2200M")
			imgtest.QEMUIO(t, "vmdk", path, "write -P 0x11 0 128k", "write -P 0x22 2047M 2M", "write -P 0x33 2199M 1M")
			d := mustOpen(t, path)
			if got, want := imgtest.Extents(t, d, 0, d.Size()), imgtest.QEMUMap(t, "vmdk", path); !slices.Equal(got, want) || len(got) != 5 {
				t.Errorf("extents: got %v, want %v", got, want)
			}
			got := make([]byte, 3*mib)
			for off, want := range map[int64][]byte{
				0:                      bytes.Repeat([]byte{0x11}, 128*kib),
				2047*mib - 512*kib + 1: slices.Concat(make([]byte, 512*kib-1), bytes.Repeat([]byte{0x22}, 2*mib), make([]byte, 3)),
				2199*mib - 1:           slices.Concat([]byte{0}, bytes.Repeat([]byte{0x33}, mib)),
			} {
				got := got[:len(want)]
				if err := image.ReadFull(d, got, off); err != nil || !bytes.Equal(got, want) {
					t.Errorf("the %d bytes at %d differ, error %v", len(want), off, err)
				}
			}
		})
	}
}

// TestZeroedGrains reads an image in which written grains were zeroed.
func TestZeroedGrains(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "disk.vmdk")
	imgtest.Run(t, "qemu-img", "create", "-f", "vmdk", "-o", "zeroed_grain=on", path, "40M")
	imgtest.QEMUIO(t, "vmdk", path, "write -P 0x11 0 4M", "write -z 1M 1M", "write -z 30M 1M")
	zeroed := make([]byte, 40*mib)
	copy(zeroed, bytes.Repeat([]byte{0x11}, 4*mib))
	clear(zeroed[mib : 2*mib])
	checkLikeQEMU(t, path, zeroed)
	want := []image.Extent{
		{Off: 0, Len: mib},
		{Off: mib, Len: mib, Zero: true},
		{Off: 2 * mib, Len: 2 * mib},
		{Off: 4 * mib, Len: 36 * mib, Zero: true},
	}
	if got := imgtest.Extents(t, mustOpen(t, path), 0, 40*mib); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// TestHandmadeDescriptor reads flat extents with offsets, zero extents, other
// letter case, line ends of Windows and read-only extents.
func TestHandmadeDescriptor(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	data := imgtest.Random(300*512, 1)
	writeFile(t, folder, "some name.bin", data)
	writeFile(t, folder, "tiny.vmdk", tinySparse())
	path := writeFile(t, folder, "disk.vmdk", []byte(strings.ReplaceAll(`# Disk DescriptorFile
version=1
cid=123a
PARENTCID = FFFFFFFF
CreateType = "twoGBmaxExtentFlat"

# Extent description
RW 100 FLAT "some name.bin" 17
rdonly 7 ZERO
RW 40 SPARSE "tiny.vmdk"
RW	3	FLAT	"some name.bin"	297
# RW 3 FLAT "comment" 0
`, "\n", "\r\n")))
	tiny := make([]byte, 40*512)
	copy(tiny, tinyData())
	want := slices.Concat(data[17*512:117*512], make([]byte, 7*512), tiny, data[297*512:])
	imgtest.Check(t, mustOpen(t, path), want)
}

// TestVMFS reads what a download from a datastore of ESXi consists of: a
// descriptor and the flat file, which is sparse here.
func TestVMFS(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	data := imgtest.Random(3*mib, 1)
	writeFile(t, folder, "web 1-flat.vmdk", data)
	path := writeFile(t, folder, "web 1.vmdk", []byte(`# Disk DescriptorFile
version=1
encoding="UTF-8"
CID=fffffffe
parentCID=ffffffff
createType="vmfs"

# Extent description
RW 6144 VMFS "web 1-flat.vmdk"

# The Disk Data Base
#DDB

ddb.adapterType = "lsilogic"
ddb.geometry.cylinders = "3"
ddb.geometry.heads = "64"
ddb.geometry.sectors = "32"
ddb.thinProvisioned = "1"
ddb.virtualHWVersion = "13"
`))
	checkLikeQEMU(t, path, data)
}

func TestRefusedDescriptors(t *testing.T) {
	t.Parallel()
	outer := t.TempDir()
	folder := filepath.Join(outer, "vm")
	if err := os.Mkdir(folder, 0o755); err != nil {
		t.Fatal(err)
	}
	writeFile(t, outer, "x", make([]byte, mib))
	writeFile(t, folder, "a", make([]byte, mib))
	if err := os.Symlink("../x", filepath.Join(folder, "link")); err != nil {
		t.Fatal(err)
	}
	const (
		flat = `createType="monolithicFlat"` + "\n"
		vmfs = `createType="vmfs"` + "\n"
	)
	for _, tt := range []struct {
		name, text string
		want       error
		says       string
	}{
		{"parent", flat + "parentCID=12345678\nRW 8 FLAT \"a\" 0", image.ErrUnsupported, "12345678"},
		{"parent name", flat + "parentFileNameHint=\"base.vmdk\"\nRW 8 FLAT \"a\" 0", image.ErrUnsupported, "base.vmdk"},
		{"broken parent", flat + "parentCID=x\nRW 8 FLAT \"a\" 0", image.ErrCorrupt, "parentCID"},
		{"vmfs short", vmfs + "RW 2049 VMFS \"a\"", image.ErrCorrupt, "a"},
		{"vmfs outside", vmfs + "RW 8 VMFS \"../x\"", image.ErrUnsupported, "outside"},
		{"sparse vmfs extent", vmfs + "RW 8 VMFSSPARSE \"a\"", image.ErrUnsupported, "VMFSSPARSE"},
		{"seSparse vmfs extent", vmfs + "RW 8 SESPARSE \"a\"", image.ErrUnsupported, "SESPARSE"},
		{"raw vmfs extent", vmfs + "RW 8 VMFSRAW \"a\"", image.ErrUnsupported, "VMFSRAW"},
		{"mapped vmfs extent", vmfs + "RW 8 VMFSRDM \"a\"", image.ErrUnsupported, "VMFSRDM"},
		{"vmfsSparse", "createType=\"vmfsSparse\"\nRW 8 VMFSSPARSE \"a\"", image.ErrUnsupported, "vmfsSparse"},
		{"seSparse", "createType=\"seSparse\"\nRW 8 SESPARSE \"a\"", image.ErrUnsupported, "seSparse"},
		{"raw device", "createType=\"vmfsRawDeviceMap\"\nRW 8 VMFSRDM \"a\"", image.ErrUnsupported, "vmfsRawDeviceMap"},
		{"raw device extent", flat + "RW 8 VMFSRDM \"a\"", image.ErrUnsupported, "VMFSRDM"},
		{"custom", "createType=\"custom\"\nRW 8 FLAT \"a\" 0", image.ErrUnsupported, "custom"},
		{"device", "createType=\"fullDevice\"\nRW 8 FLAT \"/dev/sda\" 0", image.ErrUnsupported, "fullDevice"},
		{"encrypted", flat + "encryption.keySafe=\"vmware:key\"\nRW 8 FLAT \"a\" 0", image.ErrUnsupported, "encrypted"},
		{"no type", "RW 8 FLAT \"a\" 0", image.ErrCorrupt, "createType"},
		{"no extents", flat, image.ErrCorrupt, "extents"},
		{"no access", flat + "NOACCESS 8 FLAT \"a\" 0", image.ErrUnsupported, "NOACCESS"},
		{"many extents", flat + strings.Repeat("RW 8 ZERO\n", 4097), image.ErrUnsupported, "4096"},
		{"long", flat + strings.Repeat("#", 600*kib), image.ErrCorrupt, "descriptor"},
		{"zero length", flat + "RW 0 FLAT \"a\" 0", image.ErrCorrupt, "extent line"},
		{"negative", flat + "RW -8 ZERO", image.ErrCorrupt, "extent line"},
		{"huge", flat + "RW 99999999999999999999 ZERO", image.ErrCorrupt, "extent line"},
		{"too large together", flat + strings.Repeat("RW 2199023255552 ZERO\n", 2), image.ErrUnsupported, "larger"},
		{"negative offset", flat + "RW 8 FLAT \"a\" -1", image.ErrCorrupt, "extent line"},
		{"open quote", flat + "RW 8 FLAT \"a", image.ErrCorrupt, "extent line"},
		{"no name", flat + "RW 8 FLAT", image.ErrCorrupt, "name"},
		{"missing", flat + "RW 8 FLAT \"gone\" 0", os.ErrNotExist, "gone"},
		{"short", flat + "RW 2049 FLAT \"a\" 0", image.ErrCorrupt, "a"},
		{"short at offset", flat + "RW 2048 FLAT \"a\" 1", image.ErrCorrupt, "a"},
		{"not sparse", flat + "RW 8 SPARSE \"a\"", image.ErrCorrupt, "magic"},
		{"outside", flat + "RW 8 FLAT \"../x\" 0", image.ErrUnsupported, "outside"},
		{"absolute", flat + "RW 1 FLAT \"/etc/passwd\" 0", image.ErrUnsupported, "outside"},
		{"link", flat + "RW 8 FLAT \"link\" 0", image.ErrUnsupported, "outside"},
		{"folder", flat + "RW 8 FLAT \".\" 0", image.ErrUnsupported, "regular"},
	} {
		path := writeFile(t, folder, "disk.vmdk", []byte("# Disk DescriptorFile\nversion=1\n"+tt.text))
		_, err := open(t, path)
		if !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s: got %v, want %v with %q", tt.name, err, tt.want, tt.says)
		}
	}
	path := writeFile(t, folder, "disk.vmdk", []byte("# Disk DescriptorFile\n"+flat+"RW 8 FLAT \"../x\" 0"))
	if _, err := imgtest.OpenImage(t, path, vmdk.Open, image.OpenOptions{AllowOutside: true}); err != nil {
		t.Fatal(err)
	}
}

func TestRefusedSnapshot(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	base, child := filepath.Join(folder, "base.vmdk"), filepath.Join(folder, "child.vmdk")
	imgtest.Run(t, "qemu-img", "create", "-f", "vmdk", base, "1M")
	imgtest.Run(t, "qemu-img", "create", "-f", "vmdk", "-b", base, "-F", "vmdk", child)
	if _, err := open(t, child); !errors.Is(err, image.ErrUnsupported) || !strings.Contains(err.Error(), base) {
		t.Errorf("got %v, want %v with %q", err, image.ErrUnsupported, base)
	}
}

// TestRefusedPart opens an extent of a split disk by itself.
func TestRefusedPart(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "disk.vmdk")
	imgtest.Run(t, "qemu-img", "create", "-f", "vmdk", "-o", "subformat=twoGbMaxExtentSparse", path, "1M")
	_, err := open(t, strings.Replace(path, "disk.vmdk", "disk-s001.vmdk", 1))
	if err == nil {
		t.Error("got no error")
	}
}

// TestTruncated cuts images at many places: each must fail, none may read as zeros.
func TestTruncated(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ subformat, file string }{
		{"monolithicSparse", "disk.vmdk"},
		{"monolithicFlat", "disk-flat.vmdk"},
		{"twoGbMaxExtentSparse", "disk-s001.vmdk"},
		{"twoGbMaxExtentFlat", "disk-f001.vmdk"},
		{"streamOptimized", "disk.vmdk"},
		{"written", "written"},
	} {
		t.Run(tt.subformat, func(t *testing.T) {
			t.Parallel()
			data := imgtest.Random(2*mib, 1)
			noise := data[2*mib-64*kib:] // QEMU leaves slack behind a compressed grain that is short
			rand.NewChaCha8([32]byte{}).Read(noise)
			var path string
			if tt.subformat == "written" {
				path = imgtest.WriteImage(t, imgtest.Disk(data), vmdk.Write)
			} else {
				path = imgtest.Convert(t, data, "vmdk", "-o", "subformat="+tt.subformat)
			}
			file := filepath.Join(filepath.Dir(path), tt.file)
			size := int64(len(imgtest.ReadFile(t, file)))
			imgtest.CheckTruncated(t, path, file, vmdk.Open, size-513, size-1024, 64*kib, 40*kib, 12*kib, 1024, 513, 512, 100, 4)
		})
	}
}

func TestMatch(t *testing.T) {
	t.Parallel()
	for head, want := range map[string]bool{
		"KDMV\x01\x00":                    true,
		"COWD\x01\x00":                    true,
		"# Disk DescriptorFile\nversion=": true,
		"# Disk":                          false,
		"":                                false,
		"QFI\xfb":                         false,
	} {
		if got := vmdk.Match([]byte(head)); got != want {
			t.Errorf("%q: got %v, want %v", head, got, want)
		}
	}
}

func TestOpenOther(t *testing.T) {
	t.Parallel()
	for data, want := range map[string]error{
		"":                  image.ErrNotImage,
		"KD":                image.ErrNotImage,
		"COWD\x01\x00":      image.ErrUnsupported,
		"some raw disk ...": image.ErrNotImage,
	} {
		if _, err := open(t, writeFile(t, t.TempDir(), "disk", []byte(data))); !errors.Is(err, want) {
			t.Errorf("%q: got %v, want %v", data, err, want)
		}
	}
}
