package ingest_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"iter"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/blockstore"
	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/ingest"
)

// pieces is a disk whose data lies in pieces of a MiB, the n-th of them at n times
// spacing; zeros lie between. Spacing alone tells two disks of the same count apart: every
// 4 KiB of the data is unlike any other, and half of its bytes do not compress.
type pieces struct {
	template       []byte // a piece, but for the numbers in it
	count, spacing int64
}

func newPieces(count, spacing int64) pieces {
	p := pieces{template: make([]byte, mib), count: count, spacing: spacing}
	rng := rand.New(rand.NewPCG(1, 2))
	for i := 0; i < mib; i += 16 {
		binary.LittleEndian.PutUint64(p.template[i:], rng.Uint64())
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
// nothing changed. It reports the median of each, and of the ratios within a turn.
func BenchmarkSparse(b *testing.B) {
	disks := map[string]pieces{"1GiB": newPieces(1<<10, mib), "1TiB": newPieces(1<<10, 1<<30)}
	times := map[string][]float64{} // milliseconds, or ratios
	for b.Loop() {
		for name, disk := range disks {
			for i, ms := range backupTimes(b, disk) {
				times[name+"-"+kinds[i]+"-ms"] = append(times[name+"-"+kinds[i]+"-ms"], ms)
			}
		}
		for _, kind := range kinds[:2] {
			sparse, dense := times["1TiB-"+kind+"-ms"], times["1GiB-"+kind+"-ms"]
			last := len(sparse) - 1
			times[kind+"-ratio"] = append(times[kind+"-ratio"], sparse[last]/dense[last])
		}
	}
	b.ReportMetric(0, "ns/op") // the sum of all says nothing
	for unit, values := range times {
		slices.Sort(values)
		b.ReportMetric(values[len(values)/2], unit)
	}
}

// backupTimes makes a repository and three points of a disk, and returns the
// milliseconds that each of the kinds took.
func backupTimes(b *testing.B, disk image.Disk) []float64 {
	b.Helper()
	dir := b.TempDir()
	if err := blockstore.Create(dir, blockstore.CreateOptions{}); err != nil {
		b.Fatal(err)
	}
	r, err := blockstore.Open(dir, blockstore.Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer r.Close()
	var times []float64
	for _, kind := range kinds {
		src := ingest.Source{Name: "vda", Disk: disk}
		if kind == "incremental" {
			src.Changed = []image.Extent{}
		}
		start := time.Now()
		got, err := ingest.Run(b.Context(), r, ingest.Request{VM: "vm", Time: start, Consistency: "crash", Disks: []ingest.Source{src}}, nil)
		if err != nil {
			b.Fatal(err)
		}
		times = append(times, float64(time.Since(start).Microseconds())/1000)
		if string(got.Disks[0].Mode) != kind {
			b.Fatalf("mode: got %s, want %s", got.Disks[0].Mode, kind)
		}
	}
	return times
}

// BenchmarkFirst is the first backup of 1 GiB of data, half of which compresses.
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
				r, err := blockstore.Open(dir, blockstore.Options{Passphrase: passphrase})
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
