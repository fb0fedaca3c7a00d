//! What can go wrong at the backing device, and what follows from it.

use blktide_sys::{Errno, SysError};
use std::path::PathBuf;

/// What was being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransferKind {
    /// Reading.
    Read,
    /// Writing.
    Write,
    /// Writing zeroes.
    Zero,
    /// Making everything written durable.
    Flush,
}

impl std::fmt::Display for TransferKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Zero => "zero",
            Self::Flush => "flush",
        })
    }
}

/// Errors of the backing device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// It could not be opened, or its facts could not be read. Nothing was written.
    #[error("cannot open the backing device {}", path.display())]
    Open {
        /// Where.
        path: PathBuf,
        /// Why.
        source: SysError,
    },
    /// Someone else has it, or a dead process's operations did not end in time. Nothing was written.
    #[error("the backing device {} is in use", path.display())]
    InUse {
        /// Where.
        path: PathBuf,
    },
    /// It is of a kind that cannot be tracked. Nothing was written.
    #[error("{}: {why}", path.display())]
    Unfit {
        /// Where.
        path: PathBuf,
        /// Why.
        why: &'static str,
    },
    /// Its size has changed while it was attached.
    #[error("the backing device has {is_bytes} bytes, and had {was_bytes}")]
    Resized {
        /// Bytes at the attach.
        was_bytes: u64,
        /// Bytes now.
        is_bytes: u64,
    },
    /// A transfer failed. A write may have happened in part; of a read, nothing is to be used.
    #[error("{kind} of {len} bytes at {offset} failed (errno {})", errno.0)]
    Transfer {
        /// What.
        kind: TransferKind,
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
        /// The kernel's word.
        errno: Errno,
    },
    /// The ring cannot be made, or cannot be waited for: this process cannot serve.
    #[error("the ring failed")]
    Ring {
        /// Why.
        source: SysError,
    },
}

/// What follows from an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Consequence {
    /// The same again; nothing has happened.
    Retry,
    /// The request fails with this, and nothing else changes.
    FailRequest(Errno),
    /// The volume is not attached; what there was stays as it is.
    Refuse,
    /// The bitmap is distrusted: it counts blocks of another volume than the one that is there.
    Distrust,
    /// This process ends; its keeper starts another.
    Stop,
}

impl DeviceError {
    /// What follows.
    pub const fn consequence(&self) -> Consequence {
        match self {
            Self::Open { .. } | Self::InUse { .. } | Self::Unfit { .. } => Consequence::Refuse,
            Self::Resized { .. } => Consequence::Distrust,
            Self::Transfer { kind, errno, .. } => transfer_consequence(*kind, *errno),
            Self::Ring { .. } => Consequence::Stop,
        }
    }

    pub(crate) fn open(path: &std::path::Path, source: SysError) -> Self {
        Self::Open {
            path: path.to_owned(),
            source,
        }
    }
}

/// A flush is never tried again: the kernel has thrown away what it could not write, and a second one succeeds.
const fn transfer_consequence(kind: TransferKind, errno: Errno) -> Consequence {
    match kind {
        TransferKind::Flush => Consequence::FailRequest(Errno::IO),
        TransferKind::Read | TransferKind::Write | TransferKind::Zero => {
            if errno.0 == Errno::AGAIN.0 || errno.0 == Errno::INTR.0 {
                Consequence::Retry
            } else {
                Consequence::FailRequest(errno)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// trap: a failed fsync that is tried again succeeds and has lost the data.
    #[test]
    fn a_failed_flush_is_never_tried_again() {
        for errno in [Errno::IO, Errno::AGAIN, Errno::INTR, Errno::NOSPC] {
            let error = DeviceError::Transfer {
                kind: TransferKind::Flush,
                offset: 0,
                len: 0,
                errno,
            };
            assert_eq!(error.consequence(), Consequence::FailRequest(Errno::IO));
        }
    }

    #[test]
    fn a_transfer_hands_its_errno_up() {
        for errno in [Errno::IO, Errno::NOSPC, Errno::OPNOTSUPP, Errno::NODATA] {
            let error = DeviceError::Transfer {
                kind: TransferKind::Zero,
                offset: 512,
                len: 512,
                errno,
            };
            assert_eq!(error.consequence(), Consequence::FailRequest(errno));
        }
    }
}
