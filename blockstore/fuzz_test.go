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

// addEnvelopes adds seeds: the file of a golden file, and what rot and a torn copy make of it.
func addEnvelopes(f *testing.F, name string) {
	f.Helper()
	data := goldenBytes(f, name)
	for _, flip := range [][]int{{}, {0}, {13}, {60}, {len(data) - 1}, {13, len(data) - 1}, {20, len(data) - 1}} {
		seed := bytes.Clone(data)
		for _, at := range flip {
			seed[at] ^= 1
		}
		f.Add(seed, false)
	}
	f.Add(data[:len(data)/2], false)
	f.Add(append(bytes.Clone(data), 0), true)
	sealed, err := os.ReadFile(filepath.Join("testdata", name+"-encrypted.hex"))
	if err != nil {
		f.Fatal(err)
	}
	if sealed, err = hex.DecodeString(string(sealed)); err != nil {
		f.Fatal(err)
	}
	f.Add(sealed, true)
}

func fuzzSealer(encrypted bool) sealer {
	if encrypted {
		return fixedSealer(fixedKeys())
	}
	return fixedSealer(nil)
}

// Whatever a point's file holds, reading it does not panic; what is read can be
// written, and its file made whole again.
func FuzzPoint(f *testing.F) {
	addEnvelopes(f, "point")
	f.Fuzz(func(t *testing.T, data []byte, encrypted bool) {
		s, id := fuzzSealer(encrypted), fixedPoint().ID
		p, err := s.decodePoint(data, id, DefaultChunkSize)
		if err != nil {
			return
		}
		if whole := twice(p.one); p.worn == bytes.Equal(whole, data) {
			t.Fatalf("worn is %v", p.worn)
		} else if again, err := s.decodePoint(whole, id, DefaultChunkSize); err != nil || again.hash != p.hash || again.worn {
			t.Fatalf("rewritten: got hash %v, worn %v, %v, want %v", again.hash, again.worn, err, p.hash)
		}
		again, _, err := s.encodePoint(p.pointFile)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.decodePoint(again, id, DefaultChunkSize); err != nil {
			t.Fatal(err)
		}
	})
}

// Whatever a catalog's file holds, reading it does not panic; what is read can be written.
func FuzzCatalog(f *testing.F) {
	addEnvelopes(f, "catalog")
	f.Fuzz(func(t *testing.T, data []byte, encrypted bool) {
		s := fuzzSealer(encrypted)
		c, _, err := s.decodeCatalog(data)
		if err != nil {
			return
		}
		next := c.clone()
		next.record(s, Change{Op: OpSet})
		again, err := s.encodeCatalog(next)
		if err != nil {
			t.Fatal(err)
		}
		back, worn, err := s.decodeCatalog(again)
		if err != nil || worn || back.head() != next.head() {
			t.Fatal(worn, err)
		}
		if err := back.descends(s, c.head()); err != nil {
			t.Fatal(err)
		}
	})
}

// Whatever a record holds behind a right checksum, which a fuzzer would not find by itself,
// opening it ends with an error or with as many plain bytes as its header says.
func FuzzRecord(f *testing.F) {
	c, err := newCoder()
	if err != nil {
		f.Fatal(err)
	}
	compressible := bytes.Repeat([]byte("holdfast "), 200)
	for _, kind := range []recordType{chunkRecord, nodeRecord} {
		payload, how, err := c.compress(nil, ID{1}, kind, compressible)
		if err != nil {
			f.Fatal(err)
		}
		h := recordHeader{Type: kind, Codec: how, Raw: uint32(len(compressible)), Stored: uint32(len(payload)), ID: ID{1}}
		f.Add(appendRecord(nil, nil, h, payload, segmentHeaderSize))
	}
	f.Add(appendRecord(nil, nil, recordHeader{Type: chunkRecord, Raw: 5, Stored: 5}, []byte("plain"), segmentHeaderSize))
	f.Fuzz(func(t *testing.T, record []byte) {
		if len(record) < recordHeaderSize {
			return
		}
		sealRecord(record)
		var id ID
		copy(id[:], record[16:])
		h, payload, err := openRecord(nil, record, id, segmentHeaderSize)
		if err != nil {
			return
		}
		plain, err := c.expand(make([]byte, 0, 4096), payload, h.Codec, int(h.Raw))
		if err == nil && (len(plain) != int(h.Raw) || len(plain) > maxChunkSize) {
			t.Fatalf("expanded to %d bytes, want %d", len(plain), h.Raw)
		}
	})
}

// Whatever the end of a segment holds behind right checksums, its records lie side by side
// before the table of contents.
func FuzzTail(f *testing.F) {
	entries := []tocEntry{
		{ID: ID{1}, Off: segmentHeaderSize, Stored: 100, Raw: 200, Type: chunkRecord, Codec: codecZstd},
		{ID: ID{2}, Off: segmentHeaderSize + recordHeaderSize + 100, Stored: 50, Raw: nodeSize, Type: nodeRecord, Codec: codecS2},
	}
	f.Add(encodeTOC(entries), uint32(len(entries)), uint64(recordsEnd(entries)), uint16(formatVersion))
	f.Fuzz(func(t *testing.T, toc []byte, records uint32, end uint64, version uint16) {
		if len(toc) > 1<<16 || end > 1<<20 {
			return
		}
		h := segmentHeader{Number: 1, Generation: uint64(version)}
		file := append(h.encode(), make([]byte, end)...)[:max(end, segmentHeaderSize)]
		header := recordHeader{Type: tocRecord, Raw: uint32(len(toc)), Stored: uint32(len(toc))}
		file = appendRecord(file, nil, header, toc, int64(len(file)))
		file = append(file, footer{TOC: end, Records: records, Generation: h.Generation}.encode()...)
		got, err := readEntries(bytesFile{bytes.NewReader(file)}, int64(len(file)), h.Generation)
		if err != nil {
			return
		}
		next := int64(segmentHeaderSize)
		for _, e := range got {
			if int64(e.Off) != next || e.Raw > maxChunkSize || e.Stored > maxPayload {
				t.Fatalf("entry %+v, expected at %d", e, next)
			}
			next += e.size()
		}
		if next != int64(end) || len(got) != int(records) {
			t.Fatalf("%d records up to %d, want %d up to %d", len(got), next, records, end)
		}
	})
}

// Whatever the index holds for a key, reading it ends, and what is read is what was written.
func FuzzIndexValue(f *testing.F) {
	f.Add(location{Segment: 1, Generation: 2, Off: 3, Stored: 4, Ordinal: 5}.encode())
	f.Add(summary{Generation: 1, Size: 2, Records: 3, Chunks: 4, ChunkBytes: 5, VerifiedSec: 6}.encode())
	f.Fuzz(func(t *testing.T, value []byte) {
		if loc, err := decodeLocation(value); err == nil && !bytes.Equal(loc.encode(), value) {
			t.Fatalf("location %+v was %x", loc, value)
		}
		if sum, err := decodeSummary(value); err == nil && !bytes.Equal(sum.encode(), value) {
			t.Fatalf("summary %+v was %x", sum, value)
		}
	})
}
