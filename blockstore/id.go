package blockstore

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"sync"

	"github.com/zeebo/blake3"
)

// IDSize is the length of an [ID] in bytes.
const IDSize = 32

// ID names a chunk or a map node: the BLAKE3 hash of its plain bytes, keyed
// with a secret of the repository if that is encrypted. The zero ID, the null
// id, stands for a chunk of zeros or a subtree of them and is never stored.
type ID [IDSize]byte

// IsNull reports whether the id stands for zeros.
func (id ID) IsNull() bool { return id == ID{} }

func compareIDs(a, b ID) int { return bytes.Compare(a[:], b[:]) }

// String returns the id in hexadecimal.
func (id ID) String() string { return hex.EncodeToString(id[:]) }

// MarshalText writes the id in hexadecimal.
func (id ID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

// UnmarshalText reads 64 hexadecimal digits.
func (id *ID) UnmarshalText(text []byte) error {
	if len(text) != 2*IDSize {
		return fmt.Errorf("id of %d digits, want %d", len(text), 2*IDSize)
	}
	_, err := hex.Decode(id[:], text)
	return err
}

// hasher computes ids. It is safe for concurrent use.
type hasher struct {
	keyed *sync.Pool // of *blake3.Hasher; nil if the repository is not encrypted
}

// newHasher returns the hasher of an encrypted repository, or with a nil key
// (otherwise 32 bytes) that of a plain one.
func newHasher(key []byte) (*hasher, error) {
	if key == nil {
		return &hasher{}, nil
	}
	h, err := blake3.NewKeyed(key)
	if err != nil {
		return nil, fmt.Errorf("key for ids: %w", err)
	}
	return &hasher{keyed: &sync.Pool{New: func() any { return h.Clone() }}}, nil
}

func (h *hasher) sum(data []byte) ID {
	if h.keyed == nil {
		return blake3.Sum256(data)
	}
	k := h.keyed.Get().(*blake3.Hasher)
	defer h.keyed.Put(k)
	k.Reset()
	_, _ = k.Write(data) // a hash never fails to write
	var id ID
	k.Sum(id[:0])
	return id
}

// Errors for states that callers tell apart.
var (
	// ErrNotFound means that no point or disk has the name given.
	ErrNotFound = errors.New("not found")
	// ErrNotRepository means that the folder holds no repository.
	ErrNotRepository = errors.New("not a repository")
	// ErrExists means that a repository is there already.
	ErrExists = errors.New("a repository exists already")
	// ErrWrongKey means that the repository is encrypted and that no passphrase or
	// identity given opens it.
	ErrWrongKey = errors.New("the repository is encrypted and needs the right key")
	// ErrNoSpace means that the file system is so full that what is left is kept
	// for deleting points and collecting garbage.
	ErrNoSpace = errors.New("no space left for new data")
	// ErrDamaged is what every [CorruptError] is.
	ErrDamaged = errors.New("damaged data")
)

// LockedError means that another process has the repository open.
type LockedError struct {
	Dir    string // the repository's folder
	Holder string // what the other process wrote of itself: its number and name
}

func (e *LockedError) Error() string {
	return fmt.Sprintf("repository %s is in use by %s; wait for it or stop it", e.Dir, e.Holder)
}

// CorruptError says where stored bytes are not what they should be.
type CorruptError struct {
	ID      ID
	Segment string // the segment's file name; "" if no segment is known to hold the chunk
	Off     int64  // offset of the record in the segment, bytes
	Err     error
}

func (e *CorruptError) Error() string {
	switch {
	case e.Segment == "":
		return fmt.Sprintf("chunk %.16s: %v", e.ID, e.Err)
	case e.ID.IsNull():
		return fmt.Sprintf("segment %s at offset %d: %v", e.Segment, e.Off, e.Err)
	}
	return fmt.Sprintf("chunk %.16s in segment %s at offset %d: %v", e.ID, e.Segment, e.Off, e.Err)
}

// Unwrap returns the cause.
func (e *CorruptError) Unwrap() error { return e.Err }

// Is makes a CorruptError an ErrDamaged.
func (e *CorruptError) Is(target error) bool { return target == ErrDamaged }
