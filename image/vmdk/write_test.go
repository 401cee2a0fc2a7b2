package vmdk_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/internal/imgtest"
	"github.com/holdfast-backup/holdfast/image/vmdk"
)

func TestWrite(t *testing.T) {
	t.Parallel()
	for _, size := range []int64{0, 1, 512, 64*kib - 1, 64 * kib, 700*kib + 5*512, 32 * mib, 33*mib + 100} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			t.Parallel()
			data := imgtest.Random(min(size, mib), 3)
			if size >= 32*mib {
				data = large(size)
			}
			path := imgtest.WriteImage(t, imgtest.Disk(data), vmdk.Write)
			rounded := append(data, make([]byte, -size&511)...)
			checkStream(t, path, rounded)
			if size == 0 {
				return // QEMU opens no empty image
			}
			checkLikeQEMU(t, path, rounded)
			imgtest.Run(t, "qemu-img", "check", "-f", "vmdk", path)
			var info struct {
				Size     int64 `json:"virtual-size"`
				Specific struct {
					Data struct {
						CreateType string `json:"create-type"`
					}
				} `json:"format-specific"`
			}
			if err := json.Unmarshal([]byte(imgtest.Run(t, "qemu-img", "info", "--output=json", path)), &info); err != nil {
				t.Fatal(err)
			}
			if info.Size != int64(len(rounded)) || info.Specific.Data.CreateType != "streamOptimized" {
				t.Errorf("qemu-img info: got %+v, want %d bytes, streamOptimized", info, len(rounded))
			}
		})
	}
}

// checkStream reads an image as a stream, marker by marker, as an importer does
// that cannot seek.
func checkStream(t *testing.T, path string, want []byte) {
	t.Helper()
	p, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	le := binary.LittleEndian
	grains := map[uint32]bool{} // sectors of markers that no table names yet
	tables := map[uint32]bool{} // sectors of tables that no directory names yet
	next := int64(0)            // the first sector on the disk that a grain may have
	directory := int64(0)       // sector of the file
	at := int64(le.Uint64(p[64:])) * 512
	for {
		value, size, kind := int64(le.Uint64(p[at:])), int64(le.Uint32(p[at+8:])), le.Uint32(p[at+12:])
		if size > 0 {
			if value < next || value%128 != 0 || value*512 >= int64(len(want)) {
				t.Fatalf("grain of sector %d after %d", value, next)
			}
			if image.IsZero(want[value*512 : min(int64(len(want)), value*512+64*kib)]) {
				t.Errorf("grain of sector %d holds only zeros", value)
			}
			grains[uint32(at/512)] = true
			next = value + 128
			at += (12 + size + 511) / 512 * 512
			continue
		}
		body := p[at+512 : at+512+value*512]
		switch kind {
		case 1:
			if value != 4 {
				t.Errorf("table of %d sectors", value)
			}
			tables[uint32(at/512)+1] = true
			takeAll(t, grains, body)
		case 2:
			directory = at/512 + 1
			takeAll(t, tables, body)
		case 3:
			if !bytes.HasPrefix(body, []byte("KDMV")) || int64(le.Uint64(body[56:])) != directory {
				t.Errorf("footer names directory %d, want %d", le.Uint64(body[56:]), directory)
			}
		case 0:
			if at+512 != int64(len(p)) || value != 0 {
				t.Errorf("end marker at %d of %d bytes, value %d", at, len(p), value)
			}
			return
		default:
			t.Fatalf("marker of kind %d at %d", kind, at)
		}
		at += 512 + value*512
	}
}

// takeAll checks that the entries of a table are exactly the given sectors, and forgets them.
func takeAll(t *testing.T, sectors map[uint32]bool, table []byte) {
	t.Helper()
	for ; len(table) > 0; table = table[4:] {
		if e := binary.LittleEndian.Uint32(table); e != 0 {
			if !sectors[e] {
				t.Errorf("table names sector %d, where nothing new is", e)
			}
			delete(sectors, e)
		}
	}
	if len(sectors) > 0 {
		t.Errorf("table does not name %d sectors", len(sectors))
	}
}

// TestWriteHuge writes a disk of 1 TiB that holds next to nothing.
func TestWriteHuge(t *testing.T) {
	t.Parallel()
	d := imgtest.Sparse{Bytes: 1 << 40, Data: map[int64][]byte{}}
	for _, at := range []int64{0, 700 * kib, 500 * gib, 1<<40 - 4*kib} {
		d.Data[at] = bytes.Repeat([]byte{0x5a}, 4*kib)
	}
	path := imgtest.WriteImage(t, d, vmdk.Write)
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if info.Size() > mib {
		t.Errorf("got %d bytes, want less than 1 MiB", info.Size())
	}
	m := mustOpen(t, path)
	var got []int64
	p, want := make([]byte, 64*kib), make([]byte, 64*kib)
	for _, e := range imgtest.Extents(t, m, 0, m.Size()) {
		if e.Zero {
			continue
		}
		got = append(got, e.Off)
		if err := image.ReadFull(m, p, e.Off); err != nil {
			t.Fatal(err)
		}
		if err := image.ReadFull(d, want, e.Off); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(p, want) {
			t.Errorf("the grain at %d differs", e.Off)
		}
	}
	if places := []int64{0, 640 * kib, 500 * gib, 1<<40 - 64*kib}; !slices.Equal(got, places) {
		t.Errorf("grains: got %v, want %v", got, places)
	}
}

func TestWriteFails(t *testing.T) {
	t.Parallel()
	boom := errors.New("boom")
	disk := imgtest.Disk(imgtest.Random(20*mib, 4))
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	for _, tt := range []struct {
		name string
		ctx  context.Context
		path string
		d    image.Disk
		want error
	}{
		{"full disk", t.Context(), "/dev/full", disk, syscall.ENOSPC},
		{"source", t.Context(), "/dev/null", imgtest.Failing{Disk: disk, From: mib, Err: boom}, boom},
		{"cancelled", cancelled, "/dev/null", disk, context.Canceled},
	} {
		f, err := os.OpenFile(tt.path, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := vmdk.Write(tt.ctx, f, tt.d, image.WriteOptions{}); !errors.Is(err, tt.want) {
			t.Errorf("%s: got %v, want %v", tt.name, err, tt.want)
		}
	}
}

// benchmarkData is half noise and half text, without zeros.
func benchmarkData() []byte {
	noise := make([]byte, 256*kib)
	rand.NewChaCha8([32]byte{}).Read(noise)
	text := bytes.Repeat([]byte("some text of a guest's log file\n"), 8*kib)
	return bytes.Repeat(slices.Concat(noise, text), 128)
}

func BenchmarkWrite(b *testing.B) {
	d := imgtest.Disk(benchmarkData())
	f, err := os.Create(filepath.Join(b.TempDir(), "disk.vmdk"))
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	b.SetBytes(d.Size())
	b.ReportAllocs()
	for b.Loop() {
		if _, err := f.Seek(0, 0); err != nil {
			b.Fatal(err)
		}
		if err := vmdk.Write(b.Context(), f, d, image.WriteOptions{}); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkRead(b *testing.B) {
	data := benchmarkData()
	for _, subformat := range []string{"monolithicSparse", "streamOptimized"} {
		b.Run(subformat, func(b *testing.B) {
			imgtest.ReadInOrder(b, mustOpen(b, imgtest.Convert(b, data, "vmdk", "-o", "subformat="+subformat)))
		})
	}
}
