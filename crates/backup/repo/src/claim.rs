//! Claims and ends: how a backup gets a number, and how it becomes an image or does not (P13).
//!
//! ```text
//!   open ──▶ packs durable ──▶ manifest durable ──▶ end = committed    an image
//!     └────────────────────────────────────────────▶ end = abandoned    none, ever
//! ```
//! Every arrow is one create-if-absent. **Invariant**: of the two ends one exists, if any; nothing that a committed image
//! needs is ever deleted here, since packs are deleted only once `end = abandoned` is durable.

use crate::error::RepoError;
use crate::name;
use crate::pack::{NewEntry, PackFacts, Packs};
use crate::repository::Repository;
use crate::store::{Created, Store};
use blktide_format::claim::{ClaimFacts, EndFacts, Outcome, encode_claim, encode_end};
use blktide_format::entry::Place;
use blktide_types::clock::{Random, WallTime};
use blktide_types::id::{
    BootId, Digest, GenerationName, HostId, ImageId, ObjectId, SessionId, VolumeId,
};

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
    /// What it says.
    pub facts: ClaimFacts,
    /// What became of it.
    pub state: ClaimState,
}

impl ClaimEntry {
    /// The process that made it.
    pub const fn process(&self) -> ProcessMark {
        ProcessMark {
            boot: self.facts.boot,
            pid: self.facts.pid,
            start_time: self.facts.process_start,
        }
    }
}

/// A backup that has its number and is writing. Used by several threads at once. Dropped without an end it stays an
/// open claim that the next backup of the same machine gives up.
pub struct Session {
    repository: Repository,
    facts: ClaimFacts,
    neighbour: Option<HostId>,
    packs: Packs,
}

impl core::fmt::Debug for Session {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Session")
            .field("facts", &self.facts)
            .finish_non_exhaustive()
    }
}

/// Whether an object that was to be made is there, and whose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Made {
    /// Exactly these bytes, durable.
    Mine,
    /// Somebody else's.
    Theirs,
}

impl Session {
    pub(crate) fn begin(
        repository: &Repository,
        request: &ClaimRequest,
        random: &dyn Random,
    ) -> Result<Self, RepoError> {
        let mut facts = ClaimFacts {
            sequence: repository.newest_sequence(request.volume)?,
            session: SessionId(random.id()),
            volume: request.volume,
            volume_name: request.volume_name.clone(),
            host: request.host,
            host_name: request.host_name.clone(),
            boot: request.process.boot,
            pid: request.process.pid,
            process_start: request.process.start_time,
            base: request.base,
            generation: request.generation,
            time: request.now,
        };
        loop {
            facts.sequence = facts.sequence.saturating_add(1);
            let open = name::of_claim(facts.volume, facts.sequence, "open");
            let bytes = encode_claim(repository.id(), &facts);
            if make(&**repository.store(), &open, &bytes)? == Made::Mine {
                break;
            }
        }
        let neighbour = repository.host_before(facts.volume, facts.sequence)?;
        let packs = Packs::new(
            repository.store().clone(),
            repository.id(),
            facts.volume,
            facts.session,
        );
        Ok(Self {
            repository: repository.clone(),
            facts,
            neighbour,
            packs,
        })
    }

    /// What the claim says.
    pub const fn facts(&self) -> &ClaimFacts {
        &self.facts
    }

    /// The repository.
    pub const fn repository(&self) -> &Repository {
        &self.repository
    }

    /// The machine of the newest claim of the volume before this one, if there is one. Another machine than this: the
    /// volume has been cloned or moved, and this backup must share nothing with what is there (`clone-detected`).
    pub const fn neighbour(&self) -> Option<HostId> {
        self.neighbour
    }

    /// Appends an entry to a pack and says where it lies.
    ///
    /// Errors: the session can only be abandoned.
    pub fn append(&self, new: &NewEntry<'_>) -> Result<Place, RepoError> {
        self.packs.append(new)
    }

    /// Bytes appended so far.
    pub fn stored_bytes(&self) -> u64 {
        self.packs.stored_bytes()
    }

    /// Makes all packs durable and says what they are. After it nothing can be appended.
    pub fn seal(&self) -> Result<Vec<PackFacts>, RepoError> {
        self.packs.seal()
    }

    /// Stores the manifest, then makes the image visible. All packs are sealed before. Waits: for the store.
    ///
    /// Errors: `Abandoned`: somebody has given the session up. Any other: it is not known to be an image; [`Self::abandon`]
    /// finds out, and ends it if it is none.
    pub fn commit(
        &self,
        image: ImageId,
        manifest: &[u8],
        digest: Digest,
        now: WallTime,
    ) -> Result<(), RepoError> {
        let store = &**self.repository.store();
        // A repository that was exchanged or rolled back meanwhile has no claim of ours, or lacks the packs.
        if self
            .repository
            .claim_facts(self.facts.volume, self.facts.sequence)?
            != self.facts
        {
            return Err(RepoError::Abandoned);
        }
        let manifest_name = self.name_of("manifest");
        if make(store, &manifest_name, manifest)? == Made::Theirs {
            return Err(RepoError::Abandoned);
        }
        let end = EndFacts {
            sequence: self.facts.sequence,
            session: self.facts.session,
            outcome: Outcome::Committed { image, digest },
            writer: self.facts.session,
            time: now,
        };
        let bytes = encode_end(self.repository.id(), self.facts.volume, &end);
        match make(store, &self.name_of("end"), &bytes)? {
            Made::Mine => Ok(()),
            Made::Theirs => Err(RepoError::Abandoned),
        }
    }

    /// Ends it: no image, and what it wrote is deleted as far as that succeeds. Can be repeated. Waits: for the store.
    ///
    /// Returns false if it is an image after all (a commit whose reply was lost): then nothing has been deleted.
    /// Errors: the claim may still be open.
    pub fn abandon(&self, now: WallTime) -> Result<bool, RepoError> {
        let begun = self.packs.stop();
        if !give_up(&self.repository, &self.facts, self.facts.session, now)? {
            return Ok(false);
        }
        delete(&self.repository, &self.facts, &begun);
        Ok(true)
    }

    fn name_of(&self, what: &str) -> String {
        name::of_claim(self.facts.volume, self.facts.sequence, what)
    }
}

/// Makes `name` hold `bytes`, durably, unless somebody else's object is there. A lost reply is found out by reading back.
pub(crate) fn make(store: &dyn Store, name: &str, bytes: &[u8]) -> Result<Made, RepoError> {
    let first = match store.create(name, bytes) {
        Ok(Created::New) => return Ok(Made::Mine),
        Ok(Created::Existed) => None,
        Err(e) => Some(e),
    };
    // One byte more than ours: a longer object is not ours.
    let mut there = vec![0; bytes.len().saturating_add(1)];
    match store.get(name, 0, &mut there) {
        Ok(len) => {
            if there.get(..len) != Some(bytes) {
                // Theirs is durable only if a create has said so: what failed may have been just that.
                return match first.map(|first| (store.create(name, bytes), first)) {
                    None | Some((Ok(Created::Existed), _)) => Ok(Made::Theirs),
                    Some((Ok(Created::New), _)) => Ok(Made::Mine),
                    Some((Err(_), first)) => Err(RepoError::at("create", name)(first)),
                };
            }
        }
        Err(e) => return Err(RepoError::at("create", name)(first.unwrap_or(e))),
    }
    if let Some(first) = first {
        // It is ours, but what failed may have been what makes it durable. Creating it again tells.
        return match store.create(name, bytes) {
            Ok(_) => Ok(Made::Mine),
            Err(_) => Err(RepoError::at("create", name)(first)),
        };
    }
    Ok(Made::Mine)
}

/// Creates `end = abandoned`. False: the claim is an image.
pub(crate) fn give_up(
    repository: &Repository,
    claim: &ClaimFacts,
    writer: SessionId,
    now: WallTime,
) -> Result<bool, RepoError> {
    let end = EndFacts {
        sequence: claim.sequence,
        session: claim.session,
        outcome: Outcome::Abandoned,
        writer,
        time: now,
    };
    let bytes = encode_end(repository.id(), claim.volume, &end);
    let end_name = name::of_claim(claim.volume, claim.sequence, "end");
    match make(&**repository.store(), &end_name, &bytes)? {
        Made::Mine => Ok(true),
        Made::Theirs => match repository.end_facts(claim.volume, claim.sequence)? {
            Some(end) => Ok(end.outcome == Outcome::Abandoned),
            None => Err(RepoError::ClaimInUse),
        },
    }
}

/// Deletes what an abandoned session left. What cannot be deleted is for prune: no error.
pub(crate) fn delete(repository: &Repository, claim: &ClaimFacts, packs: &[ObjectId]) {
    let manifest = name::of_claim(claim.volume, claim.sequence, "manifest");
    let packs = packs.iter().map(|p| name::pack(claim.volume, *p));
    for name in packs.chain([manifest]) {
        if repository.store().delete(&name).is_err() {
            break;
        }
    }
}
