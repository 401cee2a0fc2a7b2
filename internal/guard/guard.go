// Package guard is what the appliance and holdfast-guard say to each other: the small
// privileged process that makes files of a repository immutable for a time.
//
// # Protocol, version 1
//
// The guard listens on a unix stream socket. A client sends one line of JSON, a
// [Request]; the guard answers with one line, a [Reply], and closes the connection.
//
//	{"version":1,"op":"protect","folder":"65024:131","files":["points/….point","segments/….seg"],"seconds":86400}
//	{"protected":2,"time":"2026-01-31T18:00:00Z"}
//
// A request says which data folder it is about, see [FolderID]; a guard has one.
// Files are named relative to it; only the files of points and of segments have
// names that the guard takes, see [ValidFile]. A request is done as a whole or
// fails at the first file that cannot be done; asking again is always safe.
//
//   - protect makes files immutable until seconds have passed. A protection that
//     lasts longer already stays as it is: none is ever shortened.
//   - release makes files writable again whose time is over, and is refused if that of one
//     of them is not. Without files: a number of those whose time is over, until
//     a reply says that it released none.
//   - status tells of files until when they are protected. Without files: only how
//     many there are.
//
// # Limits
//
// A line has at most [MaxLine] bytes, a request at most [MaxFiles] files, a protection lasts
// at most [MaxDuration]. Each side gives the other 10 seconds to send its line, and the
// client gives the guard [WorkTime] to do what it is asked.
package guard

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"time"

	"golang.org/x/sys/unix"
)

// Version is that of the protocol.
const Version = 1

// DefaultSocket is where the guard listens unless it is told otherwise.
const DefaultSocket = "/run/holdfast-guard.sock"

// The limits of the protocol.
const (
	MaxLine     = 1 << 20 // bytes, the newline included
	MaxFiles    = 4096    // of a request
	MaxDuration = 100 * 365 * 24 * time.Hour
	LineTime    = 10 * time.Second // for a line to arrive
	WorkTime    = time.Minute      // for the guard to answer
)

// Op is what a request asks for.
type Op string

// The operations.
const (
	Protect Op = "protect"
	Release Op = "release"
	Status  Op = "status"
)

// Request is what a client asks for.
type Request struct {
	Version int      `json:"version"`
	Op      Op       `json:"op"`
	Folder  string   `json:"folder,omitempty"` // the data folder's FolderID; only status does without
	Files   []string `json:"files,omitempty"`
	Seconds int64    `json:"seconds,omitempty"` // of protect: from now on
}

// Code says why a request failed.
type Code string

// The codes of failures.
const (
	Invalid     Code = "invalid"     // the request makes no sense
	Denied      Code = "denied"      // not for this client
	Foreign     Code = "foreign"     // the guard is another data folder's
	Missing     Code = "missing"     // a file is not there
	Busy        Code = "busy"        // a process has a file open for writing
	Unsupported Code = "unsupported" // the file system has no immutable attribute
	Protected   Code = "protected"   // its time is not over, or nobody knows when it is
	Failed      Code = "failed"      // anything else
)

// File is the state of one file.
type File struct {
	Name      string    `json:"name"`
	Until     time.Time `json:"until,omitzero"` // on the guard's clock, UTC; zero if it has no protection
	Immutable bool      `json:"immutable"`      // the attribute, as it is on disk
}

// Reply is what the guard answers.
type Reply struct {
	Error     string    `json:"error,omitempty"` // a line for people; "" if all is done
	Code      Code      `json:"code,omitempty"`
	File      string    `json:"file,omitempty"`  // at which it failed
	Protected int       `json:"protected"`       // files that are, in all
	Released  int       `json:"released"`        // files that this request released
	Time      time.Time `json:"time"`            // of the guard's clock, UTC
	Files     []File    `json:"files,omitempty"` // of status
}

// Error is a request that failed.
type Error struct {
	Code Code
	File string // "" if it is about none
	Text string
}

func (e *Error) Error() string { return e.Text }

// FolderID returns the name of a folder that no other folder of the machine has: its device
// and its inode.
func FolderID(st *unix.Stat_t) string { return fmt.Sprintf("%d:%d", st.Dev, st.Ino) }

var fileName = regexp.MustCompile(`^(segments/[0-9a-f]{16}-[0-9a-f]{16}\.seg|points/[0-9a-f]{32}\.point)$`)

// ValidFile reports whether a name is one of a file that the guard takes.
func ValidFile(name string) bool { return fileName.MatchString(name) }

// ParseRequest reads a request's line, without its newline, and holds it to the limits.
func ParseRequest(line []byte) (Request, error) {
	var r Request
	d := json.NewDecoder(bytes.NewReader(line))
	d.DisallowUnknownFields()
	if err := d.Decode(&r); err != nil {
		return r, fmt.Errorf("request is not understood: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return r, errors.New("request is not one line of JSON")
	}
	return r, r.check()
}

func (r Request) check() error {
	switch {
	case r.Version != Version:
		return fmt.Errorf("request has version %d, this guard speaks %d", r.Version, Version)
	case r.Op != Protect && r.Op != Release && r.Op != Status:
		return fmt.Errorf("unknown operation %.20q", r.Op)
	case r.Folder == "" && r.Op != Status:
		return fmt.Errorf("%s names no data folder", r.Op)
	case len(r.Files) > MaxFiles:
		return fmt.Errorf("request names %d files, more than %d", len(r.Files), MaxFiles)
	case r.Op == Protect && len(r.Files) == 0:
		return errors.New("protect names no files")
	case r.Op == Protect && (r.Seconds < 1 || r.Seconds > int64(MaxDuration/time.Second)):
		return fmt.Errorf("protect for %d seconds: want 1 to %d", r.Seconds, int64(MaxDuration/time.Second))
	case r.Op != Protect && r.Seconds != 0:
		return fmt.Errorf("%s takes no time", r.Op)
	}
	for _, name := range r.Files {
		if !ValidFile(name) {
			return fmt.Errorf("%.100q is not the name of a point's or a segment's file", name)
		}
	}
	return nil
}
