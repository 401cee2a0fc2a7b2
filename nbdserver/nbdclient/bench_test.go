package nbdclient_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
)

// benchSize is how much an iteration reads, in bytes.
const benchSize = 1 << 30

// benchServers starts the servers that benchmarks read from, each with the same
// random bytes in memory.
func benchServers(b *testing.B) map[string]string {
	b.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "nbdclient")
	if err != nil {
		dir = b.TempDir()
	}
	b.Cleanup(func() { os.RemoveAll(dir) })
	file := writeFile(b, filepath.Join(dir, "disk"), content(benchSize))
	memory := nbdkit(b, "memory", strconv.Itoa(benchSize))
	run(b, "nbdcopy", file, "nbd+unix:///?socket="+memory)
	return map[string]string{
		"nbdkit":   memory,
		"qemu-nbd": qemuNBD(b, "-f", "raw", "-e", "16", file),
	}
}

// BenchmarkRead reads a disk with 16 goroutines, and beside it with nbdcopy.
func BenchmarkRead(b *testing.B) {
	for name, socket := range benchServers(b) {
		for _, connections := range []int{1, 4} {
			prefix := fmt.Sprintf("%s/connections=%d/", name, connections)
			b.Run(prefix+"nbdcopy", func(b *testing.B) {
				b.SetBytes(benchSize)
				for b.Loop() {
					run(b, "nbdcopy", fmt.Sprintf("--connections=%d", connections), "nbd+unix:///?socket="+socket, "null:")
				}
			})
			for _, length := range []int{256 << 10, 1 << 20} {
				b.Run(fmt.Sprintf("%sclient-%dKiB", prefix, length>>10), func(b *testing.B) {
					o := unixOptions(socket)
					o.Connections = connections
					c := dial(b, o)
					b.SetBytes(benchSize)
					b.ReportAllocs()
					for b.Loop() {
						var next atomic.Int64
						var readers sync.WaitGroup
						for range 16 {
							readers.Go(func() {
								p := make([]byte, length)
								for {
									off := next.Add(int64(length)) - int64(length)
									if off >= benchSize {
										return
									}
									if _, err := c.ReadAt(p, off); err != nil {
										b.Error(err)
										return
									}
								}
							})
						}
						readers.Wait()
					}
				})
			}
		}
	}
}
