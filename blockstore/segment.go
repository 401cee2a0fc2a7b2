package blockstore

import (
	"container/list"
	"crypto/cipher"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/holdfast-backup/holdfast/internal/durable"
)

const (
	segmentSuffix = ".seg"

	// maxOpenSegments is how many sealed segments are kept open for reading.
	maxOpenSegments = 512
)

// errGone means that a segment is not in the live set any more: its live
// records are elsewhere, and the index knows where.
var errGone = errors.New("segment is gone")

// segment is one file of records in the live set.
type segment struct {
	number, generation uint64
	path               string
	unlisted           bool // see Repository.enterUnlisted

	// The fields below are guarded by segmentSet.mu.

	sealed    bool
	condemned bool // being collected: no new reference may rest on it
	summary   summary
	writable  bool // file is open for writing
	refs      int  // readers at work
	gone      bool
	element   *list.Element // in segmentSet.opened while file may be open

	// opening guards file and aead until they are set.
	opening sync.Mutex
	file    durable.File
	aead    cipher.AEAD // nil if not encrypted
}

func segmentName(number, generation uint64, suffix string) string {
	return fmt.Sprintf("%016x-%016x%s", number, generation, suffix)
}

// parseSegmentName reads the name of a segment's file.
func parseSegmentName(name string) (number, generation uint64, ok bool) {
	name, ours := strings.CutSuffix(name, segmentSuffix)
	a, b, found := strings.Cut(name, "-")
	if !ours || !found || len(a) != 16 || len(b) != 16 {
		return 0, 0, false
	}
	number, err1 := strconv.ParseUint(a, 16, 64)
	generation, err2 := strconv.ParseUint(b, 16, 64)
	return number, generation, err1 == nil && err2 == nil
}

// segmentSet is the live set: the segments whose records count. It is safe for
// concurrent use.
type segmentSet struct {
	fs     durable.FS
	dir    string
	keys   *keys // nil if not encrypted
	repoID [16]byte

	mu       sync.Mutex
	byNumber map[uint64]*segment
	opened   *list.List // of *segment, most recently used first
	next     uint64     // number of the next segment
	sessions map[*Session]struct{}
	live     marks // of the collection that is running, or nil
}

func newSegmentSet(fsys durable.FS, dir string, k *keys, repoID [16]byte) *segmentSet {
	return &segmentSet{
		fs: fsys, dir: dir, keys: k, repoID: repoID,
		byNumber: map[uint64]*segment{}, opened: list.New(), next: 1,
		sessions: map[*Session]struct{}{},
	}
}

// holdsLocked reports whether a location can be relied on: its segment is
// live, is the one that was meant, and reaches that far.
func (s *segmentSet) holdsLocked(loc location) (*segment, bool) {
	seg := s.byNumber[loc.Segment]
	if seg == nil || seg.generation != loc.Generation {
		return nil, false
	}
	return seg, !seg.sealed || loc.Ordinal < seg.summary.Records
}

// protect makes a session's claim to a record, so that no collection takes
// it before the session ends. False means that the record does not
// count: it is gone or about to go.
func (s *segmentSet) protect(session *Session, id ID, loc location) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	seg, ok := s.holdsLocked(loc)
	if !ok || seg.condemned {
		return false
	}
	session.marks.set(loc)
	session.loose[id] = struct{}{}
	session.unlisted.Store(int64(len(session.loose)))
	return true
}

// listed remembers that a session has put a node, and so needs its children.
func (s *segmentSet) listed(session *Session, node ID, children *[Fanout]ID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	session.nodes[node] = struct{}{}
	delete(session.loose, node)
	for i := range children {
		delete(session.loose, children[i])
	}
	session.unlisted.Store(int64(len(session.loose)))
}

// sessionNeeds are the ids that a session rests on.
type sessionNeeds struct {
	session      *Session
	nodes, loose []ID
}

// sessionNeeds returns what the sessions that run rest on.
func (s *segmentSet) sessionNeeds() []sessionNeeds {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []sessionNeeds
	for session := range s.sessions {
		out = append(out, sessionNeeds{session, slices.Collect(maps.Keys(session.nodes)), slices.Collect(maps.Keys(session.loose))})
	}
	return out
}

// acquire opens the segment of a location for reading. The caller releases it.
func (s *segmentSet) acquire(loc location) (*segment, error) {
	s.mu.Lock()
	seg, ok := s.holdsLocked(loc)
	return s.acquireLocked(seg, ok)
}

// acquireWhole is acquire for a segment of which no record need be known.
func (s *segmentSet) acquireWhole(seg *segment) (*segment, error) {
	s.mu.Lock()
	return s.acquireLocked(seg, s.byNumber[seg.number] == seg)
}

// acquireLocked opens a segment, if it is live, and unlocks s.
func (s *segmentSet) acquireLocked(seg *segment, live bool) (*segment, error) {
	if !live {
		s.mu.Unlock()
		return nil, errGone
	}
	seg.refs++
	if seg.element == nil {
		seg.element = s.opened.PushFront(seg)
	} else {
		s.opened.MoveToFront(seg.element)
	}
	s.closeIdleLocked()
	s.mu.Unlock()

	if err := seg.open(s); err != nil {
		s.release(seg)
		return nil, damage(&CorruptError{Segment: segmentName(seg.number, seg.generation, ""), Err: err})
	}
	return seg, nil
}

// open opens the file unless it is open.
func (seg *segment) open(s *segmentSet) error {
	seg.opening.Lock()
	defer seg.opening.Unlock()
	if seg.file != nil {
		return nil
	}
	f, err := s.fs.Open(seg.path)
	if err != nil {
		return err
	}
	aead, err := s.cipherOf(seg.number, seg.generation)
	if err != nil {
		return errors.Join(err, f.Close())
	}
	seg.file, seg.aead = f, aead
	return nil
}

// header returns the header of a segment.
func (s *segmentSet) header(number, generation uint64) segmentHeader {
	return segmentHeader{Number: number, Generation: generation, Repository: s.repoID, Encrypted: s.keys != nil}
}

// cipherOf returns the cipher for a segment's payloads, nil if they are plain.
func (s *segmentSet) cipherOf(number, generation uint64) (cipher.AEAD, error) {
	if s.keys == nil {
		return nil, nil
	}
	salt := binary.LittleEndian.AppendUint64(nil, number)
	return s.keys.seal(contextSegment, binary.LittleEndian.AppendUint64(salt, generation))
}

func readSegmentHeader(f durable.File) (segmentHeader, error) {
	b := make([]byte, segmentHeaderSize)
	if n, err := f.ReadAt(b, 0); n < len(b) {
		return segmentHeader{}, fmt.Errorf("%s: read header: %w", f.Name(), noEOF(err))
	}
	h, err := decodeSegmentHeader(b)
	if err != nil {
		return h, fmt.Errorf("%s: %w", f.Name(), err)
	}
	return h, nil
}

// noEOF turns the end of a file where more was expected into an error that
// says so.
func noEOF(err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// release ends what acquire began.
func (s *segmentSet) release(seg *segment) {
	s.mu.Lock()
	defer s.mu.Unlock()
	seg.refs--
	if (seg.gone || seg.sealed && seg.writable) && seg.refs == 0 {
		s.closeLocked(seg)
	}
}

// sealLocked makes a segment a sealed one. Its file is not kept open for writing: nothing of this
// process can change it from here on.
func (s *segmentSet) sealLocked(seg *segment, sum summary) {
	seg.sealed, seg.summary = true, sum
	if seg.refs == 0 {
		s.closeLocked(seg)
	}
}

// closeIdleLocked closes the least recently used segments beyond the limit.
func (s *segmentSet) closeIdleLocked() {
	for e := s.opened.Back(); e != nil && s.opened.Len() > maxOpenSegments; {
		seg, previous := e.Value.(*segment), e.Prev()
		if seg.refs == 0 && seg.sealed {
			s.closeLocked(seg)
		}
		e = previous
	}
}

func (s *segmentSet) closeLocked(seg *segment) {
	if seg.element != nil {
		s.opened.Remove(seg.element)
		seg.element = nil
	}
	seg.opening.Lock()
	defer seg.opening.Unlock()
	if seg.file != nil {
		_ = seg.file.Close() // it was read only, or its writer has synced it
		seg.file, seg.aead = nil, nil
	}
	seg.writable = false
}

// add enters a segment into the live set.
func (s *segmentSet) add(seg *segment) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.byNumber[seg.number] = seg
	s.next = max(s.next, seg.number+1)
}

// last returns the highest number of a segment so far.
func (s *segmentSet) last() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.next - 1
}

// pass has new segments get numbers above number.
func (s *segmentSet) pass(number uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.next = max(s.next, number+1)
}

// takeNumber returns the number for a new segment.
func (s *segmentSet) takeNumber() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.next++
	return s.next - 1
}

// drop takes a segment out of the live set. Readers at work finish.
func (s *segmentSet) drop(seg *segment) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.byNumber, seg.number)
	seg.gone = true
	if seg.refs == 0 {
		s.closeLocked(seg)
	}
}

// sealedSegments returns the sealed segments in the order of their numbers.
func (s *segmentSet) sealedSegments() []*segment {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []*segment
	for _, seg := range s.byNumber {
		if seg.sealed {
			out = append(out, seg)
		}
	}
	sortByNumber(out)
	return out
}

// unsealed returns the numbers of the segments that are not sealed: those that are being
// written, and those that failed, until the next opening.
func (s *segmentSet) unsealed() []uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []uint64
	for number, seg := range s.byNumber {
		if !seg.sealed {
			out = append(out, number)
		}
	}
	return out
}

// closeAll closes every file.
func (s *segmentSet) closeAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, seg := range s.byNumber {
		s.closeLocked(seg)
	}
}

// record reads and checks one whole record into buf's memory and returns its
// header and its payload, decrypted.
func (seg *segment) record(buf []byte, id ID, off, stored uint32) (recordHeader, []byte, error) {
	size := recordHeaderSize + int(stored)
	if stored > maxPayload {
		return recordHeader{}, nil, fmt.Errorf("index entry of %d stored bytes", stored)
	}
	if cap(buf) < size {
		buf = make([]byte, size)
	}
	buf = buf[:size]
	if n, err := seg.file.ReadAt(buf, int64(off)); n < size {
		return recordHeader{}, nil, fmt.Errorf("read %d bytes: %w", size, noEOF(err))
	}
	return openRecord(seg.aead, buf, id, int64(off))
}

// openRecord checks a record that was read from offset off and returns its
// payload, decrypted in place.
func openRecord(aead cipher.AEAD, record []byte, id ID, off int64) (recordHeader, []byte, error) {
	h, err := checkRecord(record)
	if err != nil {
		return h, nil, err
	}
	if h.ID != id {
		return h, nil, fmt.Errorf("the record there is that of chunk %.16s", h.ID)
	}
	payload := record[recordHeaderSize:]
	if aead == nil {
		return h, payload, nil
	}
	payload, err = aead.Open(payload[:0], nonce(off), payload, record[:48])
	if err != nil {
		return h, nil, errors.New("decryption failed: the record was changed")
	}
	return h, payload, nil
}
