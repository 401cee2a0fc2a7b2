package blockstore

import (
	"bytes"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"testing"
)

// bytesFile is a durable.File over bytes, for reading.
type bytesFile struct{ *bytes.Reader }

func (bytesFile) WriteAt([]byte, int64) (int, error) { return 0, errors.ErrUnsupported }
func (bytesFile) Close() error                       { return nil }
func (bytesFile) Name() string                       { return "fuzz" }
func (f bytesFile) Size() (int64, error)             { return f.Reader.Size(), nil }
func (bytesFile) Sync() error                        { return errors.ErrUnsupported }
func (bytesFile) Truncate(int64) error               { return errors.ErrUnsupported }
func (bytesFile) DropCache() error                   { return errors.ErrUnsupported }
func (bytesFile) NextHole(int64) (int64, error)      { return 0, errors.ErrUnsupported }
func (bytesFile) PunchHole(int64, int64) error       { return errors.ErrUnsupported }

// goldenBytes returns what a golden file dumps.
func goldenBytes(f *testing.F, name string) []byte {
	f.Helper()
	dump, err := os.ReadFile(filepath.Join("testdata", name+".hex"))
	if err != nil {
		f.Fatal(err)
	}
	var out []byte
	for _, line := range regexp.MustCompile(`(?m)^[0-9a-f]{8} ((?: {1,2}[0-9a-f]{2})+)`).FindAllSubmatch(dump, -1) {
		b, err := hex.DecodeString(string(bytes.ReplaceAll(line[1], []byte(" "), nil)))
		if err != nil {
			f.Fatal(err)
		}
		out = append(out, b...)
	}
	return out
}

// Whatever a segment's file holds, reading it ends, without a panic, and finds only
// records that lie inside the file.
func FuzzSegment(f *testing.F) {
	plain := goldenBytes(f, "segment")
	f.Add(plain)
	f.Add(goldenBytes(f, "segment-encrypted"))
	f.Add(plain[:len(plain)-50])
	c, err := newCoder()
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		file := bytesFile{bytes.NewReader(data)}
		size := int64(len(data))
		_, _ = readSegmentHeader(file)
		checkEntries(t, c, data, scanRecords(file, size, func([]byte, int64) bool { return true }))
		if entries, err := readEntries(file, size, 0x1122334455667788); err == nil {
			checkEntries(t, c, data, entries)
		}
	})
}

func checkEntries(t *testing.T, c *coder, data []byte, entries []tocEntry) {
	next := int64(segmentHeaderSize)
	for _, e := range entries {
		if int64(e.Off) != next || next+e.size() > int64(len(data)) {
			t.Fatalf("record at %d of %d bytes, expected at %d, in a file of %d", e.Off, e.size(), next, len(data))
		}
		next += e.size()
		h, payload, err := openRecord(nil, bytes.Clone(data[e.Off:next]), e.ID, int64(e.Off))
		if err != nil {
			continue
		}
		if plain, err := c.expand(nil, payload, h.Codec, int(h.Raw)); err == nil && len(plain) != int(h.Raw) {
			t.Fatalf("expanded to %d bytes, want %d", len(plain), h.Raw)
		}
	}
}

// Whatever a point's file holds, reading it does not panic, and what is read can be
// written.
func FuzzPoint(f *testing.F) {
	f.Add(goldenBytes(f, "point"), false)
	f.Add([]byte(pointMagic), true)
	f.Fuzz(func(t *testing.T, data []byte, encrypted bool) {
		id := fixedPoint().ID
		var k *keys
		if encrypted {
			k = fixedKeys()
		}
		p, err := decodePoint(data, id, k, DefaultChunkSize)
		if err != nil {
			return
		}
		again, err := encodePoint(p, k)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := decodePoint(again, id, k, DefaultChunkSize); err != nil {
			t.Fatal(err)
		}
	})
}
