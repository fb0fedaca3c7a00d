#!/bin/sh
# Devices without completion events, and slow ones: dm-linear, and dm-delay with generations that change while writes are in flight.
# kernels: 6.1
# modes: watch
# limit: 600 s
SELF=$(realpath "$0")
. "$(dirname "$SELF")/lib.sh"

if [ -z "${VMRUN:-}" ]; then
    in_vm --modules fuse,loop,dm-mod,dm-delay --disk 128M --disk 1G --disk 128M
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
echo "figure: $one; $(chain delay /dev/mapper/delay /dev/vdc 10)"
