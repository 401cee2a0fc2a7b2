package blockstore

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/image"
)

// flip changes one bit of a file.
func flip(t *testing.T, path string, off int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var b [1]byte
	if _, err := f.ReadAt(b[:], off); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 0x10
	if _, err := f.WriteAt(b[:], off); err != nil {
		t.Fatal(err)
	}
}

// A flipped bit in a chunk, a leaf or the root is found, never served, named with its
// place, and healed by the next backup of the same content.
func TestDamage(t *testing.T) {
	t.Parallel()
	for _, passphrase := range []string{"", "secret"} {
		for _, what := range []string{"chunk", "leaf", "root"} {
			t.Run(what+passphrase, func(t *testing.T) {
				t.Parallel()
				dir := create(t, CreateOptions{Passphrase: passphrase})
				o := Options{Passphrase: passphrase, SegmentSize: DefaultSegmentSize}
				r := open(t, dir, o)
				c := append(numbers(1, 20), make(content, Fanout)...)
				c[Fanout+2] = 99
				p := mustBackup(t, r, "vm", c)
				m := p.Disks[0].Map
				leaf, err := r.Leaf(m, 0)
				if err != nil {
					t.Fatal(err)
				}
				id, wantOff, wantLen := leaf.Child(5), int64(5*testChunk), int64(testChunk)
				switch what {
				case "leaf":
					root, err := r.node(m.Root)
					if err != nil {
						t.Fatal(err)
					}
					id, wantOff, wantLen = root.Child(0), 0, r.LeafSpan()
				case "root":
					id, wantOff, wantLen = m.Root, 0, m.Size
				}
				closeOnce(t, r)
				r = open(t, dir, o)
				loc, ok, err := r.find(id)
				if err != nil || !ok {
					t.Fatal(ok, err)
				}
				closeOnce(t, r)
				flip(t, segmentFiles(t, dir, segmentSuffix)[0], int64(loc.Off)+recordHeaderSize+9)

				r = open(t, dir, o)
				d, err := r.OpenDisk(p.ID, "", DiskOptions{})
				if err != nil {
					t.Fatal(err)
				}
				b := make([]byte, 10)
				err = image.ReadFull(d, b, wantOff+1)
				if !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "disk vda of vm") || !strings.Contains(err.Error(), fmt.Sprint("offset ", wantOff+1)) {
					t.Errorf("read: got %v, want an ErrDamaged that names disk and offset", err)
				}
				d.Close()
				v, err := r.Verify(t.Context(), VerifyOptions{})
				if err != nil || len(v.Errors) != 1 {
					t.Fatalf("verify: got %+v, %v, want one error", v, err)
				}
				if e := v.Errors[0]; e.Point != p.ID || e.Disk != "vda" || e.VM != "vm" || e.Offset != wantOff || e.Length != wantLen {
					t.Errorf("verify: got %+v, want offset %d, length %d", e, wantOff, wantLen)
				}
				closeOnce(t, r)
				r = open(t, dir, o)
				mustBackup(t, r, "vm", c)
				checkSound(t, r)
				checkDisk(t, r, p.ID, c)
				if _, err := r.Collect(t.Context(), CollectOptions{}); err != nil {
					t.Error(err)
				}
				closeOnce(t, r)
				if _, err := RebuildIndex(t.Context(), dir, o, nil); err != nil {
					t.Fatal(err)
				}
				r = open(t, dir, o)
				checkDisk(t, r, p.ID, c)
			})
		}
	}
}

// What is around the records of a segment can be damaged without loss.
func TestDamagedEnvelope(t *testing.T) {
	t.Parallel()
	dir := create(t, CreateOptions{})
	r := open(t, dir, Options{})
	c := numbers(1, 20)
	p := mustBackup(t, r, "vm", c)
	closeOnce(t, r)
	path := segmentFiles(t, dir, segmentSuffix)[0]
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, off := range []int64{5, info.Size() - footerSize - 100, info.Size() - 5} {
		copied := crash(t, dir)
		flip(t, segmentFiles(t, copied, segmentSuffix)[0], off)
		r := open(t, copied, Options{})
		v, err := r.Verify(t.Context(), VerifyOptions{})
		if err != nil || len(v.Errors) != 1 || v.Errors[0].Point != "" || v.Errors[0].Reason == "" {
			t.Errorf("offset %d: got %+v, %v, want one error of no point", off, v.Errors, err)
		}
		closeOnce(t, r)
		if _, err := RebuildIndex(t.Context(), copied, Options{}, nil); err != nil {
			t.Fatal(err)
		}
		r = open(t, copied, Options{})
		checkDisk(t, r, p.ID, c)
	}
}

// A point's file that can't be read is told of, and stops collections.
func TestDamagedPoint(t *testing.T) {
	t.Parallel()
	dir := create(t, CreateOptions{})
	r := open(t, dir, Options{})
	p := mustBackup(t, r, "vm", content{1, 2})
	other := mustBackup(t, r, "vm", content{2, 3})
	closeOnce(t, r)
	for _, copy := range []int64{0, envelopeAlign} {
		flip(t, r.pointPath(p.ID), copy+60)
	}
	r = open(t, dir, Options{})
	if bad := r.DamagedPoints(); len(bad) != 1 || bad[0].ID != p.ID || len(r.Points()) != 1 {
		t.Errorf("got damaged points %v", bad)
	}
	if v, err := r.Verify(t.Context(), VerifyOptions{}); err != nil || len(v.Errors) != 1 || v.Errors[0].Point != p.ID {
		t.Errorf("verify: got %+v, %v", v, err)
	}
	if _, err := r.Collect(t.Context(), CollectOptions{}); err == nil || !strings.Contains(err.Error(), string(p.ID)) {
		t.Errorf("collect: got %v, want a refusal that names the point", err)
	}
	if err := r.DeletePoint(p.ID); err != nil {
		t.Error(err)
	}
	if _, err := r.Collect(t.Context(), CollectOptions{}); err != nil {
		t.Error(err)
	}
	checkDisk(t, r, other.ID, content{2, 3})
}

func TestVerifyPercent(t *testing.T) {
	t.Parallel()
	r := open(t, create(t, CreateOptions{}), Options{SegmentSize: 64 << 10})
	mustBackup(t, r, "vm", numbers(1, 200))
	all, err := r.Verify(t.Context(), VerifyOptions{})
	if err != nil {
		t.Fatal(err)
	}
	seen := int64(0)
	for range 5 {
		v, err := r.Verify(t.Context(), VerifyOptions{Percent: 20})
		if err != nil {
			t.Fatal(err)
		}
		if v.CheckedChunks < all.CheckedChunks/10 || v.CheckedChunks > all.CheckedChunks/3 {
			t.Errorf("a fifth: got %d of %d records", v.CheckedChunks, all.CheckedChunks)
		}
		seen += v.CheckedChunks
	}
	if seen < all.CheckedChunks*9/10 {
		t.Errorf("five fifths read %d of %d records", seen, all.CheckedChunks)
	}
	if _, err := r.Verify(t.Context(), VerifyOptions{Percent: 101}); err == nil {
		t.Error("101 percent were accepted")
	}
}
