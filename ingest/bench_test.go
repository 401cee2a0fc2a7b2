package ingest_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"iter"
	"math/rand/v2"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/blockstore"
	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/ingest"
)

// pieces is a disk whose data lies in pieces of a MiB, the n-th of them at n times
// spacing; zeros lie between. Every 4 KiB of the data is unlike any other, half of it
// noise and half of it words; two disks with the same count have the same data.
type pieces struct {
	template       []byte // a piece, but for the numbers in it
	count, spacing int64
}

func newPieces(count, spacing int64) pieces {
	p := pieces{template: make([]byte, mib), count: count, spacing: spacing}
	rng := rand.New(rand.NewPCG(1, 2))
	for i := 0; i < mib; i += 8 {
		if i&(2<<10) == 0 {
			binary.LittleEndian.PutUint64(p.template[i:], rng.Uint64())
		} else {
			copy(p.template[i:], fmt.Sprintf("word%03d ", rng.IntN(200)))
		}
	}
	return p
}

func (d pieces) Size() int64 { return d.count * d.spacing }

// ReadAt reads whole blocks of 4 KiB, which is all that a backup of such a disk asks for.
func (d pieces) ReadAt(p []byte, off int64) (int, error) {
	const block = 4 << 10
	for n := 0; n < len(p); n += block {
		at := off + int64(n)
		if at%d.spacing >= mib {
			clear(p[n : n+block])
			continue
		}
		copy(p[n:n+block], d.template[at%d.spacing:])
		binary.LittleEndian.PutUint64(p[n:], uint64(at/d.spacing))
	}
	return len(p), nil
}

func (d pieces) Extents(_ context.Context, off, length int64) iter.Seq2[image.Extent, error] {
	return func(yield func(image.Extent, error) bool) {
		for end := off + length; off < end; {
			start := off - off%d.spacing
			e := image.Extent{Off: off, Len: min(start+mib, end) - off}
			if off >= start+mib {
				e = image.Extent{Off: off, Len: min(start+d.spacing, end) - off, Zero: true}
			}
			if !yield(e, nil) {
				return
			}
			off = e.End()
		}
	}
}

// What is timed of a disk.
var kinds = []string{"full", "scan", "incremental"}

// BenchmarkSparse backs up a dense disk of 1 GiB and one of 1 TiB with the same
// data, in turn: at first, again by reading it all, and again with extents that say that
// nothing changed. It reports the median of each, and of the ratios sparse / dense within a
// turn, by the clock and by processor time.
func BenchmarkSparse(b *testing.B) {
	dense, sparse := newPieces(1<<10, mib), newPieces(1<<10, 1<<30)
	figures := map[string][]float64{}
	for b.Loop() {
		ours, theirs := backupCosts(b, sparse), backupCosts(b, dense)
		for i, kind := range kinds {
			for unit, value := range map[string]float64{
				"-dense-ms":   theirs[i].wall.Seconds() * 1000,
				"-sparse-ms":  ours[i].wall.Seconds() * 1000,
				"-wall-ratio": float64(ours[i].wall) / float64(theirs[i].wall),
				"-cpu-ratio":  float64(ours[i].cpu) / float64(theirs[i].cpu),
			} {
				figures[kind+unit] = append(figures[kind+unit], value)
			}
		}
	}
	b.ReportMetric(0, "ns/op") // the sum of all says nothing
	for unit, values := range figures {
		slices.Sort(values)
		b.ReportMetric(values[len(values)/2], unit)
	}
}

// cost is what something took.
type cost struct{ wall, cpu time.Duration }

// measure returns what fn took. The processor time is that of the whole process.
func measure(b *testing.B, fn func()) cost {
	b.Helper()
	used := func() time.Duration {
		var u syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
			b.Fatal(err)
		}
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	start, before := time.Now(), used()
	fn()
	return cost{wall: time.Since(start), cpu: used() - before}
}

// backupCosts makes a repository and three points of a disk, and returns what each of
// the kinds took.
func backupCosts(b *testing.B, disk image.Disk) []cost {
	b.Helper()
	dir := b.TempDir()
	if err := blockstore.Create(dir, blockstore.CreateOptions{}); err != nil {
		b.Fatal(err)
	}
	r, err := blockstore.Open(b.Context(), dir, blockstore.Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer r.Close()
	var costs []cost
	var last blockstore.PointID
	for _, kind := range kinds {
		src := ingest.Source{Name: "vda", Disk: disk}
		if kind == "incremental" {
			src.Changed, src.Since = []image.Extent{}, last
		}
		req := ingest.Request{VM: "vm", Time: time.Now(), Consistency: "crash", Disks: []ingest.Source{src}}
		var got ingest.Result
		costs = append(costs, measure(b, func() {
			if got, err = ingest.Run(b.Context(), r, req, nil); err != nil {
				b.Fatal(err)
			}
		}))
		last = got.Point.ID
		if string(got.Disks[0].Mode) != kind {
			b.Fatalf("mode: got %s, want %s", got.Disks[0].Mode, kind)
		}
	}
	return costs
}

// BenchmarkFirst is the first backup of 1 GiB of data.
func BenchmarkFirst(b *testing.B) {
	for _, passphrase := range []string{"", "a passphrase"} {
		b.Run(fmt.Sprintf("encrypted=%t", passphrase != ""), func(b *testing.B) {
			disk := newPieces(1<<10, mib)
			b.SetBytes(disk.Size())
			for b.Loop() {
				b.StopTimer()
				dir := b.TempDir()
				if err := blockstore.Create(dir, blockstore.CreateOptions{Passphrase: passphrase}); err != nil {
					b.Fatal(err)
				}
				r, err := blockstore.Open(b.Context(), dir, blockstore.Options{Passphrase: passphrase})
				if err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
				req := ingest.Request{VM: "vm", Time: time.Now(), Consistency: "crash", Disks: []ingest.Source{{Name: "vda", Disk: disk}}}
				if _, err := ingest.Run(b.Context(), r, req, nil); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				if err := r.Close(); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
		})
	}
}
