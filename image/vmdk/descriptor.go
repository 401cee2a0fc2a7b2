package vmdk

import (
	"bytes"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/image/internal/imgfile"
)

const (
	maxDescriptor = 512 << 10 // bytes; enough for maxExtents lines
	maxExtents    = 4096
	noParent      = 0xffffffff // parentCID of a disk that stands alone
)

// Kinds of extents that are read.
const (
	kindFlat   = "FLAT"
	kindVMFS   = "VMFS" // the same, in a datastore of ESXi and in copies from there
	kindSparse = "SPARSE"
	kindZero   = "ZERO"
)

// accessWord is how extent lines begin.
var accessWord = regexp.MustCompile(`(?i)^(RW|RDONLY|NOACCESS)\s`)

// descriptor is what the text says that matters for reading. Its words are cut
// to 80 letters in errors: they may be long.
type descriptor struct {
	createType string
	parent     string // names the parent, "" if there is none
	encrypted  bool
	extents    []extentLine
}

// extentLine is a line such as
//
//	RW 4194304 FLAT "disk-f001.vmdk" 0
type extentLine struct {
	access string
	size   int64 // bytes
	kind   string
	name   string
	offset int64 // bytes, of flat extents; those of VMFS have none and start at 0
}

// readDescriptor reads the descriptor in length bytes at off.
func readDescriptor(f imgfile.File, off, length int64) (descriptor, error) {
	if length > maxDescriptor {
		return descriptor{}, fmt.Errorf("%w: descriptor of %d bytes", image.ErrCorrupt, length)
	}
	text := make([]byte, length)
	if err := imgfile.ReadFull(f.File, text, off); err != nil {
		return descriptor{}, err
	}
	text, _, _ = bytes.Cut(text, []byte{0}) // embedded ones are padded
	return parseDescriptor(string(text))
}

// parseDescriptor reads the lines of a descriptor. Keywords are not
// case-sensitive; lines it does not know are passed over.
//
// Source: Virtual Disk Format 5.0, "The Text Descriptor".
func parseDescriptor(text string) (descriptor, error) {
	var d descriptor
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if accessWord.MatchString(line) {
			if len(d.extents) == maxExtents {
				return d, fmt.Errorf("%w: more than %d extents", image.ErrUnsupported, maxExtents)
			}
			e, err := parseExtent(line)
			if err != nil {
				return d, err
			}
			d.extents = append(d.extents, e)
			continue
		}
		key, value, found := strings.Cut(line, "=")
		if !found || strings.HasPrefix(line, "#") {
			continue
		}
		if err := d.set(strings.TrimSpace(key), strings.Trim(value, " \t\"")); err != nil {
			return d, err
		}
	}
	return d, nil
}

func (d *descriptor) set(key, value string) error {
	key = strings.ToLower(key)
	switch {
	case key == "createtype":
		d.createType = value
	case key == "parentcid":
		cid, err := strconv.ParseUint(value, 16, 32)
		if err != nil {
			return fmt.Errorf("%w: parentCID %.80q", image.ErrCorrupt, value)
		}
		if cid != noParent && d.parent == "" {
			d.parent = "content id " + value
		}
	case key == "parentfilenamehint":
		if value != "" {
			d.parent = strconv.Quote(value)
		}
	case strings.HasPrefix(key, "encryption."):
		d.encrypted = true
	}
	return nil
}

// parseExtent reads one extent line. Names are checked when they are opened,
// kinds in check.
func parseExtent(line string) (extentLine, error) {
	broken := fmt.Errorf("%w: extent line %.80q", image.ErrCorrupt, line)
	head, rest, quoted := strings.Cut(line, `"`)
	fields := strings.Fields(head)
	if len(fields) < 3 {
		return extentLine{}, broken
	}
	sectors, err := strconv.ParseInt(fields[1], 10, 64)
	if err != nil || sectors <= 0 || sectors > image.MaxSize/sectorSize {
		return extentLine{}, broken
	}
	e := extentLine{access: strings.ToUpper(fields[0]), size: sectors * sectorSize, kind: strings.ToUpper(fields[2])}
	if !quoted {
		return e, nil
	}
	name, rest, closed := strings.Cut(rest, `"`)
	if !closed {
		return extentLine{}, broken
	}
	e.name = name
	if fields = strings.Fields(rest); len(fields) > 0 {
		offset, err := strconv.ParseInt(fields[0], 10, 64)
		if err != nil || offset < 0 || offset > image.MaxSize/sectorSize {
			return extentLine{}, broken
		}
		e.offset = offset * sectorSize
	}
	return e, nil
}

// check refuses what this package does not read, and types other than the
// given ones.
func (d descriptor) check(types ...string) error {
	isType := func(t string) bool { return strings.EqualFold(t, d.createType) }
	switch {
	case d.encrypted:
		return fmt.Errorf("%w: encrypted disk", image.ErrUnsupported)
	case d.createType == "":
		return fmt.Errorf("%w: descriptor without createType", image.ErrCorrupt)
	case !slices.ContainsFunc(types, isType):
		return fmt.Errorf("%w: createType %.80q", image.ErrUnsupported, d.createType)
	case d.parent != "":
		return fmt.Errorf("%w: snapshot on parent %.80s; consolidate the snapshots first", image.ErrUnsupported, d.parent)
	case len(d.extents) == 0:
		return fmt.Errorf("%w: descriptor without extents", image.ErrCorrupt)
	}
	for _, e := range d.extents {
		switch {
		case !slices.Contains([]string{kindFlat, kindVMFS, kindSparse, kindZero}, e.kind):
			return fmt.Errorf("%w: %.80s extent %.80q", image.ErrUnsupported, e.kind, e.name)
		case e.access == "NOACCESS":
			return fmt.Errorf("%w: NOACCESS extent %.80q", image.ErrUnsupported, e.name)
		}
	}
	return nil
}
