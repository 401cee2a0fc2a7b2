package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/holdfast-backup/holdfast/internal/durable"
	"github.com/holdfast-backup/holdfast/internal/guard"
	"github.com/holdfast-backup/holdfast/internal/steady"
)

const (
	stateName    = "protections.json"
	stateVersion = 1
	// maxProtections bounds the files that are protected: 128 TiB of full segments.
	maxProtections = 1 << 20
	maxStateFile   = 128 << 20 // bytes
	// maxRelease is how many files are released at once when none are named: each is
	// synced.
	maxRelease = 1024
)

// attributes are the files of the data folder.
type attributes interface {
	// immutable reports whether a file carries the immutable attribute.
	immutable(name string) (bool, error)
	// set makes a file carry it, or not. That it does not is durable on return.
	set(name string, immutable bool) error
}

// state is what the guard has promised. Its file is a line of JSON and a line with the
// line's SHA-256, in hexadecimal.
type state struct {
	Version int         `json:"version"`
	Clock   steady.Base `json:"clock"`
	// Until is the end of each file's protection on the guard's clock, milliseconds since
	// 1970.
	Until map[string]int64 `json:"until"`
}

// keeper knows what is protected until when. It is safe for concurrent use.
//
// # Durability
//
// A protection is written down before the attribute is set, and forgotten after
// the attribute is off. Stopped between, the next start sets what is missing; what
// has ended and is still written down is released again. So a file that carries the attribute
// and is not written down was not protected by us, or what was written down is lost: it is
// never released here.
type keeper struct {
	fs    durable.FS
	path  string // of the state's file
	files attributes
	clock *steady.Clock
	log   *slog.Logger

	mu    sync.Mutex // guards until, and is held for a whole request
	until map[string]int64
}

// openKeeper reads what was promised and sets the attributes that are missing. A state that
// is damaged is an error: nothing is promised or released before a person has looked.
func openKeeper(fsys durable.FS, path string, files attributes, source steady.Source, log *slog.Logger) (*keeper, error) {
	k := &keeper{fs: fsys, path: path, files: files, log: log, until: map[string]int64{}}
	data, err := durable.ReadFile(fsys, path, maxStateFile)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		k.clock = steady.New(source)
		return k, k.save()
	case err != nil:
		return nil, err
	}
	s, err := decodeState(data)
	if err != nil {
		return nil, fmt.Errorf("%s is damaged: %w; nothing is released; move it away to begin anew, files that are immutable then stay so until root takes the attribute off (chattr -i)",
			path, err)
	}
	k.until = s.Until
	k.clock = steady.Resume(source, s.Clock)
	now := k.now()
	for _, name := range slices.Sorted(maps.Keys(k.until)) {
		if k.until[name] <= now {
			continue
		}
		if err := k.files.set(name, true); err != nil {
			log.Error("protected file is not as it should be", slog.String("file", name), attrErr(err))
		}
	}
	return k, k.save()
}

func decodeState(data []byte) (state, error) {
	line, sum, ok := bytes.Cut(data, []byte("\n"))
	want := sha256.Sum256(line)
	if !ok || string(sum) != hex.EncodeToString(want[:])+"\n" {
		return state{}, errors.New("its checksum is wrong")
	}
	s := state{Until: map[string]int64{}}
	if err := json.Unmarshal(line, &s); err != nil {
		return s, err
	}
	if s.Version != stateVersion || s.Until == nil {
		return s, fmt.Errorf("it has version %d, this program reads %d", s.Version, stateVersion)
	}
	return s, nil
}

// save writes down where the clock stands.
func (k *keeper) save() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.saveLocked()
}

func (k *keeper) saveLocked() error {
	line, err := json.Marshal(state{Version: stateVersion, Clock: k.clock.Base(), Until: k.until})
	if err != nil {
		return err
	}
	sum := sha256.Sum256(line)
	line = append(line, '\n')
	return durable.WriteFile(k.fs, k.path, append(hex.AppendEncode(line, sum[:]), '\n'))
}

func (k *keeper) now() int64 { return k.clock.Now().UnixMilli() }

// do does what a client asks for.
func (k *keeper) do(r guard.Request) guard.Reply {
	k.mu.Lock()
	defer k.mu.Unlock()
	var reply guard.Reply
	switch r.Op {
	case guard.Protect:
		reply = k.protect(r.Files, k.now()+r.Seconds*1000)
	case guard.Release:
		reply = k.release(r.Files)
	case guard.Status:
		reply = k.status(r.Files)
	}
	reply.Protected = len(k.until)
	return reply
}

// protect makes files immutable until a time. k.mu is held.
func (k *keeper) protect(files []string, until int64) guard.Reply {
	before := map[string]int64{}
	for _, name := range files {
		immutable, err := k.files.immutable(name)
		if err != nil {
			return failure(name, err)
		}
		old, known := k.until[name]
		if immutable && !known {
			return unknown(name)
		}
		if old < until {
			before[name] = old
		}
	}
	for name := range before {
		k.until[name] = until
	}
	err := error(nil)
	if len(k.until) > maxProtections {
		err = fmt.Errorf("%d files are more than the %d that can be protected", len(k.until), maxProtections)
	} else if len(before) > 0 {
		err = k.saveLocked()
	}
	if err != nil {
		// What was written all the same protects longer than was promised; nothing less.
		for name, old := range before {
			if k.until[name] = old; old == 0 {
				delete(k.until, name)
			}
		}
		return failure("", err)
	}
	// The promise is durable here. Stopped now, the next start sets the attributes.
	for _, name := range files {
		if err := k.files.set(name, true); err != nil {
			return failure(name, err)
		}
	}
	return guard.Reply{}
}

// release takes the attribute off files, all of whose time must be over; without files off
// some of those whose time is. k.mu is held.
func (k *keeper) release(files []string) guard.Reply {
	now := k.now()
	if len(files) == 0 {
		for name, until := range k.until {
			if until <= now && len(files) < maxRelease {
				files = append(files, name)
			}
		}
	}
	for _, name := range files {
		until, known := k.until[name]
		if known && until > now {
			return fail(guard.Protected, name, "%s is protected until %s", name, stamp(until).Format(time.RFC3339))
		}
		immutable, err := k.files.immutable(name)
		if err != nil && !gone(err) {
			return failure(name, err)
		}
		if immutable && !known {
			return unknown(name)
		}
	}
	var reply guard.Reply
	for _, name := range files {
		if _, known := k.until[name]; !known {
			continue
		}
		if err := k.files.set(name, false); err != nil && !gone(err) {
			return failure(name, err)
		}
		delete(k.until, name)
		reply.Released++
	}
	if reply.Released > 0 {
		// Stopped before, they are still written down, and over.
		if err := k.saveLocked(); err != nil {
			return failure("", err)
		}
	}
	return reply
}

// gone reports whether an error means that what was protected is not there any more, because
// somebody moved the folder that it is in.
func gone(err error) bool { return errors.Is(err, fs.ErrNotExist) || errors.Is(err, errNotOurs) }

// status tells of files. k.mu is held.
func (k *keeper) status(files []string) guard.Reply {
	var reply guard.Reply
	for _, name := range files {
		immutable, err := k.files.immutable(name)
		if err != nil {
			return failure(name, err)
		}
		file := guard.File{Name: name, Immutable: immutable}
		if until, ok := k.until[name]; ok {
			file.Until = stamp(until)
		}
		reply.Files = append(reply.Files, file)
	}
	return reply
}

func stamp(milliseconds int64) time.Time { return time.UnixMilli(milliseconds).UTC() }

func fail(code guard.Code, file, format string, args ...any) guard.Reply {
	return guard.Reply{Code: code, File: file, Error: fmt.Sprintf(format, args...)}
}

// unknown is the reply about a file whose attribute we have not written down.
func unknown(name string) guard.Reply {
	return fail(guard.Protected, name, "%s is immutable, and the guard does not know until when; only root can change that (chattr -i)", name)
}

// failure is the reply to an error, about a file unless name is "".
func failure(name string, err error) guard.Reply {
	code := guard.Failed
	switch {
	case errors.Is(err, fs.ErrNotExist):
		code = guard.Missing
	case errors.Is(err, errUnsupported):
		code = guard.Unsupported
	case errors.Is(err, errInUse):
		code = guard.Busy
	case errors.Is(err, errNotOurs):
		code = guard.Invalid
	}
	if name == "" {
		return fail(code, "", "%v", err)
	}
	return fail(code, name, "%s: %v", name, err)
}
