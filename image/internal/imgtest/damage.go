package imgtest

import (
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/image"
)

// CheckDamaged opens and reads a damaged image. If want is nil, it must hold
// disk as before; else the error of opening it, or of walking and of reading
// it, must be want in one line, with the words says and the file's name.
func CheckDamaged[I image.DiskCloser](t *testing.T, path string, open Opener[I], disk []byte, want error, says string) {
	t.Helper()
	d, err := OpenImage(t, path, open, image.OpenOptions{})
	if err == nil && want == nil {
		Check(t, d, disk)
		return
	}
	if err == nil {
		err = FirstError(t.Context(), d)
		if readErr := readAll(d); !errors.Is(readErr, want) {
			t.Errorf("read: got %v, want %v", readErr, want)
		}
	}
	if !errors.Is(err, want) || want == nil {
		t.Fatalf("got %v, want %v", err, want)
	}
	if s := err.Error(); !strings.Contains(s, says) || !strings.Contains(s, path) || strings.Contains(s, "\n") {
		t.Errorf("got %q, want %q and the file's name in one line", s, says)
	}
}

// readAll reads a disk to its end.
func readAll(d image.Disk) error {
	_, err := io.Copy(io.Discard, io.NewSectionReader(d, 0, d.Size()))
	return err
}

// CheckTruncated cuts a file of the image at path at the given lengths and at
// every 16th of it. Each time, to open or to read the image must fail with
// [image.ErrCorrupt], or [image.ErrNotImage] where less than a sector is left;
// none may read as zeros.
func CheckTruncated[I image.DiskCloser](t testing.TB, path, file string, open Opener[I], cuts ...int64) {
	t.Helper()
	info, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	for i := range int64(16) {
		cuts = append(cuts, info.Size()*i/16)
	}
	slices.Sort(cuts)
	for _, cut := range slices.Backward(cuts) {
		if err := os.Truncate(file, cut); err != nil {
			t.Fatal(err)
		}
		d, err := OpenImage(t, path, open, image.OpenOptions{})
		if err == nil {
			err = readAll(d)
		}
		if !errors.Is(err, image.ErrCorrupt) && !(cut < sector && errors.Is(err, image.ErrNotImage)) {
			t.Errorf("%d of %d bytes: got %v, want %v", cut, info.Size(), err, image.ErrCorrupt)
		}
	}
}
