package fusefs_test

import "golang.org/x/sys/unix"

// forceUnmount is for cleaning up after a failed test only.
func forceUnmount(dir string) { unix.Unmount(dir, unix.MNT_DETACH) }
