// Package overlay is a writable disk over a read-only one: what is written goes to
// a local file, what was not written is read from the base.
//
// One sparse file is one overlay. It holds the changed blocks at their place and
// a map that says where each block of 4 KiB is read from: from the base, from
// the file (data), or from nowhere because it is zero. The base is not changed; it
// must be the same disk each time the overlay is opened, which is the caller's to
// see to. So is that a file is open once.
//
// # On-disk format, version 1
//
// Numbers are little-endian. The file has five regions, one after the other,
// each a multiple of 4096 bytes; blocks, pages and directory pages are counted
// from the disk's size, rounded up.
//
//	header         4096 bytes
//	meta           4096 bytes
//	directory      4096 bytes for each 15872 pages
//	map            4096 bytes for each page of 15872 blocks (62 MiB)
//	data           4096 bytes for each block
//
// The header (offset, size, field):
//
//	  0    8  magic "HOLDOVL\n"
//	  8    4  version, 1
//	 12    4  block size, 4096
//	 16    8  size of the disk in bytes, up to [image.MaxSize]
//	 24    8  limit of the data in bytes, 0 for none
//	 32   16  id, random
//	 48    4  length of the meta, up to 4096
//	 52    4  CRC-32C of the meta
//	 56  452  zero
//	508    4  CRC-32C of bytes 0–507
//	512 3584  zero
//
// The meta is bytes of the caller's, then zeros. A page of the directory or of the
// map is 8 sectors of 512 bytes:
//
//	 0    4  CRC-32C of bytes 4–511
//	 4    4  the first four bytes of the id
//	 8    8  offset of the sector in the file
//	16  496  1984 states of two bits, the lowest bits of a byte first
//
// A state of the map is that of a block: 0 base, 1 data, 2 zero. A state of the
// directory is that of a page: 0 all its blocks are base, 2 all are zero, 1 its
// sectors of the map tell. 3 is not used. A map page that the directory does not
// refer to has no meaning, whatever it holds; nor have the data of a block that is
// not data. States beyond the last block or page are 0. All sectors of the
// directory are written when the file is made.
//
// # Durability
//
// Create writes a temporary file (path.tmp, [durable.RemoveTemporary]), syncs it,
// renames it and syncs the folder. The file has its full length from then on.
//
// Sync takes a copy of the map pages that changed and does, in this order:
//
//  1. sync the data: what the map will call data is on disk,
//  2. write and sync the map pages: sectors of them may be found old or new,
//  3. write and sync the directory pages that changed: a page that they begin to
//     refer to is on disk.
//
// Steps without changes are left out; without any Sync costs nothing. Syncs that
// wait for one another share the next.
//
// After a kill or a loss of power each write that Sync did not cover is there or
// not, in pieces of 512 bytes, and nothing else has changed:
//
//   - A block that becomes data is written whole, with the rest of it from the
//     base or zero, before the map says so in memory or on disk. What the file held
//     there before never shows.
//   - A block that is data is overwritten in place.
//   - A block that becomes zero is so in the map first, and then its room is given
//     back. A crash may keep the hole and forget the map; the block then reads as
//     zero or, in sectors, as before, which is what a Zero that was not synced may
//     leave.
//   - Map and directory are updated in place, a sector being the unit that a disk
//     writes whole. States of blocks do not depend on each other, so any mixture of
//     old and new sectors is right.
//
// Open syncs the file and its folder and drops the file from the page cache before
// it reads, so that what a killed process or a failed Sync left there is not seen,
// relied on, and then lost.
//
// A Sync that fails makes the overlay failed: this and all later writes and Syncs
// fail with [syscall.EIO]; reads go on. It has to be opened again, and is then as
// after a loss of power. Bytes of the map that rot are found by their checksum: a
// sector of the map makes its 7.75 MiB fail with [image.ErrCorrupt], one of the
// directory 1984 pages, the header the whole. They do not fall back to an older
// copy, which would be wrong bytes. Rot of the data is not found.
//
// # Concurrency
//
// The methods of an Overlay may be called from many goroutines at once, but for
// Close, which must be the last. No lock is held during I/O but one on the range of
// blocks that a call is about to change the state of. A call waits only for those
// that came before it to overlapping ranges; a write into blocks that are data
// already waits for none. Order of locks: the syncing one, a range, the room, the map.
//
// # Limits
//
// The file must be able to have the disk's size and the map's, 1/16000 of it: on
// ext4 with blocks of 4 KiB, disks up to 15.9 TiB. Opening reads the map pages
// that the directory refers to. They stay in memory, at most 66 MiB for each TiB that
// was changed all over, twice that for the time of a Sync; and 8 bytes for each
// page of the disk (132 KiB a TiB). A file system that cannot punch holes does not
// get room back, and Used may then be less than what the file takes.
package overlay
