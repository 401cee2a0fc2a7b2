package nbdserver_test

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/holdfast-backup/holdfast/nbdserver"
)

// exchange sends requests, payloads of zeros included, without waiting for
// replies, and fails the test unless each is answered, and well.
func (c modeClient) exchange(requests []ask64) {
	c.Helper()
	sent := make(chan error, 1)
	go func() {
		for _, q := range requests {
			p := c.header(q)
			if q.command == cmdWrite {
				p = append(p, make([]byte, q.length)...)
			}
			if _, err := c.Write(p); err != nil {
				sent <- err
				return
			}
		}
		sent <- nil
	}()
	lengths := map[uint64]uint64{}
	for _, q := range requests {
		if q.command == cmdRead {
			lengths[q.cookie] = q.length
		}
	}
	for done := 0; done < len(requests); {
		errno, last := c.skip(lengths)
		if errno != 0 {
			c.Errorf("got error %d", errno)
		}
		if last {
			done++
		}
	}
	if err := <-sent; err != nil {
		c.Errorf("send: %v", err)
	}
}

// skip reads a simple reply, or a chunk of one, with the lengths of all reads by
// cookie.
func (c modeClient) skip(lengths map[uint64]uint64) (errno uint32, last bool) {
	c.Helper()
	if c.mode > simpleMode {
		k := c.chunk()
		if k.Kind >= chunkErr {
			errno = eio
		}
		return errno, k.Flags&1 == 1
	}
	p := c.read(16)
	if errno = binary.BigEndian.Uint32(p[4:]); errno == 0 {
		c.read(int(lengths[binary.BigEndian.Uint64(p[8:])]))
	}
	return errno, true
}

// TestReadsAndWritesWithoutMemory: a connection that has no memory but its own
// gets on with whatever mixture of requests: nothing that waits for memory waits
// for what waits behind it.
func TestReadsAndWritesWithoutMemory(t *testing.T) {
	t.Parallel()
	for _, m := range []mode{simpleMode, structuredMode} {
		for seed := range uint64(2) {
			t.Run(fmt.Sprintf("%v/%d", m, seed), func(t *testing.T) {
				t.Parallel()
				random := rand.New(rand.NewPCG(seed, uint64(m)))
				lengths := []uint64{1, 512, 4096, 4096, 64 << 10, 64<<10 + 1, 128 << 10, maxPieceLen, maxPieceLen, 1 << 20}
				requests := make([]ask64, 300)
				for i := range requests {
					q := &requests[i]
					*q = ask64{0, cmdRead, uint64(i), uint64(random.IntN(3 << 20)), lengths[random.IntN(len(lengths))]}
					switch n := random.IntN(100); {
					case n < 4:
						q.command = cmdCache
					case n < 40:
						q.command = cmdWrite
					case n < 50 && m > simpleMode:
						q.flags = df
					}
					if seed%2 == 1 {
						q.offset -= q.offset % maxPieceLen
					}
				}
				socket := start(t, nbdserver.Options{Memory: 1}, nbdserver.Export{Name: "disk", Disk: newRAM(make([]byte, 4<<20))})
				enterMode(dial(t, socket), "disk", m).exchange(requests)
			})
		}
	}
}

// TestWritesBehindReads: reads that are refused memory, and the writes behind
// them that hold it.
func TestWritesBehindReads(t *testing.T) {
	t.Parallel()
	socket := start(t, nbdserver.Options{Memory: 1}, nbdserver.Export{Name: "disk", Disk: newRAM(make([]byte, 4<<20))})
	for _, length := range []uint64{4096, maxPieceLen, 1 << 20} {
		var requests []ask64
		for i := range uint64(280) {
			requests = append(requests, ask64{0, cmdRead, 2 * i, 0, maxPieceLen})
			if i%16 == 0 {
				requests = append(requests, ask64{0, cmdWrite, 2*i + 1, 2 << 20, length})
			}
		}
		enterMode(dial(t, socket), "disk", structuredMode).exchange(requests)
	}
}
