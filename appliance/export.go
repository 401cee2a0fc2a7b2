package appliance

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/blockstore"
	"github.com/holdfast-backup/holdfast/nbdserver"
	"github.com/holdfast-backup/holdfast/nbdserver/overlay"
)

// DefaultListen is the address of an export that is given none: NBD's port, for
// this machine only.
const DefaultListen = "127.0.0.1:10809"

// NoLimit lifts the limit of a writable export.
const NoLimit = overlay.NoLimit

const (
	maxExportName = 4096 // bytes, NBD's limit
	maxSocketPath = 107  // bytes, the kernel's limit without the NUL at the end
)

// ExportOptions say what is exported and where.
type ExportOptions struct {
	Point string // see ResolvePoint
	Disk  string // "" if the point has only one
	// Name is what clients ask for; "" is VM/ID/DISK with the first 8 digits of the
	// point's id.
	Name string
	// Listen is a TCP address, or Unix the path of a socket. Without either it is
	// DefaultListen or, if that is in use, another free port.
	Listen, Unix string
	// AllowRemote permits an address that other machines reach: they can read
	// the disk without encryption or password.
	AllowRemote bool
	// Writable lets clients write. What they write is kept beside the point, which
	// stays as it is.
	Writable bool
	// Limit bounds what clients write to a writable export, in bytes on disk. 0 is what
	// it was when the export was made or last changed, at first no limit; NoLimit takes it away.
	Limit int64
	// TLS encrypts the connections.
	TLS TLSOptions
	// Allow, if not empty, names who may use the export, by identities of their
	// certificates: see [nbdserver.Identities].
	Allow []string
	// Listeners, if any, are the sockets to serve, open already, instead of Listen and Unix;
	// Export closes them. Client, if set, is the one client to serve, connected already.
	Listeners []net.Listener
	Client    net.Conn
	// MaxClients is how many may be connected at once; 0 is nbdserver's default.
	MaxClients int
	// IdleTimeout disconnects a client that asks nothing for so long; 0 is never.
	IdleTimeout time.Duration
}

// TLSModes are what an export may demand of its clients: no encryption, encryption
// if they like, encryption.
var TLSModes = []string{"off", "on", "require"}

// TLSOptions say how connections are encrypted.
type TLSOptions struct {
	// Mode is one of TLSModes; "" is require if there is a Folder, else off.
	Mode string
	// Folder holds ca-cert.pem, server-cert.pem and server-key.pem.
	Folder string
	// Anonymous admits clients without a certificate.
	Anonymous bool
}

// load reads the certificates; nil without TLS.
func (o TLSOptions) load(log *slog.Logger) (*nbdserver.TLS, error) {
	if o.mode() == "off" {
		return nil, nil
	}
	return nbdserver.LoadTLS(o.Folder, nbdserver.TLSOptions{Required: o.mode() == "require", ClientCertificates: !o.Anonymous, Log: log})
}

func (o TLSOptions) mode() string {
	switch {
	case o.Mode != "":
		return o.Mode
	case o.Folder != "":
		return "require"
	}
	return "off"
}

// protects reports whether nobody without a certificate gets at a disk.
func (o TLSOptions) protects() bool { return o.mode() == "require" && !o.Anonymous }

// check holds the options to what can be done.
func (o TLSOptions) check() error {
	switch {
	case !slices.Contains(TLSModes, o.mode()):
		return invalid("TLS mode %q: want one of %s", o.Mode, strings.Join(TLSModes, ", "))
	case o.mode() != "off" && o.Folder == "":
		return invalid("TLS needs a folder with certificates; name it with --tls-certificates")
	case o.mode() == "off" && (o.Folder != "" || o.Anonymous):
		return invalid("TLS is off, but certificates are named or clients without one admitted; want --tls on or require")
	case o.mode() == "off":
		return nil
	}
	if _, err := os.Stat(o.Folder); err != nil {
		return fmt.Errorf("TLS certificates: %w", err)
	}
	return nil
}

// Export is a disk that is being served.
type Export struct {
	Name     string `json:"name"`
	URI      string `json:"uri"`
	ReadOnly bool   `json:"read_only"`
	Size     int64  `json:"size_bytes"`
	Point    string `json:"point"`
	Disk     string `json:"disk"`
}

// Export serves a disk of a point over NBD until ctx ends, which is no error. It
// calls ready once clients can connect; an error of ready ends it. What clients write to a
// writable export is kept under its name: the next Export of that name goes on with it.
func (a *Appliance) Export(ctx context.Context, o ExportOptions, ready func(Export) error) (err error) {
	defer o.closePassed()
	if err := o.check(); err != nil {
		return err
	}
	p, d, err := a.resolveDisk(o.Point, o.Disk)
	if err != nil {
		return err
	}
	o.Name = cmp.Or(o.Name, fmt.Sprintf("%s/%.8s/%s", p.VM, p.ID, d.Name))
	if p, d, err = a.goOn(ctx, o, p, d); err != nil {
		return err
	}
	encryption, err := o.TLS.load(a.log)
	if err != nil {
		return fmt.Errorf("export %s: %w", o.Name, err)
	}
	listeners, err := listen(ctx, o)
	if err != nil {
		return fmt.Errorf("export %s: %w", o.Name, err)
	}
	defer closeAll(listeners)
	export, closeDisk, err := a.exported(o, p, d)
	if err != nil {
		return fmt.Errorf("export %s: %w", o.Name, err)
	}
	defer func() {
		if errors.Is(err, nbdserver.ErrBusy) { // a request may still come back from the disk
			a.busy.Store(true)
			return
		}
		err = errors.Join(err, closeDisk())
	}()
	server := nbdserver.New(nbdserver.Options{Log: a.log, TLS: encryption, MaxConnections: o.MaxClients, IdleTimeout: o.IdleTimeout})
	if err := server.Add(export); err != nil {
		return fmt.Errorf("export %s: %w", o.Name, err)
	}
	served := Export{Name: o.Name, ReadOnly: !o.Writable, Size: export.Disk.Size(), Point: string(p.ID), Disk: d.Name}
	if len(listeners) > 0 {
		served.URI = server.URI(listeners[0].Addr(), o.Name)
	}
	if err := serve(ctx, server, listeners, o.Client, func() error { return ready(served) }); err != nil {
		return fmt.Errorf("export %s: %w", o.Name, err)
	}
	return nil
}

// closePassed closes the sockets that the caller gave.
func (o ExportOptions) closePassed() {
	closeAll(o.Listeners)
	if o.Client != nil {
		o.Client.Close()
	}
}

func closeAll(listeners []net.Listener) {
	for _, l := range listeners {
		l.Close()
	}
}

// serve serves the listeners until ctx ends, or else the one client until it leaves. An error of ready, or of
// a listener, ends it.
func serve(ctx context.Context, server *nbdserver.Server, listeners []net.Listener, client net.Conn, ready func() error) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	work := []func() error{ready}
	for _, l := range listeners {
		work = append(work, func() error { return server.Serve(ctx, l) })
	}
	if client != nil {
		work = append(work, func() error { return server.ServeConn(ctx, client) })
	}
	ended := make(chan error)
	for _, f := range work {
		go func() { ended <- f() }()
	}
	var err error // every one: nbdserver.ErrBusy must not be lost among others
	for range work {
		if e := <-ended; e != nil {
			err = errors.Join(err, e)
			stop()
		}
	}
	return err
}

// check holds the options to what can be done.
func (o ExportOptions) check() error {
	switch {
	case len(o.Name) > maxExportName || !printable(o.Name):
		return invalid("export name %q: want at most %d bytes of UTF-8 without control characters", o.Name, maxExportName)
	case o.Limit < NoLimit || o.Limit != 0 && !o.Writable:
		return invalid("a limit of %d bytes: it is for what clients may write to a writable export", o.Limit)
	case o.MaxClients < 0 || o.IdleTimeout < 0:
		return invalid("at most %d clients, idle for %v: want numbers that are not negative", o.MaxClients, o.IdleTimeout)
	case len(o.Listeners) > 0 && (o.Listen != "" || o.Unix != ""):
		return invalid("whoever started this process passed it sockets, and an address is named; choose one")
	case len(o.Allow) > 0 && o.TLS.mode() == "off":
		return invalid("who may use the export is told by certificates; want --tls-certificates")
	}
	return o.TLS.check()
}

// exported opens a disk of a point as the options want it served. end closes it, after the last
// client is gone.
func (a *Appliance) exported(o ExportOptions, p blockstore.Point, d blockstore.PointDisk) (_ nbdserver.Export, end func() error, err error) {
	var opened closers
	defer func() {
		if err != nil {
			err = errors.Join(err, opened.close())
		}
	}()
	disk, err := a.repo.OpenDisk(p.ID, d.Name, blockstore.DiskOptions{})
	if err != nil {
		return nbdserver.Export{}, nil, err
	}
	changed := a.newChanges(p, d)
	opened = closers{disk.Close, changed.close}
	export := nbdserver.Export{
		Name: o.Name, Disk: disk, BlockSize: a.repo.ChunkSize(), Contexts: changed, Allow: o.Allow, Rotational: rotational(a.dir),
		Description: fmt.Sprintf("disk %s of %s, point %s of %s", d.Name, p.VM, p.ID, p.Time.Format(time.RFC3339Nano)),
	}
	if o.Writable {
		release, err := a.hold(o.Name)
		if err != nil {
			return nbdserver.Export{}, nil, err
		}
		opened = append(opened, func() error { release(); return nil })
		written, err := a.openOverlay(overlayMeta{o.Name, p.ID, d.Name}, disk, o.Limit)
		if err != nil {
			return nbdserver.Export{}, nil, err
		}
		opened = append(opened, func() error { return a.closeOverlay(o.Name, written) })
		export.Disk, changed.written = written, written.Changed
	}
	return export, opened.close, nil
}

// closers are what must be called when something ends, the last first.
type closers []func() error

func (c closers) close() error {
	var err error
	for _, f := range slices.Backward(c) {
		err = errors.Join(err, f())
	}
	return err
}

// rotational reports whether a folder lies on a disk where seeks cost; false where the system
// does not tell.
func rotational(folder string) bool {
	var st unix.Stat_t
	if unix.Stat(folder, &st) != nil {
		return false
	}
	device := fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))
	// A disk's, or that of a partition's disk: the path is a symbolic link, which ".." follows.
	for _, queue := range []string{"/queue", "/../queue"} {
		if told, err := os.ReadFile(device + queue + "/rotational"); err == nil {
			return strings.TrimSpace(string(told)) == "1"
		}
	}
	return false
}

// listen returns the sockets that the options ask for; none if there is one client
// to serve.
func listen(ctx context.Context, o ExportOptions) ([]net.Listener, error) {
	var passed []net.Addr
	if o.Client != nil {
		passed = append(passed, o.Client.LocalAddr(), o.Client.RemoteAddr())
	}
	for _, l := range o.Listeners {
		passed = append(passed, l.Addr())
	}
	for _, addr := range passed {
		if t, ok := addr.(*net.TCPAddr); ok {
			if err := o.mayServe(t.IP, t.String()); err != nil {
				return nil, err
			}
		}
	}
	if o.Client != nil {
		return nil, nil
	}
	if len(o.Listeners) > 0 {
		return o.Listeners, nil
	}
	l, err := open(ctx, o)
	if err != nil {
		return nil, err
	}
	return []net.Listener{l}, nil
}

// open opens the socket that the options ask for.
func open(ctx context.Context, o ExportOptions) (net.Listener, error) {
	switch {
	case o.Listen != "" && o.Unix != "":
		return nil, invalid("both a TCP address and a unix socket are given; choose one")
	case o.Unix != "":
		path, err := filepath.Abs(o.Unix)
		if err != nil {
			return nil, err
		}
		if len(path) > maxSocketPath {
			return nil, invalid("socket path %s has %d bytes, the system takes %d; choose a shorter one", path, len(path), maxSocketPath)
		}
		return nbdserver.Listen("unix", path)
	case o.Listen == "":
		l, err := nbdserver.Listen("tcp", DefaultListen)
		if errors.Is(err, syscall.EADDRINUSE) {
			return nbdserver.Listen("tcp", "127.0.0.1:0")
		}
		return l, err
	}
	return listenTCP(ctx, o)
}

// listenTCP opens a TCP socket, at an address that only this machine reaches
// unless the options say otherwise.
func listenTCP(ctx context.Context, o ExportOptions) (net.Listener, error) {
	host, port, err := net.SplitHostPort(o.Listen)
	if err != nil {
		return nil, invalid("address %s: %v; want HOST:PORT such as %s", o.Listen, err, DefaultListen)
	}
	if _, err := net.DefaultResolver.LookupPort(ctx, "tcp", port); err != nil {
		return nil, invalid("address %s: %q is no port; want HOST:PORT such as %s", o.Listen, port, DefaultListen)
	}
	ip := net.IPv6unspecified
	if host != "" {
		ips, err := net.DefaultResolver.LookupIPAddr(ctx, host)
		if err != nil {
			return nil, fmt.Errorf("address %s: %w", o.Listen, err)
		}
		ip = ips[0].IP
		host = ips[0].String() // what was looked at is what is opened
	}
	if err := o.mayServe(ip, o.Listen); err != nil {
		return nil, err
	}
	return nbdserver.Listen("tcp", net.JoinHostPort(host, port))
}

// mayServe refuses an address at which strangers would get at the disk.
func (o ExportOptions) mayServe(ip net.IP, address string) error {
	if ip.IsLoopback() || o.AllowRemote || o.TLS.protects() {
		return nil
	}
	return refused("address %s can be reached from other machines, which could read the disk without a password; listen on 127.0.0.1, "+
		"demand certificates with --tls-certificates, or say --allow-remote", address)
}
