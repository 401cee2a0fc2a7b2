package nbdclient_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
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
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/nbdserver"
	"github.com/holdfast-backup/holdfast/nbdserver/internal/wire"
	"github.com/holdfast-backup/holdfast/nbdserver/nbdclient"
)

func TestParseURI(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		uri                      string
		network, address, export string
		serverName               string // "-" without TLS
	}{
		{"nbd://example.com", "tcp", "example.com:10809", "", "-"},
		{"nbd://example.com/", "tcp", "example.com:10809", "", "-"},
		{"nbd://example.com/disk", "tcp", "example.com:10809", "disk", "-"},
		{"nbd://example.com//disk", "tcp", "example.com:10809", "/disk", "-"},
		{"nbd://example.com/hello%20world+x", "tcp", "example.com:10809", "hello world+x", "-"},
		{"nbd://192.0.2.1:1/gr%C3%B6%C3%9Fe%3F%23", "tcp", "192.0.2.1:1", "größe?#", "-"},
		{"nbd://[2001:db8::1]/x", "tcp", "[2001:db8::1]:10809", "x", "-"},
		{"NBD://h:10810/x/y/", "tcp", "h:10810", "x/y/", "-"},
		{"nbds://h/x", "tcp", "h:10809", "x", ""},
		{"nbds://h/x?tls-hostname=other&tls-type=x509&tls-verify-peer=1", "tcp", "h:10809", "x", "other"},
		{"nbd+unix:///disk?socket=nbd.sock", "unix", "nbd.sock", "disk", "-"},
		{"nbd+unix:///?socket=/a%20b/c+d%26e", "unix", "/a b/c+d&e", "", "-"},
		{"nbd+unix://?socket=/s", "unix", "/s", "", "-"},
		{"nbd+unix:///?socket=%00/abstract", "unix", "\x00/abstract", "", "-"},
		{"nbd+unix:///?socket=@file", "unix", "./@file", "", "-"},
		{"nbds+unix:///x?socket=/s&tls-hostname=h", "unix", "/s", "x", "h"},
	} {
		o, err := nbdclient.ParseURI(tt.uri)
		if err != nil {
			t.Errorf("%s: %v", tt.uri, err)
			continue
		}
		name := "-"
		if o.TLS != nil {
			name = o.TLS.ServerName
		}
		if o.Network != tt.network || o.Address != tt.address || o.Export != tt.export || name != tt.serverName {
			t.Errorf("%s: got %q, %q, %q, TLS %q", tt.uri, o.Network, o.Address, o.Export, name)
		}
	}
}

func TestParseURIErrors(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for _, tt := range []struct{ uri, want string }{
		{"", "scheme"},
		{"/dev/nbd0", "scheme"},
		{"http://h/x", `scheme "http"`},
		{"nbd+vsock://1:2/x", `not supported: scheme "nbd+vsock"`},
		{"nbd+://h/x", `scheme "nbd+"`},
		{"nbd:unix:/s:exportname=x", "nbd://"},
		{"nbd:///x", "host"},
		{"nbd://:10809/x", "host"},
		{"nbd://h:port/x", "port"},
		{"nbd://h/x#y", "%23"},
		{"nbd://h/%zz", "%zz"},
		{"nbd://h/%00", "NUL"},
		{"nbd://h/%ff", "UTF-8"},
		{"nbd://h/" + strings.Repeat("x", 4097), "4096"},
		{"nbd://u@h/x", "user name"},
		{"nbd://h/x?socket=/s", "nbd+unix"},
		{"nbd://h/x?sokcet=/s", `"sokcet"`},
		{"nbd://h/x?tls-hostname=h", "nbds"},
		{"nbd+unix:///x", "socket is missing"},
		{"nbd+unix:///x?socket=", "socket is missing"},
		{"nbd+unix:///x?socket=/a&socket=/b", "twice"},
		{"nbd+unix:///x?socket=%zz", "%zz"},
		{"nbd+unix:///x?socket=/a%00b", "NUL"},
		{"nbd+unix:///x?socket=/" + strings.Repeat("a", 107), "108 bytes"},
		{"nbd+unix://host/x?socket=/s", `"host"`},
		{"nbd+unix:///x?socket=/s&tls-certificates=/c", "nbds+unix"},
		{"nbds://h/x?tls-type=psk", `tls-type "psk"`},
		{"nbds://h/x?tls-psk-file=/f", `"tls-psk-file"`},
		{"nbds://h/x?tls-verify-peer=no", "tls-verify-peer"},
		{"nbds://h/x?tls-certificates=" + dir, filepath.Join(dir, "ca-cert.pem")},
	} {
		if _, err := nbdclient.ParseURI(tt.uri); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: got %v, want %q", tt.uri, err, tt.want)
		}
	}
}

func FuzzParseURI(f *testing.F) {
	f.Add("nbds+unix:///x%20y?socket=/s&tls-hostname=h")
	f.Add("nbd://[::1]:10809//x")
	f.Fuzz(func(t *testing.T, uri string) {
		if strings.Contains(uri, "tls-cert") || strings.Contains(uri, "%") {
			return // it would name files, which are read
		}
		o, err := nbdclient.ParseURI(uri)
		if err != nil || o.TLS != nil || o.Network != "unix" || strings.HasPrefix(o.Address, "\x00") || strings.HasPrefix(o.Address, "@") {
			return
		}
		again, err := nbdclient.ParseURI(nbdserver.URI(&net.UnixAddr{Net: "unix", Name: o.Address}, o.Export))
		if err != nil || again.Address != o.Address || again.Export != o.Export {
			t.Errorf("%q: got %q and %q, then %q and %q, %v", uri, o.Address, o.Export, again.Address, again.Export, err)
		}
	})
}

// certificates makes a directory with what nbdkit, QEMU and the client call
// their certificates; that of the server is for localhost.
func certificates(t *testing.T) (dir string) {
	t.Helper()
	dir = t.TempDir()
	newKey := func() *ecdsa.PrivateKey {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
	authority := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	authorityKey := newKey()
	write := func(name string, cert *x509.Certificate, key *ecdsa.PrivateKey) {
		der, err := x509.CreateCertificate(rand.Reader, cert, authority, &key.PublicKey, authorityKey)
		if err != nil {
			t.Fatal(err)
		}
		private, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		writeFile(t, filepath.Join(dir, name+"-cert.pem"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
		writeFile(t, filepath.Join(dir, name+"-key.pem"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}))
	}
	write("ca", authority, authorityKey)
	for i, name := range []string{"server", "client"} {
		write(name, &x509.Certificate{
			SerialNumber: big.NewInt(int64(i) + 2), Subject: pkix.Name{CommonName: name}, DNSNames: []string{"localhost"},
			NotBefore: authority.NotBefore, NotAfter: authority.NotAfter, KeyUsage: x509.KeyUsageDigitalSignature,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		}, newKey())
	}
	return dir
}

func TestTLS(t *testing.T) {
	t.Parallel()
	want := sparseContent()
	file := writeFile(t, filepath.Join(t.TempDir(), "raw"), want)
	dir := certificates(t)
	kit := nbdkit(t, "--tls=require", "--tls-certificates="+dir, "--tls-verify-peer", "file", file)
	qemu := qemuNBD(t, "-e", "8", "-f", "raw", "--object", "tls-creds-x509,id=t,endpoint=server,verify-peer=yes,dir="+dir, "--tls-creds", "t", "-x", "x", file)
	plain := nbdkit(t, "file", file)
	strangers, anonymous := certificates(t), t.TempDir()
	ca, err := os.ReadFile(filepath.Join(dir, "ca-cert.pem"))
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(anonymous, "ca-cert.pem"), ca)

	for name, uri := range map[string]string{
		"nbdkit":     fmt.Sprintf("nbds+unix:///?socket=%s&tls-certificates=%s&tls-hostname=localhost", kit, dir),
		"qemu-nbd":   fmt.Sprintf("nbds+unix:///x?socket=%s&tls-certificates=%s&tls-hostname=localhost", qemu, dir),
		"unverified": fmt.Sprintf("nbds+unix:///?socket=%s&tls-certificates=%s&tls-verify-peer=0", kit, dir),
		"by TCP":     fmt.Sprintf("nbds://localhost:%s/?tls-certificates=%s", forward(t, kit), dir),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o, err := nbdclient.ParseURI(uri)
			if err != nil {
				t.Fatal(err)
			}
			checkReads(t, dial(t, o), want)
		})
	}
	for _, tt := range []struct {
		name, uri string
		want      error
		text      string
	}{
		{"plain server", fmt.Sprintf("nbds+unix:///?socket=%s&tls-certificates=%s&tls-hostname=localhost", plain, dir), nbdclient.ErrTLS, ""},
		{"plain client", "nbd+unix:///?socket=" + kit, nbdclient.ErrTLS, ""},
		{"plain client of QEMU", "nbd+unix:///x?socket=" + qemu, nbdclient.ErrTLS, ""},
		{"another name", fmt.Sprintf("nbds+unix:///?socket=%s&tls-certificates=%s&tls-hostname=other", kit, dir), nil, "other"},
		{"another authority", fmt.Sprintf("nbds+unix:///?socket=%s&tls-certificates=%s&tls-hostname=localhost", kit, strangers), nil, "authority"},
		{"no client certificate", fmt.Sprintf("nbds+unix:///?socket=%s&tls-certificates=%s&tls-hostname=localhost", kit, anonymous), nil, ""},
		{"no name", fmt.Sprintf("nbds+unix:///?socket=%s&tls-certificates=%s", kit, dir), nil, "tls-hostname"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			o, err := nbdclient.ParseURI(tt.uri)
			if err != nil {
				t.Fatal(err)
			}
			_, err = nbdclient.Dial(t.Context(), o)
			if err == nil || tt.want != nil && !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("got %v, want %v %q", err, tt.want, tt.text)
			}
		})
	}
}

// forward passes connections from a TCP port to a unix socket until the test
// ends, and returns the port.
func forward(t *testing.T, socket string) string {
	t.Helper()
	l, err := net.Listen("tcp", "localhost:0")
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	t.Cleanup(func() { l.Close(); running.Wait() })
	running.Go(func() {
		for {
			from, err := l.Accept()
			if err != nil {
				return
			}
			to, err := net.Dial("unix", socket)
			if err != nil {
				t.Error(err)
				from.Close()
				return
			}
			for _, pair := range [][2]net.Conn{{from, to}, {to, from}} {
				running.Go(func() {
					io.Copy(pair[0], pair[1])
					pair[0].Close()
					pair[1].Close()
				})
			}
		}
	})
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return port
}

// TestNeverPlain: a client that wants TLS says nothing else in the clear, and
// takes nothing in the clear for encrypted.
func TestNeverPlain(t *testing.T) {
	t.Parallel()
	ack := appendOptionReply(nil, wire.OptStartTLS, wire.RepAck, nil)
	for _, tt := range []struct {
		name  string
		serve func(f *fake)
		want  error
	}{
		{"refused", func(f *fake) { f.Write(appendOptionReply(nil, wire.OptStartTLS, wire.RepErrPolicy, nil)) }, nbdclient.ErrTLS},
		{"unknown", func(f *fake) { f.Write(appendOptionReply(nil, wire.OptStartTLS, wire.RepErrUnsup, nil)) }, nbdclient.ErrTLS},
		{"slipped in", func(f *fake) { f.Write(append(slices.Clone(ack), ack...)) }, nbdclient.ErrProtocol},
		{"no TLS behind it", func(f *fake) {
			f.Write(ack)
			io.ReadFull(f, make([]byte, 5))
			go f.drain() // until the connection ends
			f.Write(make([]byte, 100))
		}, tls.RecordHeaderError{}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			options := make(chan []uint32, 1)
			o := play(t, func(_ int, conn net.Conn) {
				f := newFake()
				f.Conn = conn
				f.greet()
				f.option()
				tt.serve(f)
				if tt.want == nbdclient.ErrTLS {
					f.option()
				}
				options <- f.options
				f.drain()
			})
			o.TLS = &tls.Config{ServerName: "localhost"}
			_, err := nbdclient.Dial(t.Context(), o)
			if _, ok := errors.AsType[tls.RecordHeaderError](err); !errors.Is(err, tt.want) && !ok {
				t.Errorf("got %v, want %v", err, tt.want)
			}
			for _, option := range <-options {
				if option != wire.OptStartTLS && option != wire.OptAbort {
					t.Errorf("option %d was sent in the clear", option)
				}
			}
		})
	}
}
