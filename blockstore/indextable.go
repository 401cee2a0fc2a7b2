package blockstore

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/fb"
	"github.com/dgraph-io/badger/v4/options"
	"github.com/dgraph-io/badger/v4/pb"
	"github.com/dgraph-io/badger/v4/table"
	"github.com/dgraph-io/badger/v4/y"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"
)

// BadgerDB maps its tables into memory and believes the lengths in them: a table that rotted
// ends the process, from a goroutine of its own. So tables are checked before it sees them.
//
// A table is blocks, one behind the other, then the table's index, and a tail. Each block, and the
// tail, ends with a checksum, a protocol buffer of a few bytes, and its length; numbers are
// big-endian.
//
// Source: BadgerDB, table/builder.go, Builder.Finish and Builder.finishBlock.

const (
	maxTableSize    = 512 << 20 // the largest that BadgerDB makes of our options is 128 MiB
	maxManifestSize = 64 << 20  // it is written anew at ten thousand deletions
	maxChecksum     = 16        // length of a checksum, bytes
	indexLevels     = 7         // of BadgerDB's tree
	indexCheckers   = 4         // tables that are checked at the same time
)

// tableStamp names a table's content. Tables are never changed.
type tableStamp struct {
	ID       uint64 `json:"id"`
	Level    uint8  `json:"level"`
	Size     int64  `json:"size"`
	Checksum uint64 `json:"checksum"` // of the table's index, which holds every block's place and first key
}

// readManifest returns the levels of the tables that BadgerDB's MANIFEST lists, by id.
func readManifest(dir string) (levels map[uint64]uint8, err error) {
	f, err := os.Open(filepath.Join(dir, badger.ManifestFilename))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if info.Size() > maxManifestSize {
		return nil, fmt.Errorf("MANIFEST of %d bytes", info.Size())
	}
	manifest, end, err := badger.ReplayManifestFile(f, 0, badger.Options{})
	if err != nil {
		return nil, fmt.Errorf("MANIFEST: %w", err)
	}
	if end != info.Size() {
		return nil, fmt.Errorf("MANIFEST of %d bytes has %d that cannot be read", info.Size(), info.Size()-end)
	}
	levels = make(map[uint64]uint8, len(manifest.Tables))
	for id, t := range manifest.Tables {
		if t.Level >= indexLevels || t.KeyID != 0 || t.Compression != options.None {
			return nil, fmt.Errorf("MANIFEST lists table %d with level %d, key %d, compression %d", id, t.Level, t.KeyID, t.Compression)
		}
		levels[id] = t.Level
	}
	return levels, nil
}

// splitChecksum returns the length of what is before the checksum at the end of b, and the checksum.
func splitChecksum(b []byte) (rest int, sum *pb.Checksum, err error) {
	if len(b) < 4 {
		return 0, nil, errors.New("too short for a checksum")
	}
	n := int64(binary.BigEndian.Uint32(b[len(b)-4:]))
	rest = len(b) - 4 - int(min(n, maxChecksum+1))
	if n > maxChecksum || rest < 4 {
		return 0, nil, fmt.Errorf("checksum of %d bytes", n)
	}
	sum = &pb.Checksum{}
	if err := proto.Unmarshal(b[rest:len(b)-4], sum); err != nil {
		return 0, nil, err
	}
	if sum.Algo != pb.Checksum_CRC32C {
		return 0, nil, fmt.Errorf("checksum of kind %d", sum.Algo)
	}
	return rest, sum, nil
}

// tableTail says where a table's index is.
type tableTail struct {
	off, length int64
	sum         *pb.Checksum
}

func readTableTail(r io.ReaderAt, size int64) (tableTail, error) {
	if size > maxTableSize {
		return tableTail{}, fmt.Errorf("table of %d bytes", size)
	}
	b := make([]byte, min(size, 4+maxChecksum+4))
	if n, err := r.ReadAt(b, size-int64(len(b))); n < len(b) {
		return tableTail{}, noEOF(err)
	}
	rest, sum, err := splitChecksum(b)
	if err != nil {
		return tableTail{}, err
	}
	length := int64(binary.BigEndian.Uint32(b[rest-4:]))
	off := size - int64(len(b)-rest) - 4 - length
	if off < 0 {
		return tableTail{}, fmt.Errorf("index of %d bytes in a table of %d", length, size)
	}
	return tableTail{off: off, length: length, sum: sum}, nil
}

// checkTable reads a whole table and returns the checksum of its index. Every byte of it has
// been compared with a checksum, or follows from such bytes, when the error is nil.
func checkTable(r io.ReaderAt, size int64) (uint64, error) {
	tail, err := readTableTail(r, size)
	if err != nil {
		return 0, err
	}
	b := make([]byte, tail.length)
	if n, err := r.ReadAt(b, tail.off); n < len(b) {
		return 0, noEOF(err)
	}
	if err := y.VerifyChecksum(b, tail.sum); err != nil {
		return 0, err
	}
	return tail.sum.Sum, checkBlocks(io.NewSectionReader(r, 0, tail.off), tail.off, b)
}

// checkBlocks checks the blocks of a table, size bytes, that its index lists. The index has the
// checksum that it should have; what it says may still be nonsense.
func checkBlocks(r io.Reader, size int64, index []byte) (err error) {
	defer recovered(&err) // the reader of the index believes what it reads
	t := fb.GetRootAsTableIndex(index, 0)
	if t.OffsetsLength() == 0 {
		return errors.New("table without blocks")
	}
	in := bufio.NewReaderSize(r, 1<<20)
	var at int64
	var buf []byte
	for i := range t.OffsetsLength() {
		var block fb.BlockOffset
		if !t.Offsets(&block, i) || int64(block.Offset()) != at || int64(block.Len()) > size-at {
			return fmt.Errorf("block %d is not where it should be", i)
		}
		if cap(buf) < int(block.Len()) {
			buf = make([]byte, block.Len())
		}
		buf = buf[:block.Len()]
		if _, err := io.ReadFull(in, buf); err != nil {
			return noEOF(err)
		}
		if err := checkBlock(buf); err != nil {
			return fmt.Errorf("block %d: %w", i, err)
		}
		at += int64(len(buf))
	}
	if at != size {
		return fmt.Errorf("blocks of %d bytes where %d should be", at, size)
	}
	return nil
}

// checkBlock checks a block: entries, their offsets of 4 bytes each, how many there are, and the
// checksum of all that.
func checkBlock(b []byte) error {
	rest, sum, err := splitChecksum(b)
	if err != nil {
		return err
	}
	if err := y.VerifyChecksum(b[:rest], sum); err != nil {
		return err
	}
	if n := int64(binary.BigEndian.Uint32(b[rest-4:])); n == 0 || n*4 > int64(rest-4) {
		return fmt.Errorf("%d entries in %d bytes", n, rest)
	}
	return nil
}

// checkTables calls check, which returns a table's checksum, with each table, and returns their stamps in the
// order of their ids.
func checkTables(dir string, levels map[uint64]uint8, check func(r io.ReaderAt, size int64) (uint64, error)) ([]tableStamp, error) {
	ids := slices.Sorted(maps.Keys(levels))
	stamps := make([]tableStamp, len(ids))
	var g errgroup.Group
	g.SetLimit(indexCheckers)
	var bad atomic.Bool // one is: the others need no reading
	for i, id := range ids {
		g.Go(func() (err error) {
			if bad.Load() {
				return nil
			}
			defer func() {
				if err != nil {
					bad.Store(true)
				}
			}()
			f, err := os.Open(table.NewFilename(id, dir))
			if err != nil {
				return err
			}
			defer f.Close()
			info, err := f.Stat()
			if err != nil {
				return err
			}
			sum, err := check(f, info.Size())
			if err != nil {
				return fmt.Errorf("%s: %w", filepath.Base(f.Name()), err)
			}
			stamps[i] = tableStamp{ID: id, Level: levels[id], Size: info.Size(), Checksum: sum}
			return nil
		})
	}
	return stamps, g.Wait()
}

// recovered turns a panic, or a fault in mapped memory, of code that believes what it reads
// into an error.
func recovered(err *error) {
	if p := recover(); p != nil {
		first, _, _ := strings.Cut(strings.TrimSpace(fmt.Sprint(p)), "\n")
		*err = fmt.Errorf("it is not what it should be: %.200s", first)
	}
}

// shielded calls fn, which reads BadgerDB's mapped files: a bad sector there is a fault in memory,
// and bytes that rotted since the index was opened can be a panic.
func shielded(fn func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer recovered(&err)
	return fn()
}
