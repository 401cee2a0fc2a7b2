package main

import (
	"strings"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/appliance"
)

func (p *program) backupCommand() *cobra.Command {
	return noun(&cobra.Command{
		Use:     "backup",
		Short:   "Make a restore point",
		Example: "  holdfast backup image web.qcow2 --vm web",
	}, p.backupImageCommand())
}

func (p *program) backupImageCommand() *cobra.Command {
	var b appliance.ImageBackup
	cmd := &cobra.Command{
		Use:   "image FILE…",
		Short: "Back up disk image files as one restore point",
		Long: `Back up disk image files; several make one restore point with several disks.

Only what the VM's last point does not have is stored. Nobody should write to the
files meanwhile: stop the VM, or name the files of a snapshot.

A disk has the name of its file without the extension, unless --disk names it; a single
FILE of the same size as the single disk in the VM's last point keeps that name. A disk
is compared with that of its name in the last point.

A FILE may also be the URI of an NBD export: nbd://HOST:PORT/NAME, nbds://… with
?tls-certificates=FOLDER, nbd+unix:///NAME?socket=PATH. It is read as raw.`,
		Example: `  holdfast backup image /var/lib/libvirt/images/web.qcow2 --vm web
  holdfast backup image system.vmdk data.vmdk --vm db --disk sda --disk sdb
  holdfast backup image web.img --vm web --format raw --config web.xml --json
  holdfast backup image web.img --vm web --lock 30d
  holdfast backup image 'nbd+unix:///vda?socket=/run/backup.sock' --vm web`,
		Args: arguments("FILE…"),
		RunE: func(cmd *cobra.Command, args []string) error {
			b.Files = args
			return p.open(cmd.Context(), func(a *appliance.Appliance) error {
				r, err := a.BackupImages(cmd.Context(), b, p.progress())
				if err != nil {
					return err
				}
				return p.printBackup(r)
			})
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&b.VM, "vm", "", "`name` of the VM that the disks belong to (required)")
	flags.StringArrayVar(&b.Disks, "disk", nil, "`name` of the disk; one for each FILE, in their order")
	flags.StringVar(&b.Format, "format", "auto", "`format` of the files: "+strings.Join(appliance.ReadFormats, ", "))
	flags.StringArrayVar(&b.ConfigFiles, "config", nil, "`file` to save with the point, such as the VM's XML; may be repeated")
	flags.Var((*durationFlag)(&b.Lock), "lock", "keep the point from being deleted for this `time`, such as 30d: see point lock")
	flags.BoolVar(&b.AllowOutside, "allow-outside", false, "let images refer to files (backing files, extents) outside their own folder")
	required(cmd, "vm")
	choices(cmd, "format", appliance.ReadFormats)
	return cmd
}

// printBackup prints what a backup of any source took.
func (p *program) printBackup(r appliance.BackupResult) error {
	p.console.clear()
	t := newTable("DISK", "SIZE", "MODE", "READ", "CHANGED", "NEW", "STORED")
	for _, d := range r.Disks {
		t.row(d.Name, size(d.Size), string(d.Mode), size(d.Read), size(d.Changed), size(d.New), size(d.Stored))
	}
	locked := ""
	if !r.LockedUntil.IsZero() {
		locked = ", locked until " + stamp(r.LockedUntil)
	}
	return p.print(r, "point %s of %s, %s%s\n%s", r.Point, r.VM, stamp(r.Time), locked, t)
}
