//! The traits at which data and backup meet.
//!
//! `data` implements them over the snapshot of a volume and over a device; `backup` uses them and knows
//! neither.

use crate::geometry::Geometry;
use crate::range::BlockRange;
use crate::set::BlockSet;
use core::fmt;
use std::io;

/// Alignment in bytes that every buffer handed to these traits has, in address and length (the length of a
/// range that ends in the volume's short last block is that of whole blocks).
pub const BUFFER_ALIGN: usize = 4096;

/// What became of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockOutcome {
    /// The buffer holds the block's bytes.
    Data,
    /// The device could not read it; the buffer holds nothing.
    Unreadable,
}

/// Why a snapshot ended before its reader was through. The words are the interface's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum RevokeCause {
    /// The save area is full and the policy is to give up.
    SaveAreaFull = 1,
    /// A writer had waited for `wait_limit`.
    WaitLimit = 2,
    /// The reader made no progress, or died.
    ReaderStalled = 3,
    /// The save area could not be written or read.
    SaveAreaFailed = 4,
    /// An original could not be read before its overwrite.
    OriginalUnreadable = 5,
    /// The volume's server died.
    ServerDied = 6,
    /// The volume is being detached, or lets everything pass through.
    Detached = 7,
    /// Cancelled.
    Cancelled = 8,
    /// More than half of a queue's requests would have waited.
    QueueFull = 9,
    /// The bitmap that the snapshot's base leans on is no longer believed.
    Distrusted = 10,
}

impl RevokeCause {
    /// All of them.
    pub const ALL: &[Self] = &[
        Self::SaveAreaFull,
        Self::WaitLimit,
        Self::ReaderStalled,
        Self::SaveAreaFailed,
        Self::OriginalUnreadable,
        Self::ServerDied,
        Self::Detached,
        Self::Cancelled,
        Self::QueueFull,
        Self::Distrusted,
    ];

    /// The number that stands in the `revoked` word; never 0.
    pub const fn number(self) -> u8 {
        self as u8
    }

    /// The cause of a number.
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.iter().copied().find(|c| c.number() == number)
    }
}

impl fmt::Display for RevokeCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SaveAreaFull => "the save area was full",
            Self::WaitLimit => "a writer had waited for wait_limit",
            Self::ReaderStalled => "the backup made no progress",
            Self::SaveAreaFailed => "the save area failed",
            Self::OriginalUnreadable => "an original could not be read",
            Self::ServerDied => "the volume's server died",
            Self::Detached => "the volume was detached",
            Self::Cancelled => "it was cancelled",
            Self::QueueFull => "too many writers would have waited",
            Self::Distrusted => "the bitmap was distrusted meanwhile",
        })
    }
}

/// Why a source of blocks could not deliver.
#[derive(Debug)]
pub enum SourceError {
    /// The snapshot is gone; nothing that was read is wrong, nothing more can be had.
    Revoked(RevokeCause),
    /// The source itself failed (not a single unreadable block).
    Io(io::Error),
}

impl fmt::Display for SourceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Revoked(cause) => write!(f, "the snapshot was revoked: {cause}"),
            Self::Io(_) => f.write_str("the volume could not be read"),
        }
    }
}

impl std::error::Error for SourceError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Revoked(_) => None,
            Self::Io(e) => Some(e),
        }
    }
}

/// A state of a volume that is read block by block. Used by several threads at once.
pub trait BlockRead: Send + Sync {
    /// The volume's shape.
    fn geometry(&self) -> Geometry;

    /// Reads the blocks of `range` as they were at the instant into `buf`, and says what became of each.
    ///
    /// `buf` has `range.count()` × block size bytes, aligned to [`BUFFER_ALIGN`]; bytes past the volume's end are
    /// left zero. Waits: for the device. A snapshot delivers each wanted block once; asking for a block
    /// that is not wanted, or twice, is a fault of the caller and gives `SourceError::Io` (`InvalidInput`).
    fn read_blocks(
        &self,
        range: BlockRange,
        buf: &mut [u8],
    ) -> Result<Vec<BlockOutcome>, SourceError>;
}

/// The snapshot of a volume: what a backup reads.
pub trait SnapshotRead: BlockRead {
    /// The blocks that this backup is to take: changed since the base, and absent in it (P10).
    fn wanted(&self) -> &BlockSet;

    /// What the tracker claims to have changed since the base; `None` if there is no believed base (all of it).
    fn changed(&self) -> Option<&BlockSet>;

    /// True once each wanted block has been taken and nothing was revoked: then, and only then, may the
    /// image be committed.
    fn finish(&self) -> Result<(), SourceError>;
}

/// What a restore writes to.
pub trait BlockWrite: Send + Sync {
    /// Writes `buf` at `offset_bytes`. Both are multiples of the logical sector; `buf` is aligned.
    fn write_at(&self, offset_bytes: u64, buf: &[u8]) -> io::Result<()>;

    /// Makes `len_bytes` from `offset_bytes` read as zeroes.
    fn zero_at(&self, offset_bytes: u64, len_bytes: u64) -> io::Result<()>;

    /// Everything written so far to stable storage.
    fn flush(&self) -> io::Result<()>;
}
