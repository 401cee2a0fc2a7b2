package e2e_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// transport is a way in which clients reach an export.
type transport struct {
	name string
	tcp  bool
	// newKey makes the keys of the certificates; nil is a transport without TLS.
	newKey func() (crypto.Signer, error)
}

func newRSA() (crypto.Signer, error)   { return rsa.GenerateKey(rand.Reader, 2048) }
func newECDSA() (crypto.Signer, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) }

// transports cover what clients treat differently. RSA is what GnuTLS's
// certtool makes by default, and libvirt's documentation with it.
var transports = []transport{
	{name: "unix"},
	{name: "TCP", tcp: true},
	{name: "unix-TLS-RSA", newKey: newRSA},
	{name: "TCP-TLS-ECDSA", tcp: true, newKey: newECDSA},
}

// foreignSize is the size in bytes of the disks that foreign clients get: more
// than the largest request of 32 MiB, and no whole number of chunks.
const foreignSize = 36*miB + 1536

// endpoint is an export as foreign clients name it.
type endpoint struct {
	*export
	uri   string   // for libnbd's tools and fio
	creds []string // for QEMU's tools, before all else
	image string   // for QEMU's tools
	at    []string // the address, for qemu-nbd
}

// over serves a point over a transport.
func (r *repo) over(tr transport, point string, args ...string) endpoint {
	r.t.Helper()
	var e endpoint
	args = append([]string{"--name", "disk"}, args...)
	clientDir := ""
	if tr.newKey != nil {
		var serverDir string
		serverDir, clientDir = certificates(r.t, tr.newKey)
		args = append(args, "--tls", "require", "--tls-certificates", serverDir)
		e.creds = []string{"--object", "tls-creds-x509,id=tls,endpoint=client,dir=" + clientDir}
	}
	if tr.tcp {
		e.export = r.serve(append([]string{"export", "add", point, "--json", "--listen", "127.0.0.1:0"}, args...)...)
	} else {
		e.export = r.export(point, args...)
	}
	u, err := url.Parse(e.URI)
	if err != nil {
		r.t.Fatal(err)
	}
	e.image = "driver=raw,file.driver=nbd,file.export=disk,"
	if tr.tcp {
		host, port, _ := net.SplitHostPort(u.Host)
		e.image += fmt.Sprintf("file.server.type=inet,file.server.host=%s,file.server.port=%s", host, port)
		e.at = []string{"--bind", host, "--port", port}
	} else {
		e.image += "file.server.type=unix,file.server.path=" + u.Query().Get("socket")
		e.at = []string{"--socket", u.Query().Get("socket")}
	}
	if tr.newKey != nil {
		e.image += ",file.tls-creds=tls,file.tls-hostname=localhost"
		e.at = append(e.at, "--tls-creds", "tls", "--tls-hostname", "localhost")
		q := u.Query()
		q.Set("tls-certificates", clientDir)
		q.Set("tls-hostname", "localhost")
		u.RawQuery = q.Encode()
	}
	e.uri = u.String()
	return e
}

// qemuImg runs a subcommand of qemu-img whose images are options, the
// export's or those of local.
func (e endpoint) qemuImg(t *testing.T, subcommand string, args ...string) string {
	t.Helper()
	return tool(t, "qemu-img", slices.Concat([]string{subcommand}, e.creds, []string{"--image-opts"}, args)...)
}

// qemuIO runs commands of qemu-io on an image named by options.
func (e endpoint) qemuIO(t *testing.T, image, cache string, commands ...string) {
	t.Helper()
	args := slices.Concat(e.creds, []string{"--image-opts", "-t", cache})
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	if out := tool(t, "qemu-io", append(args, image)...); strings.Contains(out, "failed") {
		t.Errorf("qemu-io %q on %s: %s", commands, image, out)
	}
}

// local names a raw file as QEMU's tools do with --image-opts.
func local(path string) string { return "driver=raw,file.driver=file,file.filename=" + path }

// holds fails the test unless the export has the bytes of the raw file.
func (e endpoint) holds(t *testing.T, file string) {
	t.Helper()
	e.qemuImg(t, "compare", e.image, local(file))
}

// certificates makes folders for a server at localhost and for a client, as
// QEMU, nbdkit and libvirt keep them.
func certificates(t *testing.T, newKey func() (crypto.Signer, error)) (serverDir, clientDir string) {
	t.Helper()
	now := time.Now()
	serial := int64(0)
	var ca *x509.Certificate
	var caKey crypto.Signer
	issue := func(name string, template x509.Certificate) (certificate, key []byte) {
		k, err := newKey()
		if err != nil {
			t.Fatal(err)
		}
		serial++
		template.SerialNumber = big.NewInt(serial)
		template.Subject = pkix.Name{CommonName: name}
		template.NotBefore, template.NotAfter = now.Add(-time.Hour), now.Add(time.Hour)
		template.BasicConstraintsValid = true
		if ca == nil {
			ca, caKey = &template, k
		}
		der, err := x509.CreateCertificate(rand.Reader, &template, ca, k.Public(), caKey)
		if err != nil {
			t.Fatal(err)
		}
		pkcs8, err := x509.MarshalPKCS8PrivateKey(k)
		if err != nil {
			t.Fatal(err)
		}
		return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})
	}
	caCert, _ := issue("e2e authority", x509.Certificate{IsCA: true, KeyUsage: x509.KeyUsageCertSign})
	serverDir, clientDir = t.TempDir(), t.TempDir()
	for _, of := range []struct {
		dir, role string
		template  x509.Certificate
	}{
		{serverDir, "server", x509.Certificate{
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
			DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		}},
		{clientDir, "client", x509.Certificate{
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		}},
	} {
		certificate, key := issue(of.role, of.template)
		for name, p := range map[string][]byte{"ca-cert.pem": caCert, of.role + "-cert.pem": certificate, of.role + "-key.pem": key} {
			if err := os.WriteFile(filepath.Join(of.dir, name), p, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	return serverDir, clientDir
}

// TestForeignReaders: every client reads a point's bytes and its map right,
// over every transport.
func TestForeignReaders(t *testing.T) {
	t.Parallel()
	for i, tr := range transports {
		t.Run(tr.name, func(t *testing.T) {
			t.Parallel()
			r := newRepo(t)
			source := mixedDisk(t, foreignSize, 60+uint64(i))
			first := r.backup(source)
			changed := overwrite(t, source, newRand(70+uint64(i)), 7)
			r.backup(source)
			e := r.over(tr, "vm@latest")

			e.described(t)
			e.mapped(t, source)
			e.marksChanged(t, "holdfast:changed:"+first.Point, changed)
			to := filepath.Join(t.TempDir(), "copy")
			for _, args := range [][]string{
				{"--connections=1", "--request-size=262144"},
				{"--connections=8"},
				{"--synchronous", "--no-extents"},
			} {
				if err := os.RemoveAll(to); err != nil {
					t.Fatal(err)
				}
				tool(t, "nbdcopy", append(args, e.uri, to)...)
				e.holds(t, to)
				sameFile(t, to, source)
			}
			e.holds(t, source)
			qcow2 := filepath.Join(t.TempDir(), "copy.qcow2")
			e.qemuImg(t, "convert", "-W", "-m", "16", "-O", "qcow2", e.image, qcow2)
			identical(t, "qcow2", qcow2, source)
			if e.creds == nil { // bench takes none
				e.qemuImg(t, "bench", "-c", "500", "-d", "64", "-s", "65536", e.image)
				e.qemuImg(t, "bench", "-c", "500", "-d", "16", "-s", "1000", "-o", "3", e.image)
			}
			tool(t, "/usr/bin/python3", "testdata/nbd_reads.py", e.uri, source, "200", "42")
			tool(t, "/usr/bin/python3", "testdata/nbd_errors.py", e.uri, source)
			e.stop()
		})
	}
}

// described: nbdinfo, QEMU's tools and nbd-client see the export as it is.
func (e endpoint) described(t *testing.T) {
	t.Helper()
	type exports struct {
		TLS     bool `json:"TLS"`
		Exports []struct {
			Name     string   `json:"export-name"`
			Size     int64    `json:"export-size"`
			ReadOnly bool     `json:"is_read_only"`
			Contexts []string `json:"contexts"`
		} `json:"exports"`
	}
	for _, args := range [][]string{{"--json"}, {"--json", "--list"}} {
		got := decode[exports](t, tool(t, "nbdinfo", append(args, e.uri)...))
		if len(got.Exports) != 1 || got.TLS != (e.creds != nil) || got.Exports[0].Name != "disk" || got.Exports[0].Size != e.SizeBytes ||
			got.Exports[0].ReadOnly != e.ReadOnly || !slices.Contains(got.Exports[0].Contexts, "base:allocation") {
			t.Errorf("nbdinfo %q: got %+v, want TLS %v and the export %+v", args, got, e.creds != nil, e)
		}
	}
	info := decode[struct {
		Size int64 `json:"virtual-size"`
	}](t, e.qemuImg(t, "info", "--output=json", e.image))
	if info.Size != e.SizeBytes {
		t.Errorf("qemu-img info: got %d bytes, want %d", info.Size, e.SizeBytes)
	}
	tool(t, "nbdinfo", "--can", "multi-conn", e.uri) // its exit status is the answer
	const want = "export: 'disk'\n  description: disk disk of vm, point "
	if out := tool(t, "qemu-nbd", slices.Concat([]string{"--list"}, e.creds, e.at)...); !strings.Contains(out, want) ||
		!strings.Contains(out, fmt.Sprintf("size:  %d\n", e.SizeBytes)) {
		t.Errorf("qemu-nbd --list: got %s\nwant %s and the size of %d bytes", out, want, e.SizeBytes)
	}
	if e.creds == nil && e.at[0] == "--bind" { // all that nbd-client can list
		if out := tool(t, "nbd-client", "-l", e.at[1], e.at[3]); !strings.Contains(out, "\ndisk: disk disk of vm") {
			t.Errorf("nbd-client -l: got %q, want the export", out)
		}
	}
}

// mapped: the maps of nbdinfo and qemu-img cover the export, agree, and call
// nothing zero that is not.
func (e endpoint) mapped(t *testing.T, source string) {
	t.Helper()
	content, err := os.ReadFile(source)
	if err != nil {
		t.Fatal(err)
	}
	content = append(content, make([]byte, e.SizeBytes-int64(len(content)))...)
	nbdinfo := decode[[]struct{ Offset, Length, Type int64 }](t, tool(t, "nbdinfo", "--map", "--json", e.uri))
	qemu := decode[[]struct {
		Start, Length int64
		Zero          bool
	}](t, e.qemuImg(t, "map", "--output=json", e.image))
	zero := func(tool string, pos, start, length int64, zero bool) {
		if start != pos || start+length > e.SizeBytes {
			t.Fatalf("%s: an extent [%d, %d) follows %d of %d bytes", tool, start, start+length, pos, e.SizeBytes)
		}
		if zero && len(strings.Trim(string(content[start:start+length]), "\x00")) > 0 {
			t.Errorf("%s: [%d, %d) is called zero, but is not", tool, start, start+length)
		}
	}
	end, zeros, qemuEnd, qemuZeros := int64(0), int64(0), int64(0), int64(0)
	for _, x := range nbdinfo {
		zero("nbdinfo --map", end, x.Offset, x.Length, x.Type&2 != 0)
		end += x.Length
		zeros += x.Length * (x.Type >> 1 & 1)
	}
	for _, x := range qemu {
		zero("qemu-img map", qemuEnd, x.Start, x.Length, x.Zero)
		qemuEnd += x.Length
		if x.Zero {
			qemuZeros += x.Length
		}
	}
	if end != e.SizeBytes || qemuEnd != end || zeros == 0 || zeros != qemuZeros {
		t.Errorf("got %d bytes, %d of them zeros, from nbdinfo, %d and %d from qemu-img, want %d and the same above 0",
			end, zeros, qemuEnd, qemuZeros, e.SizeBytes)
	}
}

// marksChanged: a metadata context marks those chunks, all of them and no others.
func (e endpoint) marksChanged(t *testing.T, context string, changed map[int64]bool) {
	t.Helper()
	end := int64(0)
	for _, x := range decode[[]struct{ Offset, Length, Type int64 }](t, tool(t, "nbdinfo", "--map="+context, "--json", e.uri)) {
		if x.Offset != end {
			t.Fatalf("%s: the extent %+v follows %d", context, x, end)
		}
		end += x.Length
		for n := x.Offset / chunk; n*chunk < end; n++ {
			if changed[n] != (x.Type&1 != 0) {
				t.Errorf("%s: chunk %d has type %d, want changed %v", context, n, x.Type, changed[n])
			}
		}
	}
	if end != e.SizeBytes {
		t.Errorf("%s: the map ends at %d, want %d", context, end, e.SizeBytes)
	}
}

// TestForeignWriters: what every client writes over every transport is what all
// read, survives a kill once it was flushed, and leaves the point alone.
func TestForeignWriters(t *testing.T) {
	t.Parallel()
	for i, tr := range transports {
		t.Run(tr.name, func(t *testing.T) {
			t.Parallel()
			r := newRepo(t)
			source := mixedDisk(t, foreignSize, 80+uint64(i))
			point := r.backup(source).Point
			e := r.over(tr, point, "--writable")
			e.described(t)
			tool(t, "/usr/bin/python3", "testdata/nbd_errors.py", e.uri, source)

			model := copyFile(t, source)
			for k, cache := range []string{"none", "writeback", "writethrough", "directsync", "unsafe"} {
				e.writesLike(t, model, cache, newRand(90+uint64(10*i+k)))
			}
			e.holds(t, model)

			// Whole disks, with holes, by one connection and by eight; killed after each.
			for k, connections := range []string{"1", "8"} {
				model = mixedDisk(t, foreignSize, 180+uint64(10*i+k))
				tool(t, "nbdcopy", "--flush", "--connections="+connections, model, e.uri)
				e.kill()
				e = r.over(tr, point, "--writable")
				e.holds(t, model)
			}
			e.qemuImg(t, "convert", "--target-image-opts", "-n", "-W", "-m", "16", local(source), e.image)
			e.holds(t, source)
			if e.creds == nil { // fio cannot name certificates
				tool(t, "fio", "--name=verify", "--ioengine=nbd", "--uri="+e.uri, "--rw=randwrite", "--bsrange=512-128k", "--iodepth=32",
					"--offset=1m", "--size=16m", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--randseed=7")
			}
			written := filepath.Join(t.TempDir(), "written")
			tool(t, "nbdcopy", e.uri, written)
			e.stop()
			e = r.over(tr, point, "--writable")
			e.holds(t, written)
			e.stop()
			r.intact(t, point, source)
		})
	}
}

// kill ends the export without a chance to tidy up.
func (e endpoint) kill() {
	e.t.Helper()
	if err := e.cmd.Process.Kill(); err != nil {
		e.t.Fatal(err)
	}
	e.wait()
}

// writesLike has qemu-io write, zero, discard and flush in the export and does
// the same to the model. A discarded range is written afterwards, since it may
// hold anything.
func (e endpoint) writesLike(t *testing.T, model, cache string, r *mathrand.Rand) {
	t.Helper()
	var commands, plain []string
	add := func(format string, args ...any) {
		commands = append(commands, fmt.Sprintf(format, args...))
		plain = append(plain, commands[len(commands)-1])
	}
	for range 25 {
		off, length := r.Int64N(foreignSize-miB), 1+r.Int64N(miB)
		if r.IntN(2) == 0 {
			off, length = off&^4095, length|4095+1
		}
		pattern := 1 + r.IntN(255)
		switch r.IntN(6) {
		case 0:
			add("write -z %d %d", off, length)
		case 1:
			add("write -z -u %d %d", off, length)
		case 2:
			commands = append(commands, fmt.Sprintf("discard %d %d", off, length))
			add("write -P %d %d %d", pattern, off, length)
		case 3:
			add("write -f -P %d %d %d", pattern, off, length)
			add("flush")
		default:
			add("write -P %d %d %d", pattern, off, length)
		}
		if r.IntN(4) == 0 {
			add("read %d %d", off, length)
		}
	}
	add("flush")
	e.qemuIO(t, e.image, cache, commands...)
	e.qemuIO(t, local(model), "writeback", plain...)
}
