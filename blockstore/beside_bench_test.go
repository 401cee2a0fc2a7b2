package blockstore

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// BenchmarkPutBesideCollect stores new chunks, alone and while a collection marks and copies out, in
// turn, and tells the rates and the part that is lost, medians.
func BenchmarkPutBesideCollect(b *testing.B) {
	const rounds, length = 7, 2 * time.Second
	dir, points := manyChunks(b, 1e6)
	r, err := Open(dir, Options{SegmentSize: smallSegment})
	if err != nil {
		b.Fatal(err)
	}
	defer closeOnce(b, r)
	if err := r.DeletePoint(points[2]); err != nil { // every segment is copied out
		b.Fatal(err)
	}
	var alone, beside, lost []float64
	for range rounds {
		rate := putRate(b, r, length)
		ctx, cancel := context.WithCancel(b.Context())
		var collecting sync.WaitGroup

		collecting.Go(func() {
			for ctx.Err() == nil {
				_, err := r.Collect(ctx, CollectOptions{})
				if err != nil && ctx.Err() == nil {
					b.Error(err)
					return
				}
			}
		})
		slowed := putRate(b, r, length)
		cancel()
		collecting.Wait()
		alone, beside, lost = append(alone, rate), append(beside, slowed), append(lost, 100*(1-slowed/rate))
	}
	b.Run("medians", func(b *testing.B) {
		for range b.N { // measured above
		}
		b.ReportMetric(0, "ns/op")
		b.ReportMetric(median(alone), "alone-MiB/s")
		b.ReportMetric(median(beside), "beside-MiB/s")
		b.ReportMetric(median(lost), "lost-%")
	})
}

func median(x []float64) float64 {
	slices.Sort(x)
	return x[len(x)/2]
}

// putRate stores new chunks from several goroutines for a time, as a backup does, and returns MiB a second.
func putRate(b *testing.B, r *Repository, length time.Duration) float64 {
	b.Helper()
	s := r.Begin()
	defer s.Close()
	var stored atomic.Int64
	var wg sync.WaitGroup
	start := time.Now()
	for range 4 {
		wg.Go(func() {
			chunk, n := template(), rand.Uint64()
			var children [Fanout]ID
			for i := 0; time.Since(start) < length; i++ {
				n++
				number(chunk, n)
				id := r.ID(chunk)
				if _, err := s.Put(id, chunk); err != nil {
					b.Error(err)
					return
				}
				children[i%Fanout] = id
				if i%Fanout == Fanout-1 {
					if _, _, err := s.PutNode(&children); err != nil {
						b.Error(err)
						return
					}
				}
				stored.Add(DefaultChunkSize)
			}
		})
	}
	wg.Wait()
	return float64(stored.Load()) / (1 << 20) / time.Since(start).Seconds()
}
