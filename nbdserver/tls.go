package nbdserver

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// The files of a TLS folder, named as QEMU, nbdkit and libvirt name them.
const (
	caFile   = "ca-cert.pem"
	certFile = "server-cert.pem"
	keyFile  = "server-key.pem"
	crlFile  = "ca-crl.pem"
)

// maxPEM bounds in bytes what is read of a file of certificates.
const maxPEM = 1 << 20

// TLSOptions say what a server demands of its clients.
type TLSOptions struct {
	// Required refuses clients that do not encrypt; otherwise they may choose.
	Required bool
	// ClientCertificates refuses clients without a certificate that ca-cert.pem
	// vouches for; otherwise they need none, but one that they show must be good.
	ClientCertificates bool
	// Log receives warnings about files that cannot be used. Default
	// slog.Default().
	Log *slog.Logger
}

// TLS is how a server proves who it is and verifies its clients: TLS 1.2 or
// later with X.509 certificates. The files are read again when they change;
// while the new ones are no whole, the old ones stay in use.
//
// Clients do not resume sessions, so that every connection verifies the
// certificate of its client.
type TLS struct {
	dir     string
	options TLSOptions
	verify  bool // there is a ca-cert.pem

	mu        sync.Mutex // guards what follows
	stamps    []stamp    // of the files whose content was last judged
	config    *tls.Config
	complaint string // why the files that are there now cannot be used, as it was logged
}

// stamp is what changes when a file is replaced, or when its content, owner or mode
// is changed.
type stamp struct {
	size     int64
	modified time.Time
	changed  syscall.Timespec
	info     os.FileInfo
}

func (s stamp) equal(o stamp) bool {
	return s.size == o.size && s.modified.Equal(o.modified) && s.changed == o.changed && (s.info == nil) == (o.info == nil) &&
		(s.info == nil || os.SameFile(s.info, o.info))
}

// errContent means that the files could be read, but not used: reading them again
// is of no use before they change.
var errContent = errors.New("unusable")

// LoadTLS reads a folder with server-cert.pem (the server's certificate and
// those between it and its root), server-key.pem and, to verify clients,
// ca-cert.pem. A folder with a list of revoked certificates, ca-crl.pem, is
// refused: it would not be heeded.
func LoadTLS(dir string, o TLSOptions) (*TLS, error) {
	o.Log = cmp.Or(o.Log, slog.Default())
	t := &TLS{dir: dir, options: o}
	_, err := os.Stat(filepath.Join(dir, caFile))
	t.verify = !errors.Is(err, fs.ErrNotExist)
	if o.ClientCertificates && !t.verify {
		return nil, fmt.Errorf("TLS folder %s: to demand certificates of clients takes a %s", dir, caFile)
	}
	if t.stamps, t.config, err = t.load(); err != nil {
		return nil, err
	}
	return t, nil
}

func (t *TLS) files() []string {
	names := []string{certFile, keyFile}
	if t.verify {
		names = append(names, caFile)
	}
	return names
}

// stat returns the stamps of the files and of crlFile, that of an absent one zero.
func (t *TLS) stat() []stamp {
	var stamps []stamp
	for _, name := range append(t.files(), crlFile) {
		var s stamp
		if info, err := os.Stat(filepath.Join(t.dir, name)); err == nil {
			s = stamp{size: info.Size(), modified: info.ModTime(), info: info}
			if st, ok := info.Sys().(*syscall.Stat_t); ok {
				s.changed = st.Ctim
			}
		}
		stamps = append(stamps, s)
	}
	return stamps
}

// load reads the files. The stamps are those from before, so that a change in
// the meantime is noticed later. The error is errContent unless they could not be read.
func (t *TLS) load() ([]stamp, *tls.Config, error) {
	stamps := t.stat()
	if _, err := os.Lstat(filepath.Join(t.dir, crlFile)); !errors.Is(err, fs.ErrNotExist) {
		return stamps, nil, fmt.Errorf("TLS folder %s: %w: there is a %s, which this server cannot check", t.dir, errContent, crlFile)
	}
	content := map[string][]byte{}
	for i, name := range t.files() {
		if stamps[i].size > maxPEM {
			return stamps, nil, fmt.Errorf("TLS folder %s: %w: %s has more than %d bytes", t.dir, errContent, name, maxPEM)
		}
		p, err := os.ReadFile(filepath.Join(t.dir, name))
		if err != nil {
			return stamps, nil, fmt.Errorf("TLS folder: %w", err)
		}
		content[name] = p
	}
	pair, err := tls.X509KeyPair(content[certFile], content[keyFile]) // also: do they belong together?
	if err != nil {
		return stamps, nil, fmt.Errorf("TLS folder %s: %w: %s and %s: %w", t.dir, errContent, certFile, keyFile, err)
	}
	c := &tls.Config{
		Certificates:           []tls.Certificate{pair},
		MinVersion:             tls.VersionTLS12,
		SessionTicketsDisabled: true,
		// Records of full size from the start: throughput is what counts here.
		DynamicRecordSizingDisabled: true,
	}
	if t.verify {
		roots := x509.NewCertPool()
		if !roots.AppendCertsFromPEM(content[caFile]) {
			return stamps, nil, fmt.Errorf("TLS folder %s: %w: %s holds no certificate", t.dir, errContent, caFile)
		}
		// Not ClientCAs: GnuTLS (QEMU, libvirt, libnbd) takes the names of authorities together
		// with the signature algorithms that crypto/tls lists, and then keeps an RSA
		// certificate to itself over TLS 1.3.
		c.ClientAuth = tls.RequestClientCert
		c.VerifyConnection = func(s tls.ConnectionState) error { return verifyClient(roots, s.PeerCertificates) }
	}
	if t.options.ClientCertificates {
		c.ClientAuth = tls.RequireAnyClientCert // which VerifyConnection looks at
	}
	return stamps, c, nil
}

// verifyClient checks the certificates that a client showed, its own first; none
// are no error.
func verifyClient(roots *x509.CertPool, shown []*x509.Certificate) error {
	if len(shown) == 0 {
		return nil
	}
	o := x509.VerifyOptions{Roots: roots, Intermediates: x509.NewCertPool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	for _, c := range shown[1:] {
		o.Intermediates.AddCert(c)
	}
	_, err := shown[0].Verify(o)
	return err
}

// current returns the configuration for one connection, from the files as they
// are if they can be used.
func (t *TLS) current(ctx context.Context) *tls.Config {
	t.mu.Lock()
	defer t.mu.Unlock()
	if slices.EqualFunc(t.stat(), t.stamps, stamp.equal) {
		return t.config
	}
	stamps, c, err := t.load()
	if err == nil || errors.Is(err, errContent) {
		t.stamps = stamps // else the next client has them read again
	}
	if err != nil {
		if t.complaint != err.Error() {
			t.options.Log.WarnContext(ctx, "new TLS certificates cannot be used, the old ones stay in use", slog.Any("error", err))
		}
		t.complaint = err.Error()
		return t.config
	}
	t.config, t.complaint = c, ""
	t.options.Log.InfoContext(ctx, "TLS certificates read anew", slog.String("folder", t.dir))
	return c
}

const fingerprintPrefix = "sha256:"

// Identities returns the names by which Export.Allow may know the owner of a
// certificate: the common name, the DNS names among its alternative names, and
// "sha256:" with the SHA-256 of the certificate's DER form in lower-case
// hexadecimal digits. Names that look like a fingerprint are left out.
//
// The constraints that an authority sets its subordinates bind DNS names, but not
// common names: one that may issue certificates for a part of the names only can
// write any common name. Where there are such authorities, name fingerprints.
func Identities(c *x509.Certificate) []string {
	sum := sha256.Sum256(c.Raw)
	names := []string{fingerprintPrefix + hex.EncodeToString(sum[:])}
	for _, name := range append([]string{c.Subject.CommonName}, c.DNSNames...) {
		if name != "" && !strings.HasPrefix(name, fingerprintPrefix) && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names
}

// identities are those of a client, none without a verified certificate.
type identities []string

// may reports whether the client may know of an export.
func (who identities) may(x *export) bool {
	return len(x.Allow) == 0 || slices.ContainsFunc(x.Allow, func(name string) bool { return slices.Contains(who, name) })
}
