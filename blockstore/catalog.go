package blockstore

import (
	"cmp"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/zeebo/blake3"

	"github.com/holdfast-backup/holdfast/internal/steady"
)

// Names of the catalog's files, in pointsDir.
const (
	catalogFile     = "catalog"
	catalogCopyFile = "catalog.copy"
	clockFile       = "clock"
	damagedSuffix   = ".damaged" // of the files of a catalog that was lost
)

var (
	catalogKind = envelopeKind{"HFCATLOG", "holdfast repository format 1: catalog of points"}
	clockKind   = envelopeKind{"HFCLOCK\x00", "holdfast repository format 1: clock"}
)

const (
	contextChain = "holdfast repository format 1: chain of changes"
	// maxChanges is how many of its last changes the catalog keeps.
	maxChanges = 1000
	maxSeq     = 1 << 53 // a number that JSON carries everywhere
	// maxCatalog is the length of the catalog above which nothing is added: deletions, locks and purges
	// make it longer, too.
	maxCatalog = maxEnvelope - 4<<20
)

// Op is what a [Change] did.
type Op string

// The operations on points. A commit of a point that was cut short between the point's
// file and the catalog is one that the next opening brings to its end.
const (
	OpCommit   Op = "commit"
	OpDelete   Op = "delete"
	OpUndelete Op = "undelete"
	OpPurge    Op = "purge"
	OpLock     Op = "lock"
	OpSet      Op = "set"     // how long deleted points are kept
	OpRebuild  Op = "rebuild" // the catalog was lost and made anew from the points' files
)

// Change is one change of the points.
type Change struct {
	Seq   uint64    `json:"seq"` // from 1
	Op    Op        `json:"op"`
	Point PointID   `json:"point,omitempty"`
	At    time.Time `json:"at"` // by the repository's clock, see package steady
	// Until is when the point's lock ends, or when a deleted point may be purged; by the same clock.
	Until time.Time `json:"until,omitzero"`
	// Hash is that of the point's file; of a rebuild, that of all listings.
	Hash ID `json:"hash,omitzero"`
	// Quarantine is how long deleted points are kept, from here on.
	Quarantine time.Duration `json:"quarantine_ns,omitempty"`
}

// listing is what the catalog says of one point. Times but the point's own are by the repository's clock.
type listing struct {
	ID          PointID   `json:"id"`
	VM          string    `json:"vm"`
	Time        time.Time `json:"time"`
	Hash        ID        `json:"hash"` // of the payload of the point's file, BLAKE3
	Seq         uint64    `json:"seq"`  // of the change that listed it
	LockedUntil time.Time `json:"locked_until,omitzero"`
	Deleted     time.Time `json:"deleted,omitzero"`
	PurgeAfter  time.Time `json:"purge_after,omitzero"` // of a deleted point
	// Purged: the point is no more. It stays in the catalog until its file is gone for good, so that a
	// file that a crash brings back is known for what it is.
	Purged bool `json:"purged,omitempty"`

	gone bool // purged, and its file is gone for good
}

// catalog lists the points. What is not in it is no point, and what it lists is missed
// if it is not there.
type catalog struct {
	Repository string `json:"repository"` // 32 hexadecimal digits
	Seq        uint64 `json:"seq"`        // of the last change
	// Chain is a hash of the change before it and of the change itself, and so of all changes.
	Chain      ID            `json:"chain"`
	Clock      steady.Base   `json:"clock"`
	Quarantine time.Duration `json:"quarantine_ns"` // for which deleted points are kept
	// Lost, if not empty, says why the catalog had to be made from the points' files. What those don't
	// tell is forgotten: that a point was deleted, or locked later.
	Lost   string    `json:"lost,omitempty"`
	Points []listing `json:"points"` // by Seq; only while it is written or read
	// Since is the chain's value before the first of Changes, the last changes of all.
	Since   ID       `json:"since"`
	Changes []Change `json:"changes"`

	points map[PointID]listing
	size   int // of the JSON that was read or written, bytes
}

// newCatalog returns the catalog of a repository that has no points.
func (s sealer) newCatalog() *catalog {
	c := &catalog{Repository: hex.EncodeToString(s.repo[:]), points: map[PointID]listing{}}
	c.Chain = s.link(ID{}, []byte(c.Repository))
	c.Since = c.Chain
	return c
}

// link returns the chain's value after a change. Only a holder of the key can make it.
func (s sealer) link(before ID, change []byte) ID {
	h := blake3.New()
	if s.keys != nil {
		var err error
		if h, err = blake3.NewKeyed(s.keys.derive(contextChain, nil)); err != nil {
			panic("blockstore: internal error: " + err.Error()) // the key has the right length
		}
	}
	_, _ = h.Write(before[:]) // a hash never fails to write
	_, _ = h.Write(change)
	return ID(h.Sum(nil))
}

// after is link for a Change.
func (s sealer) after(before ID, ch Change) ID {
	data, err := json.Marshal(ch)
	if err != nil {
		panic("blockstore: internal error: " + err.Error()) // its times are sane
	}
	return s.link(before, data)
}

// clone returns a copy to be changed, without what is gone.
func (c *catalog) clone() *catalog {
	next := *c
	next.points = maps.Clone(c.points)
	maps.DeleteFunc(next.points, func(_ PointID, l listing) bool { return l.gone })
	next.Changes = slices.Clone(c.Changes)
	return &next
}

// record adds a change to the chain; its Seq is set here.
func (c *catalog) record(s sealer, ch Change) {
	c.Seq++
	ch.Seq = c.Seq
	c.Chain = s.after(c.Chain, ch)
	c.Changes = append(c.Changes, ch)
	for len(c.Changes) > maxChanges {
		c.Since = s.after(c.Since, c.Changes[0])
		c.Changes = c.Changes[1:]
	}
}

// list adds a point whose file has this content.
func (c *catalog) list(f pointFile, hash ID) {
	c.points[f.ID] = listing{ID: f.ID, VM: f.VM, Time: f.Time, Hash: hash, Seq: f.Seq, LockedUntil: f.LockedUntil}
}

// commit lists a point. It depends on the point's file alone: an opening that finds the
// file and not the listing comes to the same.
func (c *catalog) commit(s sealer, f pointFile, hash ID) {
	c.list(f, hash)
	c.record(s, Change{Op: OpCommit, Point: f.ID, At: f.Committed, Until: f.LockedUntil, Hash: hash})
}

// sorted returns the listings by Seq.
func (c *catalog) sorted() []listing {
	return slices.SortedFunc(maps.Values(c.points), func(a, b listing) int {
		return cmp.Or(cmp.Compare(a.Seq, b.Seq), cmp.Compare(a.ID, b.ID))
	})
}

// rebuilt records that the catalog was made from the points' files.
func (c *catalog) rebuilt(s sealer, at time.Time) error {
	data, err := json.Marshal(c.sorted())
	if err != nil {
		return err
	}
	c.record(s, Change{Op: OpRebuild, At: at, Hash: ID(blake3.Sum256(data))})
	return nil
}

// encodeCatalog returns the content of a catalog's file.
func (s sealer) encodeCatalog(c *catalog) ([]byte, error) {
	out := *c
	out.Points = c.sorted()
	payload, err := json.Marshal(out)
	if err != nil {
		return nil, err
	}
	data, err := s.encode(catalogKind, catalogFile, payload)
	if err != nil {
		return nil, fmt.Errorf("the catalog of %d points: %w; delete points and collect", len(out.Points), err)
	}
	c.size = len(payload)
	return data, nil
}

// decodeCatalog reads the content of a catalog's file and tells whether the file is worn.
func (s sealer) decodeCatalog(data []byte) (*catalog, bool, error) {
	in, err := s.decode(catalogKind, catalogFile, data)
	if err != nil {
		return nil, false, err
	}
	c := &catalog{size: len(in.payload)}
	if err := json.Unmarshal(in.payload, c); err != nil {
		return nil, false, err
	}
	return c, in.worn, c.check(s)
}

// check holds a catalog that was read to what encodeCatalog writes.
func (c *catalog) check(s sealer) error {
	if c.Repository != hex.EncodeToString(s.repo[:]) {
		return fmt.Errorf("it is that of repository %.32q", c.Repository)
	}
	if len(c.Changes) > maxChanges || uint64(len(c.Changes)) > c.Seq || c.Seq > maxSeq || c.Quarantine < 0 || !sane(c.Clock.Time) {
		return errors.New("its figures make no sense")
	}
	chain, seq := c.Since, c.Seq-uint64(len(c.Changes))
	for _, ch := range c.Changes {
		if seq++; ch.Seq != seq || !sane(ch.At, ch.Until) {
			return fmt.Errorf("its changes do not follow each other at %d", ch.Seq)
		}
		chain = s.after(chain, ch)
	}
	if chain != c.Chain {
		return errors.New("its changes do not make the chain that it names")
	}
	c.points = make(map[PointID]listing, len(c.Points))
	for _, l := range c.Points {
		if _, twice := c.points[l.ID]; twice || !l.ID.valid() || !validName(l.VM) || l.Seq > c.Seq ||
			!sane(l.Time, l.LockedUntil, l.Deleted, l.PurgeAfter) {
			return fmt.Errorf("what it says of point %.32q makes no sense", l.ID)
		}
		c.points[l.ID] = l
	}
	c.Points = nil
	return nil
}

// sane reports whether times can be written as RFC 3339 and reckoned with.
func sane(times ...time.Time) bool {
	return !slices.ContainsFunc(times, func(t time.Time) bool { return t.Year() < 1 || t.Year() > 9000 })
}

// head names the state that a catalog is in.
func (c *catalog) head() string { return fmt.Sprintf("%d:%s", c.Seq, c.Chain) }

// descends reports whether the catalog was in a state before.
func (c *catalog) descends(s sealer, head string) error {
	number, digits, ok := strings.Cut(head, ":")
	seq, err := strconv.ParseUint(number, 10, 64)
	var want ID
	if !ok || err != nil || want.UnmarshalText([]byte(digits)) != nil {
		return fmt.Errorf("%w: %q; want a number, a colon and 64 hexadecimal digits, as stats prints it", ErrHead, head)
	}
	if seq > c.Seq {
		return fmt.Errorf("the repository was put back to an earlier state: it was at change %d and is at %d", seq, c.Seq)
	}
	first := c.Seq - uint64(len(c.Changes))
	if seq < first {
		return fmt.Errorf("change %d is older than the last %d, which the catalog keeps: nobody knows; note a newer head", seq, len(c.Changes))
	}
	chain := c.Since
	for _, ch := range c.Changes[:seq-first] {
		chain = s.after(chain, ch)
	}
	if chain != want {
		return fmt.Errorf("the repository was put back to an earlier state and changed since, or is another: change %d is not the one that was noted", seq)
	}
	return nil
}
