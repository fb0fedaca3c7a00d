//! What is mounted where, from /proc/self/mountinfo: nothing is touched, so a hung mount hangs nobody here.

use crate::Result;
use crate::error::SysError;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// A device number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeviceNumber {
    /// Driver.
    pub major: u32,
    /// Which of its devices.
    pub minor: u32,
}

impl std::fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

impl DeviceNumber {
    /// From the kernel's packed form.
    pub fn from_raw(raw: u64) -> Self {
        Self {
            major: libc::major(raw),
            minor: libc::minor(raw),
        }
    }

    /// From `"7:3"`.
    pub fn parse(text: &str) -> Option<Self> {
        let (major, minor) = text.trim().split_once(':')?;
        Some(Self {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
        })
    }
}

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// The device of the file system (anonymous for FUSE, btrfs, …).
    pub device: DeviceNumber,
    /// Where.
    pub at: PathBuf,
    /// `ext4`, `fuse.blktide`.
    pub kind: String,
    /// What was mounted: `/dev/sda1`, a name.
    pub source: PathBuf,
    /// Whether this mount is read-only.
    pub read_only: bool,
}

/// All mounts this process sees, in the kernel's order (later ones lie on earlier ones).
pub fn all() -> Result<Vec<Mount>> {
    let path = "/proc/self/mountinfo";
    let text = std::fs::read(path).map_err(|e| SysError::call("read", path, e))?;
    Ok(text.split(|b| *b == b'\n').filter_map(parse).collect())
}

/// The mount that lies at `at` (topmost); `None` if nothing is mounted there.
pub fn at(at: &Path) -> Result<Option<Mount>> {
    Ok(all()?.into_iter().rev().find(|m| m.at == at))
}

/// Mounts of the block device `device`: of its file system, or whose source is one of `names` (btrfs, overlays).
pub fn of_device(device: DeviceNumber, names: &[PathBuf]) -> Result<Vec<Mount>> {
    let all = all()?;
    Ok(all
        .into_iter()
        .filter(|m| m.device == device || names.contains(&m.source))
        .collect())
}

fn parse(line: &[u8]) -> Option<Mount> {
    let fields: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
    let dash = fields.iter().position(|f| *f == b"-")?;
    let text = |i: usize| {
        fields
            .get(i)
            .map(|f| String::from_utf8_lossy(f).into_owned())
    };
    Some(Mount {
        device: DeviceNumber::parse(&text(2)?)?,
        at: unescape(fields.get(4)?),
        kind: text(dash + 1)?,
        source: unescape(fields.get(dash + 2)?),
        read_only: text(5)?.split(',').any(|o| o == "ro"),
    })
}

/// Undoes `\040` and the like.
fn unescape(field: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|_| *first == b'\\');
        let byte = octal
            .and_then(|d| std::str::from_utf8(d).ok())
            .and_then(|d| u8::from_str_radix(d, 8).ok());
        out.push(byte.unwrap_or(*first));
        rest = byte.and_then(|_| tail.get(3..)).unwrap_or(tail);
    }
    PathBuf::from(OsString::from_vec(out))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_kernel() {
        let line = br"36 35 98:0 /mnt1 /mnt\040two rw,noatime master:1 - ext3 /dev/root rw,errors=continue";
        let mount = parse(line).unwrap();
        assert_eq!(
            mount.device,
            DeviceNumber {
                major: 98,
                minor: 0
            }
        );
        assert_eq!(mount.at, Path::new("/mnt two"));
        assert_eq!(
            (mount.kind.as_str(), mount.source.as_path()),
            ("ext3", Path::new("/dev/root"))
        );
        assert!(!mount.read_only);
        assert_eq!(parse(b""), None);
    }

    #[test]
    fn the_root_is_mounted() {
        assert!(at(Path::new("/")).unwrap().is_some());
        assert!(at(Path::new("/nowhere/at/all")).unwrap().is_none());
    }
}
