//! Programs of other people that we need, and the Debian packages that hold them.

use anyhow::{Result, bail, ensure};
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::Command;

/// A program and its Debian package.
pub type Need = (&'static str, &'static str);

/// What the demo needs.
pub const DEMO: &[Need] = &[
    ("mkfs.ext4", "e2fsprogs"),
    ("e2fsck", "e2fsprogs"),
    ("mount", "mount"),
    ("losetup", "mount"),
];
/// What the tests use where it is to be had.
pub const TEST: &[Need] = &[
    ("mkfs.ext4", "e2fsprogs"),
    ("e2fsck", "e2fsprogs"),
    ("mkfs.xfs", "xfsprogs"),
    ("xfs_repair", "xfsprogs"),
    ("mkfs.btrfs", "btrfs-progs"),
    ("btrfs", "btrfs-progs"),
    ("mount", "mount"),
    ("losetup", "mount"),
    ("swapon", "mount"),
    ("addpart", "util-linux"),
    ("blkdiscard", "util-linux"),
    ("fallocate", "util-linux"),
    ("fsfreeze", "util-linux"),
    ("fstrim", "util-linux"),
    ("sqlite3", "sqlite3"),
    ("git", "git"),
    ("fio", "fio"),
    ("cmp", "diffutils"),
    ("python3", "python3"),
    ("kill", "procps"),
    ("clang", "clang"),
    ("llvm-strip", "llvm"),
];

/// What the tests in virtual machines use.
const VM: &[Need] = &[
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("busybox", "busybox-static"),
    ("depmod", "kmod"),
    ("zstd", "zstd"),
    ("lz4", "lz4"),
    ("mmdebstrap", "mmdebstrap"),
    ("extlinux", "extlinux"),
    ("debugfs", "e2fsprogs"),
    ("python3", "python3"),
    ("fio", "fio"),
    ("dmsetup", "dmsetup"),
    ("lvcreate", "lvm2"),
    ("thin_check", "thin-provisioning-tools"),
    ("mdadm", "mdadm"),
    ("mkfs.vfat", "dosfstools"),
];

/// What the tests in virtual machines use. Debian 12 has virtiofsd in a package of QEMU's.
pub fn vm() -> Vec<Need> {
    let own = Command::new("apt-cache")
        .args(["show", "virtiofsd"])
        .output();
    let package = if own.is_ok_and(|o| !o.stdout.is_empty()) {
        "virtiofsd"
    } else {
        "qemu-system-common"
    };
    VM.iter().copied().chain([("virtiofsd", package)]).collect()
}

/// Whether a program is there.
pub fn have(program: &str) -> bool {
    let path = std::env::var("PATH").unwrap_or_default();
    path.split(':')
        .chain(["/usr/sbin", "/sbin", "/usr/libexec", "/usr/lib/qemu"])
        .any(|folder| Path::new(folder).join(program).is_file())
}

/// Whether we are root.
pub fn root() -> bool {
    std::fs::read_to_string("/proc/self/status")
        .is_ok_and(|text| text.lines().any(|l| l.starts_with("Uid:\t0\t")))
}

/// Packages of `needs` whose programs are missing, each once.
fn missing(needs: &[Need]) -> Vec<&'static str> {
    let mut out: Vec<&str> = Vec::new();
    for (program, package) in needs {
        if !have(program) && !out.contains(package) {
            out.push(package);
        }
    }
    out
}

/// Makes sure that `needs` are there; as root installs them, after asking unless `install` answers.
pub fn ensure(needs: &[Need], install: bool) -> Result<()> {
    let packages = missing(needs);
    if packages.is_empty() {
        return Ok(());
    }
    let list = packages.join(" ");
    let how = format!("apt-get install {list}");
    if !root() || !have("apt-get") {
        bail!("needed and not installed: {list}. On Debian, as root: {how}");
    }
    if !install && !asked(&format!("Install the Debian packages {list} now? [y/N] ")) {
        bail!("needed and not installed: {list}. Answer yes, pass --install, or: {how}");
    }
    apt(&["update", "-q"])?;
    let mut words = vec!["install", "-q", "-y", "--no-install-recommends"];
    words.extend(packages);
    apt(&words)
}

fn apt(words: &[&str]) -> Result<()> {
    let status = Command::new("apt-get")
        .args(words)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(std::process::Stdio::null())
        .status()?;
    ensure!(
        status.success(),
        "apt-get {} failed: {status}",
        words.join(" ")
    );
    Ok(())
}

fn asked(question: &str) -> bool {
    let input = std::io::stdin();
    if !input.is_terminal() {
        return false;
    }
    print!("{question}");
    let mut answer = String::new();
    std::io::stdout().flush().is_ok()
        && input.read_line(&mut answer).is_ok()
        && matches!(answer.trim(), "y" | "Y" | "yes")
}
