// Package appliance is what Holdfast does, as a Go API: it makes and opens a
// repository, backs disks up into it, and gives restore points back as block
// devices, as files and as image files. The command line is one user of it.
//
// It wires the other packages and holds no formats and no protocols of its own.
// Each file has one subject: backup, points, export, mount, restore,
// repository.
//
// # Invariants
//
//   - Everything that a request can get wrong is checked before the long work
//     begins.
//   - An error belongs to one [Kind], which a caller turns into an exit status or
//     an HTTP status.
//   - Results are JSON types: snake_case, sizes in bytes, times in UTC, lists
//     never null.
//
// # Concurrency
//
// One process at a time has a data folder open. Methods of an [Appliance] may
// run at the same time, but for Close.
package appliance

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"filippo.io/age"

	"github.com/holdfast-backup/holdfast/blockstore"
	"github.com/holdfast-backup/holdfast/internal/durable"
)

// maxKeyFile bounds the files that hold a passphrase or identities, bytes.
const maxKeyFile = 1 << 20

// Options say how a data folder is opened.
type Options struct {
	// PassphraseFile and IdentityFile name the files whose content opens an
	// encrypted repository: a passphrase (a newline at its end is not part of it), or
	// age identities. "" is none.
	PassphraseFile string
	IdentityFile   string
	// Storage, if set, watches the data folder and the disks that are read and written.
	Storage *Storage
	// Log hears of what needs attention but fails nothing. Nil discards it.
	Log *slog.Logger
	// Guard is the socket of the holdfast-guard that makes the files of locked points
	// immutable; NoGuard is none, "" the one in the usual place if it is this data folder's.
	Guard string
}

// store returns the options for the blockstore.
func (o Options) store() (blockstore.Options, error) {
	opened := blockstore.Options{Log: o.Log, Watch: o.Storage.watcher()}
	var err error
	if o.PassphraseFile != "" {
		if opened.Passphrase, err = readPassphrase(o.PassphraseFile); err != nil {
			return opened, err
		}
	}
	if o.IdentityFile != "" {
		if opened.Identities, err = readIdentities(o.IdentityFile); err != nil {
			return opened, err
		}
	}
	return opened, nil
}

// Appliance is an open data folder.
type Appliance struct {
	dir  string // absolute
	repo *blockstore.Repository
	log  *slog.Logger
	// identities opened the data folder, and may fit new recipients.
	identities []age.Identity
	// guard is nil if there is none.
	guard *guardian
	watch *durable.Watcher // of storage; may be nil
	// busy: a request stays in the repository.
	busy atomic.Bool

	// binding is held while an overlay comes into being over a point, and while a
	// point is deleted: no overlay is left without its point.
	binding sync.Mutex

	mu   sync.Mutex      // guards held
	held map[string]bool // the writable exports that are in use
}

// Open opens the data folder dir and recovers what a crash left. It must be
// closed.
func Open(ctx context.Context, dir string, o Options) (*Appliance, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	dir, err := dataFolder(dir)
	if err != nil {
		return nil, err
	}
	keys, err := o.store()
	if err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	g, err := newGuardian(o.Guard, dir)
	if err != nil {
		return nil, err
	}
	repo, err := blockstore.Open(ctx, dir, keys)
	if err != nil {
		return nil, openError(dir, err)
	}
	return &Appliance{dir: dir, repo: repo, log: o.Log, guard: g, watch: o.Storage.watcher(), identities: keys.Identities, held: map[string]bool{}}, nil
}

// dataFolder returns the absolute path of a data folder.
func dataFolder(dir string) (string, error) {
	if dir == "" {
		return "", invalid("no data folder is named; name it with --data or HOLDFAST_DATA")
	}
	return filepath.Abs(dir)
}

// openError adds what the blockstore does not know, such as where keys come from.
func openError(dir string, err error) error {
	_, locked := errors.AsType[*blockstore.LockedError](err)
	switch {
	case locked || errors.Is(err, blockstore.ErrNotRepository):
		return err // it says all
	case errors.Is(err, blockstore.ErrWrongKey):
		return fmt.Errorf("open %s: %w; name the right key's file with --passphrase-file or --identity-file", dir, err)
	}
	return fmt.Errorf("open %s: %w", dir, err)
}

// Close makes everything durable and closes the data folder. If a request of an export that has ended
// stays in the repository, it closes nothing: the end of the process does.
func (a *Appliance) Close() error {
	if a.busy.Load() {
		return nil
	}
	if err := a.repo.Close(); err != nil {
		return fmt.Errorf("close %s: %w", a.dir, err)
	}
	return nil
}

// InitOptions are the choices made once for a repository.
type InitOptions struct {
	// ChunkSize is a power of two from 16 KiB to 4 MiB, bytes; 0 is 64 KiB.
	ChunkSize int64
	// PassphraseFile and Recipients (in age's notation, "age1…") encrypt the
	// repository if either is given. Any one of them opens it.
	PassphraseFile string
	Recipients     []string
	// DeleteQuarantine is how long deleted points can be brought back, at least, up to 10 years.
	DeleteQuarantine time.Duration
	// Storage, if set, watches the data folder.
	Storage *Storage
}

// InitResult describes a new repository.
type InitResult struct {
	Data      string `json:"data"` // its folder
	ChunkSize int64  `json:"chunk_size"`
	Encrypted bool   `json:"encrypted"`
	// DeleteQuarantine is how long deleted points are kept, in seconds.
	DeleteQuarantine int64 `json:"delete_quarantine_seconds"`
}

// Init makes a repository in dir, which is created if need be.
func Init(dir string, o InitOptions) (InitResult, error) {
	dir, err := dataFolder(dir)
	if err != nil {
		return InitResult{}, err
	}
	if o.ChunkSize == 0 {
		o.ChunkSize = blockstore.DefaultChunkSize
	}
	if o.ChunkSize < blockstore.MinChunkSize || o.ChunkSize > blockstore.MaxChunkSize || o.ChunkSize&(o.ChunkSize-1) != 0 {
		return InitResult{}, invalid("chunk size %d: want a power of two from %d to %d bytes",
			o.ChunkSize, blockstore.MinChunkSize, blockstore.MaxChunkSize)
	}
	if err := checkQuarantine(o.DeleteQuarantine); err != nil {
		return InitResult{}, err
	}
	create := blockstore.CreateOptions{ChunkSize: int(o.ChunkSize), Recipients: o.Recipients, DeleteQuarantine: o.DeleteQuarantine, Watch: o.Storage.watcher()}
	for _, r := range o.Recipients {
		if err := (blockstore.NewKey{Recipient: r}).Check(); err != nil {
			return InitResult{}, &kindError{err.Error(), errInvalid}
		}
	}
	if o.PassphraseFile != "" {
		if create.Passphrase, err = readPassphrase(o.PassphraseFile); err != nil {
			return InitResult{}, err
		}
	}
	if err := blockstore.Create(dir, create); err != nil {
		return InitResult{}, fmt.Errorf("make a repository: %w", err)
	}
	return InitResult{
		Data: dir, ChunkSize: o.ChunkSize, Encrypted: create.Passphrase != "" || len(o.Recipients) > 0,
		DeleteQuarantine: int64(o.DeleteQuarantine / time.Second),
	}, nil
}

// readPassphrase returns a file's content without the newline at its end.
func readPassphrase(path string) (string, error) {
	data, err := readSmall(path, maxKeyFile)
	if err != nil {
		return "", fmt.Errorf("read the passphrase: %w", err)
	}
	data = bytes.TrimSuffix(bytes.TrimSuffix(data, []byte("\n")), []byte("\r"))
	if len(data) == 0 {
		return "", fmt.Errorf("passphrase file %s is empty; write the passphrase into it", path)
	}
	return string(data), nil
}

// readIdentities returns the identities in an age key file.
func readIdentities(path string) ([]age.Identity, error) {
	data, err := readSmall(path, maxKeyFile)
	if err != nil {
		return nil, fmt.Errorf("read the identities: %w", err)
	}
	identities, err := age.ParseIdentities(bytes.NewReader(data))
	if err != nil {
		return nil, fmt.Errorf("identity file %s: %w; want a file that age-keygen wrote", path, err)
	}
	return identities, nil
}

// readSmall reads a file of at most limit bytes.
func readSmall(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("%s is larger than %d bytes", path, limit)
	}
	return data, nil
}
