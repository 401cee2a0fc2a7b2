package main

import (
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/appliance"
)

const rootHelp = `Holdfast backs up the disks of virtual machines into a deduplicating repository,
and gives every restore point back as a block device (export), as files (mount)
and as an image file (restore).

POINT is the id of a restore point, or its first 8 or more digits; VM@latest; or
VM@TIME, the VM's newest point at or before an RFC 3339 time.
Sizes are bytes, or have a binary unit: 64KiB, 10GiB.

Exit status: 0 done, 1 failed, 2 wrong usage, 3 not found, 4 refused (locked,
in use, there already, not allowed), 130 interrupted.`

const rootExample = `  holdfast init
  holdfast backup image web.qcow2 --vm web
  holdfast point list
  holdfast mount ~/points
  holdfast restore image web@latest --to web-restored.qcow2`

// rootCommand returns the whole tree of commands.
func (p *program) rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:           "holdfast",
		Short:         "Back up virtual machines",
		Long:          rootHelp,
		Example:       rootExample,
		Args:          cobra.ArbitraryArgs,
		SilenceErrors: true,
		SilenceUsage:  true,
		Version:       versionText(),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return cmd.Help()
			}
			return unknownCommand(cmd, args[0])
		},
	}
	flags := root.PersistentFlags()
	flags.StringVar(&p.data, "data", defaultData(), "the data `folder` (or HOLDFAST_DATA)")
	flags.BoolVar(&p.json, "json", false, "print the result as one line of JSON")
	flags.BoolVarP(&p.quiet, "quiet", "q", false, "show no progress and no warnings")
	flags.StringVar(&p.passphraseFile, "passphrase-file", os.Getenv("HOLDFAST_PASSPHRASE_FILE"),
		"`file` with the passphrase of an encrypted repository (or HOLDFAST_PASSPHRASE_FILE)")
	flags.StringVar(&p.identityFile, "identity-file", os.Getenv("HOLDFAST_IDENTITY_FILE"),
		"`file` with age identities that open an encrypted repository (or HOLDFAST_IDENTITY_FILE)")
	flags.StringVar(&p.guard, "guard", os.Getenv("HOLDFAST_GUARD"),
		"`socket` of holdfast-guard, none for no guard (or HOLDFAST_GUARD; default /run/holdfast-guard.sock if it is there)")
	p.storageTimeout = appliance.DefaultStorageTimeout
	flags.Var((*timeoutFlag)(&p.storageTimeout), "storage-timeout",
		"how long one read or write may take before a command fails; slow storage that answers is waited for")
	root.AddCommand(p.initCommand(), p.backupCommand(), p.pointCommand(), p.exportCommand(), p.mountCommand(),
		p.unmountCommand(), p.restoreCommand(), p.repoCommand(), p.keyCommand(), p.versionCommand())
	root.SetHelpCommand(helpCommand())
	root.SetUsageTemplate(strings.Replace(root.UsageTemplate(), // nouns run only to complain
		"{{if .Runnable}}", "{{if and .Runnable (not .HasAvailableSubCommands)}}", 1))
	p.markStart(root.Commands())
	return root
}

// markStart has each command note that its arguments were understood: errors from
// before that are wrong usage.
func (p *program) markStart(commands []*cobra.Command) {
	for _, cmd := range commands {
		p.markStart(cmd.Commands())
		if do := cmd.RunE; do != nil && !cmd.HasSubCommands() {
			cmd.RunE = func(cmd *cobra.Command, args []string) error {
				p.started = true
				return do(cmd, args)
			}
		}
	}
}

// noun returns a command that only holds others.
func noun(cmd *cobra.Command, verbs ...*cobra.Command) *cobra.Command {
	cmd.AddCommand(verbs...)
	cmd.Args = cobra.ArbitraryArgs
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 {
			return unknownCommand(cmd, args[0])
		}
		var names []string
		for _, verb := range cmd.Commands() {
			names = append(names, verb.Name())
		}
		return fmt.Errorf("%s: which command? It has %s", cmd.CommandPath(), strings.Join(names, ", "))
	}
	return cmd
}

// arguments wants one argument for each name; a last one that ends in "…" stands for
// one or more.
func arguments(names ...string) cobra.PositionalArgs {
	more := strings.HasSuffix(names[len(names)-1], "…")
	return func(_ *cobra.Command, args []string) error {
		if len(args) == len(names) || more && len(args) > len(names) {
			return nil
		}
		return fmt.Errorf("got %d arguments, want %s", len(args), strings.Join(names, " "))
	}
}

func unknownCommand(cmd *cobra.Command, name string) error {
	cmd.SuggestionsMinimumDistance = 2
	hint := ""
	if near := cmd.SuggestionsFor(name); len(near) > 0 {
		hint = "; did you mean " + strings.Join(near, " or ") + "?"
	}
	return fmt.Errorf("unknown command %q for %q%s", name, cmd.CommandPath(), hint)
}

func helpCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "help [COMMAND]",
		Short: "Explain a command, with examples",
		Example: `  holdfast help export
  holdfast help backup image`,
		RunE: func(cmd *cobra.Command, args []string) error {
			about, rest, err := cmd.Root().Find(args)
			if err == nil && len(rest) > 0 {
				err = unknownCommand(about, rest[0])
			}
			if err != nil {
				return err
			}
			about.InitDefaultHelpFlag()
			return about.Help()
		},
	}
}
