package blockstore

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dgraph-io/badger/v4"
)

// rotVariable makes TestIndexRot damage an index as often as it says, with that seed: "COUNT SEED".
// That runs in a process of its own, because what BadgerDB does about rot, in goroutines of its own, can end it.
const rotVariable = "HOLDFAST_INDEX_ROT"

// Whatever becomes of the index's files between two openings, the repository opens, gives every point back,
// and nothing is left unnoticed that has an effect.
func TestIndexRot(t *testing.T) {
	t.Parallel()
	if how := os.Getenv(rotVariable); how != "" {
		rotIndex(t, how)
		return
	}
	count := 40
	if os.Getenv("HOLDFAST_EXTENDED") != "" {
		count = 1000
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	ctx, cancel := context.WithTimeout(t.Context(), time.Duration(count)*time.Second+time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, os.Args[0], "-test.run=^TestIndexRot$", "-test.v")
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d %d", rotVariable, count, seed))
	out, err := cmd.CombinedOutput()
	if tail := out[max(0, len(out)-8<<10):]; err != nil || !bytes.Contains(out, []byte("--- PASS: TestIndexRot")) {
		t.Errorf("got %v, want every opening to end well:\n%s", err, tail)
	}
}

// folder is the content of a folder's files.
type folder map[string][]byte

func readFolder(t testing.TB, dir string) folder {
	t.Helper()
	out := folder{}
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		data, err := os.ReadFile(filepath.Join(dir, f.Name()))
		if errors.Is(err, os.ErrNotExist) {
			continue // it is being written
		}
		if err != nil {
			t.Fatal(err)
		}
		out[f.Name()] = data
	}
	return out
}

// put makes f the content of dir, which stays the folder that it is.
func (f folder) put(t testing.TB, dir string) {
	t.Helper()
	if _, err := emptyIndex(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for name, data := range f {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// believed reports whether anything in a file of the index is ever believed.
func believed(name string) bool {
	return name == statusFile || name == badger.ManifestFilename || strings.HasSuffix(name, ".sst")
}

// rot damages one of f's files and says how, and whether it must be noticed; other is the folder of another index.
func (f folder) rot(rng *rand.Rand, other folder) (how string, noticed bool) {
	names := slices.Sorted(maps.Keys(f))
	// Every other time a file that counts.
	for keep := rng.IntN(2) == 0; ; {
		name := names[rng.IntN(len(names))]
		data := f[name]
		if keep && !believed(name) || len(data) == 0 {
			continue
		}
		at := rng.IntN(len(data))
		if rng.IntN(2) == 0 { // the ends of files tell what else is there
			at = len(data) - 1 - rng.IntN(min(len(data), 64))
		}
		switch kind := rng.IntN(12); {
		case kind < 6:
			bit := byte(1) << rng.IntN(8)
			data[at] ^= bit
			how = fmt.Sprintf("bit %#x of byte %d of %d", bit, at, len(data))
		case kind == 6:
			f[name] = data[:at]
			how = fmt.Sprintf("cut at %d of %d", at, len(data))
		case kind == 7:
			at = at / 512 * 512
			end := min(len(data), at+4096)
			if bytes.Count(data[at:end], []byte{0}) == end-at {
				continue
			}
			clear(data[at:end])
			how = fmt.Sprintf("zeros from %d to %d of %d", at, end, len(data))
		case kind == 8:
			f[name] = append(data, bytes.Repeat([]byte{0xff}, 1+rng.IntN(100))...) // BadgerDB takes zeros for no changes
			how = fmt.Sprintf("more behind %d", len(data))
		case kind == 9:
			delete(f, name)
			how = "gone"
		case kind == 10:
			if other[name] == nil || bytes.Equal(other[name], data) {
				continue
			}
			f[name] = bytes.Clone(other[name])
			if name == statusFile { // it may list the same tables
				return name + ": from another index", false
			}
			how = "from another index"
		default:
			f["000999.sst"] = bytes.Clone(data)
			f["00001.mem"] = bytes.Clone(data)
			return name + ": copied to other names", false
		}
		return name + ": " + how, believed(name)
	}
}

// warnings remembers what is logged as a warning or an error.
type warnings struct {
	slog.Handler
	mu   *sync.Mutex
	text *[]string
}

func newWarnings() warnings { return warnings{slog.DiscardHandler, &sync.Mutex{}, &[]string{}} }

func (w warnings) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelWarn }

func (w warnings) Handle(_ context.Context, rec slog.Record) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	*w.text = append(*w.text, rec.Message)
	return nil
}

func (w warnings) has(text string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.ContainsFunc(*w.text, func(s string) bool { return strings.Contains(s, text) })
}

const madeAnew = "the index cannot be trusted"

// rotten is a repository with the states of its index.
type rotten struct {
	dir    string
	points map[PointID]content
	states map[string]folder // closed, and killed while open; earlier, of a time before, is for what is mixed up
}

// newRotten makes a repository whose index has several tables.
func newRotten(t *testing.T) rotten {
	x := rotten{dir: createIn(t, memoryDir(t), CreateOptions{}), points: map[PointID]content{}, states: map[string]folder{}}
	index := filepath.Join(x.dir, indexDir)
	for n := range uint32(3) {
		r := open(t, x.dir, Options{})
		c := numbers(1+40*n, 60)
		x.points[mustBackup(t, r, "vm", c).ID] = c
		if n == 2 {
			x.states["killed"] = readFolder(t, index)
		}
		closeOnce(t, r)
		if n == 1 {
			x.states["earlier"] = readFolder(t, index)
		}
	}
	x.states["closed"] = readFolder(t, index)
	return x
}

// check opens the repository and reads everything.
func (x rotten) check(t *testing.T) (noticed bool) {
	t.Helper()
	w := newWarnings()
	r := open(t, x.dir, Options{Log: slog.New(w)})
	for id, c := range x.points {
		checkDisk(t, r, id, c)
	}
	checkSound(t, r)
	closeOnce(t, r)
	return w.has(madeAnew)
}

// rotIndex damages an index as rotVariable says.
func rotIndex(t *testing.T, how string) {
	var count int
	var seed uint64
	if _, err := fmt.Sscan(how, &count, &seed); err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(seed, 1))
	x := newRotten(t)
	index := filepath.Join(x.dir, indexDir)
	for _, state := range []string{"closed", "killed", "earlier"} {
		x.states[state].put(t, index)
		if x.check(t) {
			t.Errorf("%s: got an index made anew, want it used", state)
		}
	}
	for range count {
		state := []string{"closed", "killed"}[rng.IntN(2)]
		f := folder{}
		for name, data := range x.states[state] {
			f[name] = bytes.Clone(data)
		}
		what, noticed := f.rot(rng, x.states["earlier"])
		t.Logf("%s index, %s", state, what) // the last one stands before what ends the process
		f.put(t, index)
		if got := x.check(t); noticed && !got {
			t.Errorf("%s index, %s: it was not noticed", state, what)
		}
		if t.Failed() {
			break
		}
	}
	x.rotWhileOpen(t, rng, count/4)
}

// rotWhileOpen damages tables while the index is open: nothing wrong is read, verification tells of it, and the
// next opening makes the index anew.
func (x rotten) rotWhileOpen(t *testing.T, rng *rand.Rand, count int) {
	for range count {
		r := open(t, x.dir, Options{})
		tables, err := filepath.Glob(filepath.Join(x.dir, indexDir, "*.sst"))
		if err != nil || len(tables) == 0 {
			t.Fatalf("got tables %v, %v", tables, err)
		}
		path := tables[rng.IntN(len(tables))]
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		at, bit := rng.IntN(len(data)), byte(1)<<rng.IntN(8)
		t.Logf("open index, %s: bit %#x of byte %d of %d", filepath.Base(path), bit, at, len(data))
		if _, err := f.WriteAt([]byte{data[at] ^ bit}, int64(at)); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		for id, c := range x.points {
			got, err := readDisk(r, id)
			if err == nil && !bytes.Equal(got, c.bytes()) || err != nil && !errors.Is(err, ErrIndexDamaged) {
				t.Errorf("got wrong bytes, or %v, want the right ones or %v", err, ErrIndexDamaged)
			}
		}
		v, err := r.Verify(t.Context(), VerifyOptions{})
		if err != nil || len(v.Errors) != 1 || v.Errors[0].File != indexDir {
			t.Errorf("verify: got %+v, %v, want the index called damaged", v.Errors, err)
		}
		closeOnce(t, r)
		x.check(t)
		if t.Failed() {
			return
		}
	}
}

// An index that is copied while it is written is not used in the copy.
func TestIndexCopiedWhileWritten(t *testing.T) {
	t.Parallel()
	dir := createIn(t, memoryDir(t), CreateOptions{})
	r := open(t, dir, Options{})
	points := map[PointID]content{}
	first := numbers(1, 60)
	points[mustBackup(t, r, "vm", first).ID] = first
	stop, stopped := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		for n := uint32(100); stop.Err() == nil; n += 30 {
			if _, err := backup(t, r, "other", numbers(n, 30)); err != nil {
				t.Error(err)
			}
		}
	})
	var copies []folder
	for range 4 {
		copies = append(copies, readFolder(t, filepath.Join(dir, indexDir)))
	}
	stopped()
	wg.Wait()
	for _, p := range r.Points() {
		if _, known := points[p.ID]; !known && len(points) < 3 {
			c, err := readDisk(r, p.ID)
			if err != nil {
				t.Fatal(err)
			}
			points[p.ID] = contentOf(t, c)
		}
	}
	closeOnce(t, r)
	for _, f := range copies {
		to := crash(t, dir)
		if err := os.RemoveAll(filepath.Join(to, indexDir)); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(filepath.Join(to, indexDir), 0o700); err != nil {
			t.Fatal(err)
		}
		f.put(t, filepath.Join(to, indexDir))
		if !(rotten{dir: to, points: points}).check(t) {
			t.Error("got the copied index used, want it made anew")
		}
	}
}

// contentOf returns the numbers of which a disk's chunks were made, which follow each other.
func contentOf(t *testing.T, disk []byte) content {
	t.Helper()
	for n := uint32(100); n < 100_000; n += 30 {
		if bytes.Equal(disk[:testChunk], chunkOf(n)) {
			return numbers(n, uint32(len(disk)/testChunk))
		}
	}
	t.Fatal("the disk has none of the known contents")
	return nil
}

// The index of another repository, which has segments of the same numbers, is noticed; and were it not, it
// would do no harm: what only it knows is stored anew.
func TestIndexOfAnother(t *testing.T) {
	t.Parallel()
	parent := memoryDir(t)
	mine, other := createIn(t, filepath.Join(parent, "a"), CreateOptions{}), createIn(t, filepath.Join(parent, "b"), CreateOptions{})
	r := open(t, other, Options{})
	mustBackup(t, r, "vm", numbers(1, 80))
	closeOnce(t, r)
	r = open(t, mine, Options{})
	kept := mustBackup(t, r, "vm", numbers(1, 40))
	id := hex.EncodeToString(r.segments.repoID[:])
	closeOnce(t, r)
	foreign := readFolder(t, filepath.Join(other, indexDir))
	for _, forged := range []bool{false, true} {
		t.Run("forged="+strconv.FormatBool(forged), func(t *testing.T) {
			dir := crash(t, mine)
			foreign.put(t, filepath.Join(dir, indexDir))
			if forged {
				if err := markIndexClosed(filepath.Join(dir, indexDir), id); err != nil {
					t.Fatal(err)
				}
			}
			w := newWarnings()
			r := open(t, dir, Options{Log: slog.New(w)})
			if w.has(madeAnew) == forged {
				t.Errorf("got the index made anew %v, want %v", !forged, forged)
			}
			checkDisk(t, r, kept.ID, numbers(1, 40))
			again := mustBackup(t, r, "vm", numbers(30, 50))
			checkDisk(t, r, again.ID, numbers(30, 50))
			if got, err := r.Collect(t.Context(), CollectOptions{}); err != nil || got.DeadChunks != 0 {
				t.Errorf("collect: got %+v, %v, want nothing dead", got, err)
			}
			checkSound(t, r)
		})
	}
}

// An index that was open when the machine stopped is made anew; one that was open when its process was
// killed is used.
func TestIndexAfterLossOfPower(t *testing.T) {
	t.Parallel()
	x := newRotten(t)
	index := filepath.Join(x.dir, indexDir)
	x.states["killed"].put(t, index)
	s, err := decodeIndexStatus(x.states["killed"][statusFile])
	if err != nil || s.Open == nil {
		t.Fatalf("got %+v, %v, want an open index", s, err)
	}
	s.Open.Boot = "00000000-0000-0000-0000-000000000000"
	if err := writeIndexStatus(index, s); err != nil {
		t.Fatal(err)
	}
	if !x.check(t) {
		t.Error("got the index used, want it made anew")
	}
}

// Making the index anew can be stopped at any segment; what was begun is gone on with.
func TestRebuildIndexStops(t *testing.T) {
	t.Parallel()
	x := newRotten(t)
	for n := range 4 {
		ctx, cancel := context.WithCancel(t.Context())
		var last, total int
		_, err := RebuildIndex(ctx, x.dir, Options{indexMemory: 1 << 20}, func(done, all int) {
			if done == n {
				cancel()
			}
			last, total = done, all
		})
		cancel()
		if n < total && !errors.Is(err, context.Canceled) || last != min(n, total) {
			t.Errorf("stopped at %d of %d: got %v at %d", n, total, err, last)
		}
		if x.check(t) {
			t.Error("got the index made anew, want it gone on with")
		}
	}
	// What an interrupted removal leaves is no index.
	if err := distrustIndex(filepath.Join(x.dir, indexDir)); err != nil {
		t.Fatal(err)
	}
	if !x.check(t) {
		t.Error("got half an index used, want it made anew")
	}
}

// A compaction that met rot has lost entries, after all segments were entered again once. A collection and a
// verification find them all the same.
func TestIndexLosesEntriesAgain(t *testing.T) {
	t.Parallel()
	r := open(t, create(t, CreateOptions{}), Options{})
	c := numbers(1, 40)
	p := mustBackup(t, r, "vm", c)
	if err := r.appender.finish(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		err := r.index.write(func(w indexWrite) error {
			for _, n := range c[:10] {
				if err := w.remove(r.ID(chunkOf(n))); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if got, err := r.Collect(t.Context(), CollectOptions{}); err != nil || got.DeadChunks != 0 {
			t.Errorf("collect: got %+v, %v, want nothing dead", got, err)
		}
		checkSound(t, r)
	}
	checkDisk(t, r, p.ID, c)
}

// Whatever a table holds, checking it ends, without a panic.
func FuzzIndexTable(f *testing.F) {
	dir := create(f, CreateOptions{})
	r := open(f, dir, Options{})
	mustBackup(f, r, "vm", numbers(1, 60))
	closeOnce(f, r)
	for name, data := range readFolder(f, filepath.Join(dir, indexDir)) {
		if !strings.HasSuffix(name, ".sst") {
			continue
		}
		f.Add(data)
		f.Add(data[:len(data)-1])
	}
	f.Fuzz(func(_ *testing.T, data []byte) {
		if _, err := checkTable(bytes.NewReader(data), int64(len(data))); err != nil {
			// Behind the checksum, which the fuzzer can't guess.
			_ = checkBlocks(bytes.NewReader(data), int64(len(data)), data)
		}
	})
}

// What decodes encodes back.
func FuzzIndexStatus(f *testing.F) {
	for _, s := range []indexStatus{
		{Repository: "00"},
		{Repository: "00112233445566778899aabbccddeeff", Open: &indexPlace{Boot: "x", Device: 1, Inode: 2}},
		{Repository: "00", Tables: []tableStamp{{ID: 1, Level: 6, Size: 100, Checksum: 7}}},
	} {
		data, err := s.encode()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if _, rest, ok := bytes.Cut(data, []byte("\n")); ok { // the checksum of what follows
			data = append(fmt.Appendf(nil, "holdfast index 1 %08x\n", crc32.Checksum(rest, castagnoli)), rest...)
		}
		s, err := decodeIndexStatus(data)
		if err != nil {
			return
		}
		again, err := s.encode()
		if err != nil {
			t.Fatal(err)
		}
		got, err := decodeIndexStatus(again)
		if err != nil || got.Repository != s.Repository || !slices.Equal(got.Tables, s.Tables) {
			t.Errorf("got %+v, %v, want %+v", got, err, s)
		}
	})
}
