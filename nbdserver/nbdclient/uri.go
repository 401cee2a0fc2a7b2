package nbdclient

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
)

// defaultPort is IANA's port for NBD.
const defaultPort = "10809"

// ParseURI returns the Options that an NBD URI says: Network, Address, Export
// and TLS. The schemes are nbd, nbds, nbd+unix and nbds+unix; nbd means no TLS.
// An export of a unix socket is nbd+unix:///EXPORT?socket=PATH. With TLS these
// parameters are understood:
//
//	tls-certificates=DIR  directory with ca-cert.pem, whose certificates the
//	                      server is verified against instead of the system's,
//	                      and with client-cert.pem and client-key.pem, both or
//	                      neither
//	tls-hostname=NAME     what the server's certificate must be for; needed
//	                      with a unix socket
//	tls-verify-peer=0     anybody may be the server
//	tls-type=x509         the only type
//
// The files are read. Anything else in a URI is an error that names it: what is
// wrong with the URI, [ErrUnsupported] for what others understand, or that of a
// file.
//
// Source: NBD doc/uri.md; tls-certificates is libnbd's.
func ParseURI(uri string) (Options, error) {
	o, err := parseURI(uri)
	if err != nil {
		return Options{}, fmt.Errorf("NBD URI %.256q: %w", uri, err)
	}
	return o, nil
}

func parseURI(uri string) (Options, error) {
	u, err := url.Parse(uri)
	if err != nil {
		return Options{}, errors.Unwrap(err) // without the URI, which is in the message already
	}
	scheme, transport, _ := strings.Cut(u.Scheme, "+")
	switch {
	case scheme != "nbd" && scheme != "nbds", transport == "" && strings.Contains(u.Scheme, "+"):
		return Options{}, fmt.Errorf("scheme %q is not one of nbd, nbds, nbd+unix, nbds+unix", u.Scheme)
	case transport != "" && transport != "unix":
		return Options{}, fmt.Errorf("%w: scheme %q", ErrUnsupported, u.Scheme)
	case u.Opaque != "":
		return Options{}, fmt.Errorf("it must begin with %s://", u.Scheme)
	case u.User != nil:
		return Options{}, fmt.Errorf("%w: a user name", ErrUnsupported)
	case u.Fragment != "":
		return Options{}, errors.New("it has a fragment; write # in a name as %23")
	}
	parameters, err := parseQuery(u.RawQuery)
	if err != nil {
		return Options{}, err
	}
	o := Options{Export: strings.TrimPrefix(u.Path, "/")}
	if err := checkString("export name", o.Export); err != nil {
		return Options{}, err
	}
	if transport == "unix" {
		err = o.setSocket(u, parameters)
	} else {
		err = o.setHost(u, parameters)
	}
	if err != nil {
		return Options{}, err
	}
	if scheme == "nbds" {
		o.TLS, err = parseTLS(parameters)
	}
	for name := range parameters {
		if err == nil && strings.HasPrefix(name, "tls-") && scheme == "nbd" {
			err = fmt.Errorf("parameter %q needs the scheme %s", name, strings.Replace(u.Scheme, "nbd", "nbds", 1))
		} else if err == nil {
			err = fmt.Errorf("%w: parameter %q", ErrUnsupported, name)
		}
	}
	return o, err
}

// parseQuery decodes parameters; unlike in HTML forms, + is no space.
func parseQuery(query string) (map[string]string, error) {
	parameters := map[string]string{}
	for pair := range strings.SplitSeq(query, "&") {
		if pair == "" {
			continue
		}
		rawName, rawValue, _ := strings.Cut(pair, "=")
		name, err := url.PathUnescape(rawName)
		if err != nil {
			return nil, err
		}
		value, err := url.PathUnescape(rawValue)
		if err != nil {
			return nil, err
		}
		if _, again := parameters[name]; again {
			return nil, fmt.Errorf("parameter %q is there twice", name)
		}
		parameters[name] = value
	}
	return parameters, nil
}

// take removes a parameter and returns its value.
func take(parameters map[string]string, name string) (value string, ok bool) {
	value, ok = parameters[name]
	delete(parameters, name)
	return value, ok
}

// maxSocketPath is Linux's limit for the path of a unix socket in bytes.
const maxSocketPath = 107

func (o *Options) setSocket(u *url.URL, parameters map[string]string) error {
	path, _ := take(parameters, "socket")
	switch {
	case path == "":
		return errors.New("the parameter socket is missing: the path of the unix socket")
	case len(path) > maxSocketPath:
		return fmt.Errorf("the socket's path has %d bytes, more than %d", len(path), maxSocketPath)
	case u.Host != "":
		return fmt.Errorf("it has a host, %q, and a unix socket; the export's name follows three slashes", u.Host)
	case strings.HasPrefix(path, "@"): // which means an abstract socket to package net
		path = "./" + path
	case strings.ContainsRune(path[1:], 0):
		return errors.New("the socket's path contains NUL")
	}
	o.Network, o.Address = "unix", path
	return nil
}

func (o *Options) setHost(u *url.URL, parameters map[string]string) error {
	if _, ok := parameters["socket"]; ok {
		return fmt.Errorf("parameter %q needs the scheme %s+unix", "socket", u.Scheme)
	}
	host, port := u.Hostname(), u.Port()
	if host == "" {
		return errors.New("the host is missing")
	}
	if port == "" {
		port = defaultPort
	}
	o.Network, o.Address = "tcp", net.JoinHostPort(host, port)
	return nil
}

func parseTLS(parameters map[string]string) (*tls.Config, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if kind, ok := take(parameters, "tls-type"); ok && kind != "x509" {
		return nil, fmt.Errorf("%w: tls-type %q", ErrUnsupported, kind)
	}
	config.ServerName, _ = take(parameters, "tls-hostname")
	if verify, ok := take(parameters, "tls-verify-peer"); ok {
		if verify != "0" && verify != "1" {
			return nil, fmt.Errorf("tls-verify-peer is %q, not 0 or 1", verify)
		}
		config.InsecureSkipVerify = verify == "0" //nolint:gosec // it is what the URI asks for
	}
	dir, ok := take(parameters, "tls-certificates")
	if !ok {
		return config, nil
	}
	authorities, err := os.ReadFile(filepath.Join(dir, "ca-cert.pem"))
	if err != nil {
		return nil, fmt.Errorf("tls-certificates: %w", err)
	}
	config.RootCAs = x509.NewCertPool()
	if !config.RootCAs.AppendCertsFromPEM(authorities) {
		return nil, fmt.Errorf("tls-certificates: no certificate in %s", filepath.Join(dir, "ca-cert.pem"))
	}
	cert, key := filepath.Join(dir, "client-cert.pem"), filepath.Join(dir, "client-key.pem")
	own, err := tls.LoadX509KeyPair(cert, key)
	switch {
	case err == nil:
		config.Certificates = []tls.Certificate{own}
	case !errors.Is(err, fs.ErrNotExist) || exists(cert) || exists(key):
		return nil, fmt.Errorf("tls-certificates: %w", err)
	}
	return config, nil
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}
