//! Freezing and thawing a file system through a descriptor that was opened before.
//!
//! ```text
//!   freeze: dirty data written, writers wait ── nothing is written ── thaw: writers go on
//! ```
//! Invariant: neither call opens, allocates or logs anything, so both are safe where the frozen file system holds this
//! program, its library or its log.

use super::ioctl_number;
use crate::Result;
use crate::error::{Errno, SysError};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

const FIFREEZE: libc::c_ulong = 0xc004_5877;
const FITHAW: libc::c_ulong = 0xc004_5878;

/// Why a file system was not frozen, or not thawed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FreezeError {
    /// `EBUSY`, of freezing: somebody else has frozen it. Not ours to thaw.
    #[error("it is frozen by somebody else")]
    AlreadyFrozen,
    /// `EOPNOTSUPP`: this file system cannot be frozen.
    #[error("a file system of this kind cannot be frozen")]
    NotSupported,
    /// `EINVAL`, of thawing: it was not frozen, or somebody else has thawed it.
    #[error("it was not frozen any more")]
    NotFrozen,
    /// Another one; after freezing it is not frozen.
    #[error(transparent)]
    Other(io::Error),
}

impl FreezeError {
    /// The kernel's number.
    pub fn errno(&self) -> Errno {
        match self {
            Self::AlreadyFrozen => Errno::BUSY,
            Self::NotSupported => Errno::OPNOTSUPP,
            Self::NotFrozen => Errno::INVAL,
            Self::Other(e) => Errno::of(e),
        }
    }

    /// What it means that freezing failed with this number.
    pub fn of_freeze(number: Errno) -> Self {
        match number {
            Errno::BUSY => Self::AlreadyFrozen,
            Errno::OPNOTSUPP => Self::NotSupported,
            other => Self::Other(other.error()),
        }
    }

    /// What it means that thawing failed with this number.
    pub fn of_thaw(number: Errno) -> Self {
        match number {
            Errno::INVAL => Self::NotFrozen,
            Errno::OPNOTSUPP => Self::NotSupported,
            other => Self::Other(other.error()),
        }
    }
}

/// Freezes the file system that `fd` (its root, or any file in it) lies on. Waits until its dirty data are written: `sync`
/// before, if that shall be short.
///
/// It stays frozen when this process dies: see to it that somebody thaws it.
pub fn freeze(fd: &impl AsFd) -> core::result::Result<(), FreezeError> {
    ioctl_number(fd, FIFREEZE).map_err(|e| FreezeError::of_freeze(Errno::of(&e)))
}

/// Thaws it.
pub fn thaw(fd: &impl AsFd) -> core::result::Result<(), FreezeError> {
    ioctl_number(fd, FITHAW).map_err(|e| FreezeError::of_thaw(Errno::of(&e)))
}

/// A file system that is frozen as long as this lives: nothing is written to it. Thawed when dropped.
///
/// If this process dies the file system stays frozen: where that may happen let a process of its own freeze and thaw.
#[derive(Debug)]
pub struct Frozen {
    folder: OwnedFd,
}

impl Frozen {
    /// Freezes the file system mounted at `at`. Waits: until its dirty data are written.
    pub fn freeze(at: &Path) -> Result<Self> {
        let folder = std::fs::File::open(at).map_err(|e| SysError::call("open", at, e))?;
        let frozen = freeze(&folder).map_err(|e| e.errno().error());
        frozen.map_err(|e| SysError::call("FIFREEZE", at, e))?;
        Ok(Self {
            folder: folder.into(),
        })
    }

    /// Thaws it, and says if that failed.
    pub fn thaw(self) -> core::result::Result<(), FreezeError> {
        thaw(&self.folder)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        // Not frozen any more after an explicit thaw.
        drop(thaw(&self.folder));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_frozen_says_so() {
        let proc = std::fs::File::open("/proc").unwrap();
        // EPERM comes first for those who may not freeze anything.
        let refused = freeze(&proc).unwrap_err().errno();
        assert!(
            [Errno::OPNOTSUPP, Errno::PERM].contains(&refused),
            "{refused:?}"
        );
    }

    #[test]
    fn numbers_have_their_meaning_by_the_call() {
        assert!(matches!(
            FreezeError::of_freeze(Errno::BUSY),
            FreezeError::AlreadyFrozen
        ));
        assert!(matches!(
            FreezeError::of_freeze(Errno::INVAL),
            FreezeError::Other(_)
        ));
        assert!(matches!(
            FreezeError::of_thaw(Errno::INVAL),
            FreezeError::NotFrozen
        ));
        for number in [Errno::BUSY, Errno::OPNOTSUPP, Errno::IO] {
            assert_eq!(FreezeError::of_freeze(number).errno(), number);
        }
    }
}
