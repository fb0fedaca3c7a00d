//! What follows from each error of the data path: one closed list, one exhaustive match.
//!
//! It feeds `docs/failures.md`. A broken invariant of ours is `Distrust`, never a panic: a panic stops someone's
//! server, a distrusted bitmap costs one full backup.

use blktide_types::io::RevokeCause;
use blktide_types::reason::Reason;

/// An error number of the kernel, as a request is answered with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

impl Errno {
    /// EIO.
    pub const IO: Self = Self(5);
    /// ENXIO.
    pub const NO_DEVICE: Self = Self(6);
    /// EINVAL.
    pub const INVALID: Self = Self(22);
    /// ENOSPC.
    pub const NO_SPACE: Self = Self(28);
    /// EOPNOTSUPP.
    pub const NOT_SUPPORTED: Self = Self(95);
}

/// What is done about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Consequence {
    /// Once more.
    Retry,
    /// The request fails with this; nothing else changes.
    FailRequest(Errno),
    /// The bitmap is distrusted for this reason; requests go on.
    Distrust(Reason),
    /// The snapshot is revoked for this cause; requests go on, its backup gives up.
    Revoke(RevokeCause),
    /// The backup ends; tracking and requests go on.
    GiveUpBackup,
    /// Tracking is switched off; requests go on.
    PassThrough,
    /// This process ends; its keeper starts another.
    Stop,
}

/// What can go wrong in the data path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The backing device failed a read, a write or zeroes.
    Device(Errno),
    /// The backing device failed a flush. It is not retried: nobody knows what is on the disk.
    Flush(Errno),
    /// A call was interrupted, or the system was short of something for the moment (EINTR, EAGAIN).
    Transient,
    /// A request ends past the volume, or is not aligned.
    BadRequest,
    /// An original could not be read before its overwrite.
    OriginalUnreadable,
    /// The save area is full.
    SaveAreaFull,
    /// The save area failed.
    SaveAreaFailed,
    /// A write was held for `wait_limit`.
    WaitLimit,
    /// More than half of a queue's requests would have waited.
    QueueFull,
    /// The reader of a snapshot makes no progress.
    ReaderStalled,
    /// The queues did not become empty within a hold's deadline.
    HoldExpired,
    /// The generation table does not check, or a memory is not what it was.
    TableDamaged,
    /// The backing device was written past us.
    ForeignWrite,
    /// The frontend's connection ended without a detach.
    FrontendGone,
    /// A server died.
    ServerDied,
    /// Servers die again and again without finishing anything.
    ServersKeepDying,
    /// The layout of the shared memory is another build's.
    UnknownLayout,
}

impl Failure {
    /// All of them, for the table of `docs/failures.md`.
    pub const ALL: &[Self] = &[
        Self::Device(Errno::IO),
        Self::Flush(Errno::IO),
        Self::Transient,
        Self::BadRequest,
        Self::OriginalUnreadable,
        Self::SaveAreaFull,
        Self::SaveAreaFailed,
        Self::WaitLimit,
        Self::QueueFull,
        Self::ReaderStalled,
        Self::HoldExpired,
        Self::TableDamaged,
        Self::ForeignWrite,
        Self::FrontendGone,
        Self::ServerDied,
        Self::ServersKeepDying,
        Self::UnknownLayout,
    ];

    /// What is done about it.
    pub const fn consequence(self) -> Consequence {
        match self {
            Self::Device(errno) | Self::Flush(errno) => Consequence::FailRequest(errno),
            Self::Transient => Consequence::Retry,
            Self::BadRequest => Consequence::FailRequest(Errno::INVALID),
            Self::OriginalUnreadable => Consequence::Revoke(RevokeCause::OriginalUnreadable),
            Self::SaveAreaFull => Consequence::Revoke(RevokeCause::SaveAreaFull),
            Self::SaveAreaFailed => Consequence::Revoke(RevokeCause::SaveAreaFailed),
            Self::WaitLimit => Consequence::Revoke(RevokeCause::WaitLimit),
            Self::QueueFull => Consequence::Revoke(RevokeCause::QueueFull),
            Self::ReaderStalled => Consequence::Revoke(RevokeCause::ReaderStalled),
            Self::HoldExpired => Consequence::GiveUpBackup,
            Self::TableDamaged | Self::FrontendGone => {
                Consequence::Distrust(Reason::TrackingInterrupted)
            }
            Self::ForeignWrite => Consequence::Distrust(Reason::ForeignWrite),
            Self::ServerDied => Consequence::Revoke(RevokeCause::ServerDied),
            Self::ServersKeepDying => Consequence::PassThrough,
            Self::UnknownLayout => Consequence::Stop,
        }
    }

    /// What went wrong, for people.
    pub const fn what(self) -> &'static str {
        match self {
            Self::Device(_) => "the backing device fails a read, a write or zeroes",
            Self::Flush(_) => "the backing device fails a flush",
            Self::Transient => {
                "a call is interrupted, or the system is short of something for the moment"
            }
            Self::BadRequest => "a request ends past the volume or is not aligned",
            Self::OriginalUnreadable => "an original cannot be read before its overwrite",
            Self::SaveAreaFull => "the save area is full (policy give-up), or its file system is",
            Self::SaveAreaFailed => "the save area cannot be written",
            Self::WaitLimit => "a write was held for wait_limit",
            Self::QueueFull => "more than half of a queue's requests would wait for the snapshot",
            Self::ReaderStalled => "the snapshot's reader makes no progress, or died",
            Self::HoldExpired => {
                "the queues do not become empty within a hold's deadline, several times"
            }
            Self::TableDamaged => "the table of generations does not check",
            Self::ForeignWrite => "the backing device is written past the tracker",
            Self::FrontendGone => "the frontend's connection ends without a detach",
            Self::ServerDied => "the volume's server dies",
            Self::ServersKeepDying => "servers die five times in a row without finishing a request",
            Self::UnknownLayout => "the shared memory is of a layout that this build does not know",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// req D2: no failure of a backup's making fails a write, and nothing that is lost for the tracker goes unsaid.
    #[test]
    fn only_the_device_and_bad_requests_fail_a_write() {
        for failure in Failure::ALL {
            let fails = matches!(failure.consequence(), Consequence::FailRequest(_));
            let may = matches!(
                failure,
                Failure::Device(_) | Failure::Flush(_) | Failure::BadRequest
            );
            assert_eq!(fails, may, "{failure:?}");
        }
        let words: BTreeSet<_> = Failure::ALL.iter().map(|f| f.what()).collect();
        assert_eq!(words.len(), Failure::ALL.len());
    }
}
