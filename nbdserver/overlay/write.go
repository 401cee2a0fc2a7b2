package overlay

import (
	"errors"
	"fmt"
	"sync"
	"syscall"

	"github.com/holdfast-backup/holdfast/image"
	"github.com/holdfast-backup/holdfast/internal/durable"
)

// room keeps the reserve of the file system free. Asking the file system is done
// once for several writes, the more often the less is free.
type room struct {
	fs      durable.FS
	dir     string
	reserve int64

	mu     sync.Mutex
	credit int64 // bytes that may be taken without asking; guarded by mu
}

// maxCredit bounds what is taken of the reserve by those who do not ask, other
// overlays among them.
const maxCredit = 16 << 20

// take takes n bytes, or fails with [syscall.ENOSPC].
func (r *room) take(n int64) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if n <= r.credit {
		r.credit -= n
		return nil
	}
	free, _, err := r.fs.Space(r.dir)
	if err != nil {
		return err
	}
	left := free - r.reserve - n
	if left < 0 {
		r.credit = 0
		return fmt.Errorf("%w: %d bytes are free, of which %d are kept", syscall.ENOSPC, free, r.reserve)
	}
	r.credit = min(left/8, maxCredit)
	return nil
}

// check returns an error for a range outside the disk, and for a failed overlay.
func (o *Overlay) check(off, length int64) error {
	if off < 0 || length < 0 || off > o.Size()-length {
		return fmt.Errorf("overlay %s: %w: %d bytes at %d of %d", o.path, syscall.EINVAL, length, off, o.Size())
	}
	return o.failure()
}

func (o *Overlay) failure() error {
	if why := o.failed.Load(); why != nil {
		return fmt.Errorf("overlay %s: %w: an earlier %s; it has to be opened again", o.path, syscall.EIO, *why)
	}
	return nil
}

// WriteAt implements [image.Writer]. Besides ENOSPC its errors are those of the
// file and, where part of a block is written, of the base.
func (o *Overlay) WriteAt(p []byte, off int64) (int, error) {
	if err := o.check(off, int64(len(p))); err != nil || len(p) == 0 {
		return 0, err
	}
	s, n, err := o.run(off, off+int64(len(p)))
	if err != nil {
		return 0, err
	}
	if s == data && n == int64(len(p)) {
		// No state changes. If a Zero or Trim comes between, it overlaps.
		_, err = o.file.WriteAt(p, o.layout.block(0)+off)
		o.changes.Add(1)
	} else {
		err = o.writeNew(p, off)
	}
	if err != nil {
		return 0, fmt.Errorf("overlay %s: write %d bytes at %d: %w", o.path, len(p), off, err)
	}
	return len(p), nil
}

// writeNew writes to blocks of which some are not data yet.
func (o *Overlay) writeNew(p []byte, off int64) error {
	first, end := off/blockSize, divUp(off+int64(len(p)), blockSize)
	held := o.locks.lock(first, end)
	defer o.locks.unlock(held)
	o.mu.RLock()
	v, err := o.blocks.survey(first, end)
	o.mu.RUnlock()
	if err != nil {
		return err
	}
	if err := o.take(v); err != nil {
		return err
	}
	if v.pages > 0 {
		err = o.makePages(first, end)
	}
	if err == nil {
		err = o.writeBlocks(p, off, v)
	}
	if err == nil {
		// All of the blocks is in the file now; from here on they are read from it.
		err = o.setState(first, end, data)
	}
	if err != nil {
		o.used.Add(-v.fresh * blockSize)
		o.giveBack(first, end)
	}
	return err
}

// take takes the room that a write needs.
func (o *Overlay) take(v survey) error {
	n := v.fresh * blockSize
	used := o.used.Add(n)
	var err error
	if o.limit > 0 && n > 0 && used > o.limit {
		err = fmt.Errorf("%w: the overlay's limit is %d bytes", syscall.ENOSPC, o.limit)
	} else {
		err = o.room.take(n + v.pages*pageSize + logRecord)
	}
	if err != nil {
		o.used.Add(-n)
	}
	return err
}

// makePages makes the pages of the map that a range of blocks needs, and writes them:
// that there is room is known before a change is answered, not at the next Sync. A page
// that is not durable may be written at any time. Either no directory on disk refers to
// it, or that does not have its latest change, to zero, which is what is written.
func (o *Overlay) makePages(first, end int64) error {
	o.making.Lock() // one page is written once, and not after it was changed
	defer o.making.Unlock()
	for i := first / pageStates; i*pageStates < end; i++ {
		o.mu.RLock()
		p := o.blocks.newPage(i)
		made := !o.blocks.uniform(i)
		o.mu.RUnlock()
		if made {
			continue
		}
		if err := o.writePage(dirtyPage{i, o.layout.mapPage(i), p.states, 0}); err != nil {
			return err
		}
		o.mu.Lock()
		o.blocks.give(i, p)
		o.mu.Unlock()
	}
	return nil
}

// writeBlocks writes p and what of its first and last block was not data.
func (o *Overlay) writeBlocks(p []byte, off int64, v survey) error {
	start := o.layout.block(0)
	end := off + int64(len(p))
	if head := off % blockSize; head != 0 && v.first != data {
		n, err := o.writeAround(p, off, v.first)
		if err != nil {
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	tail := int(end % blockSize)
	if end == o.Size() || v.last == data || len(p) == 0 {
		tail = 0 // it ends with its block, or needs nothing else
	}
	if n := len(p) - tail; n > 0 {
		if _, err := o.file.WriteAt(p[:n], start+off); err != nil {
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	if len(p) > 0 {
		_, err := o.writeAround(p, off, v.last)
		return err
	}
	return nil
}

// writeAround writes the whole block that off lies in, with what p has for it
// and the rest as it was. It returns how many bytes of p that is.
func (o *Overlay) writeAround(p []byte, off int64, s state) (int, error) {
	first := off / blockSize * blockSize
	block := make([]byte, min(blockSize, o.Size()-first))
	if err := o.readRun(s, block, first); err != nil {
		return 0, err
	}
	n := copy(block[off-first:], p)
	_, err := o.file.WriteAt(block, o.layout.block(0)+first)
	return n, err
}

// giveBack gives back what a failed write took for blocks that did not become
// data. Their range is locked.
func (o *Overlay) giveBack(first, end int64) {
	if o.failed.Load() != nil {
		return // a log that could not be emptied may tell of them
	}
	for first < end {
		o.mu.RLock()
		s, n, err := o.blocks.run(first, end)
		o.mu.RUnlock()
		if err != nil {
			return
		}
		if s != data {
			_ = o.punch(first, first+n) // the write's own error tells
		}
		first += n
	}
}

// punch gives the room of blocks back that are not data. That it may not be
// possible costs room and nothing else.
func (o *Overlay) punch(first, end int64) error {
	if o.noHoles.Load() {
		return nil
	}
	err := o.file.PunchHole(o.layout.block(first), (end-first)*blockSize)
	if errors.Is(err, errors.ErrUnsupported) {
		o.noHoles.Store(true)
		return nil
	}
	if errors.Is(err, syscall.ENOSPC) { // for the file system's own records
		return nil
	}
	return err
}

// Zero implements [image.Writer]. Parts of blocks at the edges are written.
func (o *Overlay) Zero(off, length int64) error {
	if err := o.check(off, length); err != nil || length == 0 {
		return err
	}
	first, end := o.wholeBlocks(off, length)
	if first >= end {
		first, end = divUp(off, blockSize), divUp(off, blockSize)
	}
	head := min(first*blockSize, off+length) - off
	if err := o.zeroPart(off, head); err != nil {
		return err
	}
	if err := o.zeroBlocks(first, end); err != nil {
		return fmt.Errorf("overlay %s: zero %d bytes at %d: %w", o.path, length, off, err)
	}
	tail := max(off+head, end*blockSize)
	return o.zeroPart(tail, off+length-tail)
}

// zeroPart zeroes a part of one block.
func (o *Overlay) zeroPart(off, length int64) error {
	if length <= 0 {
		return nil
	}
	s, _, err := o.run(off, off+length)
	if err != nil || s == zero {
		return err
	}
	_, err = o.WriteAt(o.zeroBlock[:length], off)
	return err
}

// Trim implements [image.Writer]. Whole blocks become zero; parts of blocks stay
// as they are.
func (o *Overlay) Trim(off, length int64) error {
	if err := o.check(off, length); err != nil {
		return err
	}
	first, end := o.wholeBlocks(off, length)
	err := o.zeroBlocks(first, end)
	if errors.Is(err, syscall.ENOSPC) {
		return nil // no room for the map: the rest stays as it was, which is allowed
	}
	if err != nil {
		return fmt.Errorf("overlay %s: trim %d bytes at %d: %w", o.path, length, off, err)
	}
	return nil
}

// wholeBlocks returns the blocks that lie in a range all of them; none if it is not
// first < end. The disk's last one may be short.
func (o *Overlay) wholeBlocks(off, length int64) (first, end int64) {
	end = (off + length) / blockSize
	if off+length == o.Size() {
		end = o.layout.blocks
	}
	return divUp(off, blockSize), end
}

// zeroBlocks makes blocks zero, page by page: a write waits for no more than one.
// Pages without data are quick, and many are done as one.
func (o *Overlay) zeroBlocks(first, end int64) error {
	for first < end {
		next := min(end, (first/pageStates+1)*pageStates)
		if first%pageStates == 0 {
			i := first / pageStates
			o.mu.RLock()
			for last := i + uniformPages; i < last && (i+1)*pageStates <= end && o.blocks.uniform(i); i++ {
				next = (i + 1) * pageStates
			}
			o.mu.RUnlock()
		}
		if err := o.zeroRange(first, next); err != nil {
			return err
		}
		first = next
	}
	return nil
}

// uniformPages is how many pages of the map become zero as one: 1 TiB, for which
// the map is locked some 100 µs.
const uniformPages = 16384

// zeroRange makes blocks of one page of the map zero, or of whole pages.
func (o *Overlay) zeroRange(first, end int64) error {
	held := o.locks.lock(first, end)
	defer o.locks.unlock(held)
	o.mu.RLock()
	v, err := o.blocks.survey(first, end)
	s, n, _ := o.blocks.run(first, end)
	o.mu.RUnlock()
	if err != nil || s == zero && n == end-first {
		return err
	}
	whole := first%pageStates == 0 && (end%pageStates == 0 || end == o.layout.blocks)
	if !whole && v.pages > 0 {
		if err := o.room.take(v.pages * pageSize); err != nil {
			return err
		}
		if err := o.makePages(first, end); err != nil {
			return err
		}
	}
	holes := o.dataRuns(first, end)
	if err := o.setState(first, end, zero); err != nil {
		return err
	}
	o.used.Add(-(end - first - v.fresh) * blockSize)
	// Reads no longer go there, and writes wait for the range.
	for _, hole := range holes {
		if err := o.punch(hole.Off, hole.End()); err != nil {
			return err
		}
	}
	return nil
}

// setState logs and makes a change of the map. With an error there is none.
func (o *Overlay) setState(first, end int64, s state) error {
	apply := func() {
		o.mu.Lock()
		defer o.mu.Unlock()
		o.blocks.set(first, end, s)
		// That there is something to sync is known by the time that others see
		// the change and leave it at that.
		o.changes.Add(1)
	}
	for {
		err := o.log.add(first, end, s, apply)
		noSpace := errors.Is(err, syscall.ENOSPC)
		switch {
		case err == nil || noSpace && o.log.empty():
			return err
		case !noSpace && !errors.Is(err, errLogFull):
			return o.fail("change", err)
		}
		// A Sync empties the log. If others have filled it again, they got on.
		if err := o.Sync(); err != nil {
			return err
		}
	}
}

// fail makes the overlay failed, and returns an EIO that says why.
func (o *Overlay) fail(op string, err error) error {
	why := fmt.Sprintf("%s failed: %s", op, err.Error())
	if err := o.log.kill(); err != nil {
		why += "; " + err.Error()
	}
	o.failed.CompareAndSwap(nil, &why)
	return fmt.Errorf("%w: %s", syscall.EIO, why)
}

// dataRuns returns the runs of blocks that are data, in blocks. Their range is locked
// and has no bad sectors.
func (o *Overlay) dataRuns(first, end int64) (runs []image.Extent) {
	o.mu.RLock()
	defer o.mu.RUnlock()
	for first < end {
		s, n, err := o.blocks.run(first, end)
		if err != nil {
			return runs
		}
		if s == data {
			runs = append(runs, image.Extent{Off: first, Len: n})
		}
		first += n
	}
	return runs
}
