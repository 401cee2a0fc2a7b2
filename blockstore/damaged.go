package blockstore

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/internal/durable"
)

const (
	// damagedFile holds the ids of the chunks and nodes whose records are known to be bad: an
	// envelope with the ids side by side, ascending.
	damagedFile = "damaged"
	// maxDamaged is how many of them are kept over a closing.
	maxDamaged = (maxEnvelope - envelopeHeaderSize - sealOverhead) / IDSize
)

var damagedKind = envelopeKind{"HFDAMAGE", "holdfast repository format 1: damaged chunks"}

// damagedSet is the chunks and nodes whose records are known to be bad. Their content is
// stored anew by the next backup that meets it. It is safe for concurrent use.
type damagedSet struct {
	count atomic.Int64 // of ids, to be read without mu

	saving  sync.Mutex // held while the file is written; taken before mu
	mu      sync.Mutex // guards the fields below; nothing is taken after it
	ids     map[ID]struct{}
	unsaved int // changes that the file does not have
	saved   int // ids in the file
}

func (d *damagedSet) has(id ID) bool {
	if d.count.Load() == 0 {
		return false
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	_, bad := d.ids[id]
	return bad
}

// add adds ids and reports whether so much is new that the file should be written: a disk that
// fails chunk by chunk is not to write it each time.
func (d *damagedSet) add(ids ...ID) (worthSaving bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	before := len(d.ids)
	for _, id := range ids {
		d.ids[id] = struct{}{}
	}
	d.unsaved += len(d.ids) - before
	d.count.Store(int64(len(d.ids)))
	return d.unsaved > d.saved/2
}

// remove takes out ids that have a good record.
func (d *damagedSet) remove(ids []ID) {
	if d.count.Load() == 0 {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	before := len(d.ids)
	for _, id := range ids {
		delete(d.ids, id)
	}
	d.unsaved += before - len(d.ids)
	d.count.Store(int64(len(d.ids)))
}

// list returns the ids, ascending.
func (d *damagedSet) list() []ID {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.SortedFunc(maps.Keys(d.ids), compareIDs)
}

// loadDamaged reads damagedFile. A lost one costs nothing that the next verification does
// not find again.
func (r *Repository) loadDamaged() error {
	r.damaged.ids = map[ID]struct{}{}
	path := filepath.Join(r.dir, damagedFile)
	data, err := durable.ReadFile(r.fs, path, maxEnvelopeFile)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if away(err) {
		return err
	}
	var in contents
	if err == nil {
		in, err = r.sealer.decode(damagedKind, damagedFile, data)
	}
	if err == nil && len(in.payload)%IDSize != 0 {
		err = fmt.Errorf("%d bytes are no list of ids", len(in.payload))
	}
	if err != nil {
		r.log.Warn("the list of damaged chunks cannot be read; verify finds them again", attrPath(path), attrErr(err))
		return nil
	}
	for chunk := range slices.Chunk(in.payload, IDSize) {
		r.damaged.ids[ID(chunk)] = struct{}{}
	}
	r.damaged.saved = len(r.damaged.ids)
	r.damaged.count.Store(int64(r.damaged.saved))
	return nil
}

// saveDamaged writes damagedFile if anything has changed.
func (r *Repository) saveDamaged() error {
	d := &r.damaged
	d.saving.Lock()
	defer d.saving.Unlock()
	d.mu.Lock()
	changes := d.unsaved
	ids := slices.SortedFunc(maps.Keys(d.ids), compareIDs)
	d.mu.Unlock()
	if changes == 0 {
		return nil
	}
	var payload []byte
	for _, id := range ids[:min(len(ids), maxDamaged)] {
		payload = append(payload, id[:]...)
	}
	data, err := r.sealer.encode(damagedKind, damagedFile, payload)
	if err == nil {
		err = durable.WriteFile(r.fs, filepath.Join(r.dir, damagedFile), data)
	}
	if err != nil {
		return fmt.Errorf("remember the damaged chunks: %w", noSpace(err))
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.unsaved -= changes
	d.saved = len(ids)
	return nil
}

// Damaged reports whether a chunk or node is known to be bad, so that content
// with this id must be stored anew.
func (r *Repository) Damaged(id ID) bool { return r.damaged.has(id) }

// AnyDamaged reports whether any chunk or node is known to be bad.
func (r *Repository) AnyDamaged() bool { return r.damaged.count.Load() > 0 }

// markDamaged remembers chunks and nodes whose records are bad.
func (r *Repository) markDamaged(ids []ID) error {
	worthSaving := r.damaged.add(ids...)
	for _, id := range ids {
		r.nodes.drop(id)
		r.chunks.drop(id)
	}
	if !worthSaving {
		return nil
	}
	return r.saveDamaged()
}

// maxDamagedExtents bounds the extents that DamagedExtents returns.
const maxDamagedExtents = 1 << 20

// DamagedExtents returns the parts of a disk that are known to be damaged, or found to be: chunks,
// and all that lies below a map node. In order, neighbours merged; behind the first 2^20 of them what
// lies between counts as damaged, too.
func (r *Repository) DamagedExtents(ctx context.Context, m Map) ([]image.Extent, error) {
	if !r.AnyDamaged() {
		return nil, nil
	}
	var out []image.Extent
	err := r.damagedBelow(ctx, r.tree(m), 0, m.Size, func(e image.Extent) {
		if n := len(out); n > 0 && (out[n-1].End() == e.Off || n == maxDamagedExtents) {
			out[n-1].Len = e.End() - out[n-1].Off
			return
		}
		out = append(out, e)
	})
	return out, err
}

// damagedBelow adds the damaged parts of a subtree that starts at start of a disk of a size.
func (r *Repository) damagedBelow(ctx context.Context, t tree, start, size int64, add func(image.Extent)) error {
	if t.id.IsNull() || start >= size {
		return ctx.Err()
	}
	bad := r.Damaged(t.id)
	var n Node
	if !bad && t.level > 0 {
		var err error
		n, err = r.node(t.id)
		if bad = errors.Is(err, ErrDamaged); err != nil && !bad {
			return err
		}
	}
	if bad {
		add(image.Extent{Off: start, Len: min(r.span(t.level), size-start)})
		return nil
	}
	if t.level == 0 {
		return nil
	}
	for i := range Fanout {
		if err := r.damagedBelow(ctx, t.child(n, i), start+int64(i)*r.span(t.level-1), size, add); err != nil {
			return err
		}
	}
	return nil
}
