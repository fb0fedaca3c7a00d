//! Who has a file or a device open, as `/proc` has it.

use super::{BlockDevice, names_in, read_trimmed};
use crate::Result;
use crate::error::SysError;
use crate::mounts::{self, DeviceNumber};
use std::collections::HashSet;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// A process that has something open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opener {
    /// Its number; 0: it is the kernel itself.
    pub pid: i32,
    /// Its name, as the kernel has it.
    pub name: String,
}

impl std::fmt::Display for Opener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.pid {
            0 => f.write_str(&self.name),
            pid => write!(f, "{} ({pid})", self.name),
        }
    }
}

/// Processes that have the file or device at `path` open (a file: under the same last name).
pub fn openers_of(path: &Path) -> Result<Vec<Opener>> {
    let wanted = std::fs::metadata(path).map_err(|e| SysError::call("stat", path, e))?;
    if wanted.file_type().is_block_device() {
        return BlockDevice::at(path)?.openers();
    }
    let id = (wanted.dev(), wanted.ino());
    openers(|fd| {
        leads_to_name_of(fd, path) && std::fs::metadata(fd).is_ok_and(|m| (m.dev(), m.ino()) == id)
    })
}

/// Those that can write to it by what they have open. What the kernel itself has open (a loop device) is not told.
pub fn writers_of(path: &Path) -> Result<Vec<Opener>> {
    let wanted = std::fs::metadata(path).map_err(|e| SysError::call("stat", path, e))?;
    let id = (wanted.dev(), wanted.ino());
    // A hard link has another name, and the same inode. Only what may be it is asked: see `openers`.
    let inode = wanted.ino().to_string();
    openers(|fd| {
        let may_be =
            leads_to_name_of(fd, path) || fact_of(fd, "ino:").is_some_and(|ino| ino == inode);
        may_be
            && std::fs::metadata(fd).is_ok_and(|m| (m.dev(), m.ino()) == id)
            && is_for_writing(fd)
    })
}

fn leads_to_name_of(fd: &Path, path: &Path) -> bool {
    std::fs::read_link(fd).is_ok_and(|to| to.file_name() == path.file_name())
}

/// Whether a descriptor, named below `/proc/PID/fd`, can be written to; in doubt it can.
fn is_for_writing(fd: &Path) -> bool {
    let flags = fact_of(fd, "flags:").and_then(|text| u32::from_str_radix(&text, 8).ok());
    flags.is_none_or(|flags| flags & 3 != 0)
}

/// What the kernel says of a descriptor, named below `/proc/PID/fd`, without asking its file system (`ino:` since 5.14).
fn fact_of(fd: &Path, name: &str) -> Option<String> {
    let (process, number) = fd.parent().and_then(Path::parent).zip(fd.file_name())?;
    let text = std::fs::read_to_string(process.join("fdinfo").join(number)).ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(value.trim().to_owned())
}

/// File systems that answer out of this machine's memory and disks: asking them of a file waits for nobody.
const LOCAL: [&str; 14] = [
    "devtmpfs", "tmpfs", "ramfs", "rootfs", "ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs",
    "bcachefs", "zfs", "squashfs", "erofs",
];

/// Where nodes of devices may lie, and what those of some devices are called.
struct Nodes {
    /// Numbers of mounts, in whatever namespace.
    local: HashSet<u64>,
    names: Vec<PathBuf>,
}

impl Nodes {
    fn of(names: Vec<PathBuf>) -> Result<Self> {
        let all = mounts::anywhere()?.into_iter().map(|found| found.mount);
        let local = all.filter(|mount| LOCAL.contains(&mount.kind.as_str()));
        Ok(Self {
            local: local.map(|mount| mount.id).collect(),
            names,
        })
    }

    /// The block device that a descriptor, named below `/proc/PID/fd`, is open on. Nodes that lie on network or user-space file
    /// systems are not found, unless they bear one of the names.
    fn device_open_as(&self, fd: &Path) -> Option<DeviceNumber> {
        let to = std::fs::read_link(fd).ok()?;
        let is_local = || {
            let mount = fact_of(fd, "mnt_id:").and_then(|id| id.parse().ok());
            mount.is_some_and(|id: u64| self.local.contains(&id))
        };
        let has_its_name = || self.names.iter().any(|n| n.file_name() == to.file_name());
        if !to.is_absolute() || !(to.starts_with("/dev") || has_its_name() || is_local()) {
            return None;
        }
        let found = std::fs::metadata(fd).ok()?;
        let is_block = found.file_type().is_block_device();
        is_block.then(|| DeviceNumber::from_raw(found.rdev()))
    }
}

impl BlockDevice {
    /// Processes that have this device open, with why: seen in /proc/*/fd, so only what root may see.
    pub fn openers(&self) -> Result<Vec<Opener>> {
        let nodes = Nodes::of(vec![self.node()])?;
        openers(|fd| nodes.device_open_as(fd) == Some(self.number))
    }

    /// Who can write to it without a file system of its own: processes that have a node of it, of its disk or of a partition of it
    /// open for writing (this one is left out), and loop devices over such a node (with the number 0). Other users within the
    /// kernel that claim nothing (nvmet) are not told.
    ///
    /// Errors: not every process could be looked at.
    pub fn writers(&self) -> Result<Vec<Opener>> {
        let (mut numbers, mut names) = self.with_partitions()?;
        let disk = self.whole_disk()?;
        numbers.push(disk.number);
        names.push(disk.node());
        let nodes = Nodes::of(names)?;
        let is_one = |n| numbers.contains(&n);
        let mut all =
            openers(|fd| nodes.device_open_as(fd).is_some_and(is_one) && is_for_writing(fd))?;
        let own = i32::try_from(std::process::id()).unwrap_or(0);
        all.retain(|opener| opener.pid != own);
        for name in names_in(Path::new("/sys/block"))? {
            let Ok(over) = Self::of_name(&name) else {
                continue;
            };
            let below = over.loop_backing_file().filter(|path| is_local(path));
            let below = below.and_then(|path| Self::at(&path).ok());
            if below.is_some_and(|b| numbers.contains(&b.number))
                && !over.is_read_only().unwrap_or(false)
            {
                all.push(Opener { pid: 0, name });
            }
        }
        Ok(all)
    }
}

/// Whether a path, as this process sees it, lies on a file system that can be asked.
fn is_local(path: &Path) -> bool {
    let mounts = mounts::all().unwrap_or_default();
    // Of two at the same place the later one lies on the earlier.
    let lies_on = mounts.iter().filter(|m| path.starts_with(&m.at));
    let deepest = lies_on.max_by_key(|m| m.at.components().count());
    deepest.is_some_and(|mount| LOCAL.contains(&mount.kind.as_str()))
}

/// Processes with a descriptor (named below `/proc/PID/fd`) that `is_it`. That one must not ask file systems at random: stat(2) on a
/// file of one that hangs never returns. (Threads that have a table of descriptors for themselves are not looked at.)
///
/// Errors: a process that is there may not be looked at, or this one has no descriptor left to do it with.
fn openers(is_it: impl Fn(&Path) -> bool) -> Result<Vec<Opener>> {
    let fail = |path: &Path| {
        let path = path.to_owned();
        move |e: io::Error| SysError::call("readdir", path, e)
    };
    let mut found = Vec::new();
    let proc = Path::new("/proc");
    for process in std::fs::read_dir(proc).map_err(fail(proc))? {
        let process = process.map_err(fail(proc))?;
        let Some(pid) = process
            .file_name()
            .to_str()
            .and_then(|n| n.parse::<i32>().ok())
        else {
            continue;
        };
        let folder = process.path().join("fd");
        let mut has = false;
        match std::fs::read_dir(&folder) {
            Ok(open) => {
                for fd in open {
                    match fd {
                        Ok(fd) => has |= is_it(&fd.path()),
                        Err(e) if has_ended(&e) => break,
                        Err(e) => return Err(fail(&folder)(e)),
                    }
                }
            }
            Err(e) if has_ended(&e) => {}
            Err(e) => return Err(fail(&folder)(e)),
        }
        if has {
            let name = read_trimmed(&process.path().join("comm")).unwrap_or_default();
            found.push(Opener { pid, name });
        }
    }
    Ok(found)
}

fn has_ended(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}
