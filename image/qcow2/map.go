package qcow2

import (
	"math/bits"

	"github.com/holdfast-backup/holdfast/image/internal/imgfile"
)

// kind says where bytes of the disk come from.
type kind uint8

const (
	kindZero kind = iota
	kindBacking
	kindData
	kindCompressed
)

// run is a range of the disk whose bytes come from one place.
type run struct {
	kind     kind
	off, len int64
	// host is where in the file the bytes of a kindData run begin.
	host int64
	// descriptor is that of the kindCompressed cluster that holds the run.
	descriptor uint64
}

func (r run) end() int64 { return r.off + r.len }

// continuedBy reports whether next, which begins where r ends, can be read
// together with r.
func (r run) continuedBy(next run) bool {
	if r.kind != next.kind {
		return false
	}
	switch r.kind {
	case kindData:
		return r.host+r.len == next.host
	case kindCompressed:
		return false
	default:
		return true
	}
}

// lookup returns the run that begins at off, cut at end. Both lie inside the
// disk. A run may stop early where an L2 table ends.
func (m *Image) lookup(off, end int64) (run, error) {
	table, err := m.table(off)
	if err != nil {
		return run{}, err
	}
	if table == nil {
		return run{kind: m.unallocated(), off: off, len: min(m.nextTable(off), end) - off}, nil
	}
	r, err := m.entry(table, off)
	if err != nil {
		return run{}, err
	}
	stop := min(end, off-off%m.tableSpan()+m.tableSpan())
	for r.end() < stop {
		next, err := m.entry(table, r.end())
		if err != nil || !r.continuedBy(next) {
			break // whoever reads on meets the error
		}
		r.len += next.len
	}
	r.len = min(r.end(), end) - off
	if r.kind == kindData && (r.host > m.fileSize || r.len > m.fileSize-r.host) {
		return run{}, m.corrupt("%d bytes of data for disk offset %d lie at %d, beyond the end of the file (%d)", r.len, off, r.host, m.fileSize)
	}
	return r, nil
}

// unallocated returns where bytes come from that the image does not have.
func (m *Image) unallocated() kind {
	if m.backing != nil {
		return kindBacking
	}
	return kindZero
}

func (m *Image) l1Entry(i int64) uint64 { return order.Uint64(m.l1[8*i:]) & offsetMask }

// nextTable returns the disk offset after off at which the next L2 table takes
// over, or one that is past the disk.
func (m *Image) nextTable(off int64) int64 {
	i := off/m.tableSpan() + 1
	for i < m.l1Entries && m.l1Entry(i) == 0 {
		i++
	}
	return i * m.tableSpan()
}

// table returns the L2 table that describes the disk at off, nil if there is none.
func (m *Image) table(off int64) ([]byte, error) {
	at := m.l1Entry(off / m.tableSpan())
	if at == 0 {
		return nil, nil
	}
	return m.tables.Get(at, func() ([]byte, error) {
		host := int64(at) // at most 2^56
		if host%m.clusterSize() != 0 || host > m.fileSize-m.clusterSize() {
			return nil, m.corrupt("the L2 table for disk offset %d lies at %d in a file of %d bytes", off, host, m.fileSize)
		}
		table := make([]byte, m.clusterSize())
		return table, imgfile.ReadFull(m.file, table, host)
	})
}

// entry returns what an L2 table says about the disk from off to the end of
// the cluster, or up to the next subcluster of another kind.
func (m *Image) entry(table []byte, off int64) (run, error) {
	within := off & (m.clusterSize() - 1)
	p := table[off%m.tableSpan()>>m.clusterBits*m.entrySize():]
	e := order.Uint64(p)
	host := int64(e & offsetMask)
	r := run{off: off, len: m.clusterSize() - within, host: host + within}
	switch {
	case e&flagCompressed != 0:
		r.kind, r.descriptor = kindCompressed, e&(flagCompressed-1)
		return r, nil
	case host%m.clusterSize() != 0:
		return run{}, m.corrupt("the cluster for disk offset %d lies at %d, between two clusters", off, host)
	case m.extendedL2:
		return m.subcluster(r, order.Uint64(p[8:]))
	case e&flagZero != 0 && m.version == 2:
		return run{}, m.corrupt("the L2 entry for disk offset %d uses a feature of version 3", off)
	case e&flagZero != 0:
		r.kind = kindZero
	case host == 0:
		r.kind = m.unallocated()
	default:
		r.kind = kindData
	}
	return r, nil
}

// subcluster cuts r, the rest of a cluster, at the first subcluster that is of another
// kind than the one it begins in.
func (m *Image) subcluster(r run, bitmap uint64) (run, error) {
	allocated, zero := uint32(bitmap), uint32(bitmap>>32)
	within := r.off & (m.clusterSize() - 1)
	if allocated&zero != 0 || allocated != 0 && r.host == within {
		return run{}, m.corrupt("the L2 entry for disk offset %d contradicts itself", r.off)
	}
	size := m.clusterSize() / subclusters
	first := within / size
	allocated, zero = allocated>>first, zero>>first
	var count int // of subclusters alike; the shifts brought in zero bits
	switch {
	case zero&1 != 0:
		r.kind, count = kindZero, bits.TrailingZeros32(^zero)
	case allocated&1 != 0:
		r.kind, count = kindData, bits.TrailingZeros32(^allocated)
	default:
		r.kind, count = m.unallocated(), bits.TrailingZeros32(zero|allocated)
	}
	r.len = min(r.len, (first+int64(count))*size-within)
	return r, nil
}
