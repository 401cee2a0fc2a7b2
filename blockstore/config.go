package blockstore

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/zeebo/blake3"

	"github.com/holdfast-backup/holdfast/internal/durable"
	"github.com/holdfast-backup/holdfast/internal/steady"
)

// DefaultChunkSize is the chunk size that a repository gets unless told
// otherwise, bytes.
const DefaultChunkSize = 64 << 10

// MinChunkSize and MaxChunkSize bound the chunk size, bytes.
const (
	MinChunkSize = 16 << 10
	MaxChunkSize = maxChunkSize
)

// CreateOptions are the choices made once for a repository.
type CreateOptions struct {
	// ChunkSize is a power of two from MinChunkSize to MaxChunkSize, bytes; 0 is
	// DefaultChunkSize.
	ChunkSize int
	// Passphrase and Recipients (in age's notation) encrypt the repository, if
	// either is given. Any one of them opens it.
	Passphrase string
	Recipients []string
	// Watch, if set, knows what is being done with the repository's storage.
	Watch *durable.Watcher

	// DeleteQuarantine is how long deleted points are kept: see SetDeleteQuarantine.
	DeleteQuarantine time.Duration

	// For tests; the zero values are those of production.
	fs         durable.FS
	clock      steady.Source
	workFactor int // see NewKey
}

// keys returns what shall open the repository.
func (o CreateOptions) keys() []NewKey {
	var out []NewKey
	if o.Passphrase != "" {
		out = append(out, NewKey{Passphrase: o.Passphrase, workFactor: o.workFactor})
	}
	for _, r := range o.Recipients {
		out = append(out, NewKey{Recipient: r})
	}
	return out
}

// config is what repository.json and its copy hold.
type config struct {
	Format    int          `json:"format"`
	ID        string       `json:"id"` // 32 hexadecimal digits
	ChunkSize int          `json:"chunk_size"`
	Hash      string       `json:"hash"`
	Created   time.Time    `json:"created"`
	Revision  int64        `json:"revision"` // from 1; one more with each change
	Keys      []wrappedKey `json:"keys,omitempty"`
	// MAC authenticates all fields above; encrypted repositories only.
	MAC []byte `json:"mac,omitempty"`
	// Checksum, of the fields above and MAC, tells what rotted without a key.
	Checksum []byte `json:"checksum"`
}

const hashName = "blake3"

// maxConfigFile bounds repository.json, bytes.
const maxConfigFile = 1 << 20

// fields returns what MAC and Checksum cover: each field as text, behind its length.
func (c config) fields() []byte {
	var b []byte
	add := func(values ...string) {
		for _, s := range values {
			b = binary.LittleEndian.AppendUint32(b, uint32(len(s)))
			b = append(b, s...)
		}
	}
	add(strconv.Itoa(c.Format), c.ID, strconv.Itoa(c.ChunkSize), c.Hash, timeText(c.Created),
		strconv.FormatInt(c.Revision, 10), strconv.Itoa(len(c.Keys)))
	for _, w := range c.Keys {
		add(w.ID, string(w.Kind), w.Label, timeText(w.Created), w.Recipient, string(w.Age))
	}
	return b
}

func timeText(t time.Time) string { return t.UTC().Format(time.RFC3339Nano) }

// checksum returns what Checksum must be.
func (c config) checksum() []byte {
	sum := blake3.Sum256(append(c.fields(), c.MAC...))
	return sum[:]
}

// encode returns the file's content, with MAC (for k, nil if not encrypted) and
// Checksum made anew.
func (c *config) encode(k *keys) ([]byte, error) {
	c.MAC = nil
	if k != nil {
		c.MAC = k.authenticate(contextConfig, c.fields())
	}
	c.Checksum = c.checksum()
	data, err := json.MarshalIndent(c, "", "  ")
	return append(data, '\n'), err
}

// decodeConfig reads the content of a file and checks all that can be checked
// without the key.
func decodeConfig(data []byte) (config, error) {
	if len(data) > maxConfigFile {
		return config{}, fmt.Errorf("file of %d bytes, more than the %d that it may have", len(data), maxConfigFile)
	}
	var c config
	var version struct {
		Format int `json:"format"`
	}
	if err := json.Unmarshal(data, &version); err != nil {
		return c, err
	}
	if version.Format != formatVersion {
		return c, fmt.Errorf("repository format %d, this program reads %d", version.Format, formatVersion)
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields() // nobody would vouch for them
	if err := d.Decode(&c); err != nil {
		return c, err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return c, errors.New("something follows the JSON object")
	}
	if !bytes.Equal(c.Checksum, c.checksum()) {
		return c, errCRC
	}
	return c, c.check()
}

func (c config) check() error {
	if c.Hash != hashName {
		return fmt.Errorf("hash %q is unknown", c.Hash)
	}
	if err := checkChunkSize(c.ChunkSize); err != nil {
		return err
	}
	if id, err := hex.DecodeString(c.ID); err != nil || len(id) != 16 {
		return fmt.Errorf("id %q is not 32 hexadecimal digits", c.ID)
	}
	if c.Revision < 1 {
		return fmt.Errorf("revision %d: want 1 or more", c.Revision)
	}
	if (len(c.Keys) > 0) != (len(c.MAC) > 0) {
		return errors.New("a file with keys has a MAC, and none without")
	}
	return checkWrapped(c.Keys)
}

// id returns the id of the repository, of a configuration that was checked.
func (c config) id() [16]byte {
	id, err := hex.DecodeString(c.ID)
	if err != nil {
		panic("blockstore: internal error: " + err.Error())
	}
	return [16]byte(id)
}

func checkChunkSize(n int) error {
	if n < MinChunkSize || n > MaxChunkSize || bits.OnesCount(uint(n)) != 1 {
		return fmt.Errorf("chunk size %d: want a power of two from %d to %d bytes", n, MinChunkSize, MaxChunkSize)
	}
	return nil
}

// Create makes a repository in dir, which is created if need be and must not hold
// one already. It is durable when Create returns nil; an earlier Create that was
// stopped is no hindrance.
func Create(dir string, o CreateOptions) error {
	fsys := o.fs
	if fsys == nil {
		fsys = o.Watch.FS(durable.OS())
	}
	if o.ChunkSize == 0 {
		o.ChunkSize = DefaultChunkSize
	}
	if err := checkChunkSize(o.ChunkSize); err != nil {
		return err
	}
	if err := checkQuarantine(o.DeleteQuarantine); err != nil {
		return err
	}
	if err := durable.MkdirAll(fsys, dir); err != nil {
		return err
	}
	unlock, err := lock(dir, o.Watch)
	if err != nil {
		return err
	}
	defer unlock()
	if err := checkVacant(fsys, dir); err != nil {
		return err
	}
	c, k, err := newConfig(o)
	if err != nil {
		return err
	}
	data, err := c.encode(k)
	if err != nil {
		return err
	}
	for _, name := range []string{segmentsDir, pointsDir} {
		if err := fsys.Mkdir(filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	if err := fsys.SyncDir(dir); err != nil {
		return err
	}
	if err := createCatalog(fsys, filepath.Join(dir, pointsDir), sealer{k, c.id()}, o); err != nil {
		return err
	}
	// The repository exists from the moment that repository.json does, and has its
	// folders and the copy by then.
	if err := durable.WriteFile(fsys, filepath.Join(dir, configCopy), data); err != nil {
		return err
	}
	path := filepath.Join(dir, configFile)
	if err := durable.WriteFile(fsys, path, data); err != nil {
		_ = fsys.Remove(path) // so that trying again works; if it stays, it is whole
		return err
	}
	return nil
}

// newConfig returns the configuration of a new repository, and its key.
func newConfig(o CreateOptions) (config, *keys, error) {
	var id [16]byte
	_, _ = rand.Read(id[:]) // crypto/rand never fails
	c := config{
		Format: formatVersion, ID: hex.EncodeToString(id[:]), ChunkSize: o.ChunkSize,
		Hash: hashName, Created: now(), Revision: 1,
	}
	wanted := o.keys()
	if len(wanted) == 0 {
		return c, nil, nil
	}
	k := newKeys()
	for _, n := range wanted {
		w, _, err := k.wrap(n)
		if err != nil {
			return c, nil, err
		}
		if c.Keys, err = insertKey(c.Keys, len(c.Keys), w); err != nil {
			return c, nil, err
		}
	}
	return c, k, nil
}

func now() time.Time { return time.Now().UTC().Truncate(time.Second) }

// checkVacant fails if dir holds a repository, or what is left of one. A copy of
// repository.json by itself is what a Create that was stopped leaves.
func checkVacant(fsys durable.FS, dir string) error {
	if f, err := fsys.Open(filepath.Join(dir, configFile)); err == nil {
		return errors.Join(fmt.Errorf("%s: %w", dir, ErrExists), f.Close())
	} else if !errors.Is(err, os.ErrNotExist) {
		return err
	}
	used, err := hasContent(fsys, dir)
	if used {
		return fmt.Errorf("%s: %w: it has segments or points, but no %s; bring that back", dir, ErrExists, configFile)
	}
	return err
}

// hasContent reports whether dir has more than what Create makes.
func hasContent(fsys durable.FS, dir string) (bool, error) {
	for _, name := range []string{segmentsDir, pointsDir} {
		files, err := fsys.ReadDir(filepath.Join(dir, name))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return false, err
		}
		for _, f := range files {
			if n := f.Name(); n != catalogFile && n != catalogCopyFile && !durable.IsTemporary(n) {
				return true, nil
			}
		}
	}
	return false, nil
}
