package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/appliance"
)

func (p *program) repoCommand() *cobra.Command {
	return noun(&cobra.Command{
		Use:   "repo",
		Short: "Look after the repository",
		Example: `  holdfast repo stats
  holdfast repo verify --percent 10
  holdfast repo gc`,
	}, p.repoStatsCommand(), p.repoVerifyCommand(), p.repoRepairCommand(), p.repoQuarantineCommand(), p.repoGCCommand(), p.repoSetCommand(), p.repoRebuildCommand())
}

func (p *program) repoStatsCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "stats",
		Short:   "Show what is stored and what it takes",
		Example: "  holdfast repo stats --json",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return p.open(cmd.Context(), func(a *appliance.Appliance) error {
				s := a.Stats()
				encrypted := "no"
				if s.Encrypted {
					encrypted = "yes"
				}
				t := newTable()
				t.row("points", fmt.Sprint(s.Points))
				t.row("disks of all points", size(s.LogicalBytes))
				t.row("different data in them", size(s.UniqueBytes))
				t.row("stored, compressed", size(s.StoredBytes))
				t.row("chunks", fmt.Sprintf("%d of %s", s.Chunks, size(int64(s.ChunkSize))))
				t.row("segments", fmt.Sprint(s.Segments))
				t.row("encrypted", encrypted)
				t.row("deleted points", fmt.Sprint(s.DeletedPoints))
				t.row("kept when deleted", kept(time.Duration(s.DeleteQuarantine)*time.Second))
				t.row("head", s.Head)
				return p.print(s, "%s", t)
			})
		},
	}
}

func (p *program) repoVerifyCommand() *cobra.Command {
	o := appliance.VerifyOptions{}
	percent, rate := shareFlag(100), sizeFlag(0)
	cmd := &cobra.Command{
		Use:   "verify",
		Short: "Read the repository back and check every hash",
		Long: `Read the repository back and check every chunk's hash. Exit status 1 if anything is
damaged; what it belongs to is listed. The next backup that meets the same
content stores it anew, which heals the points that need it; repo repair sets right
what is around the chunks.

--percent 10 reads a tenth, those segments first that were verified longest ago.
--point and --vm read only what those points need. --resume goes on with a
verification of everything that was interrupted, and begins one if there is none.
Backups, restores and a collection may run meanwhile; --rate leaves them room.

--since takes the head that repo stats printed before, noted elsewhere: if somebody
put the repository back to an earlier state, that is damage.`,
		Example: `  holdfast repo verify
  holdfast repo verify --percent 10 --rate 50MiB --quiet
  holdfast repo verify --vm web --point db@latest
  holdfast repo verify --resume
  holdfast repo verify --since 42:8d7c…`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.Percent, o.Rate = float64(percent), int64(rate)
			return p.open(cmd.Context(), func(a *appliance.Appliance) error {
				r, err := a.Verify(cmd.Context(), o, p.progress())
				if err != nil {
					return err
				}
				p.console.clear()
				return p.printVerified(r)
			})
		},
	}
	flags := cmd.Flags()
	flags.Var(&percent, "percent", "`share` of the stored bytes to read, more than 0")
	flags.StringArrayVar(&o.Points, "point", nil, "only what this `POINT` needs; may be given more than once")
	flags.Var((*textFlag)(&o.VM), "vm", "only what the points of this VM (`name`) need")
	flags.BoolVar(&o.Resume, "resume", false, "go on with a verification of everything that was interrupted")
	flags.Var((*textFlag)(&o.Since), "since", "the repository must have been in the state of this `head`: see repo stats")
	flags.Var(&rate, "rate", "bytes to read in a second, at most; 0 is no bound")
	return cmd
}

// printVerified prints what a verification found; damage is an error.
func (p *program) printVerified(r appliance.VerifyResult) error {
	t := newTable("POINT", "VM", "DISK", "OFFSET", "LENGTH", "FILE", "REASON")
	for _, e := range r.Errors {
		t.row(fmt.Sprintf("%.12s", e.Point), oneLine(e.VM), e.Disk, fmt.Sprint(e.Offset), size(e.Length), oneLine(e.File), oneLine(e.Reason))
	}
	if len(r.Errors) == 0 && r.DamagedChunks == 0 {
		since := ""
		if r.Resumed {
			since = ", the rest since " + stamp(r.Began)
		}
		return p.print(r, "%d records read, %s%s: all good\n", r.CheckedChunks, size(r.CheckedBytes), since)
	}
	if err := p.print(r, "%s", t); err != nil {
		return err
	}
	heal := ""
	if r.DamagedChunks > 0 {
		heal = "back the VMs up again to heal chunks, and "
	}
	return fmt.Errorf("verify %s: found %d errors, %d damaged chunks; %ssee what repo repair would do", p.data, len(r.Errors), r.DamagedChunks, heal)
}

// kept returns how long deleted points are kept.
func kept(d time.Duration) string {
	if d == 0 {
		return "until repo gc"
	}
	return "for " + duration(d)
}

func (p *program) repoSetCommand() *cobra.Command {
	var quarantine time.Duration
	cmd := &cobra.Command{
		Use:   "set",
		Short: "Change the repository's settings",
		Long: `Change the repository's settings. --delete-quarantine is for how long points can be
brought back after they were deleted, at least; it holds for points that are deleted
from now on. Their space comes back with the first repo gc after that.`,
		Example: "  holdfast repo set --delete-quarantine 7d",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return p.open(cmd.Context(), func(a *appliance.Appliance) error {
				if err := a.SetDeleteQuarantine(quarantine); err != nil {
					return err
				}
				r := struct {
					Seconds int64 `json:"delete_quarantine_seconds"`
				}{int64(quarantine / time.Second)}
				return p.print(r, "points that are deleted are kept %s\n", kept(quarantine))
			})
		},
	}
	cmd.Flags().Var((*durationFlag)(&quarantine), "delete-quarantine", "keep deleted points for this `time`, such as 7d or 12h; 0 until repo gc")
	required(cmd, "delete-quarantine")
	return cmd
}

func (p *program) repoGCCommand() *cobra.Command {
	var o appliance.CollectOptions
	cmd := &cobra.Command{
		Use:   "gc",
		Short: "Give back the space of what no point needs",
		Long: `Give back the space of chunks that no restore point needs any more, such as after
point delete. Deleted points whose time has passed are purged. Before files are removed, a
second walk over all points confirms that nothing in them is missed. It can be interrupted
at any moment: only the marking is lost, and the next run goes on.

With --max-unused segments keep up to that share of dead bytes, which saves copying
what else is in them.`,
		Example: `  holdfast repo gc --dry-run
  holdfast repo gc --max-unused 5`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return p.open(cmd.Context(), func(a *appliance.Appliance) error {
				r, err := a.Collect(cmd.Context(), o, p.progress())
				if err != nil {
					return err
				}
				p.console.clear()
				verb := "freed"
				if o.DryRun {
					verb = "would free"
				}
				stays := ""
				if r.ImmutableBytes > 0 {
					stays = ", " + size(r.ImmutableBytes) + " stay in files of locked points"
				}
				return p.print(r, "%d records are needed, %d are not: %s %s%s\n", r.LiveChunks, r.DeadChunks, verb, size(r.FreedBytes), stays)
			})
		},
	}
	cmd.Flags().BoolVar(&o.DryRun, "dry-run", false, "only tell what would be freed")
	cmd.Flags().Float64Var(&o.MaxUnusedPercent, "max-unused", 0, "`percent` of dead bytes that a segment may keep")
	return cmd
}

func (p *program) repoRebuildCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "rebuild-index",
		Short: "Make the index anew from the segments",
		Long: `Throw the index away and make it anew from the segments, which hold everything
that counts. It can be interrupted at any moment; the next command goes on.

It is seldom needed: an index that is missing or damaged, that is of another
repository, or that was open when the machine lost power, is made anew whenever the
repository is opened.`,
		Example: "  holdfast repo rebuild-index",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var r appliance.RebuildResult
			err := p.guarded(cmd.Context(), func(ctx context.Context, _ func()) (err error) {
				r, err = appliance.RebuildIndex(ctx, p.data, p.options(), p.progress())
				return err
			})
			if err != nil {
				return err
			}
			p.console.clear()
			return p.print(r, "entered %d records of %d segments, %d of them chunks\n", r.Records, r.Segments, r.Chunks)
		},
	}
}
