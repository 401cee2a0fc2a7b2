package blockstore

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"filippo.io/age"
)

// hostileRepo is a repository with two points, each with segments of its own, and a
// copy from when the last segment was not sealed.
type hostileRepo struct {
	dir, earlier string
	o            Options
	points       map[PointID]content
}

func newHostileRepo(t *testing.T, passphrase string) *hostileRepo {
	t.Helper()
	h := &hostileRepo{o: Options{Passphrase: passphrase, SegmentSize: 96 << 10}, points: map[PointID]content{}}
	h.dir = create(t, CreateOptions{Passphrase: passphrase})
	r := open(t, h.dir, h.o)
	h.points[mustBackup(t, r, "vm", numbers(1, 40)).ID] = numbers(1, 40)
	h.earlier = crash(t, h.dir)
	h.points[mustBackup(t, r, "vm", numbers(100, 40)).ID] = numbers(100, 40)
	closeOnce(t, r)
	return h
}

// check opens the repository and reads every disk, as an export does and as a restore does: in
// an encrypted repository each read is an error or right, in a plain one each
// restore. It returns all errors.
func (h *hostileRepo) check(t *testing.T, dir string) string {
	t.Helper()
	r, err := Open(t.Context(), dir, Options{Passphrase: h.o.Passphrase, SegmentSize: h.o.SegmentSize, indexMemory: 1 << 20})
	if err != nil {
		return err.Error()
	}
	defer func() { mustDo(t, r.Close()) }()
	var said strings.Builder
	for _, p := range r.PointProblems() {
		fmt.Fprintln(&said, p.Err)
	}
	for id, want := range h.points {
		for _, whole := range []bool{true, false} {
			if !whole && h.o.Passphrase == "" {
				continue
			}
			d, err := r.OpenDisk(id, "vda", DiskOptions{Whole: whole})
			if err != nil {
				fmt.Fprintln(&said, err)
				continue
			}
			for i, n := range want {
				b := make([]byte, testChunk)
				if _, err := d.ReadAt(b, int64(i)*testChunk); err != nil {
					fmt.Fprintln(&said, err)
				} else if !bytes.Equal(b, chunkOf(n)) {
					t.Errorf("chunk %d of point %s has other bytes", i, id)
				}
			}
			mustDo(t, d.Close())
		}
	}
	return said.String()
}

// place finds a chunk's segment file and record.
func place(t *testing.T, h *hostileRepo, n uint32) (path string, loc location) {
	t.Helper()
	r := open(t, crash(t, h.dir), h.o)
	defer closeOnce(t, r)
	loc, ok, err := r.find(r.ID(chunkOf(n)))
	if err != nil || !ok {
		t.Fatal(ok, err)
	}
	return filepath.Join(segmentsDir, segmentName(loc.Segment, loc.Generation, segmentSuffix)), loc
}

func swapFiles(t *testing.T, a, b string) {
	t.Helper()
	mustDo(t, os.Rename(a, a+".x"))
	mustDo(t, os.Rename(b, a))
	mustDo(t, os.Rename(a+".x", b))
}

// edit changes a file's bytes.
func edit(t *testing.T, path string, change func(b []byte)) {
	t.Helper()
	b, err := os.ReadFile(path)
	mustDo(t, err)
	change(b)
	mustDo(t, os.WriteFile(path, b, 0o600))
}

// Somebody who has no key swaps, replays and edits the repository's files. What was changed is an
// error that says so, and nobody reads other bytes.
func TestHostileStorage(t *testing.T) {
	t.Parallel()
	for _, passphrase := range []string{"secret", ""} {
		h := newHostileRepo(t, passphrase)
		pathA, locA := place(t, h, 10)
		pathB, locB := place(t, h, 110)
		if pathA == pathB || locA.Stored != locB.Stored {
			t.Fatalf("the chunks are at %s %+v and %s %+v, want other segments and equal lengths", pathA, locA, pathB, locB)
		}
		size := int(recordHeaderSize + locA.Stored)
		for _, tt := range []struct {
			name   string
			do     func(t *testing.T, dir string)
			sealed string // what is said of it in an encrypted repository; "" is nothing
			plain  string // and in a plain one
			heals  bool   // in a plain one nothing is said without the old index
		}{
			{"two segments' files swapped", func(t *testing.T, dir string) {
				swapFiles(t, filepath.Join(dir, pathA), filepath.Join(dir, pathB))
			}, "in segment", "the record there is that of chunk", true}, // a new index finds them by what is in them
			{"two records swapped", func(t *testing.T, dir string) {
				var a, b []byte
				edit(t, filepath.Join(dir, pathA), func(file []byte) { a = bytes.Clone(file[locA.Off:][:size]) })
				edit(t, filepath.Join(dir, pathB), func(file []byte) { b = bytes.Clone(file[locB.Off:][:size]); copy(file[locB.Off:], a) })
				edit(t, filepath.Join(dir, pathA), func(file []byte) { copy(file[locA.Off:], b) })
			}, "the record there is that of chunk", "the record there is that of chunk", false},
			{"another's payload under a record's header", func(t *testing.T, dir string) {
				var b []byte
				edit(t, filepath.Join(dir, pathB), func(file []byte) { b = bytes.Clone(file[locB.Off:][:size]) })
				edit(t, filepath.Join(dir, pathA), func(file []byte) {
					record := file[locA.Off:][:size]
					copy(record[recordHeaderSize:], b[recordHeaderSize:])
					sealRecord(record)
				})
			}, "decryption failed", "content does not have this hash", false},
			{"an older copy of the last segments", func(t *testing.T, dir string) {
				for _, path := range segmentFiles(t, dir, segmentSuffix) {
					mustDo(t, os.Remove(path))
				}
				mustDo(t, os.CopyFS(filepath.Join(dir, segmentsDir), os.DirFS(filepath.Join(h.earlier, segmentsDir))))
			}, "it is in no segment", "it is in no segment", false},
			{"two point files swapped", func(t *testing.T, dir string) {
				files, err := filepath.Glob(filepath.Join(dir, pointsDir, "*"+pointSuffix))
				mustDo(t, err)
				swapFiles(t, files[0], files[1])
			}, errForged.Error(), errForged.Error(), false},
			{"a point's file removed", func(t *testing.T, dir string) {
				files, err := filepath.Glob(filepath.Join(dir, pointsDir, "*"+pointSuffix))
				mustDo(t, err)
				mustDo(t, os.Remove(files[0]))
			}, errMissing.Error(), errMissing.Error(), false},
			{"all as it was", func(t *testing.T, dir string) {
				mustDo(t, os.RemoveAll(dir))
				mustDo(t, os.CopyFS(dir, os.DirFS(h.earlier)))
			}, "not found", "not found", false}, // the second point; only a head noted elsewhere tells who looks at the first
			{"segments called plain, or encrypted", func(t *testing.T, dir string) {
				for _, path := range segmentFiles(t, dir, segmentSuffix) {
					edit(t, path, func(file []byte) {
						head, err := decodeSegmentHeader(file)
						mustDo(t, err)
						head.Encrypted = !head.Encrypted
						copy(file, head.encode())
					})
				}
			}, "all is encrypted there", "nothing is encrypted there", false},
			{"one segment of another repository", func(t *testing.T, dir string) {
				other := create(t, CreateOptions{})
				r := open(t, other, Options{})
				mustBackup(t, r, "vm", numbers(7, 3))
				closeOnce(t, r)
				for _, path := range segmentFiles(t, other, segmentSuffix) {
					data, err := os.ReadFile(path)
					mustDo(t, err)
					mustDo(t, os.WriteFile(filepath.Join(dir, segmentsDir, "0000000000000000-0000000000000001.seg"), data, 0o600))
				}
			}, "", "", false},
		} {
			t.Run(fmt.Sprintf("%s, passphrase=%s", tt.name, passphrase), func(t *testing.T) {
				t.Parallel()
				want := tt.sealed
				if passphrase == "" {
					want = tt.plain
				}
				for _, index := range []bool{true, false} {
					dir := crash(t, h.dir)
					if !index {
						mustDo(t, os.RemoveAll(filepath.Join(dir, indexDir)))
					}
					tt.do(t, dir)
					want := want
					if tt.heals && passphrase == "" && !index {
						want = ""
					}
					if got := h.check(t, dir); (want == "") != (got == "") || !strings.Contains(got, want) {
						t.Errorf("index %v: got %q, want %q", index, got, want)
					}
				}
			})
		}
	}
}

// The index is not authenticated: whatever it says, a read is an error or right.
func TestHostileIndex(t *testing.T) {
	t.Parallel()
	h := newHostileRepo(t, "secret")
	r := open(t, h.dir, h.o)
	a, b := r.ID(chunkOf(10)), r.ID(chunkOf(110))
	locB, ok, err := r.find(b)
	if err != nil || !ok {
		t.Fatal(ok, err)
	}
	far := locB
	far.Off += 7
	for _, loc := range []location{locB, far, {Segment: locB.Segment, Generation: locB.Generation, Stored: maxPayload + 1}} {
		mustDo(t, r.index.write(func(w indexWrite) error { return w.put([]entry{{a, loc}}) }))
		emptyCache(r)
		if err := r.load(a, chunkRecord, make([]byte, testChunk, testChunk+decodeSlack), false); !errors.Is(err, ErrDamaged) {
			t.Errorf("location %+v: got %v, want %v", loc, err, ErrDamaged)
		}
	}
}

// repository.json and its copy are changed, both alike, by somebody who has no key: nothing opens,
// and the error says why.
func TestHostileConfig(t *testing.T) {
	t.Parallel()
	alice, eve := newIdentity(t), newIdentity(t)
	public := alice.Recipient().String()
	dir := create(t, CreateOptions{Passphrase: "secret", Recipients: []string{public}})
	o := Options{Identities: []age.Identity{alice}}
	r := open(t, dir, o)
	mustBackup(t, r, "vm", numbers(1, 5))
	repository := r.config.ID
	closeOnce(t, r)
	eves := fixedKeys()
	wrap := func(n NewKey) wrappedKey {
		w, _, err := eves.wrap(n)
		mustDo(t, err)
		return w
	}
	const forged = "changed by somebody without the key"
	for _, tt := range []struct {
		name   string
		change func(c *config)
		says   string
	}{
		{"chunk size", func(c *config) { c.ChunkSize *= 2 }, forged},
		{"id", func(c *config) { c.ID = strings.Repeat("0", 32) }, forged},
		{"revision", func(c *config) { c.Revision += 5 }, forged},
		{"label", func(c *config) { c.Keys[0].Label = "in the safe" }, forged},
		{"recipient", func(c *config) { c.Keys[1].Recipient = eve.Recipient().String() }, forged},
		{"order", func(c *config) { slices.Reverse(c.Keys) }, forged},
		{"one key less", func(c *config) { c.Keys = c.Keys[1:] }, forged},
		{"one key more", func(c *config) { c.Keys = append(c.Keys, wrap(NewKey{Recipient: eve.Recipient().String()})) }, forged},
		{"plain", func(c *config) { c.Keys = nil }, "nothing is encrypted"},
		{"another repository key for the same recipient", func(c *config) {
			c.Keys = []wrappedKey{wrap(NewKey{Recipient: public})}
			c.MAC = eves.authenticate(contextConfig, c.fields())
		}, "its key does not open"},
		{"keys twice", func(c *config) { c.Keys = append(c.Keys, c.Keys[0]) }, "of its own"},
		{"too many keys", func(c *config) { c.Keys = slices.Repeat(c.Keys, MaxKeys) }, "more than 64"},
		{"a long key", func(c *config) { c.Keys[0].Age = make([]byte, maxWrapped+1) }, "4097 bytes"},
		{"control characters", func(c *config) { c.Keys[0].Label = "\x1b[2J" }, "label"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			dir := crash(t, dir)
			for _, name := range configFiles {
				rewrite(t, dir, name, tt.change)
			}
			if tt.name == "another repository key for the same recipient" { // both alike
				data, err := os.ReadFile(filepath.Join(dir, configFile))
				mustDo(t, err)
				mustDo(t, os.WriteFile(filepath.Join(dir, configCopy), data, 0o600))
			}
			if _, err := Open(t.Context(), dir, o); err == nil || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("got %v, want an error that says %q", err, tt.says)
			}
		})
	}
	t.Run("plain, for who gives no key", func(t *testing.T) {
		t.Parallel()
		dir := crash(t, dir)
		for _, name := range configFiles {
			rewrite(t, dir, name, func(c *config) { c.Keys = nil })
		}
		if _, err := Open(t.Context(), dir, Options{}); err == nil || !strings.Contains(err.Error(), "nothing is encrypted there") {
			t.Errorf("got %v, want a refusal", err)
		}
	})
	for _, both := range []bool{true, false} {
		t.Run(fmt.Sprintf("another repository's, both files %v", both), func(t *testing.T) {
			t.Parallel()
			dir := crash(t, dir)
			other := create(t, CreateOptions{Recipients: []string{public}})
			data, err := os.ReadFile(filepath.Join(other, configFile))
			mustDo(t, err)
			mustDo(t, os.WriteFile(filepath.Join(dir, configCopy), data, 0o600))
			says := repository
			if both {
				mustDo(t, os.WriteFile(filepath.Join(dir, configFile), data, 0o600))
				says = "is of repository " + repository
			}
			if _, err := Open(t.Context(), dir, o); err == nil || !strings.Contains(err.Error(), says) {
				t.Errorf("got %v, want an error that says %q", err, says)
			}
		})
	}
}

// FuzzConfig: whatever repository.json holds, reading it does not panic, and what is read
// is written the same.
func FuzzConfig(f *testing.F) {
	golden := goldenBytes(f, "config")
	f.Add(golden)
	f.Add(golden[:len(golden)-20])
	plain := config{Format: 1, ID: strings.Repeat("ab", 16), ChunkSize: 65536, Hash: hashName, Created: now(), Revision: 1}
	data, err := plain.encode(nil)
	mustDo(f, err)
	f.Add(data)
	f.Add([]byte(`{"format":1,"checksum":""}`))
	f.Add([]byte(`{"format":2}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := decodeConfig(data)
		if err != nil {
			// Behind the checksum: the same with the right one.
			if c.Checksum = c.checksum(); !errors.Is(err, errCRC) || c.check() != nil {
				return
			}
		}
		k := fixedKeys()
		if len(c.Keys) == 0 {
			k = nil
		}
		again, err := c.encode(k)
		mustDo(t, err)
		back, err := decodeConfig(again)
		if err != nil || !bytes.Equal(back.fields(), c.fields()) {
			t.Fatalf("comes back as %+v, %v, want %+v", back, err, c)
		}
		_, _, _ = c.open(Options{Identities: []age.Identity{noIdentity{}}})
	})
}

// noIdentity opens nothing, at no cost.
type noIdentity struct{}

func (noIdentity) Unwrap([]*age.Stanza) ([]byte, error) { return nil, age.ErrIncorrectIdentity }
