package nbdserver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"strings"
	"syscall"
	"time"
)

// Listen is net.Listen that also takes over a unix socket that a killed process
// left behind. A socket that somebody still answers is left alone: the error is
// then syscall.EADDRINUSE.
func Listen(network, address string) (net.Listener, error) {
	l, err := net.Listen(network, address)
	if network != "unix" || !errors.Is(err, syscall.EADDRINUSE) {
		return l, err
	}
	info, statErr := os.Lstat(address)
	if statErr != nil || info.Mode().Type() != os.ModeSocket {
		return nil, err
	}
	c, dialErr := net.DialTimeout(network, address, time.Second)
	if dialErr == nil {
		c.Close()
	}
	if !errors.Is(dialErr, syscall.ECONNREFUSED) {
		return nil, err // alive, perhaps busy, or not ours to judge
	}
	if err := os.Remove(address); err != nil {
		return nil, fmt.Errorf("remove stale socket: %w", err)
	}
	return net.Listen(network, address)
}

// URI returns the NBD URI by which a client on this machine reaches an export:
// nbd://host:port/name, or nbd+unix:///name?socket=/path. A listener on all
// addresses is named localhost.
//
// Source: NBD doc/uri.md.
func URI(addr net.Addr, exportName string) string { return uri("nbd", addr, exportName) }

// URI is the function URI for a listener of this server: nbds://host:port/name or
// nbds+unix:///name?socket=/path if it speaks TLS. Clients that verify the
// server expect its host name, or localhost, in its certificate.
func (s *Server) URI(addr net.Addr, exportName string) string {
	if s.options.TLS != nil {
		return uri("nbds", addr, exportName)
	}
	return uri("nbd", addr, exportName)
}

func uri(scheme string, addr net.Addr, exportName string) string {
	if addr.Network() == "unix" {
		return scheme + "+unix:///" + escape(exportName) + "?socket=" + escape(addr.String())
	}
	host := addr.String()
	if t, ok := addr.(*net.TCPAddr); ok && (t.IP == nil || t.IP.IsUnspecified()) {
		host = fmt.Sprintf("localhost:%d", t.Port)
	}
	u := url.URL{Scheme: scheme, Host: host}
	return u.String() + "/" + escape(exportName)
}

// escape percent-encodes all but slashes and RFC 3986's unreserved characters,
// a space too: NBD clients do not read "+" as one.
func escape(s string) string {
	return strings.NewReplacer("+", "%20", "%2F", "/").Replace(url.QueryEscape(s))
}

// isTemporary reports whether accepting may work again after a while: the
// process or the machine is short of something, or the client gave up.
func isTemporary(err error) bool {
	for _, e := range []error{
		syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.ECONNABORTED, syscall.EINTR,
	} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
