//! What is mounted where, from /proc/PID/mountinfo: nothing is touched, so a hung mount hangs nobody here.
//!
//! [`Reachable::open`] is the exception: it opens what is mounted.

use crate::Result;
use crate::error::{SysError, check};
use std::collections::HashSet;
use std::ffi::OsString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
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
    /// The kernel's number of it: unlike a path not two mounts have it at a time, in whatever namespace.
    pub id: u64,
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

/// A mount in whatever namespace, and the way to it from here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reachable {
    /// It; `at` is the path as the processes there see it.
    pub mount: Mount,
    /// A path by which this process reaches it: `at`, or `/proc/PID/root/at`. Gone with that process.
    pub path: PathBuf,
    /// The process through which it is seen; `None`: this one sees it.
    pub through: Option<i32>,
}

impl Reachable {
    /// Opens its root, for reading. Refused if something else is there by now, or lies on it.
    ///
    /// `ENOTDIR` for a mount of a single file. Needs Linux 5.8.
    pub fn open(&self) -> Result<OwnedFd> {
        use nix::fcntl::{OFlag, open};
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let fd = open(&self.path, flags, nix::sys::stat::Mode::empty())
            .map_err(|e| SysError::call("open", &self.path, e.into()))?;
        let found = mount_id(&fd).map_err(|e| SysError::call("statx", &self.path, e))?;
        if found == Some(self.mount.id) {
            return Ok(fd);
        }
        Err(SysError::unfit(&self.path, "another mount is found there"))
    }
}

/// The number of the mount that `fd` was opened through; `None` where the kernel does not say.
fn mount_id(fd: &impl AsFd) -> std::io::Result<Option<u64>> {
    // SAFETY: struct statx is plain numbers; all zero is a value of it.
    let mut found: libc::statx = unsafe { std::mem::zeroed() };
    let (fd, mask) = (fd.as_fd().as_raw_fd(), libc::STATX_MNT_ID);
    // SAFETY: the path is an empty string with its zero; `found` is writable for the length of the call.
    check(unsafe { libc::statx(fd, c"".as_ptr(), libc::AT_EMPTY_PATH, mask, &raw mut found) })?;
    let told = found.stx_mask & libc::STATX_MNT_ID != 0;
    Ok(told.then_some(found.stx_mnt_id))
}

/// All mounts that any process sees, each once: first those of this process, then what only others see.
///
/// Needs root to look at others. A namespace in which no process is (held by a file only) is not seen, nor one that a
/// single thread has for itself.
pub fn anywhere() -> Result<Vec<Reachable>> {
    anywhere_in(Path::new("/proc"))
}

fn anywhere_in(proc: &Path) -> Result<Vec<Reachable>> {
    let own = proc.join("self");
    let path = own.join("mountinfo");
    let text = std::fs::read(&path).map_err(|e| SysError::call("read", path, e))?;
    let mut ids = HashSet::new();
    let mut found = Vec::new();
    add(&text, None, proc, &mut ids, &mut found);
    let mut views: HashSet<_> = view_of(&own).into_iter().collect();
    let entries = std::fs::read_dir(proc).map_err(|e| SysError::call("readdir", proc, e))?;
    for entry in entries.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        // A process that has ended meanwhile has nothing to show.
        let process = entry.path();
        if view_of(&process).is_none_or(|view| !views.insert(view)) {
            continue;
        }
        let text = std::fs::read(process.join("mountinfo")).unwrap_or_default();
        add(&text, Some(pid), proc, &mut ids, &mut found);
    }
    Ok(found)
}

/// What decides which mounts a process sees: its namespace and its root.
fn view_of(process: &Path) -> Option<(PathBuf, PathBuf)> {
    let namespace = std::fs::read_link(process.join("ns/mnt")).ok()?;
    Some((namespace, std::fs::read_link(process.join("root")).ok()?))
}

fn add(
    mountinfo: &[u8],
    through: Option<i32>,
    proc: &Path,
    ids: &mut HashSet<u64>,
    found: &mut Vec<Reachable>,
) {
    for mount in mountinfo.split(|b| *b == b'\n').filter_map(parse) {
        if !ids.insert(mount.id) {
            continue;
        }
        let path = match through {
            Some(pid) => {
                let below = mount.at.strip_prefix("/").unwrap_or(&mount.at);
                proc.join(pid.to_string()).join("root").join(below)
            }
            None => mount.at.clone(),
        };
        found.push(Reachable {
            mount,
            path,
            through,
        });
    }
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
        id: text(0)?.parse().ok()?,
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
        assert_eq!(mount.id, 36);
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
    fn what_only_a_container_sees_is_found_once() {
        let proc = std::env::temp_dir().join(format!("blktide-sys-mounts-{}", std::process::id()));
        let host = "20 1 8:1 / / rw - ext4 /dev/sda1 rw\n21 20 8:2 / /srv rw - ext4 /dev/sda2 rw\n";
        let inside =
            "90 80 0:50 / / rw - overlay overlay rw\n91 90 7:3 / /data rw - ext4 /dev/loop3 rw\n";
        for (pid, namespace, mountinfo) in [
            ("self", "mnt:[1]", host),
            ("1", "mnt:[1]", host),
            ("70", "mnt:[2]", inside),
            ("71", "mnt:[2]", inside),
            ("tty", "mnt:[3]", "99 1 8:9 / / rw - ext4 /dev/sda9 rw\n"),
        ] {
            let process = proc.join(pid);
            std::fs::create_dir_all(process.join("ns")).unwrap();
            std::os::unix::fs::symlink(namespace, process.join("ns/mnt")).unwrap();
            std::os::unix::fs::symlink("/", process.join("root")).unwrap();
            std::fs::File::create(process.join("mountinfo"))
                .and_then(|mut file| std::io::Write::write_all(&mut file, mountinfo.as_bytes()))
                .unwrap();
        }
        std::fs::create_dir(proc.join("72")).unwrap();
        let found = anywhere_in(&proc).unwrap();
        let numbers: Vec<_> = found.iter().map(|r| r.mount.id).collect();
        assert_eq!(numbers, [20, 21, 90, 91]);
        assert_eq!(
            (&found[1].path, found[1].through),
            (&PathBuf::from("/srv"), None)
        );
        let through = found[3].through.unwrap();
        assert!([70, 71].contains(&through));
        assert_eq!(found[3].path, proc.join(format!("{through}/root/data")));
        std::fs::remove_dir_all(&proc).unwrap();
    }

    #[test]
    fn a_mount_is_opened_only_if_it_is_the_one() {
        let mut found = anywhere().unwrap();
        // /proc: nothing lies on it, and it is in every namespace.
        let at = found
            .iter()
            .position(|r| r.path == Path::new("/proc"))
            .unwrap();
        let mut proc = found.swap_remove(at);
        drop(proc.open().unwrap());
        proc.mount.id += 1_000_000;
        assert!(matches!(proc.open(), Err(SysError::Unfit { .. })));
    }

    #[test]
    fn the_root_is_mounted() {
        assert!(at(Path::new("/")).unwrap().is_some());
        assert!(at(Path::new("/nowhere/at/all")).unwrap().is_none());
    }
}
