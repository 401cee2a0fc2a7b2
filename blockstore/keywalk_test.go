package blockstore

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"testing"

	"filippo.io/age"

	"github.com/holdfast-backup/holdfast/internal/durable"
	"github.com/holdfast-backup/holdfast/internal/faultfs"
)

// keyWalk is one change of keys that is stopped at every operation.
type keyWalk struct {
	name   string
	before []age.Identity // whose keys there are at first; none: nothing is there
	do     func(dir string, fs durable.FS) error
	always []age.Identity // open it whatever happens
	old    age.Identity   // opens it unless the change was made
	added  age.Identity   // opens it only if the change was made
}

// configOf opens the configuration alone.
func configOf(dir string, fs durable.FS, id age.Identity) (*Repository, error) {
	r := &Repository{dir: dir, fs: fs, log: slog.New(slog.DiscardHandler)}
	return r, r.loadConfig(Options{Identities: []age.Identity{id}})
}

// changeKeys returns a change that a holder of a key makes.
func changeKeys(by age.Identity, change func(r *Repository) error) func(string, durable.FS) error {
	return func(dir string, fs durable.FS) error {
		r, err := configOf(dir, fs, by)
		if err != nil {
			return err
		}
		return change(r)
	}
}

func createFor(dir string, fs durable.FS, ids ...age.Identity) error {
	o := CreateOptions{ChunkSize: testChunk, fs: fs}
	for _, id := range ids {
		o.Recipients = append(o.Recipients, publicKey(id))
	}
	return Create(dir, o)
}

func publicKey(id age.Identity) string { return id.(*age.X25519Identity).Recipient().String() }

// At every operation of init, add, remove and rotate the disk fails, once or from there, or
// the process is killed; then power is lost or not. Always one whole configuration opens: the
// old or the new, the new if it was acknowledged.
func TestKeyWalk(t *testing.T) {
	t.Parallel()
	a, b, c := newIdentity(t), newIdentity(t), newIdentity(t)
	keyOf := func(r *Repository, id age.Identity) string {
		for _, k := range r.Keys() {
			if k.Recipient == publicKey(id) {
				return k.ID
			}
		}
		return ""
	}
	rotate := func(r *Repository) error {
		_, err := r.RotateKey(keyOf(r, b), NewKey{Recipient: publicKey(c)})
		return err
	}
	for _, w := range []keyWalk{
		{name: "init", do: func(dir string, fs durable.FS) error { return createFor(dir, fs, c) }, added: c},
		{name: "add", before: []age.Identity{a}, always: []age.Identity{a}, added: c, do: changeKeys(a, func(r *Repository) error {
			_, err := r.AddKey(NewKey{Recipient: publicKey(c)})
			return err
		})},
		{name: "remove", before: []age.Identity{a, b}, always: []age.Identity{a}, old: b, do: changeKeys(a, func(r *Repository) error {
			return r.RemoveKey(keyOf(r, b))
		})},
		{name: "rotate", before: []age.Identity{a, b}, always: []age.Identity{a}, old: b, added: c, do: changeKeys(a, rotate)},
		{name: "rotate the last", before: []age.Identity{b}, old: b, added: c, do: changeKeys(b, rotate)},
	} {
		for _, fault := range []faultfs.Fault{{}, {Forever: true}, {Kill: true, Effect: faultfs.Whole}} {
			t.Run(fmt.Sprintf("%s %+v", w.name, fault), func(t *testing.T) {
				t.Parallel()
				dir := t.TempDir() // for the lock
				before := faultfs.New(dir)
				if len(w.before) > 0 {
					mustDo(t, createFor(dir, before, w.before...))
				}
				for fault.N = 1; ; fault.N++ {
					if !w.step(t, dir, before.PowerLoss(faultfs.LoseNothing), fault) || t.Failed() {
						break
					}
				}
				if fault.N < 5 {
					t.Errorf("only %d operations", fault.N)
				}
			})
		}
	}
}

// step runs the change with one fault and reports whether that happened.
func (w keyWalk) step(t *testing.T, dir string, fs *faultfs.FS, fault faultfs.Fault) bool {
	t.Helper()
	fs.Fail(fault)
	err := w.do(dir, fs)
	hit := fs.Hit()
	fs.Fail(faultfs.Fault{})
	for _, loss := range []faultfs.Loss{faultfs.LoseAll, faultfs.LoseNothing, faultfs.Loss(fault.N)} {
		w.check(t, fmt.Sprintf("%v at %d, loss %d", err, fault.N, loss), dir, fs.PowerLoss(loss), err == nil)
	}
	w.check(t, fmt.Sprintf("%v at %d", err, fault.N), dir, fs, err == nil)
	return hit
}

// check opens what is left, and again after another loss of power.
func (w keyWalk) check(t *testing.T, when, dir string, fs *faultfs.FS, acked bool) {
	t.Helper()
	old, added := w.open(t, when, dir, fs)
	switch {
	case acked && (old || w.added != nil && !added):
		t.Errorf("%s: acknowledged, and the old key is there: %v, the new one: %v", when, old, added)
	case w.old != nil && w.added != nil && old == added:
		t.Errorf("%s: the old and the new key are there: %v", when, old)
	case len(w.before) == 0 && !added:
		mustDo(t, w.do(dir, fs)) // can be run again
		if _, added = w.open(t, when, dir, fs); !added {
			t.Errorf("%s: run again, it left no repository", when)
		}
	}
	if a, b := w.open(t, when, dir, fs.PowerLoss(faultfs.LoseAll)); a != old || b != added {
		t.Errorf("%s: the old and the new key are there: %v, %v, and after a loss of power %v, %v", when, old, added, a, b)
	}
}

// open opens the repository with a key that must be there, and tells which of the others are.
// Without any it is no repository.
func (w keyWalk) open(t *testing.T, when, dir string, fs durable.FS) (old, added bool) {
	t.Helper()
	who := w.always
	if len(who) == 0 {
		who = slices.DeleteFunc([]age.Identity{w.old, w.added}, func(id age.Identity) bool { return id == nil })
	}
	r := &Repository{dir: dir, fs: fs, log: slog.New(slog.DiscardHandler)}
	err := r.loadConfig(Options{Identities: who})
	if len(w.before) == 0 && errors.Is(err, ErrNotRepository) {
		return false, false
	}
	if err != nil {
		t.Errorf("%s: got %v", when, err)
		return false, false
	}
	if got := r.checkConfig(); len(got) > 0 {
		t.Errorf("%s: the files differ after opening: %v", when, got)
	}
	for _, k := range r.Keys() {
		old = old || w.old != nil && k.Recipient == publicKey(w.old)
		added = added || w.added != nil && k.Recipient == publicKey(w.added)
	}
	return old, added
}
