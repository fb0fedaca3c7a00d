//! Why a repository could not do it.

use crate::store::StoreError;
use blktide_format::FormatError;
use blktide_types::id::{ImageId, VolumeId};

/// Why a repository could not do it. Unless a variant says otherwise nothing visible has changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RepoError {
    /// The store failed at an object.
    #[error("cannot {verb} {name} in the repository")]
    Store {
        /// `read`, `create`, `write`, `list`, `delete`.
        verb: &'static str,
        /// Name of the object.
        name: String,
        /// Why.
        source: StoreError,
    },
    /// There is no repository here.
    #[error("there is no repository here")]
    NotARepository,
    /// There is one already.
    #[error("there is a repository here already")]
    Exists,
    /// An object is damaged, misplaced or of a later version.
    #[error("object {name} is not usable")]
    Damaged {
        /// Name of the object.
        name: String,
        /// Why.
        source: FormatError,
    },
    /// No such image.
    #[error("there is no such image")]
    NoImage,
    /// A name that fits images of several volumes.
    #[error("the name fits images of {} volumes", volumes.len())]
    Ambiguous {
        /// The volumes.
        volumes: Vec<VolumeId>,
    },
    /// The image to build on, or something it needs, is gone (`base-image-gone`).
    #[error("image {image} cannot be built on: {what} is gone")]
    BaseGone {
        /// The image.
        image: ImageId,
        /// What is missing: the name of an object.
        what: String,
    },
    /// Somebody else has ended this session (`repo unlock`, prune): it leaves no image.
    #[error("the session was given up by somebody else")]
    Abandoned,
    /// The claim is a running backup's.
    #[error("the claim is in use")]
    ClaimInUse,
    /// The session has failed before; it can only be abandoned.
    #[error("the session has failed before")]
    Poisoned,
    /// A caller's mistake: the words say which.
    #[error("asked for what cannot be: {0}")]
    Misuse(&'static str),
}

impl RepoError {
    /// Wraps a store's error with what was being done to `name`.
    pub(crate) fn at(verb: &'static str, name: &str) -> impl FnOnce(StoreError) -> Self {
        let name = name.to_owned();
        move |source| Self::Store { verb, name, source }
    }

    /// Wraps a decoder's error with the object's name.
    pub(crate) fn damaged(name: &str) -> impl FnOnce(FormatError) -> Self {
        let name = name.to_owned();
        move |source| Self::Damaged { name, source }
    }

    /// Whether it failed for want of room (`repository-full`).
    pub fn is_full(&self) -> bool {
        matches!(
            self,
            Self::Store {
                source: StoreError::Full,
                ..
            }
        )
    }

    /// Whether the store itself failed (`repository-unreachable`).
    pub fn is_unreachable(&self) -> bool {
        matches!(
            self,
            Self::Store {
                source: StoreError::Io(_),
                ..
            }
        )
    }
}
