package blockstore

import (
	"cmp"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/internal/durable"
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
	maxPointFile = 64 << 20
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

// A point file is a header (magic, version, flags, length and checksum of the
// payload, salt) and the payload. See the package comment.
const (
	pointMagic      = "HFPOINT\x00"
	pointHeaderSize = 40
	pointSuffix     = ".point"
	pointEncrypted  = 1 << 0
)

// encodePoint returns the content of a point's file.
func encodePoint(p Point, k *keys) ([]byte, error) {
	payload, err := json.Marshal(p)
	if err != nil {
		return nil, err
	}
	var flags uint16
	var salt [16]byte
	if k != nil {
		flags |= pointEncrypted
		_, _ = rand.Read(salt[:]) // crypto/rand never fails
		aead, err := k.seal(contextPoint, salt[:])
		if err != nil {
			return nil, err
		}
		payload = aead.Seal(nil, nonce(0), payload, []byte(p.ID))
	}
	if len(payload) > maxPointFile-pointHeaderSize {
		return nil, fmt.Errorf("point of %d bytes: the VM's configuration is too large", len(payload))
	}
	b := make([]byte, 0, pointHeaderSize+len(payload))
	b = append(b, pointMagic...)
	b = binary.LittleEndian.AppendUint16(b, formatVersion)
	b = binary.LittleEndian.AppendUint16(b, flags)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(payload)))
	b = append(b, salt[:]...)
	b = append(b, 0, 0, 0, 0)
	crc := crc32.Update(crc32.Checksum(b, castagnoli), castagnoli, payload)
	b = binary.LittleEndian.AppendUint32(b, crc)
	return append(b, payload...), nil
}

// decodePoint reads the content of the file of the point id.
func decodePoint(b []byte, id PointID, k *keys, chunkSize int) (Point, error) {
	if len(b) < pointHeaderSize || string(b[:8]) != pointMagic {
		return Point{}, errors.New("not a point file")
	}
	header, payload := b[:pointHeaderSize], b[pointHeaderSize:]
	if v := binary.LittleEndian.Uint16(header[8:]); v != formatVersion {
		return Point{}, fmt.Errorf("point format %d, this program reads %d", v, formatVersion)
	}
	if int64(binary.LittleEndian.Uint32(header[12:])) != int64(len(payload)) {
		return Point{}, fmt.Errorf("the point's file has %d bytes where its header says otherwise", len(b))
	}
	if crc32.Update(crc32.Checksum(header[:36], castagnoli), castagnoli, payload) != binary.LittleEndian.Uint32(header[36:]) {
		return Point{}, errCRC
	}
	flags := binary.LittleEndian.Uint16(header[10:])
	if flags&^pointEncrypted != 0 || (flags&pointEncrypted != 0) != (k != nil) {
		return Point{}, fmt.Errorf("point flags %#x do not fit this repository", flags)
	}
	if k != nil {
		aead, err := k.seal(contextPoint, header[16:32])
		if err != nil {
			return Point{}, err
		}
		if payload, err = aead.Open(nil, nonce(0), payload, []byte(id)); err != nil {
			return Point{}, errors.New("decryption failed: the point's file was changed or is not of this repository")
		}
	}
	var p Point
	if err := json.Unmarshal(payload, &p); err != nil {
		return Point{}, err
	}
	if p.ID != id {
		return Point{}, fmt.Errorf("the file is that of point %s", p.ID)
	}
	return p, p.check(chunkSize)
}

// DamagedPoint is a point whose file can't be read.
type DamagedPoint struct {
	ID  PointID
	Err error
}

// loadPoints reads the point files of a repository.
func (r *Repository) loadPoints() error {
	folder := filepath.Join(r.dir, pointsDir)
	if err := durable.RemoveTemporary(r.fs, folder); err != nil {
		return err
	}
	files, err := r.fs.ReadDir(folder)
	if err != nil {
		return err
	}
	for _, f := range files {
		name, isPoint := strings.CutSuffix(f.Name(), pointSuffix)
		id := PointID(name)
		if !isPoint || !id.valid() {
			r.log.Warn("the folder of points holds something else", attrPath(f.Name()))
			continue
		}
		path := filepath.Join(folder, f.Name())
		data, err := durable.ReadFile(r.fs, path, maxPointFile)
		var p Point
		if err == nil {
			p, err = decodePoint(data, id, r.keys, r.chunkSize)
		}
		if away(err) {
			return err
		}
		if err != nil {
			r.log.Error("point cannot be read", attrPath(path), attrErr(err))
			r.damagedPoints[id] = err
			continue
		}
		r.points[id] = p
	}
	return nil
}

// Points returns the restore points, oldest first.
func (r *Repository) Points() []Point {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]Point, 0, len(r.points))
	for _, p := range r.points {
		out = append(out, p)
	}
	slices.SortFunc(out, func(a, b Point) int {
		return cmp.Or(a.Time.Compare(b.Time), cmp.Compare(a.ID, b.ID))
	})
	return out
}

// DamagedPoints returns the points whose files cannot be read.
func (r *Repository) DamagedPoints() []DamagedPoint {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]DamagedPoint, 0, len(r.damagedPoints))
	for id, err := range r.damagedPoints {
		out = append(out, DamagedPoint{id, err})
	}
	slices.SortFunc(out, func(a, b DamagedPoint) int { return cmp.Compare(a.ID, b.ID) })
	return out
}

// Point returns the point with an id.
func (r *Repository) Point(id PointID) (Point, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if p, ok := r.points[id]; ok {
		return p, nil
	}
	return Point{}, fmt.Errorf("point %s: %w", id, ErrNotFound)
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

func (r *Repository) pointPath(id PointID) string {
	return filepath.Join(r.dir, pointsDir, string(id)+pointSuffix)
}

// DeletePoint removes a point, durably. Its space comes back with the next
// collection. What has the point's disks open keeps reading them. A point
// whose file is damaged can be deleted too.
func (r *Repository) DeletePoint(id PointID) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, good := r.points[id]
	_, damaged := r.damagedPoints[id]
	if !good && !damaged {
		return fmt.Errorf("point %s: %w", id, ErrNotFound)
	}
	if err := r.fs.Remove(r.pointPath(id)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	delete(r.points, id)
	delete(r.damagedPoints, id)
	// Stopped before its removal is durable, the point may be there again: whole, since
	// no collection starts before it is.
	r.unsettled[id] = struct{}{}
	return r.settleLocked()
}

// settle is settleLocked for a caller that does not hold r.mu.
func (r *Repository) settle() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.settleLocked()
}

// settleLocked makes sure that the points which are not listed any more have no files.
// r.mu is held.
func (r *Repository) settleLocked() error {
	if len(r.unsettled) == 0 {
		return nil
	}
	for id := range r.unsettled {
		if err := r.fs.Remove(r.pointPath(id)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	if err := r.fs.SyncDir(filepath.Join(r.dir, pointsDir)); err != nil {
		return err
	}
	clear(r.unsettled)
	return nil
}

// OpenDisk opens one disk of a point for reading; name may be "" if it
// has only one. The disk stays readable until it is closed, also if the
// point is deleted meanwhile.
func (r *Repository) OpenDisk(id PointID, name string, o DiskOptions) (*Disk, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	p, ok := r.points[id]
	if !ok {
		return nil, fmt.Errorf("point %s: %w", id, ErrNotFound)
	}
	d, err := p.Disk(name)
	if err != nil {
		return nil, err
	}
	r.pins[d.Map]++
	return &Disk{r: r, m: d.Map, o: o, label: fmt.Sprintf("disk %s of %s, point %.8s", d.Name, p.VM, p.ID)}, nil
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
