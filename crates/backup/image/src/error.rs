//! Why an image could not be written or read.

use blktide_format::FormatError;
use blktide_repo::RepoError;
use blktide_types::range::BlockRange;
use std::io;

/// Why an image could not be written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The repository failed.
    #[error(transparent)]
    Repository(#[from] RepoError),
    /// Part of the image is damaged: these blocks cannot be had from it.
    #[error("blocks {} to {} of the image are damaged: {what} in {object}", range.start().0, range.end().0.saturating_sub(1))]
    Damaged {
        /// The blocks.
        range: BlockRange,
        /// The object that is damaged.
        object: String,
        /// What does not fit.
        what: &'static str,
        /// What is wrong with its bytes, if that is known.
        source: Option<FormatError>,
    },
    /// Compressing failed.
    #[error("a frame could not be compressed")]
    Compress(#[source] io::Error),
    /// Wanted blocks were not written: no image can be made.
    #[error("{missing} wanted blocks were not written")]
    Incomplete {
        /// How many.
        missing: u64,
    },
    /// What is remembered of blocks stored early could not be kept or had again.
    #[error("the spool of early blocks could not be {op}")]
    Spool {
        /// What was tried, as a participle: `made`, `written`, `read`.
        op: &'static str,
        /// Of the system; `InvalidData`: what was read is not what was written.
        source: io::Error,
    },
    /// A caller's mistake: the words say which.
    #[error("asked for what cannot be: {0}")]
    Misuse(&'static str),
}
