package nbdserver

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"
)

const (
	// linger is how long a busy connection's reads and writes wait in the kernel
	// before Go's poller does the waiting.
	linger = 5 * time.Millisecond
	// busyRun is after how many reads without a longer wait a connection may
	// become busy.
	busyRun = 16
)

// socket is a connection that Go's poller does not watch while it is busy: the
// poller would be woken by every request and by every reply that the client takes,
// which costs more than a small request does. The reads and writes of a busy
// connection wait in the system call, for linger at most. A thread that waits
// keeps a processor from the rest of the program for a while, so no more
// connections are busy at the same time than there are places.
type socket struct {
	net.Conn // the connection as it was, for its addresses
	places   *semaphore.Weighted

	// Owned by the reader.
	run int // reads since the last that waited for linger

	mu      sync.Mutex // guards what follows
	watched net.Conn   // watched by the poller; nil while the connection is busy
	fd      int        // the same socket, since it was first busy; -1 before
	writers int        // calls of Write and writeBuffers
	closed  bool
	readBy  time.Time // deadlines
	writeBy time.Time
}

// newSocket returns nil for a connection that is none of the operating system.
func newSocket(nc net.Conn, places *semaphore.Weighted) *socket {
	switch nc.(type) {
	case *net.UnixConn, *net.TCPConn:
		return &socket{Conn: nc, places: places, watched: nc, fd: -1}
	}
	return nil
}

// hasten makes the connection busy if there is a place. Only the reader calls it,
// between reads, when it expects not to wait long for the next.
func (s *socket) hasten() {
	if s.run < busyRun {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.watched == nil || s.closed || s.writers > 0 || !s.places.TryAcquire(1) {
		return
	}
	if err := s.openLocked(); err != nil {
		s.places.Release(1)
		s.run = 0
		return
	}
	s.watched.Close() // fd keeps the socket
	s.watched = nil
}

// openLocked makes fd one whose system calls wait for linger.
func (s *socket) openLocked() error {
	if s.fd < 0 {
		fd, err := duplicate(s.watched.(syscall.Conn))
		if err != nil {
			return err
		}
		wait := unix.NsecToTimeval(int64(linger))
		for _, option := range []int{unix.SO_RCVTIMEO, unix.SO_SNDTIMEO} {
			if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, option, &wait); err != nil {
				return errors.Join(err, unix.Close(fd))
			}
		}
		s.fd = fd
	}
	return unix.SetNonblock(s.fd, false)
}

func duplicate(c syscall.Conn) (fd int, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return -1, err
	}
	if failed := raw.Control(func(of uintptr) { fd, err = unix.FcntlInt(of, unix.F_DUPFD_CLOEXEC, 0) }); failed != nil {
		return -1, failed
	}
	return fd, err
}

// park returns the connection as the poller watches it, which ends its being
// busy. It returns nil if that cannot be: the caller tries again.
func (s *socket) park() net.Conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.watched != nil || s.closed {
		return s.watched
	}
	fd, err := unix.FcntlInt(uintptr(s.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil
	}
	f := os.NewFile(uintptr(fd), "")
	defer f.Close()
	watched, err := net.FileConn(f) // also of the descriptor that s.fd shares, no call waits from now on
	if err != nil {
		return nil
	}
	watched.SetReadDeadline(s.readBy)
	watched.SetWriteDeadline(s.writeBy)
	s.watched = watched
	s.places.Release(1)
	return watched
}

// errLingered says that a call waited for linger in vain.
var errLingered = errors.New("nothing happened while the system call waited")

// Read is that of a [net.Conn].
func (s *socket) Read(p []byte) (int, error) {
	s.run++
	s.mu.Lock()
	watched := s.watched
	s.mu.Unlock()
	for watched == nil {
		n, err := s.call(&s.readBy, func() (int, error) { return unix.Read(s.fd, p) })
		switch {
		case err == nil && n == 0:
			return 0, s.ended()
		case !errors.Is(err, errLingered):
			return n, err
		}
		s.run = 0
		watched = s.park()
	}
	return watched.Read(p)
}

// ended returns why there is nothing more to read.
func (s *socket) ended() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return net.ErrClosed
	}
	return io.EOF
}

// call makes a system call on fd, unless the deadline has passed.
func (s *socket) call(by *time.Time, do func() (int, error)) (int, error) {
	s.mu.Lock()
	deadline, closed := *by, s.closed
	s.mu.Unlock()
	switch {
	case closed:
		return 0, net.ErrClosed
	case !deadline.IsZero() && !time.Now().Before(deadline):
		return 0, os.ErrDeadlineExceeded
	}
	for {
		n, err := do()
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if errors.Is(err, unix.EAGAIN) {
			err = errLingered
		}
		return max(n, 0), err
	}
}

// Write is that of a [net.Conn].
func (s *socket) Write(p []byte) (int, error) {
	if err := s.writeBuffers(net.Buffers{p}); err != nil {
		return 0, err
	}
	return len(p), nil
}

// writeBuffers sends the buffers. It may change the slice.
func (s *socket) writeBuffers(buffers net.Buffers) error {
	s.mu.Lock()
	s.writers++
	watched := s.watched
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.writers--
	}()
	for watched == nil {
		n, err := s.call(&s.writeBy, func() (int, error) { return unix.Writev(s.fd, buffers) })
		if err == nil {
			if buffers = advance(buffers, n); len(buffers) == 0 {
				return nil
			}
			continue
		}
		if !errors.Is(err, errLingered) {
			return os.NewSyscallError("writev", err)
		}
		watched = s.park()
	}
	return writeTo(watched, buffers)
}

// writeTo is apart from writeBuffers since its argument lives on the heap.
func writeTo(nc net.Conn, buffers net.Buffers) error {
	_, err := buffers.WriteTo(nc)
	return err
}

// advance removes the first n bytes.
func advance(buffers net.Buffers, n int) net.Buffers {
	for len(buffers) > 0 && n >= len(buffers[0]) {
		n -= len(buffers[0])
		buffers = buffers[1:]
	}
	if len(buffers) > 0 {
		buffers[0] = buffers[0][n:]
	}
	return buffers
}

// SetReadDeadline is that of a [net.Conn]. A call that waits notices it after
// linger.
func (s *socket) SetReadDeadline(t time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.readBy = t; s.watched == nil {
		return nil
	}
	return s.watched.SetReadDeadline(t)
}

// SetWriteDeadline is that of a [net.Conn]. A call that waits notices it after
// linger.
func (s *socket) SetWriteDeadline(t time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.writeBy = t; s.watched == nil {
		return nil
	}
	return s.watched.SetWriteDeadline(t)
}

// Close ends the connection for both sides, and calls that wait. release must
// follow.
func (s *socket) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return net.ErrClosed
	}
	s.closed = true
	var err error
	if s.fd >= 0 {
		err = unix.Shutdown(s.fd, unix.SHUT_RDWR)
	}
	if s.watched != nil {
		err = errors.Join(err, s.watched.Close())
	}
	return err
}

// release frees what the operating system has for the connection, once nobody
// reads or writes any more.
func (s *socket) release() {
	_ = s.Close() // perhaps once more
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.watched == nil {
		s.places.Release(1)
		s.watched = s.Conn // which is closed
	}
	if s.fd >= 0 {
		_ = unix.Close(s.fd)
		s.fd = -1
	}
}
