package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/appliance"
)

func (p *program) keyCommand() *cobra.Command {
	return noun(&cobra.Command{
		Use:   "key",
		Short: "Manage the keys of an encrypted repository",
		Long: `List, add, remove and rotate the keys that open an encrypted repository: passphrases
and age recipients, up to 64. --passphrase-file or --identity-file names the one that
you have. What is stored stays as it is: all keys open the same repository key.

A key that was removed still opens a copy of repository.json from before, and who had
it may have kept the repository key: that is never changed. Removing a key keeps out
who has neither.`,
		Example: `  holdfast key list --passphrase-file old.key
  holdfast key add --passphrase-file old.key --recipient age1… --label "in the safe"
  holdfast key rotate 5f0c21aa --passphrase-file old.key --new-passphrase-file new.key
  holdfast key remove 5f0c21aa --identity-file safe.txt`,
	}, p.keyListCommand(), p.keyAddCommand(), p.keyRemoveCommand(), p.keyRotateCommand())
}

func (p *program) keyListCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "list",
		Short:   "List the keys",
		Long:    `List the keys; * marks the one that was used now.`,
		Example: "  holdfast key list --passphrase-file holdfast.key",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return p.open(cmd.Context(), func(a *appliance.Appliance) error {
				keys := a.Keys()
				if len(keys) == 0 {
					return p.print(keys, "no keys: the repository is not encrypted\n")
				}
				t := newTable("KEY", "", "KIND", "CREATED", "LABEL", "RECIPIENT")
				for _, k := range keys {
					current := " "
					if k.Current {
						current = "*"
					}
					t.row(k.ID, current, string(k.Kind), stamp(k.Created), oneLine(k.Label), shortRecipient(k.Recipient))
				}
				return p.print(keys, "%s", t)
			})
		},
	}
}

// shortRecipient cuts post-quantum recipients, which have 2,000 characters.
func shortRecipient(s string) string {
	if len(s) > 80 {
		return s[:40] + "…" + s[len(s)-8:]
	}
	return s
}

func (p *program) keyAddCommand() *cobra.Command {
	var n appliance.NewKey
	cmd := &cobra.Command{
		Use:   "add",
		Short: "Have one more key open the repository",
		Long: `Have one more passphrase or age recipient open the repository. The new key is tried
before it is written: a passphrase always, a recipient if --identity-file has its
identity.`,
		Example: `  holdfast key add --passphrase-file old.key --new-passphrase-file second.key
  holdfast key add --passphrase-file old.key --recipient age1… --label "in the safe"`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return p.open(cmd.Context(), func(a *appliance.Appliance) error {
				k, err := a.AddKey(n)
				if err != nil {
					return err
				}
				return p.printKey(k, "added key "+k.ID)
			})
		},
	}
	newKeyFlags(cmd, &n)
	return cmd
}

func (p *program) keyRotateCommand() *cobra.Command {
	var n appliance.NewKey
	cmd := &cobra.Command{
		Use:   "rotate KEY",
		Short: "Put a new key in the place of another",
		Long: `Put a new passphrase or recipient in the place of a key, in one step. Without --label
the label stays. The old key still opens a copy of repository.json from before.`,
		Example:           "  holdfast key rotate 5f0c21aa --passphrase-file old.key --new-passphrase-file new.key",
		Args:              arguments("KEY"),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			return p.open(cmd.Context(), func(a *appliance.Appliance) error {
				k, err := a.RotateKey(args[0], n)
				if err != nil {
					return err
				}
				return p.printKey(k, fmt.Sprintf("key %s took the place of %s", k.ID, args[0]))
			})
		},
	}
	newKeyFlags(cmd, &n)
	return cmd
}

// newKeyFlags adds the flags that name a new key.
func newKeyFlags(cmd *cobra.Command, n *appliance.NewKey) {
	cmd.Flags().StringVar(&n.PassphraseFile, "new-passphrase-file", "", "`file` with the new passphrase")
	cmd.Flags().StringVar(&n.Recipient, "recipient", "", "age public `key`")
	cmd.Flags().StringVar(&n.Label, "label", "", "`text` that tells what the key is, up to 64 bytes; it is not encrypted")
	cmd.MarkFlagsOneRequired("new-passphrase-file", "recipient")
	cmd.MarkFlagsMutuallyExclusive("new-passphrase-file", "recipient")
}

func (p *program) printKey(k appliance.AddedKey, text string) error {
	if !k.Verified {
		text += "; it was not tried, for its identity is not in --identity-file: try it before you rely on it"
	}
	return p.print(k, "%s\n", text)
}

func (p *program) keyRemoveCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "remove KEY",
		Short: "Remove a key, but not the last",
		Long: `Remove a key. The last is refused: nobody could open the repository any more. See that
another key opens it first. The one that was removed still opens a copy of
repository.json from before.`,
		Example:           "  holdfast key remove 5f0c21aa --passphrase-file holdfast.key",
		Args:              arguments("KEY"),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			return p.open(cmd.Context(), func(a *appliance.Appliance) error {
				removed, err := a.RemoveKey(args[0])
				if err != nil {
					return err
				}
				return p.print(removed, "removed key %s\n", removed.ID)
			})
		},
	}
}
