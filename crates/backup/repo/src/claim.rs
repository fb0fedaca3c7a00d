//! Claims and ends: how a backup gets a number, and how it becomes an image or does not (P13).
//!
//! ```text
//!   open ──▶ packs durable ──▶ manifest durable ──▶ end = committed    an image
//!     └────────────────────────────────────────────▶ end = abandoned    none, ever
//! ```

use crate::error::RepoError;
use crate::repository::Repository;
use blktide_types::clock::WallTime;
use blktide_types::id::{BootId, Digest, GenerationName, HostId, ImageId, SessionId, VolumeId};

/// A process, so that another one can see that it is dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessMark {
    /// The boot that it ran in.
    pub boot: BootId,
    /// Its number.
    pub pid: u32,
    /// When it started, in the kernel's ticks since the boot.
    pub start_time: u64,
}

/// What a claim says of who makes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClaimRequest {
    /// The volume.
    pub volume: VolumeId,
    /// Its name.
    pub volume_name: String,
    /// This machine.
    pub host: HostId,
    /// Its name.
    pub host_name: String,
    /// This process.
    pub process: ProcessMark,
    /// The image to build on, pinned by the claim: prune keeps what it needs.
    pub base: Option<(ImageId, u64)>,
    /// The tracker's open generation; none if nothing tracks.
    pub generation: GenerationName,
    /// Now.
    pub now: WallTime,
}

/// What became of a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClaimState {
    /// Neither committed nor given up.
    Open,
    /// An image; the digest is its manifest's prefix's.
    Committed(Digest),
    /// Given up.
    Abandoned,
}

/// A claim that lies in the repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClaimEntry {
    /// Its number.
    pub sequence: u64,
    /// The run that made it.
    pub session: SessionId,
    /// Who made it.
    pub request: ClaimRequest,
    /// What became of it.
    pub state: ClaimState,
}

/// A backup that has its number and is writing. Dropped without an end it stays an open claim that the next
/// backup of the same machine gives up.
#[derive(Debug)]
pub struct Session {
    repository: Repository,
    entry: ClaimEntry,
    /// The host of the newest other claim of the volume, if there is one: another than this machine means `clone-detected`.
    pub neighbour: Option<HostId>,
}

impl Session {
    /// The claim.
    pub const fn claim(&self) -> &ClaimEntry {
        &self.entry
    }

    /// The repository.
    pub const fn repository(&self) -> &Repository {
        &self.repository
    }

    /// Ends it: no image, and what it wrote is deleted as far as that succeeds. Waits: for the store.
    pub fn abandon(self) -> Result<(), RepoError> {
        Err(RepoError::Misuse("not built"))
    }
}
