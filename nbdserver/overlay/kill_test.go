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

// slot is the n-th place that is written, a sector and a half, somewhere on
// the disk and never where another is.
func slot(n int) (off int64, content []byte) {
	return int64(n) * 7919 % (killSize / kib) * kib, fmt.Appendf(nil, "%0768d", n)
}

// writeUntilKilled writes slots from several goroutines and prints the number of each
// after the Sync that covers it.
func writeUntilKilled(path string) error {
	ov, err := overlay.Open(path, pattern(killSize), overlay.Options{})
	if err != nil {
		return err
	}
	var mu sync.Mutex // for the output
	errs := make(chan error)
	for worker := range 4 {
		go func() {
			for n := worker; ; n += 4 {
				off, content := slot(n)
				_, err := ov.WriteAt(content, off)
				if err == nil && n%3 == 0 {
					err = ov.Zero(off+300, 100)
				}
				if err = errors.Join(err, ov.Sync()); err != nil {
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
// to be synced is there.
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
		var acked []int
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			var n int
			_, err := fmt.Sscan(lines.Text(), &n)
			ok(t, err)
			if acked = append(acked, n); len(acked) == 20+rand.IntN(20) || len(acked) == 40 {
				ok(t, cmd.Process.Signal(syscall.SIGKILL))
			}
		}
		if err := cmd.Wait(); err == nil || len(acked) < 20 {
			t.Fatalf("got %v after %d slots, want a killed process", err, len(acked))
		}
		ov := open(t, path, disk, overlay.Options{})
		for _, n := range acked {
			off, want := slot(n)
			if n%3 == 0 {
				clear(want[300:400])
			}
			wantBytes(t, ov, off, want)
			wantBytes(t, ov, off+int64(len(want)), read(t, disk, off+int64(len(want)), kib-int64(len(want))))
		}
		ok(t, ov.Close())
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
