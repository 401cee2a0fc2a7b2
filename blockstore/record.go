package blockstore

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
)

// Sizes of the parts of a segment, bytes. See the package comment.
const (
	segmentHeaderSize = 48
	recordHeaderSize  = 52
	tocEntrySize      = 48
	footerSize        = 32
)

// Limits that a decoder enforces before it allocates.
const (
	maxChunkSize = 4 << 20
	// maxPayload is the longest payload of a chunk or node: stored plain, and sealed.
	maxPayload = maxChunkSize + sealOverhead
	// maxSegmentSize keeps offsets within 32 bits and a table of contents
	// within 16 MiB.
	maxSegmentSize = 1 << 30
	maxRecords     = maxTOCSize / tocEntrySize
	maxTOCSize     = 16 << 20
)

const (
	segmentMagic  = "HFSEGMNT"
	footerMagic   = "HFSEGEND"
	recordMagic   = 0x31524648 // "HFR1" in little-endian order
	formatVersion = 1

	segmentEncrypted = 1 << 0 // flag in a segment's header
)

// recordType says what a record's payload is.
type recordType uint8

const (
	chunkRecord recordType = 1 // a chunk of a disk
	nodeRecord  recordType = 2 // a map node
	tocRecord   recordType = 3 // the table of contents that ends a sealed segment
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

var (
	errTorn = errors.New("no whole record")
	errCRC  = errors.New("checksum mismatch")
)

// segmentHeader begins every segment.
type segmentHeader struct {
	Number     uint64 // the segment's own number, also in its name
	Generation uint64 // random, also in its name: tells a reused number apart
	Repository [16]byte
	Encrypted  bool
}

func (h segmentHeader) encode() []byte {
	b := make([]byte, 0, segmentHeaderSize)
	b = append(b, segmentMagic...)
	b = binary.LittleEndian.AppendUint16(b, formatVersion)
	var flags uint16
	if h.Encrypted {
		flags |= segmentEncrypted
	}
	b = binary.LittleEndian.AppendUint16(b, flags)
	b = binary.LittleEndian.AppendUint64(b, h.Number)
	b = binary.LittleEndian.AppendUint64(b, h.Generation)
	b = append(b, h.Repository[:]...)
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

func decodeSegmentHeader(b []byte) (segmentHeader, error) {
	var h segmentHeader
	if len(b) < segmentHeaderSize || string(b[:8]) != segmentMagic {
		return h, errors.New("not a segment")
	}
	b = b[:segmentHeaderSize]
	if crc32.Checksum(b[:44], castagnoli) != binary.LittleEndian.Uint32(b[44:]) {
		return h, fmt.Errorf("segment header: %w", errCRC)
	}
	if v := binary.LittleEndian.Uint16(b[8:]); v != formatVersion {
		return h, fmt.Errorf("segment format %d, this program reads %d", v, formatVersion)
	}
	flags := binary.LittleEndian.Uint16(b[10:])
	if flags&^segmentEncrypted != 0 {
		return h, fmt.Errorf("segment flags %#x are unknown", flags)
	}
	h.Encrypted = flags&segmentEncrypted != 0
	h.Number = binary.LittleEndian.Uint64(b[12:])
	h.Generation = binary.LittleEndian.Uint64(b[20:])
	copy(h.Repository[:], b[28:])
	return h, nil
}

// recordHeader precedes every payload.
type recordHeader struct {
	Type   recordType
	Codec  codec
	Raw    uint32 // length of the plain bytes
	Stored uint32 // length of the payload as it is in the segment
	ID     ID
}

// appendTo appends the header without its checksum: the 48 bytes that are
// also the additional data of an encrypted payload.
func (h recordHeader) appendTo(b []byte) []byte {
	b = binary.LittleEndian.AppendUint32(b, recordMagic)
	b = append(b, byte(h.Type), byte(h.Codec), 0, 0)
	b = binary.LittleEndian.AppendUint32(b, h.Raw)
	b = binary.LittleEndian.AppendUint32(b, h.Stored)
	return append(b, h.ID[:]...)
}

// sealRecord writes the checksum into a record: header, room for the
// checksum, payload.
func sealRecord(record []byte) {
	binary.LittleEndian.PutUint32(record[48:], recordCRC(record))
}

func recordCRC(record []byte) uint32 {
	crc := crc32.Checksum(record[:48], castagnoli)
	return crc32.Update(crc, castagnoli, record[recordHeaderSize:])
}

// decodeRecordHeader reads a header and checks all that can be checked without
// the payload.
func decodeRecordHeader(b []byte) (recordHeader, error) {
	var h recordHeader
	if len(b) < recordHeaderSize || binary.LittleEndian.Uint32(b) != recordMagic {
		return h, errTorn
	}
	h.Type, h.Codec = recordType(b[4]), codec(b[5])
	h.Raw = binary.LittleEndian.Uint32(b[8:])
	h.Stored = binary.LittleEndian.Uint32(b[12:])
	copy(h.ID[:], b[16:])
	limit := uint32(maxPayload)
	switch h.Type {
	case chunkRecord, nodeRecord:
		if h.Raw == 0 || h.Raw > maxChunkSize {
			return h, fmt.Errorf("record of %d plain bytes", h.Raw)
		}
	case tocRecord:
		limit = maxTOCSize
	default:
		return h, fmt.Errorf("record type %d is unknown", h.Type)
	}
	if h.Stored > limit {
		return h, fmt.Errorf("record of %d stored bytes", h.Stored)
	}
	if b[6] != 0 || b[7] != 0 {
		return h, errors.New("reserved bytes of a record are set")
	}
	return h, nil
}

// checkRecord decodes the header of a whole record and checks its checksum.
func checkRecord(record []byte) (recordHeader, error) {
	h, err := decodeRecordHeader(record)
	if err != nil {
		return h, err
	}
	if len(record) != recordHeaderSize+int(h.Stored) {
		return h, fmt.Errorf("record of %d bytes where %d were expected", recordHeaderSize+int64(h.Stored), len(record))
	}
	if recordCRC(record) != binary.LittleEndian.Uint32(record[48:]) {
		return h, errCRC
	}
	return h, nil
}

// tocEntry is a record's line in the table of contents.
type tocEntry struct {
	ID     ID
	Off    uint32 // of the record in the segment
	Stored uint32
	Raw    uint32
	Type   recordType
	Codec  codec
}

// size returns the bytes that the record takes in its segment.
func (e tocEntry) size() int64 { return recordHeaderSize + int64(e.Stored) }

func encodeTOC(entries []tocEntry) []byte {
	b := make([]byte, 0, len(entries)*tocEntrySize)
	for _, e := range entries {
		b = append(b, e.ID[:]...)
		b = binary.LittleEndian.AppendUint32(b, e.Off)
		b = binary.LittleEndian.AppendUint32(b, e.Stored)
		b = binary.LittleEndian.AppendUint32(b, e.Raw)
		b = append(b, byte(e.Type), byte(e.Codec), 0, 0)
	}
	return b
}

// decodeTOC reads a table of contents whose records end at offset end.
func decodeTOC(b []byte, end int64) ([]tocEntry, error) {
	if len(b)%tocEntrySize != 0 || len(b) > maxTOCSize {
		return nil, fmt.Errorf("table of contents of %d bytes", len(b))
	}
	entries := make([]tocEntry, 0, len(b)/tocEntrySize)
	next := int64(segmentHeaderSize)
	for ; len(b) > 0; b = b[tocEntrySize:] {
		e := tocEntry{
			Off:    binary.LittleEndian.Uint32(b[32:]),
			Stored: binary.LittleEndian.Uint32(b[36:]),
			Raw:    binary.LittleEndian.Uint32(b[40:]),
			Type:   recordType(b[44]),
			Codec:  codec(b[45]),
		}
		copy(e.ID[:], b)
		if int64(e.Off) != next || e.Stored > maxPayload || e.Raw > maxChunkSize ||
			(e.Type != chunkRecord && e.Type != nodeRecord) || b[46] != 0 || b[47] != 0 {
			return nil, fmt.Errorf("entry %d of the table of contents is impossible", len(entries))
		}
		next += e.size()
		entries = append(entries, e)
	}
	if next != end {
		return nil, fmt.Errorf("the table of contents covers %d bytes of %d", next, end)
	}
	return entries, nil
}

// footer is the last thing in a sealed segment.
type footer struct {
	TOC     uint64 // offset of the record that holds the table of contents
	Records uint32 // entries in it
	// Generation is the segment's: a guest, who doesn't know it, can't write a chunk that
	// ends like a sealed segment.
	Generation uint64
}

func (f footer) encode() []byte {
	b := make([]byte, 0, footerSize)
	b = append(b, footerMagic...)
	b = binary.LittleEndian.AppendUint64(b, f.TOC)
	b = binary.LittleEndian.AppendUint32(b, f.Records)
	b = binary.LittleEndian.AppendUint64(b, f.Generation)
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

func decodeFooter(b []byte) (footer, error) {
	if len(b) != footerSize || string(b[:8]) != footerMagic {
		return footer{}, errors.New("no footer: the segment is not sealed")
	}
	if crc32.Checksum(b[:28], castagnoli) != binary.LittleEndian.Uint32(b[28:]) {
		return footer{}, fmt.Errorf("footer: %w", errCRC)
	}
	f := footer{
		TOC: binary.LittleEndian.Uint64(b[8:]), Records: binary.LittleEndian.Uint32(b[16:]),
		Generation: binary.LittleEndian.Uint64(b[20:]),
	}
	if f.TOC > maxSegmentSize || f.Records > maxRecords {
		return footer{}, errors.New("footer: impossible values")
	}
	return f, nil
}
