package steady_test

import (
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/steady"
)

// machine is a machine whose clocks a test sets.
type machine struct {
	wall time.Time
	boot string
	up   time.Duration
}

func (m *machine) Wall() time.Time       { return m.wall }
func (m *machine) Boot() string          { return m.boot }
func (m *machine) Uptime() time.Duration { return m.up }

// pass lets time pass.
func (m *machine) pass(d time.Duration) {
	m.wall, m.up = m.wall.Add(d), m.up+d
}

var start = time.Date(2026, 11, 22, 8, 0, 0, 0, time.UTC)

func TestClock(t *testing.T) {
	t.Parallel()
	const year = 365 * 24 * time.Hour
	for _, tt := range []struct {
		name string
		then func(m *machine) *machine // what happens after an hour, which machine goes on
		want time.Duration             // since the start
	}{
		{"nothing", func(m *machine) *machine { return m }, time.Hour},
		{"an hour more", func(m *machine) *machine { m.pass(time.Hour); return m }, 2 * time.Hour},
		{"wall clock forward by years", func(m *machine) *machine { m.wall = m.wall.Add(50 * year); return m }, time.Hour},
		{"wall clock back by years", func(m *machine) *machine { m.wall = m.wall.Add(-50 * year); return m }, time.Hour},
		{"asleep", func(m *machine) *machine { m.up += time.Hour; return m }, 2 * time.Hour},
		{"reboot", func(m *machine) *machine { m.boot, m.up = "two", 0; return m }, time.Hour},
		{"long after a reboot", func(m *machine) *machine { m.boot, m.up = "two", year; return m }, time.Hour},
		{"another machine", func(m *machine) *machine { return &machine{m.wall.Add(year), "other", year} }, time.Hour},
		{"put back to an earlier moment", func(m *machine) *machine { m.up -= time.Minute; return m }, time.Hour},
	} {
		m := &machine{start, "one", 5 * time.Minute}
		c := steady.New(m)
		m.pass(time.Hour)
		base := c.Base()
		m = tt.then(m)
		r := steady.Resume(m, steady.Base{}, base)
		if got := r.Now().Sub(start); got != tt.want {
			t.Errorf("%s: got %v, want %v", tt.name, got, tt.want)
		}
		m.pass(time.Minute)
		if got := r.Now().Sub(start); got != tt.want+time.Minute {
			t.Errorf("%s, a minute later: got %v, want %v", tt.name, got, tt.want+time.Minute)
		}
	}
}

// A clock that runs does not follow a machine that is put back, and goes on from there.
func TestRunningClockIsPutBack(t *testing.T) {
	t.Parallel()
	m := &machine{start, "one", time.Hour}
	c := steady.New(m)
	m.up = time.Minute
	if got := c.Now(); !got.Equal(start) {
		t.Errorf("got %v, want %v", got, start)
	}
	m.up = 3 * time.Minute
	if got, want := c.Now(), start.Add(2*time.Minute); !got.Equal(want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// Where the boot has no id, time counts only while the clock runs.
func TestNoBootID(t *testing.T) {
	t.Parallel()
	m := &machine{start, "", time.Hour}
	c := steady.New(m)
	m.pass(time.Minute)
	base := c.Base()
	m.pass(time.Hour)
	if got, want := steady.Resume(m, base).Now(), start.Add(time.Minute); !got.Equal(want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestWall(t *testing.T) {
	t.Parallel()
	m := &machine{start, "one", time.Hour}
	c := steady.New(m)
	m.wall = m.wall.Add(24 * time.Hour) // the machine was off for a day, or its clock was set
	if got, want := c.Wall(start.Add(time.Minute)), m.wall.Add(time.Minute); !got.Equal(want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestSystem(t *testing.T) {
	t.Parallel()
	s := steady.System()
	if s.Boot() == "" || s.Uptime() <= 0 {
		t.Errorf("got boot %q, uptime %v", s.Boot(), s.Uptime())
	}
	before := time.Now()
	if got := steady.New(s).Now(); got.Before(before.Add(-time.Second)) || got.After(time.Now().Add(time.Second)) {
		t.Errorf("got %v at %v", got, before)
	}
}
