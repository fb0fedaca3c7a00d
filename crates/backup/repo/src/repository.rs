//! A repository as it is read: its own object, its images, its claims.

use crate::claim::{ClaimEntry, ClaimRequest, ProcessMark, Session};
use crate::error::RepoError;
use crate::store::Store;
use crate::which::Which;
use blktide_format::manifest::ImageHead;
use blktide_types::clock::{Random, WallTime};
use blktide_types::id::{Digest, HostId, RepositoryId, VolumeId};
use std::sync::Arc;

/// An image as a listing shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageEntry {
    /// Its facts.
    pub head: ImageHead,
    /// Digest of its manifest's prefix.
    pub digest: Digest,
}

/// Images, and what could not be listed.
#[derive(Debug, Default)]
pub struct Listing {
    /// Images by volume, then number.
    pub images: Vec<ImageEntry>,
    /// Manifests and ends that could not be read: the images are there and damaged, or the store failed.
    pub damage: Vec<RepoError>,
}

/// An open repository. Cheap to clone; used by several threads at once.
#[derive(Clone)]
pub struct Repository {
    store: Arc<dyn Store>,
    id: RepositoryId,
}

impl core::fmt::Debug for Repository {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Repository({})", self.id)
    }
}

impl Repository {
    /// Makes a repository in an empty store.
    pub fn init(
        store: Arc<dyn Store>,
        random: &dyn Random,
        now: WallTime,
    ) -> Result<Self, RepoError> {
        let (_, _, _) = (store, random.id(), now);
        Err(RepoError::Misuse("not built"))
    }

    /// Opens the one that is there. Cost: one read.
    pub fn open(store: Arc<dyn Store>) -> Result<Self, RepoError> {
        let _ = store;
        Err(RepoError::Misuse("not built"))
    }

    /// Its id.
    pub const fn id(&self) -> RepositoryId {
        self.id
    }

    /// The store it lies in.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// Volumes that it has claims of. Cost: one listing.
    pub fn volumes(&self) -> Result<Vec<VolumeId>, RepoError> {
        Err(RepoError::Misuse("not built"))
    }

    /// All images of all volumes. Cost: two small reads an image.
    pub fn images(&self) -> Result<Listing, RepoError> {
        Err(RepoError::Misuse("not built"))
    }

    /// All images of one volume, by number.
    pub fn images_of(&self, volume: VolumeId) -> Result<Listing, RepoError> {
        let _ = volume;
        Err(RepoError::Misuse("not built"))
    }

    /// The newest image of `volume`: the highest committed number. Errors: `Damaged` if its end or manifest is.
    pub fn latest(&self, volume: VolumeId) -> Result<Option<ImageEntry>, RepoError> {
        let _ = volume;
        Err(RepoError::Misuse("not built"))
    }

    /// The image that a name means. `host`: name or id of the machine; `None`: any. Errors: `NoImage`, `Ambiguous`.
    pub fn resolve(
        &self,
        host: Option<&str>,
        volume_name: &str,
        which: Which,
    ) -> Result<ImageEntry, RepoError> {
        let (_, _, _) = (host, volume_name, which);
        Err(RepoError::Misuse("not built"))
    }

    /// The claims of `volume`, by number.
    pub fn claims(&self, volume: VolumeId) -> Result<Vec<ClaimEntry>, RepoError> {
        let _ = volume;
        Err(RepoError::Misuse("not built"))
    }

    /// Takes the next number. Waits: a flush or two. The base (if any) is pinned and must be checked after this, by
    /// opening it ([`blktide_image`'s `ImageReader::open_base`]).
    pub fn claim(&self, request: ClaimRequest, random: &dyn Random) -> Result<Session, RepoError> {
        let (_, _) = (request, random.id());
        Err(RepoError::Misuse("not built"))
    }

    /// Gives up open claims of `host` whose process `alive` denies, and deletes their packs. Returns their numbers.
    pub fn abandon_dead(
        &self,
        volume: VolumeId,
        host: HostId,
        alive: &dyn Fn(&ProcessMark) -> bool,
    ) -> Result<Vec<u64>, RepoError> {
        let (_, _) = (
            volume,
            alive(&ProcessMark {
                boot: blktide_types::id::BootId(host.0),
                pid: 0,
                start_time: 0,
            }),
        );
        Err(RepoError::Misuse("not built"))
    }

    /// Gives up an open claim, whoever made it (`repo unlock`; the caller has made sure that it is dead).
    pub fn abandon(&self, volume: VolumeId, sequence: u64) -> Result<(), RepoError> {
        let (_, _) = (volume, sequence);
        Err(RepoError::Misuse("not built"))
    }
}
