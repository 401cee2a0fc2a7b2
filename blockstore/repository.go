package blockstore

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"filippo.io/age"
	"github.com/dgraph-io/badger/v4"

	"github.com/holdfast-backup/holdfast/internal/durable"
	"github.com/holdfast-backup/holdfast/internal/steady"
)

// Names in a repository's folder.
const (
	configFile  = "repository.json"
	configCopy  = "repository.json.copy"
	lockFile    = "lock"
	segmentsDir = "segments"
	pointsDir   = "points"
	indexDir    = "index"
)

// Options are the choices made at each opening.
type Options struct {
	// Passphrase and Identities open an encrypted repository.
	Passphrase string
	Identities []age.Identity
	// Log hears of what was recovered and what is damaged. Nil discards it.
	Log *slog.Logger
	// SegmentSize is the length at which segments are sealed, bytes, up to
	// 1 GiB; 0 is DefaultSegmentSize.
	SegmentSize int64
	// CacheSize bounds the memory for decoded chunks and map nodes, bytes; 0 is an
	// eighth of the memory that the process may have, 128 MiB to 2 GiB. It is
	// taken as it is needed, by disks that are not read Whole.
	CacheSize int64
	// Watch, if set, knows what is being done with the repository's storage. It is closed
	// after the repository.
	Watch *durable.Watcher

	// For tests; the zero values are those of production.
	fs          durable.FS
	indexMemory int64 // see indexMemory
	clock       steady.Source
	openDB      func(badger.Options) (*badger.DB, error) // badger.Open
}

func (o Options) withDefaults() (Options, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.SegmentSize == 0 {
		o.SegmentSize = DefaultSegmentSize
	}
	if o.CacheSize == 0 {
		o.CacheSize = defaultCacheSize()
	}
	if o.fs == nil {
		o.fs = o.Watch.FS(durable.OS())
	}
	if o.indexMemory == 0 {
		o.indexMemory = indexMemory
	}
	if o.clock == nil {
		o.clock = steady.System()
	}
	if o.openDB == nil {
		o.openDB = badger.Open
	}
	if o.SegmentSize < segmentHeaderSize || o.SegmentSize > maxSegmentSize-2*maxPayload-maxTOCSize {
		return o, fmt.Errorf("segment size %d is not supported", o.SegmentSize)
	}
	return o, nil
}

// Repository is an open repository. It is safe for concurrent use.
type Repository struct {
	dir         string
	fs          durable.FS
	log         *slog.Logger
	chunkSize   int
	segmentSize int64

	keys     *keys // nil if not encrypted
	chunkIDs *hasher
	nodeIDs  *hasher
	coder    *coder
	index    *index
	segments *segmentSet
	appender *appender
	claims   *claims
	nodes    *cache
	chunks   *chunkCache
	ahead    *prefetcher
	damaged  damagedSet
	buffers  sync.Pool // of *[]byte, for records
	unlock   func()

	configMu     sync.Mutex // guards the fields below; taken by itself
	config       config
	openedBy     string // id of the key that opened the repository
	configFailed error  // of a change that may have been made

	maintenance sync.Mutex // held by a collection
	reindexing  sync.Mutex
	reindexed   bool // guarded by reindexing: see reindexOnce

	clock  *steady.Clock
	sealer sealer

	mu sync.Mutex // guards the fields below; taken before segmentSet.mu
	pointSet
	pins map[Map]int // maps that readers or sessions rest on
}

// Open opens the repository in dir and recovers what a crash left. One process
// at a time may have it open; for another the error is a [LockedError]. Of what may take long, the making
// of a new index, ctx stops the rest: the next opening goes on.
func Open(ctx context.Context, dir string, o Options) (*Repository, error) {
	return openRepository(ctx, dir, o, nil)
}

// openRepository is Open, but that progress, which may be nil, hears of segments looked at and how many there are.
func openRepository(ctx context.Context, dir string, o Options, progress func(done, total int)) (_ *Repository, err error) {
	o, err = o.withDefaults()
	if err != nil {
		return nil, err
	}
	fsys := o.fs
	// No lock file where there is no repository; what counts is read under the lock.
	if _, err := wholeConfigs(fsys, dir, readConfigs(fsys, dir)); err != nil {
		return nil, err
	}
	unlock, err := lock(dir, o.Watch)
	if err != nil {
		return nil, err
	}
	r := &Repository{
		dir: dir, fs: fsys, log: o.Log, segmentSize: o.SegmentSize, unlock: unlock,
		claims:   newClaims(),
		pointSet: newPointSet(), pins: map[Map]int{},
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.release())
		}
	}()
	if err := r.loadConfig(o); err != nil {
		return nil, err
	}
	if err := r.configure(); err != nil {
		return nil, err
	}
	nodes := min(o.CacheSize/4, maxNodeCache)
	r.nodes = newCache(nodes)
	r.chunks = newChunkCache(r.chunkSize, o.CacheSize-nodes, func(id ID, dst []byte) error {
		return r.load(id, chunkRecord, dst, false)
	})
	r.ahead = newPrefetcher(r.chunks.limit)
	r.buffers.New = func() any { b := make([]byte, 0, recordHeaderSize+r.chunkSize+sealOverhead); return &b }
	r.appender = newAppender(r)
	if err := r.loadPoints(o.clock); err != nil {
		return nil, err
	}
	// BadgerDB writes to mapped files, which a full disk turns into a crash.
	if free, _, err := fsys.Space(dir); err != nil {
		return nil, err
	} else if free < minIndexSpace {
		return nil, fmt.Errorf("%w: %s has %d bytes free and opening it needs %d; free some elsewhere on that file system",
			ErrNoSpace, dir, free, minIndexSpace)
	}
	if r.index, err = openIndex(filepath.Join(dir, indexDir), hex.EncodeToString(r.segments.repoID[:]), o, r.log); err != nil {
		return nil, err
	}
	if err := r.loadDamaged(); err != nil {
		return nil, err
	}
	if err := r.loadSegments(ctx, progress); err != nil {
		return nil, err
	}
	return r, r.syncNames()
}

// syncNames makes the names that were found durable. A process that was killed may have
// made or removed some without: what is listed, or found stored, must not go any more, and
// what is gone must not come back once a collection has taken its chunks.
func (r *Repository) syncNames() error {
	for _, name := range []string{r.dir, filepath.Join(r.dir, pointsDir), r.segments.dir} {
		if err := r.fs.SyncDir(name); err != nil {
			return err
		}
	}
	return nil
}

// Close makes durable what was stored and closes the repository. No call may be
// under way, no disk open.
func (r *Repository) Close() error {
	err := errors.Join(r.appender.close(), r.saveDamaged(), r.keepTime())
	return errors.Join(err, r.release())
}

// release lets go of what Open took.
func (r *Repository) release() error {
	var err error
	if r.index != nil {
		err = r.index.close()
	}
	if r.segments != nil {
		r.segments.closeAll()
	}
	if r.coder != nil {
		r.coder.close()
	}
	r.unlock()
	return err
}

// configure makes what rests on the configuration.
func (r *Repository) configure() error {
	r.chunkSize = r.config.ChunkSize
	var idKey []byte
	nodeKey := (&keys{}).derive(contextNodes, nil) // a node's id must never be a chunk's, whatever a guest writes
	if r.keys != nil {
		idKey, nodeKey = r.keys.derive(contextIDs, nil), r.keys.derive(contextNodes, nil)
	}
	var err error
	if r.chunkIDs, err = newHasher(idKey); err != nil {
		return err
	}
	if r.nodeIDs, err = newHasher(nodeKey); err != nil {
		return err
	}
	if r.coder, err = newCoder(); err != nil {
		return err
	}
	id := r.config.id()
	r.sealer = sealer{r.keys, id}
	r.segments = newSegmentSet(r.fs, filepath.Join(r.dir, segmentsDir), r.keys, id)
	return r.checkSegments()
}

// ChunkSize returns the repository's chunk size in bytes.
func (r *Repository) ChunkSize() int { return r.chunkSize }

// id of data as a record type.
func (r *Repository) hash(kind recordType, data []byte) ID {
	if kind == nodeRecord {
		return r.nodeIDs.sum(data)
	}
	return r.chunkIDs.sum(data)
}

// Space that is kept free, bytes.
const (
	// minIndexSpace is what opening the index may write.
	minIndexSpace = 4 << 20
	minReserve    = 16 << 20
	maxReserve    = 1 << 30
)

// checkSpace fails with ErrNoSpace once writing on would use up what
// deleting, collecting and the index need: a 32nd of the file system, at least
// 16 MiB, at most 1 GiB. A collection, which copies to give more back, may use all but
// 1/share of that.
func (r *Repository) checkSpace(share int64) error {
	free, total, err := r.fs.Space(r.dir)
	if err != nil {
		return err
	}
	if keep := reserve(total) / share; free < keep {
		return fmt.Errorf("%w: %s has %d MiB free, and %d MiB are kept for deleting and collecting; delete points and collect, or enlarge it",
			ErrNoSpace, r.dir, free>>20, keep>>20)
	}
	return nil
}

// reserve is what is kept free on a file system, bytes.
func reserve(total int64) int64 { return min(max(total/32, minReserve), maxReserve) }

// find returns where a chunk is.
func (r *Repository) find(id ID) (location, bool, error) {
	if loc, ok := r.claims.find(id); ok {
		return loc, true, nil
	}
	// A claim goes once the index has its location, so this order misses none.
	return r.index.get(id)
}

// load reads a chunk or node, whose plain length is len(dst), into dst. Up to decodeSlack
// bytes behind it, in its capacity, are undefined afterwards. With
// check its hash is compared, too. The error wraps ErrDamaged if the
// bytes are not there or not right, but not if storage is away.
func (r *Repository) load(id ID, kind recordType, dst []byte, check bool) error {
	err := r.loadRetrying(id, kind, dst, check)
	if errors.Is(err, ErrDamaged) && !r.Damaged(id) {
		// The next backup that meets this content stores it anew.
		err = errors.Join(err, r.markDamaged([]ID{id}))
	}
	return err
}

func (r *Repository) loadRetrying(id ID, kind recordType, dst []byte, check bool) error {
	const tries = 10 // a collection can move a record between our look into the index and into the segment
	for range tries {
		if err := r.loadOnce(id, kind, dst, check); !errors.Is(err, errGone) {
			return err
		}
	}
	// The index holds no entry that counts. After a loss of power it may lack
	// some: the segments know.
	// A read has no context. It happens once, and takes what an opening without index does.
	if err := r.reindexOnce(nil); err != nil {
		return err
	}
	err := r.loadOnce(id, kind, dst, check)
	if errors.Is(err, errGone) {
		return &CorruptError{ID: id, Err: errors.New("it is in no segment")}
	}
	return err
}

func (r *Repository) loadOnce(id ID, kind recordType, dst []byte, check bool) error {
	loc, ok, err := r.find(id)
	if err != nil {
		return err
	}
	if !ok {
		return errGone
	}
	seg, err := r.segments.acquire(loc)
	if corrupt, ok := errors.AsType[*CorruptError](err); ok {
		corrupt.ID, corrupt.Off = id, int64(loc.Off) // the file is missing, or no file, or the disk can't read it
	}
	if err != nil {
		return err
	}
	defer r.segments.release(seg)
	buf := r.buffers.Get().(*[]byte)
	defer r.buffers.Put(buf)
	var h recordHeader
	var payload []byte
	if record, ok := r.appender.pending(loc); ok {
		h, payload, err = openRecord(seg.aead, record, id, int64(loc.Off))
	} else {
		h, payload, err = seg.record(*buf, id, loc.Off, loc.Stored)
	}
	if err == nil && (h.Type != kind || int(h.Raw) != len(dst)) {
		err = fmt.Errorf("record of type %d and %d bytes, want type %d and %d", h.Type, h.Raw, kind, len(dst))
	}
	if err == nil {
		var plain []byte
		if plain, err = r.coder.expand(dst, payload, h.Codec, len(dst)); err == nil && &plain[0] != &dst[0] {
			copy(dst, plain)
		}
	}
	if err == nil && check && r.hash(kind, dst) != id {
		err = errors.New("content does not have this hash")
	}
	if err != nil {
		return damage(&CorruptError{ID: id, Segment: segmentName(seg.number, seg.generation, ""), Off: int64(loc.Off), Err: err})
	}
	return nil
}

// enter makes records of a segment known to the index, and with a
// summary the segment itself; first is the ordinal of the first of them.
func (r *Repository) enter(seg *segment, records []tocEntry, first int, sum *summary) error {
	entries := make([]entry, 0, len(records))
	for i, e := range records {
		if e.ID.IsNull() {
			continue // see scanRecords
		}
		entries = append(entries, entry{e.ID, location{
			Segment: seg.number, Generation: seg.generation,
			Off: e.Off, Stored: e.Stored, Ordinal: uint32(first + i),
		}})
	}
	err := r.index.write(func(w indexWrite) error { return w.put(entries) })
	if err == nil && sum != nil {
		// Only what is entered may be called entered: what a kill leaves of the index is its
		// state at an earlier moment.
		err = r.index.write(func(w indexWrite) error { return w.putSummary(seg.number, *sum) })
	}
	if err != nil {
		return err
	}
	r.claims.release(entries)
	return nil
}

// Stats are figures of a repository.
type Stats struct {
	Points       int   `json:"points"`        // that are not deleted
	LogicalBytes int64 `json:"logical_bytes"` // sizes of the disks of all points
	UniqueBytes  int64 `json:"unique_bytes"`  // plain bytes of the chunks that are stored
	StoredBytes  int64 `json:"stored_bytes"`  // of all segments' files
	Chunks       int64 `json:"chunks"`        // stored, whether a point needs them or not
	Segments     int   `json:"segments"`
	ChunkSize    int   `json:"chunk_size"`
	Encrypted    bool  `json:"encrypted"`

	DeletedPoints    int   `json:"deleted_points"`            // not purged yet
	DeleteQuarantine int64 `json:"delete_quarantine_seconds"` // for which deleted points are kept, at least
	// Head names the state that the points are in, for [Repository.Descends].
	Head string `json:"head"`
}

// Stats returns figures of the repository, with what sessions have stored so far.
func (r *Repository) Stats() Stats {
	s := Stats{ChunkSize: r.chunkSize, Encrypted: r.keys != nil}
	for _, p := range r.Points() {
		s.Points++
		for _, d := range p.Disks {
			s.LogicalBytes += d.Map.Size
		}
	}
	r.mu.Lock()
	s.DeletedPoints, s.Head = len(r.deleted), r.catalog.head()
	s.DeleteQuarantine = int64(r.catalog.Quarantine / time.Second)
	r.mu.Unlock()
	segments := r.appender.unsealed()
	r.segments.mu.Lock()
	for _, seg := range r.segments.byNumber {
		if seg.sealed {
			segments = append(segments, seg.summary)
		}
	}
	r.segments.mu.Unlock()
	for _, sum := range segments {
		s.Segments++
		s.StoredBytes += sum.Size
		s.Chunks += int64(sum.Chunks)
		s.UniqueBytes += sum.ChunkBytes
	}
	return s
}

func attrErr(err error) slog.Attr    { return slog.String("error", err.Error()) }
func attrPath(path string) slog.Attr { return slog.String("path", path) }
func attrSegment(s *segment) slog.Attr {
	return slog.String("segment", segmentName(s.number, s.generation, ""))
}

// holder is what a process writes of itself into the lock file: no arguments, which name
// VMs and files.
func holder() []byte {
	return bytes.ToValidUTF8(fmt.Appendf(nil, "process %d (%s)", os.Getpid(), filepath.Base(os.Args[0])), nil)
}
