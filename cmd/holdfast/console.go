package main

import (
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/appliance"
)

const (
	terminalEvery = 200 * time.Millisecond // between two states of the progress line
	plainEvery    = 10 * time.Second       // between two lines where there is no terminal
)

// console is standard error: lines of text and, on a terminal, one line of
// progress below them that is rewritten. It is safe for concurrent use.
type console struct {
	out   io.Writer
	width func() int // of the terminal; nil if out is none

	mu    sync.Mutex // guards the fields below and writing to out
	shown bool       // a line of progress stands there
	began time.Time
	last  time.Time // of the last progress that was printed, or when it began
}

func newConsole(out io.Writer) *console {
	c := &console{out: out}
	if f, ok := out.(*os.File); ok {
		if _, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS); err == nil {
			c.width = func() int { return terminalWidth(f) }
		}
	}
	return c
}

// terminalWidth returns how many columns a terminal has.
func terminalWidth(f *os.File) int {
	size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	if err != nil || size.Col == 0 {
		return 80
	}
	return int(size.Col)
}

// Write writes whole lines above the line of progress.
func (c *console) Write(text []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.clearLocked()
	return c.out.Write(text)
}

// clear takes the line of progress away.
func (c *console) clear() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.clearLocked()
}

func (c *console) clearLocked() {
	if c.shown {
		fmt.Fprint(c.out, "\r\x1b[K")
		c.shown = false
	}
}

// progress shows how far the work is: on a terminal at once, elsewhere as a line
// every few seconds.
func (c *console) progress(p appliance.Progress) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	if c.began.IsZero() {
		c.began, c.last = now, now
	}
	every := plainEvery
	if c.width != nil {
		every = terminalEvery
	}
	if now.Sub(c.last) < every {
		return
	}
	c.last = now
	line := progressLine(p, now.Sub(c.began))
	if c.width == nil {
		fmt.Fprintln(c.out, line)
		return
	}
	if runes := []rune(line); len(runes) >= c.width() { // a line that wraps could not be rewritten
		line = string(runes[:c.width()-1])
	}
	fmt.Fprint(c.out, "\r\x1b[K", line)
	c.shown = true
}

// progressLine returns progress as text: subject, share, amount, rate, time left.
func progressLine(p appliance.Progress, elapsed time.Duration) string {
	amount := func(n int64) string { return fmt.Sprint(n) }
	unit := " " + string(p.Unit)
	if p.Unit == appliance.Bytes {
		amount, unit = size, ""
	}
	line := fmt.Sprintf("%s: %s of %s%s", p.Subject, amount(p.Done), amount(p.Total), unit)
	if p.Total <= 0 || p.Done <= 0 {
		return line
	}
	share := float64(p.Done) / float64(p.Total)
	line += fmt.Sprintf(", %.0f %%", 100*share)
	if seconds := elapsed.Seconds(); seconds >= 1 {
		left := time.Duration(seconds * (1 - share) / share * float64(time.Second))
		line += fmt.Sprintf(", %s/s, %v left", amount(int64(float64(p.Done)/seconds)), max(0, left).Round(time.Second))
	}
	return line
}
