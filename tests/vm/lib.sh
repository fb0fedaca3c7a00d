# Steps that the VM tests have in common; read by `. lib.sh`, in the guest and on the host.
# Set by `cargo xtask vm`: RUN (vmrun), KERNEL, MODE, BIN (the programs' folder), WORK (a folder that goes away), LONG.
set -eu
export PATH="${VMRUN:+$BIN:}/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" LC_ALL=C

fail() {
    echo "FAIL: $*" >&2
    [ ! -e "${LOG:-}" ] || tail -n 40 "$LOG" >&2
    exit 1
}

# Told when the test fails.
say() { echo "$(cut -d' ' -f1 /proc/uptime) $*" >&2; }

# until_ok SECONDS COMMAND...: repeats it until it succeeds.
until_ok() {
    end=$(($(date +%s) + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ "$(date +%s)" -lt "$end" ] || fail "in vain: $*"
        sleep 0.1
    done
}

# What follows in the guest: the same script, with its environment, on a kernel of its own. Arguments: vmrun's.
in_vm() {
    "$RUN" --kernel "$KERNEL" --fail-on-warn --timeout "${LIMIT:-600}" --env SELF="$SELF" --env BIN="$BIN" \
        --env MODE="${MODE:-}" --env LONG="${LONG:-}" --env PHASE="${PHASE:-}" "$@" -- 'exec sh "$HOSTROOT$SELF"'
}

# An instance of blktide with all its files in folder $1; its daemon answers when this comes back.
instance() {
    # An emulated machine copies slowly: a freeze may take longer than a server would like.
    more=""
    [ "$MODE" != watch ] || more='over_budget = "longer"'
    mkdir -p "$1/volumes.d" "$1/repositories.d" "$1/state" "$1/save"
    cat >"$1/blktide.toml" <<END
runtime_dir = "/run/blktide"
state_dir = "$1/state"
device_dir = "/dev/blktide"
volumes_dir = "$1/volumes.d"
repositories_dir = "$1/repositories.d"
[defaults]
repository = "main"
$more
[defaults.save_area]
path = "$1/save"
min_free = "0"
END
    export BLKTIDE_CONFIG="$1/blktide.toml" LOG="$1/blktided.log"
    mkdir -p /run/blktide
    blktided --config "$BLKTIDE_CONFIG" >>"$LOG" 2>&1 &
    daemon=$!
    until_ok 120 answers
    blktidectl repo init main "$1/repo" --quiet
}

answers() {
    blktidectl status || [ $? -eq 3 ]
}

# backup VOLUME KIND: makes an image, and fails unless it is of that kind; its figures are in $read_kib and $took.
backup() {
    say "backup $1"
    said=$(blktidectl backup "$1" --json) || fail "backup $1: $said $(blktidectl status --json)"
    [ "$(value kind)" = "$2" ] || fail "wanted a $2 image: $said $(blktidectl status --json)"
    read_kib=$(($(value read_bytes) >> 10))
    took=$(value seconds | cut -c1-4)
}

# The first value of a key in the JSON document $said.
value() { printf '%s' "$said" | tr -d ' \n' | sed -n "s/^.*[{,]\"$1\":\"\{0,1\}\([^\",}]*\).*$/\1/p"; }

# restore IMAGE TARGET
restore() {
    say "restore $1"
    begun=$(cut -d. -f1 /proc/uptime)
    blktidectl restore "$1" "$2" --yes --overwrite --quiet || fail "restore $1"
    took=$(($(cut -d. -f1 /proc/uptime) - begun))
}

# add_volume NAME DEVICE FOLDER: tracked and mounted, in the order that the mode asks for.
add_volume() {
    if [ "$MODE" = fuse ]; then
        blktidectl volume add "$1" --device "$2" --mode fuse --yes --quiet
        mount -o noatime "/dev/blktide/$1" "$3"
    else
        [ "$3" = / ] || mount -o noatime "$2" "$3"
        blktidectl volume add "$1" --device "$3" --mode "$MODE" --yes --quiet
    fi
}

# still FOLDER: nothing more is written there. Where the volume cannot be frozen, it is unmounted.
still() {
    if [ "$MODE" = fuse ]; then umount "$1"; else sync; fi
}

# equal_but_journal DISK RESTORED BYTES: they differ in what a still file system writes by itself, and nowhere else: superblock and journal.
# Leaves the blocks in the file `differ` of the working folder.
equal_but_journal() {
    code=0
    cmp -l -n "$3" "$1" "$2" >differ.bytes || code=$?
    [ $code -le 1 ] || fail "cmp $1 $2"
    awk '{ b = int(($1 - 1) / 4096); if (b != last || NR == 1) print b; last = b }' differ.bytes >differ
    rm differ.bytes
    blocks=$(grep -vx 0 differ | head -n 10000 | tr '\n' ' ')
    debugfs -R "icheck $blocks" "$1" 2>/dev/null | tail -n +2 >differ.inodes
    [ "$(wc -l <differ.inodes)" -eq "$(grep -cvx 0 differ)" ] || fail "$(wc -l <differ) blocks differ, too many to look at"
    foreign=$(awk '$2 != 8' differ.inodes)
    [ -z "$foreign" ] || fail "blocks (and inodes) that differ from the volume: $foreign"
}

# chain NAME DEVICE TARGET COUNT: an ext4 on the device, written by fio; that many incrementals meanwhile, each with a
# swap of generations in flight; then a still one, which must equal the device: a block that any of them missed differs.
chain() {
    say "chain $1"
    mkfs.ext4 -q -F -b 4096 -E lazy_itable_init=0 "$2"
    mkdir -p "/srv/$1"
    add_volume "$1" "$2" "/srv/$1"
    fio --name="$1" --filename="/srv/$1/file" --size=8M --rw=randwrite --bs=4k --iodepth=16 --rate_iops=100 --ioengine=libaio --direct=1 \
        --time_based --runtime=3600 --output="/run/$1.fio" >/dev/null 2>&1 &
    writing=$!
    until_ok 120 test -s "/srv/$1/file"
    backup "$1" full
    i=0
    sum=0
    while [ $i -lt "$4" ]; do
        backup "$1" incremental
        sum=$((sum + read_kib))
        i=$((i + 1))
    done
    [ $sum -gt 0 ] || fail "nothing was written meanwhile"
    say "end of fio"
    kill -INT $writing
    wait $writing || true
    grep -q 'err= 0' "/run/$1.fio" || fail "fio: $(cat "/run/$1.fio")"
    still "/srv/$1"
    backup "$1" incremental
    restore "$1@latest" "$3"
    (cd /run && equal_but_journal "$2" "$3" "$(blockdev --getsize64 "$2")")
    e2fsck -fn "$3" >/run/fsck 2>&1 || fail "e2fsck $1: $(cat /run/fsck)"
    echo "$1: $4 incrementals under fio, $sum KiB, the still one equal but $(wc -l </run/differ) blocks"
    remove_volume "$1"
}

remove_volume() {
    ! mountpoint -q "/srv/$1" || umount "/srv/$1"
    blktidectl detach "$1" --yes --quiet
    blktidectl volume remove "$1" --yes --quiet
}
