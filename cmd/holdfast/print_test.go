package main

import (
	"bytes"
	"math"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/holdfast-backup/holdfast/appliance"
)

func TestSize(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		n    int64
		want string
	}{
		{0, "0 B"},
		{1023, "1023 B"},
		{1024, "1 KiB"},
		{1536, "1.5 KiB"},
		{1<<20 - 1, "1 MiB"},
		{2 << 20, "2 MiB"},
		{48<<20 + 1536, "48 MiB"},
		{math.MaxInt64, "8 EiB"},
	} {
		if got := size(tt.n); got != tt.want {
			t.Errorf("%d: got %q, want %q", tt.n, got, tt.want)
		}
	}
}

func TestParseSize(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		text string
		want int64 // -1 for an error
	}{
		{"0", 0},
		{"65536", 65536},
		{"65536B", 65536},
		{"64KiB", 65536},
		{"64K", 65536},
		{"1MiB", 1 << 20},
		{"3G", 3 << 30},
		{"1TiB", 1 << 40},
		{"8191PiB", 8191 << 50},
		{"8192PiB", -1},
		{"9223372036854775808", -1},
		{"", -1},
		{"KiB", -1},
		{"-1", -1},
		{"1.5GiB", -1},
		{"64KB", -1},
		{"64KiBKiB", -1},
		{"64 KiB", -1},
		{"64kib", -1},
	} {
		got, err := parseSize(tt.text)
		if tt.want < 0 && err == nil || tt.want >= 0 && (err != nil || got != tt.want) {
			t.Errorf("%q: got %d, %v, want %d", tt.text, got, err, tt.want)
		}
	}
}

func TestProgressLine(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		p       appliance.Progress
		elapsed time.Duration
		want    string
	}{
		{appliance.Progress{Subject: "vda", Done: 0, Total: 4 << 30, Unit: appliance.Bytes}, time.Minute, "vda: 0 B of 4 GiB"},
		{appliance.Progress{Subject: "vda", Done: 1 << 30, Total: 4 << 30, Unit: appliance.Bytes}, 10 * time.Second, "vda: 1 GiB of 4 GiB, 25 %, 102.4 MiB/s, 30s left"},
		{appliance.Progress{Subject: "collect", Done: 1, Total: 2, Unit: appliance.Nodes}, time.Millisecond, "collect: 1 of 2 map nodes, 50 %"},
		{appliance.Progress{Subject: "vda", Total: 0, Unit: appliance.Bytes}, time.Minute, "vda: 0 B of 0 B"},
	} {
		if got := progressLine(tt.p, tt.elapsed); got != tt.want {
			t.Errorf("got %q, want %q", got, tt.want)
		}
	}
}

// TestProgress shows one line that is rewritten on a terminal, and now and then a
// line elsewhere.
func TestProgress(t *testing.T) {
	t.Parallel()
	show := func(t *testing.T, c *console) {
		synctest.Test(t, func(t *testing.T) {
			for i := range int64(25) {
				c.progress(appliance.Progress{Subject: "vda", Done: i, Total: 25, Unit: appliance.Nodes})
				time.Sleep(time.Second)
			}
			if _, err := c.Write([]byte("done\n")); err != nil {
				t.Error(err)
			}
		})
	}
	var plain bytes.Buffer
	show(t, newConsole(&plain))
	if got := plain.String(); strings.Count(got, "\n") != 3 || strings.ContainsAny(got, "\r\x1b") || !strings.HasSuffix(got, "20 of 25 map nodes, 80 %, 1/s, 5s left\ndone\n") {
		t.Errorf("plain: got %q, want a line after 10 and 20 seconds", got)
	}
	var terminal bytes.Buffer
	c := newConsole(&terminal)
	c.width = func() int { return 20 }
	show(t, c)
	got := terminal.String()
	if strings.Count(got, "\n") != 1 || !strings.HasSuffix(got, "\r\x1b[Kvda: 24 of 25 map n\r\x1b[Kdone\n") {
		t.Errorf("terminal: got %q, want one line that is cut at the width and cleared at the end", got)
	}
}
