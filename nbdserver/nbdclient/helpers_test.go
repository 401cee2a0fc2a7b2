package nbdclient_test

import (
	"bytes"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/nbdserver/nbdclient"
)

// process starts a server that is to listen on a unix socket, and kills it when
// the test ends, or earlier by the function returned.
func process(tb testing.TB, socket, name string, args ...string) (kill func()) {
	tb.Helper()
	var output bytes.Buffer
	cmd := exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	killed := false
	kill = func() {
		if !killed {
			killed = true
			cmd.Process.Kill()
			cmd.Wait()
		}
	}
	tb.Cleanup(kill)
	for range 500 {
		if c, err := net.Dial("unix", socket); err == nil {
			c.Close()
			return kill
		}
		time.Sleep(20 * time.Millisecond)
	}
	kill()
	tb.Fatalf("%s %q does not listen: %s", name, args, output.Bytes())
	return nil
}

// nbdkit starts nbdkit with its arguments and returns its socket.
func nbdkit(tb testing.TB, args ...string) string {
	tb.Helper()
	socket := filepath.Join(tb.TempDir(), "nbd")
	process(tb, socket, "nbdkit", append([]string{"-f", "-U", socket}, args...)...)
	return socket
}

// qemuNBD starts qemu-nbd with its arguments and returns its socket.
func qemuNBD(tb testing.TB, args ...string) string {
	tb.Helper()
	socket := filepath.Join(tb.TempDir(), "nbd")
	process(tb, socket, "qemu-nbd", append([]string{"-t", "-r", "-k", socket}, args...)...)
	return socket
}

// run runs a command that must succeed and returns its standard output.
func run(tb testing.TB, name string, args ...string) []byte {
	tb.Helper()
	var stderr bytes.Buffer
	cmd := exec.CommandContext(tb.Context(), name, args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		tb.Fatalf("%s %q: %v\n%s%s", name, args, err, out, stderr.Bytes())
	}
	return out
}

// dial connects, and closes the client when the test ends.
func dial(tb testing.TB, o nbdclient.Options) *nbdclient.Client {
	tb.Helper()
	o.Log = slog.New(slog.DiscardHandler)
	c, err := nbdclient.Dial(tb.Context(), o)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { c.Close() })
	return c
}

func unixOptions(socket string) nbdclient.Options {
	return nbdclient.Options{Network: "unix", Address: socket}
}

// content returns n bytes that differ from place to place.
func content(n int) []byte {
	p := make([]byte, n)
	rand.NewChaCha8([32]byte{7}).Read(p)
	return p
}

func writeFile(tb testing.TB, path string, p []byte) string {
	tb.Helper()
	if err := os.WriteFile(path, p, 0o600); err != nil {
		tb.Fatal(err)
	}
	return path
}
