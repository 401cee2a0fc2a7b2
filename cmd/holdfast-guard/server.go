package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/guard"
)

const (
	// maxClients are served at a time; others wait to be accepted.
	maxClients = 4
	// saveEvery is how often the clock is written down: what it counted since is lost with a
	// crash of the machine, and protections last that much longer.
	saveEvery = time.Hour
)

// server speaks with clients.
type server struct {
	keeper *keeper
	folder *folder
	log    *slog.Logger
}

// serve answers clients until the context ends, then waits for those at work.
func (s *server) serve(ctx context.Context, l net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	var work sync.WaitGroup
	defer work.Wait()
	defer cancel()
	work.Go(func() { s.saveOften(ctx) })
	slots := make(chan struct{}, maxClients)
	for {
		slots <- struct{}{} // clients keep theirs no longer than LineTime twice and the work
		conn, err := l.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		work.Go(func() {
			defer func() { <-slots }()
			defer conn.Close()
			s.talk(ctx, conn)
		})
	}
}

// saveOften writes the clock down until the context ends.
func (s *server) saveOften(ctx context.Context) {
	t := time.NewTicker(saveEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			if err := s.keeper.save(); err != nil {
				s.log.ErrorContext(ctx, "the clock cannot be written down", attrErr(err))
			}
		}
	}
}

// talk answers one request.
func (s *server) talk(ctx context.Context, conn net.Conn) {
	uid, err := peer(conn)
	if err != nil {
		s.log.ErrorContext(ctx, "client is not known", attrErr(err))
		return
	}
	if uid != 0 && uid != s.folder.owner {
		s.log.WarnContext(ctx, "client was turned away", slog.Uint64("uid", uint64(uid)))
		s.answer(ctx, conn, fail(guard.Denied, "", "user %d is neither root nor the owner of the data folder", uid))
		return
	}
	_ = conn.SetReadDeadline(time.Now().Add(guard.LineTime))
	defer context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Now()) })()
	line, err := guard.ReadLine(conn)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return
	}
	var request guard.Request
	if err == nil {
		request, err = guard.ParseRequest(line)
	}
	if err != nil {
		s.answer(ctx, conn, fail(guard.Invalid, "", "%v", err))
		return
	}
	if request.Folder != "" && request.Folder != s.folder.id {
		s.answer(ctx, conn, fail(guard.Foreign, "", "this guard is another data folder's"))
		return
	}
	reply := s.keeper.do(request)
	if reply.Error != "" {
		s.log.WarnContext(ctx, "request failed", slog.Uint64("uid", uint64(uid)), slog.String("op", string(request.Op)),
			slog.Int("files", len(request.Files)), slog.String("error", reply.Error))
	}
	s.answer(ctx, conn, reply)
}

func (s *server) answer(ctx context.Context, conn net.Conn, reply guard.Reply) {
	reply.Time = s.keeper.clock.Now().Truncate(time.Second)
	line, err := json.Marshal(reply)
	if err == nil {
		_ = conn.SetWriteDeadline(time.Now().Add(guard.LineTime))
		_, err = conn.Write(append(line, '\n'))
	}
	if err != nil {
		s.log.DebugContext(ctx, "client did not take its reply", attrErr(err))
	}
}

// peer returns the user at the other end, as he was when he connected.
// Source: unix(7), SO_PEERCRED.
func peer(conn net.Conn) (uid uint32, err error) {
	unixConn, ok := conn.(*net.UnixConn)
	if !ok {
		return 0, errors.New("not a unix socket")
	}
	raw, err := unixConn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	failed := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err = errors.Join(failed, err); err != nil {
		return 0, err
	}
	return cred.Uid, nil
}

func attrErr(err error) slog.Attr { return slog.String("error", err.Error()) }
