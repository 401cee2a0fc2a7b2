package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
)

// print prints a result: as one line of JSON with --json, else as the text.
func (p *program) print(result any, format string, args ...any) error {
	if !p.json {
		_, err := fmt.Fprintf(p.stdout, format, args...)
		return err
	}
	encoder := json.NewEncoder(p.stdout)
	encoder.SetEscapeHTML(false)
	return encoder.Encode(result)
}

// table is text in aligned columns.
type table struct {
	text bytes.Buffer
	w    *tabwriter.Writer
}

// newTable returns a table with a line of titles, unless there are none.
func newTable(titles ...string) *table {
	t := &table{}
	t.w = tabwriter.NewWriter(&t.text, 0, 0, 2, ' ', 0)
	if len(titles) > 0 {
		t.row(titles...)
	}
	return t
}

// row adds a line.
func (t *table) row(cells ...string) {
	fmt.Fprintln(t.w, strings.Join(cells, "\t"))
}

// String returns the whole table.
func (t *table) String() string {
	_ = t.w.Flush() // memory never fails
	return t.text.String()
}

// stamp returns a time in a form that VM@TIME takes.
func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339Nano) }

// units are the binary units of sizes; each is 1024 of the one before.
var units = []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}

// size returns a number of bytes for people, with at most one decimal: 1.5 GiB.
func size(n int64) string {
	value, unit := float64(n), 0
	for ; math.Round(value*10)/10 >= 1024; unit++ {
		value /= 1024
	}
	return strings.TrimSuffix(fmt.Sprintf("%.1f", value), ".0") + " " + units[unit]
}

// parseSize reads a size: bytes, or with a binary unit such as 64KiB, 64K or 1GiB.
func parseSize(s string) (int64, error) {
	digits := strings.TrimRight(s, "KMGTPiB")
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || n < 0 {
		return 0, fmt.Errorf("%q is no size; want bytes or a unit, such as 64KiB or 1GiB", s)
	}
	for _, unit := range units[:6] {
		switch strings.TrimPrefix(s, digits) {
		case "", unit, strings.TrimSuffix(unit, "iB"):
			return n, nil
		}
		if n > math.MaxInt64/1024 {
			break
		}
		n *= 1024
	}
	return 0, fmt.Errorf("%q is no size; want bytes or a unit, such as 64KiB or 1GiB", s)
}

// sizeFlag is a flag with a size.
type sizeFlag int64

// String returns the size as help shows it: nothing is shown of "0".
func (f *sizeFlag) String() string {
	if *f == 0 {
		return "0"
	}
	return strings.ReplaceAll(size(int64(*f)), " ", "")
}

// Type names the flag's value in help.
func (f *sizeFlag) Type() string { return "size" }

func (f *sizeFlag) Set(s string) error {
	n, err := parseSize(s)
	*f = sizeFlag(n)
	return err
}

// parseDuration reads a time such as 30d, 12h or 1d12h.
func parseDuration(s string) (time.Duration, error) {
	const day = 24 * time.Hour
	wrong := fmt.Errorf("%q is no time; want days and hours, such as 30d or 12h", s)
	days, rest, ok := strings.Cut(s, "d")
	if !ok {
		days, rest = "0", s
	}
	n, err := strconv.ParseInt(days, 10, 64)
	if err != nil || n < 0 || n > math.MaxInt64/int64(day)-1 {
		return 0, wrong
	}
	var more time.Duration
	if rest != "" || !ok {
		if more, err = time.ParseDuration(rest); err != nil || more < 0 || ok && more > day {
			return 0, wrong
		}
	}
	return time.Duration(n)*day + more, nil
}

// durationFlag is a flag with a time.
type durationFlag time.Duration

// String returns the time as help shows it: nothing is shown of "0".
func (f *durationFlag) String() string {
	if *f == 0 {
		return "0"
	}
	return time.Duration(*f).String()
}

// Type names the flag's value in help.
func (f *durationFlag) Type() string { return "time" }

func (f *durationFlag) Set(s string) error {
	d, err := parseDuration(s)
	*f = durationFlag(d)
	return err
}

// required marks flags of cmd as required.
func required(cmd *cobra.Command, flags ...string) {
	for _, name := range flags {
		if err := cmd.MarkFlagRequired(name); err != nil {
			panic("holdfast: internal error: " + err.Error()) // there is no such flag
		}
	}
}

// choices has the shell complete a flag of cmd.
func choices(cmd *cobra.Command, flag string, values []string) {
	if err := cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp)); err != nil {
		panic("holdfast: internal error: " + err.Error()) // there is no such flag
	}
}
