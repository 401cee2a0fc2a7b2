package blockstore

import (
	"io/fs"
	"math"
	"os"
	"path"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	minDefaultCache = 128 << 20
	maxDefaultCache = 2 << 30
	// maxNodeCache bounds the part of the cache that is for map nodes, bytes: those of 256 GiB
	// of data, with chunks of 64 KiB.
	maxNodeCache = 128 << 20
)

// defaultCacheSize returns Options.CacheSize for this machine, bytes.
func defaultCacheSize() int64 {
	memory := int64(maxDefaultCache * 8)
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) == nil {
		memory = min(memory, int64(info.Totalram)*int64(info.Unit))
	}
	groups, err := os.ReadFile("/proc/self/cgroup")
	if err == nil {
		memory = min(memory, cgroupMemory(os.DirFS("/sys/fs/cgroup"), string(groups)))
	}
	return min(max(memory/8, minDefaultCache), maxDefaultCache)
}

// cgroupMemory returns the least limit, in bytes, of the control groups that a process is in,
// from its /proc/PID/cgroup; the largest number if there is none. A group's files are
// in root, under its path. Version 1 of control groups is not looked at.
//
// Source: Linux Documentation/admin-guide/cgroup-v2.rst, "memory.max" and "Processes".
func cgroupMemory(root fs.FS, groups string) int64 {
	least := int64(math.MaxInt64)
	for line := range strings.Lines(groups) {
		group, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::/")
		if !ok {
			continue
		}
		for dir := path.Clean(group); ; dir = path.Dir(dir) {
			text, err := fs.ReadFile(root, path.Join(dir, "memory.max"))
			if err == nil {
				// "max" is no number, and no limit.
				if n, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64); err == nil {
					least = min(least, n)
				}
			}
			if dir == "." {
				break
			}
		}
	}
	return least
}
