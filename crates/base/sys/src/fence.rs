//! The fence (P6): nobody else writes to the backing device, not even what a dead predecessor left in the kernel.
//!
//! A killed process's `io_uring` writes may land seconds after `wait()` has returned. They hold its open file
//! description, and with it its claim: `O_EXCL` on a block device, `flock` on a regular file. Whoever gets the claim
//! comes after them. (POSIX locks are no fence: they end with the process.)
//!
//! Invariant: the descriptor of a [`Fenced`] is never passed on nor inherited; a process that holds it never forks
//! without exec. So the claim ends exactly when this process and its operations have ended.

use crate::Result;
use crate::error::{Errno, SysError};
use blktide_types::clock::{Clock, Instant};
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// What lies under a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackingKind {
    /// A block device; claimed by `O_EXCL`.
    BlockDevice,
    /// A regular file; claimed by `flock(LOCK_EX)`.
    RegularFile,
}

impl BackingKind {
    /// The kind of what stands at `path`; refused if it is neither, or a file on a file system whose locks are no
    /// fence (NFS and other networks, FUSE).
    pub fn of(path: &Path) -> Result<Self> {
        use std::os::unix::fs::FileTypeExt;
        let found = std::fs::metadata(path)
            .map_err(|e| SysError::call("stat", path, e))?
            .file_type();
        if found.is_block_device() {
            return Ok(Self::BlockDevice);
        }
        if !found.is_file() {
            return Err(SysError::unfit(
                path,
                "neither a block device nor a regular file",
            ));
        }
        let kind = crate::fs::kind_of(path)?;
        if kind.is_remote() {
            return Err(SysError::unfit(
                path,
                "a file on a network file system cannot be fenced",
            ));
        }
        Ok(Self::RegularFile)
    }
}

/// A backing device that this process alone may write to.
#[derive(Debug)]
pub struct Fenced {
    fd: Arc<OwnedFd>,
    kind: BackingKind,
    path: PathBuf,
}

impl Fenced {
    /// Tries once. `None`: someone else has it, or a dead one's operations have not ended.
    ///
    /// Opened `O_RDWR | O_DIRECT`. `ROFS`/`ACCES` where it cannot be written.
    pub fn try_take(path: &Path) -> Result<Option<Self>> {
        let kind = BackingKind::of(path)?;
        let mut flags = OFlag::O_RDWR | OFlag::O_DIRECT | OFlag::O_CLOEXEC;
        flags.set(OFlag::O_EXCL, kind == BackingKind::BlockDevice);
        let fd = match open(path, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(nix::Error::EBUSY) if kind == BackingKind::BlockDevice => return Ok(None),
            Err(e) => return Err(SysError::call("open", path, e.into())),
        };
        if kind == BackingKind::RegularFile && !lock(&fd, path)? {
            return Ok(None);
        }
        Ok(Some(Self {
            fd: Arc::new(fd),
            kind,
            path: path.to_owned(),
        }))
    }

    /// Tries until it has it or `deadline` is past (`None`: for ever). Waits in steps of 1 to 4 ms: the kernel
    /// announces the end of an orphaned write to nobody.
    pub fn take(path: &Path, clock: &dyn Clock, deadline: Option<Instant>) -> Result<Self> {
        let mut step = Duration::from_millis(1);
        loop {
            if let Some(fenced) = Self::try_take(path)? {
                return Ok(fenced);
            }
            if deadline.is_some_and(|d| clock.now() >= d) {
                return Err(SysError::TimedOut {
                    what: "the fence on",
                    on: path.to_owned(),
                });
            }
            crate::event::pause(step).map_err(|e| SysError::call("poll", path, e))?;
            step = (step * 2).min(Duration::from_millis(4));
        }
    }

    /// The descriptor, for a ring of this process. Not to be passed on.
    pub const fn file(&self) -> &Arc<OwnedFd> {
        &self.fd
    }

    /// What it is.
    pub const fn kind(&self) -> BackingKind {
        self.kind
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether `path` still leads to what is fenced (it was not replaced by another file or device).
    pub fn is_still_at_path(&self) -> Result<bool> {
        let fail = |e: nix::Error| SysError::call("stat", &self.path, e.into());
        let ours = nix::sys::stat::fstat(&*self.fd).map_err(fail)?;
        let there = match nix::sys::stat::stat(&self.path) {
            Ok(there) => there,
            Err(nix::Error::ENOENT) => return Ok(false),
            Err(e) => return Err(fail(e)),
        };
        Ok(match self.kind {
            BackingKind::BlockDevice => ours.st_rdev == there.st_rdev,
            BackingKind::RegularFile => (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino),
        })
    }
}

impl AsFd for Fenced {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// `flock(LOCK_EX | LOCK_NB)`; false if it is taken.
fn lock(fd: &OwnedFd, path: &Path) -> Result<bool> {
    loop {
        // SAFETY: flock(2) on an open descriptor touches no memory.
        let locked = crate::error::check(unsafe {
            libc::flock(fd.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB)
        });
        match locked {
            Ok(_) => return Ok(true),
            Err(e) if Errno::of(&e) == Errno::AGAIN => return Ok(false),
            Err(e) if Errno::of(&e) == Errno::INTR => {}
            Err(e) => return Err(SysError::call("flock", path, e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::SystemClock;

    fn scratch(name: &str) -> PathBuf {
        let path = PathBuf::from("/var/tmp")
            .join(format!("blktide-sys-fence-{name}-{}", std::process::id()));
        std::fs::File::create(&path)
            .unwrap()
            .set_len(1 << 20)
            .unwrap();
        path
    }

    /// Names P6's rule for a regular file: one holder at a time, and the claim ends with the description.
    #[test]
    fn one_holder_at_a_time() {
        let path = scratch("one");
        let first = Fenced::try_take(&path).unwrap().unwrap();
        assert!(Fenced::try_take(&path).unwrap().is_none());
        // What an operation in flight does: it keeps the description, whatever happens to the descriptor table.
        let in_flight = Arc::clone(first.file());
        drop(first);
        assert!(Fenced::try_take(&path).unwrap().is_none());
        let soon = SystemClock.now().after(Duration::from_millis(5));
        let refused = Fenced::take(&path, &SystemClock, Some(soon)).unwrap_err();
        assert!(matches!(refused, SysError::TimedOut { .. }));
        drop(in_flight);
        Fenced::take(&path, &SystemClock, None).unwrap();
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_file_that_was_replaced_is_noticed() {
        let path = scratch("replaced");
        let fenced = Fenced::try_take(&path).unwrap().unwrap();
        assert!(fenced.is_still_at_path().unwrap());
        std::fs::remove_file(&path).unwrap();
        assert!(!fenced.is_still_at_path().unwrap());
        std::fs::File::create(&path).unwrap();
        assert!(!fenced.is_still_at_path().unwrap());
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn folders_and_character_devices_are_refused() {
        for path in ["/", "/dev/null"] {
            assert!(matches!(
                Fenced::try_take(Path::new(path)),
                Err(SysError::Unfit { .. })
            ));
        }
    }
}
