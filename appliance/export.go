package appliance

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"syscall"
	"time"
	"unicode/utf8"

	"github.com/holdfast-backup/holdfast/blockstore"
	"github.com/holdfast-backup/holdfast/nbdserver"
)

// DefaultListen is the address of an export that is given none: NBD's port, for
// this machine only.
const DefaultListen = "127.0.0.1:10809"

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
// calls ready once clients can connect; an error of ready ends it.
func (a *Appliance) Export(ctx context.Context, o ExportOptions, ready func(Export) error) (err error) {
	p, d, err := a.resolveDisk(o.Point, o.Disk)
	if err != nil {
		return err
	}
	name := cmp.Or(o.Name, fmt.Sprintf("%s/%.8s/%s", p.VM, p.ID, d.Name))
	if len(name) > maxExportName || !utf8.ValidString(name) {
		return invalid("export name %q: want at most %d bytes of UTF-8", name, maxExportName)
	}
	listener, err := listen(ctx, o)
	if err != nil {
		return fmt.Errorf("export %s: %w", name, err)
	}
	defer listener.Close()
	disk, err := a.repo.OpenDisk(p.ID, d.Name, blockstore.DiskOptions{})
	if err != nil {
		return fmt.Errorf("export %s: %w", name, err)
	}
	defer func() { err = errors.Join(err, disk.Close()) }()
	changed := a.newChanges(p, d)
	defer func() { err = errors.Join(err, changed.close()) }()
	server := nbdserver.New(nbdserver.Options{Log: a.log})
	err = server.Add(nbdserver.Export{
		Name: name, Disk: disk, BlockSize: a.repo.ChunkSize(), Contexts: changed,
		Description: fmt.Sprintf("disk %s of %s, point %s of %s", d.Name, p.VM, p.ID, p.Time.Format(time.RFC3339Nano)),
	})
	if err != nil {
		return fmt.Errorf("export %s: %w", name, err)
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	served := make(chan error, 1)
	go func() { served <- server.Serve(ctx, listener) }()
	err = ready(Export{
		Name: name, URI: nbdserver.URI(listener.Addr(), name), ReadOnly: true, Size: disk.Size(),
		Point: string(p.ID), Disk: d.Name,
	})
	if err != nil {
		stop()
	}
	if err := errors.Join(err, <-served); err != nil {
		return fmt.Errorf("export %s: %w", name, err)
	}
	return nil
}

// listen opens the socket that the options ask for.
func listen(ctx context.Context, o ExportOptions) (net.Listener, error) {
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
	if !ip.IsLoopback() && !o.AllowRemote {
		return nil, refused("address %s can be reached from other machines, which could read the disk without encryption or password; "+
			"listen on 127.0.0.1, or say --allow-remote", o.Listen)
	}
	return nbdserver.Listen("tcp", net.JoinHostPort(host, port))
}
