package e2e_test

import (
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"testing"
)

// TestAttach attaches exports as block devices of a kernel: one to write to,
// which becomes a point, and a read-only one.
func TestAttach(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	disk, blank := filepath.Join(folder, "disk.raw"), filepath.Join(folder, "blank.raw")
	tool(t, "../scripts/make-guest-disk", disk, "64M")
	tool(t, "truncate", "--size=128M", blank)
	images, scratches := newRepo(t), newRepo(t)
	image := images.serve("export", "add", images.backup(disk).Point, "--json", "--listen", "127.0.0.1:0", "--name", "image")
	scratch := scratches.serve("export", "add", scratches.backup(blank).Point, "--json", "--listen", "127.0.0.1:0", "--name", "scratch", "--writable")
	if scratch.ReadOnly {
		t.Errorf("got export %s, want read_only false", scratch.printed)
	}

	g := boot(t, "attach.sh", fmt.Sprintf("SCRATCH=%s IMAGE=%s", port(t, scratch), port(t, image)),
		"-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile=")
	g.await("scratch: .*")
	g.await(`/mnt: [0-9]+ bytes trimmed`)
	g.await("image: .*")
	got := g.await("FILES ([0-9]+) ([0-9a-f]+) .*")
	g.off()
	if want := fileSums(t, ext4(t, disk)); fmt.Sprint(got) != want {
		t.Errorf("got files %v in the guest, want %s", got, want)
	}
	image.stop()
	scratch.stop()

	to := filepath.Join(folder, "scratch.raw")
	point := scratches.commit("scratch")
	scratches.ok("restore", "image", point, "--to", to)
	tool(t, "e2fsck", "-fn", to)
	tool(t, "sh", "-c", `cd "$1" && sha256sum --quiet -c sums`, "sh", dump(t, to))
}

// commit makes a point of what was written to an export and returns its ID.
func (r *repo) commit(name string) string {
	r.t.Helper()
	return decode[struct {
		Point string `json:"point"`
	}](r.t, r.ok("export", "commit", name, "--json")).Point
}

// port returns the port of an export over TCP.
func port(t *testing.T, e *export) string {
	t.Helper()
	u, err := url.Parse(e.URI)
	if err != nil || u.Port() == "" {
		t.Fatalf("got URI %q, %v, want one with a port", e.URI, err)
	}
	return u.Port()
}

// dump copies the files of an ext4 file system to a new folder.
func dump(t *testing.T, device string) string {
	t.Helper()
	folder := filepath.Join(t.TempDir(), "files")
	if err := os.Mkdir(folder, 0o755); err != nil {
		t.Fatal(err)
	}
	tool(t, "debugfs", "-R", "rdump / "+folder, device)
	return folder
}

// fileSums returns the number of files of an ext4 file system and the sum of their sums,
// as the guest reckons them.
func fileSums(t *testing.T, device string) string {
	t.Helper()
	const script = `cd "$1" && find . -type f -exec sha256sum {} + | LC_ALL=C sort >../sums && printf '[%s %s]' $(wc -l <../sums) $(sha256sum <../sums | cut -d ' ' -f 1)`
	return tool(t, "sh", "-c", script, "sh", dump(t, device))
}
