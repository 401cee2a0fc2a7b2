package guard_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/guard"
)

const point = "points/00112233445566778899aabbccddeeff.point"

// FuzzParseRequest: what is accepted is within the limits, names nothing outside the two
// folders, and encodes back.
func FuzzParseRequest(f *testing.F) {
	for _, line := range []string{
		`{"version":1,"op":"status"}`,
		`{"version":1,"op":"release","folder":"1:2","files":["segments/0000000000000001-00112233445566aa.seg"]}`,
		`{"version":1,"op":"protect","folder":"1:2","files":["` + point + `"],"seconds":60}`,
		`{"version":1,"op":"protect","folder":"1:2","files":["../` + point + `"],"seconds":60}`,
		`{"version":1,"op":"status"} {}`,
	} {
		f.Add([]byte(line))
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		r, err := guard.ParseRequest(line)
		if err != nil {
			return
		}
		if len(r.Files) > guard.MaxFiles || r.Seconds < 0 || time.Duration(r.Seconds)*time.Second > guard.MaxDuration {
			t.Fatalf("accepted %+v", r)
		}
		for _, name := range r.Files {
			dir, base := filepath.Split(name)
			if dir != "points/" && dir != "segments/" || filepath.Clean(name) != name || strings.ContainsAny(base, "\x00/\n") {
				t.Fatalf("accepted file %q", name)
			}
		}
		encoded, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		again, err := guard.ParseRequest(encoded)
		if len(r.Files) == 0 {
			r.Files = nil
		}
		if err != nil || !reflect.DeepEqual(r, again) {
			t.Fatalf("got %+v %v, want %+v", again, err, r)
		}
	})
}

func TestReadLine(t *testing.T) {
	t.Parallel()
	longest := bytes.Repeat([]byte("x"), guard.MaxLine-1)
	for name, tt := range map[string]struct {
		in   []byte
		want int
		err  error
	}{
		"line":       {[]byte("abc\nrest"), 3, nil},
		"empty":      {[]byte("\n"), 0, nil},
		"longest":    {append(longest, '\n'), guard.MaxLine - 1, nil},
		"too long":   {append(longest, "x\n"...), 0, guard.ErrTooLong},
		"cut short":  {[]byte("abc"), 0, io.ErrUnexpectedEOF},
		"no bytes":   {nil, 0, io.ErrUnexpectedEOF},
		"no newline": {longest, 0, io.ErrUnexpectedEOF},
	} {
		line, err := guard.ReadLine(bytes.NewReader(tt.in))
		if len(line) != tt.want || !errors.Is(err, tt.err) {
			t.Errorf("%s: got %d bytes, %v, want %d, %v", name, len(line), err, tt.want, tt.err)
		}
	}
}

// answering returns a client of a guard that gives these replies, one a connection, and
// the requests that it gets.
func answering(t *testing.T, replies ...string) (guard.Client, <-chan guard.Request) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "socket")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	requests, done := make(chan guard.Request, len(replies)), make(chan struct{})
	go func() {
		defer close(done)
		for _, reply := range replies {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			if line, err := guard.ReadLine(conn); err == nil {
				if r, err := guard.ParseRequest(line); err == nil {
					requests <- r
				}
			}
			_, _ = io.WriteString(conn, reply)
			conn.Close()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	return guard.Client{Socket: socket, Folder: "1:2"}, requests
}

func TestClientSplitsRequests(t *testing.T) {
	t.Parallel()
	c, requests := answering(t, "{}\n", "{}\n")
	files := make([]string, guard.MaxFiles+1)
	for i := range files {
		files[i] = point
	}
	if err := c.Protect(t.Context(), files, 1500*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	for _, want := range []int{guard.MaxFiles, 1} {
		if r := <-requests; len(r.Files) != want || r.Seconds != 2 {
			t.Errorf("got %d files for %d seconds, want %d for 2", len(r.Files), r.Seconds, want)
		}
	}
}

func TestClientReleasesAll(t *testing.T) {
	t.Parallel()
	c, _ := answering(t, `{"released":7}`+"\n", `{"released":2}`+"\n", "{}\n")
	if n, err := c.Release(t.Context()); n != 9 || err != nil {
		t.Errorf("got %d %v, want 9", n, err)
	}
}

func TestClientFails(t *testing.T) {
	t.Parallel()
	for _, reply := range []string{"", "{}", "x\n", strings.Repeat("x", guard.MaxLine) + "\n"} {
		c, _ := answering(t, reply)
		_, err := c.Status(t.Context())
		if _, answered := errors.AsType[*guard.Error](err); err == nil || answered {
			t.Errorf("reply %.10q: got %v, want an error of the connection", reply, err)
		}
	}
	c, _ := answering(t, `{"error":"no","code":"missing","file":"f"}`+"\n")
	_, err := c.Status(t.Context())
	if e, ok := errors.AsType[*guard.Error](err); !ok || e.Code != guard.Missing || e.File != "f" {
		t.Errorf("got %v, want the guard's error", err)
	}
	if _, err := (guard.Client{Socket: "/nonexistent/socket"}).Status(t.Context()); err == nil {
		t.Error("no socket: got no error")
	}
}
