package nbdserver_test

import (
	"math"
	"testing"

	"github.com/holdfast-backup/holdfast/nbdserver"
)

// TestEmptyStatusPayload: a block status that announces a payload and has none
// names no contexts, whatever else it says, and is refused as such.
func TestEmptyStatusPayload(t *testing.T) {
	t.Parallel()
	socket := start(t, nbdserver.Options{}, testExport())
	for _, contexts := range [][]string{nil, {allocationContext}} {
		c := enterMode(dial(t, socket), "disk", extendedMode, contexts...)
		for _, q := range []ask64{
			{payloadLen, cmdStatus, 1, 0, 0},
			{payloadLen | reqOne, cmdStatus, 2, 0, 0},
			{payloadLen, cmdStatus, 3, hugeOffset, 0},
			{payloadLen, cmdStatus, 4, 0, 8},
		} {
			if a := c.ask(q, make([]byte, q.length)); a.errno != einval {
				t.Errorf("contexts %q, %+v: got error %d, want %d", contexts, q, a.errno, einval)
			}
		}
		if a := c.ask(ask64{0, cmdRead, 5, 0, 512}, nil); a.errno != 0 {
			t.Errorf("contexts %q: the next read: got error %d", contexts, a.errno)
		}
	}
}

// TestExtendedViolations: what extended headers forbid ends the connection, and
// a payload that a command does not take is passed over.
func TestExtendedViolations(t *testing.T) {
	t.Parallel()
	socket := start(t, quiet, nbdserver.Export{Name: "disk", Disk: newRAM(make([]byte, 1<<20))})
	for _, q := range []ask64{
		{0, cmdWrite, 1, 0, maxRequest + 1},
		{payloadLen, cmdWrite, 1, 0, maxRequest + 1},
		{payloadLen, cmdRead, 1, 0, math.MaxUint64},
	} {
		c := enterMode(dial(t, socket), "disk", extendedMode)
		c.send(c.header(q))
		c.wantClosed()
	}
	c := enterMode(dial(t, socket), "disk", extendedMode)
	c.send(request{command: cmdRead, length: 512}.wire(), make([]byte, 4))
	c.wantClosed()
	c = enterMode(dial(t, socket), "disk", extendedMode)
	if a := c.ask(ask64{payloadLen, cmdWrite, 1, 1 << 20, maxRequest}, make([]byte, maxRequest)); a.errno != enospc {
		t.Errorf("the longest payload: got error %d, want %d", a.errno, enospc)
	}
}
