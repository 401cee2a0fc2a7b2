package blockstore

import (
	"errors"
	"fmt"
	"path/filepath"
)

// checkSegments refuses a repository.json that is not that of the segments: of another
// repository, with another repository key, or one that calls plain what is encrypted. Under it
// every chunk would look damaged, and what is stored next would be another's to
// read. It asks a few segments, spread over all; the first that fits settles it.
func (r *Repository) checkSegments() error {
	const samples = 16
	files, err := r.fs.ReadDir(r.segments.dir)
	if err != nil {
		return err
	}
	var strange error
	for i := 0; i < len(files); i += max(1, len(files)/samples) {
		if _, _, ok := parseSegmentName(files[i].Name()); !ok {
			continue
		}
		err := r.belongs(filepath.Join(r.segments.dir, files[i].Name()))
		if err == nil {
			return nil
		}
		if errors.Is(err, errStrange) {
			strange = err
		}
	}
	if strange != nil {
		return fmt.Errorf("%s is not that of these segments: %w; bring the right one back", filepath.Join(r.dir, configFile), strange)
	}
	return nil
}

// errStrange means that a segment is not of this repository. A damaged one proves nothing.
var errStrange = errors.New("it is another repository's")

// belongs returns nil if a segment's header and its first record are of this repository. The
// file may have another's name.
func (r *Repository) belongs(path string) error {
	f, err := r.fs.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	h, err := readSegmentHeader(f)
	if err != nil {
		return err
	}
	size, err := f.Size()
	if err != nil {
		return err
	}
	aead, err := r.segments.cipherOf(h.Number, h.Generation)
	if err != nil {
		return err
	}
	var opened error
	_, err = readRecord(f, segmentHeaderSize, size, make([]byte, recordHeaderSize+maxPayload), func(record []byte, off int64) bool {
		head, err := decodeRecordHeader(record)
		if err == nil && head.Type != tocRecord {
			_, _, opened = openRecord(aead, record, head.ID, off)
		}
		return true
	})
	switch {
	case err != nil:
		return err
	case h.Repository != r.segments.repoID:
		return fmt.Errorf("%w: %s is of repository %x", errStrange, path, h.Repository)
	case h.Encrypted && r.keys == nil:
		return fmt.Errorf("%w: nothing is encrypted there, and %s is", errStrange, path)
	case !h.Encrypted && r.keys != nil:
		return fmt.Errorf("%w: all is encrypted there, and %s is not", errStrange, path)
	case opened != nil:
		return fmt.Errorf("%w: its key does not open %s", errStrange, path)
	}
	return nil
}
