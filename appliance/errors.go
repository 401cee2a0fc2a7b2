package appliance

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/holdfast-backup/holdfast/blockstore"
	"github.com/holdfast-backup/holdfast/fusefs"
	"github.com/holdfast-backup/holdfast/nbdserver"
	"github.com/holdfast-backup/holdfast/nbdserver/nbdclient"
)

// Kind says what sort of failure an error is.
type Kind int

// The kinds of errors.
const (
	Failed   Kind = iota // anything else
	Invalid              // the request makes no sense
	NotFound             // something that the request names is not there
	Refused              // locked, in use, there already or not allowed
)

// kinds has the errors that belong to a kind, the first that fits counts.
var kinds = []struct {
	err  error
	kind Kind
}{
	{errInvalid, Invalid},
	{errRefused, Refused},
	{nbdserver.ErrInvalid, Invalid},

	{errUnprotected, Failed}, // also where the guard's socket is missing
	// Damage first: it may wrap the absence of a file that nobody named.
	{blockstore.ErrDamaged, Failed},
	{blockstore.ErrNoSpace, Failed},

	{blockstore.ErrNotFound, NotFound},
	{blockstore.ErrNotRepository, NotFound},
	{fusefs.ErrNotMounted, NotFound},
	{os.ErrNotExist, NotFound},

	{blockstore.ErrExists, Refused},
	{blockstore.ErrWrongKey, Refused},
	{blockstore.ErrNotEncrypted, Refused},
	{blockstore.ErrLastKey, Refused},
	{blockstore.ErrKeyExists, Refused},
	{blockstore.ErrCollecting, Refused},
	{blockstore.ErrLocked, Refused},
	{blockstore.ErrCatalogLost, Refused},
	{nbdserver.ErrExists, Refused},
	{nbdclient.ErrNoExport, NotFound},
	{fusefs.ErrBusy, Refused},
	{fusefs.ErrMountPoint, Refused},
	{os.ErrExist, Refused},
	{os.ErrPermission, Refused},
	{syscall.EROFS, Refused},
	{syscall.EBUSY, Refused},
	{syscall.EADDRINUSE, Refused},
}

// KindOf returns the kind of an error that this package returned.
func KindOf(err error) Kind {
	if _, locked := errors.AsType[*blockstore.LockedError](err); locked {
		return Refused
	}
	for _, k := range kinds {
		if errors.Is(err, k.err) {
			return k.kind
		}
	}
	return Failed
}

var (
	errInvalid = errors.New("invalid")
	errRefused = errors.New("refused")
)

// kindError is an error whose kind its text need not tell.
type kindError struct {
	text string
	kind error
}

func (e *kindError) Error() string { return e.text }
func (e *kindError) Unwrap() error { return e.kind }

// invalid returns an error of the kind Invalid.
func invalid(format string, args ...any) error {
	return &kindError{fmt.Sprintf(format, args...), errInvalid}
}

// refused returns an error of the kind Refused.
func refused(format string, args ...any) error {
	return &kindError{fmt.Sprintf(format, args...), errRefused}
}

// notFound returns an error of the kind NotFound.
func notFound(format string, args ...any) error {
	return &kindError{fmt.Sprintf(format, args...), blockstore.ErrNotFound}
}
