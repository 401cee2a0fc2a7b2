package blockstore

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/rand"
	"encoding/binary"

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

// sameMAC compares two authenticators in constant time.
func sameMAC(a, b []byte) bool { return hmac.Equal(a, b) }
