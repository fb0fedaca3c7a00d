//! Who has a file or a device open, as `/proc` has it.

use super::{BlockDevice, read_trimmed};
use crate::Result;
use crate::error::SysError;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

/// A process that has something open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opener {
    /// Its number.
    pub pid: i32,
    /// Its name, as the kernel has it.
    pub name: String,
}

/// Processes that have the file or device at `path` open (a file: under the same last name).
pub fn openers_of(path: &Path) -> Result<Vec<Opener>> {
    let wanted = std::fs::metadata(path).map_err(|e| SysError::call("stat", path, e))?;
    if wanted.file_type().is_block_device() {
        return Ok(BlockDevice::at(path)?.openers());
    }
    let id = (wanted.dev(), wanted.ino());
    let same_name = |_: &Path, to: &Path| to.file_name() == path.file_name();
    Ok(openers(same_name, |_, found| {
        (found.dev(), found.ino()) == id
    }))
}

/// Those that can write to it by what they have open. What the kernel itself has open (a loop device) is not told.
pub fn writers_of(path: &Path) -> Result<Vec<Opener>> {
    let wanted = std::fs::metadata(path).map_err(|e| SysError::call("stat", path, e))?;
    let id = (wanted.dev(), wanted.ino());
    // A hard link has another name, and the same inode.
    let inode = wanted.ino().to_string();
    let may_be = |fd: &Path, to: &Path| {
        to.file_name() == path.file_name() || fact_of(fd, "ino:").is_some_and(|ino| ino == inode)
    };
    Ok(openers(may_be, |fd, found| {
        (found.dev(), found.ino()) == id && is_for_writing(fd)
    }))
}

/// Whether a descriptor, named below `/proc/PID/fd`, can be written to; in doubt it can.
pub(super) fn is_for_writing(fd: &Path) -> bool {
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

/// Only descriptors that `may_be` right, by their own path and what they lead to, are asked: stat(2) on a file of a hung file
/// system never returns.
pub(super) fn openers(
    may_be: impl Fn(&Path, &Path) -> bool,
    is_it: impl Fn(&Path, &std::fs::Metadata) -> bool,
) -> Vec<Opener> {
    let mut found = Vec::new();
    for process in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = process
            .file_name()
            .to_str()
            .and_then(|n| n.parse::<i32>().ok())
        else {
            continue;
        };
        let open = std::fs::read_dir(process.path().join("fd"))
            .into_iter()
            .flatten()
            .flatten();
        let has = open
            .filter(|fd| std::fs::read_link(fd.path()).is_ok_and(|to| may_be(&fd.path(), &to)))
            .any(|fd| std::fs::metadata(fd.path()).is_ok_and(|m| is_it(&fd.path(), &m)));
        if has {
            let name = read_trimmed(&process.path().join("comm")).unwrap_or_default();
            found.push(Opener { pid, name });
        }
    }
    found
}
