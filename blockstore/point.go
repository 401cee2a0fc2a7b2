package blockstore

import (
	"cmp"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/zeebo/blake3"

	"github.com/holdfast-backup/holdfast/image"
)

// PointID names a restore point: 32 hexadecimal digits.
type PointID string

// NewPointID returns a random id.
func NewPointID() PointID {
	var b [16]byte
	_, _ = rand.Read(b[:]) // crypto/rand never fails
	return PointID(hex.EncodeToString(b[:]))
}

func (id PointID) valid() bool {
	b, err := hex.DecodeString(string(id))
	return err == nil && len(b) == 16 && strings.ToLower(string(id)) == string(id)
}

// Point is a restore point: a VM's disks at one moment, complete by itself.
type Point struct {
	ID          PointID           `json:"id"`
	VM          string            `json:"vm"`
	Time        time.Time         `json:"time"`        // of the snapshot, UTC, in whole milliseconds
	Mode        string            `json:"mode"`        // how the disks were read: full, incremental or scan
	Consistency string            `json:"consistency"` // what the guest's data can be trusted for, such as "crash"
	Disks       []PointDisk       `json:"disks"`
	Config      map[string][]byte `json:"config,omitempty"` // the VM's configuration: file name to content

	// LockedUntil is when the point's lock ends by this machine's clock, if the machine stays on; zero
	// if it is not locked. It is told and not set: see LockPoint and Session.LockFor.
	LockedUntil time.Time `json:"-"`
}

// PointDisk is one disk of a point.
type PointDisk struct {
	Name string `json:"name"`
	Map  Map    `json:"map"`
}

// Disk returns the disk with a name; with the name "" the only disk.
func (p Point) Disk(name string) (PointDisk, error) {
	if name == "" && len(p.Disks) == 1 {
		return p.Disks[0], nil
	}
	names := make([]string, len(p.Disks))
	for i, d := range p.Disks {
		if d.Name == name {
			return d, nil
		}
		names[i] = d.Name
	}
	if name == "" {
		return PointDisk{}, fmt.Errorf("point %.8s has %d disks; name one of %s", p.ID, len(p.Disks), strings.Join(names, ", "))
	}
	return PointDisk{}, fmt.Errorf("disk %q of point %.8s: %w; it has %s", name, p.ID, ErrNotFound, strings.Join(names, ", "))
}

// Limits of a point, checked when it is written and when it is read.
const (
	maxDisks     = 1024
	maxNameBytes = 255
)

func (p Point) check(chunkSize int) error {
	switch {
	case !p.ID.valid():
		return fmt.Errorf("point id %q is not 32 hexadecimal digits", p.ID)
	case !validName(p.VM):
		return fmt.Errorf("VM name %q: want 1 to %d bytes without control characters", p.VM, maxNameBytes)
	case len(p.Disks) == 0 || len(p.Disks) > maxDisks:
		return fmt.Errorf("a point has 1 to %d disks, not %d", maxDisks, len(p.Disks))
	}
	seen := map[string]bool{}
	for _, d := range p.Disks {
		if !ValidFileName(d.Name) || seen[d.Name] {
			return fmt.Errorf("disk name %q: want a file name that no other disk of the point has", d.Name)
		}
		seen[d.Name] = true
		if err := d.Map.check(chunkSize); err != nil {
			return fmt.Errorf("disk %s: %w", d.Name, err)
		}
	}
	for name := range p.Config {
		if !ValidFileName(name) {
			return fmt.Errorf("configuration file name %q is not a file name", name)
		}
	}
	return nil
}

func validName(s string) bool {
	return s != "" && len(s) <= maxNameBytes && strings.IndexFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f }) < 0
}

// ValidFileName reports whether s can be the name of a disk or of a configuration
// file: 1 to 240 bytes, no separator, no control character, not a dot alone.
func ValidFileName(s string) bool {
	return validName(s) && len(s) <= 240 && !strings.Contains(s, "/") && s != "." && s != ".."
}

// pointFile is what a point's file holds. It is never changed: what happens to a point later is in
// the catalog.
type pointFile struct {
	Point
	// Seq is the number of the change that lists the point, Prev the chain's value before it: so an
	// opening knows a commit that was cut short before the catalog was written.
	Seq  uint64 `json:"seq"`
	Prev ID     `json:"prev"`
	// Committed and LockedUntil, zero if it is not locked, are by the repository's clock.
	Committed   time.Time `json:"committed"`
	LockedUntil time.Time `json:"locked_until,omitzero"`
}

const pointSuffix = ".point"

var pointKind = envelopeKind{"HFPOINT\x00", contextPoint}

// encodePoint returns the content of a point's file, and the hash by which the catalog
// knows it.
func (s sealer) encodePoint(f pointFile) (data []byte, hash ID, err error) {
	payload, err := json.Marshal(f)
	if err != nil {
		return nil, ID{}, err
	}
	data, err = s.encode(pointKind, string(f.ID), payload)
	if err != nil {
		return nil, ID{}, fmt.Errorf("the VM's configuration is too large: %w", err)
	}
	return data, blake3.Sum256(payload), nil
}

// loadedPoint is a point's file as it was read.
type loadedPoint struct {
	pointFile
	hash ID
	contents
}

// decodePoint reads the content of the file of the point id.
func (s sealer) decodePoint(data []byte, id PointID, chunkSize int) (loadedPoint, error) {
	in, err := s.decode(pointKind, string(id), data)
	if err != nil {
		return loadedPoint{}, fmt.Errorf("the point's file is damaged: %w", err)
	}
	p := loadedPoint{hash: blake3.Sum256(in.payload), contents: in}
	if err := json.Unmarshal(in.payload, &p.pointFile); err != nil {
		return loadedPoint{}, err
	}
	if p.ID != id {
		return loadedPoint{}, fmt.Errorf("the file is that of point %.32q", p.ID)
	}
	if p.Seq > maxSeq || !sane(p.Time, p.Committed, p.LockedUntil) {
		return loadedPoint{}, errors.New("its figures make no sense")
	}
	return p, p.check(chunkSize)
}

// Points returns the restore points that are not deleted, oldest first.
func (r *Repository) Points() []Point {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]Point, 0, len(r.points))
	for _, p := range r.points {
		p.Point.LockedUntil = r.lockedUntil(p.ID)
		out = append(out, p.Point)
	}
	slices.SortFunc(out, Point.compare)
	return out
}

// keptPoints returns the points whose chunks the next collection keeps: also those that are deleted, but for
// what it purges. Oldest first.
func (r *Repository) keptPoints() []Point {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := r.kept(true)
	slices.SortFunc(out, Point.compare)
	return out
}

// compare orders points by time.
func (p Point) compare(q Point) int { return cmp.Or(p.Time.Compare(q.Time), cmp.Compare(p.ID, q.ID)) }

// Point returns the point with an id.
func (r *Repository) Point(id PointID) (Point, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if p, ok := r.points[id]; ok {
		p.Point.LockedUntil = r.lockedUntil(id)
		return p.Point, nil
	}
	return Point{}, r.noPointLocked(id)
}

// Latest returns a VM's newest point and whether it has one.
func (r *Repository) Latest(vm string) (Point, bool) {
	points := r.Points()
	for _, p := range slices.Backward(points) {
		if p.VM == vm {
			return p, true
		}
	}
	return Point{}, false
}

// noPointLocked says that there is no point with an id.
func (r *Repository) noPointLocked(id PointID) error {
	if _, ok := r.deleted[id]; ok {
		return fmt.Errorf("point %s is deleted; undelete it first: %w", id, ErrNotFound)
	}
	return fmt.Errorf("point %s: %w", id, ErrNotFound)
}

func (r *Repository) pointPath(id PointID) string {
	return filepath.Join(r.dir, pointsDir, string(id)+pointSuffix)
}

// OpenDisk opens one disk of a point for reading; name may be "" if it
// has only one. The disk stays readable until it is closed, also if the
// point is deleted meanwhile.
func (r *Repository) OpenDisk(id PointID, name string, o DiskOptions) (*Disk, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	p, ok := r.points[id]
	if !ok {
		return nil, r.noPointLocked(id)
	}
	d, err := p.Disk(name)
	if err != nil {
		return nil, err
	}
	return r.openLocked(p.Point, d, o), nil
}

// openLocked opens a disk of a point that is known.
func (r *Repository) openLocked(p Point, d PointDisk, o DiskOptions) *Disk {
	r.pins[d.Map]++
	return &Disk{r: r, m: d.Map, o: o, label: fmt.Sprintf("disk %s of %s, point %.8s", d.Name, p.VM, p.ID)}
}

// unpin ends the use of a map that OpenDisk or Session.Base pinned.
func (r *Repository) unpin(m Map) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.pins[m]--; r.pins[m] == 0 {
		delete(r.pins, m)
	}
}

var _ image.DiskCloser = (*Disk)(nil)
