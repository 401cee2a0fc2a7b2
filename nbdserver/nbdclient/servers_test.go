package nbdclient_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/nbdserver"
	"github.com/holdfast-backup/holdfast/nbdserver/nbdclient"
)

const (
	kib = 1 << 10
	mib = 1 << 20
)

// sparseContent returns 4 MiB and a bit: data, zeros, data.
func sparseContent() []byte {
	p := content(4*mib + 512)
	clear(p[1*mib : 3*mib])
	return p
}

// collect returns extents coalesced.
func collect(tb testing.TB, seq iter.Seq2[image.Extent, error]) []image.Extent {
	tb.Helper()
	var list []image.Extent
	for e, err := range image.Coalesce(seq) {
		if err != nil {
			tb.Fatal(err)
		}
		list = append(list, e)
	}
	return list
}

// checkReads reads the whole disk at once, and many parts of it at the same time.
func checkReads(t *testing.T, c *nbdclient.Client, want []byte) {
	t.Helper()
	if got := c.Size(); got != int64(len(want)) {
		t.Fatalf("Size: got %d, want %d", got, len(want))
	}
	got := make([]byte, len(want)+1)
	if n, err := c.ReadAt(got, 0); n != len(want) || !errors.Is(err, io.EOF) || !bytes.Equal(got[:n], want) {
		t.Fatalf("ReadAt of everything and a byte more: got %d, %v, or other bytes", n, err)
	}
	if n, err := c.ReadAt(got, int64(len(want))); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("ReadAt at the end: got %d, %v", n, err)
	}
	var readers sync.WaitGroup
	for i := range uint64(8) {
		readers.Go(func() {
			random := rand.New(rand.NewPCG(1, i))
			for range 40 {
				off := random.IntN(len(want))
				length := min(1<<random.IntN(21)+random.IntN(3), len(want)-off)
				p := make([]byte, length+64)
				for i := length; i < len(p); i++ {
					p[i] = 0xa5
				}
				if n, err := c.ReadAt(p[:length:length], int64(off)); err != nil || n != length || !bytes.Equal(p[:length], want[off:off+length]) {
					t.Errorf("ReadAt(%d bytes, %d): got %d, %v, or other bytes", length, off, n, err)
				}
				if bytes.Count(p[length:], []byte{0xa5}) != 64 {
					t.Errorf("ReadAt(%d bytes, %d) wrote behind its buffer", length, off)
				}
			}
		})
	}
	readers.Wait()
}

// checkExtents checks that what is called zero is, and how much that is.
func checkExtents(t *testing.T, c *nbdclient.Client, content []byte, wantZero int64) {
	t.Helper()
	pos, zero := int64(0), int64(0)
	for _, e := range collect(t, c.Extents(t.Context(), 0, c.Size())) {
		if e.Off != pos {
			t.Errorf("%v after %d", e, pos)
		}
		pos = e.End()
		if e.Zero {
			zero += e.Len
			if bytes.Count(content[e.Off:e.End()], []byte{0}) != int(e.Len) {
				t.Errorf("%v holds data", e)
			}
		}
	}
	if pos != c.Size() || zero != wantZero {
		t.Errorf("extents end at %d, want %d; %d bytes are zeros, want %d", pos, c.Size(), zero, wantZero)
	}
	part := collect(t, c.Extents(t.Context(), 1*mib-5, 10))
	if len(part) == 0 || part[0].Off != 1*mib-5 || part[len(part)-1].End() != 1*mib+5 {
		t.Errorf("extents of a part: got %v", part)
	}
}

func TestServers(t *testing.T) {
	t.Parallel()
	want := sparseContent()
	file := writeFile(t, filepath.Join(t.TempDir(), "raw"), want)
	run(t, "fallocate", "--dig-holes", file)
	qcow2 := filepath.Join(t.TempDir(), "qcow2")
	run(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", file, qcow2)
	for _, tt := range []struct {
		name     string
		start    func(t *testing.T) (socket string)
		export   string
		protocol string
		zero     int64 // bytes that extents tell of
	}{
		{"qemu-nbd raw", func(t *testing.T) string { return qemuNBD(t, "-e", "8", "-f", "raw", file) }, "", "structured", 2 * mib},
		{"qemu-nbd qcow2", func(t *testing.T) string { return qemuNBD(t, "-f", "qcow2", "-x", "größe /x", qcow2) }, "größe /x", "structured", 2 * mib},
		{"nbdkit file", func(t *testing.T) string { return nbdkit(t, "file", file) }, "", "structured", 2 * mib},
		{"no extents", func(t *testing.T) string { return nbdkit(t, "--filter=noextents", "file", file) }, "", "structured", 0},
		{"no structured replies", func(t *testing.T) string { return nbdkit(t, "--no-sr", "file", file) }, "", "simple", 0},
		{"newstyle that is not fixed", func(t *testing.T) string { return nbdkit(t, "--mask-handshake=0", "file", file) }, "", "simple", 0},
		{"no NO_ZEROES", func(t *testing.T) string { return nbdkit(t, "--mask-handshake=1", "file", file) }, "", "structured", 2 * mib},
		{"blocks of 512 bytes to 64 KiB", func(t *testing.T) string {
			return nbdkit(t, "--filter=blocksize-policy", "file", file, "blocksize-minimum=512", "blocksize-preferred=4k", "blocksize-maximum=64k", "blocksize-error-policy=error")
		}, "", "structured", 2 * mib},
		{"slow", func(t *testing.T) string { return nbdkit(t, "--filter=delay", "file", file, "rdelay=2ms") }, "", "structured", 2 * mib},
		{"exportname filter", func(t *testing.T) string {
			return nbdkit(t, "--filter=exportname", "file", file, "exportname=a/b", "exportname-strict=true")
		}, "a/b", "structured", 2 * mib},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			o := unixOptions(tt.start(t))
			o.Export = tt.export
			c := dial(t, o)
			if got := c.Protocol(); got != tt.protocol {
				t.Errorf("replies: got %s, want %s", got, tt.protocol)
			}
			checkReads(t, c, want)
			checkExtents(t, c, want, tt.zero)
		})
	}
}

// memory is a disk of which [1 MiB, 3 MiB) is zeros.
type memory struct{ *bytes.Reader }

func (m memory) Extents(_ context.Context, off, length int64) iter.Seq2[image.Extent, error] {
	return func(yield func(image.Extent, error) bool) {
		off, length := image.Clip(off, length, m.Size())
		for _, e := range []image.Extent{{Off: 0, Len: mib}, {Off: mib, Len: 2 * mib, Zero: true}, {Off: 3 * mib, Len: m.Size() - 3*mib}} {
			from, to := max(e.Off, off), min(e.End(), off+length)
			if from < to && !yield(image.Extent{Off: from, Len: to - from, Zero: e.Zero}, nil) {
				return
			}
		}
	}
}

// bitmaps are contexts for tests: "x-test:odd" calls every odd MiB changed.
type bitmaps struct{ size int64 }

func (b bitmaps) List() []string { return []string{"x-test:odd"} }

func (b bitmaps) Open(name string) (nbdserver.Context, bool) { return b, name == "x-test:odd" }

func (b bitmaps) Status(_ context.Context, off, length int64) iter.Seq2[nbdserver.Status, error] {
	return func(yield func(nbdserver.Status, error) bool) {
		for pos, end := off, min(off+length, b.size); pos < end; {
			to := min(pos-pos%mib+mib, end)
			if !yield(nbdserver.Status{Off: pos, Len: to - pos, Flags: uint32(pos / mib % 2)}, nil) {
				return
			}
			pos = to
		}
	}
}

// serveOurs serves p with package nbdserver and returns the socket.
func serveOurs(t *testing.T, p []byte) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "nbd")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := nbdserver.New(nbdserver.Options{})
	if err := s.Add(nbdserver.Export{Name: "ours", Disk: memory{bytes.NewReader(p)}, Contexts: bitmaps{int64(len(p))}}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- s.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return socket
}

// TestOurServer: extended headers, and a context besides base:allocation.
func TestOurServer(t *testing.T) {
	t.Parallel()
	want := sparseContent()
	o := unixOptions(serveOurs(t, want))
	o.Export, o.Contexts = "ours", []string{"x-test:odd", "x-test:even"}
	c := dial(t, o)
	if got := c.Protocol(); got != "extended" {
		t.Errorf("replies: got %s, want extended", got)
	}
	if got, want := c.Contexts(), []string{"base:allocation", "x-test:odd"}; !slices.Equal(got, want) {
		t.Errorf("contexts: got %q, want %q", got, want)
	}
	checkReads(t, c, want)
	checkExtents(t, c, want, 2*mib)
	changed := collect(t, c.Changed(t.Context(), "x-test:odd"))
	if want := []image.Extent{{Off: mib, Len: mib}, {Off: 3 * mib, Len: mib}}; !slices.Equal(changed, want) {
		t.Errorf("changed: got %v, want %v", changed, want)
	}
	for _, err := range c.Changed(t.Context(), "x-test:even") {
		if !errors.Is(err, nbdclient.ErrNoContext) || !strings.Contains(err.Error(), "x-test:even") {
			t.Errorf("a context that was not granted: got %v", err)
		}
	}
}

// TestDirtyBitmap reads QEMU's own bitmap, fragmented enough for long replies.
func TestDirtyBitmap(t *testing.T) {
	t.Parallel()
	disk := filepath.Join(t.TempDir(), "disk.qcow2")
	run(t, "qemu-img", "create", "-f", "qcow2", disk, "64G")
	run(t, "qemu-img", "bitmap", "--add", "--enable", "-g", "64k", disk, "b0")
	args := []string{"-f", "qcow2"}
	var want []image.Extent
	for i := range int64(400) { // every other grain
		args = append(args, "-c", fmt.Sprintf("write -q %d 512", i*128*kib+4096))
		want = append(want, image.Extent{Off: i * 128 * kib, Len: 64 * kib})
	}
	args = append(args, "-c", "write -q 63G 1M", disk)
	want = append(want, image.Extent{Off: 63 << 30, Len: mib})
	run(t, "qemu-io", args...)
	run(t, "qemu-img", "bitmap", "--disable", disk, "b0")

	const name = "qemu:dirty-bitmap:b0"
	o := unixOptions(qemuNBD(t, "-f", "qcow2", "-B", "b0", disk))
	o.Contexts = []string{name, "qemu:dirty-bitmap:b1"}
	c := dial(t, o)
	if got := collect(t, c.Changed(t.Context(), name)); !slices.Equal(got, want) {
		t.Errorf("changed: got %d extents %v, want %d", len(got), got[:min(len(got), 3)], len(want))
	}
	for e, err := range c.Changed(t.Context(), "qemu:dirty-bitmap:b1") {
		if !errors.Is(err, nbdclient.ErrNoContext) || !strings.Contains(err.Error(), "b1") {
			t.Errorf("a bitmap that is not there: got %v, %v", e, err)
		}
	}
	data := int64(0)
	for _, e := range collect(t, c.Extents(t.Context(), 0, c.Size())) {
		if !e.Zero {
			data += e.Len
		}
	}
	if data >= 200*mib {
		t.Errorf("%d bytes are data besides a bitmap", data)
	}
}

// TestServerErrors: an error of the server has its errno, tells what was read
// before it, and does no harm to others.
func TestServerErrors(t *testing.T) {
	t.Parallel()
	want := sparseContent()
	file := writeFile(t, filepath.Join(t.TempDir(), "raw"), want)
	// The third block of 256 KiB cannot be read.
	script := `case "$1" in
		get_size) echo ` + fmt.Sprint(len(want)) + ` ;;
		pread) if [ "$4" -eq 524288 ]; then echo EIO bad sector >&2; exit 1; fi
		       dd if=` + file + ` iflag=skip_bytes,count_bytes skip=$4 count=$3 bs=1M status=none ;;
		can_write) exit 3 ;;
		*) exit 2 ;;
	esac`
	plugin := writeFile(t, filepath.Join(t.TempDir(), "plugin"), []byte("#!/bin/sh\n"+script))
	run(t, "chmod", "700", plugin)
	for _, flags := range [][]string{nil, {"--no-sr"}} {
		c := dial(t, unixOptions(nbdkit(t, append(flags, "sh", plugin)...)))
		p := make([]byte, len(want))
		n, err := c.ReadAt(p, 0)
		if server, ok := errors.AsType[*nbdclient.ServerError](err); n != 512*kib || !errors.Is(err, syscall.EIO) || !ok || server.Errno != syscall.EIO {
			t.Errorf("%q: got %d, %v, want %d, EIO", flags, n, err, 512*kib)
		}
		if !bytes.Equal(p[:n], want[:n]) {
			t.Errorf("%q: the bytes before the error differ", flags)
		}
		if n, err := c.ReadAt(p[:mib], 2*mib); err != nil || !bytes.Equal(p[:n], want[2*mib:3*mib]) {
			t.Errorf("%q: after the error: got %d, %v, or other bytes", flags, n, err)
		}
	}
}

func TestDialErrors(t *testing.T) {
	t.Parallel()
	strict := nbdkit(t, "--filter=exportname", "memory", "1M", "exportname=a", "exportname-strict=true")
	for _, tt := range []struct {
		name   string
		change func(o *nbdclient.Options)
		want   error
	}{
		{"no such export", func(o *nbdclient.Options) { o.Address, o.Export = strict, "b" }, nbdclient.ErrNoExport},
		{"oldstyle", func(o *nbdclient.Options) { o.Address = nbdkit(t, "-o", "memory", "1M") }, nbdclient.ErrUnsupported},
		{"nobody listens", func(o *nbdclient.Options) { o.Address = strict + "x" }, syscall.ENOENT},
		{"too large", func(o *nbdclient.Options) { o.Address = nbdkit(t, "null", "2P") }, nbdclient.ErrUnsupported},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			o := unixOptions("")
			tt.change(&o)
			if _, err := nbdclient.Dial(t.Context(), o); !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
}
