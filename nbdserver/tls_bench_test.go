package nbdserver_test

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/nbdserver"
)

// BenchmarkTLS is BenchmarkServer over TLS, against nbdkit.
func BenchmarkTLS(b *testing.B) {
	path := benchFile(b)
	a := newAuthority(b)
	serverDir, _ := a.folder("server", "server")
	clientDir, _ := a.folder("client", "client")
	home := b.TempDir() // where clients look for certificates
	if err := os.Mkdir(filepath.Join(home, ".pki"), 0o700); err != nil {
		b.Fatal(err)
	}
	if err := os.Rename(clientDir, filepath.Join(home, ".pki", "libnbd")); err != nil {
		b.Fatal(err)
	}
	b.Setenv("HOME", home)
	servers := []struct {
		name  string
		start func(b *testing.B) string
	}{
		{"holdfast", func(b *testing.B) string {
			o := nbdserver.Options{TLS: loadTLS(b, serverDir, nbdserver.TLSOptions{Required: true})}
			return start(b, o, nbdserver.Export{Name: "disk", Disk: disk{ReaderAt: openFile(b, path), size: benchSize}})
		}},
		{"nbdkit", func(b *testing.B) string { return nbdkitTLS(b, serverDir, path) }},
	}
	for _, server := range servers {
		b.Run("nbdcopy/connections=1/"+server.name, func(b *testing.B) {
			uri := "nbds+unix:///?socket=" + server.start(b)
			b.SetBytes(benchSize)
			for b.Loop() {
				run(b, "nbdcopy", "--connections", "1", "--request-size", "262144", uri, "null:")
			}
		})
	}
	for _, load := range []struct{ block, depth, jobs int }{{4, 1, 1}, {4, 16, 1}, {256, 16, 1}} {
		for _, server := range servers {
			b.Run(fmt.Sprintf("fio/block=%dK/depth=%d/jobs=%d/%s", load.block, load.depth, load.jobs, server.name), func(b *testing.B) {
				uri := "nbds+unix:///?socket=" + server.start(b)
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

func nbdkitTLS(b *testing.B, dir, path string) string {
	b.Helper()
	socket := filepath.Join(b.TempDir(), "nbd")
	cmd := exec.Command("nbdkit", "-f", "-r", "-U", socket, "--tls=require", "--tls-certificates="+dir, "file", path)
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
