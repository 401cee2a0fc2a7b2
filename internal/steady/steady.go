// Package steady keeps a time that never runs ahead of the time that has really passed,
// whatever is done to the machine's clock: what must not happen before its time is
// measured with it.
//
// A [Clock] begins as the wall clock says, once. From then on it goes on with the
// kernel's count of the time since the machine started (CLOCK_BOOTTIME, which
// counts time asleep and which nobody can set). Where it stands is a [Base], which
// its user keeps in a file. A clock that is resumed from a base of this boot goes on as if it
// had never stopped; from one of another boot, or of another machine, it goes on from
// the base: what passed since then is not counted. So it may be behind and is
// never ahead.
//
// # Limits
//
// Who may write the file of the base, or run the program in a time namespace of his own
// (time_namespaces(7)), can set the clock forward.
package steady

import (
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Base is where a clock stood at one moment.
type Base struct {
	Time   time.Time     `json:"time"`      // what it showed, UTC
	Boot   string        `json:"boot"`      // the id of the boot; "" if nobody knows it
	Uptime time.Duration `json:"uptime_ns"` // since that boot began, time asleep included
}

// Source is what a clock is made from.
type Source interface {
	// Wall returns what the machine's clock says.
	Wall() time.Time
	// Boot returns the id of the machine's boot, which no other boot of any machine
	// has; "" if it cannot be found out.
	Boot() string
	// Uptime returns the time since the boot began, time asleep included.
	Uptime() time.Duration
}

// System returns the operating system's source.
func System() Source { return system{} }

type system struct{}

func (system) Wall() time.Time { return time.Now() }

// Source: random(4), "/proc interfaces".
func (system) Boot() string {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "" // without /proc, time between two openings is not counted
	}
	return strings.TrimSpace(string(id))
}

// Source: clock_gettime(2), CLOCK_BOOTTIME.
func (system) Uptime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic("steady: internal error: CLOCK_BOOTTIME: " + err.Error()) // every kernel since 2.6.39 has it
	}
	return time.Duration(ts.Nano())
}

// Clock is a steady clock. It is safe for concurrent use.
type Clock struct {
	source Source

	mu   sync.Mutex // guards base
	base Base
}

// New returns a clock that begins as the wall clock says.
func New(source Source) *Clock {
	return &Clock{source: source, base: Base{Time: source.Wall().UTC().Round(0), Boot: source.Boot(), Uptime: source.Uptime()}}
}

// Resume returns a clock that goes on from where it stood; of several bases of one
// clock, from the one that is furthest.
func Resume(source Source, bases ...Base) *Clock {
	now := Base{Boot: source.Boot(), Uptime: source.Uptime()}
	for _, b := range bases {
		at := b.Time
		if b.Boot == now.Boot && b.Boot != "" && b.Uptime < now.Uptime {
			at = at.Add(now.Uptime - b.Uptime)
		}
		if at.After(now.Time) {
			now.Time = at
		}
	}
	return &Clock{source: source, base: now}
}

// Now returns the clock's time, UTC.
func (c *Clock) Now() time.Time { return c.Base().Time }

// Base returns where the clock stands now.
func (c *Clock) Base() Base {
	c.mu.Lock()
	defer c.mu.Unlock()
	// Of a machine that was put back to an earlier moment the uptime is less than it
	// was: that counts as no time.
	up := c.source.Uptime()
	if up > c.base.Uptime {
		c.base.Time = c.base.Time.Add(up - c.base.Uptime)
	}
	c.base.Uptime = up
	return c.base
}

// Wall returns what the machine's clock says of a time of this clock: when it will come if the
// machine stays on.
func (c *Clock) Wall(t time.Time) time.Time {
	return c.source.Wall().UTC().Add(t.Sub(c.Now())).Round(time.Second)
}
