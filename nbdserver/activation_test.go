package nbdserver_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/nbdserver"
	"github.com/holdfast-backup/holdfast/systemd"
)

// activated makes the test binary a program that serves the test disk on what
// its parent gives it: listeners of socket activation, or one connection as
// standard input. It does so for a minute at most.
func activated() {
	s := nbdserver.New(nbdserver.Options{})
	if err := s.Add(testExport()); err != nil {
		fail(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	listeners, err := systemd.Listeners()
	if err != nil {
		fail(err)
	}
	if len(listeners) > 0 {
		err = s.Serve(ctx, listeners[0])
	} else {
		var nc net.Conn
		if nc, err = systemd.Conn(os.Stdin); err == nil {
			err = s.ServeConn(ctx, nc)
		}
	}
	if err != nil {
		fail(err)
	}
	os.Exit(0)
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

// TestActivation: clients of libnbd start a server for themselves, as systemd
// would and as inetd would.
func TestActivation(t *testing.T) {
	t.Parallel()
	program := []string{"env", "NBDSERVER_TEST_ACTIVATED=1", os.Args[0]}
	out := run(t, "nbdinfo", append(append([]string{"--size", "["}, program...), "]")...)
	if got := strings.TrimSpace(string(out)); got != fmt.Sprint(testSize) {
		t.Errorf("nbdinfo [ PROGRAM ]: got size %s", got)
	}
	for _, connect := range []string{"connect_systemd_socket_activation", "connect_command"} {
		out := run(t, "/usr/bin/python3", "-c", `
import nbd, sys
h = nbd.NBD()
getattr(h, sys.argv[1])(sys.argv[2:])
print(h.get_size(), len(h.pread(50000, 100)))
h.shutdown()
`, connect, program[0], program[1], program[2])
		if got, want := strings.TrimSpace(string(out)), fmt.Sprint(testSize, " 50000"); got != want {
			t.Errorf("%s: got %s, want %s", connect, got, want)
		}
	}
}
