package appliance_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/appliance"
)

// patience ends a test that hangs.
const patience = 30 * time.Second

// TestExport serves a disk, which nbdcopy reads, until it is told to end.
func TestExport(t *testing.T) {
	t.Parallel()
	a := open(t, newData(t))
	disk := noise(miB, 1)
	b := backup(t, a, "web", write(t, "vda.raw", disk))
	taken, err := net.Listen("tcp", appliance.DefaultListen) // fails where it is taken already: just as good
	if err == nil {
		t.Cleanup(func() { taken.Close() })
	}
	folder, err := os.MkdirTemp("", "hf") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(folder) })
	socket := filepath.Join(folder, "a socket.sock")
	for _, tt := range []struct {
		name string
		o    appliance.ExportOptions
		uri  string // how it begins
	}{
		{"default", appliance.ExportOptions{}, "nbd://127.0.0.1:"},
		{"another port", appliance.ExportOptions{Listen: "localhost:0", Name: "x y"}, "nbd://127.0.0.1:"},
		{"unix", appliance.ExportOptions{Unix: socket, Disk: "vda"}, "nbd+unix:///web/"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.o.Point = b.Point
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			copied := filepath.Join(t.TempDir(), "copied")
			var e appliance.Export
			err := a.Export(ctx, tt.o, func(ready appliance.Export) error {
				e = ready
				out, err := exec.CommandContext(ctx, "nbdcopy", e.URI, copied).CombinedOutput()
				if err != nil {
					t.Errorf("nbdcopy %s: %v\n%s", e.URI, err, out)
				}
				cancel()
				return nil
			})
			if err != nil {
				t.Errorf("got %v, want an export that ends without an error", err)
			}
			if !strings.HasPrefix(e.URI, tt.uri) || !e.ReadOnly || e.Size != miB || e.Disk != "vda" || e.Point != b.Point {
				t.Errorf("got %+v, want the read-only disk vda at %s", e, tt.uri)
			}
			if got, err := os.ReadFile(copied); err != nil || !bytes.Equal(got, disk) {
				t.Errorf("the copy differs (%v)", err)
			}
		})
	}
	if _, err := os.Lstat(socket); err == nil {
		t.Errorf("%s is left", socket)
	}
	broken := errors.New("broken")
	if err := a.Export(t.Context(), appliance.ExportOptions{Point: b.Point}, func(appliance.Export) error { return broken }); !errors.Is(err, broken) {
		t.Errorf("ready failed: got %v, want its error", err)
	}
}

func TestExportRefuses(t *testing.T) {
	t.Parallel()
	a := open(t, newData(t))
	backup(t, a, "web", write(t, "vda.raw", noise(chunk, 1)), write(t, "vdb.raw", noise(chunk, 2)))
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { taken.Close() })
	file := write(t, "file", nil)
	for _, tt := range []struct {
		name string
		o    appliance.ExportOptions
		want appliance.Kind
		says string
	}{
		{"which disk", appliance.ExportOptions{Point: "web@latest"}, appliance.Invalid, "vda, vdb"},
		{"all addresses", appliance.ExportOptions{Point: "web@latest", Disk: "vda", Listen: ":0"}, appliance.Refused, "--allow-remote"},
		{"IPv4's all addresses", appliance.ExportOptions{Point: "web@latest", Disk: "vda", Listen: "0.0.0.0:0"}, appliance.Refused, "--allow-remote"},
		{"another address", appliance.ExportOptions{Point: "web@latest", Disk: "vda", Listen: "192.0.2.1:0"}, appliance.Refused, "--allow-remote"},
		{"no port", appliance.ExportOptions{Point: "web@latest", Disk: "vda", Listen: "127.0.0.1"}, appliance.Invalid, "HOST:PORT"},
		{"bad port", appliance.ExportOptions{Point: "web@latest", Disk: "vda", Listen: "127.0.0.1:65536"}, appliance.Invalid, "65536"},
		{"port in use", appliance.ExportOptions{Point: "web@latest", Disk: "vda", Listen: taken.Addr().String()}, appliance.Refused, "in use"},
		{"two places", appliance.ExportOptions{Point: "web@latest", Disk: "vda", Listen: "127.0.0.1:0", Unix: "x"}, appliance.Invalid, "both"},
		{"long path", appliance.ExportOptions{Point: "web@latest", Disk: "vda", Unix: "/" + strings.Repeat("x", 107)}, appliance.Invalid, "shorter"},
		{"a file in the way", appliance.ExportOptions{Point: "web@latest", Disk: "vda", Unix: file}, appliance.Refused, file},
		{"no such folder", appliance.ExportOptions{Point: "web@latest", Disk: "vda", Unix: "/nonexistent/x"}, appliance.NotFound, "nonexistent"},
		{"TLS of no kind", appliance.ExportOptions{Point: "web@latest", Disk: "vda", TLS: appliance.TLSOptions{Mode: "maybe"}}, appliance.Invalid, "require"},
		{"TLS without a folder", appliance.ExportOptions{Point: "web@latest", Disk: "vda", TLS: appliance.TLSOptions{Mode: "on"}}, appliance.Invalid, "--tls-certificates"},
		{"TLS off with a folder", appliance.ExportOptions{Point: "web@latest", Disk: "vda", TLS: appliance.TLSOptions{Mode: "off", Folder: "x"}}, appliance.Invalid, "off"},
		{"TLS with a missing folder", appliance.ExportOptions{Point: "web@latest", Disk: "vda", TLS: appliance.TLSOptions{Folder: "/nonexistent"}}, appliance.NotFound, "/nonexistent"},
		{"a name that moves the cursor", appliance.ExportOptions{Point: "web@latest", Disk: "vda", Name: "\x1b[31m"}, appliance.Invalid, "control"},
		{"fewer than no clients", appliance.ExportOptions{Point: "web@latest", Disk: "vda", MaxClients: -1}, appliance.Invalid, "negative"},
		{"TLS with an empty folder", appliance.ExportOptions{Point: "web@latest", Disk: "vda", TLS: appliance.TLSOptions{Folder: t.TempDir()}}, appliance.Failed, "cert.pem"},
		{"named clients without TLS", appliance.ExportOptions{Point: "web@latest", Disk: "vda", Allow: []string{"host7"}}, appliance.Invalid, "--tls-certificates"},
		{"a limit on nothing", appliance.ExportOptions{Point: "web@latest", Disk: "vda", Limit: miB}, appliance.Invalid, "writable"},
		{"a long name to keep", appliance.ExportOptions{Point: "web@latest", Disk: "vda", Writable: true, Name: strings.Repeat("x", 256)}, appliance.Invalid, "--name"},
		{"a long name", appliance.ExportOptions{Point: "web@latest", Disk: "vda", Name: strings.Repeat("x", 4097)}, appliance.Invalid, "4096"},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		err := a.Export(ctx, tt.o, func(appliance.Export) error { return errors.New("it is served") })
		cancel()
		if err == nil || appliance.KindOf(err) != tt.want || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s: got %v, want kind %d and a text with %q", tt.name, err, tt.want, tt.says)
		}
	}
}

// TestExportPassed serves sockets that are open already, unless strangers would
// reach the disk, and closes them in any case.
func TestExportPassed(t *testing.T) {
	t.Parallel()
	a := open(t, newData(t))
	b := backup(t, a, "web", write(t, "vda.raw", noise(chunk, 1)))
	listen := func(address string) net.Listener {
		l, err := net.Listen("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	for _, tt := range []struct {
		name    string
		o       appliance.ExportOptions
		address string
		want    appliance.Kind
		fails   bool
	}{
		{"loopback", appliance.ExportOptions{Point: b.Point}, "127.0.0.1:0", 0, false},
		{"all addresses", appliance.ExportOptions{Point: b.Point}, ":0", appliance.Refused, true},
		{"all addresses, allowed", appliance.ExportOptions{Point: b.Point, AllowRemote: true}, ":0", 0, false},
		{"and an address", appliance.ExportOptions{Point: b.Point, Listen: "127.0.0.1:0"}, "127.0.0.1:0", appliance.Invalid, true},
		{"no such point", appliance.ExportOptions{Point: "db@latest"}, "127.0.0.1:0", appliance.NotFound, true},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		l := listen(tt.address)
		tt.o.Listeners = []net.Listener{l}
		err := a.Export(ctx, tt.o, func(appliance.Export) error { cancel(); return nil })
		cancel()
		if (err != nil) != tt.fails || tt.fails && appliance.KindOf(err) != tt.want {
			t.Errorf("%s: got %v, want failure %v of kind %d", tt.name, err, tt.fails, tt.want)
		}
		if err := l.Close(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("%s: the socket was left open (%v)", tt.name, err)
		}
	}

	ours, theirs := net.Pipe()
	remote := stranger{ours}
	err := a.Export(t.Context(), appliance.ExportOptions{Point: b.Point, Client: remote}, func(appliance.Export) error { return nil })
	if appliance.KindOf(err) != appliance.Refused {
		t.Errorf("a client of another machine: got %v, want a refusal", err)
	}
	if _, err := theirs.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("a client of another machine: got %v, want nothing but the end", err)
	}
}

// stranger is a connection from another machine.
type stranger struct{ net.Conn }

func (stranger) RemoteAddr() net.Addr { return &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 1} }

// TestExportRemote opens all addresses when that is asked for in so many words.
func TestExportRemote(t *testing.T) {
	t.Parallel()
	a := open(t, newData(t))
	b := backup(t, a, "web", write(t, "vda.raw", noise(chunk, 1)))
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	o := appliance.ExportOptions{Point: b.Point, Listen: ":0", AllowRemote: true}
	err := a.Export(ctx, o, func(e appliance.Export) error {
		cancel()
		if !strings.HasPrefix(e.URI, "nbd://localhost:") {
			t.Errorf("got URI %s, want one of localhost", e.URI)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// TestMount reads disks and files of a mount, and what the list shows when points
// come and go.
func TestMount(t *testing.T) {
	t.Parallel()
	data := newData(t)
	a := open(t, data)
	disk := noise(miB, 1)
	first, err := a.BackupImages(t.Context(), appliance.ImageBackup{
		VM: "web", Files: []string{write(t, "vda.raw", disk)}, ConfigFiles: []string{write(t, "vm.xml", []byte("<domain/>"))},
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	backup(t, a, "db", write(t, "vda.raw", noise(chunk, 2)))
	dir := filepath.Join(t.TempDir(), "mnt")
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	err = a.Mount(ctx, dir, appliance.MountOptions{}, func(m appliance.Mount) error {
		defer cancel()
		if m.Dir != dir {
			t.Errorf("mounted at %s, want %s", m.Dir, dir)
		}
		latest := filepath.Join(dir, "web", "latest")
		if got, err := os.ReadFile(filepath.Join(latest, "disks", "vda.raw")); err != nil || !bytes.Equal(got, disk) {
			t.Errorf("the disk differs (%v)", err)
		}
		if got, err := os.ReadFile(filepath.Join(latest, "vm.xml")); err != nil || string(got) != "<domain/>" {
			t.Errorf("vm.xml: got %q, %v, want what was saved", got, err)
		}
		description, err := os.ReadFile(filepath.Join(latest, "point.json"))
		var p appliance.Point
		if err == nil {
			err = json.Unmarshal(description, &p)
		}
		if err != nil || p.ID != first.Point || p.VM != "web" || !p.Time.Equal(first.Time) {
			t.Errorf("point.json: got %+v, %v, want point %s", p, err, first.Point)
		}
		vms, err := os.ReadDir(dir)
		if err != nil || len(vms) != 2 || vms[0].Name() != "db" || vms[1].Name() != "web" {
			t.Errorf("got folders %v, %v, want db and web", vms, err)
		}
		if _, err := a.DeletePoints(ctx, []string{first.Point}); err != nil {
			t.Error(err)
		}
		for began := time.Now(); ; time.Sleep(50 * time.Millisecond) {
			if _, err := os.Stat(filepath.Join(dir, "web")); errors.Is(err, os.ErrNotExist) {
				return nil
			}
			if time.Since(began) > patience/2 {
				t.Errorf("a deleted point is still there")
				return nil
			}
		}
	})
	if err != nil {
		t.Errorf("got %v, want a mount that ends without an error", err)
	}
	if err := appliance.Unmount(t.Context(), data, dir); appliance.KindOf(err) != appliance.NotFound {
		t.Errorf("unmount what is none: got %v, want it not found", err)
	}
}

// TestUnmount ends a mount from outside.
func TestUnmount(t *testing.T) {
	t.Parallel()
	data := newData(t)
	a := open(t, data)
	dir := t.TempDir()
	unmounted := make(chan error, 1)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	err := a.Mount(ctx, dir, appliance.MountOptions{}, func(appliance.Mount) error {
		go func() { unmounted <- appliance.Unmount(ctx, t.TempDir(), dir) }() // of a data folder that nobody has open
		return nil
	})
	if err := errors.Join(err, <-unmounted, ctx.Err()); err != nil {
		t.Error(err)
	}
	full := t.TempDir()
	if err := os.WriteFile(filepath.Join(full, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := a.Mount(ctx, full, appliance.MountOptions{}, nil); appliance.KindOf(err) != appliance.Refused {
		t.Errorf("a folder that is not empty: got %v, want it refused", err)
	}
	if err := a.Mount(ctx, "/nonexistent/mnt", appliance.MountOptions{}, nil); appliance.KindOf(err) != appliance.NotFound {
		t.Errorf("a folder without a parent: got %v, want it not found", err)
	}
}
