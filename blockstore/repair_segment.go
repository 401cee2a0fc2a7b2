package blockstore

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/holdfast-backup/holdfast/internal/durable"
)

// segments looks at every file in the folder of segments.
func (p *repair) segments(ctx context.Context) error {
	r := p.r
	damaged, err := p.damagedIn()
	if err != nil {
		return err
	}
	next := r.appender.nextNumber()
	files, err := r.fs.ReadDir(r.segments.dir)
	if err != nil {
		return err
	}
	for i, f := range files {
		if err := ctx.Err(); err != nil {
			return err
		}
		if p.o.Progress != nil {
			p.o.Progress(i, len(files))
		}
		number, generation, ok := parseSegmentName(f.Name())
		if !ok {
			p.addUnknown(segmentsDir + "/" + f.Name())
			continue
		}
		if number >= next {
			continue // it is being made at this moment
		}
		seg, live, busy := r.segments.lookup(number, generation)
		if busy {
			continue // being written, or failed: the next opening recovers it
		}
		if !live {
			seg = &segment{number: number, generation: generation, path: filepath.Join(r.segments.dir, f.Name())}
		}
		reason, err := p.wrong(ctx, seg, live, damaged[number])
		if err != nil {
			return err
		}
		if reason != "" {
			if err := p.segment(ctx, seg, live, reason); err != nil {
				return fmt.Errorf("repair segment %s: %w", seg.path, err)
			}
		}
	}
	if p.o.Progress != nil {
		p.o.Progress(len(files), len(files))
	}
	return p.missing(files)
}

// missing takes segments whose files were removed out of use.
func (p *repair) missing(files []os.DirEntry) error {
	there := map[string]bool{}
	for _, f := range files {
		there[f.Name()] = true
	}
	for _, seg := range p.r.segments.sealedSegments() {
		name := filepath.Base(seg.path)
		if there[name] {
			continue
		}
		if f, err := p.r.fs.Open(seg.path); err == nil {
			_ = f.Close() // it was sealed since the folder was listed
			continue
		} else if !errors.Is(err, os.ErrNotExist) {
			continue
		}
		if p.o.Apply {
			p.r.segments.drop(seg)
			if err := p.r.index.write(func(w indexWrite) error { return w.removeSummary(seg.number) }); err != nil {
				return err
			}
		}
		p.add(RepairAction{
			Kind: RepairSegment, File: segmentsDir + "/" + name, Reason: "the file is missing",
			Action: "forget it", Done: p.o.Apply,
		})
	}
	return nil
}

// lookup returns a live segment, and whether it is not sealed.
func (s *segmentSet) lookup(number, generation uint64) (seg *segment, live, busy bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	seg = s.byNumber[number]
	live = seg != nil && seg.generation == generation
	return seg, live, live && !seg.sealed
}

// damagedIn counts the records that are known to be bad, by segment.
func (p *repair) damagedIn() (map[uint64]int, error) {
	out := map[uint64]int{}
	for _, id := range p.r.damaged.list() {
		loc, ok, err := p.r.index.get(id)
		if err != nil {
			return nil, err
		}
		if ok && p.r.segments.holds(loc) {
			out[loc.Segment]++
		}
	}
	return out, nil
}

// wrong says why a segment is to be replaced; "" if it is not.
func (p *repair) wrong(ctx context.Context, seg *segment, live bool, damaged int) (reason string, err error) {
	if !live {
		return "it could not be read when the repository was opened", nil
	}
	v := &verification{r: p.r}
	header, contents, err := v.envelope(ctx, seg)
	if errors.Is(err, errGone) {
		return "", nil
	}
	if err == nil && damaged > 0 {
		reason = fmt.Sprintf("%d of its records are damaged", damaged)
	}
	if around := cmp.Or(contents, header); around != nil {
		reason = around.Error()
	}
	return reason, err
}

// salvage is a segment that is being replaced.
type salvage struct {
	file    *segment // what its file is by its own header, open for reading
	seg     *segment // what its name says
	entries []tocEntry
	record  []byte
	plain   []byte
	good    int
	bad     []ID
}

// segment stores what is good of a segment anew and moves its file to the quarantine.
func (p *repair) segment(ctx context.Context, seg *segment, live bool, reason string) error {
	a := RepairAction{Kind: RepairSegment, File: segmentsDir + "/" + filepath.Base(seg.path), Reason: reason}
	if fixed, err := p.r.fs.Immutable(seg.path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	} else if fixed {
		a.Action = "none: the file carries the immutable attribute; take that off and repair again"
		p.add(a)
		return nil
	}
	s, err := p.openSalvage(seg)
	if err != nil {
		return err
	}
	if s.file.file != nil {
		defer s.file.file.Close()
	}
	set := p.r.segments
	if p.o.Apply {
		// From here on nobody comes to rest on a record of this segment.
		set.mu.Lock()
		seg.condemned = true
		set.mu.Unlock()
	}
	err = p.salvage(ctx, s)
	if err == nil && p.o.Apply {
		err = p.replace(s, live, a.File)
	}
	if err != nil {
		set.mu.Lock()
		seg.condemned = false
		set.mu.Unlock()
		return err
	}
	a.Action = fmt.Sprintf("store its %d good records anew, remember %d as damaged, move the file to the quarantine", s.good, len(s.bad))
	a.Done = p.o.Apply
	p.add(a)
	return nil
}

// openSalvage lists what can be found in a segment's file, whatever its name: two segments may have
// been swapped. A file that cannot be opened has nothing.
func (p *repair) openSalvage(seg *segment) (*salvage, error) {
	s := &salvage{
		seg: seg, file: &segment{number: seg.number, generation: seg.generation, path: seg.path},
		record: make([]byte, recordHeaderSize+maxPayload), plain: make([]byte, max(p.r.chunkSize, nodeSize)),
	}
	f, err := p.r.fs.Open(seg.path)
	if err != nil {
		if away(err) {
			return nil, err
		}
		return s, nil
	}
	s.file.file = f
	_ = f.DropCache() // where it can't be, the page cache is what is read
	if h, err := readSegmentHeader(f); err == nil && h.Repository == p.r.segments.repoID {
		s.file.number, s.file.generation = h.Number, h.Generation
	}
	if err := p.list(s, f); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return s, nil
}

// list finds a file's records.
func (p *repair) list(s *salvage, f durable.File) error {
	size, err := f.Size()
	if err != nil {
		return err
	}
	if s.file.aead, err = p.r.segments.cipherOf(s.file.number, s.file.generation); err != nil {
		return err
	}
	if s.entries, err = readEntries(f, size, s.file.generation); err == nil {
		return nil
	}
	reads := &readFailures{File: f}
	s.entries, err = p.r.scan(reads, s.file.number, s.file.generation, size)
	if away(reads.err) {
		return reads.err
	}
	return err
}

// salvage stores the good records of a segment anew, durably, or only counts them.
func (p *repair) salvage(ctx context.Context, s *salvage) error {
	epoch := p.r.appender.begin()
	for i, e := range s.entries {
		if err := ctx.Err(); err != nil {
			return err
		}
		if e.ID.IsNull() {
			continue
		}
		h, payload, err := p.r.readEntry(s.file, e, s.record, s.plain)
		if away(err) {
			return err
		}
		if err != nil {
			s.bad = append(s.bad, e.ID)
			continue
		}
		s.good++
		if p.o.Apply {
			if err := p.relocate(s, i, e, h, payload); err != nil {
				return err
			}
		}
	}
	if !p.o.Apply {
		return nil
	}
	return errors.Join(p.r.appender.flush(), p.r.appender.check(epoch))
}

// relocate stores a good record anew, the i-th of its segment, unless there is another good one of the
// chunk.
func (p *repair) relocate(s *salvage, i int, e tocEntry, h recordHeader, payload []byte) error {
	r := p.r
	from := location{Segment: s.seg.number, Ordinal: uint32(i)}
	for {
		cl, mine := r.claims.take(e.ID)
		if !mine {
			<-cl.ready
			if cl.found {
				r.segments.moved(from, cl.loc)
				return nil
			}
			continue
		}
		at, ok, err := r.index.get(e.ID)
		if err != nil {
			r.claims.drop(e.ID, cl)
			return err
		}
		if ok && r.segments.holds(at) && at.Segment != s.seg.number && r.loadOnce(e.ID, h.Type, make([]byte, h.Raw, h.Raw+decodeSlack), true) == nil {
			r.claims.drop(e.ID, cl)
			r.segments.moved(from, at)
			return nil
		}
		return r.storeClaimed(cl, at, ok, h, payload)
	}
}

// replace takes a segment out of use whose good records are durable elsewhere.
func (p *repair) replace(s *salvage, live bool, file string) error {
	bad, err := p.lostIDs(s)
	if err != nil {
		return err
	}
	if err := p.r.markDamaged(bad); err != nil {
		return err
	}
	// All that is good is durable elsewhere and in the index. Stopped from here on, the next opening
	// may enter the segment again, and the next repair replaces it again.
	if live {
		p.r.segments.drop(s.seg)
	}
	if err := p.quarantine(file); err != nil {
		if live && !s.seg.unlisted {
			err = errors.Join(err, p.r.revive(s.seg))
		}
		return err
	}
	return p.r.index.write(func(w indexWrite) error { return w.removeSummary(s.seg.number) })
}

// lostIDs returns the chunks of a segment's bad records that have no other record.
func (p *repair) lostIDs(s *salvage) ([]ID, error) {
	ids := s.bad
	if s.file.file == nil {
		ids = p.r.damaged.list()
	}
	var lost []ID
	for _, id := range ids {
		at, ok, err := p.r.find(id)
		if err != nil {
			return nil, err
		}
		if !ok || at.Segment == s.seg.number || !p.r.segments.holds(at) {
			lost = append(lost, id)
		}
	}
	return lost, nil
}

// readEntry reads one record, compares the content with its id, and returns its payload,
// decrypted.
func (r *Repository) readEntry(seg *segment, e tocEntry, record, plain []byte) (recordHeader, []byte, error) {
	h, payload, err := seg.record(record, e.ID, e.Off, e.Stored)
	if err != nil {
		return h, nil, err
	}
	if h.Type != e.Type || h.Raw != e.Raw || int(h.Raw) > len(plain) {
		return h, nil, errors.New("the record is not what the table of contents says")
	}
	data, err := r.coder.expand(plain, payload, h.Codec, int(h.Raw))
	if err != nil {
		return h, nil, err
	}
	if r.hash(h.Type, data) != e.ID {
		return h, nil, errors.New("content does not have this hash")
	}
	return h, payload, nil
}
