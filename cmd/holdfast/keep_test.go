package main

import (
	"strings"
	"testing"
	"time"
)

// Deleting, bringing back and locking, as users see it.
func TestKeepPoints(t *testing.T) {
	t.Parallel()
	data, image, points := newRepo(t)
	list := func(flags ...string) []string {
		var got []struct{ ID string }
		decode(t, ok(t, append([]string{"--data", data, "point", "list", "--json"}, flags...)...), &got)
		var ids []string
		for _, p := range got {
			ids = append(ids, p.ID)
		}
		return ids
	}
	check := func(when string, live, deleted int) {
		t.Helper()
		if a, b := list(), list("--deleted"); len(a) != live || len(b) != deleted {
			t.Errorf("%s: got points %v and deleted ones %v, want %d and %d", when, a, b, live, deleted)
		}
	}
	refused := func(code int, says string, args ...string) {
		t.Helper()
		got := holdfast(t.Context(), append([]string{"--data", data}, args...)...)
		if got.code != code || !strings.Contains(got.stderr, says) {
			t.Errorf("%q: got %+v, want exit status %d and %q", args, got, code, says)
		}
	}
	ok(t, "--data", data, "point", "delete", points[0])
	check("deleted", 1, 1)
	ok(t, "--data", data, "point", "undelete", "web@latest")
	check("undeleted", 2, 0)
	refused(exitNotFound, "point list --deleted", "point", "undelete", points[0])

	ok(t, "--data", data, "repo", "set", "--delete-quarantine", "1d12h")
	ok(t, "--data", data, "point", "delete", points[0])
	ok(t, "--data", data, "repo", "gc")
	check("kept over a collection", 1, 1)
	ok(t, "--data", data, "repo", "set", "--delete-quarantine", "0")
	ok(t, "--data", data, "point", "delete", points[1])
	ok(t, "--data", data, "repo", "gc")
	check("collected", 0, 1)
	ok(t, "--data", data, "point", "undelete", points[0])

	var locked struct {
		LockedUntil time.Time `json:"locked_until"`
	}
	until := time.Now().Add(48 * time.Hour).UTC().Truncate(time.Second)
	decode(t, ok(t, "--data", data, "point", "lock", points[0], "--until", until.Format(time.RFC3339), "--json"), &locked)
	if d := locked.LockedUntil.Sub(until).Abs(); d > time.Second {
		t.Errorf("locked until %v, want %v", locked.LockedUntil, until)
	}
	refused(exitRefused, "never shortened", "point", "lock", points[0], "--for", "1d")
	refused(exitRefused, until.Format("2006-01-02T15"), "point", "delete", points[0])
	refused(exitUsage, "time to come", "point", "lock", points[0], "--until", "2020-01-01T00:00:00Z")
	refused(exitUsage, "soon", "point", "lock", points[0], "--for", "soon")
	refused(exitUsage, "until", "point", "lock", points[0])

	var backup struct {
		Point       string
		LockedUntil time.Time `json:"locked_until"`
	}
	decode(t, ok(t, "--data", data, "backup", "image", image, "--vm", "web", "--lock", "30d", "--json"), &backup)
	if d := time.Until(backup.LockedUntil) - 30*24*time.Hour; d.Abs() > time.Hour {
		t.Errorf("a backup that is locked for 30 days is locked until %v", backup.LockedUntil)
	}
	refused(exitRefused, "locked", "point", "delete", backup.Point)
	third := strings.TrimSpace(strings.Fields(ok(t, "--data", data, "backup", "image", image, "--vm", "web"))[1])
	refused(exitRefused, "nothing was deleted", "point", "delete", third, backup.Point)
	ok(t, "--data", data, "point", "show", third)
	var changes []struct{ Op string }
	decode(t, ok(t, "--data", data, "point", "log", "--json"), &changes)
	if n := len(changes); n < 10 || changes[n-1].Op != "commit" {
		t.Errorf("got changes %v, want all of them", changes)
	}
}

// A head that was noted tells a repository that was put back.
func TestVerifySince(t *testing.T) {
	t.Parallel()
	data, _, points := newRepo(t)
	var stats struct{ Head string }
	decode(t, ok(t, "--data", data, "repo", "stats", "--json"), &stats)
	ok(t, "--data", data, "point", "delete", points[0])
	ok(t, "--data", data, "repo", "verify", "--since", stats.Head)
	number, chain, _ := strings.Cut(stats.Head, ":")
	for since, code := range map[string]int{
		"9" + number + ":" + chain: exitFailed, number + ":" + strings.Repeat("0", 64): exitFailed, "yesterday": exitUsage,
	} {
		if got := holdfast(t.Context(), "--data", data, "repo", "verify", "--since", since); got.code != code {
			t.Errorf("since %s: got %+v, want exit status %d", since, got, code)
		}
	}
}

func TestDuration(t *testing.T) {
	t.Parallel()
	for want, d := range map[string]time.Duration{
		"0s": 0, "7d": 168 * time.Hour, "1d12h": 36 * time.Hour, "2m": 2 * time.Minute, "1h5m": 65 * time.Minute, "20s": 20 * time.Second, "10m": 10 * time.Minute,
	} {
		if got := duration(d); got != want {
			t.Errorf("%v: got %q, want %q", d, got, want)
		}
	}
}

func TestParseDuration(t *testing.T) {
	t.Parallel()
	const day = 24 * time.Hour
	for s, want := range map[string]time.Duration{
		"30d": 30 * day, "12h": 12 * time.Hour, "1d12h": 36 * time.Hour, "0": 0, "0d": 0, "90m": 90 * time.Minute,
	} {
		got, err := parseDuration(s)
		if err != nil || got != want {
			t.Errorf("%q: got %v, %v, want %v", s, got, err, want)
		}
		if again, err := parseDuration(duration(got)); err != nil || again != got {
			t.Errorf("%v is written %q: got %v, %v", got, duration(got), again, err)
		}
	}
	for _, s := range []string{"", "d", "7", "-1d", "-1h", "1d-1h", "1.5d", "1dd", "999999999999d", "soon"} {
		if got, err := parseDuration(s); err == nil {
			t.Errorf("%q: got %v, want an error", s, got)
		}
	}
}
