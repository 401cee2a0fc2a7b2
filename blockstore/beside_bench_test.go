package blockstore

import (
	"context"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// BenchmarkPutBesideCollect stores new chunks while a collection marks and copies out, and while it is held up, in
// turn, and tells the rates and the part that is lost, medians: of all, and of the rounds that were spent in a phase.
func BenchmarkPutBesideCollect(b *testing.B) {
	const maxRounds, length = 20, 1500 * time.Millisecond
	dir, points := manyChunks(b, 1e6)
	r, err := Open(b.Context(), dir, Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer closeOnce(b, r)
	if err := r.DeletePoint(points[2]); err != nil { // every segment is copied out
		b.Fatal(err)
	}
	var hold sync.Mutex // the collection waits for it
	var phase atomic.Value
	ctx, cancel := context.WithCancel(b.Context())
	collected := make(chan error, 1)
	hold.Lock()
	go func() {
		_, err := r.Collect(ctx, CollectOptions{Progress: func(p CollectProgress) {
			phase.Store(p.Phase)
			hold.Lock()
			defer hold.Unlock()
		}})
		collected <- err
	}()
	var alone, beside []float64
	lost := map[CollectPhase][]float64{}
	for range maxRounds {
		rate := putRate(b, r, length)
		hold.Unlock()
		slowed := putRate(b, r, length)
		hold.Lock()
		if len(collected) > 0 {
			break
		}
		part := 100 * (1 - slowed/rate)
		alone, beside, lost[""] = append(alone, rate), append(beside, slowed), append(lost[""], part)
		during := phase.Load().(CollectPhase)
		lost[during] = append(lost[during], part)
	}
	cancel()
	hold.Unlock()
	if err := <-collected; err != nil && ctx.Err() == nil {
		b.Error(err)
	}
	b.Run("medians", func(b *testing.B) {
		for range b.N { // measured above
		}
		b.ReportMetric(0, "ns/op")
		b.ReportMetric(float64(len(alone)), "rounds")
		b.ReportMetric(median(alone), "alone-MiB/s")
		b.ReportMetric(median(beside), "beside-MiB/s")
		for phase, parts := range lost {
			b.ReportMetric(median(parts), strings.TrimPrefix(string(phase)+"-lost-%", "-"))
		}
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
