#!/bin/busybox sh
# shellcheck shell=sh
# Process 1 of a guest's disk. It prints the sum of every file in /data, writes new
# files there and anew those that were made with the disk, old-000 to old-119, until
# poweroff or reboot is typed at the console; it prints the sums again and does as told.
#
# SYNCED and WRITTEN are a file's sum on the disk from now on, CHANGING names one whose
# content is not known from now on; FILE is the sum of one as it was read from the disk.
# The first command that fails ends process 1, and with it the guest.
set -e
[ -e /bin/sh ] || /bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t devtmpfs dev /dev
mount -t tmpfs run /run
cd /data

files() {
	echo 3 >/proc/sys/vm/drop_caches
	sha256sum -- * | sed 's/^/FILE /'
	echo "FILES end"
}

# changing NAME: stty returns when the line has left, so that a guest that loses its power
# now has said it.
changing() {
	echo "CHANGING $1"
	stty -echo
}

# overwrite NAME: new bytes for a file, past the guest's cache. The disk has them, but is
# not told to make them durable.
overwrite() {
	dd if=/dev/urandom of=/run/new bs="$(stat -c %s "$1")" count=1 2>/dev/null
	changing "$1"
	dd if=/run/new of="$1" bs=256k conv=notrunc oflag=direct 2>/dev/null
	echo "WRITTEN $(sha256sum </run/new | cut -d ' ' -f 1)  $1"
}

echo "BOOTED"
files
{ read -r line && echo "$line" >/run/end; } </dev/console &
boot=$(cut -d - -f 1 /proc/sys/kernel/random/boot_id)
round=0
while [ ! -s /run/end ]; do
	round=$((round + 1))
	for i in 1 2 3; do
		name=$boot-$round-$i
		dd if=/dev/urandom of="$name" bs=4k count=$(((round * 3 + i) * 7 % 64 + 1)) conv=fsync 2>/dev/null
		echo "SYNCED $(sha256sum "$name")"
	done
	# Blocks that were written before, and some that never were since the disk was made.
	overwrite "$boot-$round-1"
	overwrite "old-$(printf %03d $((round * 2 % 120)))"
	overwrite "old-$(printf %03d $((round * 2 % 120 + 1)))"
	changing "$boot-$round-3"
	rm "$boot-$round-3"
done
fstrim /
sync
files
mount -o remount,ro /
"$(cat /run/end)" -f
