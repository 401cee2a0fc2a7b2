package fusefs_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"iter"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/fusefs"
	"github.com/holdfast-backup/holdfast/image"
)

const mib = 1 << 20

// memDisk is a disk in memory with fault hooks.
type memDisk struct {
	data    []byte
	extents []image.Extent

	mu      sync.Mutex
	badFrom int64         // reads that touch [badFrom, badTo) fail
	badTo   int64         //
	hang    chan struct{} // reads wait until it is closed, if set
	opens   int           // how often it was opened
	open    int           // how often it is open now
	reads   int
	bytes   int // asked for by reads
}

var errBad = errors.New("segment 7 is corrupt")

// newDisk returns a disk of the given size whose data extents are at the given [from, to) pairs.
func newDisk(size int64, data ...int64) *memDisk {
	d := &memDisk{data: make([]byte, size)}
	rng := rand.NewChaCha8([32]byte{1, byte(size)})
	next := int64(0)
	add := func(to int64, zero bool) {
		if to > next {
			d.extents = append(d.extents, image.Extent{Off: next, Len: to - next, Zero: zero})
			next = to
		}
	}
	for i := 0; i < len(data); i += 2 {
		add(data[i], true)
		add(data[i+1], false)
		rng.Read(d.data[data[i]:data[i+1]])
	}
	add(size, true)
	return d
}

func (d *memDisk) dataBytes() (n int64) {
	for _, e := range d.extents {
		if !e.Zero {
			n += e.Len
		}
	}
	return n
}

func (d *memDisk) Size() int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return int64(len(d.data))
}

func (d *memDisk) ReadAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	hang := d.hang
	bad := off < d.badTo && off+int64(len(p)) > d.badFrom
	d.reads++
	d.bytes += len(p)
	d.mu.Unlock()
	if hang != nil {
		<-hang
	}
	if bad {
		return 0, errBad
	}
	if off >= d.Size() {
		return 0, io.EOF
	}
	n := copy(p, d.data[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (d *memDisk) Extents(_ context.Context, off, length int64) iter.Seq2[image.Extent, error] {
	return func(yield func(image.Extent, error) bool) {
		_, length = image.Clip(off, length, d.Size())
		for _, e := range d.extents {
			start, end := max(e.Off, off), min(e.End(), off+length)
			if start < end && !yield(image.Extent{Off: start, Len: end - start, Zero: e.Zero}, nil) {
				return
			}
		}
	}
}

func (d *memDisk) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.open--
	return nil
}

func (d *memDisk) set(f func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f()
}

// isOpen returns how often the disk is open now and how often it was opened in all.
func (d *memDisk) isOpen() (open, opens int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.open, d.opens
}

// memPoint is a point of a memSource.
type memPoint struct {
	fusefs.Point
	disks map[string]*memDisk
	files map[string][]byte
}

// memSource is a Source in memory.
type memSource struct {
	mu     sync.Mutex
	vms    []string
	points map[string][]memPoint
	err    error // what every method returns, if set
}

func (s *memSource) add(vm string, p memPoint) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.points == nil {
		s.points = make(map[string][]memPoint)
	}
	if s.points[vm] == nil {
		s.vms = append(s.vms, vm)
	}
	s.points[vm] = append(s.points[vm], p)
}

func (s *memSource) remove(vm, id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, p := range s.points[vm] {
		if p.ID == id {
			s.points[vm] = append(s.points[vm][:i:i], s.points[vm][i+1:]...)
			return
		}
	}
}

func (s *memSource) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err = err
}

func (s *memSource) VMs(context.Context) ([]string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.vms...), s.err
}

func (s *memSource) Points(_ context.Context, vm string) ([]fusefs.Point, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var points []fusefs.Point
	for _, p := range s.points[vm] {
		points = append(points, p.Point)
	}
	return points, s.err
}

func (s *memSource) find(id string) (memPoint, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, points := range s.points {
		for _, p := range points {
			if p.ID == id {
				return p, s.err
			}
		}
	}
	return memPoint{}, fmt.Errorf("point %s: %w", id, iofs.ErrNotExist)
}

func (s *memSource) Contents(_ context.Context, id string) (fusefs.Contents, error) {
	p, err := s.find(id)
	c := fusefs.Contents{Files: p.files}
	for name, d := range p.disks {
		c.Disks = append(c.Disks, fusefs.DiskInfo{Name: name, Size: d.Size(), DataBytes: d.dataBytes()})
	}
	return c, err
}

func (s *memSource) OpenDisk(_ context.Context, id, disk string) (image.DiskCloser, error) {
	p, err := s.find(id)
	if err != nil {
		return nil, err
	}
	d := p.disks[disk]
	d.mu.Lock()
	defer d.mu.Unlock()
	d.open++
	d.opens++
	return d, nil
}

var pointTime = time.Date(2026, 11, 22, 1, 2, 3, 0, time.UTC)

const pointDir = "web/2026-11-22T01:02:03Z"

// oneDisk returns a source with one VM "web", one point and one disk "vda".
func oneDisk(d *memDisk) *memSource {
	s := &memSource{}
	s.add("web", memPoint{
		Point: fusefs.Point{ID: "1f00aa27c0ffee", Time: pointTime},
		disks: map[string]*memDisk{"vda": d},
		files: map[string][]byte{"vm.xml": []byte("<domain/>\n"), "point.json": []byte("{}\n")},
	})
	return s
}

// logBuffer is where a mount under test logs.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// mount mounts src on a new folder until the test ends, and returns the mount and its log.
func mount(t testing.TB, src fusefs.Source) (*fusefs.Mounted, *logBuffer) {
	t.Helper()
	log := &logBuffer{}
	return mountAt(t, filepath.Join(t.TempDir(), "mnt"), src, fusefs.Options{
		Logger: slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}), log
}

func mountAt(t testing.TB, dir string, src fusefs.Source, o fusefs.Options) *fusefs.Mounted {
	t.Helper()
	m, err := fusefs.Mount(dir, src, o)
	if err != nil {
		t.Fatalf("mount: %v", err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := m.Unmount(ctx); err != nil {
			t.Errorf("unmount: %v", err)
			forceUnmount(m.Dir())
		}
	})
	return m
}

// eventually waits until ok returns true.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("did not happen within 10 s: %s", what)
		}
	}
}

func open(t testing.TB, path string) *os.File {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}
