package blockstore

import (
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
)

const (
	// DefaultSegmentSize is the length at which a segment is sealed, bytes.
	DefaultSegmentSize = 128 << 20
	// writeSize is how many bytes are gathered for one write.
	writeSize = 1 << 20
)

// appender writes records to the one segment that is open for it. It is
// safe for concurrent use.
//
// Lock order: see the package comment.
type appender struct {
	r *Repository

	// flushing is held while records are made durable and entered into the
	// index. It guards indexed and durable of every segment.
	flushing sync.Mutex

	mu      sync.Mutex
	current *writing   // nil until something is appended
	rolled  []*writing // full or failed, to be sealed or cut
	failure error      // the last one
	// epoch counts failures: see failLocked. It is changed with mu held, after failure.
	epoch atomic.Uint64

	background sync.WaitGroup // calls of drain
}

// writing is a segment that is being written.
type writing struct {
	seg *segment

	// Guarded by appender.mu until the segment is rolled.
	size    int64 // bytes appended, buf included
	buf     []byte
	entries []tocEntry
	failed  bool

	// Guarded by appender.flushing.
	indexed int   // entries that are durable and in the index
	durable int64 // bytes that are
}

// maxRolled is how many full segments may wait to be sealed before appending waits
// for them.
const maxRolled = 2

func newAppender(r *Repository) *appender { return &appender{r: r} }

// append adds a record and returns its location. The record is durable after
// the next flush.
func (a *appender) append(id ID, kind recordType, how codec, raw int, payload []byte) (location, error) {
	loc, rolled, err := a.appendOne(id, kind, how, raw, payload)
	switch {
	case rolled >= maxRolled:
		a.drain()
	case rolled > 0:
		a.background.Go(a.drain)
	}
	return loc, err
}

// appendOne also returns how many segments wait to be sealed, if it rolled one.
func (a *appender) appendOne(id ID, kind recordType, how codec, raw int, payload []byte) (loc location, rolled int, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.current == nil {
		w, err := a.start()
		if err != nil {
			return location{}, 0, a.failLocked(nil, err)
		}
		a.current = w
	}
	w := a.current
	stored := len(payload)
	if w.seg.aead != nil {
		stored += sealOverhead
	}
	header := recordHeader{Type: kind, Codec: how, Raw: uint32(raw), Stored: uint32(stored), ID: id}
	loc = location{
		Segment: w.seg.number, Generation: w.seg.generation,
		Off: uint32(w.size), Stored: header.Stored, Ordinal: uint32(len(w.entries)),
	}
	w.buf = appendRecord(w.buf, w.seg.aead, header, payload, w.size)
	w.entries = append(w.entries, tocEntry{ID: id, Off: loc.Off, Stored: loc.Stored, Raw: header.Raw, Type: kind, Codec: how})
	w.size += recordHeaderSize + int64(stored)
	if len(w.buf) >= writeSize {
		if err := a.writeOut(w); err != nil {
			return location{}, len(a.rolled) + 1, a.failLocked(w, err)
		}
	}
	if w.size < a.r.segmentSize && len(w.entries) < maxRecords {
		return loc, 0, nil
	}
	if err := a.rollLocked(); err != nil {
		return location{}, len(a.rolled), err
	}
	return loc, len(a.rolled), nil
}

// appendRecord appends a whole record to b; off is its place in the segment.
func appendRecord(b []byte, aead cipher.AEAD, h recordHeader, payload []byte, off int64) []byte {
	start := len(b)
	b = h.appendTo(b)
	b = append(b, 0, 0, 0, 0)
	if aead == nil {
		b = append(b, payload...)
	} else {
		b = aead.Seal(b, nonce(off), payload, b[start:start+48])
	}
	sealRecord(b[start:])
	return b
}

// start makes the next segment's file, with its header in the buffer.
func (a *appender) start() (*writing, error) {
	set := a.r.segments
	var random [8]byte
	_, _ = rand.Read(random[:]) // crypto/rand never fails
	h := set.header(set.takeNumber(), binary.LittleEndian.Uint64(random[:]))
	seg := &segment{
		number: h.Number, generation: h.Generation,
		path: filepath.Join(set.dir, segmentName(h.Number, h.Generation, segmentSuffix)),
	}
	f, err := set.fs.Create(seg.path)
	if err != nil {
		return nil, noSpace(err)
	}
	seg.file, seg.writable = f, true
	if seg.aead, err = set.cipherOf(h.Number, h.Generation); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	set.add(seg)
	return &writing{seg: seg, size: segmentHeaderSize, buf: append(make([]byte, 0, writeSize+maxChunkSize/4), h.encode()...)}, nil
}

// writeOut writes what is gathered.
func (a *appender) writeOut(w *writing) error {
	if len(w.buf) == 0 {
		return nil
	}
	if _, err := w.seg.file.WriteAt(w.buf, w.size-int64(len(w.buf))); err != nil {
		return noSpace(err)
	}
	w.buf = w.buf[:0]
	return nil
}

// noSpace makes a full disk an ErrNoSpace.
func noSpace(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("%w: %w", ErrNoSpace, err)
	}
	return err
}

// rollLocked ends the current segment; drain seals it, and the next append starts
// a new one.
func (a *appender) rollLocked() error {
	w := a.current
	if w == nil {
		return nil
	}
	if err := a.writeOut(w); err != nil {
		return a.failLocked(w, err)
	}
	a.current = nil
	a.rolled = append(a.rolled, w)
	return nil
}

// drain seals what is rolled.
func (a *appender) drain() {
	a.flushing.Lock()
	defer a.flushing.Unlock()
	a.drainFlushing()
}

// drainFlushing is drain for a caller that holds flushing. Few segments wait: see maxRolled.
func (a *appender) drainFlushing() {
	for {
		a.mu.Lock()
		if len(a.rolled) == 0 {
			a.mu.Unlock()
			return
		}
		w := a.rolled[0]
		a.rolled = a.rolled[1:]
		a.mu.Unlock()
		if w.failed {
			a.cut(w)
			continue
		}
		if err := a.seal(w); err != nil {
			a.mu.Lock()
			_ = a.failLocked(w, err) // kept: every session learns of it at its next step
			a.mu.Unlock()
		}
	}
}

// seal ends a segment with its table of contents and footer, and enters it
// into the index. a.flushing is held.
func (a *appender) seal(w *writing) error {
	// A table of contents is believed without reading the records, so it may reach the
	// disk only after them.
	if w.durable < w.size {
		if err := a.harden(w, w.size); err != nil {
			return err
		}
	}
	tail := encodeTail(w.seg.generation, w.entries, w.size)
	if _, err := w.seg.file.WriteAt(tail, w.size); err != nil {
		return noSpace(err)
	}
	if err := w.seg.file.Sync(); err != nil {
		return err
	}
	// The segment is durable here. Stopped now, the next opening finds it
	// without summary and enters it.
	sum := summarize(w.seg.generation, w.entries, w.size+int64(len(tail)))
	if err := a.enter(w, w.entries[w.indexed:], &sum); err != nil {
		return err
	}
	set := a.r.segments
	set.mu.Lock()
	set.sealLocked(w.seg, sum)
	set.mu.Unlock()
	return nil
}

// encodeTail returns what ends a sealed segment whose records end at off.
func encodeTail(generation uint64, entries []tocEntry, off int64) []byte {
	toc := encodeTOC(entries)
	header := recordHeader{Type: tocRecord, Raw: uint32(len(toc)), Stored: uint32(len(toc))}
	tail := appendRecord(nil, nil, header, toc, off)
	return append(tail, footer{TOC: uint64(off), Records: uint32(len(entries)), Generation: generation}.encode()...)
}

func summarize(generation uint64, entries []tocEntry, size int64) summary {
	s := summary{Generation: generation, Size: size, Records: uint32(len(entries))}
	for _, e := range entries {
		if e.Type == chunkRecord && !e.ID.IsNull() {
			s.Chunks++
			s.ChunkBytes += int64(e.Raw)
		}
	}
	return s
}

// flush makes all that was appended before the call durable and enters it into
// the index.
func (a *appender) flush() error {
	a.flushing.Lock()
	defer a.flushing.Unlock()
	a.drainFlushing()
	err := a.flushCurrent()
	if err != nil {
		a.drainFlushing() // cut what is not durable, before a kill makes it look so
	}
	return err
}

// flushCurrent flushes the segment that is open. a.flushing is held.
func (a *appender) flushCurrent() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	w := a.current
	if w == nil {
		return nil
	}
	if err := a.writeOut(w); err != nil {
		return a.failLocked(w, err)
	}
	if len(w.entries) == w.indexed {
		return nil
	}
	count, size := len(w.entries), w.size
	entries := w.entries[w.indexed:count]
	a.mu.Unlock() // appending goes on meanwhile
	err := a.commit(w, entries, size)
	a.mu.Lock()
	if err != nil {
		return a.failLocked(w, err)
	}
	w.indexed = count
	return nil
}

// commit makes the first size bytes, which were written, durable and enters the records
// of them that are not indexed yet. a.flushing is held.
func (a *appender) commit(w *writing, entries []tocEntry, size int64) error {
	if err := a.harden(w, size); err != nil {
		return err
	}
	// Stopped now, the next opening reads the unsealed segment and enters the
	// records. They stay, even if entering them fails: the index may have some of
	// them then.
	return a.enter(w, entries, nil)
}

// enter makes records known to the index, and with a summary the segment. What was
// damaged of them is healed. a.flushing is held.
func (a *appender) enter(w *writing, entries []tocEntry, sum *summary) error {
	if err := a.r.enter(w.seg, entries, w.indexed, sum); err != nil {
		return err
	}
	if !a.r.AnyDamaged() {
		return nil
	}
	ids := make([]ID, len(entries))
	for i, e := range entries {
		ids[i] = e.ID
	}
	a.r.damaged.remove(ids)
	return nil
}

// harden makes the first size bytes of a segment durable, and its name. a.flushing is held.
func (a *appender) harden(w *writing, size int64) error {
	if err := w.seg.file.Sync(); err != nil {
		return err
	}
	if w.durable == 0 {
		if err := a.r.fs.SyncDir(a.r.segments.dir); err != nil {
			return err
		}
	}
	w.durable = size
	return nil
}

// finish seals what is open.
func (a *appender) finish() error {
	epoch := a.epoch.Load()
	a.mu.Lock()
	err := a.rollLocked()
	a.mu.Unlock()
	a.drain()
	return errors.Join(err, a.check(epoch))
}

// unsealed returns the summaries of the segments that are being written.
func (a *appender) unsealed() []summary {
	a.mu.Lock()
	defer a.mu.Unlock()
	var out []summary
	for _, w := range append(slices.Clone(a.rolled), a.current) {
		if w != nil && !w.failed {
			out = append(out, summarize(w.seg.generation, w.entries, w.size))
		}
	}
	return out
}

// nextNumber returns the number of the next segment. Those with lower ones are in the live set, or will
// never be.
func (a *appender) nextNumber() uint64 {
	a.mu.Lock() // nobody is between taking a number and adding the segment
	defer a.mu.Unlock()
	return a.r.segments.last() + 1
}

// close seals what is open and waits for what runs. Nothing may be appended
// afterwards.
func (a *appender) close() error {
	err := a.finish()
	a.background.Wait()
	return err
}

// begin returns the epoch that a new session belongs to.
func (a *appender) begin() uint64 { return a.epoch.Load() }

// check returns the failure that a session of an epoch suffered, if any.
func (a *appender) check(epoch uint64) error {
	if epoch == a.epoch.Load() {
		return nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.failure
}

// failLocked ends a segment that could not be written: nothing is written to
// it again, and every session that may have put something into it fails. What was
// durable before stays. a.mu is held.
func (a *appender) failLocked(w *writing, err error) error {
	err = fmt.Errorf("write segment: %w", noSpace(err))
	a.failure = err
	a.epoch.Add(1)
	if w == nil || w.failed {
		return err
	}
	if a.current == w {
		a.current = nil
	}
	w.failed = true
	a.r.claims.forget(w.seg.number)
	a.rolled = append(a.rolled, w)
	return err
}

// cut takes the part of a failed segment that never became durable off the
// file: after a failed sync it may look whole until the machine restarts.
// a.flushing is held, so that nobody enters these records meanwhile.
func (a *appender) cut(w *writing) {
	if w.durable > 0 {
		if err := w.seg.file.Truncate(w.durable); err != nil {
			a.r.log.Error("failed segment cannot be cut", attrErr(err))
		}
		return
	}
	a.r.segments.drop(w.seg)
	if err := a.r.fs.Remove(w.seg.path); err != nil {
		a.r.log.Error("failed segment cannot be removed", attrErr(err))
	}
}

// pending copies the record at loc if it has not been written to its file yet.
func (a *appender) pending(loc location) ([]byte, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	w := a.current
	if w == nil || w.seg.number != loc.Segment {
		return nil, false
	}
	start := int64(loc.Off) - (w.size - int64(len(w.buf)))
	if start < 0 {
		return nil, false
	}
	return append([]byte(nil), w.buf[start:start+recordHeaderSize+int64(loc.Stored)]...), true
}
