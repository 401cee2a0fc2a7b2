package main

import (
	"strings"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/appliance"
)

func (p *program) restoreCommand() *cobra.Command {
	return noun(&cobra.Command{
		Use:     "restore",
		Short:   "Write disks of restore points back",
		Example: "  holdfast restore image web@latest --to web.qcow2",
	}, p.restoreImageCommand())
}

func (p *program) restoreImageCommand() *cobra.Command {
	var r appliance.ImageRestore
	cmd := &cobra.Command{
		Use:   "image POINT --to FILE",
		Short: "Write a disk of a restore point as an image file",
		Long: `Write a disk of a restore point as a new image file; every chunk is checked.

The file appears under its name when it is whole. One that exists is never
overwritten. A block device can be the target of a raw disk, with --overwrite.`,
		Example: `  holdfast restore image web@latest --to web.qcow2
  holdfast restore image 1f00aa27 --disk vda --to vda.img --format raw
  holdfast restore image web@2026-01-31T18:00:00Z --to /dev/vg0/web --overwrite`,
		Args:              arguments("POINT"),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			r.Point = args[0]
			return p.open(cmd.Context(), func(a *appliance.Appliance) error {
				done, err := a.RestoreImage(cmd.Context(), r, p.progress())
				if err != nil {
					return err
				}
				p.console.clear()
				return p.print(done, "restored disk %s of %s, point %.12s, to %s (%s, %s)\n",
					done.Disk, done.VM, done.Point, done.File, done.Format, size(done.Size))
			})
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&r.To, "to", "", "the `file` to write (required)")
	flags.StringVar(&r.Disk, "disk", "", "`name` of the disk, if the point has several")
	flags.StringVar(&r.Format, "format", "", "`format` of the file: "+strings.Join(appliance.WriteFormats, ", ")+" (default by its extension, else raw)")
	flags.BoolVar(&r.Overwrite, "overwrite", false, "let --to be a block device, whose content is lost")
	required(cmd, "to")
	choices(cmd, "format", appliance.WriteFormats)
	return cmd
}
