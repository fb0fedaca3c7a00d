//! Errors of the kernel, with the call and the thing it was about.

use std::io;
use std::path::{Path, PathBuf};

/// Numbers of the kernel's errors, for those who may not name libc.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub i32);

#[expect(
    missing_docs,
    reason = "the names are the kernel's; errno(3) has their meaning"
)]
impl Errno {
    pub const PERM: Self = Self(libc::EPERM);
    pub const NOENT: Self = Self(libc::ENOENT);
    pub const CONNREFUSED: Self = Self(libc::ECONNREFUSED);
    pub const INTR: Self = Self(libc::EINTR);
    pub const IO: Self = Self(libc::EIO);
    pub const NXIO: Self = Self(libc::ENXIO);
    pub const BADF: Self = Self(libc::EBADF);
    pub const AGAIN: Self = Self(libc::EAGAIN);
    pub const NOMEM: Self = Self(libc::ENOMEM);
    pub const ACCES: Self = Self(libc::EACCES);
    pub const BUSY: Self = Self(libc::EBUSY);
    pub const EXIST: Self = Self(libc::EEXIST);
    pub const NODEV: Self = Self(libc::ENODEV);
    pub const INVAL: Self = Self(libc::EINVAL);
    pub const FBIG: Self = Self(libc::EFBIG);
    pub const NOSPC: Self = Self(libc::ENOSPC);
    pub const ROFS: Self = Self(libc::EROFS);
    pub const DQUOT: Self = Self(libc::EDQUOT);
    pub const NOSYS: Self = Self(libc::ENOSYS);
    pub const NODATA: Self = Self(libc::ENODATA);
    pub const TIME: Self = Self(libc::ETIME);
    pub const TIMEDOUT: Self = Self(libc::ETIMEDOUT);
    pub const OPNOTSUPP: Self = Self(libc::EOPNOTSUPP);
    pub const STALE: Self = Self(libc::ESTALE);
    pub const REMOTEIO: Self = Self(libc::EREMOTEIO);
    pub const CANCELED: Self = Self(libc::ECANCELED);

    /// The number of `error`; `EIO` if it has none.
    pub fn of(error: &io::Error) -> Self {
        error.raw_os_error().map_or(Self::IO, Self)
    }

    /// The error of this number.
    pub fn error(self) -> io::Error {
        io::Error::from_raw_os_error(self.0)
    }
}

/// What the kernel refused, or why something was not even asked of it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SysError {
    /// A call failed. Nothing has changed, unless the function that returns it says so.
    #[error("{call} {}", on.display())]
    Call {
        /// The call: `open`, `LOOP_CONFIGURE`.
        call: &'static str,
        /// What it was about: a path, a name, or empty.
        on: PathBuf,
        /// The kernel's word.
        source: io::Error,
    },
    /// Something did not happen before its deadline.
    #[error("{what} {} took too long", on.display())]
    TimedOut {
        /// What was waited for.
        what: &'static str,
        /// About what.
        on: PathBuf,
    },
    /// The thing is not of a kind that this works with.
    #[error("{}: {why}", on.display())]
    Unfit {
        /// What.
        on: PathBuf,
        /// Why not.
        why: &'static str,
    },
}

impl SysError {
    pub(crate) fn call(call: &'static str, on: impl AsRef<Path>, source: io::Error) -> Self {
        Self::Call {
            call,
            on: on.as_ref().to_owned(),
            source,
        }
    }

    pub(crate) fn unfit(on: impl AsRef<Path>, why: &'static str) -> Self {
        Self::Unfit {
            on: on.as_ref().to_owned(),
            why,
        }
    }

    /// The kernel's number, if this came from the kernel.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Call { source, .. } => Some(Errno::of(source)),
            Self::TimedOut { .. } | Self::Unfit { .. } => None,
        }
    }
}

/// The result of a call that returns -1 and sets errno.
pub(crate) fn check<T: PartialOrd + Default>(returned: T) -> io::Result<T> {
    if returned < T::default() {
        Err(io::Error::last_os_error())
    } else {
        Ok(returned)
    }
}

/// `call` again while it is interrupted.
pub(crate) fn retry<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}
