package appliance_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"filippo.io/age"

	"github.com/holdfast-backup/holdfast/appliance"
	"github.com/holdfast-backup/holdfast/blockstore"
	"github.com/holdfast-backup/holdfast/fusefs"
)

func TestKindOf(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		err  error
		want appliance.Kind
	}{
		{errors.New("anything"), appliance.Failed},
		{blockstore.ErrNoSpace, appliance.Failed},
		{syscall.ENOSPC, appliance.Failed},
		{blockstore.ErrNotFound, appliance.NotFound},
		{&os.PathError{Op: "open", Path: "x", Err: syscall.ENOENT}, appliance.NotFound},
		{&blockstore.LockedError{Dir: "x", Holder: "y"}, appliance.Refused},
		{blockstore.ErrWrongKey, appliance.Refused},
		{blockstore.ErrNotEncrypted, appliance.Refused},
		{blockstore.ErrLastKey, appliance.Refused},
		{blockstore.ErrKeyExists, appliance.Refused},
		{&os.PathError{Op: "open", Path: "x", Err: syscall.EACCES}, appliance.Refused},
		{&os.PathError{Op: "open", Path: "x", Err: syscall.EROFS}, appliance.Refused},
		{&os.PathError{Op: "open", Path: "x", Err: syscall.EEXIST}, appliance.Refused},
		{fusefs.ErrBusy, appliance.Refused},
		// A segment that is gone is damage; nobody asked for it by name.
		{&blockstore.CorruptError{Err: os.ErrNotExist}, appliance.Failed},
		// A mount point whose parent is missing is not found rather than refused.
		{fmt.Errorf("%w: %w", fusefs.ErrMountPoint, os.ErrNotExist), appliance.NotFound},
	} {
		if got := appliance.KindOf(fmt.Errorf("outside: %w", tt.err)); got != tt.want {
			t.Errorf("%v: got kind %d, want %d", tt.err, got, tt.want)
		}
	}
}

func TestInit(t *testing.T) {
	t.Parallel()
	dir := newData(t)
	if _, err := appliance.Init(dir, appliance.InitOptions{}); appliance.KindOf(err) != appliance.Refused {
		t.Errorf("a second time: got %v, want it refused", err)
	}
	empty := write(t, "empty", []byte("\n"))
	for _, o := range []appliance.InitOptions{
		{ChunkSize: 100},
		{ChunkSize: 48 * kiB},
		{ChunkSize: 8 * miB},
		{ChunkSize: -chunk},
		{Recipients: []string{"age1nobody"}},
	} {
		fresh := filepath.Join(t.TempDir(), "data")
		if _, err := appliance.Init(fresh, o); appliance.KindOf(err) != appliance.Invalid {
			t.Errorf("%+v: got %v, want it invalid", o, err)
		}
	}
	fresh := filepath.Join(t.TempDir(), "data")
	if _, err := appliance.Init(fresh, appliance.InitOptions{PassphraseFile: empty}); err == nil || !strings.Contains(err.Error(), empty) {
		t.Errorf("an empty passphrase: got %v, want an error that names the file", err)
	}
	if _, err := os.Stat(fresh); err == nil {
		t.Errorf("an init that failed left %s", fresh)
	}
}

func TestKeys(t *testing.T) {
	t.Parallel()
	identity, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "data")
	created, err := appliance.Init(dir, appliance.InitOptions{
		PassphraseFile: write(t, "key", []byte("correct horse\n")), Recipients: []string{identity.Recipient().String()},
	})
	if err != nil || !created.Encrypted || created.ChunkSize != chunk || created.Data != dir {
		t.Fatalf("got %+v, %v, want an encrypted repository in %s with chunks of 64 KiB", created, err, dir)
	}
	other, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		o    appliance.Options
		want appliance.Kind
		ok   bool
	}{
		{"without the newline", appliance.Options{PassphraseFile: write(t, "key", []byte("correct horse"))}, 0, true},
		{"with a newline of Windows", appliance.Options{PassphraseFile: write(t, "key", []byte("correct horse\r\n"))}, 0, true},
		{"identity", appliance.Options{IdentityFile: write(t, "id", []byte("# mine\n"+identity.String()+"\n"))}, 0, true},
		{"no key", appliance.Options{}, appliance.Refused, false},
		{"wrong passphrase", appliance.Options{PassphraseFile: write(t, "key", []byte("correct horse \n"))}, appliance.Refused, false},
		{"wrong identity", appliance.Options{IdentityFile: write(t, "id", []byte(other.String()))}, appliance.Refused, false},
		{"missing file", appliance.Options{PassphraseFile: "/nonexistent/key"}, appliance.NotFound, false},
		{"no identity", appliance.Options{IdentityFile: write(t, "id", []byte("hello\n"))}, appliance.Failed, false},
	} {
		a, err := appliance.Open(t.Context(), dir, tt.o)
		if err == nil {
			err = a.Close()
		}
		if (err == nil) != tt.ok || err != nil && appliance.KindOf(err) != tt.want {
			t.Errorf("%s: got %v, want ok %v, kind %d", tt.name, err, tt.ok, tt.want)
		}
		if err != nil && strings.Contains(err.Error(), "AGE-SECRET") {
			t.Errorf("%s: the error tells the key: %v", tt.name, err)
		}
	}
}

func TestRebuildIndex(t *testing.T) {
	t.Parallel()
	dir := newData(t)
	a, err := appliance.Open(t.Context(), dir, appliance.Options{})
	if err != nil {
		t.Fatal(err)
	}
	backup(t, a, "web", write(t, "vda.raw", noise(miB, 1)))
	if _, err := appliance.RebuildIndex(t.Context(), dir, appliance.Options{}, nil); appliance.KindOf(err) != appliance.Refused {
		t.Errorf("while it is open: got %v, want it refused", err)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	var seen appliance.Progress
	r, err := appliance.RebuildIndex(t.Context(), dir, appliance.Options{}, func(p appliance.Progress) { seen = p })
	if err != nil || r.Chunks != miB/chunk {
		t.Errorf("got %+v, %v, want %d chunks", r, err, miB/chunk)
	}
	if seen.Unit != appliance.Segments || seen.Done == 0 || seen.Done != seen.Total {
		t.Errorf("got the last progress %+v, want it to end at its total", seen)
	}
}

func TestRepositoryWork(t *testing.T) {
	t.Parallel()
	a := open(t, newData(t))
	first := backup(t, a, "web", write(t, "vda.raw", noise(4*miB, 1)))
	backup(t, a, "web", write(t, "vda.raw", noise(4*miB, 2)))
	var seen appliance.Progress
	v, err := a.Verify(t.Context(), appliance.VerifyOptions{}, func(p appliance.Progress) { seen = p })
	if err != nil || len(v.Errors) != 0 || v.CheckedChunks < 8*miB/chunk {
		t.Errorf("verify: got %+v, %v, want all chunks read and no errors", v, err)
	}
	if seen.Unit != appliance.Bytes || seen.Done == 0 || seen.Done != seen.Total {
		t.Errorf("verify: got the last progress %+v, want it to end at its total", seen)
	}
	for _, percent := range []float64{0, -1, 101} {
		if _, err := a.Verify(t.Context(), appliance.VerifyOptions{Percent: percent}, nil); percent != 0 && appliance.KindOf(err) != appliance.Invalid {
			t.Errorf("verify %v percent: got %v, want it invalid", percent, err)
		}
		if _, err := a.Collect(t.Context(), appliance.CollectOptions{MaxUnusedPercent: percent}, nil); percent != 0 && appliance.KindOf(err) != appliance.Invalid {
			t.Errorf("collect with %v percent: got %v, want it invalid", percent, err)
		}
	}
	if _, err := a.DeletePoints(t.Context(), []string{first.Point}); err != nil {
		t.Fatal(err)
	}
	dry, err := a.Collect(t.Context(), appliance.CollectOptions{DryRun: true}, nil)
	if err != nil || dry.DeadChunks < 4*miB/chunk {
		t.Errorf("dry run: got %+v, %v, want the first point's chunks", dry, err)
	}
	before := a.Stats()
	if _, err := a.Collect(t.Context(), appliance.CollectOptions{}, nil); err != nil {
		t.Fatal(err)
	}
	if after := a.Stats(); before.StoredBytes-after.StoredBytes < 4*miB {
		t.Errorf("a collection: got %d, then %d stored bytes, want 4 MiB less", before.StoredBytes, after.StoredBytes)
	}
}
