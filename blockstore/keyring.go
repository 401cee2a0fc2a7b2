package blockstore

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"filippo.io/age"
)

// KeyKind says what opens a wrapped key.
type KeyKind string

// The kinds of keys.
const (
	PassphraseKey KeyKind = "passphrase"
	RecipientKey  KeyKind = "recipient" // an age identity
)

// Key is one of the keys that open an encrypted repository.
type Key struct {
	ID        string    `json:"id"` // 8 hexadecimal digits
	Kind      KeyKind   `json:"kind"`
	Label     string    `json:"label"`
	Created   time.Time `json:"created"`
	Recipient string    `json:"recipient,omitempty"` // the public key, in age's notation
	// Current says that this one opened the repository.
	Current bool `json:"current"`
}

// AddedKey is a key that was just made.
type AddedKey struct {
	Key
	// Verified says that it was opened before it was written. One for a recipient
	// whose identity is not at hand can't be.
	Verified bool `json:"verified"`
}

// NewKey is what shall open the repository: a passphrase or a recipient.
type NewKey struct {
	Passphrase string
	Recipient  string // a public key in age's notation, "age1…"
	// Label is for people, up to MaxLabel bytes without control characters. It is not
	// encrypted.
	Label string
	// Identities may fit the recipient: then the new key is tried with them before it
	// is written.
	Identities []age.Identity

	// workFactor is log2 of scrypt's N; 0 is scryptWork. Tests can't wait that long.
	workFactor int
}

// Limits of the keys of a repository.
const (
	MaxKeys  = 64
	MaxLabel = 64 // bytes

	maxWrapped   = 4 << 10 // bytes of an age file
	maxRecipient = 4 << 10 // bytes
)

// Errors of changing keys.
var (
	// ErrNotEncrypted means that the repository has no keys, nor ever will.
	ErrNotEncrypted = errors.New("the repository is not encrypted, which is chosen when it is made")
	// ErrLastKey means that nobody could open the repository any more.
	ErrLastKey = errors.New("this is the last key, without which nobody can open the repository; add another first, or rotate it")
	// ErrKeyExists means that a recipient has a key already.
	ErrKeyExists = errors.New("the recipient has a key already")
)

// Keys returns the keys that open the repository, none if it is not encrypted.
func (r *Repository) Keys() []Key {
	r.configMu.Lock()
	defer r.configMu.Unlock()
	out := make([]Key, len(r.config.Keys))
	for i, w := range r.config.Keys {
		out[i] = w.key()
		out[i].Current = w.ID == r.openedBy
	}
	return out
}

// AddKey has one more key open the repository. It is durable when AddKey returns nil; after
// an error it may be there or not.
func (r *Repository) AddKey(n NewKey) (AddedKey, error) {
	return r.addKey(n, func(c *config, w wrappedKey) (err error) {
		c.Keys, err = insertKey(c.Keys, len(c.Keys), w)
		return err
	})
}

// RotateKey puts a new key in the place of another, in one step. Without a
// label the new one has that of the old.
func (r *Repository) RotateKey(id string, n NewKey) (AddedKey, error) {
	if n.Label == "" {
		for _, k := range r.Keys() {
			if k.ID == id {
				n.Label = k.Label
			}
		}
	}
	return r.addKey(n, func(c *config, w wrappedKey) error {
		i, err := findKey(c.Keys, id)
		if err != nil {
			return err
		}
		c.Keys, err = insertKey(slices.Delete(c.Keys, i, i+1), i, w)
		return err
	})
}

// RemoveKey removes a key, but not the last. When it returns nil, no file of the
// repository has it any more; a copy of repository.json from before still is
// opened by it, and the data are encrypted as they were.
func (r *Repository) RemoveKey(id string) error {
	if r.keys == nil {
		return ErrNotEncrypted
	}
	return r.changeConfig(func(c *config) error {
		i, err := findKey(c.Keys, id)
		if err == nil && len(c.Keys) == 1 {
			err = fmt.Errorf("remove key %s: %w", id, ErrLastKey)
		}
		if err == nil {
			c.Keys = slices.Delete(c.Keys, i, i+1)
		}
		return err
	})
}

// addKey wraps the repository key and has enter put it into the configuration.
func (r *Repository) addKey(n NewKey, enter func(*config, wrappedKey) error) (AddedKey, error) {
	if r.keys == nil {
		return AddedKey{}, ErrNotEncrypted
	}
	w, verified, err := r.keys.wrap(n)
	if err != nil {
		return AddedKey{}, err
	}
	err = r.changeConfig(func(c *config) error { return enter(c, w) })
	return AddedKey{Key: w.key(), Verified: verified}, err
}

func findKey(list []wrappedKey, id string) (int, error) {
	i := slices.IndexFunc(list, func(w wrappedKey) bool { return w.ID == id })
	if i < 0 {
		return i, fmt.Errorf("key %q: %w; key list shows those that are there", id, ErrNotFound)
	}
	return i, nil
}

// insertKey puts a new key into a list, under an id that no other has.
func insertKey(list []wrappedKey, at int, w wrappedKey) ([]wrappedKey, error) {
	if len(list) >= MaxKeys {
		return nil, fmt.Errorf("the repository has %d keys already, the most it may have; remove one first", len(list))
	}
	for _, other := range list {
		if w.Recipient != "" && other.Recipient == w.Recipient {
			return nil, fmt.Errorf("key %s: %w", other.ID, ErrKeyExists)
		}
		if other.ID == w.ID {
			return nil, fmt.Errorf("the random id %s is taken; try again", w.ID)
		}
	}
	return slices.Insert(list, at, w), nil
}
