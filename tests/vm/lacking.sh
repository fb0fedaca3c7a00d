#!/bin/sh
# What mode watch needs and a machine may lack: `doctor` and `volume add` name it, and nothing is attached. A kernel that is
# locked down lacks nothing: the programs call no helper that reads the kernel's memory.
# kernels: 6.1 6.12
# modes: watch
# limit: 300 s
SELF=$(realpath "$0")
. "$(dirname "$SELF")/lib.sh"

if [ -z "${VMRUN:-}" ]; then
    in_vm --append "lsm=lockdown lockdown=confidentiality" --disk 64M --disk 256M
    exit
fi

# A daemon with less: $1 is what is gone, $2 a pattern for the words to come, the rest the command that takes it away.
told=""
lacks() {
    what=$1
    word=$2
    shift 2
    say "without $what"
    "$@" blktidectl doctor >/run/said 2>&1 || true
    grep -qi -- "$word" /run/said || fail "doctor does not name $what: $(cat /run/said)"
    daemon_under "$@"
    if blktidectl volume add data --device /srv --mode watch --yes >/run/said 2>&1; then fail "attached without $what"; fi
    grep -qi -- "$word" /run/said || fail "volume add does not name $what: $(cat /run/said)"
    told="$told, $what"
}

daemon_under() {
    kill -TERM "$daemon"
    wait "$daemon" || true
    rm -f /run/blktide/blktide.sock
    "$@" blktided --config "$BLKTIDE_CONFIG" >>"$LOG" 2>&1 &
    daemon=$!
    until_ok 120 answers
}

mkfs.ext4 -q /dev/vda
mount /dev/vda /srv
mkfs.ext4 -q /dev/vdb
mount /dev/vdb /mnt
instance /mnt

# The loader reads the kernel's types there.
mkdir /run/empty
mount --bind /run/empty /sys/kernel/btf
lacks BTF BTF env
umount /sys/kernel/btf

umount /sys/fs/bpf
lacks "bpffs" "BPF file system\|/sys/fs/bpf" setpriv --bounding-set -sys_admin
lacks "rights" "CAP_BPF\|not load programs" setpriv --bounding-set -sys_admin,-bpf,-perfmon

# With nothing taken away it works, locked down as it is; what was not mounted gets mounted.
daemon_under env
blktidectl volume add data --device /srv --mode watch --yes --quiet
mountpoint -q /sys/fs/bpf || fail "no bpffs"
echo "figure: named: ${told#, }; attached under lockdown=confidentiality"
