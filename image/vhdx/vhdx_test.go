package vhdx_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/internal/imgtest"
	"github.com/holdfast-backup/holdfast/image/vhdx"
)

const (
	mib = 1 << 20
	gib = 1 << 30
)

func open(t testing.TB, path string) *vhdx.Image {
	t.Helper()
	return imgtest.MustOpen(t, path, vhdx.Open)
}

func TestReadsQEMU(t *testing.T) {
	t.Parallel()
	for i, options := range []string{
		"subformat=dynamic",
		"subformat=fixed",
		"block_size=1M",
		"block_size=1M,subformat=fixed",
		"block_size=256M",
		"block_size=2M,log_size=3M",
		"block_size=1M,block_state_zero=off",
		"subformat=fixed,block_state_zero=off",
	} {
		t.Run(options, func(t *testing.T) {
			t.Parallel()
			want := imgtest.Random(10*mib+512*5, uint64(i))
			path := imgtest.Convert(t, want, "vhdx", "-o", options)
			im := open(t, path)
			imgtest.Check(t, im, want)
			// QEMU does not tell the extents of a VHDX: zero are, to the page, the
			// disk's own zeros, apart from a first data page of a hole in the file.
			var data int64
			for _, e := range imgtest.Extents(t, im, 0, im.Size()) {
				if !e.Zero {
					data += e.Len
				}
			}
			most := int64(0)
			for _, e := range imgtest.Extents(t, imgtest.Disk(want), 0, im.Size()) {
				if !e.Zero {
					most += e.Len + 128<<10 // QEMU writes a bit around data
				}
			}
			if data > most {
				t.Errorf("%d bytes are data, want at most %d", data, most)
			}
		})
	}
}

func TestEmptyDisk(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "disk.vhdx")
	imgtest.Run(t, "qemu-img", "create", "-f", "vhdx", path, "0")
	imgtest.Check(t, open(t, path), nil)
}

// TestOverwritten has qemu-io write to an image, which goes through the log.
func TestOverwritten(t *testing.T) {
	t.Parallel()
	want := imgtest.Random(20*mib, 9)
	path := imgtest.Convert(t, want, "vhdx", "-o", "block_size=1M")
	imgtest.QEMUIO(t, "vhdx", path, "write -P 7 3M 2500k", "write -P 8 17000k 1k")
	copy(want[3*mib:], bytes.Repeat([]byte{7}, 2500<<10))
	copy(want[17000<<10:], bytes.Repeat([]byte{8}, 1<<10))
	imgtest.Check(t, open(t, path), want)
}

// TestChunks reads behind the first sector bitmap entry of the BAT, which
// stands after 4 GiB of blocks with sectors of 512 bytes.
func TestChunks(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "disk.vhdx")
	imgtest.Run(t, "qemu-img", "create", "-f", "vhdx", "-o", "block_size=1M", path, "13G")
	imgtest.QEMUIO(t, "vhdx", path, "write -P 1 4095M 2M", "write -P 2 8191M 1M", "write -P 3 8193M 1M")
	im := open(t, path)
	for at, want := range map[int64]byte{4094: 0, 4095: 1, 4096: 1, 4097: 0, 8191: 2, 8192: 0, 8193: 3, 8194: 0, 13311: 0} {
		got := make([]byte, mib)
		if _, err := im.ReadAt(got, at*mib); err != nil && err != io.EOF {
			t.Fatal(err)
		}
		if !bytes.Equal(got, bytes.Repeat([]byte{want}, mib)) {
			t.Errorf("MiB %d: got bytes %d and others, want %d", at, got[0], want)
		}
	}
	got := fmt.Sprint(imgtest.Extents(t, im, 4000*mib, 9*gib))
	want := fmt.Sprint([]image.Extent{
		{Off: 4000 * mib, Len: 95 * mib, Zero: true},
		{Off: 4095 * mib, Len: 2 * mib},
		{Off: 4097 * mib, Len: 4094 * mib, Zero: true},
		{Off: 8191 * mib, Len: 1 * mib},
		{Off: 8192 * mib, Len: 1 * mib, Zero: true},
		{Off: 8193 * mib, Len: 1 * mib},
		{Off: 8194 * mib, Len: 4000*mib + 9*gib - 8194*mib, Zero: true},
	})
	if got != want {
		t.Errorf("extents:\ngot  %s\nwant %s", got, want)
	}
}

// places in the images that the tests damage, as both QEMU and Write lay them out
// where it matters.
const (
	header1At  = 64 << 10
	header2At  = 128 << 10
	regions1At = 192 << 10
	regions2At = 256 << 10
)

// written returns a file that Write made of disk.
func written(t testing.TB, disk image.Disk) string {
	t.Helper()
	return imgtest.WriteImage(t, disk, vhdx.Write)
}

// seal enters the right checksum of a structure.
func seal(b []byte) {
	clear(b[4:8])
	binary.LittleEndian.PutUint32(b[4:], crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
}

// The layout of Write: metadata items follow each other from here on.
const (
	metadataAt = 2 * mib
	itemsAt    = metadataAt + 64<<10
	batAt      = 3 * mib
)

func TestDamaged(t *testing.T) {
	t.Parallel()
	disk := imgtest.Random(2*mib, 4)
	intact := imgtest.ReadFile(t, written(t, imgtest.Disk(disk)))
	le := binary.LittleEndian
	for _, tt := range []struct {
		name   string
		change func(b []byte) []byte
		want   error // nil: reads as before
		says   string
	}{
		{"nothing", func(b []byte) []byte { return b }, nil, ""},
		{"header 1", func(b []byte) []byte { b[header1At+9] ^= 1; return b }, nil, ""},
		{"header 2", func(b []byte) []byte { b[header2At+9] ^= 1; return b }, nil, ""},
		{"both headers", func(b []byte) []byte { b[header1At+9] ^= 1; b[header2At+9] ^= 1; return b }, image.ErrCorrupt, "headers"},
		{"older header has a log", func(b []byte) []byte {
			b[header1At+48] = 1
			seal(b[header1At:][:4096])
			return b
		}, nil, ""},
		{"log", func(b []byte) []byte {
			b[header2At+48] = 1
			seal(b[header2At:][:4096])
			return b
		}, image.ErrUnsupported, "qemu-img check -r all"},
		{"version", func(b []byte) []byte {
			b[header2At+66] = 2
			seal(b[header2At:][:4096])
			return b
		}, image.ErrUnsupported, "version 2"},
		{"region table 1", func(b []byte) []byte { b[regions1At+9] ^= 1; return b }, nil, ""},
		{"both region tables", func(b []byte) []byte { b[regions1At+9] ^= 1; b[regions2At+9] ^= 1; return b }, image.ErrCorrupt, "region tables"},
		{"unknown required region", func(b []byte) []byte {
			b[regions1At+16] ^= 1
			seal(b[regions1At:][:64<<10])
			return b
		}, image.ErrUnsupported, "region"},
		{"region far outside", func(b []byte) []byte {
			le.PutUint64(b[regions1At+32:], 1<<63+mib)
			seal(b[regions1At:][:64<<10])
			return b
		}, image.ErrCorrupt, "region"},
		{"metadata signature", func(b []byte) []byte { b[metadataAt] = 0; return b }, image.ErrCorrupt, "metadata"},
		{"metadata count", func(b []byte) []byte { le.PutUint16(b[metadataAt+10:], 0xffff); return b }, image.ErrCorrupt, "metadata"},
		{"no metadata", func(b []byte) []byte { le.PutUint16(b[metadataAt+10:], 0); return b }, image.ErrCorrupt, "logical sectors"},
		{"unknown metadata", func(b []byte) []byte { b[metadataAt+32] ^= 1; return b }, image.ErrUnsupported, "metadata"},
		{"metadata outside", func(b []byte) []byte { le.PutUint32(b[metadataAt+32+16:], 0xffffffff); return b }, image.ErrCorrupt, "outside"},
		{"block size 0", func(b []byte) []byte { le.PutUint32(b[itemsAt:], 0); return b }, image.ErrCorrupt, "blocks of 0"},
		{"block size 3 MiB", func(b []byte) []byte { le.PutUint32(b[itemsAt:], 3*mib); return b }, image.ErrCorrupt, "blocks of"},
		{"differencing", func(b []byte) []byte { b[itemsAt+4] |= 2; return b }, image.ErrUnsupported, "differencing"},
		{"size", func(b []byte) []byte { le.PutUint64(b[itemsAt+8:], 1<<60); return b }, image.ErrCorrupt, "larger"},
		{"size too large for the table", func(b []byte) []byte { le.PutUint64(b[itemsAt+8:], 1<<45); return b }, image.ErrCorrupt, "block table"},
		{"size of half a sector", func(b []byte) []byte { le.PutUint64(b[itemsAt+8:], 2*mib-256); return b }, image.ErrCorrupt, "sectors"},
		{"block outside", func(b []byte) []byte { le.PutUint64(b[batAt+8:], 1<<63|6); return b }, image.ErrCorrupt, "outside"},
		{"block in the header", func(b []byte) []byte { le.PutUint64(b[batAt:], 6); return b }, image.ErrCorrupt, "outside"},
		{"partly present block", func(b []byte) []byte { b[batAt] |= 7; return b }, image.ErrCorrupt, "state 7"},
		{"reserved state", func(b []byte) []byte { b[batAt] = b[batAt]&^7 | 4; return b }, image.ErrCorrupt, "state 4"},
		{"no signature", func(b []byte) []byte { b[0] = 'V'; return b }, image.ErrNotImage, ""},
		{"empty", func([]byte) []byte { return nil }, image.ErrNotImage, ""},
		{"cut in the headers", func(b []byte) []byte { return b[:100<<10] }, image.ErrCorrupt, ""},
		{"cut in the region tables", func(b []byte) []byte { return b[:200<<10] }, image.ErrCorrupt, ""},
		{"cut in the metadata", func(b []byte) []byte { return b[:metadataAt+100] }, image.ErrCorrupt, ""},
		{"cut in the table", func(b []byte) []byte { return b[:batAt+8] }, image.ErrCorrupt, ""},
		{"cut in a block", func(b []byte) []byte { return b[:len(b)-512] }, image.ErrCorrupt, "truncated"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			path := imgtest.WriteFile(t, filepath.Join(t.TempDir(), "disk"), tt.change(bytes.Clone(intact)))
			imgtest.CheckDamaged(t, path, vhdx.Open, disk, tt.want, tt.says)
		})
	}
}

// TestZeroStates sets every state that reads as zeros.
func TestZeroStates(t *testing.T) {
	t.Parallel()
	disk := bytes.Repeat([]byte{1}, 7*mib)
	path := written(t, imgtest.Disk(disk))
	imgtest.Edit(t, path, func(b []byte) []byte {
		for i, state := range []byte{0, 1, 2, 3, 5} {
			b[batAt+8*i] = b[batAt+8*i]&^7 | state
		}
		return b
	})
	clear(disk[:5*mib])
	im := open(t, path)
	imgtest.Check(t, im, disk)
	want := fmt.Sprint([]image.Extent{{Off: 0, Len: 5 * mib, Zero: true}, {Off: 5 * mib, Len: 2 * mib}})
	if got := fmt.Sprint(imgtest.Extents(t, im, 0, im.Size())); got != want {
		t.Errorf("extents: got %s, want %s", got, want)
	}
}

// TestLargeSectors has sectors of 4096 bytes, and thus a sector bitmap's entry
// after 32 GiB of blocks, not after 4. QEMU neither makes nor reads them.
func TestLargeSectors(t *testing.T) {
	t.Parallel()
	path := written(t, mibs(33*gib, map[int64]byte{0: 1, 32*gib - mib: 3}))
	edit512 := func(f *os.File) error { // moves entry 32768-1 from its place with 512 bytes to that with 4096
		entry := make([]byte, 8)
		from, to := int64(32767+32767/4096), int64(32767)
		if _, err := f.ReadAt(entry, batAt+8*from); err != nil {
			return err
		}
		_, err1 := f.WriteAt(make([]byte, 8), batAt+8*from)
		_, err2 := f.WriteAt(entry, batAt+8*to)
		_, err3 := f.WriteAt([]byte{0, 0x10}, itemsAt+8+8+16)
		return errors.Join(err1, err2, err3)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := edit512(f); err != nil {
		t.Fatal(err)
	}
	im := open(t, path)
	for at, want := range map[int64]byte{0: 1, mib: 0, 32*gib - mib: 3, 32 * gib: 0} {
		got := make([]byte, 1)
		if _, err := im.ReadAt(got, at); err != nil || got[0] != want {
			t.Errorf("byte %d: got %d, %v, want %d", at, got[0], err, want)
		}
	}
}

func TestWrite(t *testing.T) {
	t.Parallel()
	for _, size := range []int64{512, mib, 20*mib + 512, 5*mib + 700} {
		disk := imgtest.Random(size, 7)
		path := written(t, imgtest.Disk(disk))
		want := append(disk, make([]byte, -size&511)...)
		im := open(t, path)
		imgtest.Check(t, im, want)
		imgtest.QEMUCompare(t, "vhdx", path, want)
	}
}

// TestWriteThenQEMU writes into our image with QEMU, which allocates blocks of its
// own and uses the log.
func TestWriteThenQEMU(t *testing.T) {
	t.Parallel()
	disk := imgtest.Random(12*mib, 8)
	clear(disk[4*mib : 9*mib])
	path := written(t, imgtest.Disk(disk))
	imgtest.QEMUIO(t, "vhdx", path, "write -P 5 5000k 3000k")
	copy(disk[5000<<10:], bytes.Repeat([]byte{5}, 3000<<10))
	imgtest.Run(t, "qemu-img", "check", "-f", "vhdx", path)
	imgtest.Check(t, open(t, path), disk)
}

// TestHuge writes and walks a disk of the largest size with little in it.
func TestHuge(t *testing.T) {
	t.Parallel()
	const size = 64 << 40
	disk := mibs(size, map[int64]byte{0: 1, 31 << 40: 2, size - mib: 3})
	start := time.Now()
	path := written(t, disk)
	imgtest.Run(t, "qemu-img", "check", "-f", "vhdx", path)
	im := open(t, path)
	var data []string
	for _, e := range imgtest.Extents(t, im, 0, size) {
		if !e.Zero {
			data = append(data, e.String())
		}
	}
	want := fmt.Sprint([]string{
		image.Extent{Off: 0, Len: mib}.String(),
		image.Extent{Off: 31 << 40, Len: mib}.String(),
		image.Extent{Off: size - mib, Len: mib}.String(),
	})
	if got := fmt.Sprint(data); got != want {
		t.Errorf("data: got %s, want %s", got, want)
	}
	if took := time.Since(start); took > 30*time.Second {
		t.Errorf("took %v, want seconds", took)
	}
	for _, size := range []int64{0, size + 512} {
		if err := vhdx.Write(t.Context(), nil, imgtest.Sparse{Bytes: size}, image.WriteOptions{}); !errors.Is(err, image.ErrUnsupported) {
			t.Errorf("a disk of %d bytes: got %v, want %v", size, err, image.ErrUnsupported)
		}
	}
}

func FuzzOpen(f *testing.F) {
	disk := imgtest.Random(3*mib, 4)
	for _, path := range []string{
		written(f, imgtest.Disk(disk[:512])),
		written(f, imgtest.Disk(disk)),
	} {
		f.Add(compact(imgtest.ReadFile(f, path)))
	}
	f.Fuzz(func(t *testing.T, parts []byte) {
		if im, err := imgtest.OpenImage(t, expand(t, parts), vhdx.Open, image.OpenOptions{}); err == nil {
			imgtest.Exercise(t, im)
		}
	})
}

// window is a part of an image that has metadata in it.
type window struct {
	at      int64
	size    int // bytes that are fuzzed
	covered int // bytes from at on that a checksum covers; size where there is none
}

// windows are the parts that fuzzing changes: all that is not zero in an image
// of Write with a small disk. Checksums are made right again, so that what
// they cover is fuzzed too.
var windows = []window{
	{0, 64, 64},
	{header1At, 128, 4096},
	{header2At, 128, 4096},
	{regions1At, 128, 64 << 10},
	{regions2At, 128, 64 << 10},
	{metadataAt, 256, 256},
	{itemsAt, 64, 64},
	{batAt, 64, 64},
}

func compact(b []byte) (parts []byte) {
	for _, w := range windows {
		parts = append(parts, b[w.at:][:w.size]...)
	}
	return parts
}

// expand writes the image that parts are of.
func expand(t testing.TB, parts []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "fuzz.vhdx")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	err = f.Truncate(6 * mib)
	for _, w := range windows {
		b := make([]byte, w.covered)
		n := copy(b[:w.size], parts)
		parts = parts[n:]
		if w.covered > w.size {
			seal(b)
		}
		_, writeErr := f.WriteAt(b, w.at)
		err = errors.Join(err, writeErr)
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}
