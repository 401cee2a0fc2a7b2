package fusefs

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// fsType is the type of our mounts in /proc/self/mountinfo.
const fsType = "fuse." + subtype

// mountEntry is a line of /proc/self/mountinfo.
type mountEntry struct {
	device string // "major:minor", unique among what is mounted now
	dir    string
	fsType string
	source string
}

// parseMountinfo returns the mounts in the order they were made; lines that it cannot
// read are left out. Source: proc(5), "/proc/pid/mountinfo".
func parseMountinfo(text string) []mountEntry {
	var mounts []mountEntry
	for line := range strings.Lines(text) {
		left, right, _ := strings.Cut(line, " - ")
		l, r := strings.Fields(left), strings.Fields(right)
		if len(l) < 6 || len(r) < 2 {
			continue
		}
		mounts = append(mounts, mountEntry{device: l[2], dir: unescape(l[4]), fsType: r[0], source: unescape(r[1])})
	}
	return mounts
}

// unescape decodes the three-digit octal escapes of mountinfo, such as \040 for a space.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+4 <= len(s) {
			if c, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(c))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// mountAt returns the topmost mount at dir, as resolve returns it.
func mountAt(dir string) (mountEntry, bool, error) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return mountEntry{}, false, err
	}
	var top mountEntry
	found := false
	for _, m := range parseMountinfo(string(text)) {
		if m.dir == dir {
			top, found = m, true
		}
	}
	return top, found, nil
}

// resolve returns dir as mountinfo has it: absolute and without symbolic links.
// It leaves a mount point itself alone, which may be dead or hang.
func resolve(dir string) (string, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	parent, err := filepath.EvalSymlinks(filepath.Dir(abs))
	if err != nil {
		return "", err
	}
	path := filepath.Join(parent, filepath.Base(abs))
	if _, mounted, err := mountAt(path); err != nil || mounted {
		return path, err
	}
	switch real, err := filepath.EvalSymlinks(path); {
	case err == nil:
		return real, nil
	case os.IsNotExist(err):
		return path, nil
	default:
		return "", err
	}
}

// users describes up to five processes that use files below dir, as
// "1234 (cp), 1240 (bash)"; "" if none is found, as is the case for other
// users' processes. It does not touch the files.
func users(dir string) string {
	const most = 5
	var found []string
	processes, err := os.ReadDir("/proc")
	if err != nil {
		return ""
	}
	for _, p := range processes {
		if _, err := strconv.Atoi(p.Name()); err != nil || !uses(filepath.Join("/proc", p.Name()), dir) {
			continue
		}
		if len(found) == most {
			found = append(found, "…")
			break
		}
		name, err := os.ReadFile(filepath.Join("/proc", p.Name(), "comm"))
		if err != nil {
			continue // it ended
		}
		found = append(found, fmt.Sprintf("%s (%s)", p.Name(), strings.TrimSpace(string(name))))
	}
	return strings.Join(found, ", ")
}

// uses reports whether the process has an open or mapped file, its working
// folder or its root in dir.
func uses(proc, dir string) bool {
	links := []string{filepath.Join(proc, "cwd"), filepath.Join(proc, "root"), filepath.Join(proc, "exe")}
	for _, sub := range []string{"fd", "map_files"} {
		open, err := os.ReadDir(filepath.Join(proc, sub))
		if err != nil {
			continue // not ours to see
		}
		for _, l := range open {
			links = append(links, filepath.Join(proc, sub, l.Name()))
		}
	}
	for _, l := range links {
		if path, err := os.Readlink(l); err == nil && (path == dir || strings.HasPrefix(path, dir+"/")) {
			return true
		}
	}
	return false
}
