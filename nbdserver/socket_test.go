package nbdserver_test

import (
	"bytes"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/nbdserver"
)

// TestBusyConnection changes between being busy, being quiet and not taking
// replies, over both kinds of sockets, and removes the export in the middle.
func TestBusyConnection(t *testing.T) {
	t.Parallel()
	const length, unread = 4096, 2000 // more than a socket's buffer holds
	content := testBytes()
	for _, network := range []string{"unix", "tcp"} {
		t.Run(network, func(t *testing.T) {
			t.Parallel()
			l, err := nbdserver.Listen(network, map[string]string{"unix": filepath.Join(t.TempDir(), "nbd"), "tcp": "127.0.0.1:0"}[network])
			if err != nil {
				t.Fatal(err)
			}
			s := serve(t, l, nbdserver.Options{}, testExport())
			nc, err := net.Dial(network, l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			c := greet(t, nc).enter("disk", false)
			query := func(i int) request {
				return request{command: cmdRead, cookie: uint64(i), offset: uint64(i % 16 * piece), length: length}
			}
			check := func(r reply) {
				t.Helper()
				if off := r.cookie % 16 * piece; r.errno != 0 || !bytes.Equal(r.data, content[off:off+length]) {
					t.Fatalf("read at %d: got error %d or wrong bytes", off, r.errno)
				}
			}
			for range 3 {
				for i := range 200 {
					check(c.ask(query(i), false))
				}
				time.Sleep(20 * time.Millisecond) // quiet
				for i := range 200 {
					check(c.ask(query(i), false))
				}
				var all []byte
				for i := range unread {
					all = append(all, query(i).wire()...)
				}
				c.send(all)
				time.Sleep(20 * time.Millisecond) // the server cannot go on writing
				seen := map[uint64]bool{}
				for range unread {
					r := c.simple(length)
					check(r)
					seen[r.cookie] = true
				}
				if len(seen) != unread {
					t.Fatalf("got %d different replies, want %d", len(seen), unread)
				}
			}
			for i := range 200 {
				check(c.ask(query(i), false))
			}
			if err := s.Remove("disk"); err != nil {
				t.Errorf("Remove: %v", err)
			}
			c.wantClosed()
		})
	}
}
