package vhd_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf16"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/internal/imgtest"
	"github.com/holdfast-backup/holdfast/image/vhd"
)

// parentRef is what a differencing image says about its parent.
type parentRef struct {
	id       []byte // 16 bytes
	name     string
	locators map[string]string // platform code → path
}

// differencing turns a dynamic image that QEMU made into a differencing one. It
// stays as it is:
//
//	0     footer's copy: kind 4
//	512   dynamic header: parent's id at 40, its name (UTF-16BE) at 64, and
//	      at 576 a locator of 24 bytes each: code, space, length, 0, offset
//	1536  table
//	…     blocks: bitmap of one sector, then 2 MiB
//	end   footer, from where it stood moved behind the locators' paths
//
// QEMU sets all bits of a bitmap; the caller clears those of sectors that shall be the parent's.
func differencing(t testing.TB, path string, ref parentRef) {
	t.Helper()
	imgtest.Edit(t, path, func(b []byte) []byte {
		foot := bytes.Clone(b[len(b)-512:])
		b = b[:len(b)-512]
		be.PutUint32(foot[60:], 4)
		seal(foot, 64)
		copy(b, foot)

		h := b[headerAt:][:1024]
		copy(h[40:56], ref.id)
		for i, unit := range utf16.Encode([]rune(ref.name)) {
			be.PutUint16(h[64+2*i:], unit)
		}
		locator := h[576:]
		for code, target := range ref.locators {
			var data []byte
			for _, unit := range utf16.Encode([]rune(target)) {
				data = binary.LittleEndian.AppendUint16(data, unit)
			}
			copy(locator, code)
			be.PutUint32(locator[4:], 1)
			be.PutUint32(locator[8:], uint32(len(data)))
			be.PutUint64(locator[16:], uint64(len(b)))
			locator = locator[24:]
			b = append(b, append(data, make([]byte, 512-len(data))...)...)
		}
		seal(b[headerAt:][:1024], 36)
		return append(b, foot...)
	})
}

// identityOf returns the unique id in a VHD's footer.
func identityOf(t testing.TB, path string) []byte {
	t.Helper()
	b := imgtest.ReadFile(t, path)
	return b[len(b)-512:][68:84]
}

// options opens parents, and theirs.
func options() image.OpenOptions {
	var o image.OpenOptions
	o.OpenBacking = func(f *os.File, format string) (image.DiskCloser, error) {
		if format != "vhd" {
			f.Close()
			return nil, fmt.Errorf("parent of format %q", format)
		}
		im, err := vhd.Open(f, o)
		if err != nil {
			return nil, err
		}
		return im, nil
	}
	return o
}

// TestDifferencing has a chain of three disks of 12, 16 and 14 MiB.
func TestDifferencing(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	layer := func(name, over string, size int64, seed uint64) (path string, disk []byte) {
		disk = imgtest.Random(size, seed)
		if seed > 0 { // the upper ones have two blocks of six or more
			clear(disk[:2*blockSize])
			clear(disk[4*blockSize:])
		}
		made, _ := convert(t, disk, "subformat=dynamic,force_size=on")
		path = imgtest.WriteFile(t, filepath.Join(dir, name), imgtest.ReadFile(t, made))
		if over != "" {
			differencing(t, path, parentRef{
				id: identityOf(t, filepath.Join(dir, over)), locators: map[string]string{"W2ru": `.\` + over},
			})
		}
		return path, disk
	}
	_, want := layer("base.vhd", "", 12*mib, 0)
	for i, name := range []string{"middle.vhd", "top.vhd"} {
		size := int64(16-2*i) * mib
		path, disk := layer(name, []string{"base.vhd", "middle.vhd"}[i], size, uint64(i+1))
		// In one block every third byte of the bitmap is the parent's.
		imgtest.Edit(t, path, func(b []byte) []byte {
			for n := range 5 {
				if got, want := be.Uint32(b[tableAt+4*n:]) != 1<<32-1, n == 2 || n == 3; got != want {
					t.Fatalf("block %d of %s is in the file: %v, want %v", n, name, got, want)
				}
			}
			bitmap := b[int64(be.Uint32(b[tableAt+4*2:]))*512:][:512]
			for j := 0; j < len(bitmap); j += 3 {
				bitmap[j] = 0
			}
			return b
		})
		below := append(want, make([]byte, max(0, size-int64(len(want))))...)[:size]
		want = bytes.Clone(below)
		for n := int64(2 * blockSize); n < 4*blockSize; n += 512 {
			if inBlock := n % blockSize; n >= 3*blockSize || inBlock/512/8%3 != 0 {
				copy(want[n:n+512], disk[n:])
			}
		}
	}
	im, err := imgtest.OpenImage(t, filepath.Join(dir, "top.vhd"), vhd.Open, options())
	if err != nil {
		t.Fatal(err)
	}
	imgtest.Check(t, im, want)

	// What none of the three has is zero: nothing more and nothing less. The
	// base and the middle end inside the range.
	middle, err := imgtest.OpenImage(t, filepath.Join(dir, "middle.vhd"), vhd.Open, options())
	if err != nil {
		t.Fatal(err)
	}
	var got []image.Extent
	for _, e := range imgtest.Extents(t, middle, 0, middle.Size()) {
		if e.End() > 10*mib {
			got = append(got, e)
		}
	}
	if last := got[len(got)-1]; !last.Zero || last.Off != 12*mib || last.End() != 16*mib {
		t.Errorf("last extent: got %v, want zero from the end of the base on", last)
	}
}

func TestFindsParent(t *testing.T) {
	t.Parallel()
	parentPath, want := convert(t, imgtest.Random(3*mib, 3), "subformat=dynamic")
	parent := imgtest.ReadFile(t, parentPath)
	empty := imgtest.ReadFile(t, imgtest.Convert(t, make([]byte, 3*mib), "vpc"))
	for _, tt := range []struct {
		name    string
		parent  string // its place in the child's folder
		ref     parentRef
		outside bool
		want    error // nil: found
		says    string
	}{
		{"relative", "base.vhd", parentRef{locators: map[string]string{"W2ru": `.\base.vhd`}}, false, nil, ""},
		{"folder", "sub/base.vhd", parentRef{locators: map[string]string{"W2ru": `sub\base.vhd`}}, false, nil, ""},
		{"absolute", "base.vhd", parentRef{locators: map[string]string{"W2ku": `C:\vm\base.vhd`}}, false, nil, ""},
		{"drive", "base.vhd", parentRef{locators: map[string]string{"W2ku": `C:base.vhd`}}, false, nil, ""},
		{"server", "base.vhd", parentRef{locators: map[string]string{"W2ku": `\\server\share\base.vhd`}}, false, nil, ""},
		{"name", "bäse 𝄞.vhd", parentRef{name: `bäse 𝄞.vhd`}, false, nil, ""},
		{"path as name", "base.vhd", parentRef{name: `D:\x\base.vhd`}, false, nil, ""},
		{"relative moved away", "base.vhd", parentRef{name: "base.vhd", locators: map[string]string{"W2ru": `.\old\base.vhd`}}, false, nil, ""},
		{"unknown locators", "base.vhd", parentRef{name: "base.vhd", locators: map[string]string{"MacX": "file://./base.vhd"}}, false, nil, ""},
		{"outside", "../base.vhd", parentRef{locators: map[string]string{"W2ru": `..\base.vhd`}}, false, image.ErrUnsupported, "outside"},
		{"outside allowed", "../base.vhd", parentRef{locators: map[string]string{"W2ru": `..\base.vhd`}}, true, nil, ""},
		{"missing", "base.vhd", parentRef{locators: map[string]string{"W2ru": `.\other.vhd`}}, false, os.ErrNotExist, "other.vhd"},
		{"not named", "base.vhd", parentRef{}, false, image.ErrCorrupt, "name its parent"},
		{"another", "base.vhd", parentRef{id: make([]byte, 16), name: "base.vhd"}, false, image.ErrCorrupt, "replaced"},
		{"itself", "base.vhd", parentRef{name: "child.vhd"}, false, image.ErrCorrupt, "replaced"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(t.TempDir(), "vm")
			base, child := filepath.Join(dir, tt.parent), filepath.Join(dir, "child.vhd")
			if err := errors.Join(os.MkdirAll(dir, 0o755), os.MkdirAll(filepath.Dir(base), 0o755)); err != nil {
				t.Fatal(err)
			}
			imgtest.WriteFile(t, base, parent)
			imgtest.WriteFile(t, child, empty)
			if tt.ref.id == nil {
				tt.ref.id = identityOf(t, base)
			}
			differencing(t, child, tt.ref)
			o := options()
			o.AllowOutside = tt.outside
			im, err := imgtest.OpenImage(t, child, vhd.Open, o)
			if err == nil {
				imgtest.Check(t, im, want)
			}
			if !errors.Is(err, tt.want) || tt.want != nil && !strings.Contains(err.Error(), tt.says) {
				t.Errorf("got %v, want %v with %q", err, tt.want, tt.says)
			}
		})
	}
}

func TestParentNotWanted(t *testing.T) {
	t.Parallel()
	child, _ := convert(t, make([]byte, 3*mib), "subformat=dynamic")
	differencing(t, child, parentRef{name: "base.vhd"})
	if _, err := vhd.Open(imgtest.Open(t, child), image.OpenOptions{}); !errors.Is(err, image.ErrUnsupported) {
		t.Errorf("got %v, want %v", err, image.ErrUnsupported)
	}
}

// FuzzOpen changes the start of a dynamic and of a differencing image: footer,
// header and table. Their checksums are made right again.
func FuzzOpen(f *testing.F) {
	const start = 3 << 10
	path, _ := convert(f, imgtest.Random(5*mib, 3), "subformat=dynamic")
	for range 2 {
		f.Add(imgtest.ReadFile(f, path)[:start])
		differencing(f, path, parentRef{name: "fuzz.vhd", locators: map[string]string{"W2ru": `.\x.vhd`}})
	}
	f.Fuzz(func(t *testing.T, head []byte) {
		b := make([]byte, start)
		copy(b, head)
		seal(b[:512], 64)
		seal(b[headerAt:][:1024], 36)
		path := filepath.Join(t.TempDir(), "fuzz.vhd")
		if err := errors.Join(os.WriteFile(path, b, 0o600), os.Truncate(path, 6*mib)); err != nil {
			t.Fatal(err)
		}
		depth := 0
		var o image.OpenOptions
		o.OpenBacking = func(f *os.File, _ string) (image.DiskCloser, error) {
			if depth++; depth > 3 {
				f.Close()
				return nil, errors.New("too deep")
			}
			im, err := vhd.Open(f, o)
			if err != nil {
				return nil, err
			}
			return im, nil
		}
		if im, err := imgtest.OpenImage(t, path, vhd.Open, o); err == nil {
			imgtest.Exercise(t, im)
		}
	})
}
