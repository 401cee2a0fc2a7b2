package overlay_test

import (
	"bytes"
	"testing"

	"github.com/holdfast-backup/holdfast/internal/faultfs"
	"github.com/holdfast-backup/holdfast/nbdserver/overlay"
)

// fileBytes returns the first n bytes of a small overlay.
func fileBytes(f *testing.F, n int) []byte {
	f.Helper()
	fsys := faultfs.New("/d")
	ov := create(f, "/d/o", pattern(mib), overlay.Options{FS: fsys, Meta: []byte("meta"), Limit: 1 << 30})
	write(f, ov, []byte("x"), 5)
	ok(f, ov.Close())
	file, err := fsys.Open("/d/o")
	ok(f, err)
	b := make([]byte, n)
	_, err = file.ReadAt(b, 0)
	ok(f, err)
	return b
}

// A header that decodes is encoded the same, but for bytes that have no meaning.
func FuzzHeader(f *testing.F) {
	f.Add(fileBytes(f, 2*block))
	f.Add([]byte("HOLDOVL\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		again, err := overlay.DecodeHeader(b)
		if err != nil {
			return
		}
		if third, err := overlay.DecodeHeader(again); err != nil || !bytes.Equal(third, again) {
			t.Errorf("got %v, want the same header", err)
		}
	})
}

// States that are bad stay so, the others are encoded the same, and no state is
// one that is not used.
func FuzzPage(f *testing.F) {
	f.Add([]byte{0, 1, 2, 0x55, 0xaa}, []byte{}, uint16(0))
	f.Add(bytes.Repeat([]byte{0x9}, 3968), []byte{1}, uint16(600))
	f.Add([]byte{3}, []byte{}, uint16(0))
	f.Fuzz(func(t *testing.T, states, rot []byte, at uint16) {
		id := [16]byte{1, 2, 3, 4}
		b := overlay.EncodePage(states, id, 1<<20)
		for i, r := range rot {
			b[(int(at)+i)%len(b)] ^= r
		}
		again, bad := overlay.DecodePage(b, id, 1<<20)
		for i := range 8 {
			if bad&(1<<i) == 0 && !bytes.Equal(again[i*512:][:512], b[i*512:][:512]) {
				t.Errorf("sector %d is encoded differently", i)
			}
		}
		if _, still := overlay.DecodePage(again, id, 1<<20); still != bad {
			t.Errorf("got bad sectors %08b, want %08b", still, bad)
		}
		if _, moved := overlay.DecodePage(b, id, 1<<21); moved != 0xff {
			t.Errorf("at another place: got bad sectors %08b, want all", moved)
		}
	})
}

// Any bytes are told of or refused, and open without a panic.
func FuzzFile(f *testing.F) {
	f.Add(fileBytes(f, 6*block), uint16(0), byte(0))
	f.Add(fileBytes(f, 6*block), uint16(2*block+16), byte(1))
	f.Fuzz(func(t *testing.T, b []byte, at uint16, flip byte) {
		if int(at) < len(b) {
			b[at] ^= flip
		}
		fsys := faultfs.New("/d")
		o := overlay.Options{FS: fsys}
		file, err := fsys.Create("/d/o")
		ok(t, err)
		_, err = file.WriteAt(b, 0)
		ok(t, err)
		ok(t, file.Truncate(int64(len(b))+mib))
		info, err := overlay.Stat("/d/o", o)
		if err != nil {
			return
		}
		ov, err := overlay.Open("/d/o", pattern(info.Size), o)
		if err != nil {
			return
		}
		_, _ = ov.ReadAt(make([]byte, 2*block), 0)
		_, _ = ov.WriteAt(make([]byte, block+1), 0)
		ok(t, ov.Close())
	})
}
