# shellcheck shell=sh
# A guest attaches exports of the host's ports SCRATCH and IMAGE with nbd-client.
# SCRATCH serves an empty disk to write to, scratch, IMAGE a guest's disk, image.
# The first command that fails ends process 1, and with it the guest.
set -ex
modprobe -a virtio_net nbd
ip link set lo up
ip addr add 10.0.2.15/24 dev eth0
ip link set eth0 up

nbd-client -l 10.0.2.2 "$SCRATCH"
nbd-client 10.0.2.2 "$SCRATCH" /dev/nbd0 -N scratch
mkfs.ext4 -q /dev/nbd0
mount /dev/nbd0 /mnt
cp -a /bin /sbin /lib /mnt
sync
rm -r /mnt/bin /mnt/lib/modules
fstrim -v /mnt
(cd /mnt && find lib sbin -type f -exec sha256sum {} + >sums)
umount /mnt
e2fsck -f -n /dev/nbd0
nbd-client -d /dev/nbd0

# What was written is there after another connection.
nbd-client 10.0.2.2 "$SCRATCH" /dev/nbd0 -N scratch
mount -o ro /dev/nbd0 /mnt
(cd /mnt && sha256sum -c sums >/dev/null)
umount /mnt
nbd-client -d /dev/nbd0

nbd-client -l 10.0.2.2 "$IMAGE"
nbd-client 10.0.2.2 "$IMAGE" /dev/nbd1 -N image
if dd if=/dev/zero of=/dev/nbd1 count=1; then false; fi
mount -t ext4 -o ro /dev/nbd1p1 /mnt
(cd /mnt && find . -type f -exec sha256sum {} + | sort >/sums)
echo "FILES $(wc -l </sums) $(sha256sum </sums)"
umount /mnt
nbd-client -d /dev/nbd1
