#!/bin/sh
# Devices without completion events, and slow ones: dm-linear, dm-delay with generations that change while writes are in flight, and md
# with partitions, one of which no freeze reaches.
# kernels: 6.1
# modes: watch
# limit: 600 s
SELF=$(realpath "$0")
. "$(dirname "$SELF")/lib.sh"

if [ -z "${VMRUN:-}" ]; then
    in_vm --modules fuse,loop,dm-mod,dm-delay,raid0 --disk 128M --disk 1G --disk 128M
    exit
fi

# Linux 6.1 does not count the sectors of dm devices unless it is told to, and mode watch refuses to be without a count.
counted() {
    echo 1 > "/sys/class/block/dm-$(dmsetup info -c --noheadings -o minor "$1" | tr -d ' ')/queue/iostats"
}

mkfs.ext4 -q /dev/vdb
mount /dev/vdb /mnt
instance /mnt
size=$(blockdev --getsz /dev/vda)
dmsetup create linear --table "0 $size linear /dev/vda 0"
counted linear
one=$(chain linear /dev/mapper/linear /dev/vdc 5)
dmsetup remove linear
# Reads at once, writes after 40 ms.
dmsetup create delay --table "0 $size delay /dev/vda 0 0 /dev/vda 0 40"
counted delay
two=$(chain delay /dev/mapper/delay /dev/vdc 10)

# A whole disk with a mounted partition and one that is written past every file system. It tells nobody when a write is done, and counts
# each partition apart: no image can be believed while that goes on, and none is made.
mdadm --quiet --build /dev/md0 --level=0 --raid-devices=1 --force /dev/mapper/delay
half=$((size / 2048 * 1024))
addpart /dev/md0 1 2048 "$half"
addpart /dev/md0 2 $((half + 2048)) $((size - half - 4096))
mkfs.ext4 -q -F -b 4096 -E lazy_itable_init=0 /dev/md0p1
mkdir /srv/md
mount /dev/md0p1 /srv/md
blktidectl volume add md --device /dev/md0 --mode watch --yes --quiet
backup md full
dd if=/dev/urandom of=/dev/md0p2 bs=4k count=100000 oflag=direct 2>/dev/null &
writing=$!
if said=$(blktidectl backup md --json 2>&1); then fail "an image while md0p2 is written: $said"; fi
echo "$said" | grep -q "no write is under way" || fail "not for that: $said"
kill $writing
wait $writing || true
echo changed >/srv/md/file
backup md incremental
still /srv/md
backup md incremental
restore md@latest /dev/vdc
umount /srv/md
dd if=/dev/md0 of=/run/now bs=1M iflag=direct skip=$((half / 2048 + 1)) status=none
dd if=/dev/vdc of=/run/then bs=1M iflag=direct skip=$((half / 2048 + 1)) count=$((size / 2048 - half / 2048 - 1)) status=none
cmp -n "$(stat -c %s /run/then)" /run/now /run/then || fail "what was written to md0p2 is not in the image"
echo "figure: $one; $two; a partition of md that is written past all file systems: refused, then whole"
