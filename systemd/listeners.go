// Package systemd is what a service and systemd, its supervisor, say to each
// other.
//
// [Listeners] returns the sockets of socket activation: systemd opens them, even
// before the service runs, and hands them over as file descriptors from 3 on.
// Anybody else may do so too: `nbdinfo [ PROGRAM ]` and libnbd's
// nbd_connect_systemd_socket_activation start a server for themselves that way.
// [Conn] returns the one connection that inetd, a unit with Accept=yes and
// StandardInput=socket, or nbd_connect_command pass as standard input.
package systemd

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"syscall"
)

const (
	// firstFD is SD_LISTEN_FDS_START.
	firstFD = 3
	// maxFDs bounds LISTEN_FDS: a process has no more by default.
	maxFDs = 1024
)

// Listeners returns the listening sockets that systemd passed to this process,
// in the order of LISTEN_FDS: none if the variables are not set or are meant for
// another process. It fails for a descriptor that is no listening stream socket,
// and then closes them all.
//
// It takes LISTEN_FDS, LISTEN_PID and LISTEN_FDNAMES out of the environment and
// sets close-on-exec, so that child processes get none of it; call it once, at
// the start, before there is another goroutine.
//
// Source: sd_listen_fds(3).
func Listeners() ([]net.Listener, error) {
	pid, count := os.Getenv("LISTEN_PID"), os.Getenv("LISTEN_FDS")
	for _, name := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
		if err := os.Unsetenv(name); err != nil {
			return nil, fmt.Errorf("socket activation: %w", err)
		}
	}
	if pid == "" || count == "" {
		return nil, nil
	}
	wanted, err := strconv.Atoi(pid)
	if err != nil {
		return nil, fmt.Errorf("socket activation: LISTEN_PID is %q, not a number", pid)
	}
	if wanted != os.Getpid() {
		return nil, nil
	}
	n, err := strconv.Atoi(count)
	if err != nil || n < 0 || n > maxFDs {
		return nil, fmt.Errorf("socket activation: LISTEN_FDS is %q, not a number up to %d", count, maxFDs)
	}
	for fd := firstFD; fd < firstFD+n; fd++ {
		syscall.CloseOnExec(fd)
	}
	var listeners []net.Listener
	var errs []error
	for fd := firstFD; fd < firstFD+n; fd++ {
		l, err := listener(fd)
		if err != nil {
			errs = append(errs, fmt.Errorf("socket activation: %w", err))
			continue
		}
		listeners = append(listeners, l)
	}
	if len(errs) > 0 {
		for _, l := range listeners {
			l.Close()
		}
		return nil, errors.Join(errs...)
	}
	return listeners, nil
}

// listener takes over a descriptor, unless that is no socket at all: then it may
// be one that this process uses itself. The listener leaves the file of a unix
// socket alone when it is closed: it is systemd's.
func listener(fd int) (net.Listener, error) {
	kind, err := option(fd, syscall.SO_TYPE)
	if err != nil {
		return nil, fmt.Errorf("descriptor %d is not a socket: %w", fd, err)
	}
	f := os.NewFile(uintptr(fd), "descriptor "+strconv.Itoa(fd))
	defer f.Close() // the listener has a copy
	listening, err := option(fd, syscall.SO_ACCEPTCONN)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Name(), err)
	}
	if kind != syscall.SOCK_STREAM || listening == 0 {
		return nil, fmt.Errorf("%s is not a listening stream socket", f.Name())
	}
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Name(), err)
	}
	return l, nil
}

// Conn returns the connection that a file, os.Stdin for instance, is. It fails
// for what is not a connected stream socket. The connection has a descriptor of
// its own; the file is left open.
func Conn(f *os.File) (net.Conn, error) {
	kind, err := option(int(f.Fd()), syscall.SO_TYPE)
	if err != nil {
		return nil, fmt.Errorf("%s is not a socket: %w", f.Name(), err)
	}
	if kind != syscall.SOCK_STREAM {
		return nil, fmt.Errorf("%s is not a stream socket", f.Name())
	}
	if _, err := syscall.Getpeername(int(f.Fd())); err != nil {
		return nil, fmt.Errorf("%s is not connected: %w", f.Name(), err)
	}
	nc, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Name(), err)
	}
	return nc, nil
}

// option returns an option of the socket itself.
func option(fd, name int) (int, error) {
	return syscall.GetsockoptInt(fd, syscall.SOL_SOCKET, name)
}
