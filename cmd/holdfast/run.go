package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"
	"unicode"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/appliance"
)

// Exit statuses.
const (
	exitDone        = 0
	exitFailed      = 1
	exitUsage       = 2
	exitNotFound    = 3
	exitRefused     = 4
	exitInterrupted = 130
)

// exitOf has the exit status of each kind of error.
var exitOf = map[appliance.Kind]int{
	appliance.Failed:   exitFailed,
	appliance.Invalid:  exitUsage,
	appliance.NotFound: exitNotFound,
	appliance.Refused:  exitRefused,
}

// exitError ends the process with a status when all is said already.
type exitError int

func (e exitError) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// program is one run of the command line.
type program struct {
	args    []string
	stdout  io.Writer
	console *console // standard error
	started bool     // the command line was understood

	data           string
	json, quiet    bool
	passphraseFile string
	identityFile   string
	guard          string
	storageTimeout time.Duration
	storage        *appliance.Storage // while a command runs in guarded
}

// run runs a command line to its end and returns the exit status.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	p := &program{args: args, stdout: stdout, console: newConsole(stderr)}
	root := p.rootCommand() //nolint:contextcheck // cobra hands ctx to the command that runs
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(p.console)
	cmd, err := root.ExecuteContextC(ctx)
	p.console.clear()
	if err == nil {
		return exitDone
	}
	code, line := p.explain(ctx, cmd, err)
	if line != "" {
		fmt.Fprintln(p.console, "holdfast: "+oneLine(line))
	}
	return code
}

// explain returns the exit status for an error and what to print.
func (p *program) explain(ctx context.Context, cmd *cobra.Command, err error) (code int, line string) {
	if exit, ok := errors.AsType[exitError](err); ok {
		return int(exit), ""
	}
	if ctx.Err() != nil && (errors.Is(err, ctx.Err()) || errors.Is(err, context.Cause(ctx))) {
		line := strings.TrimPrefix(cmd.CommandPath(), "holdfast ") + " was interrupted"
		if stall, ok := errors.AsType[*appliance.StallError](err); ok {
			line += "; " + stall.Error()
		}
		return exitInterrupted, line
	}
	if !p.started { // cobra did not get as far as the command
		return exitUsage, fmt.Sprintf("%v; see: %s --help", err, cmd.CommandPath())
	}
	return exitOf[appliance.KindOf(err)], err.Error()
}

// oneLine turns line breaks into "; " and other control characters, which could come
// from names of files, into spaces.
func oneLine(s string) string {
	lines := strings.FieldsFunc(s, func(r rune) bool { return r == '\n' || r == '\r' })
	for i, line := range lines {
		lines[i] = strings.TrimSpace(strings.Map(func(r rune) rune {
			if unicode.IsControl(r) {
				return ' '
			}
			return r
		}, line))
	}
	return strings.Join(lines, "; ")
}

// options returns how to open the data folder.
func (p *program) options() appliance.Options {
	return appliance.Options{PassphraseFile: p.passphraseFile, IdentityFile: p.identityFile, Guard: p.guard, Storage: p.storage, Log: p.log()}
}

// log returns a logger that writes warnings as plain lines.
func (p *program) log() *slog.Logger {
	level := slog.LevelWarn
	if p.quiet {
		level = slog.LevelError
	}
	return slog.New(slog.NewTextHandler(p.console, &slog.HandlerOptions{
		Level: level,
		ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey && len(groups) == 0 {
				return slog.Attr{}
			}
			return a
		},
	}))
}

// guarded runs what works with storage, and gives it up if that does not answer. Then the process
// has to end.
func (p *program) guarded(ctx context.Context, do func(ctx context.Context, serving func()) error) error {
	p.storage = appliance.WatchStorage(p.storageTimeout, nil)
	defer p.storage.Close()
	return p.storage.Serve(ctx, do)
}

// open opens the data folder for do and closes it afterwards.
func (p *program) open(ctx context.Context, do func(*appliance.Appliance) error) error {
	return p.openServing(ctx, func(a *appliance.Appliance, _ func()) error { return do(a) })
}

// openServing is open for what calls serving when it serves others: from then on storage that does not
// answer ends nothing.
func (p *program) openServing(ctx context.Context, do func(a *appliance.Appliance, serving func()) error) error {
	return p.guarded(ctx, func(ctx context.Context, serving func()) (err error) {
		a, err := appliance.Open(ctx, p.data, p.options())
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, a.Close()) }()
		return do(a, serving)
	})
}

// progress returns what shows the progress of long work, nil with --quiet.
func (p *program) progress() func(appliance.Progress) {
	if p.quiet {
		return nil
	}
	return p.console.progress
}

// defaultData returns the data folder that is used unless one is named.
func defaultData() string {
	if dir := os.Getenv("HOLDFAST_DATA"); dir != "" {
		return dir
	}
	if os.Geteuid() == 0 {
		return "/var/lib/holdfast"
	}
	if dir := os.Getenv("XDG_DATA_HOME"); filepath.IsAbs(dir) { // others are to be ignored: XDG Base Directory Specification
		return filepath.Join(dir, "holdfast")
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "" // which no command takes
	}
	return filepath.Join(home, ".local", "share", "holdfast")
}
