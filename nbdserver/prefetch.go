package nbdserver

// Prefetcher is a disk that can be told what will be read soon. Prefetch returns
// at once; the disk bounds the work that it then does in the background, and may
// do none. Ranges lie inside the disk.
type Prefetcher interface {
	Prefetch(off, length int64)
}

const (
	// maxStreams is how many sequences of reads are followed on a connection.
	maxStreams = 8
	// sequential is after how many reads that follow each other a sequence is
	// one.
	sequential = 3
	// skipLen is how far a sequence may jump ahead: over a hole, or because
	// requests overtook each other.
	skipLen = 1 << 20
	// aheadLen is how far ahead of a sequence the disk is told to prefetch, in
	// bytes, and aheadStep the least that it is told of.
	aheadLen  = 2 << 20
	aheadStep = 512 << 10
)

// streams finds the sequences among a connection's reads.
type streams struct {
	disk Prefetcher // nil: there is nothing to do
	size int64      // of the disk
	all  [maxStreams]stream
	turn uint64 // reads seen
}

type stream struct {
	next  int64  // the end of the last read
	ahead int64  // the end of what was prefetched
	run   int    // reads that followed each other, up to sequential
	used  uint64 // turn of the last read
}

// read takes note of a read of a range inside the disk.
func (s *streams) read(off, length int64) {
	if s.disk == nil || length == 0 {
		return
	}
	s.turn++
	oldest := &s.all[0]
	for i := range s.all {
		t := &s.all[i]
		if t.used > 0 && t.continues(off) {
			t.run = min(t.run+1, sequential)
			t.next, t.used = max(t.next, off+length), s.turn
			s.prefetch(t)
			return
		}
		if t.used < oldest.used {
			oldest = t
		}
	}
	*oldest = stream{next: off + length, used: s.turn}
}

// continues reports whether a read at off belongs to the stream. One that is not
// known to be a sequence yet takes only its exact continuation.
func (t *stream) continues(off int64) bool {
	if t.run < sequential {
		return off == t.next
	}
	return off >= t.next-skipLen && off <= t.next+skipLen
}

func (s *streams) prefetch(t *stream) {
	from := max(t.ahead, t.next)
	to := min(t.next+aheadLen, s.size)
	if t.run == sequential && (to-from >= aheadStep || to > from && to == s.size) {
		t.ahead = to
		s.disk.Prefetch(from, t.ahead-from)
	}
}
