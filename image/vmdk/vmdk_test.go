package vmdk_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/vmdk"
)

// subformats are all that qemu-img makes.
var subformats = []string{"monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "streamOptimized"}

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
		for _, size := range []int{512, 64 * kib, 33*mib + 3*512} {
			t.Run(fmt.Sprintf("%s,size=%d", options, size), func(t *testing.T) {
				t.Parallel()
				folder := t.TempDir()
				raw := writeFile(t, folder, "disk.raw", pattern(size))
				path := filepath.Join(folder, "disk.vmdk")
				run(t, "qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", options, raw, path)
				checkSame(t, mustOpen(t, path), raw)
				checkAgainstQEMU(t, path)
			})
		}
	}
}

// TestReadSplit reads disks of several extents, with data across their borders.
func TestReadSplit(t *testing.T) {
	t.Parallel()
	for _, subformat := range []string{"twoGbMaxExtentSparse", "twoGbMaxExtentFlat"} {
		t.Run(subformat, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "disk.vmdk")
			run(t, "qemu-img", "create", "-f", "vmdk", "-o", "subformat="+subformat, path, "2200M")
			run(t, "qemu-io", "-f", "vmdk", "-c", "write -P 0x11 0 128k", "-c", "write -P 0x22 2047M 2M",
				"-c", "write -P 0x33 2199M 1M", path)
			d := mustOpen(t, path)
			if got, want := extents(t, d), qemuMap(t, path); !slices.Equal(got, want) || len(got) != 5 {
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
	run(t, "qemu-img", "create", "-f", "vmdk", "-o", "zeroed_grain=on", path, "40M")
	run(t, "qemu-io", "-f", "vmdk", "-c", "write -P 0x11 0 4M", "-c", "write -z 1M 1M", "-c", "write -z 30M 1M", path)
	checkAgainstQEMU(t, path)
	want := []image.Extent{
		{Off: 0, Len: mib},
		{Off: mib, Len: mib, Zero: true},
		{Off: 2 * mib, Len: 2 * mib},
		{Off: 4 * mib, Len: 36 * mib, Zero: true},
	}
	if got := extents(t, mustOpen(t, path)); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// TestExtentsClip asks for parts of a map.
func TestExtentsClip(t *testing.T) {
	t.Parallel()
	for _, subformat := range subformats {
		t.Run(subformat, func(t *testing.T) {
			t.Parallel()
			folder := t.TempDir()
			data := make([]byte, 4*mib)
			copy(data[mib:], bytes.Repeat([]byte{7}, mib))
			raw := writeFile(t, folder, "disk.raw", data)
			path := filepath.Join(folder, "disk.vmdk")
			run(t, "qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat="+subformat, raw, path)
			d := mustOpen(t, path)
			for _, tt := range []struct {
				off, length int64
				want        []image.Extent
			}{
				{mib - 100, 300, []image.Extent{{Off: mib - 100, Len: 100, Zero: true}, {Off: mib, Len: 200}}},
				{2*mib - 1, 10 * mib, []image.Extent{{Off: 2*mib - 1, Len: 1}, {Off: 2 * mib, Len: 2 * mib, Zero: true}}},
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
				if !slices.Equal(got, tt.want) {
					t.Errorf("[%d, +%d): got %v, want %v", tt.off, tt.length, got, tt.want)
				}
			}
		})
	}
}

// TestConcurrentReads reads small pieces from many goroutines at once.
func TestConcurrentReads(t *testing.T) {
	t.Parallel()
	for _, subformat := range subformats {
		t.Run(subformat, func(t *testing.T) {
			t.Parallel()
			folder := t.TempDir()
			data := pattern(5 * mib)
			raw := writeFile(t, folder, "disk.raw", data)
			path := filepath.Join(folder, "disk.vmdk")
			run(t, "qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat="+subformat, raw, path)
			d := mustOpen(t, path)
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
			wg.Wait()
		})
	}
}

// TestHandmadeDescriptor reads flat extents with offsets, zero extents, other
// letter case, line ends of Windows and read-only extents.
func TestHandmadeDescriptor(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	data := pattern(300 * 512)
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
	raw := writeFile(t, folder, "want.raw", want)
	checkSame(t, mustOpen(t, path), raw)
}

// TestVMFS reads what a download from a datastore of ESXi consists of: a
// descriptor and the flat file, which is sparse here.
func TestVMFS(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	data := pattern(3 * mib)
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
	checkSame(t, mustOpen(t, path), filepath.Join(folder, "web 1-flat.vmdk"))
	checkAgainstQEMU(t, path)
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
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	m, err := vmdk.Open(f, image.OpenOptions{AllowOutside: true})
	if err != nil {
		t.Fatal(err)
	}
	m.Close()
}

func TestRefusedSnapshot(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	base, child := filepath.Join(folder, "base.vmdk"), filepath.Join(folder, "child.vmdk")
	run(t, "qemu-img", "create", "-f", "vmdk", base, "1M")
	run(t, "qemu-img", "create", "-f", "vmdk", "-b", base, "-F", "vmdk", child)
	if _, err := open(t, child); !errors.Is(err, image.ErrUnsupported) || !strings.Contains(err.Error(), base) {
		t.Errorf("got %v, want %v with %q", err, image.ErrUnsupported, base)
	}
}

// TestRefusedPart opens an extent of a split disk by itself.
func TestRefusedPart(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "disk.vmdk")
	run(t, "qemu-img", "create", "-f", "vmdk", "-o", "subformat=twoGbMaxExtentSparse", path, "1M")
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
		{"written", "disk.vmdk"},
	} {
		t.Run(tt.subformat, func(t *testing.T) {
			t.Parallel()
			folder := t.TempDir()
			data := pattern(2 * mib)
			copy(data[2*mib-64*kib:], noise()) // QEMU leaves slack behind a compressed grain that is short
			path := filepath.Join(folder, "disk.vmdk")
			if tt.subformat == "written" {
				path = write(t, memory{bytes.NewReader(data)})
				folder = filepath.Dir(path)
			} else {
				raw := writeFile(t, folder, "disk.raw", data)
				run(t, "qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat="+tt.subformat, raw, path)
			}
			file := filepath.Join(folder, tt.file)
			info, err := os.Stat(file)
			if err != nil {
				t.Fatal(err)
			}
			cuts := []int64{info.Size() - 513, info.Size() - 1024, 64 * kib, 40 * kib, 12 * kib, 1024, 513, 512, 100, 4}
			for i := range int64(16) {
				cuts = append(cuts, info.Size()*(15-i)/16)
			}
			slices.Sort(cuts)
			slices.Reverse(cuts)
			for _, cut := range cuts {
				if err := os.Truncate(file, cut); err != nil {
					t.Fatal(err)
				}
				d, err := open(t, path)
				if err == nil {
					err = readAll(d)
				}
				if !errors.Is(err, image.ErrCorrupt) && !errors.Is(err, image.ErrNotImage) {
					t.Errorf("%d of %d bytes: got %v, want %v", cut, info.Size(), err, image.ErrCorrupt)
				}
			}
		})
	}
}

// readAll reads a disk to its end.
func readAll(d image.Disk) error {
	_, err := io.Copy(io.Discard, io.NewSectionReader(d, 0, d.Size()))
	return err
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
