// Command holdfast-guard makes files of a repository immutable for a time, with
// the file system's immutable attribute: until then nobody can change, rename or remove
// them, root neither, but by taking the attribute off first. It is the one part of
// Holdfast that needs privileges, and small so that it can be read in one sitting.
//
// It runs as root beside an appliance that does not, and does what package guard
// describes. What it has promised it keeps in a folder of its own: whoever has taken over
// the appliance can have more files protected and none released early.
//
// Files: main.go is the command line, server.go speaks with clients, keeper.go knows what is
// protected until when, folder.go opens files and sets the attribute.
//
// # Capabilities
//
//   - CAP_LINUX_IMMUTABLE and CAP_FOWNER: to set the attribute on another user's files.
//   - CAP_DAC_READ_SEARCH: to open them.
//   - CAP_LEASE: to find out whether somebody has them open for writing.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/durable"
	"github.com/holdfast-backup/holdfast/internal/guard"
	"github.com/holdfast-backup/holdfast/internal/steady"
	"github.com/holdfast-backup/holdfast/systemd"
)

const usage = `holdfast-guard makes files of a Holdfast repository immutable for a time.

  holdfast-guard serve [--data DIR] [--state DIR] [--socket PATH]
      runs as root beside the appliance and does what it asks: protects the files of
      locked points, and releases none before its time is over
  holdfast-guard status [--socket PATH] [FILE…]
      tells how many files are protected, and until when those named are, such as
      points/1f00aa27c6b2d5a0b8d3c2f1e4a59687.point

`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
	case errors.Is(err, errUsage):
		fmt.Fprintf(os.Stderr, "holdfast-guard: %v; see: holdfast-guard --help\n", err)
		os.Exit(2)
	case err != nil:
		fmt.Fprintf(os.Stderr, "holdfast-guard: %v\n", err)
		os.Exit(1)
	}
}

var errUsage = errors.New("wrong usage")

// run is the whole program.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	f := flag.NewFlagSet("holdfast-guard", flag.ContinueOnError)
	f.SetOutput(io.Discard)
	data := f.String("data", "/var/lib/holdfast", "the repository's data `folder`")
	state := f.String("state", "/var/lib/holdfast-guard", "the `folder` in which the guard keeps what it has promised")
	socket := f.String("socket", guard.DefaultSocket, "the `path` of its socket; systemd may pass one instead")
	help := func() error {
		fmt.Fprint(stdout, usage)
		f.SetOutput(stdout)
		f.PrintDefaults()
		return flag.ErrHelp
	}
	if len(args) == 0 {
		return fmt.Errorf("%w: want serve or status", errUsage)
	}
	if err := f.Parse(args[1:]); errors.Is(err, flag.ErrHelp) || args[0] == "--help" || args[0] == "-h" || args[0] == "help" {
		return help()
	} else if err != nil {
		return fmt.Errorf("%w: %w", errUsage, err)
	}
	switch {
	case args[0] == "status":
		return status(ctx, guard.Client{Socket: *socket}, f.Args(), stdout)
	case args[0] != "serve" || f.NArg() > 0:
		return fmt.Errorf("%w: want serve without arguments, or status", errUsage)
	}
	return serve(ctx, *data, *state, *socket, slog.New(slog.NewTextHandler(stderr, nil)))
}

// status prints what the guard knows.
func status(ctx context.Context, c guard.Client, files []string, w io.Writer) error {
	reply, err := c.Status(ctx, files...)
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "%d files are protected; the guard's clock says %s\n", reply.Protected, reply.Time.Format(time.RFC3339))
	for _, file := range reply.Files {
		until := "not protected"
		if !file.Until.IsZero() {
			until = "until " + file.Until.Format(time.RFC3339)
		}
		fmt.Fprintf(w, "%s\t%s\timmutable %v\n", file.Name, until, file.Immutable)
	}
	return nil
}

// serve answers clients until the context ends.
func serve(ctx context.Context, data, state, socket string, log *slog.Logger) (err error) {
	passed, err := systemd.Listeners()
	if err != nil {
		return err
	}
	unlock, err := lockState(state)
	if err != nil {
		return fmt.Errorf("state folder: %w", err)
	}
	defer unlock()
	folder, err := openFolder(data)
	if err != nil {
		return fmt.Errorf("data folder: %w", err)
	}
	defer folder.close()
	k, err := openKeeper(durable.OS(), filepath.Join(state, stateName), folder, steady.System(), log)
	if err != nil {
		return err
	}
	l, err := listen(passed, socket)
	if err != nil {
		return err
	}
	log.InfoContext(ctx, "serving", slog.String("data", data), slog.String("socket", l.Addr().String()))
	s := &server{keeper: k, folder: folder, log: log}
	return errors.Join(s.serve(ctx, l), k.save())
}

// lockState makes the state folder if need be, and makes sure that it is root's alone and
// that no other guard uses it.
func lockState(dir string) (unlock func(), err error) {
	if err := durable.MkdirAll(durable.OS(), dir); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	err = unix.Fstat(int(f.Fd()), &st)
	switch {
	case err != nil:
	case int(st.Uid) != os.Geteuid() || st.Mode&0o077 != 0:
		err = fmt.Errorf("%s must belong to user %d and be open to nobody else: chmod 700", dir, os.Geteuid())
	default:
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
			err = fmt.Errorf("%s is in use by another guard", dir)
		}
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return func() { f.Close() }, nil
}

// listen returns the socket that systemd passed, or one at path. Everybody may connect;
// the server looks at who does.
func listen(passed []net.Listener, path string) (net.Listener, error) {
	if len(passed) > 1 {
		return nil, fmt.Errorf("socket activation: got %d sockets, want one", len(passed))
	}
	if len(passed) == 1 {
		return passed[0], nil
	}
	// What a guard left that was killed: the lock on the state says that none runs.
	if info, err := os.Lstat(path); err == nil && info.Mode().Type() == fs.ModeSocket {
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o666); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}
