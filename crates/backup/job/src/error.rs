//! Why a job failed. What holds after each error stands at its variant.

use crate::target::Refusal;
use blktide_image::ImageError;
use blktide_repo::RepoError;
use blktide_types::io::{RevokeCause, SourceError};
use std::io;

/// Why a job failed.
///
/// After any error of a backup: no image has become visible (but see [`JobError::Cancelled`]), no change is forgotten,
/// the next backup covers everything. After any error of a restore: the target's content is undefined, except
/// after [`JobError::Refused`], when nothing has been written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JobError {
    /// Cancelled. `commit_in_doubt`: it came while the commit hung in the repository, and the image, whole and right, may
    /// yet become visible.
    #[error("cancelled{}", if *.commit_in_doubt { " while the repository hung in the commit; a whole image may yet appear" } else { "" })]
    Cancelled {
        /// Whether the image may yet become visible.
        commit_in_doubt: bool,
    },
    /// The snapshot ended before all was read.
    #[error("the snapshot was revoked: {cause}")]
    SnapshotRevoked {
        /// Why.
        cause: RevokeCause,
    },
    /// No snapshot: writers were not seen through in time, or another backup has one.
    #[error("the volume is busy")]
    Busy,
    /// The volume could not be asked for a snapshot, or failed as a whole while it was read.
    #[error("the volume could not be read")]
    Volume {
        /// Of the system.
        source: io::Error,
    },
    /// The volume's answer contradicts what it was asked: no image is made of it.
    #[error("the volume gave a snapshot that does not fit: {what}")]
    Mismatch {
        /// What does not fit.
        what: &'static str,
    },
    /// The repository has no room.
    #[error("the repository is full")]
    RepositoryFull {
        /// What failed.
        source: ImageError,
    },
    /// The repository has less room than is to be left free.
    #[error("the repository has {free_bytes} bytes free, {min_free_bytes} are to be left")]
    RepositoryLow {
        /// Free bytes.
        free_bytes: u64,
        /// Bytes to be left free.
        min_free_bytes: u64,
    },
    /// The repository could not be reached, or its storage failed.
    #[error("the repository cannot be used")]
    RepositoryUnreachable {
        /// What failed.
        source: ImageError,
    },
    /// Anything else that the repository or an image refuses.
    #[error("the repository refuses")]
    Repository {
        /// Why.
        source: ImageError,
    },
    /// What is remembered of blocks copied before the instant could not be kept.
    #[error("the blocks copied before the instant could not be remembered")]
    Spool {
        /// What failed.
        source: ImageError,
    },
    /// The target of a restore failed.
    #[error("the target could not be {op}")]
    Target {
        /// What was tried, as a participle: `read`, `written`, `flushed`.
        op: &'static str,
        /// Of the system.
        source: io::Error,
    },
    /// Refused for safety; nothing was written.
    #[error("refused: {0}")]
    Refused(Refusal),
    /// No threads could be made.
    #[error("no thread could be started")]
    Threads {
        /// Of the system.
        source: io::Error,
    },
    /// A thread of the job died of a fault of its own.
    #[error("the job died of a fault in blktide")]
    Died,
}

impl JobError {
    /// The word of the interface.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Cancelled { .. } => "cancelled",
            Self::SnapshotRevoked { .. } => "snapshot-revoked",
            Self::Busy => "busy",
            Self::Volume { .. } | Self::Mismatch { .. } => "volume-failed",
            Self::RepositoryFull { .. } | Self::RepositoryLow { .. } => "repository-full",
            Self::RepositoryUnreachable { .. } => "repository-unreachable",
            Self::Repository { source } => repository_code(source),
            Self::Target { .. } => "target-failed",
            Self::Refused(refusal) => refusal.code(),
            Self::Spool { .. } | Self::Threads { .. } | Self::Died => "failed",
        }
    }

    /// The exit code of the interface.
    pub fn exit(&self) -> u8 {
        match self {
            Self::Cancelled { .. } => 130,
            Self::Refused(_) => 13,
            Self::Target { source, .. } if source.kind() == io::ErrorKind::StorageFull => 15,
            Self::RepositoryFull { .. } | Self::RepositoryLow { .. } => 15,
            Self::Spool {
                source: ImageError::Spool { source, .. },
            } if source.kind() == io::ErrorKind::StorageFull => 15,
            Self::Repository { source } => repository_exit(source),
            Self::SnapshotRevoked { .. }
            | Self::Busy
            | Self::Volume { .. }
            | Self::Mismatch { .. }
            | Self::RepositoryUnreachable { .. }
            | Self::Target { .. }
            | Self::Spool { .. }
            | Self::Threads { .. }
            | Self::Died => 1,
        }
    }
}

#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "both enums are open; what is not named is a plain failure"
)]
const fn repository_code(error: &ImageError) -> &'static str {
    match error {
        ImageError::Repository(RepoError::NotARepository) => "no_repository",
        ImageError::Repository(RepoError::NoImage) => "no_image",
        ImageError::Repository(RepoError::Ambiguous { .. }) => "ambiguous_image",
        ImageError::Repository(RepoError::ClaimInUse) => "claim_in_use",
        ImageError::Repository(RepoError::Abandoned) => "given-up",
        ImageError::Repository(RepoError::Damaged { .. }) | ImageError::Damaged { .. } => "damaged",
        _ => "repository-failed",
    }
}

#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "both enums are open; what is not named is a plain failure"
)]
const fn repository_exit(error: &ImageError) -> u8 {
    match error {
        ImageError::Repository(RepoError::NotARepository | RepoError::NoImage) => 10,
        ImageError::Repository(RepoError::ClaimInUse) => 11,
        ImageError::Repository(RepoError::Ambiguous { .. }) => 13,
        ImageError::Repository(RepoError::Damaged { .. }) | ImageError::Damaged { .. } => 5,
        _ => 1,
    }
}

impl From<ImageError> for JobError {
    fn from(source: ImageError) -> Self {
        if let ImageError::Repository(error) = &source {
            if error.is_full() {
                return Self::RepositoryFull { source };
            }
            if error.is_unreachable() {
                return Self::RepositoryUnreachable { source };
            }
        }
        if let ImageError::Spool { .. } = &source {
            return Self::Spool { source };
        }
        Self::Repository { source }
    }
}

impl From<RepoError> for JobError {
    fn from(source: RepoError) -> Self {
        ImageError::from(source).into()
    }
}

impl From<SourceError> for JobError {
    fn from(error: SourceError) -> Self {
        match error {
            SourceError::Revoked(cause) => Self::SnapshotRevoked { cause },
            SourceError::Io(source) => Self::Volume { source },
        }
    }
}
