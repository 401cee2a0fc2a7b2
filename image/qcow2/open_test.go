package qcow2_test

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/internal/imgtest"
	"github.com/holdfast-backup/holdfast/image/qcow2"
)

// tiny is a whole image of 1 MiB with clusters of 512 bytes: header, L1 table (32
// entries), L2 table and two data clusters.
//
//	disk offset 0 → "data" at 1536, 512 → zeros, 1024 → "next" at 2048
func tiny() []byte {
	p := make([]byte, 2560)
	copy(p, "QFI\xfb")
	put32(p, 4, 3)
	put32(p, 20, 9)
	put64(p, 24, 1<<20)
	put32(p, 36, 32)
	put64(p, 40, 512)
	put32(p, 96, 4)
	put32(p, 100, 104)
	put64(p, 512, 1024)
	put64(p, 1024, 1536)
	put64(p, 1032, 1)
	put64(p, 1040, 2048)
	copy(p[1536:], "data")
	copy(p[2048:], "next")
	return p
}

func put32(p []byte, off int, v uint32) { binary.BigEndian.PutUint32(p[off:], v) }
func put64(p []byte, off int, v uint64) { binary.BigEndian.PutUint64(p[off:], v) }

func write(t testing.TB, content []byte) string {
	t.Helper()
	return imgtest.WriteFile(t, filepath.Join(t.TempDir(), "disk.qcow2"), content)
}

// readAll opens an image, walks its extents and reads it all.
func readAll(t testing.TB, path string) ([]byte, error) {
	t.Helper()
	m, err := open(t, path)
	if err != nil {
		return nil, err
	}
	for _, err := range m.Extents(t.Context(), 0, m.Size()) {
		if err != nil {
			return nil, err
		}
	}
	p := make([]byte, m.Size())
	n, err := m.ReadAt(p, 0)
	if err != nil {
		// Whatever the extents found, reading must not give zeros instead.
		return p[:n], fmt.Errorf("extents saw nothing: %w", err)
	}
	return p, nil
}

func TestTiny(t *testing.T) {
	t.Parallel()
	got, err := readAll(t, write(t, tiny()))
	want := make([]byte, 1<<20)
	copy(want, "data")
	copy(want[1024:], "next")
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("got %.1100q, %v, want %.1100q", got, err, want)
	}
}

// tinyCompressed is tiny with its first cluster compressed.
func tinyCompressed(t testing.TB, useZstd bool) []byte {
	t.Helper()
	p := tiny()
	plain := append([]byte("compressed"), make([]byte, 502)...)
	var packed bytes.Buffer
	var w io.WriteCloser
	var err error
	if useZstd {
		put64(p, 72, 8)
		put32(p, 100, 112)
		p[104] = 1
		w, err = zstd.NewWriter(&packed)
	} else {
		w, err = flate.NewWriter(&packed, 9)
	}
	if err == nil {
		_, err = w.Write(plain)
	}
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	put64(p, 1024, 1<<62|1543) // one byte is enough to miss it
	copy(p[1543:], packed.Bytes())
	return p
}

func TestTinyCompressed(t *testing.T) {
	t.Parallel()
	for _, useZstd := range []bool{false, true} {
		got, err := readAll(t, write(t, tinyCompressed(t, useZstd)))
		if want := "compressed\x00"; err != nil || string(got[:11]) != want {
			t.Errorf("zstd %v: got %.11q, %v, want %q", useZstd, got, err, want)
		}
	}
}

// TestRefused changes the tiny image; each must be refused in one line.
func TestRefused(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name   string
		change func(p []byte) []byte
		want   error
		words  string // of the message
	}{
		{"empty", func([]byte) []byte { return nil }, image.ErrNotImage, ""},
		{"no magic", func(p []byte) []byte { p[0] = 'X'; return p }, image.ErrNotImage, ""},
		{"magic alone", func(p []byte) []byte { return p[:4] }, image.ErrCorrupt, "ends inside the header"},
		{"half a header", func(p []byte) []byte { return p[:80] }, image.ErrCorrupt, "ends inside the header"},
		{"version 1", func(p []byte) []byte { put32(p, 4, 1); return p }, image.ErrUnsupported, "version 1"},
		{"version 4", func(p []byte) []byte { put32(p, 4, 4); return p }, image.ErrUnsupported, "version 4"},
		{"clusters of 256 bytes", func(p []byte) []byte { put32(p, 20, 8); return p }, image.ErrCorrupt, "2^8"},
		{"clusters of 4 MiB", func(p []byte) []byte { put32(p, 20, 22); return p }, image.ErrCorrupt, "2^22"},
		{"clusters of 2^64 bytes", func(p []byte) []byte { put32(p, 20, 64); return p }, image.ErrCorrupt, "2^64"},
		{"AES", func(p []byte) []byte { put32(p, 32, 1); return p }, image.ErrUnsupported, "encrypted (legacy AES)"},
		{"LUKS", func(p []byte) []byte { put32(p, 32, 2); return p }, image.ErrUnsupported, "encrypted (LUKS)"},
		{"unknown encryption", func(p []byte) []byte { put32(p, 32, 3); return p }, image.ErrUnsupported, "encrypted"},
		{"dirty", func(p []byte) []byte { put64(p, 72, 1); return p }, image.ErrUnsupported, "qemu-img check -r all"},
		{"marked corrupt", func(p []byte) []byte { put64(p, 72, 2); return p }, image.ErrCorrupt, "marked as corrupt"},
		{"external data file", func(p []byte) []byte { put64(p, 72, 4); return p }, image.ErrUnsupported, "external data file"},
		{"compression bit alone", func(p []byte) []byte { put64(p, 72, 8); return p }, image.ErrCorrupt, "compression type 0"},
		{"compression type alone", func(p []byte) []byte { put32(p, 100, 112); p[104] = 1; return p }, image.ErrCorrupt, "compression type 1"},
		{"unknown compression", func(p []byte) []byte { put64(p, 72, 8); put32(p, 100, 112); p[104] = 2; return p }, image.ErrUnsupported, "compression type 2"},
		{"extended L2 in small clusters", func(p []byte) []byte { put64(p, 72, 16); return p }, image.ErrCorrupt, "extended L2"},
		{"unknown feature", func(p []byte) []byte { put64(p, 72, 1<<40); return p }, image.ErrUnsupported, "unknown features"},
		{"short header", func(p []byte) []byte { put32(p, 100, 72); return p }, image.ErrCorrupt, "header of 72 bytes"},
		{"long header", func(p []byte) []byte { put32(p, 100, 1<<31); return p }, image.ErrCorrupt, "header of"},
		{"huge disk", func(p []byte) []byte { put64(p, 24, 1<<50+1); return p }, image.ErrUnsupported, "limit"},
		{"negative disk", func(p []byte) []byte { put64(p, 24, 1<<63); return p }, image.ErrUnsupported, "limit"},
		{"short L1", func(p []byte) []byte { put32(p, 36, 31); return p }, image.ErrCorrupt, "needs 32"},
		{"huge L1", func(p []byte) []byte { put32(p, 36, 1<<22+1); return p }, image.ErrUnsupported, "limit"},
		{"L1 longer than the file", func(p []byte) []byte { put32(p, 36, 1<<20); return p }, image.ErrCorrupt, "beyond the end"},
		{"no L1", func(p []byte) []byte { put64(p, 40, 0); return p }, image.ErrCorrupt, "L1 table"},
		{"L1 between clusters", func(p []byte) []byte { put64(p, 40, 520); return p }, image.ErrCorrupt, "L1 table"},
		{"L1 beyond the end", func(p []byte) []byte { put64(p, 40, 1<<40); return p }, image.ErrCorrupt, "beyond the end"},
		{"L1 at the end of the world", func(p []byte) []byte { put64(p, 40, 1<<64-512); return p }, image.ErrCorrupt, "beyond the end"},
		{"cut in the L1", func(p []byte) []byte { return p[:600] }, image.ErrCorrupt, "beyond the end"},
		{"L2 beyond the end", func(p []byte) []byte { put64(p, 512, 1<<40); return p }, image.ErrCorrupt, "L2 table"},
		{"L2 partly beyond the end", func(p []byte) []byte { return p[:1500] }, image.ErrCorrupt, "L2 table"},
		{"second L2 beyond the end", func(p []byte) []byte { put64(p, 520, 4096); return p }, image.ErrCorrupt, "L2 table"},
		{"data beyond the end", func(p []byte) []byte { put64(p, 1024, 1<<40); return p }, image.ErrCorrupt, "beyond the end"},
		{"data just beyond the end", func(p []byte) []byte { put64(p, 1024, 2560); return p }, image.ErrCorrupt, "beyond the end"},
		{"cut in the last cluster", func(p []byte) []byte { return p[:2559] }, image.ErrCorrupt, "beyond the end"},
		{"zero cluster in version 2", func(p []byte) []byte { put32(p, 4, 2); return p }, image.ErrCorrupt, "version 3"},
		{"compressed beyond the end", func(p []byte) []byte { put64(p, 1024, 1<<62|1<<40); return p }, image.ErrCorrupt, "beyond the end"},
		{"compressed, not deflate", func(p []byte) []byte { put64(p, 1024, 1<<62|1536); return p }, image.ErrCorrupt, "compressed cluster at 1536"},
		{"backing name beyond the end", func(p []byte) []byte { put64(p, 8, 1<<40); put32(p, 16, 4); return p }, image.ErrCorrupt, "backing file name"},
		{"backing name inside the header", func(p []byte) []byte { put64(p, 8, 8); put32(p, 16, 4); return p }, image.ErrCorrupt, "backing file name"},
		{"long backing name", func(p []byte) []byte { put64(p, 8, 104); put32(p, 16, 1<<31); return p }, image.ErrCorrupt, "backing file name"},
		{"long extension", func(p []byte) []byte { put32(p, 104, 7); put32(p, 108, 1<<31); return backed(p, 200, "x") }, image.ErrCorrupt, "header extension"},
		{"backing URL", func(p []byte) []byte { return backed(p, 112, "nbd://host/disk") }, image.ErrUnsupported, "not a plain path"},
		{"backing JSON", func(p []byte) []byte { return backed(p, 112, `json:{"a":"/b"}`) }, image.ErrUnsupported, "not a plain path"},
		{"backing outside", func(p []byte) []byte { return backed(p, 112, "/etc/passwd") }, image.ErrUnsupported, "outside"},
		{"backing missing", func(p []byte) []byte { return backed(p, 112, "missing") }, os.ErrNotExist, "backing file of"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			got, err := readAll(t, write(t, tt.change(tiny())))
			if !errors.Is(err, tt.want) {
				t.Fatalf("got %.20q, %v, want %v", got, err, tt.want)
			}
			if s := err.Error(); !strings.Contains(s, tt.words) || strings.Contains(s, "\n") || strings.Contains(s, "extents saw nothing") != (tt.name == "compressed beyond the end" || tt.name == "compressed, not deflate") {
				t.Errorf("message: got %q, want %q in one line, from the first walk", s, tt.words)
			}
		})
	}
}

// backed gives an image a backing file whose name lies at off.
func backed(p []byte, off int, name string) []byte {
	put64(p, 8, uint64(off))
	put32(p, 16, uint32(len(name)))
	copy(p[off:], name)
	return p
}

// TestExtendedL2Refused changes the one L2 entry of an image of 1 MiB with extended L2
// entries and clusters of 16 KiB.
func TestExtendedL2Refused(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name          string
		entry, bitmap uint64
		want          error
	}{
		{"all allocated", 3 << 14, 0xffffffff, nil},
		{"half allocated, half zeros", 3 << 14, 0xffff0000_0000ffff, nil},
		{"only the first half is in the file", 4 << 14, 0xffff, nil},
		{"allocated and zeros", 3 << 14, 1<<32 | 1, image.ErrCorrupt},
		{"allocated nowhere", 0, 1, image.ErrCorrupt},
		{"between clusters", 3<<14 + 512, 0xffffffff, image.ErrCorrupt},
		{"the second half is not in the file", 4 << 14, 0xffff0000, image.ErrCorrupt},
	} {
		p := make([]byte, 4<<14+1<<13)
		copy(p, tiny()[:512])
		put32(p, 20, 14)
		put32(p, 36, 1)
		put64(p, 40, 1<<14)
		put64(p, 72, 16)
		put64(p, 1<<14, 2<<14)
		put64(p, 2<<14, tt.entry)
		put64(p, 2<<14+8, tt.bitmap)
		if _, err := readAll(t, write(t, p)); !errors.Is(err, tt.want) {
			t.Errorf("%s: got %v, want %v", tt.name, err, tt.want)
		}
	}
}

// TestBackingIsNotOpenedUnasked keeps images with a backing file from those who
// gave no way to open it.
func TestBackingIsNotOpenedUnasked(t *testing.T) {
	t.Parallel()
	path := write(t, backed(tiny(), 112, "base"))
	if _, err := imgtest.OpenImage(t, path, qcow2.Open, image.OpenOptions{}); !errors.Is(err, image.ErrUnsupported) {
		t.Errorf("got %v, want %v", err, image.ErrUnsupported)
	}
}

func TestMatch(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		head string
		want bool
	}{{"QFI\xfb\x00\x00\x00\x03", true}, {"QFI\xfb", true}, {"QFI", false}, {"", false}, {"KDMV", false}} {
		if got := qcow2.Match([]byte(tt.head)); got != tt.want {
			t.Errorf("%q: got %v, want %v", tt.head, got, tt.want)
		}
	}
}

// FuzzOpen opens what comes, walks its extents and reads some of it: any error is
// fine, as are any bytes; a panic or a long time is not. Where the walk says zero, reading
// must.
func FuzzOpen(f *testing.F) {
	f.Add(tiny())
	f.Add(tinyCompressed(f, false))
	f.Add(tinyCompressed(f, true))
	extended := make([]byte, 4<<14)
	copy(extended, tiny()[:512])
	put32(extended, 20, 14)
	put64(extended, 40, 1<<14)
	put64(extended, 72, 16)
	put64(extended, 1<<14, 2<<14)
	put64(extended, 2<<14, 3<<14)
	put64(extended, 2<<14+8, 0xff0000ff)
	f.Add(extended)
	f.Add(backed(tiny(), 112, "base"))

	folder := f.TempDir()
	imgtest.WriteFile(f, filepath.Join(folder, "base"), []byte("base"))
	f.Fuzz(func(t *testing.T, content []byte) {
		path := imgtest.WriteFile(t, filepath.Join(folder, "disk.qcow2"), content)
		if m, err := open(t, path); err == nil {
			imgtest.Exercise(t, m)
		}
	})
}
