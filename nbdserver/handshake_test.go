package nbdserver_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/holdfast-backup/holdfast/nbdserver"
)

const handshakeSize = 1<<20 + 100

// days are contexts of which some are listed and others only understood.
type days struct{}

func (days) List() []string { return []string{"x-days:mon", "x-days:even:tue", "x-days:even:thu"} }

func (d days) Open(name string) (nbdserver.Context, bool) {
	return d, slices.Contains(d.List(), name) || strings.HasPrefix(name, "x-days:any-")
}

func (days) Status(_ context.Context, off, length int64) iter.Seq2[nbdserver.Status, error] {
	return func(yield func(nbdserver.Status, error) bool) {
		yield(nbdserver.Status{Off: off, Len: length, Flags: 7}, nil)
	}
}

func handshakeExports() []nbdserver.Export {
	d := disk{ReaderAt: bytes.NewReader(make([]byte, handshakeSize)), size: handshakeSize}
	return []nbdserver.Export{
		{Name: "vm/disk 1", Description: "the first disk", Disk: d, BlockSize: 65536, Contexts: days{}},
		{Name: "other", Disk: d},
	}
}

func TestOptions(t *testing.T) {
	t.Parallel()
	exportInfo := func(flags uint16) string { return string(wire(uint16(0), uint64(handshakeSize), flags)) }
	ack := func(n uint32) optReply { return optReply{n, repAck, ""} }
	named := func(n, id uint32, name string) optReply { return optReply{n, repMeta, string(wire(id, name))} }
	allocation := func(n, id uint32) optReply { return named(n, id, "base:allocation") }
	manyQueries := slices.Repeat([]string{"x:y"}, 129)
	var manyContexts []string
	var manySelected []optReply
	for i := range uint32(17) {
		manyContexts = append(manyContexts, fmt.Sprintf("x-days:any-%d", i))
		manySelected = append(manySelected, named(optSetMeta, i+1, manyContexts[i]))
	}

	for _, tt := range []struct {
		name string
		send []byte
		want []optReply
		ends bool // the server hangs up afterwards
	}{
		{"list", option(optList), []optReply{
			{optList, repServer, string(wire(str("other")))},
			{optList, repServer, string(wire(str("vm/disk 1"), "the first disk"))},
			ack(optList),
		}, false},
		{"list with data", option(optList, "x"), []optReply{{optList, errInvalid, ""}}, false},
		{"peek export", option(4), []optReply{{4, errUnsup, ""}}, false},
		{"TLS", option(optStartTLS), []optReply{{optStartTLS, errPolicy, ""}}, false},
		{"extended headers", option(optExtended), []optReply{ack(optExtended)}, false},
		{"extended headers with data", option(optExtended, "x"), []optReply{{optExtended, errInvalid, ""}}, false},
		{"extended headers twice", slices.Repeat(option(optExtended), 2), []optReply{ack(optExtended), {optExtended, errInvalid, ""}}, false},
		{"extended headers after structured replies", wire(option(optStructured), option(optExtended)), []optReply{ack(optStructured), ack(optExtended)}, false},
		{"structured replies after extended headers", wire(option(optExtended), option(optStructured)), []optReply{
			ack(optExtended), {optStructured, errExtended, ""},
		}, false},
		{"unknown option with data", option(0xdeadbeef, strings.Repeat("x", maxOptionData)), []optReply{{0xdeadbeef, errUnsup, ""}}, false},
		{"option too long", wire("IHAVEOPT", uint32(99), uint32(maxOptionData+1)), nil, true},
		{"wrong magic", wire("IHAVEOPX", optList, uint32(0)), nil, true},
		{"abort", option(optAbort), []optReply{ack(optAbort)}, true},
		{"abort with data", option(optAbort, "bye"), []optReply{ack(optAbort)}, true},
		{"64 options", slices.Concat(slices.Repeat(option(99), 64), option(99)), slices.Repeat([]optReply{{99, errUnsup, ""}}, 64), true},

		{"info", option(optInfo, info("other")), []optReply{{optInfo, repInfo, exportInfo(readOnlyFlags)}, ack(optInfo)}, false},
		{"info of everything", option(optInfo, info("vm/disk 1", 0, 1, 2, 3, 77)), []optReply{
			{optInfo, repInfo, exportInfo(readOnlyFlags)},
			{optInfo, repInfo, string(wire(uint16(1), "vm/disk 1"))},
			{optInfo, repInfo, string(wire(uint16(2), "the first disk"))},
			{optInfo, repInfo, string(wire(uint16(3), uint32(1), uint32(65536), uint32(maxRequest)))},
			ack(optInfo),
		}, false},
		{"info without a description, default block size", option(optInfo, info("other", 2, 3)), []optReply{
			{optInfo, repInfo, exportInfo(readOnlyFlags)},
			{optInfo, repInfo, string(wire(uint16(3), uint32(1), uint32(4096), uint32(maxRequest)))},
			ack(optInfo),
		}, false},
		{"info with structured replies", wire(option(optStructured), option(optInfo, info("other"))), []optReply{
			ack(optStructured), {optInfo, repInfo, exportInfo(withDF)}, ack(optInfo),
		}, false},
		{"info of a missing export", option(optInfo, info("missing")), []optReply{{optInfo, errUnknown, ""}}, false},
		{"no default export among two", option(optInfo, info("")), []optReply{{optInfo, errUnknown, ""}}, false},
		{"info, then go for a missing export", wire(option(optInfo, info("other")), option(optGo, info("missing")), option(optAbort)), []optReply{
			{optInfo, repInfo, exportInfo(readOnlyFlags)}, ack(optInfo), {optGo, errUnknown, ""}, ack(optAbort),
		}, true},
		{"empty info", option(optInfo), []optReply{{optInfo, errInvalid, ""}}, false},
		{"name longer than the option", option(optInfo, uint32(9), "other", uint16(0)), []optReply{{optInfo, errInvalid, ""}}, false},
		{"huge name length", option(optInfo, uint32(0xffffffff), "other", uint16(0)), []optReply{{optInfo, errInvalid, ""}}, false},
		{"name beyond 4096 bytes", option(optInfo, info(strings.Repeat("x", 4097))), []optReply{{optInfo, errInvalid, ""}}, false},
		{"name of 4096 bytes", option(optInfo, info(strings.Repeat("x", 4096))), []optReply{{optInfo, errUnknown, ""}}, false},
		{"fewer information requests than said", option(optInfo, str("other"), uint16(2), uint16(3)), []optReply{{optInfo, errInvalid, ""}}, false},
		{"bytes after the information requests", option(optGo, info("other"), "x"), []optReply{{optGo, errInvalid, ""}}, false},

		{"structured replies with data", option(optStructured, "x"), []optReply{{optStructured, errInvalid, ""}}, false},
		{"set contexts without structured replies", option(optSetMeta, meta("other", "base:allocation")), []optReply{{optSetMeta, errInvalid, ""}}, false},
		{"set contexts", wire(option(optStructured), option(optSetMeta, meta("other", "x:y", "base:allocation", "base:allocation"))), []optReply{
			ack(optStructured), allocation(optSetMeta, 1), ack(optSetMeta),
		}, false},
		{"set contexts by wildcard", wire(option(optStructured), option(optSetMeta, meta("other", "base:"))), []optReply{ack(optStructured), ack(optSetMeta)}, false},
		{"set no context", wire(option(optStructured), option(optSetMeta, meta("other"))), []optReply{ack(optStructured), ack(optSetMeta)}, false},
		{"set contexts of a missing export", wire(option(optStructured), option(optSetMeta, meta("missing", "base:allocation"))), []optReply{
			ack(optStructured), {optSetMeta, errUnknown, ""},
		}, false},
		{"list all contexts", option(optListMeta, meta("other")), []optReply{allocation(optListMeta, 0), ack(optListMeta)}, false},
		{"list contexts by wildcard", option(optListMeta, meta("other", "base:")), []optReply{allocation(optListMeta, 0), ack(optListMeta)}, false},
		{"list contexts by name", option(optListMeta, meta("other", "base:allocation")), []optReply{allocation(optListMeta, 0), ack(optListMeta)}, false},
		{"list unknown contexts", option(optListMeta, meta("other", "qemu:", "base:unknown")), []optReply{ack(optListMeta)}, false},
		{"query without a colon", option(optListMeta, meta("other", "base")), []optReply{{optListMeta, errInvalid, ""}}, false},
		{"query beyond 4096 bytes", option(optListMeta, meta("other", "x:"+strings.Repeat("y", 4095))), []optReply{{optListMeta, errInvalid, ""}}, false},
		{"query cut short", option(optListMeta, str("other"), uint32(2), str("x:y")), []optReply{{optListMeta, errInvalid, ""}}, false},
		{"too many queries", option(optListMeta, meta("other", manyQueries...)), []optReply{{optListMeta, errBig, ""}}, false},
		{"list contexts of the export", option(optListMeta, meta("vm/disk 1")), []optReply{
			allocation(optListMeta, 0), named(optListMeta, 0, "x-days:mon"), named(optListMeta, 0, "x-days:even:tue"),
			named(optListMeta, 0, "x-days:even:thu"), ack(optListMeta),
		}, false},
		{"list contexts by namespace", option(optListMeta, meta("vm/disk 1", "x-days:", "x-days:even:tue", "x-day:")), []optReply{
			named(optListMeta, 0, "x-days:mon"), named(optListMeta, 0, "x-days:even:tue"),
			named(optListMeta, 0, "x-days:even:thu"), ack(optListMeta),
		}, false},
		{"list contexts by prefix", option(optListMeta, meta("vm/disk 1", "x-days:even:")), []optReply{
			named(optListMeta, 0, "x-days:even:tue"), named(optListMeta, 0, "x-days:even:thu"), ack(optListMeta),
		}, false},
		{"list a context that is there but not listed", option(optListMeta, meta("vm/disk 1", "x-days:any-5", "x-days:e")), []optReply{
			ack(optListMeta),
		}, false},
		{"set contexts of the export", wire(option(optExtended), option(optSetMeta, meta("vm/disk 1",
			"x-days:even:tue", "x-days:none", "base:allocation", "x-days:even:tue", "x-days:even:", "x-days:any-7"))), []optReply{
			ack(optExtended), named(optSetMeta, 1, "x-days:even:tue"), allocation(optSetMeta, 2), named(optSetMeta, 3, "x-days:any-7"), ack(optSetMeta),
		}, false},
		{"set 16 contexts", wire(option(optStructured), option(optSetMeta, meta("vm/disk 1", manyContexts[:16]...))), slices.Concat(
			[]optReply{ack(optStructured)}, manySelected[:16], []optReply{ack(optSetMeta)}), false},
		{"set 17 contexts", wire(option(optStructured), option(optSetMeta, meta("vm/disk 1", manyContexts...))), []optReply{
			ack(optStructured), {optSetMeta, errBig, ""},
		}, false},
		{"millions of queries said", option(optListMeta, str("other"), uint32(0xffffffff)), []optReply{{optListMeta, errBig, ""}}, false},

		{"export name, missing", option(optExportName, "missing"), nil, true},
		{"export name with extended headers", wire(option(optExtended), option(optExportName, "other")), []optReply{ack(optExtended)}, true},
		{"export name, none", option(optExportName), nil, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			c := dial(t, start(t, nbdserver.Options{}, handshakeExports()...))
			c.send(fixedNewstyle|noZeroes, tt.send)
			for i, want := range tt.want {
				if got := c.optReply(); got != want {
					t.Errorf("reply %d: got %#v, want %#v", i, got, want)
				}
			}
			if tt.ends {
				c.wantClosed()
				return
			}
			c.send(option(99)) // the conversation goes on
			c.wantReply(99, errUnsup)
		})
	}
}

func TestClientFlags(t *testing.T) {
	t.Parallel()
	socket := start(t, nbdserver.Options{}, handshakeExports()...)
	c := dial(t, socket)
	c.send(uint32(1 << 2))
	c.wantClosed()

	for flags, zeroes := range map[uint32]int{0: 124, fixedNewstyle: 124, fixedNewstyle | noZeroes: 0} {
		c := dial(t, socket)
		c.send(flags, option(optExportName, "other"))
		want := wire(uint64(handshakeSize), readOnlyFlags, make([]byte, zeroes))
		if got := c.read(len(want)); !bytes.Equal(got, want) {
			t.Errorf("client flags %#x: got %x, want %x", flags, got, want)
		}
		if r := c.ask(request{command: cmdRead, cookie: 1, length: 10}, false); r.errno != 0 {
			t.Errorf("client flags %#x: read: got error %d", flags, r.errno)
		}
	}
}

func TestDefaultExport(t *testing.T) {
	t.Parallel()
	c := dial(t, start(t, nbdserver.Options{}, handshakeExports()[:1]...))
	c.send(fixedNewstyle, option(optInfo, info("", 1)))
	c.wantReply(optInfo, repInfo)
	if got, want := c.optReply().Data, string(wire(uint16(1), "vm/disk 1")); got != want {
		t.Errorf("canonical name: got %q, want %q", got, want)
	}
	c.wantReply(optInfo, repAck)
	c.send(option(optGo, info("")))
	c.wantReply(optGo, repInfo)
	c.wantReply(optGo, repAck)
	if r := c.ask(request{command: cmdRead, cookie: 1, length: 10}, false); r.errno != 0 {
		t.Errorf("read: got error %d", r.errno)
	}
}

// TestContextsBelongToTheirExport selects a context for one export and enters
// another, or enters the same one after a later selection failed.
func TestContextsBelongToTheirExport(t *testing.T) {
	t.Parallel()
	socket := start(t, nbdserver.Options{}, handshakeExports()...)
	for _, tt := range []struct {
		name   string
		set    []byte
		enter  string
		answer uint32
	}{
		{"same export", option(optSetMeta, meta("other", "base:allocation")), "other", 0},
		{"another export", option(optSetMeta, meta("other", "base:allocation")), "vm/disk 1", einval},
		{"selection withdrawn", wire(option(optSetMeta, meta("other", "base:allocation")), option(optSetMeta, meta("other"))), "other", einval},
		{"last selection failed", wire(option(optSetMeta, meta("other", "base:allocation")), option(optSetMeta, "x")), "other", einval},
		{"only listed", option(optListMeta, meta("other", "base:allocation")), "other", einval},
	} {
		c := dial(t, socket)
		c.send(fixedNewstyle, option(optStructured), tt.set, option(optGo, info(tt.enter)))
		for r := c.optReply(); r.Option != optGo || r.Kind != repAck; r = c.optReply() {
			continue
		}
		if r := c.ask(request{command: cmdStatus, cookie: 1, length: 512}, true); r.errno != tt.answer {
			t.Errorf("%s: got error %d, want %d", tt.name, r.errno, tt.answer)
		}
	}
}

// hungContexts are contexts whose disk does not answer.
type hungContexts struct{ opened, let chan struct{} }

func (hungContexts) List() []string { return []string{"x:listed"} }

func (h hungContexts) Open(string) (nbdserver.Context, bool) {
	h.opened <- struct{}{}
	<-h.let
	return nil, false
}

// TestHungContexts: a list opens nothing. A context that hangs is waited for no
// longer than a handshake, or than the server that ends, and the disk is busy then.
func TestHungContexts(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := hungContexts{make(chan struct{}, 100), make(chan struct{})}
		l, stop := serveInBubble(t, quiet, nbdserver.Export{Name: "disk", Disk: newCounter(), Contexts: h})
		for _, query := range []string{"x:listed", "x:other"} {
			c := greet(t, l.dial())
			c.send(fixedNewstyle|noZeroes, option(optListMeta, meta("disk", query)))
			if query == "x:listed" {
				c.wantReply(optListMeta, repMeta)
			}
			c.wantReply(optListMeta, repAck)
			if len(h.opened) > 0 {
				t.Error("a list opens contexts")
			}
			began := time.Now()
			c.send(option(optStructured))
			c.wantReply(optStructured, repAck)
			c.send(option(optSetMeta, meta("disk", query)))
			c.wantClosed()
			if got := time.Since(began); got < 10*time.Second || got > 20*time.Second {
				t.Errorf("the handshake ended after %v", got)
			}
			<-h.opened
		}
		c := greet(t, l.dial())
		c.send(fixedNewstyle|noZeroes, option(optStructured))
		c.wantReply(optStructured, repAck)
		c.send(option(optSetMeta, meta("disk", "x:y")))
		<-h.opened
		if err := stop(); !errors.Is(err, nbdserver.ErrBusy) {
			t.Errorf("Serve: got %v, want %v", err, nbdserver.ErrBusy)
		}
		close(h.let)
	})
}
