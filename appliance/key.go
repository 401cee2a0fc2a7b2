package appliance

import (
	"errors"
	"fmt"

	"github.com/holdfast-backup/holdfast/blockstore"
)

// Keys of the repository.
type (
	// Key is one of the keys that open the repository.
	Key = blockstore.Key
	// AddedKey is a key that was just made.
	AddedKey = blockstore.AddedKey
)

// NewKey is what shall open the repository: exactly one of a passphrase and a
// recipient.
type NewKey struct {
	// PassphraseFile names the file with the passphrase (a newline at its end is not part of it).
	PassphraseFile string
	Recipient      string // an age public key, "age1…"
	Label          string // for people, up to 64 bytes; not encrypted
}

// store returns the new key for the blockstore.
func (n NewKey) store(a *Appliance) (blockstore.NewKey, error) {
	if (n.PassphraseFile == "") == (n.Recipient == "") {
		return blockstore.NewKey{}, invalid("a new key is a passphrase or a recipient; name one")
	}
	key := blockstore.NewKey{Recipient: n.Recipient, Label: n.Label, Identities: a.identities}
	if n.PassphraseFile != "" {
		var err error
		if key.Passphrase, err = readPassphrase(n.PassphraseFile); err != nil {
			return key, err
		}
	}
	if err := key.Check(); err != nil {
		return key, &kindError{err.Error(), errInvalid}
	}
	return key, nil
}

// Keys returns the keys that open the repository, none if it is not encrypted.
func (a *Appliance) Keys() []Key { return a.repo.Keys() }

// AddKey has one more key open the repository, durably. If an identity that
// opened the data folder fits a new recipient, or for a passphrase, the key is tried before it is
// written.
func (a *Appliance) AddKey(n NewKey) (AddedKey, error) {
	key, err := n.store(a)
	if err != nil {
		return AddedKey{}, err
	}
	added, err := a.repo.AddKey(key)
	if err != nil {
		return added, fmt.Errorf("add a key to %s: %w", a.dir, err)
	}
	return added, nil
}

// RotateKey puts a new key in the place of another, in one durable step. Without
// a label the new one has that of the old.
func (a *Appliance) RotateKey(id string, n NewKey) (AddedKey, error) {
	key, err := n.store(a)
	if err != nil {
		return AddedKey{}, err
	}
	added, err := a.repo.RotateKey(id, key)
	if err != nil {
		return added, fmt.Errorf("rotate a key of %s: %w", a.dir, err)
	}
	return added, nil
}

// RemovedKey names a key that was removed.
type RemovedKey struct {
	ID string `json:"id"`
}

// RemoveKey removes a key, durably, but not the last.
func (a *Appliance) RemoveKey(id string) (RemovedKey, error) {
	err := a.repo.RemoveKey(id)
	if err == nil {
		return RemovedKey{id}, nil
	}
	if !errors.Is(err, blockstore.ErrLastKey) {
		err = fmt.Errorf("remove a key of %s: %w", a.dir, err)
	}
	return RemovedKey{}, err
}
