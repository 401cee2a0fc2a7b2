# shellcheck shell=sh
# A guest checks the file system of its disk and starts what is installed there.
# The first command that fails ends process 1, and with it the guest.
set -e
echo "FSCK begins"
# 1: something was mended, the replay of the journal for one
e2fsck -f -p /dev/vda || [ $? = 1 ]
e2fsck -f -n /dev/vda
echo "FSCK ends"
mount -t ext4 -o discard /dev/vda /mnt
umount /proc /sys /dev
exec switch_root /mnt /sbin/init
