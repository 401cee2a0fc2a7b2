// Package e2e tests Holdfast from outside: it builds the binary and runs it as
// a user would, with real disk images, QEMU's and libnbd's tools, a FUSE mount
// and a guest that boots.
//
// The tests hold the command line to its contract (arguments, exit statuses,
// the shape of --json) and import nothing of the project, so that a change
// inside can't bend them. Each test has a data folder of its own. Tools that
// are missing fail the tests; `make deps` installs them.
package e2e
