package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/appliance"
)

func (p *program) exportCommand() *cobra.Command {
	return noun(&cobra.Command{
		Use:     "export",
		Short:   "Serve disks of restore points as block devices over NBD",
		Example: "  holdfast export add web@latest",
	}, p.exportAddCommand())
}

func (p *program) exportAddCommand() *cobra.Command {
	var o appliance.ExportOptions
	cmd := &cobra.Command{
		Use:   "add POINT",
		Short: "Serve a disk of a restore point, read-only",
		Long: `Serve a disk of a restore point, read-only, and print the NBD URI by which nbdinfo,
nbdcopy, qemu-img and QEMU reach it. It is printed when clients can connect.

The disk is served until the command is interrupted (Ctrl-C or SIGTERM), which is
its normal end: exit status 0. The data folder is in use until then.

By default it listens on ` + appliance.DefaultListen + `, or another free port of 127.0.0.1 if that
is taken. There is neither encryption nor a password: addresses that other machines
reach need --allow-remote, and the socket of --unix is for those who may write to it.`,
		Example: `  holdfast export add web@latest
  holdfast export add 1f00aa27 --disk vda --unix /run/web.sock --json
  qemu-img convert -O qcow2 nbd://127.0.0.1:10809/web/1f00aa27/vda web.qcow2`,
		Args:              arguments("POINT"),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			o.Point = args[0]
			return p.open(cmd.Context(), func(a *appliance.Appliance) error {
				return a.Export(cmd.Context(), o, func(e appliance.Export) error {
					return p.print(e, "serving disk %s of point %.12s, %s, read-only at\n%s\n", e.Disk, e.Point, size(e.Size), e.URI)
				})
			})
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&o.Disk, "disk", "", "`name` of the disk, if the point has several")
	flags.StringVar(&o.Name, "name", "", "`name` that clients ask for (default VM/POINT/DISK)")
	flags.StringVar(&o.Listen, "listen", "", fmt.Sprintf("`address` to listen on, HOST:PORT; port 0 is any that is free (default %s)", appliance.DefaultListen))
	flags.StringVar(&o.Unix, "unix", "", "listen on a unix socket at this `path` instead")
	flags.BoolVar(&o.AllowRemote, "allow-remote", false, "let --listen open an address that other machines reach, without encryption or password")
	cmd.MarkFlagsMutuallyExclusive("listen", "unix")
	return cmd
}
