package blockstore

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"path/filepath"
	"time"

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
	workFactor int // log2 of scrypt's N; 0 is age's own choice. Tests can't wait that long
}

// config is repository.json.
type config struct {
	Format    int          `json:"format"`
	ID        string       `json:"id"` // 32 hexadecimal digits
	ChunkSize int          `json:"chunk_size"`
	Hash      string       `json:"hash"`
	Created   time.Time    `json:"created"`
	Keys      []wrappedKey `json:"keys,omitempty"`
	// MAC authenticates the fields above but Keys; encrypted repositories only.
	MAC []byte `json:"mac,omitempty"`
}

const hashName = "blake3"

// authenticated returns the bytes that MAC covers.
func (c config) authenticated() []byte {
	return fmt.Appendf(nil, "%d\n%s\n%d\n%s\n%s\n", c.Format, c.ID, c.ChunkSize, c.Hash, c.Created.UTC().Format(time.RFC3339Nano))
}

func checkChunkSize(n int) error {
	if n < MinChunkSize || n > MaxChunkSize || bits.OnesCount(uint(n)) != 1 {
		return fmt.Errorf("chunk size %d: want a power of two from %d to %d bytes", n, MinChunkSize, MaxChunkSize)
	}
	return nil
}

// Create makes a repository in dir, which is created if need be and must not hold
// one already. It is durable when Create returns nil.
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
	path := filepath.Join(dir, configFile)
	if f, err := fsys.Open(path); err == nil {
		return errors.Join(fmt.Errorf("%s: %w", dir, ErrExists), f.Close())
	} else if !errors.Is(err, os.ErrNotExist) {
		return err
	}
	var id [16]byte
	_, _ = rand.Read(id[:]) // crypto/rand never fails
	c := config{
		Format: formatVersion, ID: hex.EncodeToString(id[:]), ChunkSize: o.ChunkSize,
		Hash: hashName, Created: time.Now().UTC().Truncate(time.Second),
	}
	var k *keys
	if o.Passphrase != "" || len(o.Recipients) > 0 {
		k = newKeys()
		if c.Keys, err = k.wrap(o); err != nil {
			return err
		}
		c.MAC = k.authenticate(contextConfig, c.authenticated())
	}
	for _, name := range []string{segmentsDir, pointsDir} {
		if err := fsys.Mkdir(filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	if err := fsys.SyncDir(dir); err != nil {
		return err
	}
	if err := createCatalog(fsys, filepath.Join(dir, pointsDir), sealer{k, id}, o); err != nil {
		return err
	}
	data, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return err
	}
	// The repository exists from the moment that this file does, and has its folders.
	return durable.WriteFile(fsys, path, append(data, '\n'))
}

// readConfig returns the content of a repository's configFile.
func readConfig(fsys durable.FS, dir string) ([]byte, error) {
	data, err := durable.ReadFile(fsys, filepath.Join(dir, configFile), 1<<20)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%s: %w; make one with init", dir, ErrNotRepository)
	}
	return data, err
}

// configure reads repository.json.
func (r *Repository) configure(data []byte, o Options) error {
	var c config
	if err := json.Unmarshal(data, &c); err != nil {
		return err
	}
	if c.Format != formatVersion {
		return fmt.Errorf("repository format %d, this program reads %d", c.Format, formatVersion)
	}
	if c.Hash != hashName {
		return fmt.Errorf("hash %q is unknown", c.Hash)
	}
	if err := checkChunkSize(c.ChunkSize); err != nil {
		return err
	}
	id, err := hex.DecodeString(c.ID)
	if err != nil || len(id) != 16 {
		return fmt.Errorf("id %q is not 32 hexadecimal digits", c.ID)
	}
	r.chunkSize = c.ChunkSize
	if len(c.Keys) == 0 && (o.Passphrase != "" || len(o.Identities) > 0) {
		return errors.New("a key was given, but the file says that nothing is encrypted: give none if that is so, or bring the right file back")
	}
	var idKey, nodeKey []byte
	if len(c.Keys) > 0 {
		if r.keys, err = unwrap(c.Keys, o); err != nil {
			return err
		}
		if !sameMAC(c.MAC, r.keys.authenticate(contextConfig, c.authenticated())) {
			return errors.New("the file was changed by somebody without the key")
		}
		idKey = r.keys.derive(contextIDs, nil)
		nodeKey = r.keys.derive(contextNodes, nil)
	} else {
		// A node's id must never be a chunk's, whatever a guest writes.
		nodeKey = (&keys{}).derive(contextNodes, nil)
	}
	if r.chunkIDs, err = newHasher(idKey); err != nil {
		return err
	}
	if r.nodeIDs, err = newHasher(nodeKey); err != nil {
		return err
	}
	if r.coder, err = newCoder(); err != nil {
		return err
	}
	r.sealer = sealer{r.keys, [16]byte(id)}
	r.segments = newSegmentSet(r.fs, filepath.Join(r.dir, segmentsDir), r.keys, [16]byte(id))
	return nil
}
