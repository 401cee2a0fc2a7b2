package vhd_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/internal/imgtest"
	"github.com/holdfast-backup/holdfast/image/vhd"
)

const (
	mib       = 1 << 20
	blockSize = 2 * mib // of QEMU's dynamic images
)

func open(t testing.TB, path string) *vhd.Image {
	t.Helper()
	return imgtest.MustOpen(t, path, vhd.Open)
}

// convert returns a VHD that qemu-img made of disk, and the disk's bytes as
// qemu-img reads them back: it may be larger.
func convert(t testing.TB, disk []byte, options string) (string, []byte) {
	t.Helper()
	path := imgtest.Convert(t, disk, "vpc", "-o", options)
	return path, imgtest.QEMUBytes(t, "vpc", path)
}

func TestReadsQEMU(t *testing.T) {
	t.Parallel()
	for i, options := range []string{"subformat=dynamic", "subformat=fixed"} {
		for _, size := range []int64{1000, 9*mib + 512*3} {
			for _, force := range []string{"off", "on"} {
				o := options + ",force_size=" + force
				t.Run(fmt.Sprintf("%s,%d", o, size), func(t *testing.T) {
					t.Parallel()
					path := imgtest.Convert(t, imgtest.Random(size, uint64(i)), "vpc", "-o", o)
					imgtest.CheckLikeQEMU(t, open(t, path), "vpc", path)
				})
			}
		}
	}
}

func TestOverwritten(t *testing.T) {
	t.Parallel()
	path, want := convert(t, make([]byte, 20*mib), "subformat=dynamic")
	imgtest.QEMUIO(t, "vpc", path, "write -P 7 3M 2500k", "write -P 8 17000k 1k")
	copy(want[3*mib:], bytes.Repeat([]byte{7}, 2500<<10))
	copy(want[17000<<10:], bytes.Repeat([]byte{8}, 1<<10))
	if got := imgtest.CheckLikeQEMU(t, open(t, path), "vpc", path); !bytes.Equal(got, want) {
		t.Error("QEMU reads something else")
	}
}

// TestSizes compares sizes with qemu-img's, up to the largest.
func TestSizes(t *testing.T) {
	t.Parallel()
	for _, size := range []string{"1", "511k", "30001k", "127G", "128G", "2040G"} {
		for _, force := range []string{"off", "on"} {
			t.Run(size+",force_size="+force, func(t *testing.T) {
				t.Parallel()
				path := filepath.Join(t.TempDir(), "disk.vhd")
				imgtest.Run(t, "qemu-img", "create", "-f", "vpc", "-o", "force_size="+force, path, size)
				im := open(t, path)
				info := imgtest.Run(t, "qemu-img", "info", "-f", "vpc", "--output=json", path)
				if want := fmt.Sprintf(`"virtual-size": %d,`, im.Size()); !strings.Contains(info, want) {
					t.Errorf("got %s qemu-img says %s", want, info)
				}
				if got := imgtest.Extents(t, im, 0, im.Size()); len(got) != 1 || !got[0].Zero {
					t.Errorf("extents: got %v, want one of zeros", got)
				}
			})
		}
	}
}

// TestCreators sets the maker of an image whose geometry (20 MiB and a bit) and size
// differ.
func TestCreators(t *testing.T) {
	t.Parallel()
	path, _ := convert(t, make([]byte, 20*mib), "subformat=dynamic")
	chs := open(t, path).Size()
	for creator, want := range map[string]int64{
		"qemu": chs, "vpc ": chs,
		"qem2": 19 * mib, "win ": 19 * mib, "d2v ": 19 * mib, "CTXS": 19 * mib, "tap\x00": 19 * mib, "vbox": 19 * mib,
	} {
		imgtest.Edit(t, path, func(b []byte) []byte {
			for _, ft := range [][]byte{b[:512], b[len(b)-512:]} {
				copy(ft[28:], creator)
				be.PutUint64(ft[48:], 19*mib)
				seal(ft, 64)
			}
			return b
		})
		if got := open(t, path).Size(); got != want {
			t.Errorf("%q: got %d bytes, want %d", creator, got, want)
		}
	}
}

func TestMatch(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		options    string
		head, foot bool
	}{{"subformat=dynamic", true, false}, {"subformat=fixed", false, true}} {
		path, _ := convert(t, make([]byte, mib), tt.options)
		b := imgtest.ReadFile(t, path)
		foot := b[len(b)-512:]
		if head, foot := vhd.Match(b[:8]), vhd.MatchFooter(foot, int64(len(b))); head != tt.head || foot != tt.foot {
			t.Errorf("%s: got %v, %v, want %v, %v", tt.options, head, foot, tt.head, tt.foot)
		}
		if vhd.MatchFooter(foot, int64(len(b))+512) {
			t.Errorf("%s: a footer that leaves out a sector matches", tt.options)
		}
		foot[100] ^= 1
		if vhd.MatchFooter(foot, 512) || vhd.MatchFooter(foot[1:], 511) || vhd.Match(nil) {
			t.Errorf("%s: a damaged footer matches", tt.options)
		}
	}
}

var be = binary.BigEndian

// seal enters the checksum of a footer (at 64) or a dynamic header (at 36).
func seal(b []byte, at int) {
	clear(b[at : at+4])
	var sum uint32
	for _, v := range b {
		sum += uint32(v)
	}
	be.PutUint32(b[at:], ^sum)
}

// Where QEMU puts the parts of a dynamic image.
const (
	headerAt = 512
	tableAt  = 1536
)

func TestDamaged(t *testing.T) {
	t.Parallel()
	both := func(b []byte, change func(foot []byte)) []byte {
		for _, ft := range [][]byte{b[:512], b[len(b)-512:]} {
			change(ft)
			seal(ft, 64)
		}
		return b
	}
	dynamic := func(b []byte, change func(header []byte)) []byte {
		change(b[headerAt:][:1024])
		seal(b[headerAt:][:1024], 36)
		return b
	}
	intact, want := convert(t, imgtest.Random(5*mib, 2), "subformat=dynamic")
	b := imgtest.ReadFile(t, intact)
	for _, tt := range []struct {
		name   string
		change func(b []byte) []byte
		want   error // nil: reads as before
		says   string
	}{
		{"nothing", func(b []byte) []byte { return b }, nil, ""},
		{"footer", func(b []byte) []byte { b[len(b)-400] ^= 1; return b }, nil, ""},
		{"copy", func(b []byte) []byte { b[100] ^= 1; return b }, nil, ""},
		{"no footer", func(b []byte) []byte { return b[:len(b)-512] }, nil, ""},
		{"footer and copy", func(b []byte) []byte { b[100] ^= 1; b[len(b)-400] ^= 1; return b }, image.ErrCorrupt, "checksum"},
		{"copy damaged, no footer", func(b []byte) []byte { b[100] ^= 1; return b[:len(b)-512] }, image.ErrCorrupt, "checksum"},
		{"kind", func(b []byte) []byte { return both(b, func(ft []byte) { ft[63] = 6 }) }, image.ErrUnsupported, "kind 6"},
		{"size", func(b []byte) []byte {
			return both(b, func(ft []byte) { copy(ft[28:], "win "); be.PutUint64(ft[48:], 1<<63) })
		}, image.ErrCorrupt, "bytes"},
		{"size too large for the table", func(b []byte) []byte {
			return both(b, func(ft []byte) { copy(ft[28:], "win "); be.PutUint64(ft[48:], 1<<40) })
		}, image.ErrCorrupt, "table"},
		{"no header", func(b []byte) []byte {
			return both(b, func(ft []byte) { be.PutUint64(ft[16:], 1<<64-1) })
		}, image.ErrCorrupt, "dynamic header"},
		{"header", func(b []byte) []byte { b[headerAt+200] ^= 1; return b }, image.ErrCorrupt, "dynamic header"},
		{"block size 0", func(b []byte) []byte {
			return dynamic(b, func(h []byte) { be.PutUint32(h[32:], 0) })
		}, image.ErrCorrupt, "blocks of 0"},
		{"block size", func(b []byte) []byte {
			return dynamic(b, func(h []byte) { be.PutUint32(h[32:], 3*mib) })
		}, image.ErrCorrupt, "blocks of"},
		{"table outside", func(b []byte) []byte {
			return dynamic(b, func(h []byte) { be.PutUint64(h[16:], 1<<63) })
		}, image.ErrCorrupt, "table"},
		{"block outside", func(b []byte) []byte { be.PutUint32(b[tableAt:], 1<<32-2); return b }, image.ErrCorrupt, "truncated"},
		{"cut in the header", func(b []byte) []byte { return b[:1000] }, image.ErrCorrupt, ""},
		{"cut in the table", func(b []byte) []byte { return b[:tableAt+6] }, image.ErrCorrupt, "table"},
		{"cut in a block", func(b []byte) []byte { return b[:len(b)-mib] }, image.ErrCorrupt, "truncated"},
		{"empty", func([]byte) []byte { return nil }, image.ErrNotImage, ""},
		{"foreign", func([]byte) []byte { return make([]byte, 4096) }, image.ErrNotImage, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			path := imgtest.WriteFile(t, filepath.Join(t.TempDir(), "disk"), tt.change(bytes.Clone(b)))
			imgtest.CheckDamaged(t, path, vhd.Open, want, tt.want, tt.says)
		})
	}
}

// TestFixedCut cuts the middle out of an image of fixed size.
func TestFixedCut(t *testing.T) {
	t.Parallel()
	path, _ := convert(t, make([]byte, 5*mib), "subformat=fixed")
	imgtest.Edit(t, path, func(b []byte) []byte { return slices.Delete(b, mib, 2*mib) })
	if _, err := vhd.Open(imgtest.Open(t, path), image.OpenOptions{}); !errors.Is(err, image.ErrCorrupt) {
		t.Errorf("got %v, want %v", err, image.ErrCorrupt)
	}
}

// TestSectorBitmap clears bits of a dynamic image: those sectors are zero, whatever
// stands in the block.
func TestSectorBitmap(t *testing.T) {
	t.Parallel()
	path, want := convert(t, bytes.Repeat([]byte{1}, 4*mib), "subformat=dynamic,force_size=on")
	imgtest.Edit(t, path, func(b []byte) []byte {
		bitmap := b[int64(be.Uint32(b[tableAt:]))*512:][:512]
		bitmap[0] = 0b0111_1101 // sectors 0 and 6
		bitmap[2] = 0           // sectors 16 to 23
		bitmap[511] = 0b1111_1110
		return b
	})
	clear(want[:512])
	clear(want[6*512 : 7*512])
	clear(want[16*512 : 24*512])
	clear(want[4095*512 : 4096*512])
	im := open(t, path)
	imgtest.Check(t, im, want)
	got := fmt.Sprint(imgtest.Extents(t, im, 0, im.Size()))
	if want := "[zero [0, 512) data [512, 3072) zero [3072, 3584) data [3584, 8192) zero [8192, 12288) " +
		"data [12288, 2096640) zero [2096640, 2097152) data [2097152, 4194304)]"; got != want {
		t.Errorf("extents:\ngot  %s\nwant %s", got, want)
	}
}
