//! Why an image could not be written or read.

use blktide_format::FormatError;
use blktide_repo::RepoError;
use blktide_types::range::BlockRange;
use blktide_types::unit::BlockIndex;
use std::io;

/// Why an image could not be written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The repository failed.
    #[error(transparent)]
    Repository(#[from] RepoError),
    /// Part of the image is damaged: these blocks cannot be had from it.
    #[error("{range:?} of the image is damaged: {what}")]
    Damaged {
        /// The blocks.
        range: BlockRange,
        /// The object, or what does not fit.
        what: String,
        /// What is wrong with its bytes, if that is known.
        source: Option<FormatError>,
    },
    /// The image has no content of this block: absent, excluded or unreadable.
    #[error("the image has no content of {0}")]
    NoContent(BlockIndex),
    /// Compressing failed.
    #[error("a frame could not be compressed")]
    Compress(#[source] io::Error),
    /// Wanted blocks were not written: no image can be made.
    #[error("{missing} wanted blocks were not written")]
    Incomplete {
        /// How many.
        missing: u64,
    },
    /// A caller's mistake: the words say which.
    #[error("asked for what cannot be: {0}")]
    Misuse(&'static str),
}
