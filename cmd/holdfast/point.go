package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/appliance"
)

func (p *program) pointCommand() *cobra.Command {
	return noun(&cobra.Command{
		Use:   "point",
		Short: "List, compare and delete restore points",
		Long: `List, compare and delete restore points.

Each point is complete by itself: any can be deleted, and no other changes.`,
		Example: `  holdfast point list --vm web
  holdfast point show web@latest
  holdfast point diff web@2026-01-30T18:00:00Z web@latest
  holdfast point delete 1f00aa27`,
	}, p.pointListCommand(), p.pointShowCommand(), p.pointDeleteCommand(), p.pointDiffCommand())
}

func (p *program) pointListCommand() *cobra.Command {
	var vm string
	cmd := &cobra.Command{
		Use:     "list",
		Short:   "List restore points, oldest first",
		Example: "  holdfast point list --vm web --json",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return p.open(cmd.Context(), func(a *appliance.Appliance) error {
				points := a.Points(vm)
				t := newTable("POINT", "VM", "TIME", "MODE", "CONSISTENCY", "DISKS", "SIZE")
				for _, point := range points {
					var sum int64
					for _, d := range point.Disks {
						sum += d.Size
					}
					t.row(point.ID[:12], point.VM, stamp(point.Time), point.Mode, point.Consistency, fmt.Sprint(len(point.Disks)), size(sum))
				}
				if len(points) == 0 {
					return p.print(points, "no restore points\n")
				}
				return p.print(points, "%s", t)
			})
		},
	}
	cmd.Flags().StringVar(&vm, "vm", "", "only points of this VM (`name`)")
	return cmd
}

func (p *program) pointShowCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "show POINT",
		Short:             "Describe a restore point",
		Example:           "  holdfast point show web@latest",
		Args:              arguments("POINT"),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			return p.open(cmd.Context(), func(a *appliance.Appliance) error {
				point, err := a.ResolvePoint(args[0])
				if err != nil {
					return err
				}
				t := newTable("DISK", "SIZE", "DATA")
				for _, d := range point.Disks {
					t.row(d.Name, size(d.Size), size(d.Data))
				}
				files := ""
				if len(point.Config) > 0 {
					files = "saved files: " + strings.Join(point.Config, ", ") + "\n"
				}
				return p.print(point, "point %s of %s\ntime %s, mode %s, consistency %s\n%s%s",
					point.ID, point.VM, stamp(point.Time), point.Mode, point.Consistency, files, t)
			})
		},
	}
}

func (p *program) pointDeleteCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "delete POINT…",
		Short: "Delete restore points",
		Long: `Delete restore points. If one of them is not there, none is deleted.

What only they needed keeps its space until repo gc gives it back.`,
		Example: `  holdfast point delete 1f00aa27 web@2026-01-30T18:00:00Z
  holdfast repo gc`,
		Args:              arguments("POINT…"),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			return p.open(cmd.Context(), func(a *appliance.Appliance) error {
				ids, err := a.DeletePoints(cmd.Context(), args)
				if err != nil {
					return err
				}
				r := struct {
					Deleted []string `json:"deleted"`
				}{ids}
				return p.print(r, "deleted %s\n", strings.Join(ids, ", "))
			})
		},
	}
}

func (p *program) pointDiffCommand() *cobra.Command {
	var disk string
	cmd := &cobra.Command{
		Use:   "diff POINT POINT",
		Short: "Show in which bytes two restore points differ",
		Long: `Show in which bytes of their disks two restore points differ, in whole chunks.

Disks are compared by name, across VMs too. A disk that only one of the points
has is compared with an empty one.`,
		Example: `  holdfast point diff 1f00aa27 web@latest
  holdfast point diff 1f00aa27 web@latest --disk vda --json`,
		Args:              arguments("POINT", "POINT"),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			return p.open(cmd.Context(), func(a *appliance.Appliance) error {
				diff, err := a.DiffPoints(cmd.Context(), args[0], args[1], disk)
				if err != nil {
					return err
				}
				var b strings.Builder
				for _, d := range diff.Disks {
					fmt.Fprintf(&b, "disk %s: %s differ\n", d.Name, size(d.Bytes))
					t := newTable("OFFSET", "LENGTH")
					for _, e := range d.Extents {
						t.row(fmt.Sprint(e.Offset), size(e.Length))
					}
					if len(d.Extents) > 0 {
						b.WriteString(t.String())
					}
				}
				return p.print(diff, "%s", &b)
			})
		},
	}
	cmd.Flags().StringVar(&disk, "disk", "", "compare only the disk of this `name`")
	return cmd
}
