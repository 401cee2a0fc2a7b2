package blockstore

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
)

// PointFiles returns the files that a point needs, relative to the repository's folder: its own,
// and every segment that holds a chunk or a node of it. All are complete and not written to any more, so
// they can be made immutable. A collection may move what is in them meanwhile: who has made them
// immutable asks again, until nothing new is among them.
func (r *Repository) PointFiles(ctx context.Context, id PointID) ([]string, error) {
	p, err := r.Point(id)
	if err != nil {
		return nil, err
	}
	const tries = 10 // a collection can move a record into the segment that is open
	for range tries {
		if err := r.appender.finish(); err != nil {
			return nil, err
		}
		needed, walked := marks{}, walkedNodes{}
		for _, d := range p.Disks {
			if err := r.markTree(ctx, r.tree(d.Map), needed, walked); err != nil {
				return nil, fmt.Errorf("list the files of disk %s of point %.8s: %w", d.Name, id, err)
			}
		}
		if files, ok := r.segments.files(needed); ok {
			return append(files, filepath.Join(pointsDir, filepath.Base(r.pointPath(id)))), nil
		}
	}
	return nil, fmt.Errorf("list the files of point %.8s: they change too often; try again later", id)
}

// markTree marks the records of a subtree.
func (r *Repository) markTree(ctx context.Context, t tree, needed marks, walked walkedNodes) error {
	if t.id.IsNull() {
		return nil
	}
	loc, ok, err := r.locate(ctx, t.id)
	if err != nil {
		return err
	}
	if !ok {
		return &CorruptError{ID: t.id, Err: errors.New("it is in no segment")}
	}
	needed.set(loc)
	if t.level == 0 || !walked.add(t.level, loc) {
		return nil
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	n, err := r.node(t.id)
	if err != nil {
		return err
	}
	for i := range Fanout {
		if err := r.markTree(ctx, t.child(n, i), needed, walked); err != nil {
			return err
		}
	}
	return nil
}

// files returns the names of the segments that have records in a set, relative to the repository's
// folder, in order; false if one of them is not sealed or is gone.
func (s *segmentSet) files(records marks) ([]string, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var files []string
	for number := range records {
		seg := s.byNumber[number]
		if seg == nil || !seg.sealed {
			return nil, false
		}
		files = append(files, filepath.Join(segmentsDir, segmentName(seg.number, seg.generation, segmentSuffix)))
	}
	slices.Sort(files)
	return files, true
}
