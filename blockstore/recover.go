package blockstore

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/holdfast-backup/holdfast/internal/durable"
)

// loadSegments finds the live set: it recovers unsealed segments and
// enters sealed ones that the index lacks.
func (r *Repository) loadSegments() error {
	known, err := r.index.summaries()
	if err != nil {
		return err
	}
	files, err := r.fs.ReadDir(r.segments.dir)
	if err != nil {
		return err
	}
	// Ascending: where two segments hold the same chunk, the later one counts.
	for _, f := range files {
		number, generation, suffix, ok := parseSegmentName(f.Name())
		if !ok || (suffix != sealedSuffix && suffix != openSuffix) {
			r.log.Warn("the folder of segments holds something else", attrPath(f.Name()))
			continue
		}
		seg := &segment{number: number, generation: generation, path: filepath.Join(r.segments.dir, f.Name()), sealed: true}
		if suffix == openSuffix {
			if err := r.recoverSegment(seg); err != nil {
				return err
			}
			continue
		}
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
		if err := r.enterSealed(seg); err != nil {
			return err
		}
	}
	return nil
}

// recoverSegment seals a segment whose writer was stopped: it is cut behind its last
// whole record. What follows was never durable. A bad record between whole ones may be
// what a loss of power left of bytes that were not durable, or damage; its id is not entered.
func (r *Repository) recoverSegment(seg *segment) error {
	f, err := r.fs.OpenWrite(seg.path)
	if err != nil {
		return err
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		return err
	}
	if size <= segmentHeaderSize {
		r.log.Info("removed a segment without records", attrSegment(seg))
		return r.fs.Remove(seg.path)
	}
	if _, err := readSegmentHeader(f); err != nil {
		r.log.Error("unsealed segment has a damaged header and was put aside", attrSegment(seg), attrErr(err))
		return r.fs.Rename(seg.path, seg.path+badSuffix)
	}
	entries, err := scanRecords(f, size)
	if err != nil {
		return fmt.Errorf("recover segment %s: %w", seg.path, err)
	}
	for len(entries) > 0 && entries[len(entries)-1].ID.IsNull() {
		entries = entries[:len(entries)-1]
	}
	end := recordsEnd(entries)
	if len(entries) == 0 {
		r.log.Info("removed a segment without whole records", attrSegment(seg))
		return r.fs.Remove(seg.path)
	}
	tail := encodeTail(entries, end)
	if err := f.Truncate(end); err != nil {
		return err
	}
	if _, err := f.WriteAt(tail, end); err != nil {
		return noSpace(err)
	}
	if err := f.Sync(); err != nil {
		return err
	}
	sealed := filepath.Join(r.segments.dir, segmentName(seg.number, seg.generation, sealedSuffix))
	if err := r.fs.Rename(seg.path, sealed); err != nil {
		return err
	}
	if err := r.fs.SyncDir(r.segments.dir); err != nil {
		return err
	}
	r.log.Info("recovered a segment", attrSegment(seg), slog.Int("records", len(entries)),
		slog.Int64("cut_bytes", size-end))
	seg.path = sealed
	return r.enterRecords(seg, entries, end+int64(len(tail)))
}

// enterSealed enters a sealed segment into the index and the live set.
func (r *Repository) enterSealed(seg *segment) error {
	f, err := r.fs.Open(seg.path)
	if err != nil {
		return err
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		return err
	}
	entries, err := readEntries(f, size)
	if err != nil {
		r.log.Error("segment's table of contents is damaged; its records are read instead", attrSegment(seg), attrErr(err))
		if entries, err = scanRecords(f, size); err != nil {
			return fmt.Errorf("read segment %s: %w", seg.path, err)
		}
	}
	return r.enterRecords(seg, entries, size)
}

func (r *Repository) enterRecords(seg *segment, entries []tocEntry, size int64) error {
	seg.summary = summarize(seg.generation, entries, size)
	r.segments.add(seg)
	return r.enter(seg, entries, 0, &seg.summary)
}

// readEntries reads the table of contents of a sealed segment.
func readEntries(f durable.File, size int64) ([]tocEntry, error) {
	if size < segmentHeaderSize+recordHeaderSize+footerSize {
		return nil, fmt.Errorf("file of %d bytes", size)
	}
	b := make([]byte, footerSize)
	if n, err := f.ReadAt(b, size-footerSize); n < len(b) {
		return nil, noEOF(err)
	}
	foot, err := decodeFooter(b)
	if err != nil {
		return nil, err
	}
	length := int64(recordHeaderSize) + int64(foot.Records)*tocEntrySize
	if int64(foot.TOC)+length+footerSize != size {
		return nil, errors.New("footer does not fit the file's length")
	}
	record := make([]byte, length)
	if n, err := f.ReadAt(record, int64(foot.TOC)); n < len(record) {
		return nil, noEOF(err)
	}
	h, err := checkRecord(record)
	if err != nil {
		return nil, fmt.Errorf("table of contents: %w", err)
	}
	if h.Type != tocRecord {
		return nil, fmt.Errorf("record of type %d where the table of contents should be", h.Type)
	}
	return decodeTOC(record[recordHeaderSize:], int64(foot.TOC))
}

// scanRecords reads a segment's records from the start until there is no record any
// more. One whose bytes are bad keeps its place, so that the others have theirs, and gets the
// null id, which nobody looks for: another segment may have that chunk whole.
func scanRecords(f durable.File, size int64) (entries []tocEntry, err error) {
	in := bufio.NewReaderSize(io.NewSectionReader(f, segmentHeaderSize, size-segmentHeaderSize), 1<<20)
	record := make([]byte, recordHeaderSize, recordHeaderSize+maxPayload)
	off := int64(segmentHeaderSize)
	for len(entries) < maxRecords {
		record = record[:recordHeaderSize]
		if _, err := io.ReadFull(in, record); err != nil {
			return entries, ignoreEOF(err)
		}
		h, noRecord := decodeRecordHeader(record)
		if noRecord != nil || h.Type == tocRecord {
			break
		}
		record = record[:recordHeaderSize+int(h.Stored)]
		if _, err := io.ReadFull(in, record[recordHeaderSize:]); err != nil {
			return entries, ignoreEOF(err)
		}
		if _, bad := checkRecord(record); bad != nil {
			h.ID = ID{}
		}
		e := tocEntry{ID: h.ID, Off: uint32(off), Stored: h.Stored, Raw: h.Raw, Type: h.Type, Codec: h.Codec}
		off += e.size()
		entries = append(entries, e)
	}
	return entries, nil
}

// recordsEnd returns the offset at which records end.
func recordsEnd(entries []tocEntry) int64 {
	if len(entries) == 0 {
		return segmentHeaderSize
	}
	last := entries[len(entries)-1]
	return int64(last.Off) + last.size()
}

// ignoreEOF: a file that ends within a record is what a crash leaves.
func ignoreEOF(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return nil
	}
	return err
}

// reindexOnce enters all segments again, once while the repository is open. It
// reports whether it did so now.
func (r *Repository) reindexOnce() (bool, error) {
	r.reindexing.Lock()
	defer r.reindexing.Unlock()
	if r.reindexed {
		return false, nil
	}
	r.log.Warn("the index lacks a chunk that a restore point needs; entering all segments again")
	for _, seg := range r.segments.sealedSegments() {
		if err := r.enterMissing(seg); err != nil {
			return false, err
		}
	}
	r.reindexed = true
	return true, nil
}

// enterMissing enters those records of a sealed segment for whose chunks the index
// has no entry that counts.
func (r *Repository) enterMissing(seg *segment) error {
	entries, err := r.entries(seg)
	if errors.Is(err, errGone) {
		return nil // collected meanwhile
	}
	if err != nil {
		return err
	}
	for first, e := range entries {
		loc, ok, err := r.find(e.ID)
		if err != nil {
			return err
		}
		if e.ID.IsNull() || ok && r.segments.holds(loc) {
			continue
		}
		if err := r.enter(seg, entries[first:first+1], first, nil); err != nil {
			return err
		}
	}
	return nil
}

// entries returns the records of a sealed segment.
func (r *Repository) entries(seg *segment) ([]tocEntry, error) {
	loc := location{Segment: seg.number, Generation: seg.generation}
	opened, err := r.segments.acquire(loc)
	if err != nil {
		return nil, err
	}
	defer r.segments.release(opened)
	size, err := opened.file.Size()
	if err != nil {
		return nil, err
	}
	entries, err := readEntries(opened.file, size)
	if err != nil {
		entries, err = scanRecords(opened.file, size)
	}
	return entries, err
}

// holds reports whether a location counts.
func (s *segmentSet) holds(loc location) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, ok := s.holdsLocked(loc)
	return ok
}

// RebuildStats tells what RebuildIndex found.
type RebuildStats struct {
	Segments int   `json:"segments"`
	Records  int64 `json:"records"` // chunks and map nodes
	Chunks   int64 `json:"chunks"`
}

// RebuildIndex throws the index of the repository in dir away and makes it anew from
// the segments. It may be stopped at any moment: the next opening goes on.
func RebuildIndex(_ context.Context, dir string, o Options) (_ RebuildStats, err error) {
	if _, err := os.Stat(filepath.Join(dir, configFile)); errors.Is(err, os.ErrNotExist) {
		return RebuildStats{}, fmt.Errorf("%s: %w; make one with init", dir, ErrNotRepository)
	}
	unlock, err := lock(dir)
	if err != nil {
		return RebuildStats{}, err
	}
	err = os.RemoveAll(filepath.Join(dir, indexDir))
	unlock()
	if err != nil {
		return RebuildStats{}, err
	}
	r, err := Open(dir, o)
	if err != nil {
		return RebuildStats{}, err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	var s RebuildStats
	for _, seg := range r.segments.sealedSegments() {
		s.Segments++
		s.Records += int64(seg.summary.Records)
		s.Chunks += int64(seg.summary.Chunks)
	}
	return s, nil
}
