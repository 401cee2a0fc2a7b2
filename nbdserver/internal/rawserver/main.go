// Command rawserver serves a raw file over NBD with package nbdserver, for
// benchmarks beside other servers: with -delay as a disk whose every read takes a
// while.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/raw"
	"github.com/holdfast-backup/holdfast/nbdserver"
)

func main() { os.Exit(run()) } //nolint:forbidigo // the one place that decides the exit status

// run does what the command line asks and returns the exit status.
func run() int {
	delay := flag.Duration("delay", 0, "how long each read takes longer")
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "usage: rawserver [-delay DURATION] SOCKET FILE")
		flag.PrintDefaults()
	}
	flag.Parse()
	if flag.NArg() != 2 {
		flag.Usage()
		return 2
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := serve(ctx, flag.Arg(0), flag.Arg(1), *delay); err != nil {
		fmt.Fprintln(os.Stderr, "rawserver:", err)
		return 1
	}
	return 0
}

// serve answers clients of a unix socket until ctx is done.
func serve(ctx context.Context, socket, file string, delay time.Duration) (err error) {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	im, err := raw.Open(f, image.OpenOptions{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, im.Close()) }()
	var disk image.Disk = im
	if delay > 0 {
		disk = slowDisk{im, delay}
	}
	runtime.GOMAXPROCS(max(runtime.GOMAXPROCS(0), 8)) // as holdfast does
	s := nbdserver.New(nbdserver.Options{})
	if err := s.Add(nbdserver.Export{Name: "disk", Disk: disk}); err != nil {
		return err
	}
	l, err := nbdserver.Listen("unix", socket)
	if err != nil {
		return err
	}
	return s.Serve(ctx, l)
}

// slowDisk is a disk whose reads take a while longer.
type slowDisk struct {
	image.Disk
	delay time.Duration
}

// ReadAt implements [image.Disk]. It waits in a system call, as a read of a slow
// disk does, and as nbdkit's filter for it; the runtime's timers are coarser.
func (d slowDisk) ReadAt(p []byte, off int64) (int, error) {
	wait := unix.NsecToTimespec(d.delay.Nanoseconds())
	for errors.Is(unix.Nanosleep(&wait, &wait), unix.EINTR) {
		continue
	}
	return d.Disk.ReadAt(p, off)
}
