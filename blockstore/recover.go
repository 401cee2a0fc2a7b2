package blockstore

import (
	"bytes"
	"context"
	"crypto/cipher"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/holdfast-backup/holdfast/internal/durable"
)

// loadSegments finds the live set: it recovers unsealed segments and enters sealed ones that
// the index lacks. progress, which may be nil, hears of segments done and how many there are.
func (r *Repository) loadSegments(ctx context.Context, progress func(done, total int)) error {
	known, err := r.index.summaries()
	if err != nil {
		return err
	}
	files, err := r.fs.ReadDir(r.segments.dir)
	if err != nil {
		return err
	}
	var unknown []*segment
	var highest uint64
	for _, f := range files {
		number, generation, ok := parseSegmentName(f.Name())
		if !ok {
			r.log.Warn("the folder of segments holds something else", attrPath(f.Name()))
			continue
		}
		seg := &segment{number: number, generation: generation, path: filepath.Join(r.segments.dir, f.Name()), sealed: true}
		highest = max(highest, number)
		info, err := f.Info()
		if err != nil {
			return err
		}
		sum, ok := known[number]
		if ok && sum.Generation == generation && sum.Size == info.Size() {
			seg.summary = sum
			r.segments.add(seg)
			continue
		}
		if ok && sum.Generation == generation {
			r.log.Error("a segment has not the length with which it was sealed; repo verify tells what is missing",
				attrSegment(seg), slog.Int64("bytes", info.Size()), slog.Int64("want_bytes", sum.Size))
		}
		unknown = append(unknown, seg)
	}
	// Ascending, and after those that are known: where two segments hold the same chunk, the later
	// one counts.
	for i, seg := range unknown {
		if progress != nil {
			progress(len(files)-len(unknown)+i, len(files))
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := r.loadSegment(seg); err != nil {
			return fmt.Errorf("segment %s: %w", seg.path, err)
		}
	}
	r.segments.pass(highest) // also of one that could not be opened, and may be the next time
	if progress != nil {
		progress(len(files), len(files))
	}
	return nil
}

// loadSegment enters a segment that the index does not know as sealed.
func (r *Repository) loadSegment(seg *segment) error {
	f, err := r.fs.OpenWrite(seg.path)
	// A segment is immutable only once it is sealed.
	immutable := errors.Is(err, syscall.EPERM)
	if immutable {
		f, err = r.fs.Open(seg.path)
	}
	if err != nil && !away(err) {
		// The points that need it fail when they are read; others don't.
		r.log.Error("segment cannot be opened", attrSegment(seg), attrErr(err))
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	// After a sync that failed, and a cut that failed too, bytes can be read that the disk
	// does not have, and that no later sync writes.
	if err := errors.Join(f.Sync(), f.DropCache()); err != nil {
		return err
	}
	size, err := f.Size()
	if err != nil {
		return err
	}
	entries, err := readEntries(f, size, seg.generation)
	switch {
	case err == nil:
		return r.enterRecords(seg, entries, size)
	case errors.Is(err, errUnsealed) && !immutable:
		return r.recoverSegment(seg, f, size)
	case away(err):
		return err
	}
	_, unread := errors.AsType[syscall.Errno](err)
	r.log.Error("the end of a segment cannot be read; its records are read instead", attrSegment(seg), attrErr(err))
	reads := &readFailures{File: f}
	if entries, err = r.scan(reads, seg.number, seg.generation, size); err != nil {
		return err
	}
	if away(reads.err) {
		return reads.err
	}
	if unread || reads.err != nil {
		// The next attempt may read it all: this one is not remembered.
		return r.enterUnlisted(seg, entries, size)
	}
	return r.enterRecords(seg, entries, size)
}

// recoverSegment seals a segment whose writer was stopped, or whose end is damaged: it is
// cut behind its last whole record. What follows was never durable. A bad record between
// whole ones may be what a loss of power left of bytes that were not durable, or damage; its
// id is not entered.
func (r *Repository) recoverSegment(seg *segment, f durable.File, size int64) error {
	reads := &readFailures{File: f}
	_, headerErr := readSegmentHeader(reads)
	entries, err := r.scan(reads, seg.number, seg.generation, size)
	if err != nil {
		return err
	}
	for len(entries) > 0 && entries[len(entries)-1].ID.IsNull() {
		entries = entries[:len(entries)-1]
	}
	if away(reads.err) {
		return reads.err
	}
	if reads.err != nil {
		// What cannot be read may be durable records, and a later attempt may read them.
		r.log.Error("a part of a segment cannot be read; it is left as it is", attrSegment(seg), attrErr(reads.err))
		return r.enterUnlisted(seg, entries, size)
	}
	if len(entries) == 0 && size <= segmentHeaderSize+writeSize+maxPayload {
		// All that the first write to it left.
		r.log.Info("removed a segment without whole records", attrSegment(seg))
		return r.fs.Remove(seg.path)
	}
	if len(entries) == 0 {
		r.log.Error("a segment has no whole record and was left as it is", attrSegment(seg), slog.Int64("bytes", size))
		return nil
	}
	if headerErr != nil {
		r.log.Error("the header of a segment was damaged, and is written again from its name", attrSegment(seg), attrErr(headerErr))
		if _, err := f.WriteAt(r.segments.header(seg.number, seg.generation).encode(), 0); err != nil {
			return noSpace(err)
		}
	}
	end := recordsEnd(entries)
	if err := errors.Join(f.Truncate(end), f.Sync()); err != nil {
		return err
	}
	tail := encodeTail(seg.generation, entries, end)
	if _, err := f.WriteAt(tail, end); err != nil {
		return noSpace(err)
	}
	if err := f.Sync(); err != nil {
		return err
	}
	// The file may have come with the crash, its name not durable yet.
	if err := r.fs.SyncDir(r.segments.dir); err != nil {
		return err
	}
	r.log.Info("recovered a segment", attrSegment(seg), slog.Int("records", len(entries)),
		slog.Int64("cut_bytes", size-end))
	return r.enterRecords(seg, entries, end+int64(len(tail)))
}

// enterRecords enters a sealed segment and its records into the live set and the
// index.
func (r *Repository) enterRecords(seg *segment, entries []tocEntry, size int64) error {
	seg.summary = summarize(seg.generation, entries, size)
	r.segments.add(seg)
	if err := r.leaveLater(seg, entries); err != nil {
		return err
	}
	return r.enter(seg, entries, 0, &seg.summary)
}

// leaveLater clears the ids of those entries of a segment of whose chunks the index has a record in a
// later one that counts: a collection that was killed leaves segments in quarantine, whose records
// were copied out of them, or stored anew because they are bad.
func (r *Repository) leaveLater(seg *segment, entries []tocEntry) error {
	if r.segments.last() == seg.number {
		return nil
	}
	for i, e := range entries {
		loc, ok, err := r.index.get(e.ID)
		if err != nil {
			return err
		}
		if ok && loc.Segment > seg.number && r.segments.holds(loc) {
			entries[i].ID = ID{}
		}
	}
	return nil
}

// errUnsealed means that a segment does not end as a sealed one does.
var errUnsealed = errors.New("the segment has no table of contents at its end")

// errUnlisted is of a segment that enterUnlisted entered.
var errUnlisted = errors.New("it could not be read whole when the repository was opened")

// enterUnlisted is enterRecords for a segment that could not be read whole. The next opening
// tries again; until then it is not collected, for its records may have other ordinals.
func (r *Repository) enterUnlisted(seg *segment, entries []tocEntry, size int64) error {
	seg.unlisted = true
	seg.summary = summarize(seg.generation, entries, size)
	r.segments.add(seg)
	if err := r.leaveLater(seg, entries); err != nil {
		return err
	}
	return r.enter(seg, entries, 0, nil)
}

// readEntries reads the table of contents of a sealed segment. The error wraps errUnsealed
// if what could be read is none.
func readEntries(f durable.File, size int64, generation uint64) ([]tocEntry, error) {
	if size < segmentHeaderSize+recordHeaderSize+footerSize {
		return nil, fmt.Errorf("%w: it has %d bytes", errUnsealed, size)
	}
	b := make([]byte, footerSize)
	if n, err := f.ReadAt(b, size-footerSize); n < len(b) {
		return nil, noEOF(err)
	}
	foot, err := decodeFooter(b)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errUnsealed, err)
	}
	if foot.Generation != generation {
		return nil, fmt.Errorf("%w: the footer is that of another segment", errUnsealed)
	}
	length := int64(recordHeaderSize) + int64(foot.Records)*tocEntrySize
	if int64(foot.TOC)+length+footerSize != size {
		return nil, fmt.Errorf("%w: the footer does not fit the file's length", errUnsealed)
	}
	record := make([]byte, length)
	if n, err := f.ReadAt(record, int64(foot.TOC)); n < len(record) {
		return nil, noEOF(err)
	}
	h, err := checkRecord(record)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errUnsealed, err)
	}
	if h.Type != tocRecord {
		return nil, fmt.Errorf("%w: a record of type %d is in its place", errUnsealed, h.Type)
	}
	entries, err := decodeTOC(record[recordHeaderSize:], int64(foot.TOC))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errUnsealed, err)
	}
	return entries, nil
}

// scanRecords finds the whole records of a segment without its table of contents. What
// lies between them becomes entries with the null id, which nobody looks for:
// another segment may have the chunk that was there. Behind such a gap a record may lie
// within the payload of another, written by a guest: there it counts only if
// genuine says so.
func scanRecords(f durable.File, size int64, genuine func(record []byte, off int64) bool) []tocEntry {
	var entries []tocEntry
	trusted := func([]byte, int64) bool { return true }
	record := make([]byte, recordHeaderSize+maxPayload)
	for off := int64(segmentHeaderSize); off < size && len(entries) < maxRecords; {
		h, err := readRecord(f, off, size, record, trusted)
		if err == nil && h.Type == tocRecord {
			break
		}
		if err == nil {
			e := tocEntry{ID: h.ID, Off: uint32(off), Stored: h.Stored, Raw: h.Raw, Type: h.Type, Codec: h.Codec}
			entries = append(entries, e)
			off += e.size()
			continue
		}
		trusted = genuine
		next := nextRecord(f, off+recordHeaderSize, size, record, genuine)
		if next-off < recordHeaderSize {
			break
		}
		for ; next-off > recordHeaderSize+maxPayload; off += recordHeaderSize + maxPayload/2 {
			entries = append(entries, gap(off, maxPayload/2))
		}
		entries = append(entries, gap(off, next-off-recordHeaderSize))
		off = next
	}
	return entries
}

// gap stands for bytes that are no record, with a header's length beside stored.
func gap(off, stored int64) tocEntry {
	return tocEntry{Off: uint32(off), Stored: uint32(stored), Type: chunkRecord}
}

// genuine reports whether a record's content has the hash that it says; a table of contents
// is passed over.
func (r *Repository) genuine(aead cipher.AEAD) func(record []byte, off int64) bool {
	return func(record []byte, off int64) bool {
		h, err := decodeRecordHeader(record)
		if err != nil || h.Type == tocRecord {
			return false
		}
		_, payload, err := openRecord(aead, record, h.ID, off)
		if err != nil {
			return false
		}
		data, err := r.coder.expand(nil, payload, h.Codec, int(h.Raw))
		return err == nil && r.hash(h.Type, data) == h.ID
	}
}

// scan is scanRecords for a segment of this repository.
func (r *Repository) scan(f durable.File, number, generation uint64, size int64) ([]tocEntry, error) {
	aead, err := r.segments.cipherOf(number, generation)
	if err != nil {
		return nil, err
	}
	return scanRecords(f, size, r.genuine(aead)), nil
}

// readRecord reads the record at off, checks it, and asks accept. buf has room for any.
func readRecord(f durable.File, off, size int64, buf []byte, accept func(record []byte, off int64) bool) (recordHeader, error) {
	if n, err := f.ReadAt(buf[:recordHeaderSize], off); n < recordHeaderSize {
		return recordHeader{}, noEOF(err)
	}
	h, err := decodeRecordHeader(buf)
	if err != nil {
		return h, err
	}
	end := recordHeaderSize + int64(h.Stored)
	if off+end > size || end > int64(len(buf)) && h.Type != tocRecord {
		return h, errTorn
	}
	if end > int64(len(buf)) {
		buf = append(make([]byte, 0, end), buf[:recordHeaderSize]...)
	}
	buf = buf[:end]
	if n, err := f.ReadAt(buf[recordHeaderSize:], off+recordHeaderSize); n < len(buf)-recordHeaderSize {
		return h, noEOF(err)
	}
	if h, err = checkRecord(buf); err == nil && !accept(buf, off) {
		err = errTorn
	}
	return h, err
}

// nextRecord returns the offset, from on, of the next whole record; size if there is none.
func nextRecord(f durable.File, from, size int64, buf []byte, accept func(record []byte, off int64) bool) int64 {
	magic := binary.LittleEndian.AppendUint32(nil, recordMagic)
	window := make([]byte, 1<<20)
	for from < size {
		n, _ := f.ReadAt(window[:min(int64(len(window)), size-from)], from) // what can't be read holds no record
		for at := 0; ; at++ {
			i := bytes.Index(window[at:n], magic)
			if i < 0 {
				break
			}
			at += i
			if _, err := readRecord(f, from+int64(at), size, buf, accept); err == nil {
				return from + int64(at)
			}
		}
		// The magic may lie across the end of the window.
		from += int64(len(window) - len(magic) + 1)
	}
	return size
}

// recordsEnd returns the offset at which records end.
func recordsEnd(entries []tocEntry) int64 {
	if len(entries) == 0 {
		return segmentHeaderSize
	}
	last := entries[len(entries)-1]
	return int64(last.Off) + last.size()
}

// reindexAgain lets the next chunk that the index lacks have all segments entered again. BadgerDB
// passes in silence over what rot keeps it from compacting.
func (r *Repository) reindexAgain() {
	r.reindexing.Lock()
	defer r.reindexing.Unlock()
	r.reindexed = false
}

// locate returns where a chunk is if its location counts, looking through all
// segments if the index does not have it.
func (r *Repository) locate(ctx context.Context, id ID) (location, bool, error) {
	loc, ok, err := r.find(id)
	if err != nil || ok && r.segments.holds(loc) {
		return loc, ok, err
	}
	if err := r.reindexOnce(ctx.Done()); err != nil {
		return location{}, false, err
	}
	loc, ok, err = r.find(id)
	return loc, ok && r.segments.holds(loc), err
}

// reindexOnce enters all segments again, once until reindexAgain. If done stops it, the next call begins
// anew.
func (r *Repository) reindexOnce(done <-chan struct{}) error {
	r.reindexing.Lock()
	defer r.reindexing.Unlock()
	if r.reindexed {
		return nil
	}
	r.log.Warn("the index lacks a chunk that a restore point needs; entering all segments again")
	// Of a chunk with several records the latest counts.
	for _, seg := range slices.Backward(r.segments.sealedSegments()) {
		select {
		case <-done:
			return context.Canceled
		default:
		}
		if err := r.enterMissing(seg); err != nil {
			return err
		}
	}
	r.reindexed = true
	return nil
}

// enterMissing enters those records of a sealed segment for whose chunks the index
// has no entry that counts. A chunk that is being stored, or moved, at this moment is not
// missing.
func (r *Repository) enterMissing(seg *segment) error {
	records, err := r.entries(seg)
	if err != nil {
		if away(err) {
			return err
		}
		if !errors.Is(err, errGone) { // collected meanwhile
			r.log.Error("segment's records cannot be listed", attrSegment(seg), attrErr(err))
		}
		return nil
	}
	held := map[ID]*claim{}
	defer func() {
		for id, cl := range held {
			r.claims.drop(id, cl)
		}
	}()
	var missing []entry
	for i, e := range records {
		if e.ID.IsNull() || held[e.ID] != nil {
			continue
		}
		cl, mine := r.claims.take(e.ID)
		if !mine {
			continue
		}
		loc, ok, err := r.index.get(e.ID)
		if err != nil || ok && r.segments.holds(loc) {
			r.claims.drop(e.ID, cl)
			if err != nil {
				return err
			}
			continue
		}
		held[e.ID] = cl
		missing = append(missing, entry{e.ID, location{
			Segment: seg.number, Generation: seg.generation, Off: e.Off, Stored: e.Stored, Ordinal: uint32(i),
		}})
	}
	return r.index.write(func(w indexWrite) error { return w.put(missing) })
}

// entries returns the records of a sealed segment, each at its ordinal. If its table of
// contents is damaged, the ordinals are not known: a CorruptError.
func (r *Repository) entries(seg *segment) ([]tocEntry, error) {
	opened, err := r.segments.acquireWhole(seg)
	if err != nil {
		return nil, err
	}
	defer r.segments.release(opened)
	size, err := opened.file.Size()
	if err != nil {
		return nil, err
	}
	if seg.unlisted {
		return nil, &CorruptError{Segment: segmentName(seg.number, seg.generation, ""), Off: size, Err: errUnlisted}
	}
	entries, err := readEntries(opened.file, size, seg.generation)
	if err != nil {
		return nil, damage(&CorruptError{Segment: segmentName(seg.number, seg.generation, ""), Off: size, Err: err})
	}
	return entries, nil
}

// holds reports whether a location counts.
func (s *segmentSet) holds(loc location) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, ok := s.holdsLocked(loc)
	return ok
}
