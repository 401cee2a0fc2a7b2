package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
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
		fmt.Fprintln(t.w, strings.Join(titles, "\t"))
	}
	return t
}

// row adds a line. What is empty becomes a dash.
func (t *table) row(cells ...string) {
	for i, cell := range cells {
		cells[i] = cmp.Or(cell, "-")
	}
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

// duration returns a time as parseDuration reads it, such as 30d or 1d12h; 0s of 0.
func duration(d time.Duration) string {
	const day = 24 * time.Hour
	days, rest := d/day, d%day
	text := ""
	if days > 0 {
		text = fmt.Sprintf("%dd", days)
	}
	if rest > 0 || days == 0 {
		text += strings.NewReplacer("h0m0s", "h", "m0s", "m").Replace(rest.String())
	}
	return text
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
	return duration(time.Duration(*f))
}

// Type names the flag's value in help.
func (f *durationFlag) Type() string { return "time" }

func (f *durationFlag) Set(s string) error {
	d, err := parseDuration(s)
	*f = durationFlag(d)
	return err
}

// timeFlag is a flag with a moment.
type timeFlag time.Time

// String returns nothing: there is no default.
func (f *timeFlag) String() string { return "" }

// Type names the flag's value in help.
func (f *timeFlag) Type() string { return "time" }

func (f *timeFlag) Set(s string) error {
	t, err := time.Parse(time.RFC3339, s)
	if err != nil {
		return fmt.Errorf("%q is no time; want one such as 2027-01-31T18:00:00Z", s)
	}
	*f = timeFlag(t)
	return nil
}

// timeoutFlag is a flag with a time that is more than 0.
type timeoutFlag time.Duration

func (f *timeoutFlag) String() string { return duration(time.Duration(*f)) }

// Type names the flag's value in help.
func (f *timeoutFlag) Type() string { return "time" }

func (f *timeoutFlag) Set(s string) error {
	d, err := time.ParseDuration(s)
	if err != nil || d <= 0 {
		return fmt.Errorf("%q is no time to wait; want one such as 30s or 2m", s)
	}
	*f = timeoutFlag(d)
	return nil
}

// textFlag is a flag that says something if it is given: an empty one, as of a variable that is not set, is
// an error.
type textFlag string

func (f *textFlag) String() string { return string(*f) }

// Type names the flag's value in help.
func (f *textFlag) Type() string { return "string" }

func (f *textFlag) Set(s string) error {
	if s == "" {
		return errors.New("it is empty; leave the flag out, or say what you mean")
	}
	*f = textFlag(s)
	return nil
}

// shareFlag is a flag with a share in percent.
type shareFlag float64

func (f *shareFlag) String() string { return strconv.FormatFloat(float64(*f), 'f', -1, 64) }

// Type names the flag's value in help.
func (f *shareFlag) Type() string { return "percent" }

func (f *shareFlag) Set(s string) error {
	v, err := strconv.ParseFloat(s, 64)
	if err != nil || !(v > 0 && v <= 100) { // NaN neither
		return fmt.Errorf("%q is no share; want more than 0, up to 100", s)
	}
	*f = shareFlag(v)
	return nil
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
