package guard

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Client asks a guard.
type Client struct {
	Socket string // its path
	// Folder is the FolderID of the data folder; "" for a client that only asks for the status.
	Folder string
}

// New returns a client for a data folder. It does not connect yet.
func New(socket, data string) (Client, error) {
	var st unix.Stat_t
	if err := unix.Stat(data, &st); err != nil {
		return Client{}, &os.PathError{Op: "stat", Path: data, Err: err}
	}
	return Client{Socket: socket, Folder: FolderID(&st)}, nil
}

// Protect makes files immutable for at least d from now on, in as many requests as it
// takes. An error may be an [Error]; some of the files may be immutable then.
func (c Client) Protect(ctx context.Context, files []string, d time.Duration) error {
	// A protection that ends a moment after what it is for does no harm.
	seconds := int64((min(d, MaxDuration) + time.Second - 1) / time.Second)
	for some := range slices.Chunk(files, MaxFiles) {
		if _, err := c.call(ctx, Request{Op: Protect, Files: some, Seconds: seconds}); err != nil {
			return err
		}
	}
	return nil
}

// Release makes all files writable again whose time is over, and returns how many.
func (c Client) Release(ctx context.Context) (int, error) {
	released := 0
	for {
		reply, err := c.call(ctx, Request{Op: Release})
		released += reply.Released
		if err != nil || reply.Released == 0 {
			return released, err
		}
	}
}

// Status returns how many files are protected, and of the named ones, MaxFiles at most,
// until when.
func (c Client) Status(ctx context.Context, files ...string) (Reply, error) {
	return c.call(ctx, Request{Op: Status, Files: files})
}

func (c Client) call(ctx context.Context, r Request) (Reply, error) {
	ctx, cancel := context.WithTimeout(ctx, WorkTime)
	defer cancel()
	reply, err := c.exchange(ctx, r)
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return reply, fmt.Errorf("ask the guard at %s: %w", c.Socket, err)
	}
	if reply.Error != "" {
		return reply, &Error{Code: reply.Code, File: reply.File, Text: "guard: " + reply.Error}
	}
	return reply, nil
}

func (c Client) exchange(ctx context.Context, r Request) (reply Reply, err error) {
	r.Version, r.Folder = Version, c.Folder
	line, err := json.Marshal(r)
	if err != nil {
		return reply, err
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", c.Socket)
	if err != nil {
		return reply, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	if _, err := conn.Write(append(line, '\n')); err != nil {
		return reply, err
	}
	answer, err := ReadLine(conn)
	if err != nil {
		return reply, err
	}
	if err := json.Unmarshal(answer, &reply); err != nil {
		return reply, fmt.Errorf("reply is not understood: %w", err)
	}
	return reply, nil
}

// ErrTooLong means that a line has more than MaxLine bytes.
var ErrTooLong = fmt.Errorf("a line has more than %d bytes", MaxLine)

// ReadLine reads one line of at most MaxLine bytes and returns it without its newline. A
// line that is cut short is [io.ErrUnexpectedEOF].
func ReadLine(r io.Reader) ([]byte, error) {
	line, err := bufio.NewReader(io.LimitReader(r, MaxLine)).ReadBytes('\n')
	switch {
	case err == nil:
		return line[:len(line)-1], nil
	case errors.Is(err, io.EOF) && len(line) == MaxLine:
		return nil, ErrTooLong
	case errors.Is(err, io.EOF):
		return nil, io.ErrUnexpectedEOF
	}
	return nil, err
}
