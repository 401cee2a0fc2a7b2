package fusefs

import (
	"crypto/sha256"
	"fmt"
	"strings"
	"time"
)

const maxName = 255 // bytes in a file name (NAME_MAX)

// fileName returns the name of the file that shows the thing called name:
// distinct names give distinct files. The file's name, suffix included, is a
// valid one and none of those reserved. See the package comment for its form.
func fileName(name, suffix string, reserved ...string) string {
	if name == "" {
		return "%" + suffix
	}
	var b strings.Builder
	for i := range len(name) {
		if c := name[i]; c < 0x20 || c == 0x7f || c == '/' || c == '%' {
			fmt.Fprintf(&b, "%%%02X", c)
		} else {
			b.WriteByte(c)
		}
	}
	escaped := b.String()
	for _, r := range append(reserved, ".", "..") {
		if escaped+suffix == r {
			escaped = fmt.Sprintf("%%%02X%s", escaped[0], escaped[1:])
		}
	}
	if len(escaped)+len(suffix) > maxName {
		sum := sha256.Sum256([]byte(name))
		tail := fmt.Sprintf("%%~%x", sum[:16])
		escaped = escaped[:maxName-len(suffix)-len(tail)] + tail
	}
	return escaped + suffix
}

// pointNames returns the folder names of a VM's points, given oldest first. A
// point's name depends only on itself and the older ones: new points never
// rename those that exist.
func pointNames(points []Point) []string {
	names := make([]string, len(points))
	taken := make(map[string]bool, len(points))
	for i, p := range points {
		at := p.Time.UTC().Format(time.RFC3339Nano)
		name := at
		if taken[name] {
			name = fileName(at+"-"+p.ID[:min(8, len(p.ID))], "")
		}
		if taken[name] {
			name = fileName(at+"-"+p.ID, "")
		}
		taken[name] = true
		names[i] = name
	}
	return names
}
