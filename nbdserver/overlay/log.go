package overlay

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"strings"
	"sync"

	"github.com/holdfast-backup/holdfast/internal/durable"
)

const (
	logSuffix  = ".log"
	logMagic   = "HOLDLOG\n"
	logVersion = 1

	logHeader = 64
	logMark   = logHeader - 1 // where a byte tells that a Sync runs
	logRecord = 24

	// maxLog bounds the log, in bytes; minLog does where the reserve, which the map
	// needs too, is small.
	maxLog = 16 << 20
	minLog = 4096
)

// errLogFull is returned to those who have to Sync first.
var errLogFull = errors.New("the log is full")

// readBoot returns the id that the kernel gives itself each time it starts.
// Source: random(4), "/proc interfaces".
func readBoot() (boot [16]byte, err error) {
	text, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return boot, err
	}
	b, err := hex.DecodeString(strings.ReplaceAll(strings.TrimSpace(string(text)), "-", ""))
	if err != nil || copy(boot[:], b) != len(boot) {
		return boot, fmt.Errorf("boot id %q", text)
	}
	return boot, nil
}

// changeLog has the changes of the map that are not durable yet, for the next process
// to find. It is not synced: a loss of power makes it worthless.
type changeLog struct {
	fs       durable.FS
	path     string
	limit    int64 // of the file, in bytes
	id, boot [16]byte

	mu   sync.Mutex   // held while a record is written
	file durable.File // nil until the first record
	end  int64        // of the records; 0 is an empty file
	dead bool         // nothing may be logged any more
	buf  [logHeader + logRecord]byte
}

// add logs that blocks get a state and then calls apply, which gives it to them: no
// one sees a state that is not logged, and begin finds none that is logged and not
// applied. With an error the state is as before; it is errLogFull, ENOSPC, or one that
// must end the overlay.
func (l *changeLog) add(first, end int64, s state, apply func()) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.writeLocked(first, end, s); err != nil {
		return err
	}
	apply()
	return nil
}

func (l *changeLog) writeLocked(first, end int64, s state) error {
	if l.dead {
		return errors.New("an operation failed before")
	}
	b := l.buf[logHeader:]
	if l.end == 0 {
		encodeLogHeader(l.buf[:logHeader], l.id, l.boot)
		b = l.buf[:]
	}
	if l.end+int64(len(b)) > l.limit {
		return errLogFull
	}
	if l.file == nil {
		f, err := l.fs.Create(l.path)
		if err != nil {
			return err
		}
		l.file = f
	}
	encodeLogRecord(l.buf[logHeader:], first, end, s)
	if _, err := l.file.WriteAt(b, l.end); err != nil {
		return err // what there is of it is written over, or emptied
	}
	l.end += int64(len(b))
	return nil
}

// begin is called before the map is looked at for a Sync. It returns what of the log
// that Sync makes needless. A process that is killed from here to done may have
// been about to hear that the file was not written; the next one knows by the mark.
func (l *changeLog) begin() (covered int64, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.end, l.markLocked(1)
}

// done is called when the Sync has succeeded. A log to which more was added is kept
// whole: the last record of a block is right. It is synced: were the file system to fail
// and forget the end of the log, the rest would undo what this Sync made durable.
func (l *changeLog) done(covered int64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.end == covered {
		return l.emptyLocked()
	}
	if err := l.markLocked(0); err != nil {
		return err
	}
	return syncFile(l.file)
}

func (l *changeLog) markLocked(mark byte) error {
	if l.end == 0 {
		return nil
	}
	_, err := l.file.WriteAt([]byte{mark}, logMark)
	return err
}

func (l *changeLog) emptyLocked() error {
	if l.end == 0 {
		return nil
	}
	if err := l.file.Truncate(0); err != nil {
		return err
	}
	l.end = 0
	return syncFile(l.file)
}

// empty reports whether the log holds no record.
func (l *changeLog) empty() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.end == 0
}

// kill empties the log, for what it says of the data is not believed any more, and
// lets nothing be added.
func (l *changeLog) kill() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.dead = true
	if l.file == nil {
		return nil
	}
	if err := errors.Join(l.file.Truncate(0), l.file.Sync()); err != nil {
		// If the file system goes on, the mark tells.
		return fmt.Errorf("%s could not be emptied and tells of data that may be lost; if the file system has failed, remove it before the overlay is opened: %w", l.path, err)
	}
	return nil
}

func (l *changeLog) close() error {
	if l.file == nil {
		return nil
	}
	return l.file.Close()
}

// recover returns what a process of this boot logged for a disk of this layout, and
// whether it was stopped in a Sync or by one that failed. nil is nothing; a log of
// another boot or overlay is emptied.
func (l *changeLog) recover(to layout) (logged *blockMap, marked bool, err error) {
	f, err := l.fs.OpenWrite(l.path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, err
	}
	l.file = f
	size, err := l.file.Size()
	if err != nil || size == 0 {
		return nil, false, err
	}
	b := make([]byte, min(size, maxLog))
	if err := readFull(l.file, b, 0); err != nil {
		return nil, false, err
	}
	l.end = size
	logged, marked = decodeLog(b, l.id, l.boot, to)
	if logged == nil {
		return nil, false, l.emptyLocked()
	}
	return logged, marked, nil
}

func encodeLogHeader(b []byte, id, boot [16]byte) {
	clear(b[:logHeader])
	copy(b, logMagic)
	binary.LittleEndian.PutUint32(b[8:], logVersion)
	copy(b[16:], id[:])
	copy(b[32:], boot[:])
	binary.LittleEndian.PutUint32(b[48:], crc32.Checksum(b[:48], castagnoli))
}

func encodeLogRecord(b []byte, first, end int64, s state) {
	le := binary.LittleEndian
	le.PutUint32(b[4:], uint32(s))
	le.PutUint64(b[8:], uint64(first))
	le.PutUint64(b[16:], uint64(end-first))
	le.PutUint32(b, crc32.Checksum(b[4:logRecord], castagnoli))
}

// decodeLog returns the states that a log gives to blocks, base for those that it does
// not name, and its mark. It is nil for a log that is not of this overlay and boot, or
// has no record. The first record that is not one ends it.
func decodeLog(b []byte, id, boot [16]byte, to layout) (logged *blockMap, marked bool) {
	var header [logHeader]byte
	encodeLogHeader(header[:], id, boot)
	if len(b) < logHeader || string(b[:logMark]) != string(header[:logMark]) {
		return nil, false
	}
	le := binary.LittleEndian
	for at := logHeader; at+logRecord <= len(b); at += logRecord {
		r := b[at : at+logRecord]
		s, first, n := le.Uint32(r[4:]), le.Uint64(r[8:]), le.Uint64(r[16:])
		if le.Uint32(r) != crc32.Checksum(r[4:], castagnoli) || s != uint32(data) && s != uint32(zero) ||
			n == 0 || n > uint64(to.blocks) || first > uint64(to.blocks)-n {
			break
		}
		if logged == nil {
			logged = newBlockMap(to)
		}
		logged.set(int64(first), int64(first+n), state(s))
	}
	return logged, b[logMark] != 0
}

// writeAgain writes the logged data of a file as it is read, so that the next Sync
// covers it: one that failed may have left it in the page cache alone.
func writeAgain(f durable.File, logged *blockMap) error {
	buf := make([]byte, 256*blockSize)
	for b := int64(0); b < logged.blocks; {
		s, n, err := logged.run(b, logged.blocks)
		if err != nil {
			return err
		}
		if s == data {
			n = min(n, int64(len(buf)/blockSize))
			part := buf[:n*blockSize]
			if err := readFull(f, part, logged.block(b)); err != nil {
				return err
			}
			if _, err := f.WriteAt(part, logged.block(b)); err != nil {
				return err
			}
		}
		b += n
	}
	return nil
}

// replay gives blocks the states that were logged, but for those of bad sectors.
func (m *blockMap) replay(logged *blockMap) error {
	for b := int64(0); b < m.blocks; {
		s, n, err := logged.run(b, m.blocks)
		if err != nil {
			return err
		}
		if s != base {
			m.setGood(b, b+n, s)
		}
		b += n
	}
	return nil
}

func (m *blockMap) setGood(first, end int64, s state) {
	for first < end {
		good := first
		for good < end {
			_, n, err := m.run(good, end)
			if err != nil {
				break
			}
			good += n
		}
		m.set(first, good, s)
		first = good
		if good < end {
			first = (good/sectorStates + 1) * sectorStates
		}
	}
}

// settle makes what processes before left in the page cache durable, logged data
// among it, or returns an error. What it could not write is not seen from then on. It empties a
// log that is not to be trusted, as data of which it tells are not there.
func settle(f durable.File, disk int64, l *changeLog, logged *blockMap, marked bool) (trusted bool, err error) {
	if logged != nil {
		if _, err := l.begin(); err != nil {
			return false, err
		}
	}
	if trusted, err = restore(f, disk, logged, marked); err != nil {
		// The log tells of data that may be lost.
		return false, errors.Join(err, l.kill())
	}
	if !trusted {
		l.mu.Lock()
		defer l.mu.Unlock()
		if err := l.emptyLocked(); err != nil {
			return false, err
		}
	}
	return trusted, f.DropCache()
}

// restore syncs the file of a disk of a size and reports whether the logged data are all there.
func restore(f durable.File, disk int64, logged *blockMap, marked bool) (trusted bool, err error) {
	// What waits for its place on disk gets it, lest it count as a hole.
	if err := syncFile(f); err != nil || logged == nil {
		return false, err
	}
	if trusted, err = allThere(f, logged, disk); err != nil || !trusted || !marked {
		return trusted, err
	}
	if err := writeAgain(f, logged); err != nil {
		return false, err
	}
	return true, syncFile(f)
}

// allThere reports whether a file has data wherever the log says so. Where it has a hole
// instead, data were written that never reached the disk, and the page cache has lost them:
// the file system was shut down after an error, or its device was taken away.
func allThere(f durable.File, logged *blockMap, disk int64) (bool, error) {
	end := logged.block(0) + disk // which may be inside the last block
	for b := int64(0); b < logged.blocks; {
		s, n, err := logged.run(b, logged.blocks)
		if err != nil {
			return false, err
		}
		if s == data {
			hole, err := f.NextHole(logged.block(b))
			if err != nil || hole < min(logged.block(b+n), end) {
				return false, err
			}
		}
		b += n
	}
	return true, nil
}
