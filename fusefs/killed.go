package fusefs

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// killedPoll is how often an interrupted caller is looked at.
const killedPoll = 50 * time.Millisecond

// untilKilled returns a context that ends when the process that asked is being killed.
//
// The context of a request, ctx, ends with any signal: a timer, a resized
// terminal, a preemption by Go's scheduler. An answer of EINTR to those would
// surprise programs, which no disk's file system interrupts. But a killed process must not
// stay for as long as the storage hangs. The kernel tells us of the first
// signal only, so from then on the caller is looked at until it is killed or answered.
func untilKilled(ctx context.Context) (context.Context, context.CancelFunc) {
	killed, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() {
		for !isKilled(ctx) {
			select {
			case <-killed.Done():
				return
			case <-time.After(killedPoll):
			}
		}
		cancel()
	})
	return killed, func() { stop(); cancel() }
}

// isKilled reports whether the thread that asked has a SIGKILL pending, which
// is what the kernel makes of any fatal signal, or is gone. Callers in other PID
// namespaces are unknown and count as alive. Source: proc(5), "SigPnd".
func isKilled(ctx context.Context) bool {
	const sigkill = 1 << (9 - 1)
	request, ok := ctx.(*fuse.Context)
	if !ok || request.Pid == 0 {
		return false
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", request.Pid))
	if err != nil {
		return true
	}
	_, rest, _ := strings.Cut(string(status), "\nSigPnd:\t")
	mask, _, _ := strings.Cut(rest, "\n")
	pending, err := strconv.ParseUint(mask, 16, 64)
	return err == nil && pending&sigkill != 0
}
