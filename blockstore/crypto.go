package blockstore

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"filippo.io/age"
	"github.com/zeebo/blake3"
)

const (
	keySize = 32
	// sealOverhead is what AES-256-GCM adds to a payload: its tag.
	sealOverhead = 16
)

// Contexts of the keys that are derived from the repository key. Source:
// BLAKE3 paper, section 2.3, mode derive_key.
const (
	contextIDs     = "holdfast repository format 1: chunk ids"
	contextNodes   = "holdfast repository format 1: map node ids"
	contextSegment = "holdfast repository format 1: segment"
	contextPoint   = "holdfast repository format 1: restore point"
	contextConfig  = "holdfast repository format 1: repository.json"
)

// keys derives every key of a repository from its one secret. A nil *keys is
// that of a repository that is not encrypted.
type keys struct {
	master [keySize]byte
}

func newKeys() *keys {
	k := &keys{}
	_, _ = rand.Read(k.master[:]) // crypto/rand never fails: see its documentation
	return k
}

// derive returns the key for a purpose and a salt (which may be nil).
func (k *keys) derive(context string, salt []byte) []byte {
	out := make([]byte, keySize)
	blake3.DeriveKey(context, append(bytes.Clone(k.master[:]), salt...), out)
	return out
}

// seal returns the cipher for one segment or one point file, whose random
// salt makes the key its own.
func (k *keys) seal(context string, salt []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(k.derive(context, salt))
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

// nonce returns the nonce of the n-th message under a key. In a segment n is the
// record's offset: offsets only grow, and a segment that was recovered after a
// crash is sealed and not written again, so no n is used twice.
func nonce(n int64) []byte {
	b := make([]byte, 12)
	binary.LittleEndian.PutUint64(b, uint64(n))
	return b
}

// authenticate returns a checksum over data that only a holder of the key can
// make.
func (k *keys) authenticate(context string, data []byte) []byte {
	h, err := blake3.NewKeyed(k.derive(context, nil))
	if err != nil {
		panic("blockstore: internal error: " + err.Error())
	}
	_, _ = h.Write(data)
	return h.Sum(nil)
}

// wrappedKey is the repository key, encrypted for one passphrase or one
// recipient as an age file (age-encryption.org/v1).
type wrappedKey struct {
	Kind string `json:"kind"` // "passphrase" or "recipient"
	Age  []byte `json:"age"`
}

// wrap encrypts the repository key for a passphrase and for each recipient, in
// age's notation ("age1…").
func (k *keys) wrap(o CreateOptions) ([]wrappedKey, error) {
	var out []wrappedKey
	add := func(kind string, r age.Recipient) error {
		var b bytes.Buffer
		w, err := age.Encrypt(&b, r)
		if err != nil {
			return err
		}
		if _, err := w.Write(k.master[:]); err != nil {
			return err
		}
		if err := w.Close(); err != nil {
			return err
		}
		out = append(out, wrappedKey{kind, b.Bytes()})
		return nil
	}
	if o.Passphrase != "" {
		r, err := age.NewScryptRecipient(o.Passphrase)
		if err != nil {
			return nil, err
		}
		if o.workFactor != 0 {
			r.SetWorkFactor(o.workFactor)
		}
		if err := add("passphrase", r); err != nil {
			return nil, err
		}
	}
	for _, s := range o.Recipients {
		r, err := age.ParseX25519Recipient(s)
		if err != nil {
			return nil, fmt.Errorf("recipient %q: %w", s, err)
		}
		if err := add("recipient", r); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// unwrap opens the repository key with whatever of the options fits.
func unwrap(wrapped []wrappedKey, o Options) (*keys, error) {
	identities := o.Identities
	if o.Passphrase != "" {
		id, err := age.NewScryptIdentity(o.Passphrase)
		if err != nil {
			return nil, err
		}
		identities = append([]age.Identity{id}, identities...)
	}
	if len(identities) == 0 {
		return nil, fmt.Errorf("%w: give its passphrase or identity", ErrWrongKey)
	}
	failure := ErrWrongKey
	for i, w := range wrapped {
		k := &keys{}
		r, err := age.Decrypt(bytes.NewReader(w.Age), identities...)
		if err == nil {
			_, err = io.ReadFull(r, k.master[:])
		}
		if err == nil {
			return k, nil
		}
		if _, no := errors.AsType[*age.NoIdentityMatchError](err); !no {
			failure = fmt.Errorf("%w; wrapped key %d: %w", failure, i+1, err) // another may open it
		}
	}
	return nil, failure
}

// sameMAC compares two authenticators in constant time.
func sameMAC(a, b []byte) bool { return hmac.Equal(a, b) }
