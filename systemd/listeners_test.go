package systemd_test

import (
	"encoding/json"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/holdfast-backup/holdfast/systemd"
)

// found is what the program in the middle of these tests reports.
type found struct {
	Addrs       []string // of the listeners
	Err         string
	Environment []string // what is left of the variables
	Inherited   []int    // of the descriptors 3 and 4, those that its children would get
	Again       int      // listeners of a second call
}

// TestMain makes the test binary a service too: one that looks for listeners and
// serves one client of each, or says "hello" on its standard input.
func TestMain(m *testing.M) {
	switch os.Getenv("SYSTEMD_TEST_SERVICE") {
	case "listeners":
		listenersService()
	case "conn":
		nc, err := systemd.Conn(os.Stdin)
		if err != nil {
			os.Stdout.WriteString(err.Error())
			os.Exit(1)
		}
		io.WriteString(nc, "hello")
		nc.Close()
	default:
		os.Exit(m.Run())
	}
}

func listenersService() {
	var f found
	listeners, err := systemd.Listeners()
	if err != nil {
		f.Err = err.Error()
	}
	for _, v := range os.Environ() {
		if strings.HasPrefix(v, "LISTEN_") {
			f.Environment = append(f.Environment, v)
		}
	}
	for fd := 3; fd < 5; fd++ {
		if flags, _, e := syscall.Syscall(syscall.SYS_FCNTL, uintptr(fd), syscall.F_GETFD, 0); e == 0 && flags&syscall.FD_CLOEXEC == 0 {
			f.Inherited = append(f.Inherited, fd)
		}
	}
	for _, l := range listeners {
		f.Addrs = append(f.Addrs, l.Addr().String())
	}
	again, _ := systemd.Listeners()
	f.Again = len(again)
	json.NewEncoder(os.Stdout).Encode(f)
	os.Stdout.Close()
	for _, l := range listeners {
		if nc, err := l.Accept(); err == nil {
			io.WriteString(nc, "hello")
			nc.Close()
		}
		l.Close()
	}
}

// service returns the command of a service that a shell starts with these
// variables, in which $$ is its process ID.
func service(t *testing.T, kind, variables string, files ...*os.File) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/bin/sh", "-c", variables+` exec "$0"`, os.Args[0])
	cmd.Env = append(os.Environ(), "SYSTEMD_TEST_SERVICE="+kind, "GORACE=atexit_sleep_ms=0")
	cmd.ExtraFiles = files
	cmd.Stderr = os.Stderr
	return cmd
}

// listen returns a listener and its descriptor for a child.
func listen(t *testing.T, network, address string) (net.Listener, *os.File) {
	t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	f, err := l.(interface{ File() (*os.File, error) }).File()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return l, f
}

func TestListeners(t *testing.T) {
	t.Parallel()
	tcp, tcpFile := listen(t, "tcp", "127.0.0.1:0")
	unix, unixFile := listen(t, "unix", filepath.Join(t.TempDir(), "socket"))
	cmd := service(t, "listeners", "LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=a:b", tcpFile, unixFile)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var got found
	if err := json.NewDecoder(out).Decode(&got); err != nil {
		t.Fatal(err)
	}
	if want := []string{tcp.Addr().String(), unix.Addr().String()}; !slices.Equal(got.Addrs, want) || got.Err != "" {
		t.Errorf("got %q, error %q, want %q", got.Addrs, got.Err, want)
	}
	if len(got.Environment) > 0 || len(got.Inherited) > 0 || got.Again > 0 {
		t.Errorf("left over: %q, descriptors %d, %d listeners", got.Environment, got.Inherited, got.Again)
	}
	for _, l := range []net.Listener{tcp, unix} {
		nc, err := net.Dial(l.Addr().Network(), l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		if p, err := io.ReadAll(nc); string(p) != "hello" {
			t.Errorf("%v: got %q, %v", l.Addr(), p, err)
		}
		nc.Close()
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(unix.Addr().String()); err != nil {
		t.Errorf("the service removed a socket that is not its own: %v", err)
	}
}

func TestListenersNone(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	_, listening := listen(t, "unix", filepath.Join(dir, "socket"))
	plain, err := os.Create(filepath.Join(dir, "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	pair, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	connected, other := os.NewFile(uintptr(pair[0]), "pair"), os.NewFile(uintptr(pair[1]), "pair")
	defer connected.Close()
	defer other.Close()
	packets, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer packets.Close()
	datagrams, err := packets.(*net.UDPConn).File()
	if err != nil {
		t.Fatal(err)
	}
	defer datagrams.Close()

	for _, tt := range []struct {
		name, variables string
		files           []*os.File
		want            string // in the error
	}{
		{"no variables", "", []*os.File{listening}, ""},
		{"for another process", "LISTEN_PID=1 LISTEN_FDS=1", []*os.File{listening}, ""},
		{"none", "LISTEN_PID=$$ LISTEN_FDS=0", nil, ""},
		{"bad process", "LISTEN_PID=x LISTEN_FDS=1", []*os.File{listening}, "LISTEN_PID"},
		{"bad number", "LISTEN_PID=$$ LISTEN_FDS=x", []*os.File{listening}, "LISTEN_FDS"},
		{"negative", "LISTEN_PID=$$ LISTEN_FDS=-1", []*os.File{listening}, "LISTEN_FDS"},
		{"millions", "LISTEN_PID=$$ LISTEN_FDS=2000000000", []*os.File{listening}, "LISTEN_FDS"},
		{"fewer than said", "LISTEN_PID=$$ LISTEN_FDS=8", []*os.File{listening}, "not a socket"},
		{"file", "LISTEN_PID=$$ LISTEN_FDS=2", []*os.File{listening, plain}, "descriptor 4 is not a socket"},
		{"connected", "LISTEN_PID=$$ LISTEN_FDS=1", []*os.File{connected}, "not a listening"},
		{"datagrams", "LISTEN_PID=$$ LISTEN_FDS=1", []*os.File{datagrams}, "not a listening"},
	} {
		out, err := service(t, "listeners", tt.variables, tt.files...).Output()
		var got found
		if err != nil || json.Unmarshal(out, &got) != nil {
			t.Fatalf("%s: %v, %s", tt.name, err, out)
		}
		if len(got.Addrs) > 0 || len(got.Environment) > 0 || (got.Err == "") != (tt.want == "") || !strings.Contains(got.Err, tt.want) {
			t.Errorf("%s: got %+v, want error %q", tt.name, got, tt.want)
		}
	}
}

func TestConn(t *testing.T) {
	t.Parallel()
	pair, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	theirs, ours := os.NewFile(uintptr(pair[0]), "theirs"), os.NewFile(uintptr(pair[1]), "ours")
	defer ours.Close()
	cmd := service(t, "conn", "")
	cmd.Stdin = theirs
	err = cmd.Start()
	theirs.Close()
	if err != nil {
		t.Fatal(err)
	}
	if p, err := io.ReadAll(ours); string(p) != "hello" {
		t.Errorf("got %q, %v", p, err)
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}

	_, listening := listen(t, "tcp", "127.0.0.1:0")
	for _, tt := range []struct {
		name  string
		stdin io.Reader
		want  string
	}{
		{"nothing", nil, "not a socket"},
		{"pipe", strings.NewReader(""), "not a socket"},
		{"listener", listening, "not connected"},
	} {
		cmd := service(t, "conn", "")
		cmd.Stdin = tt.stdin
		if out, err := cmd.Output(); err == nil || !strings.Contains(string(out), tt.want) {
			t.Errorf("%s: got %s, %v, want %q", tt.name, out, err, tt.want)
		}
	}
}
