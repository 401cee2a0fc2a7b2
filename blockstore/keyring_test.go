package blockstore

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"filippo.io/age"

	"github.com/holdfast-backup/holdfast/internal/durable"
)

func newIdentity(t testing.TB) *age.X25519Identity {
	t.Helper()
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// opens reports whether a repository's folder opens with the options.
func opens(t testing.TB, dir string, o Options) bool {
	t.Helper()
	r := &Repository{dir: dir}
	o, err := o.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	r.fs, r.log = o.fs, o.Log
	if err := r.loadConfig(o); err != nil && !errors.Is(err, ErrWrongKey) {
		t.Errorf("got %v, want %v or none", err, ErrWrongKey)
	} else if err != nil {
		return false
	}
	return true
}

// Keys are added, rotated and removed; the disks stay as they are.
func TestKeys(t *testing.T) {
	t.Parallel()
	alice, bob := newIdentity(t), newIdentity(t)
	hybrid, err := age.GenerateHybridIdentity()
	if err != nil {
		t.Fatal(err)
	}
	dir := create(t, CreateOptions{Passphrase: "first"})
	r := open(t, dir, Options{Passphrase: "first"})
	p := mustBackup(t, r, "vm", numbers(1, 5))
	first := r.Keys()
	if len(first) != 1 || first[0].Kind != PassphraseKey || !first[0].Current || len(first[0].ID) != 8 || first[0].Created.IsZero() {
		t.Fatalf("keys of a new repository: got %+v", first)
	}
	add := func(n NewKey, verified bool) AddedKey {
		t.Helper()
		n.workFactor = 8
		k, err := r.AddKey(n)
		if err != nil || k.Verified != verified || k.Label != n.Label || k.Recipient != n.Recipient {
			t.Errorf("add: got %+v, %v, want verified %v", k, err, verified)
		}
		return k
	}
	a := add(NewKey{Recipient: alice.Recipient().String(), Label: "alice’s token"}, false)
	b := add(NewKey{Recipient: bob.Recipient().String(), Identities: []age.Identity{alice, bob}}, true)
	add(NewKey{Recipient: hybrid.Recipient().String(), Identities: []age.Identity{hybrid}}, true)
	second := add(NewKey{Passphrase: "second"}, true)
	third, err := r.RotateKey(second.ID, NewKey{Passphrase: "third", workFactor: 8})
	if err != nil || third.ID == second.ID {
		t.Errorf("rotate: got %+v, %v", third, err)
	}
	if k, err := r.RotateKey(a.ID, NewKey{Recipient: alice.Recipient().String()}); err != nil || k.Label != a.Label {
		t.Errorf("rotate to the same recipient: got %+v, %v, want the label to stay", k, err)
	}
	for _, id := range []string{first[0].ID, b.ID} {
		if err := r.RemoveKey(id); err != nil {
			t.Error(err)
		}
	}
	want := r.Keys()
	closeOnce(t, r)
	for _, tt := range []struct {
		name string
		o    Options
		want bool
	}{
		{"removed passphrase", Options{Passphrase: "first"}, false},
		{"rotated passphrase", Options{Passphrase: "second"}, false},
		{"removed recipient", Options{Identities: []age.Identity{bob}}, false},
		{"new passphrase", Options{Passphrase: "third"}, true},
		{"recipient", Options{Identities: []age.Identity{bob, alice}}, true},
		{"hybrid recipient", Options{Identities: []age.Identity{hybrid}}, true},
		{"wrong passphrase and recipient", Options{Passphrase: "first", Identities: []age.Identity{alice}}, true},
	} {
		if got := opens(t, dir, tt.o); got != tt.want {
			t.Errorf("%s: opens: got %v, want %v", tt.name, got, tt.want)
		}
	}
	r = open(t, dir, Options{Passphrase: "third"})
	got := r.Keys()
	for i := range want {
		want[i].Current = want[i].ID == third.ID
	}
	if !slices.Equal(got, want) {
		t.Errorf("keys after opening: got %+v, want %+v", got, want)
	}
	checkDisk(t, r, p.ID, numbers(1, 5))
	if got := r.checkConfig(); len(got) != 0 {
		t.Errorf("got problems %v", got)
	}
}

// A copy of repository.json that was kept elsewhere opens with a key that was removed since, also
// the data that were stored later; but not beside a newer one.
func TestKeptConfig(t *testing.T) {
	t.Parallel()
	mine, theirs := newIdentity(t), newIdentity(t)
	dir := create(t, CreateOptions{Recipients: []string{mine.Recipient().String()}})
	o := Options{Identities: []age.Identity{mine}}
	kept, err := os.ReadFile(filepath.Join(dir, configFile))
	mustDo(t, err)
	r := open(t, dir, o)
	if _, err := r.RotateKey(r.Keys()[0].ID, NewKey{Recipient: theirs.Recipient().String()}); err != nil {
		t.Fatal(err)
	}
	p := mustBackup(t, r, "vm", numbers(1, 5))
	closeOnce(t, r)
	mustDo(t, os.WriteFile(filepath.Join(dir, configFile), kept, 0o600))
	if opens(t, dir, o) {
		t.Error("the older of the two files counts")
	}
	for _, name := range configFiles {
		mustDo(t, os.WriteFile(filepath.Join(dir, name), kept, 0o600))
	}
	checkDisk(t, open(t, dir, o), p.ID, numbers(1, 5))
}

// What cannot be done to keys is refused, and changes nothing.
func TestKeysRefused(t *testing.T) {
	t.Parallel()
	alice := newIdentity(t)
	public := alice.Recipient().String()
	r := open(t, create(t, CreateOptions{Recipients: []string{public}}), Options{Identities: []age.Identity{alice}})
	before := r.Keys()
	id := before[0].ID
	for _, tt := range []struct {
		name string
		do   func() error
		want error // nil is any
		says string
	}{
		{"remove the last", func() error { return r.RemoveKey(id) }, ErrLastKey, "add another"},
		{"remove none", func() error { return r.RemoveKey("00000000") }, ErrNotFound, "00000000"},
		{"rotate none", func() error { _, err := r.RotateKey("00000000", NewKey{Passphrase: "x", workFactor: 8}); return err }, ErrNotFound, "00000000"},
		{"add twice", func() error { _, err := r.AddKey(NewKey{Recipient: public}); return err }, ErrKeyExists, id},
		{"add nothing", func() error { _, err := r.AddKey(NewKey{}); return err }, nil, "a passphrase or a recipient"},
		{"add both", func() error { _, err := r.AddKey(NewKey{Passphrase: "x", Recipient: public}); return err }, nil, "a passphrase or a recipient"},
		{"no recipient", func() error { _, err := r.AddKey(NewKey{Recipient: "age1nobody"}); return err }, nil, "age1nobody"},
		{"long label", func() error {
			_, err := r.AddKey(NewKey{Passphrase: "x", Label: strings.Repeat("x", MaxLabel+1)})
			return err
		}, nil, "label"},
		{"label of lines", func() error { _, err := r.AddKey(NewKey{Passphrase: "x", Label: "a\nb"}); return err }, nil, "label"},
	} {
		err := tt.do()
		if err == nil || tt.want != nil && !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s: got %v, want %v that says %q", tt.name, err, tt.want, tt.says)
		}
	}
	if got := r.Keys(); !slices.Equal(got, before) {
		t.Errorf("got keys %+v, want %+v", got, before)
	}
	for range MaxKeys - 1 {
		if _, err := r.AddKey(NewKey{Recipient: newIdentity(t).Recipient().String()}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := r.AddKey(NewKey{Recipient: newIdentity(t).Recipient().String()}); err == nil || !strings.Contains(err.Error(), "64 keys") {
		t.Errorf("one key too many: got %v", err)
	}
	if err := Create(filepath.Join(t.TempDir(), "x"), CreateOptions{Recipients: []string{public, public}}); !errors.Is(err, ErrKeyExists) {
		t.Errorf("init for a recipient twice: got %v, want %v", err, ErrKeyExists)
	}
	plain := open(t, create(t, CreateOptions{}), Options{})
	if _, err := plain.AddKey(NewKey{Passphrase: "x"}); !errors.Is(err, ErrNotEncrypted) {
		t.Errorf("a key for a plain repository: got %v, want %v", err, ErrNotEncrypted)
	}
	if err := plain.RemoveKey(id); !errors.Is(err, ErrNotEncrypted) {
		t.Errorf("no key of a plain repository: got %v, want %v", err, ErrNotEncrypted)
	}
}

// The error of a key that does not fit says what is wrong with it, in one line.
func TestWrongKey(t *testing.T) {
	t.Parallel()
	alice, bob := newIdentity(t), newIdentity(t)
	both := create(t, CreateOptions{Passphrase: "right", Recipients: []string{alice.Recipient().String()}})
	passphrase := create(t, CreateOptions{Passphrase: "right"})
	recipient := create(t, CreateOptions{Recipients: []string{alice.Recipient().String()}})
	plain := create(t, CreateOptions{})
	for _, tt := range []struct {
		dir  string
		o    Options
		says string
		is   error
	}{
		{both, Options{}, "none was given", ErrWrongKey},
		{both, Options{Passphrase: "wrong"}, "the passphrase is wrong", ErrWrongKey},
		{both, Options{Identities: []age.Identity{bob}}, "no identity given is one that opens it", ErrWrongKey},
		{both, Options{Passphrase: "wrong", Identities: []age.Identity{bob}}, "the passphrase is wrong, and no identity", ErrWrongKey},
		{passphrase, Options{Identities: []age.Identity{bob}}, "only a passphrase does", ErrWrongKey},
		{recipient, Options{Passphrase: "right"}, "only age identities do", ErrWrongKey},
		{plain, Options{Passphrase: "right"}, "nothing is encrypted", nil},
		{plain, Options{Identities: []age.Identity{bob}}, "nothing is encrypted", nil},
	} {
		_, err := Open(t.Context(), tt.dir, tt.o)
		if err == nil || !strings.Contains(err.Error(), tt.says) || strings.Contains(err.Error(), "\n") || tt.is != nil && !errors.Is(err, tt.is) {
			t.Errorf("got %v, want one line that says %q", err, tt.says)
		}
	}
	k := fixedKeys()
	w, _, err := k.wrap(NewKey{Passphrase: "secret", workFactor: 8})
	if err != nil {
		t.Fatal(err)
	}
	rotten := w
	rotten.ID, rotten.Age = "00000bad", slices.Clone(w.Age)
	rotten.Age[len(rotten.Age)-1] ^= 1
	if got, id, err := unwrap([]wrappedKey{rotten, w}, Options{Passphrase: "secret"}); err != nil || *got != *k || id != w.ID {
		t.Errorf("a rotten key before a good one: got %v", err)
	}
	if _, _, err := unwrap([]wrappedKey{rotten}, Options{Passphrase: "secret"}); !errors.Is(err, ErrWrongKey) || !strings.Contains(err.Error(), rotten.ID) {
		t.Errorf("a rotten key: got %v, want %v that names it", err, ErrWrongKey)
	}
	dear := w
	if dear.Age = []byte(strings.Replace(string(w.Age), " 8\n", " 19\n", 1)); string(dear.Age) == string(w.Age) {
		t.Fatal("the work factor is not where it was looked for")
	}
	if _, _, err := unwrap([]wrappedKey{dear}, Options{Passphrase: "secret"}); err == nil || !strings.Contains(err.Error(), "work factor too large") {
		t.Errorf("a key that costs twice what ours does: got %v, want a refusal", err)
	}
}

// rewrite changes a file of the configuration as somebody could who has no key.
func rewrite(t testing.TB, dir, name string, change func(*config)) {
	t.Helper()
	path := filepath.Join(dir, name)
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	c, err := decodeConfig(data)
	if err != nil {
		t.Fatal(err)
	}
	change(&c)
	if len(c.Keys) == 0 {
		c.MAC = nil
	}
	c.Checksum = c.checksum()
	if data, err = json.Marshal(c); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// One file of the two is enough; what is wrong with the other is told, and mended
// where that loses nothing.
func TestConfigCopies(t *testing.T) {
	t.Parallel()
	read := func(t *testing.T, dir, name string) string {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		return string(b)
	}
	for _, passphrase := range []string{"", "secret"} {
		for _, name := range configFiles {
			for _, tt := range []struct {
				name   string
				damage func(t *testing.T, path string)
				healed bool
			}{
				{"missing", func(t *testing.T, path string) { mustDo(t, os.Remove(path)) }, true},
				{"empty", func(t *testing.T, path string) { mustDo(t, os.Truncate(path, 0)) }, false},
				{"cut", func(t *testing.T, path string) { mustDo(t, os.Truncate(path, 100)) }, false},
				{"rotten", func(t *testing.T, path string) { flip(t, path, 60) }, false},
				{"large", func(t *testing.T, path string) { mustDo(t, os.Truncate(path, maxConfigFile+1)) }, false},
				{"a folder", func(t *testing.T, path string) { mustDo(t, os.Remove(path)); mustDo(t, os.Mkdir(path, 0o700)) }, false},
				{"plain", func(t *testing.T, path string) {
					rewrite(t, filepath.Dir(path), filepath.Base(path), func(c *config) { c.Keys, c.Revision = nil, c.Revision+1 })
				}, false},
			} {
				if tt.name == "plain" && passphrase == "" {
					continue
				}
				t.Run(fmt.Sprintf("%s %s, passphrase=%s", name, tt.name, passphrase), func(t *testing.T) {
					t.Parallel()
					dir := create(t, CreateOptions{Passphrase: passphrase})
					o := Options{Passphrase: passphrase}
					r := open(t, dir, o)
					p := mustBackup(t, r, "vm", numbers(1, 5))
					closeOnce(t, r)
					want := read(t, dir, configFile)
					if got := read(t, dir, configCopy); got != want {
						t.Errorf("the copy has %q, want %q", got, want)
					}
					tt.damage(t, filepath.Join(dir, name))
					r = open(t, dir, o)
					checkDisk(t, r, p.ID, numbers(1, 5))
					problems := r.checkConfig()
					if tt.healed != (len(problems) == 0) || !tt.healed && problems[0].File != name {
						t.Errorf("got problems %v, want none: %v", problems, tt.healed)
					}
					if tt.name == "a folder" {
						return // which nobody replaces by itself
					}
					mustDo(t, r.rewriteConfig(name))
					if got := read(t, dir, name); got != want {
						t.Errorf("%s has %q, want %q", name, got, want)
					}
				})
			}
		}
	}
}

func mustDo(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Without both files nothing opens, and nothing is made in their place.
func TestConfigLost(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name   string
		damage func(t *testing.T, path string)
		says   string
	}{
		{"gone", func(t *testing.T, path string) { mustDo(t, os.Remove(path)) }, "are gone; bring one back"},
		{"rotten", func(t *testing.T, path string) { flip(t, path, 60) }, "bring a copy"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			dir := create(t, CreateOptions{})
			r := open(t, dir, Options{})
			mustBackup(t, r, "vm", numbers(1, 5))
			closeOnce(t, r)
			for _, name := range configFiles {
				tt.damage(t, filepath.Join(dir, name))
			}
			if _, err := Open(t.Context(), dir, Options{}); err == nil || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("open: got %v, want %q", err, tt.says)
			}
			if err := Create(dir, CreateOptions{}); !errors.Is(err, ErrExists) {
				t.Errorf("init: got %v, want %v", err, ErrExists)
			}
		})
	}
}

// failingFS fails to write one file.
type failingFS struct {
	durable.FS
	name string
}

func (f *failingFS) Rename(from, to string) error {
	if filepath.Base(to) == f.name {
		return os.ErrPermission
	}
	return f.FS.Rename(from, to)
}

// A change that reaches one file is told to be uncertain, nothing else is changed before
// the next opening, and that makes it count in both.
func TestChangeHalfMade(t *testing.T) {
	t.Parallel()
	dir := create(t, CreateOptions{Passphrase: "old"})
	fs := &failingFS{FS: durable.OS(), name: configCopy}
	r := open(t, dir, Options{Passphrase: "old", fs: fs})
	id := r.Keys()[0].ID
	if _, err := r.RotateKey(id, NewKey{Passphrase: "new", workFactor: 8}); !errors.Is(err, os.ErrPermission) || !strings.Contains(err.Error(), "next opening") {
		t.Errorf("rotate: got %v", err)
	}
	fs.name = ""
	if _, err := r.AddKey(NewKey{Passphrase: "more", workFactor: 8}); err == nil || !strings.Contains(err.Error(), "open the repository again") {
		t.Errorf("add: got %v, want a refusal", err)
	}
	if got := r.checkConfig(); len(got) != 1 || got[0].File != configFile {
		t.Errorf("got problems %v, want one of %s", got, configFile)
	}
	closeOnce(t, r)
	if opens(t, dir, Options{Passphrase: "old"}) {
		t.Error("the older file still counts")
	}
	r = open(t, dir, Options{Passphrase: "new"})
	if got := r.checkConfig(); len(got) != 0 {
		t.Errorf("got problems %v, want them healed", got)
	}
	mustDo(t, r.RemoveKey(addPassphrase(t, r, "more")))
}

// addPassphrase adds a passphrase and returns the id of its key.
func addPassphrase(t testing.TB, r *Repository, passphrase string) string {
	t.Helper()
	k, err := r.AddKey(NewKey{Passphrase: passphrase, workFactor: 8})
	mustDo(t, err)
	return k.ID
}
