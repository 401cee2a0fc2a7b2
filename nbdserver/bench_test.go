package nbdserver_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
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

// nbdkit serves path on a unix socket with nbdkit's file plugin, the yardstick.
func nbdkit(b *testing.B, path string) string {
	b.Helper()
	socket := filepath.Join(b.TempDir(), "nbd")
	cmd := exec.Command("nbdkit", "-f", "-r", "-U", socket, "file", path)
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	for range 100 {
		if c, err := net.Dial("unix", socket); err == nil {
			c.Close()
			return socket
		}
		time.Sleep(20 * time.Millisecond)
	}
	b.Fatal("nbdkit does not answer")
	return ""
}

// BenchmarkServer runs real clients against this server and against nbdkit on
// the same file in memory.
func BenchmarkServer(b *testing.B) {
	path := benchFile(b)
	servers := []struct {
		name  string
		start func(b *testing.B) string
	}{
		{"holdfast", func(b *testing.B) string {
			return start(b, nbdserver.Options{}, nbdserver.Export{Name: "disk", Disk: disk{ReaderAt: openFile(b, path), size: benchSize}})
		}},
		{"nbdkit", func(b *testing.B) string { return nbdkit(b, path) }},
	}
	for _, connections := range []int{1, 4} {
		for _, server := range servers {
			b.Run(fmt.Sprintf("nbdcopy/connections=%d/%s", connections, server.name), func(b *testing.B) {
				uri := nbdserver.URI(&net.UnixAddr{Net: "unix", Name: server.start(b)}, "")
				b.SetBytes(benchSize)
				for b.Loop() {
					run(b, "nbdcopy", "--connections", fmt.Sprint(connections), "--request-size", "262144", uri, "null:")
				}
			})
		}
	}
	for _, load := range []struct{ block, depth, jobs int }{{4, 1, 1}, {4, 16, 1}, {4, 16, 4}, {256, 16, 1}} {
		for _, server := range servers {
			b.Run(fmt.Sprintf("fio/block=%dK/depth=%d/jobs=%d/%s", load.block, load.depth, load.jobs, server.name), func(b *testing.B) {
				uri := nbdserver.URI(&net.UnixAddr{Net: "unix", Name: server.start(b)}, "")
				var iops, n float64
				for b.Loop() {
					iops += fio(b, uri, load.block, load.depth, load.jobs)
					n++
				}
				b.ReportMetric(iops/n, "IOPS")
			})
		}
	}
}

// fio reads at random for two seconds and returns the requests per second.
func fio(b *testing.B, uri string, block, depth, jobs int) float64 {
	b.Helper()
	out := run(b, "fio", "--name=load", "--ioengine=nbd", "--uri="+uri, "--rw=randread", fmt.Sprintf("--bs=%dk", block),
		fmt.Sprintf("--iodepth=%d", depth), fmt.Sprintf("--numjobs=%d", jobs), "--group_reporting", fmt.Sprintf("--size=%d", benchSize),
		"--time_based", "--runtime=2", "--output-format=json")
	var report struct {
		Jobs []struct {
			Read struct {
				IOPS float64
			}
		}
	}
	object := out[max(bytes.IndexByte(out, '{'), 0):] // the engine prints lines of its own first
	if err := json.Unmarshal(object, &report); err != nil || len(report.Jobs) != 1 {
		b.Fatalf("fio printed %s: %v", out, err)
	}
	return report.Jobs[0].Read.IOPS
}
