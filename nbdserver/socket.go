package nbdserver

import (
	"bufio"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sync/semaphore"
)

const (
	// linger is how long a busy connection's reads and writes wait in the kernel
	// before Go's poller does the waiting.
	linger = 5 * time.Millisecond
	// busyRun is after how many reads without a longer wait a connection is busy.
	busyRun = 16
)

// socket reads from a connection. While that is busy, reads and writes wait in
// the system call itself: a sleep and a wakeup in Go's poller cost several system
// calls, more than a small request. A waiting thread keeps a processor from the
// rest of the program for a while, so only as many connections do this at the same
// time as there are places, and none for longer than linger.
type socket struct {
	raw    syscall.RawConn
	places *semaphore.Weighted
	before *bufio.Reader // has bytes that came before
	eager  func() bool   // reports whether nothing else of the connection wants a processor

	// Owned by the reader.
	run     int  // reads since the last that had to wait for longer than linger
	waiting bool // system calls wait: a place is taken
	attempt func(fd uintptr) bool
	p       []byte // arguments and results of attempt
	n       int
	err     error
}

// newSocket returns a reader for a connection of which before has read already,
// or nil if its reads cannot wait in the kernel.
func newSocket(nc net.Conn, before *bufio.Reader, places *semaphore.Weighted, eager func() bool) *socket {
	sc, ok := nc.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return nil
	}
	wait := syscall.NsecToTimeval(int64(linger))
	failed := raw.Control(func(fd uintptr) {
		err = errors.Join(syscall.SetsockoptTimeval(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVTIMEO, &wait),
			syscall.SetsockoptTimeval(int(fd), syscall.SOL_SOCKET, syscall.SO_SNDTIMEO, &wait))
	})
	if failed != nil || err != nil {
		return nil
	}
	s := &socket{raw: raw, places: places, before: before, eager: eager}
	s.attempt = s.tryRead
	return s
}

// Read is that of an [io.Reader].
func (s *socket) Read(p []byte) (int, error) {
	if n := s.before.Buffered(); n > 0 {
		return s.before.Read(p[:min(n, len(p))])
	}
	s.p = p
	if err := s.raw.Read(s.attempt); err != nil {
		return 0, err
	}
	if s.n == 0 && s.err == nil {
		s.err = io.EOF
	}
	return max(s.n, 0), s.err
}

// tryRead reads; false means that the poller has to wait first.
func (s *socket) tryRead(fd uintptr) bool {
	if !s.waiting && s.run >= busyRun && s.eager() && s.places.TryAcquire(1) {
		s.wait(fd, true)
	} else if s.waiting && !s.eager() {
		s.wait(fd, false)
		s.run = 0
	}
	s.run++
	for {
		s.n, s.err = syscall.Read(int(fd), s.p)
		if s.err != syscall.EINTR {
			break
		}
	}
	if s.err != syscall.EAGAIN {
		s.err = os.NewSyscallError("read", s.err)
		return true
	}
	if s.waiting {
		s.wait(fd, false)
		s.run = 0
	}
	return false
}

// wait sets whether system calls wait.
func (s *socket) wait(fd uintptr, on bool) {
	if err := syscall.SetNonblock(int(fd), !on); err != nil {
		on = false
	}
	if s.waiting = on; !on {
		s.places.Release(1)
	}
}

// close gives the place back. It is called once there is no reader any more.
func (s *socket) close() {
	if s != nil && s.waiting {
		s.places.Release(1)
		s.waiting = false
	}
}
