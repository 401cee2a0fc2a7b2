package blockstore

import (
	"bytes"
	"encoding/hex"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/steady"
)

var update = flag.Bool("update", false, "write the golden files anew")

// golden compares got with a file of testdata, a hex dump.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name+".hex")
	dump := hex.Dump(got)
	if *update {
		if err := os.WriteFile(path, []byte(dump), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if dump != string(want) {
		t.Errorf("%s: the format has changed; got\n%s", name, dump)
	}
}

// fixedKeys is a repository key that every run of the test has.
func fixedKeys() *keys {
	k := &keys{}
	copy(k.master[:], "thirty-two bytes that are no key")
	return k
}

func fixedPoint() Point {
	return Point{
		ID: "00112233445566778899aabbccddeeff", VM: "web", Time: time.Date(2026, 11, 22, 1, 2, 3, 456e6, time.UTC),
		Mode: "full", Consistency: "crash",
		Disks:  []PointDisk{{Name: "vda", Map: Map{Root: ID{1, 2, 3}, Size: 1 << 30, Data: 1 << 20}}},
		Config: map[string][]byte{"vm.xml": []byte("<domain/>")},
	}
}

func TestGoldenSegment(t *testing.T) {
	t.Parallel()
	c, err := newCoder()
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	compressible := []byte(strings.Repeat("holdfast ", 40))
	for _, tt := range []struct {
		name string
		keys *keys
	}{{"segment", nil}, {"segment-encrypted", fixedKeys()}} {
		t.Run(tt.name, func(t *testing.T) {
			h := segmentHeader{
				Number: 0x2a, Generation: 0x1122334455667788, Encrypted: tt.keys != nil,
				Repository: [16]byte{0: 0xaa, 15: 0xbb},
			}
			seg := h.encode()
			r := &Repository{coder: c, keys: tt.keys}
			set := &segmentSet{keys: tt.keys}
			var chunkKey, nodeKey []byte
			nodeKey = (&keys{}).derive(contextNodes, nil)
			if tt.keys != nil {
				chunkKey, nodeKey = tt.keys.derive(contextIDs, nil), tt.keys.derive(contextNodes, nil)
			}
			if r.chunkIDs, err = newHasher(chunkKey); err != nil {
				t.Fatal(err)
			}
			if r.nodeIDs, err = newHasher(nodeKey); err != nil {
				t.Fatal(err)
			}
			aead, err := set.cipherOf(h.Number, h.Generation)
			if err != nil {
				t.Fatal(err)
			}
			var entries []tocEntry
			for _, rec := range []struct {
				kind recordType
				data []byte
			}{
				{chunkRecord, []byte("plain")}, {chunkRecord, compressible}, {nodeRecord, compressible},
			} {
				id := r.hash(rec.kind, rec.data)
				payload, how, err := c.compress(nil, id, rec.kind, rec.data)
				if err != nil {
					t.Fatal(err)
				}
				header := recordHeader{Type: rec.kind, Codec: how, Raw: uint32(len(rec.data)), Stored: uint32(len(payload)), ID: id}
				if aead != nil {
					header.Stored += sealOverhead
				}
				off := len(seg)
				seg = appendRecord(seg, aead, header, payload, int64(off))
				entries = append(entries, tocEntry{ID: id, Off: uint32(off), Stored: header.Stored, Raw: header.Raw, Type: rec.kind, Codec: how})

				_, back, err := openRecord(aead, bytes.Clone(seg[off:]), id, int64(off))
				if err != nil {
					t.Fatal(err)
				}
				if plain, err := c.expand(nil, back, how, len(rec.data)); err != nil || !bytes.Equal(plain, rec.data) {
					t.Errorf("record at %d comes back as %q, %v", off, plain, err)
				}
			}
			if entries[1].Codec != codecZstd || entries[2].Codec != codecS2 || entries[0].Codec != codecNone {
				t.Errorf("codecs: got %d, %d, %d", entries[0].Codec, entries[1].Codec, entries[2].Codec)
			}
			golden(t, tt.name, append(seg, encodeTail(h.Generation, entries, int64(len(seg)))...))
		})
	}
}

// fixedSealer is that of a repository that every run of the test has.
func fixedSealer(k *keys) sealer { return sealer{k, [16]byte{0: 0xaa, 15: 0xbb}} }

func fixedPointFile() pointFile {
	return pointFile{
		Point: fixedPoint(), Seq: 7, Prev: ID{4, 5, 6},
		Committed: time.Date(2026, 11, 22, 1, 3, 0, 0, time.UTC), LockedUntil: time.Date(2026, 12, 22, 1, 3, 0, 0, time.UTC),
	}
}

// fixedCatalog is a catalog to which everything has happened once.
func fixedCatalog(s sealer) *catalog {
	at := time.Date(2026, 11, 22, 1, 3, 0, 0, time.UTC)
	c := s.newCatalog()
	c.Clock = steady.Base{Time: at, Boot: "6ad2e1c2-8a4c-4a0e-9f56-1f2b6d4d8a11", Uptime: time.Hour}
	c.Quarantine = 24 * time.Hour
	c.record(s, Change{Op: OpSet, At: at, Quarantine: c.Quarantine})
	f := fixedPointFile()
	f.Seq, f.Prev = c.Seq+1, c.Chain
	c.commit(s, f, ID{7, 8, 9})
	f.ID, f.Seq, f.LockedUntil = "ffeeddccbbaa99887766554433221100", c.Seq+1, time.Time{}
	c.commit(s, f, ID{9, 8, 7})
	l := c.points[f.ID]
	l.Deleted, l.PurgeAfter, l.Purged = at, at.Add(c.Quarantine), true
	c.points[f.ID] = l
	c.record(s, Change{Op: OpDelete, Point: f.ID, At: at, Until: l.PurgeAfter})
	c.record(s, Change{Op: OpPurge, Point: f.ID, At: l.PurgeAfter})
	return c
}

// goldenSealed returns what was written once with a random salt.
func goldenSealed(t *testing.T, name string, write func() ([]byte, error)) []byte {
	t.Helper()
	path := filepath.Join("testdata", name+".hex")
	if *update {
		data, err := write()
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(hex.EncodeToString(data)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	sealed, err := hex.DecodeString(string(text))
	if err != nil {
		t.Fatal(err)
	}
	return sealed
}

func TestGoldenPoint(t *testing.T) {
	t.Parallel()
	s, f := fixedSealer(nil), fixedPointFile()
	data, hash, err := s.encodePoint(f)
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "point", data)
	back, err := s.decodePoint(data, f.ID, DefaultChunkSize)
	if err != nil || !reflect.DeepEqual(back.pointFile, f) || back.hash != hash || back.worn {
		t.Errorf("comes back as %+v, %v", back, err)
	}
	if _, err := (sealer{repo: [16]byte{1}}).decodePoint(data, f.ID, DefaultChunkSize); !errors.Is(err, errForged) {
		t.Errorf("another repository's point: got %v, want %v", err, errForged)
	}

	s = fixedSealer(fixedKeys())
	sealed := goldenSealed(t, "point-encrypted", func() ([]byte, error) {
		data, _, err := s.encodePoint(f)
		return data, err
	})
	if back, err = s.decodePoint(sealed, f.ID, DefaultChunkSize); err != nil || !reflect.DeepEqual(back.pointFile, f) || back.hash != hash {
		t.Errorf("encrypted: got %+v, %v", back, err)
	}
	if bytes.Contains(sealed, []byte("web")) {
		t.Error("an encrypted point shows the VM's name")
	}
	if _, err := s.decodePoint(sealed, "ff112233445566778899aabbccddeeff", DefaultChunkSize); !errors.Is(err, errForged) {
		t.Errorf("an encrypted point under another's name: got %v, want %v", err, errForged)
	}
	if _, err := s.decodePoint(data, f.ID, DefaultChunkSize); !errors.Is(err, errForged) {
		t.Errorf("a plain point in an encrypted repository: got %v, want %v", err, errForged)
	}
}

func TestGoldenCatalog(t *testing.T) {
	t.Parallel()
	s := fixedSealer(nil)
	want := fixedCatalog(s)
	data, err := s.encodeCatalog(want)
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "catalog", data)
	if back, worn, err := s.decodeCatalog(data); err != nil || worn || !reflect.DeepEqual(back, want) {
		t.Errorf("comes back as %+v, %v, %v", back, worn, err)
	}
	s = fixedSealer(fixedKeys())
	want = fixedCatalog(s)
	if _, err := s.encodeCatalog(want); err != nil { // what is in the golden file may be encrypted with another salt
		t.Fatal(err)
	}
	sealed := goldenSealed(t, "catalog-encrypted", func() ([]byte, error) { return s.encodeCatalog(want) })
	if back, worn, err := s.decodeCatalog(sealed); err != nil || worn || !reflect.DeepEqual(back, want) {
		t.Errorf("encrypted: comes back as %+v, %v, %v", back, worn, err)
	}
	for _, plain := range []string{"web", "commit", string(want.Chain[:]), want.Chain.String()} {
		if bytes.Contains(sealed, []byte(plain)) {
			t.Errorf("an encrypted catalog shows %q", plain)
		}
	}
	if _, _, err := s.decodeCatalog(data); !errors.Is(err, errForged) {
		t.Errorf("a plain catalog in an encrypted repository: got %v, want %v", err, errForged)
	}
}

func TestGoldenIndexAndConfig(t *testing.T) {
	t.Parallel()
	loc := location{Segment: 0x2a, Generation: 0x1122334455667788, Off: 64, Stored: 5, Ordinal: 7}
	golden(t, "location", loc.encode())
	if back, err := decodeLocation(loc.encode()); err != nil || back != loc {
		t.Errorf("location: got %+v, %v, want %+v", back, err, loc)
	}
	sum := summary{Generation: 1, Size: 2, Records: 3, Chunks: 4, ChunkBytes: 5, VerifiedSec: 6}
	golden(t, "summary", sum.encode())
	if back, err := decodeSummary(sum.encode()); err != nil || back != sum {
		t.Errorf("summary: got %+v, %v, want %+v", back, err, sum)
	}
	when := time.Date(2026, 11, 22, 1, 2, 3, 0, time.UTC)
	c := config{
		Format: 1, ID: strings.Repeat("ab", 16), ChunkSize: 65536, Hash: hashName, Created: when, Revision: 3,
		Keys: []wrappedKey{
			{ID: "00c0ffee", Kind: PassphraseKey, Label: "the safe", Created: when, Age: []byte("an age file")},
			{ID: "0badcafe", Kind: RecipientKey, Created: when, Recipient: "age1recipient", Age: []byte("another")},
		},
	}
	data, err := c.encode(fixedKeys())
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "config", data)
	if back, err := decodeConfig(data); err != nil || !reflect.DeepEqual(back, c) {
		t.Errorf("config: got %+v, %v, want %+v", back, err, c)
	}
}
