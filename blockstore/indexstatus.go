package blockstore

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/table"
	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/durable"
)

// statusFile in the index's folder says whether the folder can be trusted: see indexStatus. A
// folder without it can't.
const statusFile = "STATUS"

const maxStatusSize = 16 << 20

// indexStatus is the content of statusFile: a line "holdfast index 1 CRC", the CRC-32C of
// what follows in hexadecimal, and this as JSON.
//
// While the index is open it names the place and the start of the machine: after a loss of power,
// and in a copy of files that were being written, the index is made anew. After a kill
// it is used, as of the last table that BadgerDB had finished. An index that was closed lists its
// tables, and may be copied.
type indexStatus struct {
	Repository string       `json:"repository"` // its id, in hexadecimal
	Open       *indexPlace  `json:"open,omitempty"`
	Tables     []tableStamp `json:"tables,omitempty"` // in the order of their ids
}

// indexPlace is where and when an index is open.
type indexPlace struct {
	Boot   string `json:"boot"` // random, made by the kernel when it started
	Device uint64 `json:"device"`
	Inode  uint64 `json:"inode"` // of the folder
}

func (s indexStatus) encode() ([]byte, error) {
	data, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	return append(fmt.Appendf(nil, "holdfast index 1 %08x\n", crc32.Checksum(data, castagnoli)), data...), nil
}

func decodeIndexStatus(b []byte) (s indexStatus, err error) {
	line, data, _ := bytes.Cut(b, []byte("\n"))
	if want := fmt.Sprintf("holdfast index 1 %08x", crc32.Checksum(data, castagnoli)); string(line) != want {
		return s, errors.New("the first line is not that of this content")
	}
	return s, json.Unmarshal(data, &s)
}

// placeOf returns where the index in dir is now.
func placeOf(dir string) (indexPlace, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return indexPlace{}, err
	}
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return indexPlace{}, &os.PathError{Op: "stat", Path: dir, Err: err}
	}
	return indexPlace{Boot: strings.TrimSpace(string(boot)), Device: st.Dev, Inode: st.Ino}, nil
}

// readIndexStatus returns what statusFile says of the index in dir, if it is that of the repository
// and, for one that is or was open, in its place.
func readIndexStatus(dir, repository string) (indexStatus, error) {
	data, err := durable.ReadFile(durable.OS(), filepath.Join(dir, statusFile), maxStatusSize)
	if err != nil {
		return indexStatus{}, err
	}
	s, err := decodeIndexStatus(data)
	if err != nil {
		return s, fmt.Errorf("%s: %w", statusFile, err)
	}
	if s.Repository != repository {
		return s, fmt.Errorf("it is that of another repository, %q", s.Repository)
	}
	if s.Open == nil {
		return s, nil
	}
	place, err := placeOf(dir)
	if err == nil && *s.Open != place {
		err = errors.New("it was not closed before the machine stopped, or is a copy of one that was open")
	}
	return s, err
}

// checkIndex reads the index in dir, all of it, and returns why it cannot be trusted, or nil.
func checkIndex(dir, repository string) error {
	status, err := readIndexStatus(dir, repository)
	if err != nil {
		return err
	}
	levels, err := readManifest(dir)
	if err != nil {
		return err
	}
	tables, err := checkTables(dir, levels, checkTable)
	if err != nil {
		return err
	}
	if status.Open == nil && !slices.Equal(status.Tables, tables) {
		return errors.New("its tables are not those that it was closed with")
	}
	return removeOthers(dir, levels)
}

// checkMarkedOpen checks what checkIndex reads beside the tables, while the index is open.
func checkMarkedOpen(dir, repository string) error {
	s, err := readIndexStatus(dir, repository)
	if err == nil && s.Open == nil {
		err = fmt.Errorf("%s calls it closed", statusFile)
	}
	for try := 0; err == nil && try < 3; try++ { // it may be in the middle of a write
		var manifestErr error
		if _, manifestErr = readManifest(dir); manifestErr == nil {
			return nil
		}
		if try == 2 {
			err = manifestErr
		}
	}
	return err
}

// removeOthers removes what is neither a table nor the list of them. Of the rest only the log of
// the table in memory ever holds anything of ours: what a kill kept from becoming a table. It
// needs no check when it is gone, and the segments have it: their summaries come after
// their records.
func removeOthers(dir string, levels map[uint64]uint8) error {
	keep := map[string]bool{statusFile: true, badger.ManifestFilename: true}
	for id := range levels {
		keep[table.IDToFilename(id)] = true
	}
	files, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, f := range files {
		if keep[f.Name()] {
			continue
		}
		if err := os.RemoveAll(filepath.Join(dir, f.Name())); err != nil {
			return err
		}
	}
	return nil
}

// distrustIndex makes the next opening make the index in dir anew.
func distrustIndex(dir string) error {
	err := os.Remove(filepath.Join(dir, statusFile))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return durable.OS().SyncDir(dir)
}

// emptyIndex removes what is in the folder of the index, if there is one, and returns how many files
// that were. Stopped halfway, what is left is not trusted.
func emptyIndex(dir string) (removed int, err error) {
	if err := distrustIndex(dir); err != nil {
		return 0, err
	}
	files, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	for _, f := range files {
		if err := os.RemoveAll(filepath.Join(dir, f.Name())); err != nil {
			return 0, err
		}
	}
	return len(files), nil
}

// markIndexOpen notes, durably, that the index in dir is about to be written.
func markIndexOpen(dir, repository string) error {
	if err := durable.MkdirAll(durable.OS(), dir); err != nil {
		return err
	}
	place, err := placeOf(dir)
	if err != nil {
		return err
	}
	return writeIndexStatus(dir, indexStatus{Repository: repository, Open: &place})
}

// markIndexClosed notes, durably, what the index in dir holds; nobody writes it any more.
func markIndexClosed(dir, repository string) error {
	levels, err := readManifest(dir)
	if err != nil {
		return err
	}
	// BadgerDB has checked and synced what it wrote; what was here was checked at the opening.
	tables, err := checkTables(dir, levels, func(r io.ReaderAt, size int64) (uint64, error) {
		tail, err := readTableTail(r, size)
		if err != nil {
			return 0, err
		}
		return tail.sum.Sum, nil
	})
	if err != nil {
		return err
	}
	return writeIndexStatus(dir, indexStatus{Repository: repository, Tables: tables})
}

func writeIndexStatus(dir string, s indexStatus) error {
	data, err := s.encode()
	if err != nil {
		return err
	}
	return durable.WriteFile(durable.OS(), filepath.Join(dir, statusFile), data)
}
