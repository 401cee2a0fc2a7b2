package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/appliance"
)

func (p *program) mountCommand() *cobra.Command {
	var o appliance.MountOptions
	var foreground, detached bool
	cmd := &cobra.Command{
		Use:   "mount DIR",
		Short: "Show all restore points as files",
		Long: `Show all restore points as a read-only tree of files at DIR, an empty folder; it is
made if it is missing:

  VM/POINT-TIME/disks/NAME.raw   a whole disk
  VM/POINT-TIME/point.json       what the point is, beside its saved files
  VM/latest                      a link to the newest POINT-TIME

The command returns when the files are there; a process in the background serves
them until unmount, and has the data folder in use. With --foreground the command
itself serves them until it is interrupted (Ctrl-C or SIGTERM) or somebody
unmounts DIR, which is its normal end: exit status 0.`,
		Example: `  holdfast mount ~/points
  holdfast mount /mnt/points --foreground --allow-other
  holdfast unmount ~/points`,
		Args:              arguments("DIR"),
		ValidArgsFunction: completeFolder,
		RunE: func(cmd *cobra.Command, args []string) error {
			if !foreground && !detached {
				return p.mountDetached(cmd.Context())
			}
			return p.openServing(cmd.Context(), func(a *appliance.Appliance, serving func()) error {
				return a.Mount(cmd.Context(), args[0], o, func(m appliance.Mount) error {
					serving()
					if err := p.print(m, "mounted at %s\n", m.Dir); err != nil || !detached {
						return err
					}
					return detach()
				})
			})
		},
	}
	flags := cmd.Flags()
	flags.BoolVar(&foreground, "foreground", false, "serve until interrupted or unmounted")
	flags.BoolVar(&o.AllowOther, "allow-other", false, "let other users in, QEMU's for example")
	flags.BoolVar(&detached, "detached", false, "run as the background process of mount")
	if err := flags.MarkHidden("detached"); err != nil {
		panic(err) // the flag is defined above
	}
	return cmd
}

// ready is what the background process of a mount writes to its standard error,
// as its last byte, when the files are there.
const ready = 0

// mountDetached runs this command line again in the background and waits until the
// files are there or the mount has failed. The other process prints everything.
func (p *program) mountDetached(ctx context.Context) error {
	pipe, stderr, err := os.Pipe()
	if err != nil {
		return err
	}
	defer pipe.Close()
	child := exec.Command("/proc/self/exe", append([]string{"--detached=true"}, p.args...)...)
	child.Args[0] = os.Args[0]
	child.Stdout, child.Stderr = p.stdout, stderr
	child.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // what ends our terminal is not for it
	err = child.Start()
	stderr.Close()
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { _ = child.Process.Signal(syscall.SIGTERM) })()
	said, err := io.ReadAll(pipe) // ends when the child is ready or has ended
	if err != nil {
		return err
	}
	said, mounted := bytes.CutSuffix(said, []byte{ready})
	if _, err := p.console.Write(said); err != nil {
		return err
	}
	if mounted {
		return errors.Join(ctx.Err(), child.Process.Release())
	}
	err = child.Wait()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.Exited() {
		return exitError(exit.ExitCode())
	}
	return fmt.Errorf("the background process of the mount ended too early: %w", cmp.Or(err, io.ErrUnexpectedEOF))
}

// detach tells the process that waits that the files are there, and lets go of what
// it gave to this one.
func detach() error {
	if _, err := os.Stderr.Write([]byte{ready}); err != nil {
		return err
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	for fd := range 3 {
		if err := unix.Dup3(int(null.Fd()), fd, 0); err != nil {
			return err
		}
	}
	return os.Chdir("/") // the folder that it was started in may be needed otherwise
}

func (p *program) unmountCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "unmount DIR",
		Short: "End a mount of restore points",
		Long: `End the mount at DIR, whichever process serves it, and wait until that has let go of
the data folder. While something uses the mount it is tried again for 10 seconds.`,
		Example:           "  holdfast unmount ~/points",
		Args:              arguments("DIR"),
		ValidArgsFunction: completeFolder,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := appliance.Unmount(cmd.Context(), p.data, args[0]); err != nil {
				return err
			}
			r := struct {
				Unmounted string `json:"unmounted"`
			}{args[0]}
			return p.print(r, "unmounted %s\n", args[0])
		},
	}
}

// completeFolder has the shell complete names of folders.
func completeFolder(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	return nil, cobra.ShellCompDirectiveFilterDirs
}
