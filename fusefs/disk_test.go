package fusefs_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const diskPath = pointDir + "/disks/vda.raw"

// sparseDisk has data at the start, in the middle off page boundaries, and none at its odd end.
func sparseDisk() *memDisk {
	return newDisk(24*mib+512, 0, 128<<10, 3*mib, 7*mib, 9*mib+100, 9*mib+5000, 20*mib, 20*mib+4096)
}

func TestReads(t *testing.T) {
	t.Parallel()
	disk := sparseDisk()
	m, _ := mount(t, oneDisk(disk))
	f := open(t, filepath.Join(m.Dir(), diskPath))
	direct, err := os.OpenFile(f.Name(), os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer direct.Close()
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range 200 {
		off, n := rng.Int64N(disk.Size()), rng.IntN(1<<(4+rng.IntN(18)))
		file := f
		if i%4 == 3 {
			file = direct
		}
		p := make([]byte, n)
		got, err := file.ReadAt(p, off)
		want := disk.data[off:min(off+int64(n), disk.Size())]
		if got != len(want) || (err != nil && !(errors.Is(err, io.EOF) && got < n)) || !bytes.Equal(p[:got], want) {
			t.Fatalf("read %d bytes at %d (direct %v): got %d bytes, %v, equal %v",
				n, off, file == direct, got, err, bytes.Equal(p[:got], want))
		}
	}
	if n, err := f.ReadAt(make([]byte, 10), disk.Size()); n != 0 || err != io.EOF {
		t.Errorf("read at the end: got %d, %v", n, err)
	}
}

// Handles share one open of the disk, also when they open at once; it closes after the last.
func TestParallelReads(t *testing.T) {
	t.Parallel()
	disk := newDisk(16*mib, 0, 16*mib)
	m, _ := mount(t, oneDisk(disk))
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			f, err := os.OpenFile(filepath.Join(m.Dir(), diskPath), os.O_RDONLY|unix.O_DIRECT*(g%2), 0)
			if err != nil {
				t.Error(err)
				return
			}
			defer f.Close()
			p := make([]byte, 256<<10)
			for i := range 16 * 4 {
				off := int64((i*7+g*13)%64) * int64(len(p))
				if _, err := f.ReadAt(p, off); err != nil || !bytes.Equal(p, disk.data[off:off+int64(len(p))]) {
					t.Errorf("goroutine %d at %d: wrong bytes or %v", g, off, err)
					return
				}
			}
		})
	}
	wg.Wait()
	eventually(t, "the disk is closed", func() bool { open, _ := disk.isOpen(); return open == 0 })

	_, before := disk.isOpen()
	a, b := open(t, filepath.Join(m.Dir(), diskPath)), open(t, filepath.Join(m.Dir(), diskPath))
	if open, opens := disk.isOpen(); open != 1 || opens != before+1 {
		t.Errorf("two handles: open %d times, opened %d times; want once", open, opens-before)
	}
	a.Close()
	time.Sleep(20 * time.Millisecond)
	if open, _ := disk.isOpen(); open != 1 {
		t.Errorf("one of two handles closed: open %d times, want 1", open)
	}
	b.Close()
	eventually(t, "the disk is closed", func() bool { open, _ := disk.isOpen(); return open == 0 })
}

// What was read stays in the kernel's cache when the file is opened again and
// the folders have been listed anew.
func TestKernelCache(t *testing.T) {
	t.Parallel()
	disk := newDisk(4*mib, 0, 4*mib)
	m, _ := mount(t, oneDisk(disk))
	read := func() {
		if b, err := os.ReadFile(filepath.Join(m.Dir(), diskPath)); err != nil || !bytes.Equal(b, disk.data) {
			t.Fatalf("wrong bytes or %v", err)
		}
	}
	read()
	disk.set(func() {
		if disk.reads > 40 {
			t.Errorf("4 MiB took %d reads, want large ones", disk.reads)
		}
		disk.bytes = 0
	})
	time.Sleep(1100 * time.Millisecond) // the entries of living folders expire
	read()
	disk.set(func() {
		// The kernel is free to drop a few pages.
		if disk.bytes > mib {
			t.Errorf("the second reading took %d bytes from the disk", disk.bytes)
		}
	})
}

func TestSeekDataAndHole(t *testing.T) {
	t.Parallel()
	for name, disk := range map[string]*memDisk{
		"sparse":  sparseDisk(),
		"empty":   newDisk(mib),
		"full":    newDisk(mib, 0, mib),
		"no size": newDisk(0),
		"tail":    newDisk(mib+1, mib, mib+1),
		"odd":     newDisk(mib+700, 4000, 4200, 10000, 10001, 4096*5-1, 4096*5+1, mib+600, mib+650),
	} {
		m, _ := mount(t, oneDisk(disk))
		f := open(t, filepath.Join(m.Dir(), diskPath))
		var got, want [][2]int64
		for _, e := range disk.extents {
			if e.Zero {
				continue
			}
			from, to := e.Off&^4095, min((e.End()+4095)&^4095, disk.Size()) // data fills whole blocks
			if n := len(want); n > 0 && from <= want[n-1][1] {
				want[n-1][1] = to
			} else {
				want = append(want, [2]int64{from, to})
			}
		}
		for off := int64(0); ; {
			start, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
			if err == unix.ENXIO {
				break
			}
			end, err2 := unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE)
			if err != nil || err2 != nil {
				t.Fatalf("%s: seek: %v, %v", name, err, err2)
			}
			got = append(got, [2]int64{start, end})
			off = end
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: got data at %v, want %v", name, got, want)
		}
		// From anywhere the answer is what the list of data says.
		for off := int64(0); off < disk.Size(); off += 1 + disk.Size()/97 {
			data, hole := int64(-1), off
			for _, d := range slices.Backward(got) {
				if off < d[1] {
					data = max(off, d[0])
				}
				if d[0] <= off && off < d[1] {
					hole = d[1]
				}
			}
			if got, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA); got != data || (err != nil && err != unix.ENXIO) {
				t.Errorf("%s: SEEK_DATA from %d: got %d, %v, want %d", name, off, got, err, data)
			}
			if got, err := unix.Seek(int(f.Fd()), off, unix.SEEK_HOLE); got != hole || err != nil {
				t.Errorf("%s: SEEK_HOLE from %d: got %d, %v, want %d", name, off, got, err, hole)
			}
		}
		for _, whence := range []int{unix.SEEK_DATA, unix.SEEK_HOLE} {
			if _, err := unix.Seek(int(f.Fd()), disk.Size(), whence); err != unix.ENXIO {
				t.Errorf("%s: seek %d at the end: got %v, want ENXIO", name, whence, err)
			}
		}
		var st unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &st); err != nil || st.Size != disk.Size() || st.Blocks != (disk.dataBytes()+511)/512 {
			t.Errorf("%s: got size %d, %d blocks, %v; want %d, %d", name, st.Size, st.Blocks, err, disk.Size(), (disk.dataBytes()+511)/512)
		}
	}
}

// command runs a program and returns what it printed.
func command(t testing.TB, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// The tools that people copy disks with see the holes and read the right bytes.
func TestTools(t *testing.T) {
	t.Parallel()
	disk := sparseDisk()
	m, _ := mount(t, oneDisk(disk))
	path := filepath.Join(m.Dir(), diskPath)
	dir := t.TempDir()
	plain := filepath.Join(dir, "plain")
	if err := os.WriteFile(plain, disk.data, 0o600); err != nil {
		t.Fatal(err)
	}
	dataKiB := disk.dataBytes() >> 10
	du := func(path string) (kib int64) {
		fmt.Sscan(command(t, "du", "-k", path), &kib)
		return kib
	}
	if got := du(path); got < dataKiB || got > dataKiB+4 {
		t.Errorf("du: got %d KiB, want %d", got, dataKiB)
	}
	copied := filepath.Join(dir, "cp")
	disk.set(func() { disk.reads = 0 })
	command(t, "cp", "--sparse=auto", path, copied)
	command(t, "cmp", plain, copied)
	if got := du(copied); got > dataKiB+64 {
		t.Errorf("cp --sparse=auto: the copy takes %d KiB, want about %d", got, dataKiB)
	}
	tarball := filepath.Join(dir, "t.tar")
	command(t, "tar", "-S", "-C", filepath.Dir(path), "-cf", tarball, "vda.raw")
	if info, err := os.Stat(tarball); err != nil || info.Size() > disk.dataBytes()+64<<10 {
		t.Errorf("tar -S: got %d bytes, %v, want about %d", info.Size(), err, disk.dataBytes())
	}
	command(t, "tar", "-C", dir, "-xf", tarball)
	command(t, "cmp", plain, filepath.Join(dir, "vda.raw"))
	command(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", path, plain)
	qcow := filepath.Join(dir, "q.qcow2")
	for _, cache := range []string{"writeback", "none"} { // the latter reads with O_DIRECT, many at once
		command(t, "qemu-img", "convert", "-T", cache, "-f", "raw", "-O", "qcow2", path, qcow)
		command(t, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", qcow, plain)
	}
	if got := command(t, "qemu-img", "map", "--output=json", "-f", "raw", path); strings.Count(got, `"data": true`) != 4 {
		t.Errorf("qemu-img map: want 4 data extents, got\n%s", got)
	}
}

// A file under the mount can be mapped. Another process does it: a page fault on our own mount would
// block the thread that has to serve it.
func TestMmap(t *testing.T) {
	t.Parallel()
	disk := sparseDisk()
	m, _ := mount(t, oneDisk(disk))
	got := command(t, "python3", "-c", `
import hashlib, mmap, sys
with open(sys.argv[1], "rb") as f, mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ) as m:
    print(hashlib.sha256(m).hexdigest())
`, filepath.Join(m.Dir(), diskPath))
	want := command(t, "sha256sum", writeTemp(t, disk.data))
	if got[:64] != want[:64] {
		t.Errorf("got %s, want %s", got, want)
	}
}

func writeTemp(t testing.TB, data []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// A bad range gives EIO there and the right bytes everywhere else, and is logged.
func TestDiskErrors(t *testing.T) {
	t.Parallel()
	for _, flags := range []int{0, unix.O_DIRECT} {
		disk := newDisk(8*mib, 0, 8*mib)
		disk.badFrom, disk.badTo = 3*mib+64<<10, 3*mib+128<<10
		m, log := mount(t, oneDisk(disk))
		f, err := os.OpenFile(filepath.Join(m.Dir(), diskPath), os.O_RDONLY|flags, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		p := make([]byte, 64<<10)
		for off := int64(0); off < disk.Size(); off += int64(len(p)) {
			n, err := f.ReadAt(p, off)
			if off == disk.badFrom {
				if !errors.Is(err, syscall.EIO) || n != 0 {
					t.Errorf("flags %#x: read of the bad range: got %d, %v, want EIO", flags, n, err)
				}
				continue
			}
			if err != nil || !bytes.Equal(p, disk.data[off:off+int64(len(p))]) {
				t.Errorf("flags %#x: read beside the bad range, at %d: wrong bytes or %v", flags, off, err)
			}
		}
		for _, want := range []string{"level=ERROR", "vm=web", "point=1f00aa27c0ffee", "disk=vda", "offset=", errBad.Error()} {
			if !strings.Contains(log.String(), want) {
				t.Errorf("log lacks %q: %s", want, log)
			}
		}
		// The error is not remembered.
		disk.set(func() { disk.badTo = 0 })
		if _, err := f.ReadAt(p, 3*mib+64<<10); err != nil || !bytes.Equal(p, disk.data[3*mib+64<<10:][:len(p)]) {
			t.Errorf("flags %#x: after the disk healed: wrong bytes or %v", flags, err)
		}
	}
}

// A disk of another size than the point lists is not shown as if it were right.
func TestWrongSize(t *testing.T) {
	t.Parallel()
	disk := newDisk(mib, 0, mib)
	m, log := mount(t, oneDisk(disk))
	if _, err := os.Stat(filepath.Join(m.Dir(), diskPath)); err != nil {
		t.Fatal(err)
	}
	disk.set(func() { disk.data = disk.data[:mib-512] })
	if _, err := os.Open(filepath.Join(m.Dir(), diskPath)); !errors.Is(err, syscall.EIO) || !strings.Contains(log.String(), "1048064 bytes") {
		t.Errorf("got %v and log %s, want EIO and the sizes", err, log)
	}
	if open, _ := disk.isOpen(); open != 0 {
		t.Errorf("the refused disk is open %d times", open)
	}
}

// A signal that does not kill the reader does not make its read fail either.
func TestSignal(t *testing.T) {
	t.Parallel()
	for _, flags := range []int{0, unix.O_DIRECT} {
		disk := newDisk(mib, 0, mib)
		disk.hang = make(chan struct{})
		m, _ := mount(t, oneDisk(disk))
		f, err := os.OpenFile(filepath.Join(m.Dir(), diskPath), os.O_RDONLY|flags, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		thread, result := make(chan int, 1), make(chan error, 1)
		go func() {
			runtime.LockOSThread()
			thread <- unix.Gettid()
			_, err := unix.Pread(int(f.Fd()), aligned(), 0)
			result <- err
		}()
		tid := <-thread
		eventually(t, "the read reaches the disk", func() (reading bool) {
			disk.set(func() { reading = disk.reads > 0 })
			return reading
		})
		if err := unix.Tgkill(os.Getpid(), tid, unix.SIGURG); err != nil {
			t.Error(err)
		}
		select {
		case err := <-result:
			t.Errorf("flags %#x: the read ended with %v", flags, err)
		case <-time.After(200 * time.Millisecond):
		}
		close(disk.hang)
		if err := <-result; err != nil {
			t.Errorf("flags %#x: got %v", flags, err)
		}
	}
}

// A process that waits for a hanging disk can be killed, and then the mount unmounted.
func TestInterrupt(t *testing.T) {
	t.Parallel()
	for name, flag := range map[string]string{"buffered": "fullblock", "direct": "direct"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			testInterrupt(t, flag)
		})
	}
}

func testInterrupt(t *testing.T, flag string) {
	disk := newDisk(mib, 0, mib)
	disk.hang = make(chan struct{})
	m, log := mount(t, oneDisk(disk))
	release := sync.OnceFunc(func() { close(disk.hang) })
	defer release()
	dd := exec.Command("dd", "if="+filepath.Join(m.Dir(), diskPath), "of=/dev/null", "bs=4096", "count=1", "iflag="+flag)
	if err := dd.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "dd reads", func() (reading bool) {
		disk.set(func() { reading = disk.reads > 0 })
		return reading
	})
	dd.Process.Signal(syscall.SIGUSR1) // dd catches it: the kernel tells the server of this signal and of none after it
	time.Sleep(20 * time.Millisecond)
	dd.Process.Kill()
	exited := make(chan error, 1)
	go func() { exited <- dd.Wait() }()
	select {
	case <-exited:
	case <-time.After(5 * time.Second):
		t.Error("a killed process still waits for the disk")
		release()
		<-exited
	}
	if open, _ := disk.isOpen(); open != 1 {
		t.Errorf("the disk is open %d times during the abandoned read, want 1", open)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := m.Unmount(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("unmount during an abandoned read: got %v, want it to wait until the context ends", err)
	}
	release()
	if err := m.Wait(t.Context()); err != nil {
		t.Error(err)
	}
	if open, _ := disk.isOpen(); open != 0 {
		t.Errorf("after unmounting the disk is open %d times", open)
	}
	if strings.Contains(log.String(), "ERROR") {
		t.Errorf("an interruption was logged as an error: %s", log)
	}
}
