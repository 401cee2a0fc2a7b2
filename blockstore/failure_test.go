package blockstore

import (
	"errors"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/holdfast-backup/holdfast/internal/durable"
)

// faultyReads is the operating system's file system, of which reads of files, and opening them,
// fail while fail says so.
type faultyReads struct {
	durable.FS
	fail func(name string) error
}

type faultyReader struct {
	durable.File
	fs *faultyReads
}

func (f *faultyReads) open(name string, open func(string) (durable.File, error)) (durable.File, error) {
	if err := f.fail(name); err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	file, err := open(name)
	if err != nil {
		return nil, err
	}
	return faultyReader{file, f}, nil
}

func (f *faultyReads) Open(name string) (durable.File, error) { return f.open(name, f.FS.Open) }

func (f *faultyReads) OpenWrite(name string) (durable.File, error) {
	return f.open(name, f.FS.OpenWrite)
}

func (f faultyReader) ReadAt(p []byte, off int64) (int, error) {
	if err := f.fs.fail(f.Name()); err != nil {
		return 0, &os.PathError{Op: "read", Path: f.Name(), Err: err}
	}
	return f.File.ReadAt(p, off)
}

// Storage that is away damages nothing: what wanted to read fails, and all is well once
// it is back. A place that cannot be read is damage.
func TestStorageAway(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		errno   syscall.Errno
		damaged bool
	}{
		{syscall.ENOTCONN, false},
		{syscall.ESTALE, false},
		{syscall.ETIMEDOUT, false},
		{syscall.EIO, true},
		{syscall.EUCLEAN, true},
	} {
		t.Run(tt.errno.Error(), func(t *testing.T) {
			t.Parallel()
			var away atomic.Bool
			fs := &faultyReads{FS: durable.OS(), fail: func(name string) error {
				if away.Load() && strings.HasSuffix(name, segmentSuffix) {
					return tt.errno
				}
				return nil
			}}
			dir := createIn(t, memoryDir(t), CreateOptions{})
			r := open(t, dir, Options{fs: fs})
			disk := numbers(1, 20)
			p := mustBackup(t, r, "vm", disk)
			closeOnce(t, r)
			r = open(t, dir, Options{fs: fs})
			if err := r.appender.finish(); err != nil {
				t.Fatal(err)
			}

			away.Store(true)
			d, err := r.OpenDisk(p.ID, "", DiskOptions{Whole: true})
			if err != nil {
				t.Fatal(err)
			}
			_, err = d.ReadAt(make([]byte, testChunk), 0)
			if !errors.Is(err, tt.errno) || !strings.Contains(err.Error(), segmentsDir) || errors.Is(err, ErrDamaged) != tt.damaged {
				t.Errorf("read: got %v, want one that names the segment, damage %v", err, tt.damaged)
			}
			_ = d.Close()
			result, err := r.Verify(t.Context(), VerifyOptions{})
			if tt.damaged && (err != nil || len(result.Errors) == 0) || !tt.damaged && !errors.Is(err, tt.errno) {
				t.Errorf("verify: got %v and %d places, want damage %v", err, len(result.Errors), tt.damaged)
			}
			if _, err := r.Collect(t.Context(), CollectOptions{}); !errors.Is(err, tt.errno) && !tt.damaged {
				t.Errorf("collect: got %v, want %v", err, tt.errno)
			}
			if got := r.AnyDamaged(); got != tt.damaged {
				t.Errorf("got chunks marked %v, want %v", got, tt.damaged)
			}

			away.Store(false)
			checkDisk(t, r, p.ID, disk)
			checkSound(t, r)
		})
	}
}

// Opening a repository after a crash loses nothing of a listed point, whichever read fails once:
// a segment is cut only behind what could be read.
func TestOpenFailedRead(t *testing.T) {
	t.Parallel()
	dir := createIn(t, memoryDir(t), CreateOptions{})
	r := open(t, dir, Options{SegmentSize: 16 << 20})
	disk := numbers(1, 10)
	p := mustBackup(t, r, "vm", disk)
	crashed := crash(t, dir)
	for _, errno := range []syscall.Errno{syscall.EIO, syscall.ENOTCONN} {
		t.Run(errno.Error(), func(t *testing.T) {
			t.Parallel()
			for n, hit := int64(1), true; hit; n++ {
				dir := crash(t, crashed)
				var reads atomic.Int64
				hit = false
				fs := &faultyReads{FS: durable.OS(), fail: func(string) error {
					if reads.Add(1) == n {
						hit = true
						return errno
					}
					return nil
				}}
				if r, err := Open(t.Context(), dir, Options{fs: fs, indexMemory: 1 << 20}); err == nil {
					if err := r.Close(); err != nil {
						t.Fatal(err)
					}
				}
				r, err := Open(t.Context(), dir, Options{indexMemory: 1 << 20})
				if err != nil {
					t.Fatalf("after read %d: %v", n, err)
				}
				checkDisk(t, r, p.ID, disk)
				if err := r.Close(); err != nil {
					t.Error(err)
				}
				if t.Failed() {
					t.Fatalf("at read %d", n)
				}
			}
		})
	}
}
