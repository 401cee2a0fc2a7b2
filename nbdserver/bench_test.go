package nbdserver_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/nbdserver"
)

// benchSize is the size of the disk that benchmarks serve, from a file in
// memory where there is one (/dev/shm).
const benchSize = 1 << 30

func benchFile(b *testing.B) string {
	b.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "nbdserver")
	if err != nil {
		dir = b.TempDir()
	}
	b.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "disk")
	f, err := os.Create(path)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	random := rand.NewChaCha8([32]byte{1})
	p := make([]byte, 1<<20)
	for range benchSize / len(p) {
		random.Read(p)
		if _, err := f.Write(p); err != nil {
			b.Fatal(err)
		}
	}
	return path
}

// delayed is a reader that takes a while.
type delayed struct {
	io.ReaderAt
	delay time.Duration
}

func (d delayed) ReadAt(p []byte, off int64) (int, error) {
	time.Sleep(d.delay)
	return d.ReaderAt.ReadAt(p, off)
}

// serveBench is the server under test as a process of its own, so that its
// processor time can be told from the clients'. It ends when its input does.
func serveBench(socket, path, delay string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	var r io.ReaderAt = f
	if d, err := time.ParseDuration(delay); err != nil {
		return err
	} else if d > 0 {
		r = delayed{f, d}
	}
	s := nbdserver.New(nbdserver.Options{})
	if err := s.Add(nbdserver.Export{Name: "disk", Disk: disk{ReaderAt: r, size: benchSize}}); err != nil {
		return err
	}
	l, err := nbdserver.Listen("unix", socket)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() { io.Copy(io.Discard, os.Stdin); cancel() }()
	return s.Serve(ctx, l)
}

// benchServer is a running server.
type benchServer struct {
	name    string
	process *os.Process
	uri     string
	rates   []float64 // of each round
	cpu     []float64 // microseconds of processor time a unit of work
}

func startBench(b *testing.B, name, command string, args ...string) *benchServer {
	b.Helper()
	socket := filepath.Join(b.TempDir(), "nbd")
	for i := range args {
		args[i] = strings.ReplaceAll(args[i], "SOCKET", socket)
	}
	cmd := exec.Command(command, args...)
	cmd.Env = append(os.Environ(), "NBDSERVER_TEST_SERVE="+socket)
	cmd.Stderr = os.Stderr
	if _, err := cmd.StdinPipe(); err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	for range 200 {
		if c, err := net.Dial("unix", socket); err == nil {
			c.Close()
			return &benchServer{name: name, process: cmd.Process, uri: nbdserver.URI(&net.UnixAddr{Net: "unix", Name: socket}, "")}
		}
		time.Sleep(20 * time.Millisecond)
	}
	b.Fatalf("%s does not answer", name)
	return nil
}

// used returns the processor time of the server so far, in microseconds.
func (s *benchServer) used(b *testing.B) float64 {
	b.Helper()
	p, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", s.process.Pid))
	if err != nil {
		b.Fatal(err)
	}
	fields := strings.Fields(string(p[bytes.LastIndexByte(p, ')')+1:]))
	user, _ := strconv.ParseFloat(fields[11], 64)
	system, _ := strconv.ParseFloat(fields[12], 64)
	return (user + system) * 10_000 // of ticks of 10 ms
}

// benchLoad runs a client against a server and returns the units of work done
// and those a second.
type benchLoad struct {
	name, unit string
	run        func(b *testing.B, uri string) (units, rate float64)
}

func copying(connections int) benchLoad {
	return benchLoad{fmt.Sprintf("nbdcopy/connections=%d", connections), "MiB/s", func(b *testing.B, uri string) (float64, float64) {
		began := time.Now()
		run(b, "nbdcopy", "--connections", fmt.Sprint(connections), "--request-size", "262144", uri, "null:")
		return benchSize >> 18, benchSize >> 20 / time.Since(began).Seconds()
	}}
}

func reading(blockKiB, depth, jobs int) benchLoad {
	name := fmt.Sprintf("fio/block=%dK/depth=%d/jobs=%d", blockKiB, depth, jobs)
	return benchLoad{name, "IOPS", func(b *testing.B, uri string) (float64, float64) {
		return randomReads(b, uri, blockKiB, depth, jobs)
	}}
}

// BenchmarkServer runs real clients against this server and others, all of one
// file in memory, in turns. It reports medians: our rate, its ratio to each of
// the others', and the processor time of the servers in microseconds a request.
func BenchmarkServer(b *testing.B) {
	path := benchFile(b)
	loads := []benchLoad{copying(1), copying(4), reading(256, 16, 1), reading(4, 1, 1), reading(4, 16, 1), reading(4, 16, 4)}
	for _, load := range loads {
		b.Run("quick/"+load.name, func(b *testing.B) {
			compare(b, load,
				startBench(b, "holdfast", os.Args[0], path, "0s"),
				startBench(b, "nbdkit", "nbdkit", "-f", "-r", "-U", "SOCKET", "file", path),
				startBench(b, "qemu-nbd", "qemu-nbd", "-r", "-t", "-e", "16", "-f", "raw", "-k", "SOCKET", path))
		})
	}
	for _, load := range []benchLoad{reading(4, 16, 1), reading(4, 16, 4), copying(1), copying(4)} {
		b.Run("delay=1ms/"+load.name, func(b *testing.B) {
			compare(b, load,
				startBench(b, "holdfast", os.Args[0], path, "1ms"),
				startBench(b, "nbdkit", "nbdkit", "-f", "-r", "-U", "SOCKET", "--filter=delay", "file", path, "rdelay=1ms"))
		})
	}
}

func compare(b *testing.B, load benchLoad, servers ...*benchServer) {
	for b.Loop() {
		for _, s := range servers {
			before := s.used(b)
			units, rate := load.run(b, s.uri)
			s.rates = append(s.rates, rate)
			s.cpu = append(s.cpu, (s.used(b)-before)/units)
		}
	}
	b.ReportMetric(0, "ns/op")
	ours := median(servers[0].rates)
	b.ReportMetric(ours, load.unit)
	for _, s := range servers {
		b.ReportMetric(median(s.cpu), s.name+"-µs")
		if s != servers[0] {
			b.ReportMetric(ours/median(s.rates), "×"+s.name)
		}
	}
}

func median(of []float64) float64 {
	slices.Sort(of)
	return of[len(of)/2]
}

// fio is randomReads that returns only the requests a second.
func fio(b *testing.B, uri string, blockKiB, depth, jobs int) float64 {
	b.Helper()
	_, rate := randomReads(b, uri, blockKiB, depth, jobs)
	return rate
}

// randomReads reads at random for two seconds with fio and returns the requests
// and those a second.
func randomReads(b *testing.B, uri string, blockKiB, depth, jobs int) (requests, rate float64) {
	b.Helper()
	out := run(b, "fio", "--name=load", "--ioengine=nbd", "--uri="+uri, "--rw=randread", fmt.Sprintf("--bs=%dk", blockKiB),
		fmt.Sprintf("--iodepth=%d", depth), fmt.Sprintf("--numjobs=%d", jobs), "--group_reporting", fmt.Sprintf("--size=%d", benchSize),
		"--time_based", "--runtime=2", "--output-format=json")
	var report struct {
		Jobs []struct {
			Read struct {
				IOPS  float64
				Total float64 `json:"total_ios"`
			}
		}
	}
	object := out[max(bytes.IndexByte(out, '{'), 0):] // the engine prints lines of its own first
	if err := json.Unmarshal(object, &report); err != nil || len(report.Jobs) != 1 {
		b.Fatalf("fio printed %s: %v", out, err)
	}
	return report.Jobs[0].Read.Total, report.Jobs[0].Read.IOPS
}
