package blockstore

import (
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
)

// A crash at any moment leaves every point that was listed, and the next backup
// works. The unsealed segment's tail is torn in several ways.
func TestCrash(t *testing.T) {
	t.Parallel()
	dir := create(t, CreateOptions{})
	r := open(t, dir, Options{SegmentSize: 16 << 20})
	listed := numbers(1, 100)
	p := mustBackup(t, r, "vm", listed)
	s := r.Begin()
	if _, err := store(t, s, numbers(500, 250)); err != nil { // written in part, not committed
		t.Fatal(err)
	}
	files := unsealed(t, dir)
	if len(files) != 1 {
		t.Fatalf("got unsealed segments %v, want one", files)
	}
	info, err := os.Stat(files[0])
	if err != nil {
		t.Fatal(err)
	}
	crashed := crash(t, dir)
	s.Close()

	for _, tt := range []struct {
		name string
		tear func(path string) error
	}{
		{"as it is", func(string) error { return nil }},
		{"cut in a record", func(path string) error { return os.Truncate(path, info.Size()-100) }},
		{"zeros behind", func(path string) error { return os.Truncate(path, info.Size()+50_000) }},
		{"garbage behind", func(path string) error {
			f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			_, err = f.Write(chunkOf(77))
			return errors.Join(err, f.Close())
		}},
		{"a bad record within", func(path string) error {
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				return err
			}
			// Behind the 101 records that a point needs, and before others.
			_, err = f.WriteAt([]byte("????"), info.Size()-100_000)
			return errors.Join(err, f.Close())
		}},
		{"no index", func(string) error { return nil }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			dir := crash(t, crashed)
			if err := tt.tear(unsealed(t, dir)[0]); err != nil {
				t.Fatal(err)
			}
			if tt.name == "no index" {
				if err := os.RemoveAll(filepath.Join(dir, indexDir)); err != nil {
					t.Fatal(err)
				}
			}
			r := open(t, dir, Options{})
			checkDisk(t, r, p.ID, listed)
			if left := unsealed(t, dir); len(left) != 0 {
				t.Errorf("segments are still unsealed: %v", left)
			}
			again := mustBackup(t, r, "vm", numbers(500, 250))
			checkDisk(t, r, again.ID, numbers(500, 250))
			checkSound(t, r)
		})
	}
}

// An unsealed segment with nothing in it, or with a header that is torn, goes.
func TestCrashBeforeFirstRecord(t *testing.T) {
	t.Parallel()
	dir := create(t, CreateOptions{})
	for i, size := range []int{0, 10, segmentHeaderSize} {
		header := segmentHeader{Number: uint64(i + 1), Generation: 5}.encode()
		path := filepath.Join(dir, segmentsDir, segmentName(uint64(i+1), 5, segmentSuffix))
		if err := os.WriteFile(path, header[:size], 0o600); err != nil {
			t.Fatal(err)
		}
	}
	r := open(t, dir, Options{})
	if left := segmentFiles(t, dir, ""); len(left) != 0 {
		t.Errorf("got %v, want no segments", left)
	}
	checkDisk(t, r, mustBackup(t, r, "vm", content{1}).ID, content{1})
}

// The index may be gone, of an earlier time, or of a later one.
func TestIndexBehindAndAhead(t *testing.T) {
	t.Parallel()
	dir := create(t, CreateOptions{})
	r := open(t, dir, Options{})
	first := numbers(1, 80)
	p1 := mustBackup(t, r, "vm", first)
	closeOnce(t, r)
	early := crash(t, dir)
	r = open(t, dir, Options{})
	second := append(numbers(40, 80), first[:10]...)
	p2 := mustBackup(t, r, "vm", second)
	closeOnce(t, r)

	replaceIndex := func(t *testing.T, dir, from string) {
		if err := os.RemoveAll(filepath.Join(dir, indexDir)); err != nil {
			t.Fatal(err)
		}
		if from != "" {
			if err := os.CopyFS(filepath.Join(dir, indexDir), os.DirFS(filepath.Join(from, indexDir))); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, tt := range []struct{ name, index string }{{"gone", ""}, {"behind", early}} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			copied := crash(t, dir)
			replaceIndex(t, copied, tt.index)
			r := open(t, copied, Options{})
			checkDisk(t, r, p1.ID, first)
			checkDisk(t, r, p2.ID, second)
			checkSound(t, r)
		})
	}
	t.Run("ahead", func(t *testing.T) {
		t.Parallel()
		copied := crash(t, early)
		replaceIndex(t, copied, dir)
		r := open(t, copied, Options{})
		checkDisk(t, r, p1.ID, first)
		again := mustBackup(t, r, "vm", second) // must not rest on what only the index knows
		checkDisk(t, r, again.ID, second)
		checkSound(t, r)
	})
	t.Run("rebuilt", func(t *testing.T) {
		t.Parallel()
		copied := crash(t, dir)
		got, err := RebuildIndex(t.Context(), copied, Options{}, nil)
		if err != nil || got.Chunks != 119 {
			t.Errorf("got %+v, %v, want 119 chunks", got, err)
		}
		r := open(t, copied, Options{})
		checkDisk(t, r, p2.ID, second)
	})
}

// The index loses entries at random, as a loss of power can make it.
func TestIndexLosesEntries(t *testing.T) {
	t.Parallel()
	r := open(t, create(t, CreateOptions{}), Options{})
	c := numbers(1, 100)
	p := mustBackup(t, r, "vm", c)
	if err := r.appender.finish(); err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(3, 4))
	err := r.index.write(func(w indexWrite) error {
		for _, n := range c {
			if rng.IntN(2) == 0 {
				if err := w.remove(r.ID(chunkOf(n))); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	got, err := r.Collect(t.Context(), CollectOptions{})
	if err != nil || got.DeadChunks != 0 {
		t.Errorf("collect: got %+v, %v, want nothing dead", got, err)
	}
	checkDisk(t, r, p.ID, c)
}

// An index whose files a kill left unfinished, or that rotted, is made anew
// when the repository is opened.
func TestIndexDoesNotOpen(t *testing.T) {
	t.Parallel()
	dir := create(t, CreateOptions{})
	r := open(t, dir, Options{})
	want := numbers(1, 300)
	p := mustBackup(t, r, "vm", want)
	closeOnce(t, r)
	for _, tt := range []struct {
		name, file string
		content    []byte
	}{
		{"value log without bytes", "000099.vlog", nil},
		{"garbage manifest", "MANIFEST", []byte("not a manifest at all")},
		{"empty key registry", "KEYREGISTRY", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			dir := crash(t, dir)
			if err := os.WriteFile(filepath.Join(dir, indexDir, tt.file), tt.content, 0o600); err != nil {
				t.Fatal(err)
			}
			r := open(t, dir, Options{})
			checkDisk(t, r, p.ID, want)
			mustBackup(t, r, "vm", numbers(200, 300))
			checkSound(t, r)
		})
	}
}
