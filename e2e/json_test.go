package e2e_test

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// The forms of a field in the contract. A form is one of these, a map of
// fields (more are welcome) or a one-element slice: a list of such.
const (
	text    = "text"
	id      = "id"   // hex, at least 8 digits
	instant = "time" // RFC 3339 in UTC
	count   = "count"
	boolean = "boolean"
	nbdURI  = "uri"
)

type (
	object = map[string]any
	listOf = []any
)

// formOf checks a decoded JSON value against a form and returns what is wrong.
func formOf(path string, v, form any) []string {
	wrong := func(want string) []string { return []string{fmt.Sprintf("%s is %v (%T), want %s", path, v, v, want)} }
	switch form := form.(type) {
	case object:
		fields, ok := v.(map[string]any)
		if !ok {
			return wrong("an object")
		}
		var bad []string
		for name, f := range form {
			field, ok := fields[name]
			if !ok {
				bad = append(bad, fmt.Sprintf("%s.%s is missing", path, name))
				continue
			}
			bad = append(bad, formOf(path+"."+name, field, f)...)
		}
		for name := range fields {
			if !regexp.MustCompile(`^[a-z][a-z0-9_]*$`).MatchString(name) {
				bad = append(bad, fmt.Sprintf("%s.%s is not snake_case", path, name))
			}
		}
		return bad
	case listOf:
		items, ok := v.([]any)
		if !ok {
			return wrong("a list")
		}
		var bad []string
		for i, item := range items {
			bad = append(bad, formOf(fmt.Sprintf("%s[%d]", path, i), item, form[0])...)
		}
		return bad
	}
	s, isText := v.(string)
	switch form {
	case boolean:
		if _, ok := v.(bool); !ok {
			return wrong("true or false")
		}
	case count:
		n, ok := v.(json.Number)
		if !ok || !regexp.MustCompile(`^[0-9]+$`).MatchString(n.String()) {
			return wrong("an integer of at least 0")
		}
	case text:
		if !isText || s == "" {
			return wrong("a text")
		}
	case id:
		if !isText || !regexp.MustCompile(`^[0-9a-f]{8,64}$`).MatchString(s) {
			return wrong("a hex id")
		}
	case instant:
		at, err := time.Parse(time.RFC3339Nano, s)
		if !isText || err != nil || !strings.HasSuffix(s, "Z") || time.Since(at).Abs() > time.Hour {
			return wrong("a recent RFC 3339 time in UTC")
		}
	case nbdURI:
		if !isText || !regexp.MustCompile(`^nbd(\+unix)?://`).MatchString(s) {
			return wrong("an NBD URI")
		}
	}
	return nil
}

// hasForm checks the JSON a command printed.
func hasForm(t *testing.T, command, printed string, form any) {
	t.Helper()
	d := json.NewDecoder(strings.NewReader(printed))
	d.UseNumber()
	var v any
	if err := d.Decode(&v); err != nil {
		t.Errorf("%s: %v in %q", command, err, printed)
		return
	}
	if d.More() {
		t.Errorf("%s prints more than one JSON value: %q", command, printed)
	}
	for _, bad := range formOf(command, v, form) {
		t.Error(bad)
	}
}

// TestJSON holds what --json prints to the contract.
func TestJSON(t *testing.T) {
	t.Parallel()
	r := newRepo(t)
	hasForm(t, "point list of nothing", r.ok("point", "list", "--json"), listOf{nil})
	if got := strings.TrimSpace(r.ok("point", "list", "--json")); got != "[]" {
		t.Errorf("no points: got %q, want an empty list", got)
	}
	stats := object{
		"points": count, "logical_bytes": count, "unique_bytes": count, "stored_bytes": count,
		"chunks": count, "segments": count, "chunk_size": count,
	}
	hasForm(t, "repo stats of nothing", r.ok("repo", "stats", "--json"), stats)

	source := mixedDisk(t, 6*miB, 71)
	hasForm(t, "backup image", r.ok("backup", "image", source, "--vm", "web", "--disk", "vda", "--json"), object{
		"point": id, "vm": text, "time": instant, "mode": text,
		"disks": listOf{object{
			"name": text, "size_bytes": count, "read_bytes": count,
			"changed_bytes": count, "new_bytes": count, "stored_bytes": count,
		}},
	})
	overwrite(t, source, newRand(72), 3)
	second := decode[backupResult](t, r.ok("backup", "image", source, "--vm", "web", "--disk", "vda", "--json"))
	r.backup(source)

	pointForm := object{
		"id": id, "vm": text, "time": instant, "mode": text, "consistency": text,
		"disks": listOf{object{"name": text, "size_bytes": count}},
	}
	hasForm(t, "point list", r.ok("point", "list", "--json"), listOf{pointForm})
	hasForm(t, "point show", r.ok("point", "show", second.Point, "--json"), pointForm)
	points := r.points()
	if !slices.IsSortedFunc(points, func(a, b point) int { return strings.Compare(a.Time, b.Time) }) || len(points) != 3 {
		t.Errorf("got points %+v, want three, oldest first", points)
	}
	web := decode[[]point](t, r.ok("point", "list", "--vm", "web", "--json"))
	if len(web) != 2 || web[0].VM != "web" || web[1].ID != second.Point || web[0].Disks[0].Name != "vda" {
		t.Errorf("point list --vm web: got %+v, want its two points with the disk vda", web)
	}
	hasForm(t, "point diff", r.ok("point", "diff", web[0].ID, web[1].ID, "--json"), object{
		"disks": listOf{object{"name": text, "bytes": count, "extents": listOf{object{"offset": count, "length": count}}}},
	})
	hasForm(t, "repo stats", r.ok("repo", "stats", "--json"), stats)
	got := decode[statsResult](t, r.ok("repo", "stats", "--json"))
	if got.Points != 3 || got.ChunkSize != chunk || got.LogicalBytes != 3*6*miB || got.Chunks == 0 || got.Segments == 0 ||
		got.UniqueBytes >= got.LogicalBytes || got.StoredBytes >= got.UniqueBytes {
		t.Errorf("got stats %+v, want 3 points of 6 MiB that share and compress", got)
	}
	hasForm(t, "repo verify", r.ok("repo", "verify", "--json"), object{
		"checked_chunks": count, "checked_bytes": count,
		"errors": listOf{object{"point": id, "disk": text, "offset": count, "reason": text}},
	})
	if v := r.verified(); v.CheckedChunks == 0 || v.CheckedBytes == 0 {
		t.Errorf("repo verify: got %+v, want chunks that were checked", v)
	}
	hasForm(t, "repo gc", r.ok("repo", "gc", "--json"), object{"live_chunks": count, "dead_chunks": count, "freed_bytes": count})

	e := r.export(second.Point)
	hasForm(t, "export add", e.printed, object{"name": text, "uri": nbdURI, "read_only": boolean, "size_bytes": count})
	e.stop()
}

// TestDiff holds a diff to the chunks that really differ.
func TestDiff(t *testing.T) {
	t.Parallel()
	r := newRepo(t)
	source := mixedDisk(t, 200*miB+512, 73)
	first := r.backup(source)
	original := copyFile(t, source)
	overwrite(t, source, newRand(74), 41)
	overwriteAt(t, source, 200*miB+100, "in the last chunk, which is partial")
	overwriteAt(t, source, 64*miB, strings.Repeat("\x00", 2*miB)) // the map's second node begins there
	second := r.backup(source)

	want := changedChunks(t, original, source)
	d := decode[diffResult](t, r.ok("point", "diff", first.Point, second.Point, "--json"))
	if len(d.Disks) != 1 {
		t.Fatalf("got %d disks, want 1", len(d.Disks))
	}
	var got []int64
	var sum int64
	for _, e := range d.Disks[0].Extents {
		if e.Length <= 0 || e.Offset%chunk != 0 {
			t.Errorf("got extent %+v, want whole chunks", e)
		}
		sum += e.Length
		for off := e.Offset; off < e.Offset+e.Length; off += chunk {
			got = append(got, off/chunk)
		}
	}
	if !slices.Equal(got, want) || d.Disks[0].Bytes != sum {
		t.Errorf("got chunks %v, %d bytes, want %v, %d", got, d.Disks[0].Bytes, want, sum)
	}
	if changed := second.Disks[0].ChangedBytes; changed != sum {
		t.Errorf("the backup says %d bytes changed, the diff %d", changed, sum)
	}
	same := decode[diffResult](t, r.ok("point", "diff", second.Point, second.Point, "--json"))
	if len(same.Disks) != 1 || same.Disks[0].Bytes != 0 || same.Disks[0].Extents == nil {
		t.Errorf("a point against itself: got %+v, want one disk with an empty list", same)
	}
}

// TestAddressing names a point in every way there is.
func TestAddressing(t *testing.T) {
	t.Parallel()
	r := newRepo(t)
	source := mixedDisk(t, 2*miB, 75)
	first := r.backup(source)
	time.Sleep(1100 * time.Millisecond) // a point's time may have only seconds
	second := r.backup(source)
	after, err := time.Parse(time.RFC3339Nano, second.Time)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ name, want string }{
		{first.Point, first.Point},
		{first.Point[:8], first.Point},
		{second.Point[:12], second.Point},
		{"vm@latest", second.Point},
		{"vm@" + first.Time, first.Point},
		{"vm@" + second.Time, second.Point},
		{"vm@" + after.Add(time.Hour).Format(time.RFC3339), second.Point},
		{"vm@" + after.Add(-time.Second).In(time.FixedZone("", 2*3600)).Format(time.RFC3339Nano), first.Point},
	} {
		got := decode[point](t, r.ok("point", "show", tt.name, "--json"))
		if got.ID != tt.want {
			t.Errorf("%s: got point %s, want %s", tt.name, got.ID, tt.want)
		}
	}
	r.ok("point", "delete", first.Point[:8], "vm@latest")
	if points := r.points(); len(points) != 0 {
		t.Errorf("after deleting both: got %+v, want none", points)
	}
}

// TestWords looks at what people read: help, version, and plain output that
// speaks of the same things as the JSON.
func TestWords(t *testing.T) {
	t.Parallel()
	r := newRepo(t)
	source := mixedDisk(t, 2*miB, 76)
	b := r.backup(source)
	for _, tt := range []struct {
		says []string
		args []string
	}{
		{[]string{"e2e"}, []string{"version"}},
		{[]string{"init", "backup", "point", "export", "mount", "restore", "repo"}, []string{"help"}},
		{[]string{"image", "--vm"}, []string{"help", "backup", "image"}},
		{[]string{"verify", "gc", "rebuild-index", "stats"}, []string{"help", "repo"}},
		{[]string{b.Point[:8], "vm"}, []string{"point", "list"}},
		{[]string{b.Point[:8], "2 MiB"}, []string{"point", "show", b.Point}},
	} {
		printed := r.ok(tt.args...)
		for _, word := range tt.says {
			if !strings.Contains(printed, word) {
				t.Errorf("holdfast %s: got %q, want it to say %q", strings.Join(tt.args, " "), printed, word)
			}
		}
	}
	for _, shell := range []string{"bash", "zsh", "fish"} {
		if r.ok("completion", shell) == "" {
			t.Errorf("completion %s: got nothing, want a script", shell)
		}
	}
	to := filepath.Join(t.TempDir(), "quiet.raw")
	if res := r.run("--quiet", "restore", "image", b.Point, "--to", to); res.code != 0 || res.stderr != "" {
		t.Errorf("--quiet: got\n%v\nwant nothing on standard error", res)
	}
}
