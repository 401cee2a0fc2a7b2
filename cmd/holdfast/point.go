package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/appliance"
)

func (p *program) pointCommand() *cobra.Command {
	return noun(&cobra.Command{
		Use:   "point",
		Short: "List, compare, lock and delete restore points",
		Long: `List, compare, lock and delete restore points.

Each point is complete by itself: any can be deleted, and no other changes.`,
		Example: `  holdfast point list --vm web
  holdfast point show web@latest
  holdfast point diff web@2026-01-30T18:00:00Z web@latest
  holdfast point lock web@latest --for 30d
  holdfast point delete 1f00aa27`,
	}, p.pointListCommand(), p.pointShowCommand(), p.pointDeleteCommand(), p.pointUndeleteCommand(),
		p.pointLockCommand(), p.pointLogCommand(), p.pointDiffCommand())
}

func (p *program) pointListCommand() *cobra.Command {
	var vm string
	var deleted bool
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List restore points, oldest first",
		Example: `  holdfast point list --vm web --json
  holdfast point list --deleted`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return p.open(cmd.Context(), func(a *appliance.Appliance) error {
				if deleted {
					return p.printDeleted(a.DeletedPoints(vm))
				}
				points := a.Points(vm)
				t := newTable("POINT", "VM", "TIME", "MODE", "CONSISTENCY", "DISKS", "SIZE", "LOCKED UNTIL")
				for _, point := range points {
					t.row(point.ID[:12], point.VM, stamp(point.Time), point.Mode, point.Consistency,
						fmt.Sprint(len(point.Disks)), size(sizeOf(point)), lock(point.LockedUntil))
				}
				if len(points) == 0 {
					return p.print(points, "no restore points\n")
				}
				return p.print(points, "%s", t)
			})
		},
	}
	cmd.Flags().Var((*textFlag)(&vm), "vm", "only points of this VM (`name`)")
	cmd.Flags().BoolVar(&deleted, "deleted", false, "list the deleted points that point undelete can bring back")
	return cmd
}

// printDeleted prints points that are deleted.
func (p *program) printDeleted(points []appliance.DeletedPoint) error {
	t := newTable("POINT", "VM", "TIME", "SIZE", "DELETED", "KEPT UNTIL")
	for _, point := range points {
		t.row(point.ID[:12], point.VM, stamp(point.Time), size(sizeOf(point.Point)), stamp(point.Deleted), stamp(point.PurgeAfter))
	}
	if len(points) == 0 {
		return p.print(points, "no deleted restore points\n")
	}
	return p.print(points, "%s", t)
}

// sizeOf returns the sum of the sizes of a point's disks.
func sizeOf(point appliance.Point) int64 {
	var sum int64
	for _, d := range point.Disks {
		sum += d.Size
	}
	return sum
}

// lock returns how a lock's end is shown: in whole seconds, not before it.
func lock(until time.Time) string {
	if until.IsZero() {
		return "-"
	}
	return stamp(until.Add(time.Second - 1).Truncate(time.Second))
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
				locked := ""
				if !point.LockedUntil.IsZero() {
					locked = "locked until " + stamp(point.LockedUntil) + "\n"
				}
				return p.print(point, "point %s of %s\ntime %s, mode %s, consistency %s\n%s%s%s",
					point.ID, point.VM, stamp(point.Time), point.Mode, point.Consistency, locked, files, t)
			})
		},
	}
}

func (p *program) pointDeleteCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "delete POINT…",
		Short: "Delete restore points",
		Long: `Delete restore points. If one of them is not there, or is locked (exit status 4), none is
deleted.

What only they needed keeps its space until repo gc gives it back, and until then
point undelete brings them back. The repository may keep them for longer:
see init and repo set --delete-quarantine.`,
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

func (p *program) pointUndeleteCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "undelete POINT…",
		Short: "Bring deleted restore points back",
		Long: `Bring deleted restore points back, which repo gc has not purged yet. If one of
them is not there, none is brought back. VM@latest and VM@TIME are looked for among the
VM's deleted points.`,
		Example: `  holdfast point list --deleted
  holdfast point undelete 1f00aa27`,
		Args:              arguments("POINT…"),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			return p.open(cmd.Context(), func(a *appliance.Appliance) error {
				ids, err := a.UndeletePoints(cmd.Context(), args)
				if err != nil {
					return err
				}
				r := struct {
					Undeleted []string `json:"undeleted"`
				}{ids}
				return p.print(r, "brought back %s\n", strings.Join(ids, ", "))
			})
		},
	}
}

func (p *program) pointLockCommand() *cobra.Command {
	var length time.Duration
	var until time.Time
	cmd := &cobra.Command{
		Use:   "lock POINT",
		Short: "Keep a restore point from being deleted for a time",
		Long: `Keep a restore point from being deleted for a time. Nothing shortens a lock: it can only
be made to last longer.

The time is counted by the kernel while the machine runs, and not by the machine's clock, so
setting that changes nothing. Time in which the machine is off may not count:
a lock can last longer than was said, and never less long.

Where holdfast-guard runs, the files that the point needs are immutable until then, too: nobody
can remove them from the data folder.`,
		Example: `  holdfast point lock web@latest --for 30d
  holdfast point lock 1f00aa27 --until 2027-01-31T00:00:00Z`,
		Args:              arguments("POINT"),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			return p.open(cmd.Context(), func(a *appliance.Appliance) error {
				r, err := a.LockPoint(cmd.Context(), args[0], length, until)
				if err != nil {
					return err
				}
				immutable := ""
				if r.Immutable {
					immutable = ", its files are immutable"
				}
				return p.print(r, "point %s is locked until %s%s\n", r.Point, stamp(r.LockedUntil), immutable)
			})
		},
	}
	cmd.Flags().Var((*durationFlag)(&length), "for", "lock for this `time` from now on, such as 30d or 12h")
	cmd.Flags().Var((*timeFlag)(&until), "until", "lock until this `time`, such as 2027-01-31T18:00:00Z")
	cmd.MarkFlagsOneRequired("for", "until")
	cmd.MarkFlagsMutuallyExclusive("for", "until")
	return cmd
}

func (p *program) pointLogCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "log",
		Short: "Show what was done to the restore points",
		Long: `Show what was done to the restore points: the last 1000 changes, oldest first. Their times are
by the repository's own clock, which may be behind: see point lock.`,
		Example: "  holdfast point log --json",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return p.open(cmd.Context(), func(a *appliance.Appliance) error {
				changes := a.Changes()
				t := newTable("CHANGE", "TIME", "WHAT", "POINT", "UNTIL")
				for _, c := range changes {
					t.row(fmt.Sprint(c.Seq), stamp(c.At.Truncate(time.Second)), string(c.Op), fmt.Sprintf("%.12s", c.Point), lock(c.Until))
				}
				if len(changes) == 0 {
					return p.print(changes, "nothing was done yet\n")
				}
				return p.print(changes, "%s", t)
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
