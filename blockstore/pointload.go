package blockstore

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/internal/durable"
	"github.com/holdfast-backup/holdfast/internal/steady"
)

// Errors of points and of the catalog that are not as they should be.
var (
	errMissing = errors.New("the point's file is missing")
	errSwapped = errors.New("the point's file is not the one that was committed")
)

// pointSet is what a repository knows of its points. Its fields are guarded by Repository.mu.
type pointSet struct {
	catalog *catalog
	points  map[PointID]pointFile // listed and not deleted
	deleted map[PointID]pointFile // listed and deleted, and not purged
	// damagedPoints are listed, deleted or not, and what they hold is not known; or their files are not
	// listed and cannot be read, so that nobody knows whether they should be.
	damagedPoints map[PointID]error
	// unlisted are files that can be read and that the catalog does not list.
	unlisted map[PointID]pointFile
	// worn are listed points that are known and whose files are not as they should be.
	worn map[PointID]error
	// catalogErrs says what was wrong with the catalog's files at the opening. A change
	// mends it, but for a loss.
	catalogErrs []catalogProblem

	// unsettled are points that are not listed and may still have a file.
	unsettled map[PointID]struct{}
	// catalogUnsettled: the catalog's file may not say what catalog does. copyErr: neither may its
	// copy, and why.
	catalogUnsettled bool
	copyErr          error
	catalogUnread    bool // there is nothing in the catalog's files that can be read
}

// catalogProblem is something wrong with a file of the catalog.
type catalogProblem struct {
	name string
	err  error
}

func newPointSet() pointSet {
	return pointSet{
		points: map[PointID]pointFile{}, deleted: map[PointID]pointFile{}, damagedPoints: map[PointID]error{},
		unlisted: map[PointID]pointFile{}, worn: map[PointID]error{}, unsettled: map[PointID]struct{}{},
	}
}

// loadPoints reads the catalog and the point files of a repository. What it
// finds to be done it does not write: it comes to the same at the next opening, until a change does.
func (r *Repository) loadPoints(source steady.Source) error {
	folder := filepath.Join(r.dir, pointsDir)
	if err := durable.RemoveTemporary(r.fs, folder); err != nil {
		return err
	}
	bases, err := r.loadCatalog()
	if err != nil {
		return err
	}
	files, err := r.readPoints(folder)
	if err != nil {
		return err
	}
	for _, f := range files {
		bases = append(bases, steady.Base{Time: f.Committed}) // it was so late already
	}
	if base, err := r.readClock(); err == nil {
		bases = append(bases, base)
	} else if !errors.Is(err, os.ErrNotExist) {
		r.log.Warn("the file of the clock cannot be read; locks may last longer", attrErr(err))
	}
	r.clock = steady.New(source)
	if len(bases) > 0 {
		r.clock = steady.Resume(source, bases...)
	}
	r.adopt(files)
	for id, l := range r.catalog.points {
		if !l.Purged {
			r.place(l, files[id])
		}
	}
	for id, f := range files {
		if _, listed := r.catalog.points[id]; listed {
			continue
		}
		if f.err != nil {
			r.damagedPoints[id] = f.err
			continue
		}
		r.unlisted[id] = f.pointFile
	}
	if boot := r.clock.Base().Boot; !slices.ContainsFunc(bases, func(b steady.Base) bool { return b.Boot == boot }) {
		if err := r.keepTime(); err != nil { // a lock then lasts longer
			r.log.Warn("the time cannot be written down", attrErr(err))
		}
	}
	for _, p := range r.PointProblems() {
		r.log.Error("the points are not as they should be", attrErr(p.Err))
	}
	return nil
}

// createCatalog writes the catalog of a new repository.
func createCatalog(fsys durable.FS, folder string, s sealer, o CreateOptions) error {
	source := o.clock
	if source == nil {
		source = steady.System()
	}
	c := s.newCatalog()
	c.Clock, c.Quarantine = steady.New(source).Base(), o.DeleteQuarantine
	data, err := s.encodeCatalog(c)
	if err != nil {
		return err
	}
	if err := durable.WriteFile(fsys, filepath.Join(folder, catalogFile), data); err != nil {
		return err
	}
	return durable.WriteFile(fsys, filepath.Join(folder, catalogCopyFile), data)
}

// loadCatalog takes the newest of the catalog's files and returns where the clock stood in each. If none
// can be read, the catalog is an empty one and says so. The error means that storage is away.
func (r *Repository) loadCatalog() ([]steady.Base, error) {
	var bases []steady.Base
	var found [2]*catalog
	for i, name := range []string{catalogFile, catalogCopyFile} {
		c, worn, err := r.readCatalog(name)
		if away(err) {
			return nil, err
		}
		if err == nil && worn {
			err = errors.New("one of its two copies is damaged")
		}
		if err != nil {
			r.catalogErrs = append(r.catalogErrs, catalogProblem{name, err})
		}
		if c != nil {
			found[i] = c
			bases = append(bases, c.Clock)
		}
	}
	first, second := found[0], found[1]
	switch {
	case first == nil && second == nil:
		r.catalog = r.sealer.newCatalog()
		r.catalog.Lost = "no file of the catalog can be read"
		r.catalogUnread = true
	case first == nil:
		r.catalog = second
	case second == nil || first.Seq >= second.Seq:
		r.catalog = first
		// The copy is written last: a crash may leave it one change behind.
		if second != nil && (second.Seq+1 < first.Seq || first.descends(r.sealer, second.head()) != nil) {
			r.catalogErrs = append(r.catalogErrs, catalogProblem{catalogCopyFile, errors.New("it is not that of the catalog: it could not be written, or one of them was put back")})
		}
	default:
		r.catalog = second
		r.catalogErrs = append(r.catalogErrs, catalogProblem{catalogFile, errors.New("it is older than its copy: it was put back")})
	}
	r.catalogUnsettled = r.catalog != first || len(r.catalogErrs) > 0
	if second == nil || second.Chain != r.catalog.Chain {
		r.copyErr = errors.New("it is behind")
	}
	return bases, nil
}

// readCatalog reads one file of the catalog and tells whether it is worn.
func (r *Repository) readCatalog(name string) (*catalog, bool, error) {
	data, err := durable.ReadFile(r.fs, filepath.Join(r.dir, pointsDir, name), maxEnvelopeFile)
	if err != nil {
		return nil, false, err
	}
	return r.sealer.decodeCatalog(data)
}

// readPoint is a point's file, or why it can't be read.
type readPoint struct {
	loadedPoint
	err error
}

// knownFiles are the files in the folder of points that are none.
var knownFiles = []string{
	catalogFile, catalogCopyFile, clockFile, catalogFile + damagedSuffix, catalogCopyFile + damagedSuffix,
}

// readPoints reads the files of a folder of points.
func (r *Repository) readPoints(folder string) (map[PointID]readPoint, error) {
	entries, err := r.fs.ReadDir(folder)
	if err != nil {
		return nil, err
	}
	files := map[PointID]readPoint{}
	for _, e := range entries {
		name, isPoint := strings.CutSuffix(e.Name(), pointSuffix)
		id := PointID(name)
		if isPoint && id.valid() {
			p, err := r.readPoint(id)
			if away(err) {
				return nil, err
			}
			p.payload, p.one = nil, nil // not to be held for all of them
			files[id] = readPoint{p, err}
		} else if !slices.Contains(knownFiles, e.Name()) {
			r.log.Warn("the folder of points holds something else", attrPath(e.Name()))
		}
	}
	return files, nil
}

func (r *Repository) readPoint(id PointID) (loadedPoint, error) {
	data, err := durable.ReadFile(r.fs, r.pointPath(id), maxEnvelopeFile)
	if errors.Is(err, os.ErrNotExist) {
		return loadedPoint{}, errMissing
	}
	if err != nil {
		return loadedPoint{}, err
	}
	return r.sealer.decodePoint(data, id, r.chunkSize)
}

// adopt lists the points whose commits were cut short before the catalog was written. If there
// are points that are newer than the catalog and do not follow on it, it was put back or is lost:
// then they are listed, too, and the catalog says that it was lost.
func (r *Repository) adopt(files map[PointID]readPoint) {
	c := r.catalog
	var rest []readPoint
	for _, f := range slices.SortedFunc(maps.Values(files), func(a, b readPoint) int {
		return cmp.Or(cmp.Compare(a.Seq, b.Seq), cmp.Compare(a.ID, b.ID))
	}) {
		if _, listed := c.points[f.ID]; listed || f.err != nil {
			continue
		}
		if f.Seq == c.Seq+1 && f.Prev == c.Chain {
			c.commit(r.sealer, f.pointFile, f.hash)
			r.catalogUnsettled = true
			r.log.Info("a commit that was cut short is brought to its end", attrPoint(f.Point))
		} else if f.Seq > c.Seq {
			rest = append(rest, f)
		}
	}
	if len(rest) > 0 && c.Lost == "" {
		c.Lost = fmt.Sprintf("the catalog is older than %d of the points: it was put back", len(rest))
	}
	for _, f := range rest {
		c.list(f.pointFile, f.hash)
		c.Seq = max(c.Seq, f.Seq)
	}
	if len(rest) > 0 {
		c.Since, c.Changes = c.Chain, nil
		if err := c.rebuilt(r.sealer, r.clock.Now()); err != nil {
			panic("blockstore: internal error: " + err.Error()) // all times were found sane
		}
		r.catalogUnsettled = true
	}
}

// place enters a listed point with what its file is. r.mu is held, or nobody else has r yet.
func (r *Repository) place(l listing, f readPoint) {
	for _, m := range []map[PointID]error{r.damagedPoints, r.worn} {
		delete(m, l.ID)
	}
	err := f.err
	switch {
	case err != nil:
	case f.ID == "":
		err = errMissing
	case f.hash != l.Hash:
		err = errSwapped
	}
	if err != nil {
		// What is in memory is as good as the file was.
		if !r.knownLocked(l.ID) {
			r.damagedPoints[l.ID] = err
			return
		}
		r.worn[l.ID] = err
		return
	}
	if f.worn {
		r.worn[l.ID] = errors.New("one of the two copies in the point's file is damaged")
	}
	if l.Deleted.IsZero() {
		r.points[l.ID] = f.pointFile
	} else {
		r.deleted[l.ID] = f.pointFile
	}
}

// knownLocked reports whether what a listed point holds is known.
func (r *Repository) knownLocked(id PointID) bool {
	_, live := r.points[id]
	_, deleted := r.deleted[id]
	return live || deleted
}

// takenLocked reports whether an id is or was that of a point.
func (r *Repository) takenLocked(id PointID) bool {
	_, listed := r.catalog.points[id]
	_, unlisted := r.unlisted[id]
	_, damaged := r.damagedPoints[id]
	_, unsettled := r.unsettled[id]
	return listed || unlisted || damaged || unsettled
}

// Kinds of problems with points, see [PointProblem].
const (
	ProblemUnreadable = "unreadable" // nobody knows what the point holds
	ProblemMissing    = "missing"    // the point's file is not there
	ProblemSwapped    = "swapped"    // the point's file is not the one that was committed
	ProblemWorn       = "worn"       // the point is whole; its file is to be written anew: RewritePoint
	ProblemUnlisted   = "unlisted"   // a file that the catalog does not list; it is no point
	ProblemCatalog    = "catalog"    // the catalog itself: RepairCatalog
)

// PointProblem is something about the points that is not as it should be.
type PointProblem struct {
	Kind string
	ID   PointID // "" of the catalog
	VM   string  // "" if nobody knows, as Time is zero
	Time time.Time
	File string // in the repository's folder
	Err  error  // it names the point
}

// DamagedPoint is a point whose file can't be read, is missing or is another than was
// committed. Collections wait until it is back or deleted.
type DamagedPoint struct {
	ID   PointID
	VM   string    // "" if it is not listed
	Time time.Time // zero if it is not listed
	Err  error
}

// DamagedPoints returns the points that are withheld because what they hold is not known.
func (r *Repository) DamagedPoints() []DamagedPoint {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.damagedPointsLocked()
}

// damagedPointsLocked leaves out what the next collection purges.
func (r *Repository) damagedPointsLocked() []DamagedPoint {
	now := r.clock.Now()
	out := make([]DamagedPoint, 0, len(r.damagedPoints))
	for _, id := range slices.Sorted(maps.Keys(r.damagedPoints)) {
		if l := r.catalog.points[id]; !l.due(now) {
			out = append(out, DamagedPoint{id, l.VM, l.Time, r.damagedPoints[id]})
		}
	}
	return out
}

// PointProblems returns what is not as it should be, as far as it is known: see
// CheckPoints.
func (r *Repository) PointProblems() []PointProblem {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []PointProblem
	if r.catalog.Lost != "" {
		out = append(out, PointProblem{Kind: ProblemCatalog, File: pointsDir + "/" + catalogFile, Err: fmt.Errorf(
			"the catalog of points was lost: %s; points that can be read are listed; which of them were deleted, locks set after their backups, and for how long deleted points are kept, are forgotten; repair writes a new catalog",
			r.catalog.Lost)})
	}
	for _, p := range r.catalogErrs {
		out = append(out, PointProblem{Kind: ProblemCatalog, File: pointsDir + "/" + p.name, Err: fmt.Errorf("the catalog of points, %s: %w", p.name, p.err)})
	}
	add := func(kind string, id PointID, err error) {
		l := r.catalog.points[id]
		if f, ok := r.unlisted[id]; ok {
			l.VM, l.Time = f.VM, f.Time
		}
		text := fmt.Sprintf("point %s", id)
		if l.VM != "" {
			text = fmt.Sprintf("point %.8s of %s, %s", id, l.VM, l.Time.Format(time.RFC3339Nano))
		}
		out = append(out, PointProblem{
			Kind: kind, ID: id, VM: l.VM, Time: l.Time, File: pointsDir + "/" + string(id) + pointSuffix,
			Err: fmt.Errorf("%s: %w", text, err),
		})
	}
	for _, d := range r.damagedPointsLocked() {
		kind := ProblemUnreadable
		if errors.Is(d.Err, errMissing) {
			kind = ProblemMissing
		} else if errors.Is(d.Err, errSwapped) {
			kind = ProblemSwapped
		}
		add(kind, d.ID, d.Err)
	}
	for _, id := range slices.Sorted(maps.Keys(r.worn)) {
		add(ProblemWorn, id, r.worn[id])
	}
	for _, id := range slices.Sorted(maps.Keys(r.unlisted)) {
		add(ProblemUnlisted, id, errors.New("a file of this point is there and the catalog does not list it: somebody put it there, or back"))
	}
	return out
}

// readClock returns where the clock stood when its file was written.
func (r *Repository) readClock() (steady.Base, error) {
	data, err := durable.ReadFile(r.fs, filepath.Join(r.dir, pointsDir, clockFile), 2*envelopeAlign)
	if err != nil {
		return steady.Base{}, err
	}
	in, err := r.sealer.decode(clockKind, clockFile, data)
	if err != nil {
		return steady.Base{}, err
	}
	var b steady.Base
	if err := json.Unmarshal(in.payload, &b); err != nil {
		return steady.Base{}, err
	}
	if !sane(b.Time) {
		return steady.Base{}, errors.New("its time makes no sense")
	}
	return b, nil
}
