package nbdserver_test

import (
	"bufio"
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/nbdserver"
)

// authority signs certificates for tests.
type authority struct {
	testing.TB
	newKey func() (crypto.Signer, error)
	cert   *x509.Certificate
	key    crypto.Signer
}

func newAuthority(tb testing.TB) *authority {
	tb.Helper()
	return newAuthorityOf(tb, func() (crypto.Signer, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) })
}

// newAuthorityOf has the kind of keys that newKey makes.
func newAuthorityOf(tb testing.TB, newKey func() (crypto.Signer, error)) *authority {
	tb.Helper()
	a := &authority{TB: tb, newKey: newKey}
	a.cert, a.key = a.sign(&x509.Certificate{
		Subject: pkix.Name{CommonName: "authority"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	})
	return a
}

// sign completes a template and signs it, with its own key for the authority's.
func (a *authority) sign(template *x509.Certificate) (*x509.Certificate, crypto.Signer) {
	a.Helper()
	key, err := a.newKey()
	if err != nil {
		a.Fatal(err)
	}
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		a.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.Fatal(err)
	}
	return cert, key
}

// folder fills a new folder with the files of a server or a client.
func (a *authority) folder(role, name string) (dir string, cert *x509.Certificate) {
	a.Helper()
	dir = a.TempDir()
	cert = a.replace(dir, role, name)
	a.write(filepath.Join(dir, "ca-cert.pem"), "CERTIFICATE", a.cert.Raw)
	return dir, cert
}

// replace puts a new certificate and its key into a folder.
func (a *authority) replace(dir, role, name string) *x509.Certificate {
	a.Helper()
	usage := x509.ExtKeyUsageClientAuth
	if role == "server" {
		usage = x509.ExtKeyUsageServerAuth
	}
	cert, key := a.sign(&x509.Certificate{
		Subject: pkix.Name{CommonName: name}, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{usage},
		DNSNames: []string{"localhost", name + ".example"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	})
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		a.Fatal(err)
	}
	a.write(filepath.Join(dir, role+"-cert.pem"), "CERTIFICATE", cert.Raw)
	a.write(filepath.Join(dir, role+"-key.pem"), "PRIVATE KEY", der)
	return cert
}

func (a *authority) write(path, kind string, der []byte) {
	a.Helper()
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		a.Fatal(err)
	}
}

// config is a client's, with the certificate of a folder unless dir is "".
func (a *authority) config(dir string) *tls.Config {
	a.Helper()
	c := &tls.Config{RootCAs: x509.NewCertPool(), ServerName: "localhost"}
	c.RootCAs.AddCert(a.cert)
	if dir != "" {
		pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "client-cert.pem"), filepath.Join(dir, "client-key.pem"))
		if err != nil {
			a.Fatal(err)
		}
		c.Certificates = []tls.Certificate{pair}
	}
	return c
}

func loadTLS(tb testing.TB, dir string, o nbdserver.TLSOptions) *nbdserver.TLS {
	tb.Helper()
	s, err := nbdserver.LoadTLS(dir, o)
	if err != nil {
		tb.Fatal(err)
	}
	return s
}

// encrypt starts TLS on a connection in the handshake.
func (c *client) encrypt(config *tls.Config) *client {
	c.Helper()
	c.send(option(optStartTLS))
	c.wantReply(optStartTLS, repAck)
	t := tls.Client(c.Conn, config)
	if err := t.Handshake(); err != nil {
		c.Fatalf("TLS: %v", err)
	}
	return &client{TB: c.TB, Conn: t, in: bufio.NewReader(t)}
}

func TestTLSRequired(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	dir, _ := a.folder("server", "server")
	socket := start(t, nbdserver.Options{TLS: loadTLS(t, dir, nbdserver.TLSOptions{Required: true})}, testExport())

	c := dial(t, socket)
	c.send(fixedNewstyle | noZeroes)
	for n, data := range map[uint32][]byte{
		optList: nil, optInfo: info("disk"), optGo: info("disk"), optStructured: nil, optExtended: nil,
		optListMeta: meta("disk"), optSetMeta: meta("disk", "base:allocation"), 99: nil, 4: []byte("x"),
	} {
		c.send(option(n, data))
		c.wantReply(n, errTLS)
	}
	c.send(option(optStartTLS, "data"))
	c.wantReply(optStartTLS, errInvalid)
	e := c.encrypt(a.config(""))
	e.send(option(optStartTLS), option(optStructured), option(optGo, info("disk")))
	e.wantReply(optStartTLS, errInvalid)
	e.wantReply(optStructured, repAck)
	e.wantReply(optGo, repInfo)
	e.wantReply(optGo, repAck)
	if r := e.ask(request{command: cmdRead, cookie: 1, length: 50000}, true); !bytes.Equal(r.data, testBytes()[:50000]) {
		t.Errorf("read over TLS: wrong bytes, error %d", r.errno)
	}

	c = dial(t, socket)
	c.send(fixedNewstyle, option(optAbort))
	c.wantReply(optAbort, repAck)
	c.wantClosed()
	c = dial(t, socket)
	c.send(fixedNewstyle, option(optExportName, "disk"))
	c.wantClosed()
	c = dial(t, socket)
	c.send(uint32(0)) // too old for any other option
	c.wantClosed()
}

// TestTLSForgets: nothing that was said in plain text counts once TLS runs.
func TestTLSForgets(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	dir, _ := a.folder("server", "server")
	socket := start(t, nbdserver.Options{TLS: loadTLS(t, dir, nbdserver.TLSOptions{})}, testExport())
	c := dial(t, socket)
	c.send(fixedNewstyle, option(optExtended), option(optSetMeta, meta("disk", "base:allocation")))
	c.wantReply(optExtended, repAck)
	c.wantReply(optSetMeta, repMeta)
	c.wantReply(optSetMeta, repAck)
	e := c.encrypt(a.config(""))
	e.send(option(optSetMeta, meta("disk", "base:allocation")))
	e.wantReply(optSetMeta, errInvalid) // structured replies are forgotten
	e.send(option(optStructured))
	e.wantReply(optStructured, repAck) // and extended headers
	e.send(option(optGo, info("disk")))
	e.wantReply(optGo, repInfo)
	e.wantReply(optGo, repAck)
	if r := e.ask(request{command: cmdStatus, cookie: 1, length: 512}, true); r.errno != einval {
		t.Errorf("block status by a context of before: got error %d, want %d", r.errno, einval)
	}
}

// TestTLSInjection: an attacker on the wire puts options behind the client's
// STARTTLS, hoping that they are taken for encrypted ones.
func TestTLSInjection(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	dir, _ := a.folder("server", "server")
	for _, required := range []bool{true, false} {
		socket := start(t, nbdserver.Options{TLS: loadTLS(t, dir, nbdserver.TLSOptions{Required: required})}, testExport())
		c := dial(t, socket)
		c.send(fixedNewstyle, option(optStartTLS), option(optList))
		c.wantClosed()
		c = dial(t, socket)
		c.send(fixedNewstyle, option(optStartTLS))
		c.wantReply(optStartTLS, repAck)
		c.send(option(optList)) // after the fact it is no TLS
		if p, _ := io.ReadAll(c.in); bytes.Contains(p, []byte("disk")) {
			t.Errorf("got %q in plain text", p)
		}
	}
}

func TestTLSOffered(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	dir, _ := a.folder("server", "server")
	socket := start(t, nbdserver.Options{TLS: loadTLS(t, dir, nbdserver.TLSOptions{})}, testExport(),
		nbdserver.Export{Name: "secret", Disk: testExport().Disk, Allow: []string{"someone"}})
	dial(t, socket).enter("disk", true)
	for _, name := range []string{"secret", "missing"} { // which is it?
		c := dial(t, socket)
		c.send(fixedNewstyle, option(optStructured), option(optInfo, info(name)), option(optGo, info(name)), option(optSetMeta, meta(name, "base:allocation")))
		c.wantReply(optStructured, repAck)
		c.wantReply(optInfo, errTLS)
		c.wantReply(optGo, errTLS)
		c.wantReply(optSetMeta, errUnknown)
		c.send(option(optExportName, name))
		c.wantClosed()
	}
	c := dial(t, socket)
	c.send(uint32(0), option(optStartTLS), option(optInfo, info("missing"))) // too old to be told of TLS
	c.wantReply(optStartTLS, errPolicy)
	c.wantReply(optInfo, errUnknown)
}

// TestAllow: an export with a list of identities does not exist for others.
func TestAllow(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	dir, _ := a.folder("server", "server")
	aliceDir, alice := a.folder("client", "alice")
	bobDir, _ := a.folder("client", "bob")
	strangerDir, _ := newAuthority(t).folder("client", "alice")
	d := testExport().Disk
	exports := []nbdserver.Export{
		{Name: "by-fingerprint", Disk: d, Allow: []string{fmt.Sprintf("sha256:%x", sha256.Sum256(alice.Raw))}},
		{Name: "by-host", Disk: d, Allow: []string{"nobody", "bob.example"}},
		{Name: "by-name", Disk: d, Allow: []string{"alice", "bob"}},
		{Name: "open", Disk: d},
	}
	socket := start(t, nbdserver.Options{TLS: loadTLS(t, dir, nbdserver.TLSOptions{})}, exports...)
	for _, tt := range []struct {
		who  string
		dir  string
		want []string
	}{
		{"nobody", "", []string{"open"}},
		{"alice", aliceDir, []string{"by-fingerprint", "by-name", "open"}},
		{"bob", bobDir, []string{"by-host", "by-name", "open"}},
	} {
		c := dial(t, socket)
		c.send(fixedNewstyle)
		c = c.encrypt(a.config(tt.dir))
		c.send(option(optList))
		var got []string
		for r := c.optReply(); r.Kind == repServer; r = c.optReply() {
			got = append(got, r.Data[4:])
		}
		if !slices.Equal(got, tt.want) {
			t.Errorf("%s: list: got %q, want %q", tt.who, got, tt.want)
		}
		c.send(option(optStructured))
		c.wantReply(optStructured, repAck)
		for _, x := range exports {
			may := slices.Contains(tt.want, x.Name)
			for _, o := range [][]byte{
				option(optInfo, info(x.Name)), option(optListMeta, meta(x.Name)), option(optSetMeta, meta(x.Name, "base:allocation")),
			} {
				c.send(o)
				r := c.optReply()
				if r.Kind == errUnknown == may {
					t.Errorf("%s, option %d, export %s: got reply %#x", tt.who, r.Option, x.Name, r.Kind)
				}
				for r.Kind == repInfo || r.Kind == repMeta {
					r = c.optReply()
				}
			}
			if !may {
				c.send(option(optGo, info(x.Name)))
				c.wantReply(optGo, errUnknown)
			}
		}
		c.send(option(optGo, info(tt.want[0])))
		c.wantReply(optGo, repInfo)
		c.wantReply(optGo, repAck)
	}

	c := dial(t, socket)
	c.send(fixedNewstyle, option(optStartTLS))
	c.wantReply(optStartTLS, repAck)
	s := tls.Client(c.Conn, a.config(strangerDir)) // of that name, by another authority
	s.Handshake()
	if n, err := s.Read(make([]byte, 1)); err == nil {
		t.Errorf("a stranger: got %d bytes, want an alert", n)
	}
}

func TestAllowNeedsVerification(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	withCA, _ := a.folder("server", "server")
	withoutCA := t.TempDir()
	a.replace(withoutCA, "server", "server")
	x := testExport()
	x.Allow = []string{"alice"}
	for _, tt := range []struct {
		tls  *nbdserver.TLS
		want error
	}{
		{nil, nbdserver.ErrInvalid},
		{loadTLS(t, withoutCA, nbdserver.TLSOptions{Required: true}), nbdserver.ErrInvalid},
		{loadTLS(t, withCA, nbdserver.TLSOptions{}), nil},
	} {
		if err := nbdserver.New(nbdserver.Options{TLS: tt.tls}).Add(x); !errors.Is(err, tt.want) {
			t.Errorf("got %v, want %v", err, tt.want)
		}
	}
}

func TestIdentities(t *testing.T) {
	t.Parallel()
	c := &x509.Certificate{
		Raw: []byte("abc"), Subject: pkix.Name{CommonName: "name"}, DNSNames: []string{"a.example", "name", "sha256:0000", "b.example"},
	}
	const fingerprint = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
	want := []string{fingerprint, "name", "a.example", "b.example"}
	if got := nbdserver.Identities(c); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if got, want := nbdserver.Identities(&x509.Certificate{Raw: []byte("abc")}), []string{fingerprint}; !slices.Equal(got, want) {
		t.Errorf("without names: got %q, want %q", got, want)
	}
}

func TestClientCertificates(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	dir, _ := a.folder("server", "server")
	clientDir, _ := a.folder("client", "alice")
	socket := start(t, nbdserver.Options{TLS: loadTLS(t, dir, nbdserver.TLSOptions{ClientCertificates: true})}, testExport())
	c := dial(t, socket)
	c.send(fixedNewstyle)
	c.encrypt(a.config(clientDir)).enterGo("disk")

	c = dial(t, socket)
	c.send(fixedNewstyle, option(optStartTLS))
	c.wantReply(optStartTLS, repAck)
	s := tls.Client(c.Conn, a.config(""))
	s.Handshake()
	if n, err := s.Read(make([]byte, 1)); err == nil {
		t.Errorf("without a certificate: got %d bytes, want an alert", n)
	}
	old := a.config(clientDir)
	old.MaxVersion = tls.VersionTLS11
	c = dial(t, socket)
	c.send(fixedNewstyle, option(optStartTLS))
	c.wantReply(optStartTLS, repAck)
	if err := tls.Client(c.Conn, old).Handshake(); err == nil {
		t.Error("TLS 1.1 was accepted")
	}
	old.MaxVersion = tls.VersionTLS12
	c = dial(t, socket)
	c.send(fixedNewstyle)
	c.encrypt(old).enterGo("disk")
}

// enterGo enters an export after the client flags are sent.
func (c *client) enterGo(name string) {
	c.Helper()
	c.send(option(optGo, info(name)))
	c.wantReply(optGo, repInfo)
	c.wantReply(optGo, repAck)
	if r := c.ask(request{command: cmdRead, cookie: 1, length: 10}, false); r.errno != 0 {
		c.Errorf("read: got error %d", r.errno)
	}
}

// TestTLSClients has foreign clients prove who they are, also with the RSA
// certificates that certtool makes.
func TestTLSClients(t *testing.T) {
	t.Parallel()
	for name, newKey := range map[string]func() (crypto.Signer, error){
		"ECDSA": func() (crypto.Signer, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) },
		"RSA":   func() (crypto.Signer, error) { return rsa.GenerateKey(rand.Reader, 2048) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tlsClients(t, newAuthorityOf(t, newKey))
		})
	}
}

func tlsClients(t *testing.T, a *authority) {
	t.Helper()
	serverDir, _ := a.folder("server", "server")
	clientDir, _ := a.folder("client", "alice")
	otherDir, _ := a.folder("client", "mallory")
	x := testExport()
	x.Allow = []string{"alice"}
	o := nbdserver.Options{TLS: loadTLS(t, serverDir, nbdserver.TLSOptions{Required: true, ClientCertificates: true})}
	tcp, err := nbdserver.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	unix, err := nbdserver.Listen("unix", filepath.Join(t.TempDir(), "nbd"))
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range []net.Listener{tcp, unix} {
		uri := serve(t, l, o, x).URI(l.Addr(), "disk")
		separator := "?"
		if strings.Contains(uri, "?") {
			separator = "&"
		}
		mine := uri + separator + "tls-certificates=" + clientDir
		if got := strings.TrimSpace(string(run(t, "nbdinfo", "--size", mine))); got != fmt.Sprint(testSize) {
			t.Errorf("nbdinfo %s: got size %s", mine, got)
		}
		to := filepath.Join(t.TempDir(), "copy")
		if err := os.WriteFile(to, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		run(t, "nbdcopy", mine, to)
		if got, err := os.ReadFile(to); err != nil || !bytes.Equal(got, testBytes()) {
			t.Errorf("nbdcopy %s: the copy differs, %v", mine, err)
		}
		for _, bad := range []string{
			uri + separator + "tls-certificates=" + otherDir,
			strings.Replace(mine, "nbds", "nbd", 1) + "&tls-type=x509",
		} {
			if out, err := exec.Command("nbdinfo", "--size", bad).CombinedOutput(); err == nil {
				t.Errorf("nbdinfo %s: got %s", bad, out)
			}
		}
		qemuImage := "driver=nbd,export=disk,tls-creds=tls,tls-hostname=localhost,"
		address := []string{"-k", l.Addr().String()}
		if l == tcp {
			_, port, _ := net.SplitHostPort(l.Addr().String())
			qemuImage += "server.type=inet,server.host=127.0.0.1,server.port=" + port
			address = []string{"-b", "127.0.0.1", "-p", port}
		} else {
			qemuImage += "server.type=unix,server.path=" + l.Addr().String()
		}
		creds := func(dir string) string { return "tls-creds-x509,id=tls,endpoint=client,verify-peer=yes,dir=" + dir }
		for dir, want := range map[string]string{clientDir: "exports available: 1", otherDir: "exports available: 0"} {
			args := append([]string{"--list", "--object", creds(dir), "--tls-creds=tls", "--tls-hostname=localhost"}, address...)
			if out := string(run(t, "qemu-nbd", args...)); !strings.Contains(out, want) {
				t.Errorf("qemu-nbd %q: got %s, want %s", args, out, want)
			}
		}
		raw := filepath.Join(t.TempDir(), "raw")
		run(t, "qemu-img", "convert", "--object", creds(clientDir), "--image-opts", "-O", "raw", qemuImage, raw)
		got, err := os.ReadFile(raw)
		if err != nil || !bytes.Equal(got[:testSize], testBytes()) {
			t.Errorf("qemu-img convert over %v: the copy differs, %v", l.Addr(), err)
		}
		if out, err := exec.Command("qemu-img", "info", "--object", creds(otherDir), "--image-opts", qemuImage).CombinedOutput(); err == nil {
			t.Errorf("qemu-img of another client: got %s", out)
		}
	}
}

// TestTLSDrain: the end of an export waits for what clients have asked over TLS,
// and says farewell.
func TestTLSDrain(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	dir, _ := a.folder("server", "server")
	g := newGated()
	socket := filepath.Join(t.TempDir(), "nbd")
	s := startOn(t, "unix", socket, nbdserver.Options{TLS: loadTLS(t, dir, nbdserver.TLSOptions{})}, nbdserver.Export{Name: "gated", Disk: g})
	c := dial(t, socket).enterFlags().encrypt(a.config(""))
	c.send(option(optGo, info("gated")))
	c.wantReply(optGo, repInfo)
	c.wantReply(optGo, repAck)
	const requests = 4
	for i := range uint64(requests) {
		c.send(request{command: cmdRead, cookie: i, length: 100_000}.wire())
	}
	for range requests {
		<-g.entered
	}
	removed := make(chan error)
	go func() { removed <- s.Remove("gated") }()
	time.Sleep(250 * time.Millisecond) // the server looks a few times whether the client is quiet
	close(g.let)
	for range requests {
		if r := c.simple(100_000); r.errno != 0 {
			t.Errorf("got error %d", r.errno)
		}
	}
	if _, err := c.in.ReadByte(); !errors.Is(err, io.EOF) {
		t.Errorf("got %v, want TLS's farewell", err)
	}
	if err := <-removed; err != nil {
		t.Errorf("Remove: %v", err)
	}
}

// TestTLSDeadline: the ten seconds of the handshake go on while TLS begins.
func TestTLSDeadline(t *testing.T) {
	dir, _ := newAuthority(t).folder("server", "server")
	mode := loadTLS(t, dir, nbdserver.TLSOptions{Required: true})
	inBubble(t, nbdserver.Options{TLS: mode}, func(t *testing.T, l *pipeListener) {
		began := time.Now()
		c := greet(t, l.dial()).enterFlags()
		time.Sleep(6 * time.Second)
		c.send(option(optStartTLS))
		c.wantReply(optStartTLS, repAck)
		c.send("\x16\x03\x01\x02\x00") // the beginning of a record
		c.wantClosed()
		if got := time.Since(began); got != 10*time.Second {
			t.Errorf("dropped after %v, want 10s", got)
		}
	})
}

func TestServerURI(t *testing.T) {
	t.Parallel()
	unix, tcp := &net.UnixAddr{Net: "unix", Name: "/run/nbd"}, &net.TCPAddr{Port: 10809}
	plain, encrypted := nbdserver.New(nbdserver.Options{}), nbdserver.New(nbdserver.Options{TLS: offered(t)})
	for _, tt := range []struct {
		server *nbdserver.Server
		addr   net.Addr
		want   string
	}{
		{plain, unix, "nbd+unix:///a%20b?socket=/run/nbd"},
		{plain, tcp, "nbd://localhost:10809/a%20b"},
		{encrypted, unix, "nbds+unix:///a%20b?socket=/run/nbd"},
		{encrypted, tcp, "nbds://localhost:10809/a%20b"},
	} {
		if got := tt.server.URI(tt.addr, "a b"); got != tt.want {
			t.Errorf("got %s, want %s", got, tt.want)
		}
	}
}
