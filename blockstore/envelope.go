package blockstore

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"github.com/zeebo/blake3"
)

// An envelope is what a small file is kept in whose loss would cost much: header and
// payload, twice. See the package comment.
const (
	envelopeHeaderSize = 40
	envelopeEncrypted  = 1 << 0
	// envelopeAlign is where a copy begins: no copy shares a sector, or a page of flash
	// memory, with the other.
	envelopeAlign = 4 << 10
	maxEnvelope   = 64 << 20 // of a copy
	// maxEnvelopeFile bounds the file.
	maxEnvelopeFile = 2 * maxEnvelope
)

// envelopeKind is what an envelope holds.
type envelopeKind struct {
	magic   string // 8 bytes
	context string // of the keys
}

// sealer writes and reads the envelopes of one repository.
type sealer struct {
	keys *keys // nil if it is not encrypted
	repo [16]byte
}

// errForged means that the bytes are as they were written, but not by this repository.
var errForged = errors.New("it was changed by somebody without the key, or is another's")

// encode returns the content of the file of a name.
func (s sealer) encode(kind envelopeKind, name string, payload []byte) ([]byte, error) {
	var flags uint16
	var salt [16]byte
	if s.keys != nil {
		flags |= envelopeEncrypted
		_, _ = rand.Read(salt[:]) // crypto/rand never fails
		aead, err := s.keys.seal(kind.context, salt[:])
		if err != nil {
			return nil, err
		}
		payload = aead.Seal(nil, nonce(0), payload, s.associated(name))
	} else {
		salt = s.sum(name, payload)
	}
	if len(payload) > maxEnvelope-envelopeHeaderSize {
		return nil, fmt.Errorf("%d bytes are more than the %d that one file can hold", len(payload), maxEnvelope-envelopeHeaderSize)
	}
	b := make([]byte, 0, envelopeHeaderSize+len(payload))
	b = append(b, kind.magic...)
	b = binary.LittleEndian.AppendUint16(b, formatVersion)
	b = binary.LittleEndian.AppendUint16(b, flags)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(payload)))
	b = append(b, salt[:]...)
	b = append(b, 0, 0, 0, 0)
	crc := crc32.Update(crc32.Checksum(b, castagnoli), castagnoli, payload)
	b = binary.LittleEndian.AppendUint32(b, crc)
	return twice(append(b, payload...)), nil
}

// associated returns what is authenticated beside a payload: a file under another's
// name, or in another repository, is not right.
func (s sealer) associated(name string) []byte { return append(s.repo[:], name...) }

// sum returns what stands for the authentication in a repository that is not encrypted. It
// tells damage, and files of other repositories, and nothing of who wrote it.
func (s sealer) sum(name string, payload []byte) [16]byte {
	h := blake3.New()
	_, _ = h.Write(binary.LittleEndian.AppendUint32(nil, uint32(len(name))))
	_, _ = h.Write(s.associated(name))
	_, _ = h.Write(payload)
	return [16]byte(h.Sum(nil))
}

// alignUp returns where the second copy begins behind a first of n bytes.
func alignUp(n int) int { return (n + envelopeAlign - 1) / envelopeAlign * envelopeAlign }

// twice returns the content of a file that holds one copy twice.
func twice(one []byte) []byte {
	second := alignUp(len(one))
	b := make([]byte, second+len(one))
	copy(b, one)
	copy(b[second:], one)
	return b
}

// contents is what an envelope held.
type contents struct {
	payload []byte
	one     []byte // the copy that it is from: twice(one) is the file as it should be
	// worn means that the file is not that, and should be written anew.
	worn bool
}

// decode reads the content of the file of a name. One right copy is enough.
func (s sealer) decode(kind envelopeKind, name string, data []byte) (contents, error) {
	// The length of the first copy tells where the second begins, or that of the file.
	places := []int{0, alignUp(len(data) / 2)}
	if n, err := copyLength(kind, data); err == nil {
		places = append(places, alignUp(n))
	}
	var failed error
	for _, at := range places {
		if at > len(data) {
			continue
		}
		payload, one, err := s.open(kind, name, data[at:])
		if err == nil {
			return contents{payload, one, !bytes.Equal(data, twice(one))}, nil
		}
		if failed == nil || errors.Is(err, errForged) {
			failed = err
		}
	}
	return contents{}, failed
}

// copyLength returns the length of the copy that data begins with, as its header says.
func copyLength(kind envelopeKind, data []byte) (int, error) {
	if len(data) < envelopeHeaderSize || string(data[:8]) != kind.magic {
		return 0, errors.New("it does not begin as such a file does")
	}
	n := int64(binary.LittleEndian.Uint32(data[12:]))
	if n > maxEnvelope-envelopeHeaderSize {
		return 0, fmt.Errorf("its header speaks of %d bytes, more than there may be", n)
	}
	return envelopeHeaderSize + int(n), nil
}

// open reads the copy that data begins with.
func (s sealer) open(kind envelopeKind, name string, data []byte) (payload, one []byte, err error) {
	n, err := copyLength(kind, data)
	if err != nil {
		return nil, nil, err
	}
	if n > len(data) {
		return nil, nil, errors.New("it is cut short")
	}
	one = data[:n]
	payload = one[envelopeHeaderSize:]
	if crc32.Update(crc32.Checksum(one[:36], castagnoli), castagnoli, payload) != binary.LittleEndian.Uint32(one[36:]) {
		return nil, nil, errCRC
	}
	if v := binary.LittleEndian.Uint16(one[8:]); v != formatVersion {
		return nil, nil, fmt.Errorf("it has format %d, this program reads %d", v, formatVersion)
	}
	if binary.LittleEndian.Uint32(one[32:]) != 0 {
		return nil, nil, errors.New("there is something where nothing should be")
	}
	flags, salt := binary.LittleEndian.Uint16(one[10:]), [16]byte(one[16:32])
	if flags&^envelopeEncrypted != 0 || (flags&envelopeEncrypted != 0) != (s.keys != nil) {
		return nil, nil, fmt.Errorf("%w: its flags %#x do not fit this repository", errForged, flags)
	}
	if s.keys == nil {
		if s.sum(name, payload) != salt {
			return nil, nil, errForged
		}
		return payload, one, nil
	}
	aead, err := s.keys.seal(kind.context, salt[:])
	if err != nil {
		return nil, nil, err
	}
	if payload, err = aead.Open(nil, nonce(0), payload, s.associated(name)); err != nil {
		return nil, nil, errForged
	}
	return payload, one, nil
}
