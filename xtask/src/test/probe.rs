//! What this machine can run: each word of a test's `needs` line, tried.

use std::fs::{self, OpenOptions};
use std::path::Path;
use std::process::Command;

use crate::packages::{have, root};

/// All words that a `needs` line may have.
pub const WORDS: &[&str] = &[
    "root", "loop", "fuse", "bpf", "ext4", "xfs", "btrfs", "fio", "memcg", "blkio", "zram", "git",
    "python3", "sqlite3", "systemd", "space",
];

/// Why `need` is not to be had here; `None` if it is.
pub fn lacks(need: &str) -> Option<String> {
    match need {
        "root" => reason(root(), "not root"),
        "loop" => reason(
            opens("/dev/loop-control"),
            "no loop devices (/dev/loop-control)",
        ),
        "fuse" => reason(opens("/dev/fuse"), "no FUSE (/dev/fuse)"),
        "bpf" => marker(),
        "ext4" => program("mkfs.ext4")
            .or_else(|| program("e2fsck"))
            .or_else(|| file_system("ext4")),
        "xfs" => program("mkfs.xfs")
            .or_else(|| program("xfs_repair"))
            .or_else(|| file_system("xfs")),
        "btrfs" => program("mkfs.btrfs")
            .or_else(|| program("btrfs"))
            .or_else(|| file_system("btrfs")),
        "blkio" => reason(throttling(), "no cgroup that throttles block devices"),
        "zram" => reason(free_zram(), "no /dev/zram0 that nobody uses"),
        "memcg" => reason(memory_cgroup(), "no memory cgroup that can be written"),
        "systemd" => reason(
            Path::new("/run/systemd/system").is_dir(),
            "systemd does not run here",
        ),
        "space" => reason(
            free_gib("/var/tmp") >= 8,
            "less than 8 GiB free in /var/tmp",
        ),
        other => program(other),
    }
}

fn reason(there: bool, why: &str) -> Option<String> {
    (!there).then(|| why.to_owned())
}

fn program(name: &str) -> Option<String> {
    reason(have(name), &format!("no program {name}"))
}

fn opens(path: &str) -> bool {
    OpenOptions::new().read(true).write(true).open(path).is_ok()
}

fn file_system(name: &str) -> Option<String> {
    let known = || {
        fs::read_to_string("/proc/filesystems")
            .is_ok_and(|t| t.lines().any(|l| l.trim_end().ends_with(name)))
    };
    if known() {
        return None;
    }
    // A module that is loaded on mount: load it now, or it is not to be had.
    drop(Command::new("modprobe").arg(name).output());
    reason(known(), &format!("the kernel has no {name}"))
}

/// What mode watch needs of the kernel, as far as can be seen without loading a program.
fn marker() -> Option<String> {
    let locked = fs::read_to_string("/sys/kernel/security/lockdown");
    let locked = locked.is_ok_and(|text| text.contains("[confidentiality]"));
    reason(root(), "not root")
        .or_else(|| {
            let known = Path::new("/sys/kernel/btf/vmlinux").exists();
            reason(
                known,
                "the kernel does not describe its structures (/sys/kernel/btf/vmlinux)",
            )
        })
        .or_else(|| file_system("bpf"))
        .or_else(|| reason(!locked, "the kernel is locked down: confidentiality"))
}

fn throttling() -> bool {
    let first = Path::new("/sys/fs/cgroup/blkio/blkio.throttle.write_iops_device").exists();
    let second = fs::read_to_string("/sys/fs/cgroup/cgroup.subtree_control")
        .is_ok_and(|t| t.split_whitespace().any(|word| word == "io"));
    root() && (first || second)
}

fn free_zram() -> bool {
    let size = || fs::read_to_string("/sys/block/zram0/disksize");
    if size().is_err() {
        drop(Command::new("modprobe").arg("zram").output());
    }
    root() && size().is_ok_and(|text| text.trim() == "0")
}

fn memory_cgroup() -> bool {
    let version_one = Path::new("/sys/fs/cgroup/memory/memory.limit_in_bytes").exists()
        || Path::new("/sys/fs/cgroup/memory/tasks").exists();
    let version_two =
        fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").is_ok_and(|t| t.contains("memory"));
    root() && (version_one || version_two)
}

fn free_gib(folder: &str) -> u64 {
    let out = Command::new("df")
        .args(["--output=avail", "-BG", folder])
        .output();
    let text = out
        .map(|o| String::from_utf8_lossy(&o.stdout).into_owned())
        .unwrap_or_default();
    text.lines()
        .last()
        .and_then(|l| l.trim().trim_end_matches('G').parse().ok())
        .unwrap_or(0)
}
