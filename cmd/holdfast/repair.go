package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/appliance"
)

func (p *program) repoRepairCommand() *cobra.Command {
	var apply bool
	cmd := &cobra.Command{
		Use:   "repair",
		Short: "Set right what is damaged in the repository's files",
		Long: `Set right what repo verify, restores and backups found damaged, and what is wrong
around the chunks and in other files of the repository. Run repo verify first: a repair
reads only what is known, or found, to be damaged.

Without --apply nothing is changed: what would be done is listed. With it, what is good
in a damaged file is stored anew, durably, and then the file moves to the folder
quarantine/ (see repo quarantine); nothing is changed in place. It can be interrupted
at any moment; the next run goes on. Backups and restores may run meanwhile.

Chunks that nothing has any more are named with the points that need them: these stay
listed, the rest of their disks can be restored, and a backup that meets the same
content heals them. Exit status 1 if something is left to do.`,
		Example: `  holdfast repo verify
  holdfast repo repair
  holdfast repo repair --apply`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return p.open(cmd.Context(), func(a *appliance.Appliance) error {
				r, err := a.Repair(cmd.Context(), apply, p.progress())
				if err != nil {
					return err
				}
				p.console.clear()
				return p.printRepaired(r)
			})
		},
	}
	cmd.Flags().BoolVar(&apply, "apply", false, "do it, and not only tell")
	return cmd
}

// printRepaired prints what a repair found; what is left to do is an error.
func (p *program) printRepaired(r appliance.RepairResult) error {
	t := newTable("KIND", "FILE", "POINT", "VM", "DISK", "OFFSET", "REASON", "ACTION")
	for _, a := range r.Actions {
		point := fmt.Sprintf("%.12s", a.Point)
		offset := ""
		if a.Disk != "" {
			offset = fmt.Sprint(a.Offset)
		}
		t.row(a.Kind, oneLine(a.File), point, oneLine(a.VM), a.Disk, offset, oneLine(a.Reason), oneLine(a.Action))
	}
	text := t.String()
	if len(r.Actions) == 0 {
		text = "nothing to repair\n"
	}
	if r.Quarantine != "" {
		text += fmt.Sprintf("what was replaced is kept: repo quarantine list shows it as %s\n", r.Quarantine)
	}
	if err := p.print(r, "%s", text); err != nil {
		return err
	}
	switch {
	case !r.Remains():
		return nil
	case !r.Applied:
		return fmt.Errorf("repair %s: nothing was changed; --apply does what is listed", p.data)
	default:
		return fmt.Errorf("repair %s: %d chunks are lost until a backup meets them again; the list says what else is left to do", p.data, r.LostChunks)
	}
}

func (p *program) repoQuarantineCommand() *cobra.Command {
	return noun(&cobra.Command{
		Use:   "quarantine",
		Short: "Look after the files that repairs replaced",
		Long: `Look after the files that repairs replaced. They take space and do nothing, and are there
to undo a repair or to be examined. STAMP is the time of the repair, as list shows it.`,
		Example: `  holdfast repo quarantine list
  holdfast repo quarantine remove 20261122T080000Z`,
	}, p.quarantineListCommand(), p.quarantineRestoreCommand(), p.quarantineRemoveCommand())
}

func (p *program) quarantineListCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "list",
		Short:   "List what repairs replaced",
		Example: "  holdfast repo quarantine list --json",
		Args:    cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			list, err := appliance.Quarantine(p.data)
			if err != nil {
				return err
			}
			t := newTable("STAMP", "SIZE", "FILE")
			for _, r := range list {
				for _, file := range r.Files {
					t.row(r.Stamp, size(r.Bytes), oneLine(file))
				}
			}
			if len(list) == 0 {
				return p.print(list, "nothing is in quarantine\n")
			}
			return p.print(list, "%s", t)
		},
	}
}

func (p *program) quarantineRestoreCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "restore STAMP",
		Short: "Put the files that a repair replaced back",
		Long: `Put the files that a repair replaced back to where they were. A file stays in
quarantine where another has its name now. The index is made anew at the next opening;
where two files have a chunk, the newer one counts.`,
		Example:           "  holdfast repo quarantine restore 20261122T080000Z",
		Args:              arguments("STAMP"),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(_ *cobra.Command, args []string) error {
			r, err := appliance.RestoreQuarantine(p.data, args[0])
			if err != nil {
				return err
			}
			if err := p.print(r, "put back: %s\n", oneLine(strings.Join(r.Restored, ", "))); err != nil {
				return err
			}
			if len(r.Kept) > 0 {
				return fmt.Errorf("%d files stay in quarantine, because others have their names: %s", len(r.Kept), strings.Join(r.Kept, ", "))
			}
			return nil
		},
	}
}

func (p *program) quarantineRemoveCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "remove STAMP",
		Short:             "Remove what a repair replaced for good",
		Example:           "  holdfast repo quarantine remove 20261122T080000Z",
		Args:              arguments("STAMP"),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(_ *cobra.Command, args []string) error {
			r, err := appliance.RemoveQuarantine(p.data, args[0])
			if err != nil {
				return err
			}
			return p.print(r, "removed %d files, %s\n", len(r.Files), size(r.Bytes))
		},
	}
}
