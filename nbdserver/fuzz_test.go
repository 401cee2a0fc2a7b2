package nbdserver_test

import (
	"bytes"
	"io"
	"log/slog"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/nbdserver"
)

// fuzzServer starts a server and returns a function that sends it the fuzzer's
// bytes over a pipe and drops its answers. Clean-up waits for all connections:
// one that does not end with its client makes the target hang.
func fuzzServer(f *testing.F) func(t *testing.T, input []byte) {
	l := newPipeListener()
	o := nbdserver.Options{Memory: 1 << 20, TLS: offered(f), Log: slog.New(slog.DiscardHandler)}
	secret := nbdserver.Export{Name: "secret", Disk: testExport().Disk, Allow: []string{"nobody"}}
	serve(f, l, o, append(handshakeExports(), testExport(), secret)...)
	return func(t *testing.T, input []byte) {
		nc := l.dial()
		defer nc.Close()
		nc.SetDeadline(time.Now().Add(time.Minute))
		drained := make(chan error)
		go func() {
			_, err := io.Copy(io.Discard, nc)
			drained <- err
		}()
		nc.Write(input) // fails when the server has had enough
		// The server answers all that came before it hangs up over this one.
		nc.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
		nc.Write(request{command: cmdDisc}.wire())
		nc.SetReadDeadline(time.Now())
		<-drained
	}
}

func FuzzHandshake(f *testing.F) {
	for _, seed := range [][]byte{
		option(optList), option(optAbort), option(optExportName, "disk"), option(optGo, info("disk", 0, 1, 2, 3)),
		option(optInfo, info("", 3)), option(optStartTLS), option(99, "data"),
		wire(option(optStructured), option(optSetMeta, meta("disk", "base:allocation", "base:")), option(optGo, info("disk"))),
		option(optListMeta, meta("disk")), option(optListMeta, meta("vm/disk 1", "x-days:", "x-days:even:")),
		wire(option(optExtended), option(optStructured), option(optSetMeta, meta("vm/disk 1", "x-days:mon", "x-days:any-1")), option(optGo, info("vm/disk 1"))),
		wire(option(optExtended), option(optExportName, "disk")), option(optGo, info("secret")),
		wire(option(optStartTLS, "data"), option(optStartTLS), "\x16\x03\x01\x00\x05\x01\x00\x00\x01\x03"),
	} {
		f.Add(wire(fixedNewstyle|noZeroes, seed))
	}
	f.Fuzz(fuzzServer(f))
}

func FuzzTransmission(f *testing.F) {
	for command := range uint16(9) {
		q := request{command: command, cookie: 1, offset: piece, length: 5 * piece}
		f.Add(wire(q.wire(), q.wire()))
	}
	f.Add(wire(request{command: cmdWrite, length: 5}.wire(), "12345", request{flags: reqOne, command: cmdStatus, length: 1 << 31}.wire()))
	f.Add(bytes.Repeat(request{flags: df, command: cmdRead, length: testSize}.wire(), 20))
	enter := wire(fixedNewstyle|noZeroes, option(optStructured), option(optSetMeta, meta("disk", "base:allocation")), option(optGo, info("disk")))
	fuzz := fuzzServer(f)
	f.Fuzz(func(t *testing.T, input []byte) { fuzz(t, wire(enter, input)) })
}
