package fusefs

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

const (
	subtype = "holdfast"
	// maxBackground is how many reads the kernel may send ahead of the
	// readers; it bounds their buffers to 64 MiB.
	maxBackground = 64
	// readahead is how far the kernel reads ahead of a sequential reader, in
	// bytes: enough for several reads of maxRead at once.
	readahead = 4 << 20
	// unmountRetry is the pause between two tries to unmount a busy mount.
	unmountRetry = 50 * time.Millisecond
)

// Mounted is a mount that this process serves.
type Mounted struct {
	dir    string
	device string
	done   chan struct{} // closed when nothing is served or read any more
}

// Mount shows src at dir and serves it until it is unmounted. dir must be an
// empty folder; a missing one is made (not its parents) and stays after
// unmounting. What a killed process left mounted there is unmounted first.
// Root mounts directly; others through fusermount3.
func Mount(dir string, src Source, o Options) (*Mounted, error) {
	o.FSName = cmp.Or(o.FSName, subtype)
	o.Logger = cmp.Or(o.Logger, slog.Default())
	dir, err := prepare(dir)
	if err != nil {
		return nil, err
	}
	t := newTree(src, o)
	opts := fuseOptions(o)
	server, err := fuse.NewServer(fs.NewNodeFS(t.root(), opts), dir, &opts.MountOptions)
	if err != nil {
		return nil, mountError(dir, o, err)
	}
	m := &Mounted{dir: dir, done: make(chan struct{})}
	go func() {
		defer close(m.done)
		server.Serve()
		t.disks.closeAll()
	}()
	entry, found, err := mountAt(dir)
	if err == nil && !found {
		err = errors.New("unmounted at once by someone else")
	}
	if err == nil {
		m.device = entry.device
		err = server.WaitMount()
	}
	if err != nil {
		// Nobody has been told of the mount yet: there is nobody to disturb.
		return nil, errors.Join(fmt.Errorf("mount at %s: %w", dir, err), detach(context.Background(), dir, true))
	}
	if err := setReadahead(m.device); err != nil {
		o.Logger.Debug("sequential reads will be slower", slog.Any("error", err))
	}
	return m, nil
}

func newTree(src Source, o Options) *tree {
	t := &tree{
		src:      src,
		log:      o.Logger,
		owner:    fuse.Owner{Uid: uint32(os.Getuid()), Gid: uint32(os.Getgid())},
		fileMode: 0o440,
		dirMode:  0o550,
		mounted:  time.Now(),
	}
	if o.AllowOther {
		t.fileMode, t.dirMode = 0o444, 0o555
	}
	t.disks.disks = make(map[diskKey]*openDisk)
	t.disks.handles = make(map[*handle]struct{})
	return t
}

func fuseOptions(o Options) *fs.Options {
	// CAP_ASYNC_DIO stays off: with it a process that waits for a direct read cannot be killed.
	log := slog.NewLogLogger(o.Logger.Handler(), slog.LevelWarn)
	opts := &fs.Options{
		MountOptions: fuse.MountOptions{
			AllowOther:    o.AllowOther,
			FsName:        o.FSName,
			Name:          subtype,
			Options:       []string{"default_permissions"}, // the kernel checks modes
			MaxWrite:      maxRead,                         // bounds reads too
			MaxBackground: maxBackground,
			DisableXAttrs: true,
			DisableSplice: true, // our bytes are in memory; splicing serves files
			Logger:        log,
		},
		FirstAutomaticIno: fuse.FUSE_ROOT_ID + 1,
		RootStableAttr:    &fs.StableAttr{Ino: fuse.FUSE_ROOT_ID},
		Logger:            log,
	}
	if os.Geteuid() == 0 {
		opts.DirectMountStrict = true
		opts.DirectMountFlags = unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	} else {
		opts.Options = append(opts.Options, "ro", "nosuid", "nodev", "noexec")
	}
	return opts
}

// prepare makes dir fit to mount on and returns its resolved path.
func prepare(dir string) (string, error) {
	path, err := resolve(dir)
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrMountPoint, err)
	}
	for {
		m, mounted, err := mountAt(path)
		if err != nil {
			return "", err
		}
		if !mounted {
			break
		}
		if !isDead(m) {
			return "", fmt.Errorf("%w: %s is already a mount (%s of type %s); unmount it or choose another folder",
				ErrMountPoint, path, m.source, m.fsType)
		}
		// The process that served it is gone, so no data is lost with it; files
		// that others hold open fail already.
		if err := detach(context.Background(), path, true); err != nil {
			return "", fmt.Errorf("unmount what a killed process left at %s: %w", path, err)
		}
	}
	switch info, err := os.Stat(path); {
	case os.IsNotExist(err):
		if err := os.Mkdir(path, 0o755); err != nil {
			return "", fmt.Errorf("%w: %w", ErrMountPoint, err)
		}
		return path, nil
	case err != nil:
		return "", fmt.Errorf("%w: %w", ErrMountPoint, err)
	case !info.IsDir():
		return "", fmt.Errorf("%w: %s is not a folder", ErrMountPoint, path)
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrMountPoint, err)
	}
	if len(entries) > 0 {
		return "", fmt.Errorf("%w: %s is not empty (it has %q); choose an empty folder",
			ErrMountPoint, path, entries[0].Name())
	}
	return path, nil
}

// isDead reports whether the mount is one of ours that nobody serves any more.
func isDead(m mountEntry) bool {
	if m.fsType != fsType {
		return false
	}
	var st unix.Statfs_t // unlike attributes, the kernel always asks for it
	return errors.Is(unix.Statfs(m.dir, &st), unix.ENOTCONN)
}

// mountError says what to do about a failed mount.
func mountError(dir string, o Options, err error) error {
	_, deviceErr := os.Stat("/dev/fuse")
	_, helperErr := exec.LookPath("fusermount3")
	root := os.Geteuid() == 0
	switch {
	case deviceErr != nil || errors.Is(err, unix.ENODEV):
		return fmt.Errorf("%w: mount at %s: %w; load the kernel module with: modprobe fuse", ErrNoFUSE, dir, err)
	case root && errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w: mount at %s: %w; mounting needs the capability CAP_SYS_ADMIN and /dev/fuse",
			ErrNoFUSE, dir, err)
	case !root && helperErr != nil:
		return fmt.Errorf("%w: mount at %s: fusermount3 is missing; install the package fuse3", ErrNoFUSE, dir)
	case !root && o.AllowOther:
		return fmt.Errorf("mount at %s: %w; letting other users in needs the line user_allow_other in /etc/fuse.conf",
			dir, err)
	}
	return fmt.Errorf("mount at %s: %w", dir, err)
}

// setReadahead raises the mount's readahead, which FUSE cannot ask for above the
// kernel's default of 128 KiB. Only root can.
func setReadahead(device string) error {
	path := filepath.Join("/sys/class/bdi", device, "read_ahead_kb")
	return os.WriteFile(path, fmt.Append(nil, readahead>>10), 0)
}

// Dir returns the absolute path of the mount.
func (m *Mounted) Dir() string { return m.dir }

// Wait waits until the mount has been unmounted, by whomever, and its disks are
// closed. It returns ctx's error if that ends first.
func (m *Mounted) Wait(ctx context.Context) error {
	select {
	case <-m.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for the mount at %s to end: %w", m.dir, ctx.Err())
	}
}

// Unmount unmounts and waits until the disks are closed. While processes use the mount it tries
// again until ctx ends; the error then wraps [ErrBusy] and names them, and the
// mount goes on. Unmounting what is unmounted already is no error.
func (m *Mounted) Unmount(ctx context.Context) error {
	select {
	case <-m.done:
		return nil
	default:
	}
	if err := unmount(ctx, m.dir, m.device); err != nil && !errors.Is(err, ErrNotMounted) {
		return err
	}
	return m.Wait(ctx)
}

// Unmount unmounts the Holdfast mount at dir, whichever process serves it. Other
// mounts are left alone, with [ErrNotMounted]. It tries again while the mount is
// in use, as [Mounted.Unmount] does.
func Unmount(ctx context.Context, dir string) error {
	path, err := resolve(dir)
	if err != nil {
		return fmt.Errorf("unmount %s: %w", dir, err)
	}
	return unmount(ctx, path, "")
}

// unmount unmounts our mount at dir, the one with that device unless device is "".
func unmount(ctx context.Context, dir, device string) error {
	for {
		m, mounted, err := mountAt(dir)
		switch {
		case err != nil:
			return fmt.Errorf("unmount %s: %w", dir, err)
		case !mounted:
			return fmt.Errorf("%w: nothing is mounted at %s", ErrNotMounted, dir)
		case m.fsType != fsType:
			return fmt.Errorf("%w: %s is a mount of %s, of type %s", ErrNotMounted, dir, m.source, m.fsType)
		case device != "" && m.device != device:
			return fmt.Errorf("%w: another mount took the place of this one at %s", ErrNotMounted, dir)
		}
		err = detach(ctx, dir, false)
		if errors.Is(err, unix.EBUSY) && isDead(m) {
			err = detach(ctx, dir, true) // the files that are open in it fail already
		}
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) && ctx.Err() == nil {
			return fmt.Errorf("unmount %s: %w", dir, err)
		}
		select {
		case <-time.After(unmountRetry):
		case <-ctx.Done():
			return busyError(ctx, dir)
		}
	}
}

func busyError(ctx context.Context, dir string) error {
	by := users(dir)
	if by == "" {
		by = "processes of other users, or mounts and loop devices on its files"
	}
	return fmt.Errorf("%w: %s is used by %s; end them and unmount again, or detach it with: umount -l %s (%w)",
		ErrBusy, dir, by, dir, context.Cause(ctx))
}

// detach unmounts what is topmost at dir; if lazy, even while it is in use.
// Otherwise the error for a mount in use is [unix.EBUSY].
func detach(ctx context.Context, dir string, lazy bool) error {
	if os.Geteuid() == 0 {
		flags := unix.UMOUNT_NOFOLLOW
		if lazy {
			flags |= unix.MNT_DETACH
		}
		return unix.Unmount(dir, flags)
	}
	args := []string{"-u"}
	if lazy {
		args = append(args, "-z")
	}
	cmd := exec.CommandContext(ctx, "fusermount3", append(args, "--", dir)...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	out, err := cmd.CombinedOutput()
	switch {
	case err == nil:
		return nil
	case bytes.Contains(bytes.ToLower(out), []byte("busy")):
		return unix.EBUSY
	}
	return fmt.Errorf("fusermount3: %s (%w)", bytes.TrimSpace(out), err)
}
