#!/bin/sh
# Ways past the marks that need a kind of device that is not everywhere: each is refused, or detected and named.
# kernels: 6.12
# modes: watch
# limit: 300 s
SELF=$(realpath "$0")
. "$(dirname "$SELF")/lib.sh"

if [ -z "${VMRUN:-}" ]; then
    truncate -s 64M "$WORK/nvme.raw"
    in_vm --modules fuse,loop,dm-mod,vfat,nls_cp437,nls_iso8859-1,nls_ascii,nls_utf8,nd_pmem,nd_e820 \
        --disk 64M,bus=scsi --disk 64M --disk 256M --append 'memmap=64M!512M' \
        --qemu-arg=-drive --qemu-arg="file=$WORK/nvme.raw,if=none,id=nvme0,format=raw" --qemu-arg=-device --qemu-arg=nvme,drive=nvme0,serial=blktide
    exit
fi

told=""
# named VOLUME CHECK: the next backup reads everything, and says that it was this check.
named() {
    : >"$LOG.before"
    wc -l <"$LOG" >"$LOG.before"
    backup "$1" full
    tail -n +$(($(cat "$LOG.before") + 1)) "$LOG" | grep -q "\[$2" || fail "$2 is not named"
    backup "$1" incremental
    told="$told, $2"
}

# A command of our own to a SCSI disk, past the block layer: SG_IO with TEST UNIT READY, which moves no data.
sg_io() {
    python3 - "$1" <<'END'
import ctypes, fcntl, os, struct, sys
command = ctypes.create_string_buffer(bytes(6))
sense = ctypes.create_string_buffer(32)
# struct sg_io_hdr: 'S', no data, 6 bytes of command, 32 of sense.
header = struct.pack("@iiBBHIPPPIIiPBBBBHHiII", ord("S"), -1, 6, 32, 0, 0, 0, ctypes.addressof(command),
                     ctypes.addressof(sense), 20000, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
fcntl.ioctl(os.open(sys.argv[1], os.O_RDWR), 0x2285, header)
END
}

# The same to an NVMe namespace: a flush.
nvme_flush() {
    python3 - "$1" <<'END'
import fcntl, os, struct, sys
command = bytearray(struct.pack("@BBHIIIQQII6III", 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0))
fcntl.ioctl(os.open(sys.argv[1], os.O_RDWR), 0xC0484E43, command)
END
}

mkfs.ext4 -q /dev/vdb
mount /dev/vdb /mnt
instance /mnt
for disk in sda vda nvme0n1; do
    mkfs.ext4 -q -F "/dev/$disk"
    blktidectl volume add "$disk" --device "/dev/$disk" --mode watch --yes --quiet
    backup "$disk" full
    backup "$disk" incremental
done

sg_io /dev/sda
named sda passthrough
nvme_flush /dev/nvme0n1
named nvme0n1 passthrough
blktidectl detach nvme0n1 --yes --quiet

# refused DEVICE PATTERN: it is not attached, and this is said.
refused() {
    if blktidectl volume add other --device "$1" --mode watch --yes >/run/said 2>&1; then fail "$1 was attached"; fi
    grep -q "$2" /run/said || fail "$2 is not named: $(cat /run/said)"
}
modprobe null_blk nr_devices=1 gb=1 zoned=1 zone_size=64
until_ok 60 test -b /dev/nullb0
refused /dev/nullb0 'a zoned device'
until_ok 60 test -b /dev/pmem0
refused /dev/pmem0 '\[dax\]'

# A virtio disk is asked for its serial number by a command of that kind whenever somebody reads it, and takes none from anybody.
cat /sys/block/vda/serial >/dev/null
backup vda incremental

dmsetup create top --table "0 $(blockdev --getsz /dev/sda) linear /dev/sda 0"
blktidectl detach vda --yes --quiet
dmsetup create other --table "0 $(blockdev --getsz /dev/vda) linear /dev/vda 0"
if blktidectl attach vda >/run/said 2>&1; then fail "attached below a dm device"; fi
grep -q "\[holders\]" /run/said || fail "holders are not named: $(cat /run/said)"
dmsetup remove other
said=$(blktidectl backup sda --json) || true
grep -q "\[stacked" "$LOG" || fail "what is stacked is not named: $said"
[ "$(value kind)" != incremental ] || fail "believed below a dm device: $said"
dmsetup remove top

# A disk as a machine is started from: a partition that is frozen, and one of a kind that cannot be. Nothing is written to that one.
consistency() { [ "$(value consistency)" = "$1" ] || fail "wanted $1: $said"; }
blktidectl volume remove vda --yes --quiet
addpart /dev/vda 1 2048 81920
addpart /dev/vda 2 83968 40960
mkfs.ext4 -q -F /dev/vda1
mkfs.vfat -F 32 /dev/vda2 >/dev/null 2>&1
mkdir /srv/root /srv/esp
mount /dev/vda1 /srv/root
mount /dev/vda2 /srv/esp
blktidectl volume add boot --device /dev/vda --mode watch --yes --quiet
backup boot full
consistency instant
echo changed >/srv/esp/file
backup boot incremental
consistency instant
mount -o remount,ro /srv/esp
backup boot incremental
consistency frozen
umount /srv/esp
backup boot incremental
consistency frozen
restore boot@latest /run/boot.raw
cmp -i $((83968 * 512)):0 -n $((40960 * 512)) /run/boot.raw /dev/vda2 || fail "the partition that was not frozen is not in the image"
echo "figure: named: ${told#, }, stacked, holders; zoned, DAX: refused; a virtio disk's serial number is no reason; a disk with a partition that cannot be frozen: instant"
