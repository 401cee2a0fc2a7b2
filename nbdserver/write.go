package nbdserver

import (
	"context"
	"sync"

	"github.com/holdfast-backup/holdfast/nbdserver/internal/wire"
)

// zeroes is what a write of zeros that must not be a hole writes.
var zeroes [pieceLen]byte

// write answers NBD_CMD_WRITE, or a piece of it. b holds the payload, and nothing
// afterwards.
func (c *conn) write(j job, b *buffer) error {
	_, err := c.writer.WriteAt(b.b, j.off)
	b.b = b.b[:0]
	return c.persist(j, err)
}

// change answers a request that changes the disk without a payload.
func (c *conn) change(j job, do func(off, length int64) error) error {
	var err error
	if j.length > 0 {
		err = do(j.off, j.length)
	}
	return c.persist(j, err)
}

// writeZeroes answers NBD_CMD_WRITE_ZEROES.
func (c *conn) writeZeroes(ctx context.Context, j job) error {
	if j.Flags&wire.CmdFlagNoHole == 0 {
		return c.change(j, c.writer.Zero)
	}
	end := j.off + j.length
	for pos := j.off; pos < end; {
		if err := c.pause(ctx, pos > j.off); err != nil {
			return err
		}
		n := min(end-pos, pieceLen-pos%pieceLen)
		if _, err := c.writer.WriteAt(zeroes[:n], pos); err != nil {
			return err
		}
		pos += n
	}
	return c.persist(j, nil)
}

// persist makes durable what a request with the flag FUA has changed, if that
// worked.
func (c *conn) persist(j job, err error) error {
	if err != nil || j.Flags&wire.CmdFlagFUA == 0 {
		return err
	}
	return c.sync()
}

// sync answers NBD_CMD_FLUSH.
func (c *conn) sync() error {
	if c.writer == nil {
		return nil
	}
	return c.export.syncs.join(c.writer.Sync)
}

// syncs lets those who want a disk to be durable share the work: a call of Sync
// serves all who came before it began.
type syncs struct {
	mu      sync.Mutex // guards what follows
	current *syncRound // the last that has begun
	next    *syncRound // what those who come now wait for; nil if nobody has come yet
}

type syncRound struct {
	done chan struct{} // closed when err is set
	err  error
}

// join returns the result of a call of sync that began after join was called.
func (s *syncs) join(sync func() error) error {
	s.mu.Lock()
	if r := s.next; r != nil {
		s.mu.Unlock()
		<-r.done
		return r.err
	}
	r := &syncRound{done: make(chan struct{})}
	before := s.current
	s.next = r
	s.mu.Unlock()
	if before != nil {
		<-before.done
	}
	s.mu.Lock()
	s.current, s.next = r, nil
	s.mu.Unlock()
	r.err = sync()
	close(r.done)
	return r.err
}
