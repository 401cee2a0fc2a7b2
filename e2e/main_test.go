package e2e_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// binary is the holdfast under test, built once by TestMain.
var binary string

// commandTimeout ends a command that hangs; no test of ours needs that long.
const commandTimeout = 4 * time.Minute

// Exit statuses of the contract.
const (
	exitFailed      = 1
	exitUsage       = 2
	exitNotFound    = 3
	exitRefused     = 4
	exitInterrupted = 130
)

func TestMain(m *testing.M) {
	os.Exit(runTests(m))
}

func runTests(m *testing.M) int {
	os.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin")
	if os.Geteuid() != 0 {
		return asNamespaceRoot()
	}
	folder, err := os.MkdirTemp("", "holdfast-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(folder)
	binary = filepath.Join(folder, "holdfast")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-X main.version=e2e", "-o", binary, "../cmd/holdfast")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build holdfast: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// asNamespaceRoot runs the tests again in a user and mount namespace where
// they may mount the small and read-only file systems they need.
func asNamespaceRoot() int {
	cmd := exec.Command("unshare", append([]string{"--user", "--map-root-user", "--mount", os.Args[0]}, os.Args[1:]...)...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	err := cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return exit.ExitCode()
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "tests that mount need root or a user namespace: %v\n", err)
		return 1
	}
	return 0
}

// repo is a repository of the test's own.
type repo struct {
	t    *testing.T
	data string   // the data folder
	args []string // what every command is given, --passphrase-file and the like
}

// newRepo makes a repository; args are given to init.
func newRepo(t *testing.T, args ...string) *repo {
	t.Helper()
	r := &repo{t: t, data: filepath.Join(t.TempDir(), "data")}
	r.ok(append([]string{"init"}, args...)...)
	return r
}

// command prepares holdfast with arguments, without running it. Its
// environment has nothing of the user's that could lead it elsewhere.
func (r *repo) command(ctx context.Context, args ...string) *exec.Cmd {
	args = append(append([]string{"--data", r.data}, r.args...), args...)
	cmd := exec.CommandContext(ctx, binary, args...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + filepath.Dir(r.data)}
	return cmd
}

// result is how a command ended.
type result struct {
	args           []string
	stdout, stderr string
	code           int // the exit status; -1 for a signal
}

func (r result) String() string {
	return fmt.Sprintf("holdfast %s: exit status %d\nstdout: %s\nstderr: %s", strings.Join(r.args, " "), r.code, r.stdout, r.stderr)
}

// run runs holdfast to its end.
func (r *repo) run(args ...string) result {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), commandTimeout)
	defer cancel()
	cmd := r.command(ctx, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if _, ok := errors.AsType[*exec.ExitError](err); err != nil && !ok || ctx.Err() != nil {
		r.t.Fatalf("holdfast %q: %v, %v\nstderr: %s", args, err, ctx.Err(), stderr.String())
	}
	return result{args: args, stdout: stdout.String(), stderr: stderr.String(), code: cmd.ProcessState.ExitCode()}
}

// ok runs a command that must succeed and returns its standard output.
func (r *repo) ok(args ...string) string {
	r.t.Helper()
	res := r.run(args...)
	if res.code != 0 {
		r.t.Fatal(res)
	}
	return res.stdout
}

// fails runs a command that must end with the status, with nothing on
// standard output and one line of error. It returns that line.
func (r *repo) fails(code int, args ...string) string {
	r.t.Helper()
	res := r.run(append([]string{"--quiet"}, args...)...)
	line := strings.TrimSpace(res.stderr)
	if res.code != code || res.stdout != "" || line == "" || strings.Contains(line, "\n") {
		r.t.Errorf("%v\nwant exit status %d and one line on standard error only", res, code)
	}
	return line
}

// decode reads one JSON value, nothing after it.
func decode[T any](t *testing.T, text string) T {
	t.Helper()
	var v T
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%v in %q", err, text)
	}
	return v
}

// tool runs a foreign command that must succeed and returns its standard output.
func tool(t *testing.T, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), commandTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s %q: %v\n%s%s", name, args, err, stdout.String(), stderr.String())
	}
	return stdout.String()
}

// process is a holdfast that runs on beside the test.
type process struct {
	t      *testing.T
	cmd    *exec.Cmd
	stderr *bytes.Buffer
	done   chan struct{} // closed when it has ended
}

// start starts holdfast; what is left of it when the test ends is killed.
func (r *repo) start(stdout *os.File, args ...string) *process {
	r.t.Helper()
	p := &process{t: r.t, cmd: r.command(context.Background(), args...), stderr: new(bytes.Buffer), done: make(chan struct{})}
	p.cmd.Stderr = p.stderr
	if stdout != nil {
		p.cmd.Stdout = stdout
	}
	if err := p.cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	go func() {
		defer close(p.done)
		_ = p.cmd.Wait() // the state is read from ProcessState
	}()
	r.t.Cleanup(func() {
		_ = p.cmd.Process.Kill()
		<-p.done
	})
	return p
}

// wait waits for the end of the process and returns its exit status, -1 for
// one that a signal ended.
func (p *process) wait() int {
	p.t.Helper()
	select {
	case <-p.done:
		return p.cmd.ProcessState.ExitCode()
	case <-time.After(30 * time.Second):
		_ = p.cmd.Process.Signal(syscall.SIGQUIT) // Go prints the stacks
		<-p.done
		p.t.Fatalf("%q runs on\n%s", p.cmd.Args[1:], p.stderr)
		return -1
	}
}

// interrupt sends the signal of Ctrl-C and waits for the end.
func (p *process) interrupt() int {
	p.t.Helper()
	if err := p.cmd.Process.Signal(os.Interrupt); err != nil && !errors.Is(err, os.ErrProcessDone) {
		p.t.Fatal(err)
	}
	return p.wait()
}

// until waits for a condition, half a minute at most.
func (p *process) until(what string, condition func() bool) {
	p.t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !condition(); time.Sleep(20 * time.Millisecond) {
		select {
		case <-p.done:
			p.t.Fatalf("%q ended with %v before %s\n%s", p.cmd.Args[1:], p.cmd.ProcessState, what, p.stderr)
		default:
		}
		if time.Now().After(deadline) {
			p.t.Fatalf("%q: no %s in time", p.cmd.Args[1:], what)
		}
	}
}
