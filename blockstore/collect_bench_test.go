package blockstore

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime/metrics"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// smallRecords is the length of the records of manyChunks, bytes, and smallSegment that of
// its segments: as many records as one of 128 MiB has of half-compressed 64 KiB.
const (
	smallRecords = 100
	smallSegment = 4096 * smallRecords
)

// manyChunks makes a repository of n chunks, and three points that share none of them: the
// first needs eight tenths, the second a tenth that lies by itself, the third a tenth
// that lies in the same segments as the first. The payloads are too short to be true, and
// nobody decodes them.
func manyChunks(b *testing.B, n int) (dir string, points [3]PointID) {
	b.Helper()
	dir = filepath.Join(b.TempDir(), "repo")
	if err := Create(dir, CreateOptions{}); err != nil {
		b.Fatal(err)
	}
	r, err := Open(b.Context(), dir, Options{SegmentSize: smallSegment})
	if err != nil {
		b.Fatal(err)
	}
	defer closeOnce(b, r)
	s := r.Begin()
	defer s.Close()
	var leaves [3][]Leaf
	var leaf [3][]ID
	put := func(which int) {
		var children [Fanout]ID
		copy(children[:], leaf[which])
		id, _, err := s.PutNode(&children)
		if err != nil {
			b.Fatal(err)
		}
		leaves[which] = append(leaves[which], Leaf{Index: int64(len(leaves[which])), ID: id})
		leaf[which] = leaf[which][:0]
	}
	rng := rand.NewChaCha8([32]byte{1})
	record := make([]byte, IDSize+smallRecords-recordHeaderSize)
	for i := range n {
		_, _ = rng.Read(record) // it never fails
		id := ID(record)
		if _, err := r.appender.append(id, chunkRecord, codecS2, DefaultChunkSize, record[IDSize:]); err != nil {
			b.Fatal(err)
		}
		which := 0
		switch {
		case i >= n/10*9:
			which = 1
		case i%9 == 0:
			which = 2
		}
		if leaf[which] = append(leaf[which], id); len(leaf[which]) == Fanout {
			put(which)
		}
	}
	for which := range points {
		put(which)
		m := Map{Size: int64(len(leaves[which])) * r.LeafSpan()}
		if m.Root, _, err = s.BuildMap(m.Size, Map{}, leaves[which]); err != nil {
			b.Fatal(err)
		}
		p, err := s.Commit(b.Context(), Point{
			ID: NewPointID(), VM: fmt.Sprint("vm", which), Time: time.Now(), Mode: "full", Consistency: "crash",
			Disks: []PointDisk{{Name: "vda", Map: m}},
		})
		if err != nil {
			b.Fatal(err)
		}
		points[which] = p.ID
	}
	return dir, points
}

// BenchmarkCollect collects a repository of many chunks three times: with nothing dead, with a tenth
// dead that lies by itself, and with a ninth of every segment dead. It tells the seconds of
// each phase, those of the processor, and how far memory grew: the heap, sampled, and all of the
// process, with what of the index is mapped.
func BenchmarkCollect(b *testing.B) {
	sizes := []int{1e6}
	if os.Getenv("HOLDFAST_EXTENDED") != "" {
		sizes = append(sizes, 1e7)
	}
	for _, n := range sizes {
		name := func(dead string) string { return fmt.Sprintf("chunks=%.0e/dead=%s", float64(n), dead) }
		dir, points := manyChunks(b, n)
		for i, dead := range []string{"none", "run", "spread"} {
			r, err := Open(b.Context(), dir, Options{SegmentSize: smallSegment})
			if err != nil {
				b.Fatal(err)
			}
			if i > 0 {
				if err := r.DeletePoint(points[i]); err != nil {
					b.Fatal(err)
				}
			}
			report := measureCollect(b, r)
			closeOnce(b, r)
			b.Run(name(dead), func(b *testing.B) {
				for range b.N { // measured above, once: a second collection finds nothing dead
				}
				b.ReportMetric(0, "ns/op")
				report(b)
			})
		}
	}
}

// measureCollect collects a repository and returns what reports the figures.
func measureCollect(b *testing.B, r *Repository) (report func(*testing.B)) {
	b.Helper()
	if err := os.WriteFile("/proc/self/clear_refs", []byte("5"), 0); err != nil { // VmHWM begins anew
		b.Fatal(err)
	}
	resident := processMemory(b, "VmRSS:")
	heap, stop := sampleHeap()
	spent := map[CollectPhase]time.Duration{}
	phase, since := PhaseMark, time.Now()
	processor := processorTime(b)
	_, err := r.Collect(b.Context(), CollectOptions{Progress: func(p CollectProgress) {
		now := time.Now()
		spent[phase] += now.Sub(since)
		phase, since = p.Phase, now
	}})
	if err != nil {
		b.Fatal(err)
	}
	processor = processorTime(b) - processor
	spent[phase] += time.Since(since)
	stop()
	grown := processMemory(b, "VmHWM:") - resident
	return func(b *testing.B) {
		for _, p := range []CollectPhase{PhaseMark, PhaseSweep, PhaseConfirm} {
			b.ReportMetric(spent[p].Seconds(), string(p)+"-s")
		}
		b.ReportMetric(processor.Seconds(), "cpu-s")
		b.ReportMetric(float64(*heap)/(1<<20), "heap-MiB")
		b.ReportMetric(float64(grown)/(1<<20), "resident-MiB")
	}
}

// sampleHeap watches how far the heap grows, bytes, until stop is called.
func sampleHeap() (grown *int64, stop func()) {
	sample := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
	metrics.Read(sample)
	start := int64(sample[0].Value.Uint64())
	grown = new(int64)
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-done:
				return
			case <-tick.C:
				metrics.Read(sample)
				*grown = max(*grown, int64(sample[0].Value.Uint64())-start)
			}
		}
	})
	return grown, func() { close(done); wg.Wait() }
}

// processMemory returns a figure of the process's memory, bytes.
func processMemory(b *testing.B, name string) int64 {
	b.Helper()
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		b.Fatal(err)
	}
	_, rest, _ := bytes.Cut(status, []byte(name))
	var kib int64
	if _, err := fmt.Sscan(string(rest), &kib); err != nil {
		b.Fatal(err)
	}
	return kib << 10
}

// processorTime returns what the process has used of all processors.
func processorTime(b *testing.B) time.Duration {
	b.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
