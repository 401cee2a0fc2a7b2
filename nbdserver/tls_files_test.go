package nbdserver_test

import (
	"bytes"
	"crypto/tls"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/nbdserver"
)

// TestTLSReload replaces the certificates under a running server, one file at a
// time. Between the two, when they do not belong together, the old ones serve.
func TestTLSReload(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	dir, _ := a.folder("server", "before")
	var log bytes.Buffer
	socket := start(t, nbdserver.Options{TLS: loadTLS(t, dir, nbdserver.TLSOptions{Log: slog.New(slog.NewTextHandler(&log, nil))})}, testExport())
	served := func() string {
		c := dial(t, socket)
		defer c.Close()
		c.send(fixedNewstyle)
		e := c.encrypt(a.config(""))
		return e.Conn.(*tls.Conn).ConnectionState().PeerCertificates[0].Subject.CommonName
	}
	wantServed := func(when, want string) {
		t.Helper()
		if got := served(); got != want {
			t.Errorf("%s: got the certificate of %q, want %q", when, got, want)
		}
	}
	wantServed("at first", "before")
	long := dial(t, socket)
	long.send(fixedNewstyle)
	running := long.encrypt(a.config(""))

	fresh, _ := a.folder("server", "after")
	move := func(name string) {
		t.Helper()
		if err := os.Rename(filepath.Join(fresh, name), filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	move("server-cert.pem")
	wantServed("with the new certificate and the old key", "before")
	wantServed("once more", "before")
	if n := strings.Count(log.String(), "cannot be used"); n != 1 {
		t.Errorf("got %d warnings, want 1:\n%s", n, log.String())
	}
	move("server-key.pem")
	wantServed("with both", "after")
	os.Truncate(filepath.Join(dir, "server-cert.pem"), 0)
	wantServed("with an empty file", "after")
	os.Remove(filepath.Join(dir, "ca-cert.pem"))
	a.replace(dir, "server", "later")
	wantServed("without the authority", "after")
	a.write(filepath.Join(dir, "ca-cert.pem"), "CERTIFICATE", a.cert.Raw)
	wantServed("with everything", "later")
	running.enterGo("disk")
}

// TestTLSReloadSeesContent: new certificates are noticed although the files have the
// size, the time and the place of the old ones; not before a list of revoked
// certificates is gone that could not be checked.
func TestTLSReloadSeesContent(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	dir, _ := a.folder("server", "before")
	even := func(from string) {
		t.Helper()
		for _, name := range []string{"server-cert.pem", "server-key.pem"} {
			p, err := os.ReadFile(filepath.Join(from, name))
			if err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(dir, name)
			p = append(p, bytes.Repeat([]byte{'\n'}, 4096-len(p))...)
			if err := errors.Join(os.WriteFile(path, p, 0o600), os.Chtimes(path, time.Unix(1, 0), time.Unix(1, 0))); err != nil {
				t.Fatal(err)
			}
		}
	}
	even(dir)
	var log syncBuffer
	mode := loadTLS(t, dir, nbdserver.TLSOptions{Log: slog.New(slog.NewTextHandler(&log, nil))})
	socket := start(t, nbdserver.Options{TLS: mode}, testExport())
	wantServed := func(when, want string) {
		t.Helper()
		c := dial(t, socket).enterFlags().encrypt(a.config(""))
		defer c.Close()
		if got := c.Conn.(*tls.Conn).ConnectionState().PeerCertificates[0].Subject.CommonName; got != want {
			t.Errorf("%s: got the certificate of %q, want %q", when, got, want)
		}
	}
	wantServed("at first", "before")
	revoked := filepath.Join(dir, "ca-crl.pem")
	if err := os.WriteFile(revoked, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	fresh, _ := a.folder("server", "after")
	even(fresh)
	for range 3 {
		wantServed("with a list of revoked certificates", "before")
	}
	if got := strings.Count(log.String(), "ca-crl.pem"); got != 1 {
		t.Errorf("got %d warnings, want 1:\n%s", got, log.String())
	}
	if err := os.Remove(revoked); err != nil {
		t.Fatal(err)
	}
	wantServed("afterwards", "after")
}

func TestLoadTLS(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	for _, tt := range []struct {
		name   string
		harm   func(dir string) error
		demand bool
		good   bool
	}{
		{"all there", func(string) error { return nil }, true, true},
		{"no authority", func(dir string) error { return os.Remove(filepath.Join(dir, "ca-cert.pem")) }, false, true},
		{"no authority to verify by", func(dir string) error { return os.Remove(filepath.Join(dir, "ca-cert.pem")) }, true, false},
		{"no certificate", func(dir string) error { return os.Remove(filepath.Join(dir, "server-cert.pem")) }, false, false},
		{"no key", func(dir string) error { return os.Remove(filepath.Join(dir, "server-key.pem")) }, false, false},
		{"empty authority", func(dir string) error { return os.Truncate(filepath.Join(dir, "ca-cert.pem"), 0) }, false, false},
		{"half a key", func(dir string) error { return os.Truncate(filepath.Join(dir, "server-key.pem"), 100) }, false, false},
		{"revocations", func(dir string) error { return os.WriteFile(filepath.Join(dir, "ca-crl.pem"), nil, 0o600) }, false, false},
		{"huge", func(dir string) error { return os.Truncate(filepath.Join(dir, "server-cert.pem"), 1<<40) }, false, false},
		{"another's key", func(dir string) error {
			other, _ := a.folder("server", "other")
			return os.Rename(filepath.Join(other, "server-key.pem"), filepath.Join(dir, "server-key.pem"))
		}, false, false},
	} {
		dir, _ := a.folder("server", "server")
		if err := tt.harm(dir); err != nil {
			t.Fatal(err)
		}
		if _, err := nbdserver.LoadTLS(dir, nbdserver.TLSOptions{ClientCertificates: tt.demand}); err == nil != tt.good {
			t.Errorf("%s: got %v, want success %v", tt.name, err, tt.good)
		}
	}
}
