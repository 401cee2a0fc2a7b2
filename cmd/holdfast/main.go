// Command holdfast is Holdfast's command line: it parses, calls package
// appliance and prints. `holdfast help` describes it.
//
// Results go to standard output, in one line of JSON with --json; progress,
// warnings and errors go to standard error. An error is one line.
package main

import (
	"context"
	"os"
	"os/signal"
	"runtime"
	"syscall"
)

// The first thread is the main goroutine's alone: the kernel hands it the process's signals, and
// one that waits for storage takes none.
func init() { runtime.LockOSThread() }

func main() {
	signals := []os.Signal{os.Interrupt, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) { // nohup
		signals = append(signals, syscall.SIGHUP)
	}
	ctx, stop := signal.NotifyContext(context.Background(), signals...)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}
