package blockstore

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"filippo.io/age"
)

// scryptWork is log2 of scrypt's N for passphrases: 256 MiB and about a second. A
// file that asks for more is refused: whoever can write repository.json shall not choose what
// opening it costs, which is MaxKeys times this at the most.
const scryptWork = 18

// wrappedKey is the repository key, encrypted for one passphrase or one
// recipient as an age file (age-encryption.org/v1).
type wrappedKey struct {
	ID        string    `json:"id"` // 8 hexadecimal digits
	Kind      KeyKind   `json:"kind"`
	Label     string    `json:"label,omitempty"`
	Created   time.Time `json:"created"`
	Recipient string    `json:"recipient,omitempty"` // of that kind: the public key
	Age       []byte    `json:"age"`
}

func (w wrappedKey) key() Key {
	return Key{ID: w.ID, Kind: w.Kind, Label: w.Label, Created: w.Created, Recipient: w.Recipient}
}

// checkWrapped checks what can be checked of a list of keys without opening one.
func checkWrapped(list []wrappedKey) error {
	if len(list) > MaxKeys {
		return fmt.Errorf("%d keys, more than %d", len(list), MaxKeys)
	}
	seen := map[string]bool{}
	for i, w := range list {
		id, err := hex.DecodeString(w.ID)
		switch {
		case err != nil || len(id) != 4 || strings.ToLower(w.ID) != w.ID || seen[w.ID]:
			return fmt.Errorf("key %d: id %q is not 8 hexadecimal digits of its own", i+1, w.ID)
		case w.Kind != PassphraseKey && w.Kind != RecipientKey:
			return fmt.Errorf("key %s: kind %q is unknown", w.ID, w.Kind)
		case (w.Recipient != "") != (w.Kind == RecipientKey) || len(w.Recipient) > maxRecipient:
			return fmt.Errorf("key %s: a recipient does not fit its kind", w.ID)
		case len(w.Age) == 0 || len(w.Age) > maxWrapped:
			return fmt.Errorf("key %s has %d bytes, want 1 to %d", w.ID, len(w.Age), maxWrapped)
		}
		if err := checkLabel(w.Label); err != nil {
			return fmt.Errorf("key %s: %w", w.ID, err)
		}
		seen[w.ID] = true
	}
	return nil
}

func checkLabel(label string) error {
	if label != "" && (!validName(label) || len(label) > MaxLabel) {
		return fmt.Errorf("label %q: want up to %d bytes without control characters", label, MaxLabel)
	}
	return nil
}

// Check reports what is wrong with a new key, without making one.
func (n NewKey) Check() error {
	if (n.Passphrase == "") == (n.Recipient == "") {
		return errors.New("a new key is a passphrase or a recipient")
	}
	if n.Recipient != "" {
		if _, err := parseRecipient(n.Recipient); err != nil {
			return err
		}
	}
	return checkLabel(n.Label)
}

// parseRecipient reads an age public key: X25519, or the hybrid with ML-KEM-768.
func parseRecipient(s string) (r age.Recipient, err error) {
	if strings.HasPrefix(s, "age1pq1") {
		r, err = age.ParseHybridRecipient(s)
	} else {
		r, err = age.ParseX25519Recipient(s)
	}
	if err != nil {
		return nil, fmt.Errorf("recipient %q: want an age public key such as age1…: %w", s, err)
	}
	return r, nil
}

// wrap encrypts the repository key for a passphrase or a recipient, and tries the result
// if it can.
func (k *keys) wrap(n NewKey) (w wrappedKey, verified bool, err error) {
	if err := n.Check(); err != nil {
		return w, false, err
	}
	var id [4]byte
	_, _ = rand.Read(id[:]) // crypto/rand never fails
	w = wrappedKey{ID: hex.EncodeToString(id[:]), Kind: RecipientKey, Label: n.Label, Created: now(), Recipient: n.Recipient}
	var recipient age.Recipient
	if n.Passphrase != "" {
		w.Kind = PassphraseKey
		r, err := age.NewScryptRecipient(n.Passphrase)
		if err != nil {
			return w, false, err
		}
		r.SetWorkFactor(scryptWork)
		if n.workFactor != 0 {
			r.SetWorkFactor(n.workFactor)
		}
		recipient = r
	} else if recipient, err = parseRecipient(n.Recipient); err != nil {
		return w, false, err
	}
	var b bytes.Buffer
	sealed, err := age.Encrypt(&b, recipient)
	if err != nil {
		return w, false, err
	}
	if _, err := sealed.Write(k.master[:]); err != nil {
		return w, false, err
	}
	if err := sealed.Close(); err != nil {
		return w, false, err
	}
	w.Age = b.Bytes()
	got, _, err := unwrap([]wrappedKey{w}, Options{Passphrase: n.Passphrase, Identities: n.Identities})
	if errors.Is(err, ErrWrongKey) && n.Recipient != "" {
		return w, false, nil // nobody here can try it
	}
	if err == nil && *got != *k {
		err = errors.New("another key came out")
	}
	if err != nil {
		return w, false, fmt.Errorf("the new key does not open: %w", err)
	}
	return w, true, nil
}

// unwrap opens the repository key with whatever of the options fits, and returns the
// id of what it was.
func unwrap(wrapped []wrappedKey, o Options) (k *keys, id string, err error) {
	given := map[KeyKind][]age.Identity{RecipientKey: o.Identities}
	if o.Passphrase != "" {
		identity, err := age.NewScryptIdentity(o.Passphrase)
		if err != nil {
			return nil, "", err
		}
		identity.SetMaxWorkFactor(scryptWork)
		given[PassphraseKey] = []age.Identity{identity}
	}
	tried := map[KeyKind]int{}
	var damage error
	for _, kind := range []KeyKind{RecipientKey, PassphraseKey} { // the cheap ones first
		for _, w := range wrapped {
			if w.Kind != kind || len(given[kind]) == 0 {
				continue
			}
			tried[kind]++
			k, err := w.open(given[kind])
			if err == nil {
				return k, w.ID, nil
			}
			if _, no := errors.AsType[*age.NoIdentityMatchError](err); !no {
				damage = errors.Join(damage, fmt.Errorf("wrapped key %s: %w", w.ID, err)) // another may open it
			}
		}
	}
	if damage != nil {
		return nil, "", fmt.Errorf("%w: %w", ErrWrongKey, damage)
	}
	return nil, "", fmt.Errorf("%w: %s", ErrWrongKey, whyWrong(o, tried))
}

// open decrypts the repository key.
func (w wrappedKey) open(identities []age.Identity) (*keys, error) {
	r, err := age.Decrypt(bytes.NewReader(w.Age), identities...)
	if err != nil {
		return nil, err
	}
	plain, err := io.ReadAll(io.LimitReader(r, keySize+1))
	if err != nil {
		return nil, err
	}
	if len(plain) != keySize {
		return nil, fmt.Errorf("it holds other than %d bytes", keySize)
	}
	return &keys{master: [keySize]byte(plain)}, nil
}

// whyWrong says why no key that was given opens the repository, when each kind was
// tried so many times.
func whyWrong(o Options, tried map[KeyKind]int) string {
	var why []string
	switch {
	case o.Passphrase == "":
	case tried[PassphraseKey] == 0:
		why = append(why, "no passphrase opens it, only age identities do")
	default:
		why = append(why, "the passphrase is wrong")
	}
	switch {
	case len(o.Identities) == 0:
	case tried[RecipientKey] == 0:
		why = append(why, "no age identity opens it, only a passphrase does")
	default:
		why = append(why, "no identity given is one that opens it")
	}
	if len(why) == 0 {
		return "none was given"
	}
	return strings.Join(why, ", and ")
}

// open opens the repository key, nil if the repository is not encrypted, and proves
// that its holder wrote the rest.
func (c config) open(o Options) (k *keys, id string, err error) {
	if len(c.Keys) == 0 {
		if o.Passphrase != "" || len(o.Identities) > 0 {
			return nil, "", errors.New("a key was given, but the file says that nothing is encrypted: give none if that is so, or bring the right file back")
		}
		return nil, "", nil
	}
	if k, id, err = unwrap(c.Keys, o); err != nil {
		return nil, "", err
	}
	if !sameMAC(c.MAC, k.authenticate(contextConfig, c.fields())) {
		return nil, "", errors.New("the file was changed by somebody without the key")
	}
	return k, id, nil
}
