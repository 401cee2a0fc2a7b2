package blockstore

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/options"

	"github.com/holdfast-backup/holdfast/internal/durable"
)

// location is where a chunk's record is.
type location struct {
	Segment    uint64
	Generation uint64 // of the segment; the location counts only if it matches
	Off        uint32 // of the record in the segment
	Stored     uint32 // length of the payload
	Ordinal    uint32 // of the record in the segment, from 0
}

const locationSize = 28

func (l location) encode() []byte {
	b := make([]byte, 0, locationSize)
	b = binary.LittleEndian.AppendUint64(b, l.Segment)
	b = binary.LittleEndian.AppendUint64(b, l.Generation)
	b = binary.LittleEndian.AppendUint32(b, l.Off)
	b = binary.LittleEndian.AppendUint32(b, l.Stored)
	return binary.LittleEndian.AppendUint32(b, l.Ordinal)
}

func decodeLocation(b []byte) (location, error) {
	if len(b) != locationSize {
		return location{}, fmt.Errorf("index entry of %d bytes, want %d", len(b), locationSize)
	}
	return location{
		Segment:    binary.LittleEndian.Uint64(b),
		Generation: binary.LittleEndian.Uint64(b[8:]),
		Off:        binary.LittleEndian.Uint32(b[16:]),
		Stored:     binary.LittleEndian.Uint32(b[20:]),
		Ordinal:    binary.LittleEndian.Uint32(b[24:]),
	}, nil
}

// summary is what the index remembers of a sealed segment, so that opening a
// repository reads no segments.
type summary struct {
	Generation  uint64
	Size        int64 // of the file, bytes
	Records     uint32
	Chunks      uint32 // records that are chunks, not map nodes
	ChunkBytes  int64  // plain bytes of those
	VerifiedSec int64  // Unix time when it was last read and checked whole; 0 never
}

const summarySize = 40

func (s summary) encode() []byte {
	b := make([]byte, 0, summarySize)
	b = binary.LittleEndian.AppendUint64(b, s.Generation)
	b = binary.LittleEndian.AppendUint64(b, uint64(s.Size))
	b = binary.LittleEndian.AppendUint32(b, s.Records)
	b = binary.LittleEndian.AppendUint32(b, s.Chunks)
	b = binary.LittleEndian.AppendUint64(b, uint64(s.ChunkBytes))
	return binary.LittleEndian.AppendUint64(b, uint64(s.VerifiedSec))
}

func decodeSummary(b []byte) (summary, error) {
	if len(b) != summarySize {
		return summary{}, fmt.Errorf("segment summary of %d bytes, want %d", len(b), summarySize)
	}
	return summary{
		Generation:  binary.LittleEndian.Uint64(b),
		Size:        int64(binary.LittleEndian.Uint64(b[8:])),
		Records:     binary.LittleEndian.Uint32(b[16:]),
		Chunks:      binary.LittleEndian.Uint32(b[20:]),
		ChunkBytes:  int64(binary.LittleEndian.Uint64(b[24:])),
		VerifiedSec: int64(binary.LittleEndian.Uint64(b[32:])),
	}, nil
}

// Keys of the index. An id is a key as it is; the others begin with a word and
// are told apart by their length.
const (
	segmentPrefix = "segment:" // and the segment's number, big-endian: a summary
	verifyKey     = "verify"   // when a verification of everything began that has not ended
)

func segmentKey(number uint64) []byte {
	return binary.BigEndian.AppendUint64([]byte(segmentPrefix), number)
}

// indexMemory is the size of BadgerDB's table in memory, bytes; up to three of
// them exist. It holds about half a million chunks between two flushes.
const indexMemory = 64 << 20

// ErrIndexDamaged means that the index rotted while it was open. The next opening makes it anew from
// the segments.
var ErrIndexDamaged = errors.New("the index is damaged; the segments have all that it has, and it is made anew when the repository is opened again")

// index is the map from chunk ids to locations: a cache of the segments.
// BadgerDB makes it safe for concurrent use.
type index struct {
	db         *badger.DB
	dir        string
	repository string // its id, in hexadecimal
	log        *slog.Logger
	watch      *durable.Watcher // of what BadgerDB does with its files
	distrusted atomic.Bool      // it is damaged: see distrust
	// fault, if set, makes write fail, at its end. For tests: BadgerDB's files can't be made to.
	fault func() error
}

// openIndex opens the index in dir of the repository with an id. One that cannot be
// trusted is removed first, and is empty then.
func openIndex(dir, repository string, opts Options, log *slog.Logger) (*index, error) {
	// Everything stays in the LSM tree: the values are far below the threshold for
	// the value log. Writes are not synced: see indexWrite. Tables are verified by
	// checkIndex, and blocks again as they are read.
	o := badger.DefaultOptions(dir).
		WithLogger(badgerLog{log}).
		WithSyncWrites(false).
		WithDetectConflicts(false).
		WithNumVersionsToKeep(1).
		WithCompression(options.None).
		WithBlockCacheSize(0).
		WithChecksumVerificationMode(options.OnBlockRead).
		WithValueThreshold(1 << 10).
		WithMemTableSize(opts.indexMemory).
		WithNumMemtables(2).
		WithNumCompactors(2).
		WithValueLogFileSize(1 << 20).
		WithBypassLockGuard(true). // the repository's lock is enough
		WithMetricsEnabled(false)
	defer opts.Watch.BeginMany(durable.Opening, &dir).End()
	x := &index{dir: dir, repository: repository, log: log, watch: opts.Watch}
	err := checkIndex(dir, repository)
	if err == nil {
		if x.db, err = openMarked(dir, repository, o, opts); err == nil {
			return x, nil
		}
	}
	if away(err) {
		return nil, fmt.Errorf("open index %s: %w", dir, err)
	}
	removed, removeErr := emptyIndex(dir)
	if removeErr != nil {
		return nil, fmt.Errorf("open index: %w", errors.Join(err, removeErr))
	}
	if removed > 0 {
		log.Warn("the index cannot be trusted and is made anew from the segments", attrPath(dir), attrErr(err))
	}
	if x.db, err = openMarked(dir, repository, o, opts); err != nil {
		return nil, fmt.Errorf("open index %s: %w", dir, err)
	}
	return x, nil
}

// openMarked opens the database in dir, which is marked as open first.
func openMarked(dir, repository string, o badger.Options, opts Options) (*badger.DB, error) {
	if err := markIndexOpen(dir, repository); err != nil {
		return nil, err
	}
	return opts.openDB(o)
}

// close closes the index. If it cannot be marked as closed, that costs making it anew
// after the machine stops.
func (x *index) close() error {
	defer x.watch.BeginMany(durable.Closing, &x.dir).End()
	if err := x.db.Close(); err != nil {
		return fmt.Errorf("close index: %w", err)
	}
	if x.distrusted.Load() {
		return nil
	}
	if err := markIndexClosed(x.dir, x.repository); err != nil {
		x.log.Warn("the index cannot be marked as closed", attrPath(x.dir), attrErr(err))
	}
	return nil
}

// distrust makes the next opening make the index anew and returns err as an ErrIndexDamaged.
func (x *index) distrust(err error) error {
	if !x.distrusted.Swap(true) {
		x.log.Error("the index is damaged and is made anew at the next opening", attrPath(x.dir), attrErr(err))
		if err := distrustIndex(x.dir); err != nil {
			x.log.Error("the index cannot be marked as damaged", attrPath(x.dir), attrErr(err))
		}
	}
	return fmt.Errorf("%w: %w", ErrIndexDamaged, err)
}

// view calls fn, which reads. It fails only over what is in BadgerDB's files, or if they are away.
func (x *index) view(fn func(txn *badger.Txn) error) error {
	err := shielded(func() error { return x.db.View(fn) })
	if err == nil {
		return nil
	}
	if _, statusErr := readIndexStatus(x.dir, x.repository); away(statusErr) {
		return statusErr // what is mapped does not tell why it cannot be read
	}
	return x.distrust(err)
}

// judge returns what err, of reading the index's files, says of the index.
func (x *index) judge(err error) error {
	if away(err) {
		return err
	}
	return x.distrust(err)
}

// verify checks again all that is read of the index's files, now or at the next opening.
func (x *index) verify(ctx context.Context) error {
	if x.distrusted.Load() {
		return ErrIndexDamaged
	}
	defer x.watch.BeginMany(durable.Reading, &x.dir).End()
	if err := checkMarkedOpen(x.dir, x.repository); err != nil {
		return x.judge(err)
	}
	for _, t := range x.db.Tables() {
		if err := ctx.Err(); err != nil {
			return err
		}
		_, err := checkTables(x.dir, map[uint64]uint8{t.ID: uint8(t.Level)}, checkTable)
		// A compaction may have removed it meanwhile.
		if err != nil && slices.ContainsFunc(x.db.Tables(), func(now badger.TableInfo) bool { return now.ID == t.ID }) {
			return x.judge(err)
		}
	}
	return nil
}

// get returns the location of id and whether there is one.
func (x *index) get(id ID) (loc location, ok bool, err error) {
	defer x.watch.Begin(durable.Reading, &x.dir).End()
	err = x.view(func(txn *badger.Txn) error {
		item, err := txn.Get(id[:])
		if errors.Is(err, badger.ErrKeyNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		return item.Value(func(v []byte) error {
			loc, err = decodeLocation(v)
			ok = err == nil
			return err
		})
	})
	if err != nil {
		return location{}, false, fmt.Errorf("index: %w", err)
	}
	return loc, ok, nil
}

// entry is one id and its new location.
type entry struct {
	id  ID
	loc location
}

// indexWrite is a batch of changes. None of it need be durable: after a loss of power the index is
// made anew.
type indexWrite struct{ b *badger.WriteBatch }

// write collects changes with fill and applies them.
func (x *index) write(fill func(w indexWrite) error) error {
	defer x.watch.BeginMany(durable.Writing, &x.dir).End()
	b := x.db.NewWriteBatch()
	defer b.Cancel()
	if err := fill(indexWrite{b}); err != nil {
		return fmt.Errorf("index: %w", err)
	}
	err := b.Flush()
	if err == nil && x.fault != nil {
		err = x.fault()
	}
	if err != nil {
		return fmt.Errorf("index: %w", err)
	}
	return nil
}

// put enters locations; it sorts entries. Of two for the same id the later counts.
func (w indexWrite) put(entries []entry) error {
	slices.SortStableFunc(entries, func(a, b entry) int { return bytes.Compare(a.id[:], b.id[:]) })
	for i := range entries {
		if err := w.b.Set(entries[i].id[:], entries[i].loc.encode()); err != nil {
			return err
		}
	}
	return nil
}

func (w indexWrite) remove(id ID) error           { return w.b.Delete(slices.Clone(id[:])) }
func (w indexWrite) removeSummary(n uint64) error { return w.b.Delete(segmentKey(n)) }
func (w indexWrite) putSummary(n uint64, s summary) error {
	return w.b.Set(segmentKey(n), s.encode())
}

// setVerifyBegan notes when a verification of everything began, in Unix time.
func (w indexWrite) setVerifyBegan(sec int64) error {
	return w.b.Set([]byte(verifyKey), binary.LittleEndian.AppendUint64(nil, uint64(sec)))
}

func (w indexWrite) clearVerifyBegan() error { return w.b.Delete([]byte(verifyKey)) }

// verifyBegan returns when the verification of everything began that has not ended; 0 if there is
// none.
func (x *index) verifyBegan() (sec int64, err error) {
	err = x.scan(verifyKey, len(verifyKey), func(_, value []byte) error {
		if len(value) != 8 {
			return fmt.Errorf("beginning of a verification of %d bytes, want 8", len(value))
		}
		sec = int64(binary.LittleEndian.Uint64(value))
		return nil
	})
	return sec, err
}

// summaries returns what is known of sealed segments, by number.
func (x *index) summaries() (map[uint64]summary, error) {
	out := map[uint64]summary{}
	err := x.scan(segmentPrefix, len(segmentPrefix)+8, func(key, value []byte) error {
		s, err := decodeSummary(value)
		if err != nil {
			return err
		}
		out[binary.BigEndian.Uint64(key[len(segmentPrefix):])] = s
		return nil
	})
	return out, err
}

// scan calls fn for every key with a prefix and a length.
func (x *index) scan(prefix string, length int, fn func(key, value []byte) error) error {
	defer x.watch.BeginMany(durable.Reading, &x.dir).End()
	err := x.view(func(txn *badger.Txn) error {
		it := txn.NewIterator(badger.IteratorOptions{Prefix: []byte(prefix), PrefetchValues: false})
		defer it.Close()
		for it.Rewind(); it.Valid(); it.Next() {
			item := it.Item()
			if len(item.Key()) != length {
				continue
			}
			if err := item.Value(func(v []byte) error { return fn(item.Key(), v) }); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("index: %w", err)
	}
	return nil
}

// badgerLog passes on what BadgerDB has to warn of.
type badgerLog struct{ log *slog.Logger }

func (l badgerLog) Errorf(format string, args ...any) {
	l.log.Error("index", slog.String("badger", strings.TrimSpace(fmt.Sprintf(format, args...))))
}

func (l badgerLog) Warningf(format string, args ...any) {
	l.log.Warn("index", slog.String("badger", strings.TrimSpace(fmt.Sprintf(format, args...))))
}

func (badgerLog) Infof(string, ...any)  {}
func (badgerLog) Debugf(string, ...any) {}
