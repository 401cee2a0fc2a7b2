// Package blockstore keeps the disks of restore points as deduplicated chunks.
//
// A disk is cut into chunks of a fixed size. A chunk is named by its id, the hash of
// its bytes, and stored once, however many disks hold it. A disk at a moment
// is a tree: map nodes list the ids of 1024 children, chunks or nodes one level
// down; the id of the root names the content of the whole disk. A chunk
// of zeros, and a subtree of them, is the null id and is stored nowhere. There are no
// chains: every point's trees are complete, and shared parts are shared by id.
//
// A backup is a [Session]: Put chunks, PutNode leaves, BuildMap, Commit. A
// restore is a [Disk], which is an image.Disk.
//
// # The folder
//
//	repository.json       what was chosen at creation, and the wrapped keys
//	repository.json.copy  the same
//	lock                  held by the process that has the repository open
//	segments/*.seg        the only home of chunks
//	points/*.point        one file a restore point
//	points/catalog        the list of the points
//	points/catalog.copy   the same, written after it
//	points/clock          where the clock that locks are measured with stood at a Close
//	index/                BadgerDB: id → place. A cache of the segments
//	damaged               the ids whose records are known to be bad
//	quarantine/TIME/…     what a repair replaced, each file under the path that it had
//
// Segments, points and the catalog are the truth; without index/, or with one that it cannot trust, the next
// opening makes it anew.
//
// # Segment, format 1
//
// Little-endian throughout. A segment NNNNNNNNNNNNNNNN-GGGGGGGGGGGGGGGG.seg, its number
// and generation in hexadecimal, is a header, records, a last record that holds the
// table of contents, and a footer. Offsets are below 2^30. The header (offset,
// size, field):
//
//	 0   8  magic "HFSEGMNT"
//	 8   2  version, 1
//	10   2  flags: 1 payloads are encrypted
//	12   8  number of the segment, from 1
//	20   8  generation, random: a number may come again, the pair does not
//	28  16  id of the repository
//	44   4  CRC-32C of bytes 0–43
//
// Reading needs nothing of the header that the file's name doesn't say.
//
// A record:
//
//	 0   4  magic "HFR1"
//	 4   1  type: 1 chunk, 2 map node, 3 table of contents
//	 5   1  codec: 0 none, 1 zstd frame (RFC 8878), 2 S2 block
//	 6   2  zero
//	 8   4  length of the plain bytes, 1 to 4 MiB; the chunk size for a chunk, 32 KiB for a node
//	12   4  length n of the payload
//	16  32  id; zero for a table of contents
//	48   4  CRC-32C of bytes 0–47 and the payload
//	52   n  payload: the plain bytes, compressed with the codec, then encrypted
//
// A map node's plain bytes are 1024 ids of 32 bytes. The table of contents, never
// encrypted, has an entry for every record before it, in their order:
//
//	 0  32  id; zero for a record found bad when the segment was recovered
//	32   4  offset of the record
//	36   4  length of the payload
//	40   4  length of the plain bytes
//	44   1  type
//	45   1  codec
//	46   2  zero
//
// The footer is the last 32 bytes of a sealed segment:
//
//	 0   8  magic "HFSEGEND"
//	 8   8  offset of the record that holds the table of contents
//	16   4  entries in it
//	20   8  generation of the segment, which no guest knows: its chunks can't end like this
//	28   4  CRC-32C of bytes 0–27
//
// # Envelope, format 1
//
// The files in points/ are small, and to lose one costs much. Each holds what follows twice, the
// second time from the next multiple of 4096 on, with zeros between:
//
//	 0   8  magic: "HFPOINT\0", "HFCATLOG" or "HFCLOCK\0"
//	 8   2  version, 1
//	10   2  flags: 1 the payload is encrypted
//	12   4  length n of the payload; n + 40 is up to 64 MiB
//	16  16  encrypted: salt, random. Otherwise the first half of a BLAKE3 hash of the name's
//	        length (4 bytes), the repository's id, the name, and the payload
//	32   4  zero
//	36   4  CRC-32C of bytes 0–35 and the payload
//	40   n  payload: JSON
//
// The name is a point's id, "catalog" or "clock". The first copy that is right counts; its place
// is known from the other's header, or from the file's length. A file that is not exactly that copy twice is worn,
// which a verification tells and a repair mends.
//
// # Point, format 1
//
// points/ID.point, its id 32 hexadecimal digits, is an envelope with the fields of [Point] and
//
//	seq           the number of the change that lists it
//	prev          the chain's value before that change
//	committed     when, by the repository's clock
//	locked_until  the end of the lock that it got then; left out without one
//
// It is never changed. What happens to the point later is in the catalog.
//
// # Catalog, format 1
//
// points/catalog and points/catalog.copy are envelopes with
//
//	repository     its id
//	seq            how many changes there were
//	chain          64 hexadecimal digits, see below
//	clock          where the clock stood: time, boot (boot_id), uptime_ns
//	quarantine_ns  for which deleted points are kept
//	lost           why the catalog had to be made from the points' files; left out otherwise
//	points         of each: id, vm, time, hash (BLAKE3, of the payload of its file), seq (of the change that
//	               listed it), locked_until, deleted, purge_after, purged
//	since          the chain's value before the first of changes
//	changes        the last 1000, see [Change]
//
// The chain's value after a change is a BLAKE3 hash of the value before and the change as JSON, keyed if the
// repository is encrypted; it begins with the hash of 32 zeros and the repository's id. seq and chain
// together are the head: who notes it elsewhere can tell later that the repository was put back.
//
// The catalog is written whole at each change: twice, in both files, about 700 bytes a point
// and the length of its VM's name four times, and about 1 MB for 1000 changes. A purged point stays listed as
// purged until its file is gone for good.
//
// # Ids and keys
//
// The id of a chunk is the BLAKE3 hash of its plain bytes. That of a node is a
// keyed BLAKE3 hash, so that no chunk, whatever a guest writes into it, has the id
// of a node. In a plain repository the key for nodes is no secret.
//
// An encrypted repository has one random key of 32 bytes. repository.json holds it up to 64
// times, each encrypted as an age file for a passphrase or for a recipient. All
// others are derived from it with BLAKE3's derive_key: the keys of the id
// hashes, which then tell nothing of the content, a key for each segment, from its
// number and generation, and one for each file in points/, from its salt. Payloads are sealed with AES-256-GCM; the nonce of a
// record is its offset, its additional data are bytes 0–47 of its header; for a file in points/
// the nonce is zero and the additional data are the repository's id and the name. docs/security.md says what this
// protects and what not.
//
// # repository.json
//
// A JSON object of up to 1 MiB, without fields of other names:
//
//	format      1
//	id          32 hexadecimal digits
//	chunk_size  bytes
//	hash        "blake3"
//	created     time
//	revision    from 1, one more with each change
//	keys        up to 64: id (8 hexadecimal digits), kind ("passphrase" or "recipient"),
//	            label (up to 64 bytes, or none), created, recipient (of that
//	            kind: the public key, up to 4 KiB), age (up to 4 KiB)
//	mac         keyed BLAKE3 hash of the fields above
//	checksum    BLAKE3 hash of the fields above and of mac's bytes
//
// Without keys there is no mac. Both hashes cover the fields in this order, keys as their number
// and then the fields of each; each as text, behind its length in 4 bytes, little-endian; times as
// RFC 3339 in UTC without zeros at the end.
//
// repository.json.copy holds the same. A change is written to repository.json and then
// to the copy, each under a temporary name, with fsync, rename and fsync of the folder;
// only at creation the copy is first. So one of them is whole at any moment, and an opening takes the
// newest that is; one with keys goes before one without. It writes anew what is missing or
// older, and leaves what is damaged to a repair. The copy alone, without
// segments and points, is what a creation leaves that was stopped: no repository yet.
//
// # Durability
//
// A backup becomes durable in this order, each step complete before the next:
//
//	write, fsync      the segment's records
//	fsync             segments/, for a new segment's name
//	write             index entries
//	write, fsync      points/ID.point.tmp
//	rename, fsync     points/ID.point, points/
//	write, fsync      points/catalog.tmp
//	rename, fsync     points/catalog, points/
//	the same          points/catalog.copy
//
// The catalog's rename lists the point. A deletion, a lock and the like are a change of the catalog alone. A purge
// is one whose copy must be durable, too, before the point's file is removed, and that before anything is
// collected. After a failure the catalog is written again as it was, then the file of a point that
// was not committed is removed; until both succeed, nothing else is committed and nothing collected.
//
// A full segment is sealed in two steps: its records are synced, then its table of contents
// and footer are written and synced. So a table of contents that is right vouches for the
// records before it. A segment keeps one name for its life, and nothing is changed in
// it but its end: a copy that is made file by file while a backup runs has what
// was durable when it began.
//
// Index entries are never synced: after a loss of power the index is made anew.
// A crash leaves at most records that nobody references, which a collection takes.
// A failed write or sync ends the segment: what was durable before is
// kept, the rest is cut off, every session that may have put something into it
// fails, and new ones get a new segment. No sync is tried twice. The failed segment stays
// unsealed until the next opening; collections pass it over.
//
// # Opening
//
// The newest of the two catalogs counts. A point file that it does not list and that
// follows on its head (seq and prev) is a commit that was cut short after the file: it is whole,
// and is listed as the commit would have, so the chain comes out the same. Any other is a file that
// somebody put there, or back: it is no point, and is told of. A listed point whose file is missing, cannot
// be read or has another hash is withheld and told of, and collections wait. If neither catalog can be read,
// or there are points that are newer and do not follow on it, all points are listed; that the
// catalog was lost is told, and deletions and collections wait, until a repair. Opening writes none of this: the next change does.
//
// A repository.json that is not that of the segments is refused: another id, another
// repository key, or plain where they are encrypted.
//
// A segment of which the index has no summary is entered from its table of contents.
// One that has none, because its writer was stopped or its end is damaged, is cut behind
// its last whole record, sealed, and never appended to (a nonce would come twice). It is
// read from the disk and not from memory, which may show what a failed sync has
// lost. Names that were found are made durable: what is listed once stays, what is
// gone stays gone. An index entry counts only if its segment is live,
// has the same generation, and has as many records. So an index that is behind,
// ahead, older or gone is no danger: what does not count is stored anew, and a chunk
// that a point needs and the index lacks is looked for in the segments.
//
// Before BadgerDB sees the index it is read whole, as BadgerDB believes what its files say:
// index/STATUS, the list of tables in index/MANIFEST, every checksum of every table. The other files
// are removed. Whatever is not as it should be, the index is removed and made anew from
// the tables of contents. STATUS is a line "holdfast index 1 CRC", the CRC-32C of the rest in hexadecimal, and JSON: the id
// of the repository, and
//
//	while it is open    the kernel's boot_id, the device and the inode of index/
//	once it was closed  the id, level, size and checksum of each table
//
// So a loss of power, and copying an index that is being written, have it made anew; a kill
// leaves it as of its last table, and the segments since then are entered. What rots while the
// index is open fails the reads that meet it with ErrIndexDamaged, and STATUS is removed, that the next
// opening makes it anew. In the few bytes that BadgerDB believes before it compares a
// checksum, rot that a compaction meets ends the process; the next opening finds it.
//
// # Concurrency
//
// Everything but Close may be called at any time, from many goroutines. One process has a
// repository open at a time; Open and RebuildIndex refuse others with a [LockedError]. Who may run
// with whom, and what makes it safe:
//
//	              backup      reading    deletion   collection  verification  repair     keys
//	backup        1 claims    immutable  2 pins     3 marks     immutable     3 marks    4 apart
//	reading                   immutable  2 pins     2 pins      immutable     5 moves    4 apart
//	deletion                             6 mu       7 listing   2 pins        6 mu       4 apart
//	collection                                      8 refused   2 pins        8 refused  4 apart
//	verification                                                both read     5 moves    4 apart
//	repair                                                                    8 refused  4 apart
//	keys                                                                                 9 configMu
//
// The numbers:
//
//  1. A chunk that is being stored is claimed: another backup waits and shares it.
//  2. A pinned map is needed like a listed point's: an open disk reads on, a base is built upon and
//     a verification reads, though the point is deleted and purged.
//  3. A session's marks name every record that it stored or found stored, from its beginning, and
//     outlive it while a collection runs. A segment that is to go is condemned first, under the lock that
//     marks are set under: from then on finding a chunk there does not count, and it is stored anew.
//  4. Changes of keys write repository.json, and nothing else does once it is made.
//  5. A record is elsewhere, durably and in the index, before its segment goes. Who finds it gone
//     looks into the index again; who has the segment's file open reads on.
//  6. Points change under Repository.mu: deletion, undelete, locks, purge and Commit one after the other.
//  7. A collection purges first what is due. Then it lists the points once, those deleted and not
//     purged among them, so that an undelete finds all its chunks; what is deleted later is left to
//     the next. A point listed later rests on a session's marks.
//  8. One collection or repair at a time: ErrCollecting.
//  9. By themselves, under Repository.configMu.
//
// Reading is a restore, an export or a mount. RebuildIndex runs with nothing: it needs the lock of the
// repository.
//
// # Collection
//
// A collection takes a record only if no listed point, no point that can be undeleted, no pinned map
// and no session needs it:
//
//	mark        walk all maps; find what they name in the tables of contents: a bit a record
//	sweep       condemn a segment, copy out what is needed, make the copies durable
//	quarantine  take it out of the index and the live set; its file stays
//	confirm     walk all maps anew, and what the sessions put, and compare with the ids in quarantine
//	remove      unlink the files, fsync segments/
//
// The confirmation does not rest on the marks: it asks of every id that is named and lies in quarantine
// whether a segment that is live has it. If one has not, the program is wrong somewhere:
// the segments come back into the live set and the index, nothing is lost, and the collection fails with
// an internal error. It is run for all segments at once, as far as a quarantine of 4 Mi records
// (or a 64th of all, if that is more) reaches, and earlier where space is short. Segments whose tables of contents are
// damaged are passed over; a repair deals with them.
//
// A collection may be stopped at any moment, and loses the marking: what is in quarantine comes back
// as it ends, or, after a crash, at the next opening, and is found dead by the next collection. Of records
// that were copied out the copies count; after a crash those of one quarantine may be copied once more.
//
// Beside sessions it works a fifth of the time, in slices of some milliseconds, and holds no lock or claim
// while it rests. A thread of a lower priority would keep a lock, or the garbage collector of the runtime,
// waiting while others run.
//
// Lock order: appender.flushing, Repository.mu, appender.mu, claims.mu,
// segmentSet.mu, segment.opening, cache.mu, chunkCache.mu; the clock's comes last. prefetcher.mu is taken
// by itself, and so is Repository.configMu, by changes of keys; of the damaged chunks, saving before mu, which
// others may be held over. A claim is waited for with no lock held.
//
// A verification reads past the caches. What a collection moves before it was read is found, by
// another walk over the trees, at its new place. Of a bad chunk of which another segment has a good record it
// stores that anew, as a backup would: where several segments have a chunk, the latest counts, also in an index
// that is made anew.
//
// A commit, deletion, undeletion, lock or purge holds Repository.mu while it writes the catalog. A collection purges
// first and then keeps what all listed points need, the deleted ones among them.
//
// # Time
//
// Locks, and the time for which deleted points are kept, are measured with the repository's own clock
// (package steady): it began with the wall clock at creation, counts with the kernel's CLOCK_BOOTTIME,
// and never runs ahead of the time that really passed. From one boot to the next it goes on from where it was written down
// last: with each change, and when the repository is closed while something waits for it.
//
// # Immutable files
//
// Sealed segments and point files may carry the file system's immutable attribute, which somebody
// else sets and takes off (see PointFiles). A collection passes over such a segment before it copies
// anything out of it, and one that becomes immutable before it is removed is live again. A segment
// is closed for writing when it is sealed.
//
// A repair holds the lock that a collection holds, and treats a segment that it replaces as one
// does: condemned first, its good records durable and indexed elsewhere before its file
// moves to quarantine/. So it may be stopped anywhere, and run beside backups and reads.
//
// # Limits
//
// Chunks are 16 KiB to 4 MiB, disks up to 1 PiB, points up to 1024 disks. The catalog holds about
// 300,000 points: one of more than 60 MiB takes no more. Locks last up to 100 years, deleted points are kept up to 10.
// Memory does not grow with the repository but for about 150 bytes a segment (128 MiB of
// stored bytes), the points, one bit a chunk for each session and collection and two for a verification, 50 bytes a map
// node that a collection walks or a session puts, the ids of up to 1 Mi chunks that a session has put and no node lists,
// at most 64 MiB to mark and 32 MiB (a bit a chunk, if that is more) for the quarantine,
// and 32 bytes for each chunk that is known to be damaged. A verification lists up to 10,000 places and
// knows the reasons of up to 100,000 bad chunks; it counts the others, which are stored anew all the same.
// BadgerDB takes up to about 200 MiB; decoded chunks and nodes take Options.CacheSize, an eighth of the memory
// but at most 2 GiB, as disks are served; up to 256 chunks, an eighth of the cache at most, wait
// to be read ahead by up to 4 goroutines.
package blockstore
