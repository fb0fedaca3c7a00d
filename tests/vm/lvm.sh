#!/bin/sh
# Logical volumes, linear and thin, tracked and backed up while fio writes; no snapshot is left behind.
# kernels: 6.12
# modes: watch
# limit: 600 s
SELF=$(realpath "$0")
. "$(dirname "$SELF")/lib.sh"

if [ -z "${VMRUN:-}" ]; then
    in_vm --modules fuse,loop,dm-mod,dm-snapshot,dm-thin-pool --disk 1500M --disk 1G --disk 256M
    exit
fi

# No udev here: LVM makes the nodes itself, and waits for nobody.
lvm_quiet() { "$@" --config 'activation { udev_sync=0 udev_rules=0 } devices { obtain_device_list_from_udev=0 }' >/dev/null; }

lvm_quiet pvcreate -q /dev/vda
lvm_quiet vgcreate -q group /dev/vda
lvm_quiet lvcreate -q -y -n linear -L 128M group
lvm_quiet lvcreate -q -y --type thin-pool -n pool -L 256M group
lvm_quiet lvcreate -q -y -n thin -V 128M --thinpool pool group
mkfs.ext4 -q /dev/vdb
mount /dev/vdb /mnt
instance /mnt
lvs=$(lvs --noheadings -o lv_name group | sort)
one=$(chain linear /dev/group/linear /dev/vdc 3)
echo "figure: $one; $(chain thin /dev/group/thin /dev/vdc 3)"
[ "$(lvs --noheadings -o lv_name group | sort)" = "$lvs" ] || fail "left behind: $(lvs group)"
