package nbdserver_test

import (
	"bytes"
	"encoding/json"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/nbdserver"
)

// clientExport is the disk that other programs read, its file with the same
// bytes, and its URI. Size is what qemu takes for whole: a multiple of 512.
func clientExport(t *testing.T) (uri, file string) {
	t.Helper()
	const size = 40*piece + 512
	p := bytes.Repeat(testBytes(), 3)[:size] // holes are in other places than the map says
	for i := range int64(size / piece) {
		if clientZero(i) {
			clear(p[i*piece : (i+1)*piece])
		}
	}
	file = filepath.Join(t.TempDir(), "expected")
	if err := os.WriteFile(file, p, 0o600); err != nil {
		t.Fatal(err)
	}
	socket := start(t, nbdserver.Options{}, nbdserver.Export{
		Name: "the disk", Description: "for tests", BlockSize: piece, Disk: disk{bytes.NewReader(p), size, piece, clientZero},
	})
	return nbdserver.URI(&net.UnixAddr{Net: "unix", Name: socket}, "the disk"), file
}

func clientZero(p int64) bool { return p%5 > 2 || p >= 10 && p < 20 }

func parse(t *testing.T, out []byte, into any) {
	t.Helper()
	if err := json.Unmarshal(out, into); err != nil {
		t.Fatalf("%v in %s", err, out)
	}
}

func TestNBDInfo(t *testing.T) {
	t.Parallel()
	uri, file := clientExport(t)
	type export struct {
		Name        string   `json:"export-name"`
		Description string   `json:"description"`
		Size        int      `json:"export-size"`
		Contexts    []string `json:"contexts"`
		ReadOnly    bool     `json:"is_read_only"`
		MultiConn   bool     `json:"can_multi_conn"`
		DF          bool     `json:"can_df"`
		Flush       bool     `json:"can_flush"`
		Trim        bool     `json:"can_trim"`
		Minimum     int      `json:"block_size_minimum"`
		Preferred   int      `json:"block_size_preferred"`
		Maximum     int      `json:"block_size_maximum"`
	}
	want := export{"the disk", "for tests", 40*piece + 512, []string{"base:allocation"}, true, true, true, true, false, 1, piece, 32 << 20}
	for _, mode := range []string{"--json", "--list"} {
		var got struct {
			Protocol string
			Exports  []export
		}
		parse(t, run(t, "nbdinfo", mode, "--json", uri), &got)
		if got.Protocol != "newstyle-fixed" || len(got.Exports) != 1 {
			t.Fatalf("%s: got %+v", mode, got)
		}
		if e := got.Exports[0]; !slices.Equal(e.Contexts, want.Contexts) || e.Name != want.Name || e.Description != want.Description ||
			e.Size != want.Size || !e.ReadOnly || !e.MultiConn || !e.DF || !e.Flush || e.Trim ||
			e.Minimum != want.Minimum || e.Preferred != want.Preferred || e.Maximum != want.Maximum {
			t.Errorf("%s: got %+v, want %+v", mode, e, want)
		}
	}

	var extents []struct{ Offset, Length, Type int64 }
	parse(t, run(t, "nbdinfo", "--map", "--json", uri), &extents)
	content, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	pos := int64(0)
	for i, e := range extents {
		if e.Offset != pos || e.Type != 0 && e.Type != 3 || i > 0 && extents[i-1].Type == e.Type {
			t.Errorf("extent %d: got %+v after offset %d", i, e, pos)
		}
		for p := e.Offset / piece; p*piece < e.Offset+e.Length; p++ {
			if clientZero(p) != (e.Type == 3) {
				t.Errorf("piece %d: got type %d", p, e.Type)
			}
		}
		pos += e.Length
	}
	if pos != int64(len(content)) {
		t.Errorf("the map ends at %d, want %d", pos, len(content))
	}
}

func TestNBDCopy(t *testing.T) {
	t.Parallel()
	uri, file := clientExport(t)
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"--connections=1"},
		{"--connections=4"},
		{"--connections=4", "--request-size=262144"},
		{"--no-extents", "--synchronous"},
		{"--no-extents", "--request-size=33554432"},
	} {
		to := filepath.Join(t.TempDir(), "copy")
		if err := os.WriteFile(to, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		run(t, "nbdcopy", append(args, uri, to)...)
		got, err := os.ReadFile(to)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("nbdcopy %v: the copy differs", args)
		}
	}
}

func TestQEMU(t *testing.T) {
	t.Parallel()
	uri, file := clientExport(t)
	var info struct {
		Size int `json:"virtual-size"`
	}
	parse(t, run(t, "qemu-img", "info", "--output=json", uri), &info)
	if want := 40*piece + 512; info.Size != want {
		t.Errorf("qemu-img info: got size %d, want %d", info.Size, want)
	}
	var extents []struct {
		Start, Length int64
		Zero, Data    bool
	}
	parse(t, run(t, "qemu-img", "map", "--output=json", uri), &extents)
	if len(extents) < 10 {
		t.Errorf("qemu-img map: got %d extents", len(extents))
	}
	for _, e := range extents {
		for p := e.Start / piece; p*piece < e.Start+e.Length; p++ {
			if clientZero(p) != e.Zero || e.Zero == e.Data {
				t.Errorf("qemu-img map: got %+v over piece %d", e, p)
			}
		}
	}
	qcow2 := filepath.Join(t.TempDir(), "copy.qcow2")
	run(t, "qemu-img", "convert", "-W", "-m", "16", "-O", "qcow2", uri, qcow2)
	run(t, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", qcow2, file)
	run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", uri, file)

	out := string(run(t, "qemu-io", "-r", "-f", "raw", "-c", "read -P 0 655360 655360", "-c", "read -v 0 16", uri))
	if !strings.Contains(out, "read 655360/655360 bytes") || strings.Contains(out, "Pattern verification failed") {
		t.Errorf("qemu-io: %s", out)
	}
	// QEMU believes our flags: it does not even open the export for writing.
	if out, err := exec.Command("qemu-io", "-f", "raw", "-c", "write 0 512", uri).CombinedOutput(); err == nil {
		t.Errorf("qemu-io could write: %s", out)
	}
}

func TestLibnbdTorture(t *testing.T) {
	t.Parallel()
	uri, file := clientExport(t)
	run(t, "/usr/bin/python3", filepath.Join("testdata", "torture.py"), uri, file)
}

// TestNamesInURIs: libnbd and QEMU read our URIs as we mean them, over TCP too.
func TestNamesInURIs(t *testing.T) {
	t.Parallel()
	names := []string{"plain", "a b/c+d?e#f%20&g=h", "/leading", "größe", "trailing/"}
	var exports []nbdserver.Export
	for _, name := range names {
		exports = append(exports, nbdserver.Export{Name: name, Disk: testExport().Disk})
	}
	dir := filepath.Join(t.TempDir(), "a b&c+%20")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	tcp, err := nbdserver.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	unix, err := nbdserver.Listen("unix", filepath.Join(dir, "nbd"))
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range []net.Listener{tcp, unix} {
		serve(t, l, nbdserver.Options{}, exports...)
		for _, name := range names {
			uri := nbdserver.URI(l.Addr(), name)
			if got := strings.TrimSpace(string(run(t, "nbdinfo", "--size", uri))); got != "1048676" {
				t.Errorf("nbdinfo %s: got size %s", uri, got)
			}
			if !strings.HasPrefix(name, "/") { // QEMU drops all leading slashes
				run(t, "qemu-img", "info", uri)
			}
		}
	}
}

// TestClientsWrite: QEMU, libnbd and fio write what they read back.
func TestClientsWrite(t *testing.T) {
	t.Parallel()
	const size = 24 << 20
	r := newRAM(make([]byte, size))
	socket := start(t, nbdserver.Options{}, nbdserver.Export{Name: "disk", Disk: r})
	uri := nbdserver.URI(&net.UnixAddr{Net: "unix", Name: socket}, "disk")

	want := bytes.Repeat(testBytes(), size/testSize+1)[:size]
	file := filepath.Join(t.TempDir(), "content")
	if err := os.WriteFile(file, want, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"nbdcopy", "--connections=4", "--flush", file, uri},
		{"nbdcopy", "--request-size=33554432", "--connections=1", file, uri},
		{"qemu-img", "convert", "-n", "-W", "-f", "raw", "-O", "raw", "-t", "none", file, uri},
	} {
		r.Zero(0, size)
		run(t, args[0], args[1:]...)
		if !r.holds(want) {
			t.Errorf("%q: the disk differs", args)
		}
	}
	out := run(t, "qemu-io", "-f", "raw",
		"-c", "write -f -P 0x11 0 1M", "-c", "write -z 512 1k", "-c", "write -z -u 4096 4k", "-c", "discard 1M 2M", "-c", "flush",
		"-c", "read -P 0x11 0 512", "-c", "read -P 0 512 1k", "-c", "read -P 0 4096 4k", "-c", "read -P 0x11 8k 100k", uri)
	if bytes.Contains(out, []byte("failed")) || r.syncs.Load() == 0 {
		t.Errorf("qemu-io: %s", out)
	}
	run(t, "fio", "--name=verify", "--ioengine=nbd", "--uri="+uri, "--rw=randwrite", "--bsrange=512-600k", "--iodepth=16", "--size=24m",
		"--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--output="+filepath.Join(t.TempDir(), "fio"))
	var flags struct {
		Exports []map[string]any
	}
	parse(t, run(t, "nbdinfo", "--json", uri), &flags)
	for _, can := range []string{"can_cache", "can_fast_zero", "can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero", "can_df"} {
		if flags.Exports[0][can] != true {
			t.Errorf("nbdinfo: %s is %v", can, flags.Exports[0][can])
		}
	}
	if flags.Exports[0]["is_read_only"] != false {
		t.Error("nbdinfo: the export is read-only")
	}
}
