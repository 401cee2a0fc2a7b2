package main

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/appliance"
)

func (p *program) initCommand() *cobra.Command {
	o := appliance.InitOptions{ChunkSize: 64 << 10}
	cmd := &cobra.Command{
		Use:   "init",
		Short: "Make a repository in the data folder",
		Long: `Make a repository in the data folder, which must not hold one already.

With --passphrase-file or --recipient everything in it is encrypted; any of those
keys opens it later; holdfast key adds more, and removes them. Nobody can open it
without one: keep them elsewhere too.
Smaller chunks find more that is the same; larger ones need less memory and
are faster to restore. The chunk size cannot be changed later.`,
		Example: `  holdfast init
  holdfast init --data /backup/holdfast --chunk-size 128KiB
  holdfast init --passphrase-file /root/holdfast.key
  holdfast init --recipient age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p`,
		Args: cobra.NoArgs,
		PreRunE: func(*cobra.Command, []string) error {
			if p.identityFile != "" && p.passphraseFile == "" && len(o.Recipients) == 0 {
				return errors.New("an identity encrypts nothing; name its public key with --recipient")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.PassphraseFile = p.passphraseFile
			var r appliance.InitResult
			err := p.guarded(cmd.Context(), func(context.Context, func()) (err error) {
				o.Storage = p.storage
				r, err = appliance.Init(p.data, o)
				return err
			})
			if err != nil {
				return err
			}
			encrypted := "not encrypted"
			if r.Encrypted {
				encrypted = "encrypted"
			}
			return p.print(r, "made a repository in %s, %s, with chunks of %s\n", r.Data, encrypted, size(r.ChunkSize))
		},
	}
	cmd.Flags().Var((*sizeFlag)(&o.ChunkSize), "chunk-size", "`size` of a chunk, a power of two from 16KiB to 4MiB")
	cmd.Flags().Var((*durationFlag)(&o.DeleteQuarantine), "delete-quarantine", "keep deleted points for this `time` at least, such as 7d: see repo set")
	cmd.Flags().StringArrayVar(&o.Recipients, "recipient", nil, "encrypt for this age public `key`; may be repeated")
	return cmd
}
