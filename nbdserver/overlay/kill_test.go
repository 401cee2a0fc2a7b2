package overlay_test

import (
	"bufio"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"github.com/holdfast-backup/holdfast/nbdserver/overlay"
)

// killVariable makes the test binary write to the overlay that it names, until it is
// killed.
const killVariable = "HOLDFAST_OVERLAY_KILL"

const killSize = page + mib

func TestMain(m *testing.M) {
	if path := os.Getenv(killVariable); path != "" {
		if err := writeUntilKilled(path); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// slot is the n-th place that is written, a sector and a half, in a block of its own
// and the next, which is trimmed after every fifth.
func slot(n int) (off int64, content []byte) {
	off = int64(n) * 7919 % (killSize / (2 * block)) * 2 * block
	return off + int64(n%4)*kib, fmt.Appendf(nil, "%0768d", n)
}

// changeSlot writes the slot n, zeroes a part of every third, and trims every seventh
// again, and the block after every fifth.
func changeSlot(ov *overlay.Overlay, n int) error {
	off, content := slot(n)
	_, err := ov.WriteAt(content, off)
	if err == nil && n%3 == 0 {
		err = ov.Zero(off+300, 100)
	}
	if err == nil && n%7 == 0 {
		err = ov.Trim(off/block*block, block)
	}
	if err == nil && n%5 == 0 {
		err = ov.Trim(off/block*block+block, block)
	}
	return err
}

// wantSlot checks both blocks of a slot.
func wantSlot(t *testing.T, ov *overlay.Overlay, disk pattern, n int) {
	t.Helper()
	off, content := slot(n)
	start := off / block * block
	want := read(t, disk, start, 2*block)
	copy(want[off-start:], content)
	if n%3 == 0 {
		clear(want[off-start+300:][:100])
	}
	if n%7 == 0 {
		clear(want[:block])
	}
	if n%5 == 0 {
		clear(want[block:])
	}
	wantBytes(t, ov, start, want)
}

// writeUntilKilled changes slots from several goroutines and prints the number of each
// when that has been answered. One of them syncs now and then.
func writeUntilKilled(path string) error {
	ov, err := overlay.Open(path, pattern(killSize), overlay.Options{})
	if err != nil {
		return err
	}
	var mu sync.Mutex // for the output
	errs := make(chan error)
	for worker := range 4 {
		go func() {
			for n := worker; n < killSize/(2*block); n += 4 {
				err := changeSlot(ov, n)
				if err == nil && n%40 == 0 {
					err = ov.Sync()
				}
				if err != nil {
					errs <- err
					return
				}
				mu.Lock()
				fmt.Println(n)
				mu.Unlock()
			}
		}()
	}
	return <-errs
}

// TestKill kills a process that writes, on the real file system: all that it told
// to be answered is there.
func TestKill(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "overlay")
	disk := pattern(killSize)
	ok(t, create(t, path, disk, overlay.Options{}).Close())
	for range 3 {
		cmd := exec.CommandContext(t.Context(), os.Args[0])
		cmd.Env = append(os.Environ(), killVariable+"="+path)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		ok(t, err)
		ok(t, cmd.Start())
		var answered []int
		enough := 300 + rand.IntN(300)
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			var n int
			_, err := fmt.Sscan(lines.Text(), &n)
			ok(t, err)
			if answered = append(answered, n); len(answered) == enough {
				ok(t, cmd.Process.Signal(syscall.SIGKILL))
			}
		}
		if err := cmd.Wait(); err == nil || len(answered) < enough {
			t.Fatalf("got %v after %d slots, want a killed process", err, len(answered))
		}
		ov := open(t, path, disk, overlay.Options{})
		for _, n := range answered {
			wantSlot(t, ov, disk, n)
		}
		ok(t, ov.Close())
		ok(t, overlay.Remove(path, overlay.Options{}))
		ok(t, create(t, path, disk, overlay.Options{}).Close())
	}
}

// TestFull fills a real file system: what does not fit is refused, and what was
// written can still be synced.
func TestFull(t *testing.T) {
	t.Parallel()
	dir := tmpfs(t, "8m")
	path := filepath.Join(dir, "overlay")
	disk := pattern(1 << 30)
	for _, reserve := range []int64{0, 1, mib} { // of 1 %, next to none, and more
		ov := create(t, path, disk, overlay.Options{Reserve: reserve})
		var written []int64
		var err error
		for off := int64(64 * kib); off < disk.Size(); off += 10*mib + block {
			for part := range int64(64) {
				at := off + part*2*block
				if _, err = ov.WriteAt(bytesOf(byte(at/block), block), at); err != nil {
					break
				}
				written = append(written, at)
			}
			if err != nil {
				break
			}
		}
		if !errors.Is(err, syscall.ENOSPC) {
			t.Fatalf("got %v, want %v", err, syscall.ENOSPC)
		}
		if got, want := ov.Used(), int64(len(written))*block; got != want || want < 4*mib {
			t.Errorf("got %d bytes used, want %d", got, want)
		}
		ok(t, ov.Sync())
		_, err = ov.WriteAt(bytesOf(1, 2*mib), disk.Size()-4*mib)
		if !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("got %v, want %v", err, syscall.ENOSPC)
		}
		wantBytes(t, ov, disk.Size()-4*mib, read(t, disk, disk.Size()-4*mib, 2*mib))
		ok(t, ov.Trim(written[0], 2*mib)) // makes room
		for _, at := range written[:48] { // not all: the map has taken some
			write(t, ov, bytesOf(byte(at/block), block), at)
		}
		ok(t, ov.Close())
		ov = open(t, path, disk, overlay.Options{Reserve: reserve})
		for _, at := range written {
			if at >= written[0]+2*mib || at <= written[47] {
				wantBytes(t, ov, at, bytesOf(byte(at/block), block))
			}
		}
		ok(t, ov.Close())
		ok(t, overlay.Remove(path, overlay.Options{}))
	}
}
