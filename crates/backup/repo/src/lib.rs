//! A repository: objects, packs, claims and the commit.
//!
//! ```text
//!   Repository ── claim() ──▶ Session ── append()… ──▶ seal() ──▶ commit(manifest) ──▶ an image
//!       │                        │                                   └ end = committed, or abandon(): end = abandoned
//!       └ images(), resolve(), latest(), image()                every object by create-if-absent; nothing is replaced
//! ```
//!
//! Knows objects and places, not what blocks are: that is the crate `blktide-image`, on top of it.
//!
//! **Invariant**: an image is visible iff its `end` says `committed`, and then all that it needs is durable.
#![forbid(unsafe_code)]

pub mod claim;
pub mod error;
pub mod folder;
pub mod memory;
pub mod name;
pub mod pack;
pub mod repository;
pub mod store;
pub mod which;

pub use claim::{ClaimEntry, ClaimRequest, ClaimState, ProcessMark, Session};
pub use error::RepoError;
pub use folder::FolderStore;
pub use memory::MemoryStore;
pub use pack::{NewEntry, PackFacts};
pub use repository::{ImageEntry, Listing, Repository};
pub use store::{Created, Store, StoreError, Upload};
pub use which::Which;
