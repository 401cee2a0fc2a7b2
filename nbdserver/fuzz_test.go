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
func fuzzServer(f *testing.F, e nbdserver.Export) func(t *testing.T, input []byte) {
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
	f.Fuzz(fuzzServer(f, testExport()))
}

// FuzzTransmission sends requests in each mode, the first byte says which, to a
// disk that can be written.
func FuzzTransmission(f *testing.F) {
	for m := range byte(3) {
		for command := range uint16(9) {
			q := ask64{0, command, 1, piece, 5 * piece}
			header := modeClient{mode: mode(m)}.header
			if m == byte(extendedMode) && command == cmdWrite {
				q.flags = payloadLen
			}
			f.Add(m, wire(header(q), header(q)))
			q.length = 5
			f.Add(m, wire(header(q), "12345", header(ask64{reqOne, cmdStatus, 1, 0, 1 << 31})))
			f.Add(m, bytes.Repeat(header(ask64{df, cmdRead, 1, 0, testSize}), 20))
		}
	}
	h := modeClient{mode: extendedMode}.header
	f.Add(byte(extendedMode), wire(h(ask64{payloadLen, cmdStatus, 1, 0, 12}), uint64(testSize), uint32(1)))
	f.Add(byte(extendedMode), wire(h(ask64{payloadLen, cmdStatus, 1, 0, 0}), h(ask64{payloadLen, cmdStatus, 1, 1 << 63, 0})))
	f.Add(byte(extendedMode+1), wire(h(ask64{payloadLen, cmdStatus, 1, 0, 0}), h(ask64{payloadLen, cmdStatus, 1, 1 << 63, 0})))
	enter := option(optGo, info("disk"))
	set := option(optSetMeta, meta("disk", "base:allocation"))
	prefix := map[byte][]byte{0: enter, 1: wire(option(optStructured), set, enter), 2: wire(option(optExtended), set, enter), 3: wire(option(optExtended), enter)}
	fuzz := fuzzServer(f, nbdserver.Export{Name: "disk", Disk: newRAM(testBytes())})
	f.Fuzz(func(t *testing.T, m byte, input []byte) {
		fuzz(t, wire(fixedNewstyle|noZeroes, prefix[m%4], input))
	})
}
