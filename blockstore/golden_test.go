package blockstore

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
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

func TestGoldenPoint(t *testing.T) {
	t.Parallel()
	p := fixedPoint()
	data, err := encodePoint(p, nil)
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "point", data)
	back, err := decodePoint(data, p.ID, nil, DefaultChunkSize)
	if err != nil || back.VM != p.VM || back.Disks[0] != p.Disks[0] || string(back.Config["vm.xml"]) != "<domain/>" || !back.Time.Equal(p.Time) {
		t.Errorf("comes back as %+v, %v", back, err)
	}

	// An encrypted point has a random salt: hold one that was written once.
	path := filepath.Join("testdata", "point-encrypted.hex")
	if *update {
		data, err := encodePoint(p, fixedKeys())
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
	if back, err = decodePoint(sealed, p.ID, fixedKeys(), DefaultChunkSize); err != nil || back.VM != p.VM {
		t.Errorf("encrypted: got %+v, %v", back, err)
	}
	if bytes.Contains(sealed, []byte("web")) {
		t.Error("an encrypted point shows the VM's name")
	}
	if _, err := decodePoint(sealed, "ff112233445566778899aabbccddeeff", fixedKeys(), DefaultChunkSize); err == nil {
		t.Error("an encrypted point under another's name was accepted")
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
	c := config{Format: 1, ID: strings.Repeat("ab", 16), ChunkSize: 65536, Hash: hashName, Created: time.Date(2026, 11, 22, 1, 2, 3, 0, time.UTC)}
	c.MAC = fixedKeys().authenticate(contextConfig, c.authenticated())
	c.Keys = []wrappedKey{{Kind: "passphrase", Age: []byte("an age file")}}
	data, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "config", data)
}

func TestKeyWrapping(t *testing.T) {
	t.Parallel()
	k := fixedKeys()
	wrapped, err := k.wrap(CreateOptions{Passphrase: "correct horse", workFactor: 8})
	if err != nil {
		t.Fatal(err)
	}
	back, err := unwrap(wrapped, Options{Passphrase: "correct horse"})
	if err != nil || *back != *k {
		t.Errorf("right passphrase: got %v", err)
	}
	for _, o := range []Options{{Passphrase: "wrong"}, {}} {
		if _, err := unwrap(wrapped, o); err == nil {
			t.Errorf("%+v opens the repository", o)
		}
	}
}
