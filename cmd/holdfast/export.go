package main

import (
	"fmt"
	"os"
	"runtime"
	"strings"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/appliance"
	"github.com/holdfast-backup/holdfast/systemd"
)

// servingProcs is how many goroutines may run, or be in a quick system call, at the same time
// while disks are served, at least. Measured with 1 ms a read, 4 clients of 16 requests, on
// 2 processors: 0.75 of nbdkit's rate with 2, 1.09 with 8, 1.19 with 32.
const servingProcs = 8

func (p *program) exportCommand() *cobra.Command {
	return noun(&cobra.Command{
		Use:   "export",
		Short: "Serve disks of restore points as block devices over NBD",
		Example: `  holdfast export add web@latest
  holdfast export add web@latest --writable --name try
  holdfast export commit try`,
	}, p.exportAddCommand(), p.exportListCommand(), p.exportCommitCommand(), p.exportRemoveCommand())
}

func (p *program) exportAddCommand() *cobra.Command {
	var o appliance.ExportOptions
	var limit sizeFlag
	var single bool
	cmd := &cobra.Command{
		Use:   "add POINT",
		Short: "Serve a disk of a restore point",
		Long: `Serve a disk of a restore point and print the NBD URI by which nbdinfo, nbdcopy,
qemu-img and QEMU reach it. It is printed when clients can connect.

The disk is served until the command is interrupted (Ctrl-C or SIGTERM), which is
its normal end: exit status 0. The data folder is in use until then.

With --writable clients can write. The restore point stays as it is: what they
write is kept beside it, under the export's name. With --name the same command goes
on with it later, also after a crash, and also when web@latest is a newer point by
then. Every write that a client flushed is there. "export commit" makes a restore
point of it, "export remove" discards it.

By default it listens on ` + appliance.DefaultListen + `, or another free port of 127.0.0.1 if that
is taken, or on the sockets that systemd passes; of those nothing is printed. Without TLS there is neither encryption
nor a password: addresses that other machines reach need --allow-remote, and the
socket of --unix is for those who may write to it.

--tls-certificates names a folder as QEMU, nbdkit and libvirt keep it. Clients must
then encrypt, and show a certificate that ca-cert.pem there vouches for.

A client sees how the disk differs from an earlier point of the VM, by its id, in
the metadata context holdfast:changed:ID.`,
		Example: `  holdfast export add web@latest
  holdfast export add 1f00aa27 --disk vda --unix /run/web.sock --json
  holdfast export add web@latest --writable --name try --limit 20GiB
  qemu-img convert -O qcow2 nbd://127.0.0.1:10809/web/1f00aa27/vda web.qcow2
  holdfast export add web@latest --listen :10809 --tls-certificates /etc/holdfast/tls --allow host7
  nbdinfo --map=holdfast:changed:0c77ab90 nbd://127.0.0.1:10809/web/1f00aa27/vda`,
		Args:              arguments("POINT"),
		ValidArgsFunction: cobra.NoFileCompletions,
		PreRunE:           func(*cobra.Command, []string) error { return passedSockets(&o, single) },
		RunE: func(cmd *cobra.Command, args []string) error {
			o.Point, o.Limit = args[0], int64(limit)
			if limit == 0 && cmd.Flags().Changed("limit") {
				o.Limit = appliance.NoLimit
			}
			return p.openServing(cmd.Context(), func(a *appliance.Appliance, serving func()) error {
				// A goroutine in a system call keeps its place until the runtime notices, which
				// takes longer than a quick disk; with few places requests would wait for that.
				runtime.GOMAXPROCS(max(runtime.GOMAXPROCS(0), servingProcs))
				return a.Export(cmd.Context(), o, func(e appliance.Export) error {
					serving()
					if o.Client != nil || len(o.Listeners) > 0 {
						return nil // standard output is the client, or its user's
					}
					how := "read-only"
					if !e.ReadOnly {
						how = "writable"
					}
					return p.print(e, "serving disk %s of point %.12s, %s, %s at\n%s\n", e.Disk, e.Point, size(e.Size), how, e.URI)
				})
			})
		},
	}
	cmd.Flags().Var(&limit, "limit", "how much clients may write, on disk, then they get \"no space left\"; 0 is no limit (default as it was, at first no limit)")
	cmd.Flags().BoolVar(&single, "single", false, "serve the one client that standard input is connected to, as inetd has it")
	exportFlags(cmd, &o)
	return cmd
}

// exportFlags adds the flags that say what is served, where and to whom.
func exportFlags(cmd *cobra.Command, o *appliance.ExportOptions) {
	flags := cmd.Flags()
	flags.StringVar(&o.Disk, "disk", "", "`name` of the disk, if the point has several")
	flags.StringVar(&o.Name, "name", "", "`name` that clients ask for (default VM/POINT/DISK)")
	flags.StringVar(&o.Listen, "listen", "", fmt.Sprintf("`address` to listen on, HOST:PORT; port 0 is any that is free (default %s)", appliance.DefaultListen))
	flags.StringVar(&o.Unix, "unix", "", "listen on a unix socket at this `path` instead")
	flags.BoolVar(&o.AllowRemote, "allow-remote", false, "let --listen open an address that other machines reach, without encryption or password")
	flags.BoolVar(&o.Writable, "writable", false, "let clients write; the restore point stays as it is")
	flags.IntVar(&o.MaxClients, "max-clients", 0, "how many clients may be connected at once (default 1024)")
	flags.DurationVar(&o.IdleTimeout, "idle-timeout", 0, "disconnect a client that asks nothing for so long, such as 10m (default never)")
	flags.StringVar(&o.TLS.Mode, "tls", "", "encryption: "+strings.Join(appliance.TLSModes, ", ")+" (default require with --tls-certificates)")
	flags.StringVar(&o.TLS.Folder, "tls-certificates", "", "`folder` with ca-cert.pem, server-cert.pem and server-key.pem")
	flags.BoolVar(&o.TLS.Anonymous, "tls-anonymous", false, "admit clients that show no certificate")
	flags.StringArrayVar(&o.Allow, "allow", nil, "admit only certificates with this `identity`: common name, DNS name or sha256:FINGERPRINT; may be repeated")
	cmd.MarkFlagsMutuallyExclusive("listen", "unix", "single")
	choices(cmd, "tls", appliance.TLSModes)
}

// passedSockets takes the sockets that whoever started this process passed it.
func passedSockets(o *appliance.ExportOptions, single bool) error {
	var err error
	if single {
		o.Client, err = systemd.Conn(os.Stdin)
	} else {
		o.Listeners, err = systemd.Listeners()
	}
	return err
}

func (p *program) exportListCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List what is kept of writable exports",
		Example: `  holdfast export list
  holdfast export list --json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return p.open(cmd.Context(), func(a *appliance.Appliance) error {
				exports, err := a.WritableExports()
				if err != nil {
					return err
				}
				t := newTable("NAME", "VM", "POINT", "DISK", "SIZE", "WRITTEN", "LIMIT")
				for _, e := range exports {
					limit := "none"
					if e.Limit > 0 {
						limit = size(e.Limit)
					}
					t.row(e.Name, e.VM, fmt.Sprintf("%.12s", e.Point), e.Disk, size(e.Size), size(e.Written), limit)
				}
				return p.print(exports, "%s", t)
			})
		},
	}
}

func (p *program) exportCommitCommand() *cobra.Command {
	var vm string
	cmd := &cobra.Command{
		Use:   "commit NAME",
		Short: "Make a restore point of a writable export",
		Long: `Make a restore point of a writable export, as its clients left the disk. The other
disks of the export's point are part of it too. End the export first.

It reads and stores what was written, no more. What was written stays with the
export until "export remove" discards it.`,
		Example: `  holdfast export commit try
  holdfast export commit try --vm web-repaired --json`,
		Args:              arguments("NAME"),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			return p.open(cmd.Context(), func(a *appliance.Appliance) error {
				r, err := a.CommitExport(cmd.Context(), args[0], vm, p.progress())
				if err != nil {
					return err
				}
				return p.printBackup(r)
			})
		},
	}
	cmd.Flags().StringVar(&vm, "vm", "", "`name` of the VM that the new point belongs to (default that of the export's point)")
	return cmd
}

func (p *program) exportRemoveCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "remove NAME",
		Short:             "Discard what was written to a writable export",
		Example:           "  holdfast export remove try",
		Args:              arguments("NAME"),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			return p.open(cmd.Context(), func(a *appliance.Appliance) error {
				if err := a.RemoveExport(args[0]); err != nil {
					return err
				}
				return p.print(struct {
					Name string `json:"name"`
				}{args[0]}, "removed what was written to export %s\n", args[0])
			})
		},
	}
}
