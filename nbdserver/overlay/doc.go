// Package overlay is a writable disk over a read-only one: what is written goes to
// a local file, what was not written is read from the base.
//
// One sparse file is one overlay, with a small log beside it. It holds the changed blocks at their place and
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
// Beside the file lies the log, PATH.log, which is there from the first change on and
// empty after each Close. Its header:
//
//	 0  8  magic "HOLDLOG\n"
//	 8  4  version, 1
//	12  4  zero
//	16 16  id of the overlay
//	32 16  id of the boot of the machine (/proc/sys/kernel/random/boot_id)
//	48  4  CRC-32C of bytes 0–47
//	52 11  zero
//	63  1  mark: not 0 while a Sync runs
//
// Records follow, up to a length of 16 MiB, or of a quarter of the reserve where that is
// less:
//
//	 0  4  CRC-32C of bytes 4–23
//	 4  4  state that blocks were given: 1 data, 2 zero
//	 8  8  first block
//	16  8  number of blocks, from 1
//
// The last record that names a block is right. The first one whose checksum or values
// are not ends the log.
//
// # Durability
//
// What was answered is there after a kill of the process; what Sync covered is there
// after a loss of power, too. Both matter to a guest whose client connects again when the
// server does: it does not repeat writes that were answered, and its next flush
// succeeds.
//
// Create writes a temporary file (path.tmp, [durable.RemoveTemporary]), syncs it,
// renames it and syncs the folder. The file has its full length from then on.
//
// A change of the map is, in this order:
//
//  1. pages of the map that it needs first are written, as they were before it,
//  2. data are written,
//  3. the change is logged and made in memory, under one lock,
//  4. the room of blocks that became zero is given back.
//
// So the room for the map is there, or the change fails with [syscall.ENOSPC]. The log is
// written without a sync: it is for the page cache, which outlives the
// process. Nobody relies on a change that is not logged. A change that cannot be logged
// is not made; if the log is full, or finds no room, a Sync empties it first.
//
// Sync does, in this order:
//
//  1. note where the log ends, and set its mark,
//  2. take a copy of the map pages that changed: all that was logged is in it,
//  3. sync the data: what the map will call data is on disk,
//  4. write and sync the map pages: sectors of them may be found old or new,
//  5. write and sync the directory pages that changed: a page that they begin to
//     refer to is on disk,
//  6. empty the log and sync that; if it has grown meanwhile, clear the mark, leave and
//     sync it: a log of before cannot come back, which would undo what is durable.
//
// A write or truncation of these that finds no room (the file system is full, and writes
// anew what is written again) ends the Sync with ENOSPC. Nothing is lost, the log stays,
// and a later Sync does all of it. Lack of room in a sync is another matter: bytes may have
// been dropped.
//
// Steps without changes are left out; without any Sync costs nothing. Syncs that
// wait for one another share the next.
//
// After a loss of power each write that Sync did not cover is there or not, in pieces
// of 512 bytes, as is after a kill one that was not answered; nothing else has
// changed:
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
// Open believes a log of this overlay and this boot, if the file has data wherever the log
// says so. It syncs the file first. A hole that the log calls data means that the page
// cache was lost with the process: the file system was shut down after an error, or its
// device went away, and it was mounted anew. The log is then emptied, which Options.Log hears
// of: the overlay is as after a loss of power.
//
// If the log has the mark, a Sync may have
// failed without anyone having heard of it, and the data be in the page cache alone: Open
// writes what the log calls data again, as it is read, and syncs. Then it syncs
// the folder, drops the file from the page cache, reads the map, makes the logged
// changes in it, and syncs that. What an opened overlay shows is durable. If a sync of
// the file before fails, Open does, and the log is emptied: the next Open finds the
// overlay as after a loss of power. A log of another boot is ignored: what it calls data
// may not have reached the disk. If the kernel does not tell its boot, Open fails.
//
// What this does not cover:
//
//   - If the machine of the server loses power and a guest on another one lives on, writes
//     that it did not flush are lost and it is not told, as with a disk whose
//     cache lost its power. Such a guest is to be reset.
//   - If a file system loses what was not synced without a reboot, of blocks that were data
//     before any of the contents since the last Sync is found, and nobody is told. A block
//     that is new to the log, and not in a hole either, is not noticed: on a file system
//     that cannot punch holes it may be what it was before it became zero, on one
//     that gives new files old blocks (ext4 with data=writeback) anything.
//   - A file system that makes holes of zeros that are written (ZFS with compression)
//     makes a kill as a loss of power, if it has done so to a block of the log.
//   - If a sync of the file fails in the very moment in which the process is killed, so that
//     the kernel told the error to nobody, overwrites of blocks that were data before
//     the last Sync may be lost: the log does not name them, and the client's next flush
//     succeeds. What the log names is written again.
//   - If an older copy of the file takes its place, the log is to be removed.
//   - A move of the file without its log, after a kill, is as a loss of power.
//
// A Sync that fails, and a log that cannot be written, both but for lack of room, make the
// overlay failed: this and all later writes and Syncs fail with [syscall.EIO];
// reads go on. The log is emptied; if that fails too, the error names it. The overlay has to
// be opened again, and is then as after a loss of power.
//
// Bytes of the map that rot are found by their checksum: a
// sector of the map makes its 7.75 MiB fail with [image.ErrCorrupt], one of the
// directory 1984 pages, the header the whole. They do not fall back to an older
// copy, which would be wrong bytes. Map, directory or header that cannot be read at all
// make Open fail. Rot of the data is not found.
//
// # Concurrency
//
// The methods of an Overlay may be called from many goroutines at once, but for
// Close, which must be the last. No lock is held during I/O but one on the range of
// blocks that a call is about to change the state of, the log's while a record is
// written, and that on new pages of the map, once in 62 MiB of the disk. Else a call
// waits only for those that came before it to overlapping ranges, or
// for the Sync that empties a full log; a write into blocks that are data already
// waits for none. Order of locks: a range, then one of the room, the new
// pages, and the syncing one; the log; the map.
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
