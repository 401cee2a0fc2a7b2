package blockstore

import (
	"cmp"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/holdfast-backup/holdfast/internal/durable"
)

// points sets the catalog right, then the files of points.
func (p *repair) points(ctx context.Context) error {
	if err := p.r.CheckPoints(ctx); err != nil {
		return err
	}
	problems := p.r.PointProblems()
	slices.SortStableFunc(problems, func(a, b PointProblem) int { // the catalog comes first
		return cmp.Compare(b2i(a.Kind != ProblemCatalog), b2i(b.Kind != ProblemCatalog))
	})
	for _, problem := range problems {
		if err := ctx.Err(); err != nil {
			return err
		}
		a := RepairAction{
			Kind: RepairPoint, File: problem.File, Reason: problem.Err.Error(),
			Point: problem.ID, VM: problem.VM, Time: problem.Time, Done: p.o.Apply,
		}
		var do func(RepairAction) error
		lost := false
		switch problem.Kind {
		case ProblemCatalog:
			a.Kind, a.Action, do = RepairCatalog, "write the catalog of points anew", p.writeCatalog
		case ProblemWorn:
			a.Action, do = "write the point's file anew", p.rewritePoint
		case ProblemUnlisted:
			a.Action, do = "move the file to the quarantine: it is no point", p.moveUnlisted
		case ProblemMissing:
			a.Action, do = "strike the point off the list: it is lost, unless its file is brought back first", p.dropPoint
			lost = true
		default:
			a.Action, do = "move the file to the quarantine and strike the point off the list: it is lost", p.dropPoint
			lost = true
		}
		fixed, err := p.r.fs.Immutable(filepath.Join(p.r.dir, problem.File))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		switch {
		case fixed:
			a.Action, a.Done = "none: the file carries the immutable attribute; take that off and repair again", false
		case lost && p.r.Deletable(problem.ID) != nil:
			a.Action, a.Done = "none: the point is locked; bring its file back", false
		case p.o.Apply:
			if err := do(a); err != nil {
				return err
			}
		}
		p.add(a)
	}
	return nil
}

// unknown names the files in the folder of points that are none of ours.
func (p *repair) unknown(context.Context) error {
	files, err := p.r.fs.ReadDir(filepath.Join(p.r.dir, pointsDir))
	if err != nil {
		return err
	}
	for _, f := range files {
		id, isPoint := strings.CutSuffix(f.Name(), pointSuffix)
		if !(isPoint && PointID(id).valid()) && !slices.Contains(knownFiles, f.Name()) {
			p.addUnknown(pointsDir + "/" + f.Name())
		}
	}
	return nil
}

func (p *repair) addUnknown(file string) {
	p.add(RepairAction{
		Kind: RepairUnknown, File: file, Reason: "it is no file of a repository", Action: "none: it is left alone",
	})
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

// keep copies a small file that is about to be written anew to the quarantine, if it can be read.
func (p *repair) keep(file string) error {
	data, err := durable.ReadFile(p.r.fs, filepath.Join(p.r.dir, file), maxEnvelopeFile)
	if away(err) {
		return err
	}
	if err != nil {
		return nil //nolint:nilerr // nothing of it can be kept
	}
	to, err := p.quarantined(file)
	if err != nil {
		return err
	}
	return noSpace(durable.WriteFile(p.r.fs, to, data))
}

func (p *repair) writeCatalog(a RepairAction) error {
	if a.File != "" {
		if err := p.keep(a.File); err != nil {
			return err
		}
	}
	return p.r.RepairCatalog()
}

func (p *repair) rewritePoint(a RepairAction) error {
	if err := p.keep(a.File); err != nil {
		return err
	}
	return p.r.RewritePoint(a.Point)
}

func (p *repair) moveUnlisted(a RepairAction) error {
	p.r.mu.Lock()
	defer p.r.mu.Unlock()
	if err := p.quarantine(a.File); err != nil {
		return err
	}
	delete(p.r.unlisted, a.Point)
	return nil
}

// dropPoint deletes a point that nobody can read; its file, if there is one, is kept.
func (p *repair) dropPoint(a RepairAction) error {
	p.r.mu.Lock()
	missing := errors.Is(p.r.damagedPoints[a.Point], errMissing)
	p.r.mu.Unlock()
	if !missing {
		if err := p.quarantine(a.File); err != nil {
			return err
		}
	}
	return p.r.DeletePoint(a.Point)
}
