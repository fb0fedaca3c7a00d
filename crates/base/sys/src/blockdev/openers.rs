//! Who has a file or a device open, as `/proc` has it.

use super::{BlockDevice, names_in, read_trimmed};
use crate::Result;
use crate::error::SysError;
use crate::mounts::DeviceNumber;
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
        return Ok(BlockDevice::at(path)?.openers());
    }
    let id = (wanted.dev(), wanted.ino());
    Ok(openers(|fd| {
        leads_to_name_of(fd, path) && std::fs::metadata(fd).is_ok_and(|m| (m.dev(), m.ino()) == id)
    }))
}

/// Those that can write to it by what they have open. What the kernel itself has open (a loop device) is not told.
pub fn writers_of(path: &Path) -> Result<Vec<Opener>> {
    let wanted = std::fs::metadata(path).map_err(|e| SysError::call("stat", path, e))?;
    let id = (wanted.dev(), wanted.ino());
    // A hard link has another name, and the same inode. Only what may be it is asked: see `openers`.
    let inode = wanted.ino().to_string();
    Ok(openers(|fd| {
        let may_be =
            leads_to_name_of(fd, path) || fact_of(fd, "ino:").is_some_and(|ino| ino == inode);
        may_be
            && std::fs::metadata(fd).is_ok_and(|m| (m.dev(), m.ino()) == id)
            && is_for_writing(fd)
    }))
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

/// The block device that a descriptor, named below `/proc/PID/fd`, is open on. Only what lies below `/dev`, or has one of these
/// names (the nodes of another mount namespace have no such path), is looked at.
fn device_open_as(fd: &Path, names: &[PathBuf]) -> Option<DeviceNumber> {
    let to = std::fs::read_link(fd).ok()?;
    let has_its_name = || names.iter().any(|name| name.file_name() == to.file_name());
    if !to.starts_with("/dev") && !has_its_name() {
        return None;
    }
    let found = std::fs::metadata(fd).ok()?;
    let is_block = found.file_type().is_block_device();
    is_block.then(|| DeviceNumber::from_raw(found.rdev()))
}

impl BlockDevice {
    /// Processes that have this device open, with why: seen in /proc/*/fd, so only what root may see.
    pub fn openers(&self) -> Vec<Opener> {
        openers(|fd| device_open_as(fd, &[self.node()]) == Some(self.number))
    }

    /// Who can write to it without a file system of its own: processes that have a node of it, of its disk or of a partition of it
    /// open for writing (this one is left out), and loop devices over such a node (with the number 0). Other users within the
    /// kernel that claim nothing (nvmet) are not told.
    pub fn writers(&self) -> Result<Vec<Opener>> {
        let (mut numbers, mut names) = self.with_partitions()?;
        let disk = self.whole_disk()?;
        numbers.push(disk.number);
        names.push(disk.node());
        let is_one = |n| numbers.contains(&n);
        let mut all =
            openers(|fd| device_open_as(fd, &names).is_some_and(is_one) && is_for_writing(fd));
        let own = i32::try_from(std::process::id()).unwrap_or(0);
        all.retain(|opener| opener.pid != own);
        for name in names_in(Path::new("/sys/block"))? {
            let Ok(over) = Self::of_name(&name) else {
                continue;
            };
            let below = over.loop_backing_file().filter(|p| p.starts_with("/dev"));
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

/// Processes with a descriptor (named below `/proc/PID/fd`) that `is_it`. That one must not ask file systems at random: stat(2) on a
/// file of one that hangs never returns.
fn openers(is_it: impl Fn(&Path) -> bool) -> Vec<Opener> {
    let mut found = Vec::new();
    for process in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = process
            .file_name()
            .to_str()
            .and_then(|n| n.parse::<i32>().ok())
        else {
            continue;
        };
        let open = std::fs::read_dir(process.path().join("fd"));
        let mut open = open.into_iter().flatten().flatten();
        if open.any(|fd| is_it(&fd.path())) {
            let name = read_trimmed(&process.path().join("comm")).unwrap_or_default();
            found.push(Opener { pid, name });
        }
    }
    found
}
