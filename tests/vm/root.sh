#!/bin/sh
# The root of a running system: backup, change, incremental, restore; the restored disk boots, and holds what was there.
# kernels: 6.1 6.12
# modes: watch
# limit: 900 s
#
#   disks:  a system ── boots, is written to, backed up ──▶ repository ──▶ target: fsck, boots, digests, the writer's state
#                                                               └────────▶ quiet:  equals the system's disk, block by block
#
# In mode fuse, which cannot have a mounted root, the volume is a second copy of the system's disk.
SELF=$(realpath "$0")
. "${HOSTROOT:-}$(dirname "${SELF#"${HOSTROOT:-}"}")/lib.sh"

SLOTS=128

# Numbered records: each is written around the cache into its slot, then a line of the log through the cache.
writer() {
    exec 9>>"$1/log"
    n=0
    while [ ! -e /run/stop ]; do
        n=$((n + 1))
        printf '%4095d\n' $n |
            dd bs=4096 iflag=fullblock oflag=direct conv=notrunc seek=$((n % SLOTS)) of="$1/slots" status=none
        printf '%015d\n' $n >&9
    done
}

# Files as somebody changes them: new, longer, overwritten in the middle, with a hole, shorter, moved, gone.
change() {
    for f in $(find "$1/usr/share" "$1/etc" -xdev -type f -size -40k | sort | head -n 60); do echo "changed" >>"$f"; done
    i=0
    while [ $i -lt 100 ]; do
        head -c $((i * 300)) /dev/urandom >"$1/var/own/new$i"
        i=$((i + 1))
    done
    dd if=/dev/urandom of="$1/var/own/big" bs=4k count=1 seek=300 conv=notrunc status=none
    fallocate -p -o 1M -l 256K "$1/var/own/big"
    truncate -s 100000 "$1/var/own/short"
    mv "$1/var/own/old" "$1/var/own/moved"
    ln "$1/var/own/moved" "$1/var/own/linked"
    ln -s moved "$1/var/own/pointer"
    rm -r "$1/var/own/gone"
}

# Digests and names of all that the writer leaves alone, as seen below $1, into the folder $2.
record() (
    cd "$1/"
    set -- "$2" -xdev -mindepth 2 ! -path './var/load*' ! -path './usr/lib/modules/*' ! -path './.vmrun/*' \
        ! -path './dev/*' ! -path './run/*' ! -path './tmp/*'
    out=$1
    shift
    find . "$@" -type f -exec md5sum {} + | sort >"$out/sums"
    find . "$@" -type d -printf '%p %m %U:%G\n' -o "$@" ! -type d -printf '%p %y %m %U:%G %s %n %l\n' | sort >"$out/names"
)

live() {
    install -m 755 "$HOSTROOT$BIN/blktided" "$HOSTROOT$BIN/blktidectl" /usr/local/sbin/
    mount /dev/vdb /mnt
    instance /mnt
    if [ "$MODE" = fuse ]; then
        top=/srv
        add_volume root /dev/vde $top
    else
        top=
        add_volume root /dev/vda /
    fi
    mkdir -p $top/var/own/gone $top/var/load
    for f in big short old gone/1 gone/2; do head -c 2M /dev/urandom >$top/var/own/$f; done
    writer $top/var/load &
    writing=$!
    until_ok 60 test -s $top/var/load/log
    backup root full
    full="full $((read_kib >> 10)) MiB in $took s"
    change "$top"
    mkdir -p /mnt/seen
    record "$top" /mnt/seen
    tail -n 1 $top/var/load/log >/mnt/seen/before
    backup root incremental
    under="incremental under writes $read_kib KiB in $took s"
    tail -n 1 $top/var/load/log >/mnt/seen/after
    touch /run/stop
    wait $writing
    restore root@2 /dev/vdc
    under="$under, restored in $took s"
    still $top
    backup root incremental
    restore root@3 /dev/vdd
    [ "$MODE" != fuse ] || blktidectl detach root --yes --quiet
    echo "$full; $under; when quiet $read_kib KiB"
    kill -TERM $daemon
    wait $daemon
    umount /mnt
}

restored() {
    mount -o ro /dev/vdb /mnt
    mkdir /run/now
    record "" /run/now
    cmp /mnt/seen/names /run/now/names || fail "names: $(diff /mnt/seen/names /run/now/names | head -n 20)"
    cmp /mnt/seen/sums /run/now/sums || fail "files: $(diff /mnt/seen/sums /run/now/sums | head -n 20)"
    # The slots are the state after one of the writer's numbers, which lies between what was seen before and after.
    tr -d ' ' </var/load/slots | awk -v slots=$SLOTS -v log_last="$(tail -n 1 /var/load/log)" \
        -v before="$(cat /mnt/seen/before)" -v after="$(cat /mnt/seen/after)" '
        { slot[NR - 1] = $1 + 0; if ($1 + 0 > last) last = $1 + 0 }
        END {
            for (i = 0; i < slots; i++) {
                wanted = last - (last - i + slots) % slots
                if (wanted > 0 && slot[i] != wanted) { print "slot " i " holds " slot[i] ", not " wanted; bad = 1 }
            }
            if (last < before + 0 || last > after + 1 || log_last + 0 > last) bad = 1
            printf "boots; '"$(wc -l </mnt/seen/sums)"' files equal; the state after write %d of the writer (asked for at %d)\n", last, before
            exit bad
        }' || fail "not a state of the writer"
}

host() {
    cd "$WORK"
    "$RUN" --kernel "$KERNEL" --make-system system
    [ "$MODE" != fuse ] || cp --sparse=always system volume
    truncate -s 1G repository
    mkfs.ext4 -q -F -E lazy_itable_init=0 repository
    truncate -s 640M target quiet
    [ "$MODE" = fuse ] && volume=volume || volume=system
    live=$(PHASE=live in_vm --boot --modules fuse,loop --disk system --disk repository --disk target --disk quiet \
        $([ "$MODE" != fuse ] || echo --disk volume))
    equal_but_journal "$volume" quiet "$(stat -c %s quiet)"
    if [ "$MODE" = fuse ]; then # not frozen at its instant: the journal is replayed first, on a copy
        cp --sparse=always target checked
        e2fsck -fp checked >/dev/null || [ $? -eq 1 ] || fail "e2fsck -fp"
    else
        ln target checked
    fi
    e2fsck -fn checked >fsck.log 2>&1 || fail "e2fsck: $(cat fsck.log)"
    e2fsck -fn quiet >fsck.log 2>&1 || fail "e2fsck: $(cat fsck.log)"
    restored=$(PHASE=restored in_vm --boot --disk target --disk repository)
    echo "figure: $live; e2fsck clean; $(wc -l <differ) blocks differ when quiet, of superblock and journal only; $restored"
}

case ${PHASE:-} in
live | restored) $PHASE ;;
*) host ;;
esac
