package blockstore

import (
	"context"
	"errors"
	"path/filepath"

	"github.com/holdfast-backup/holdfast/internal/durable"
)

// RebuildStats tells what RebuildIndex found.
type RebuildStats struct {
	Segments int   `json:"segments"`
	Records  int64 `json:"records"` // chunks and map nodes
	Chunks   int64 `json:"chunks"`
}

// RebuildIndex throws the index of the repository in dir away and makes it anew from
// the segments. It may be stopped at any moment, by ctx too: the next opening goes on.
// progress, which may be nil, hears of segments done and how many there are.
func RebuildIndex(ctx context.Context, dir string, o Options, progress func(done, total int)) (_ RebuildStats, err error) {
	o, err = o.withDefaults()
	if err != nil {
		return RebuildStats{}, err
	}
	if _, err := wholeConfigs(o.fs, dir, readConfigs(o.fs, dir)); err != nil {
		return RebuildStats{}, err
	}
	unlock, err := lock(dir, o.Watch)
	if err != nil {
		return RebuildStats{}, err
	}
	path := filepath.Join(dir, indexDir)
	removing := o.Watch.BeginMany(durable.Changing, &path)
	_, err = emptyIndex(path)
	removing.End()
	unlock()
	if err != nil {
		return RebuildStats{}, err
	}
	r, err := openRepository(ctx, dir, o, progress)
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
