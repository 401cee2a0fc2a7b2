package appliance

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"time"

	"github.com/holdfast-backup/holdfast/blockstore"
	"github.com/holdfast-backup/holdfast/internal/guard"
)

// NoGuard is the Options.Guard of those who want none.
const NoGuard = "none"

// A point's files are protected in up to protectTries rounds, protectPause apart: between two, a
// collection may have moved a part of them, or somebody closes a file.
const (
	protectTries = 50
	protectPause = 100 * time.Millisecond
)

// guardian is the guard that a data folder has, if any: see Options.Guard.
type guardian struct {
	guard.Client
	found bool // nobody named it: it may be another data folder's
}

func newGuardian(socket, dir string) (*guardian, error) {
	found := socket == ""
	if found {
		socket = guard.DefaultSocket
		if !exists(socket) {
			socket = NoGuard
		}
	}
	if socket == NoGuard {
		return nil, nil
	}
	c, err := guard.New(socket, dir)
	return &guardian{c, found}, err
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// not reports whether an error means that this data folder has no guard after all.
func (g *guardian) not(err error) bool { return g.found && codeOf(err) == guard.Foreign }

func codeOf(err error) guard.Code {
	if e, ok := errors.AsType[*guard.Error](err); ok {
		return e.Code
	}
	return ""
}

// protect has the guard make the files that a point needs immutable for as long as its lock
// lasts, and reports whether they are. Without a guard, and on a file system that cannot do
// it, they are not.
func (a *Appliance) protect(ctx context.Context, id blockstore.PointID, length time.Duration) (bool, error) {
	if a.guard == nil {
		return false, nil
	}
	done := map[string]bool{}
	var err error
	for range protectTries {
		var files []string
		if files, err = a.repo.PointFiles(ctx, id); err != nil {
			break
		}
		files = slices.DeleteFunc(files, func(name string) bool { return done[name] })
		if len(files) == 0 {
			return true, nil
		}
		err = a.guard.Protect(ctx, files, length)
		switch code := codeOf(err); {
		case err == nil:
			for _, name := range files {
				done[name] = true
			}
			continue
		case a.guard.not(err):
			return false, nil
		case code == guard.Unsupported:
			a.log.WarnContext(ctx, "the point is locked, but its files can be removed by those who can write to the data folder",
				slog.String("point", string(id)), slog.String("error", err.Error()))
			return false, nil
		case code != guard.Missing && code != guard.Busy:
			return false, unprotected(id, err)
		}
		select {
		case <-ctx.Done():
			return false, unprotected(id, context.Cause(ctx))
		case <-time.After(protectPause):
		}
	}
	return false, unprotected(id, err)
}

// errUnprotected means that a lock holds in Holdfast alone, though there is a guard.
var errUnprotected = errors.New("it is locked, but not all of its files are immutable")

func unprotected(id blockstore.PointID, err error) error {
	return fmt.Errorf("point %.8s: %w: %w; when that is mended, lock it again for longer", id, errUnprotected, err)
}

// releaseEnded has the guard make the files writable again whose locks are over. What it cannot do
// stays as it is until the next time.
func (a *Appliance) releaseEnded(ctx context.Context) {
	if a.guard == nil {
		return
	}
	if _, err := a.guard.Release(ctx); err != nil && !a.guard.not(err) {
		a.log.WarnContext(ctx, "immutable files whose locks are over stay so for now", slog.String("error", err.Error()))
	}
}
