package overlay

import (
	"fmt"
	"io"
)

// WithRandom makes ids of what r has.
func WithRandom(o Options, r io.Reader) Options {
	o.random = r
	return o
}

// WithBoot asks f for the id of the machine's boot.
func WithBoot(o Options, f func() ([16]byte, error)) Options {
	o.boot = f
	return o
}

// WithLogLimit bounds the log in bytes.
func WithLogLimit(o Options, limit int64) Options {
	o.logLimit = limit
	return o
}

// LogRoom is what a log with n records takes.
func LogRoom(n int64) int64 { return logHeader + n*logRecord }

// DecodeLog decodes a log for a disk of a number of blocks. It returns the runs of states
// that it gives to blocks, as "first+blocks:state", "" for none that is believed, and its mark.
func DecodeLog(b []byte, id, boot [16]byte, blocks int64) (runs string, marked bool) {
	logged, marked := decodeLog(b, id, boot, newLayout(blocks*blockSize))
	if logged == nil {
		return "", false
	}
	for at := int64(0); at < blocks; {
		s, n, err := logged.run(at, blocks)
		if err != nil {
			panic(err)
		}
		if s != base {
			runs += fmt.Sprintf("%d+%d:%d ", at, n, s)
		}
		at += n
	}
	return runs, marked
}

// EncodeLog encodes a log with a record for each first block, number and state.
func EncodeLog(id, boot [16]byte, records ...[3]int64) []byte {
	b := make([]byte, logHeader)
	encodeLogHeader(b, id, boot)
	for _, r := range records {
		var record [logRecord]byte
		encodeLogRecord(record[:], r[0], r[0]+r[1], state(r[2]))
		b = append(b, record[:]...)
	}
	return b
}

// ReadBoot returns the id of this machine's boot.
func ReadBoot() ([16]byte, error) { return readBoot() }

// DecodeHeader decodes the header and the meta, and returns how they are encoded
// again.
func DecodeHeader(b []byte) ([]byte, error) {
	h, err := decodeHeader(b)
	if err != nil {
		return nil, err
	}
	return h.encode(), nil
}

// DecodePage decodes a page of the map, and returns how it is encoded again and
// which sectors are bad.
func DecodePage(b []byte, id [16]byte, off int64) ([]byte, uint8) {
	var s states
	bad := decodePage(&s, b, id, off)
	return encodePage(&s, bad, id, off), bad
}

// EncodePage encodes states of the map, 496 bytes a sector.
func EncodePage(b []byte, id [16]byte, off int64) []byte {
	var s states
	copy(s[:], b)
	return encodePage(&s, 0, id, off)
}

// Places returns where the directory, the map and the data begin in the file of a disk.
func Places(size int64) (dir, pages, data int64) {
	l := newLayout(size)
	return l.dirPage(0), l.mapPage(0), l.block(0)
}
