package durable_test

import (
	"bytes"
	"errors"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/holdfast-backup/holdfast/internal/durable"
)

const limit = time.Minute

// An operation that takes too long is told of, with its file; one that goes on in time is not,
// however many there are.
func TestWatcher(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		w := durable.NewWatcher(limit, slog.New(slog.NewTextHandler(&log, nil)))
		first, second, third := "first", "second", "third"
		for range 1000 { // slow, one after the other, in more places than there are
			o := w.Begin(durable.Reading, &third)
			time.Sleep(time.Second)
			o.End()
		}
		if err := w.Overdue(limit); err != nil {
			t.Errorf("slow operations: got %v, want none overdue", err)
		}
		late := w.Begin(durable.Syncing, &first)
		time.Sleep(limit / 4)
		later := w.Begin(durable.Writing, &second)
		time.Sleep(limit / 2)
		if err := w.Overdue(limit); err != nil {
			t.Errorf("before the limit: got %v, want none overdue", err)
		}
		time.Sleep(limit/2 + 10*time.Second)
		err := w.Overdue(limit)
		stall, ok := errors.AsType[*durable.StallError](err)
		if !ok || stall.Act != durable.Syncing || stall.Path != first || stall.Since < limit || stall.Since > limit+limit/2 {
			t.Errorf("after the limit: got %v, want the first operation, syncing", err)
		}
		late.End()
		later.Renew(limit)
		time.Sleep(2*limit - 10*time.Second)
		if err := w.Overdue(limit); err != nil {
			t.Errorf("renewed: got %v, want none overdue", err)
		}
		time.Sleep(20 * time.Second)
		if err := w.Overdue(limit); err == nil || !strings.Contains(err.Error(), second) {
			t.Errorf("renewed long ago: got %v, want the second operation", err)
		}
		later.End()
		time.Sleep(2 * time.Second)
		w.Close()
		if got := strings.Count(log.String(), "does not answer:"); got != 2 || strings.Count(log.String(), "answers again") != 2 {
			t.Errorf("got log %s, want two stalls and their ends", &log)
		}
	})
}

// More operations than there are places do no harm, and a watcher that is none notes nothing.
func TestWatcherFull(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var none *durable.Watcher
		none.Begin(durable.Reading, nil).End()
		if err := none.Overdue(0); err != nil {
			t.Errorf("no watcher: got %v, want nothing", err)
		}
		none.Close()

		w := durable.NewWatcher(limit, nil)
		defer w.Close()
		name := "file"
		var all []*durable.Operation
		for range 2000 {
			all = append(all, w.Begin(durable.Reading, &name))
		}
		time.Sleep(2 * limit)
		if err := w.Overdue(limit); err == nil {
			t.Error("got nothing overdue, want one of many")
		}
		for _, o := range all {
			o.End()
		}
		if err := w.Overdue(0); err != nil {
			t.Errorf("all are over: got %v, want none overdue", err)
		}
	})
}

// A watched file system does what the one below does.
func TestWatchedFS(t *testing.T) {
	t.Parallel()
	w := durable.NewWatcher(0, nil)
	defer w.Close()
	fsys := w.FS(durable.OS())
	name := filepath.Join(t.TempDir(), "file")
	if err := durable.WriteFile(fsys, name, []byte("content")); err != nil {
		t.Fatal(err)
	}
	got, err := durable.ReadFile(fsys, name, 100)
	if err != nil || string(got) != "content" {
		t.Errorf("got %q, %v, want what was written", got, err)
	}
	if err := w.Overdue(0); err != nil {
		t.Errorf("got %v under way, want nothing", err)
	}
}

func BenchmarkWatcher(b *testing.B) {
	w := durable.NewWatcher(0, nil)
	defer w.Close()
	name := "file"
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			w.Begin(durable.Reading, &name).End()
		}
	})
}
