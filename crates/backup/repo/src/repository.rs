//! A repository as it is read: its own object, its images, its claims.

use crate::claim::{self, ClaimEntry, ClaimRequest, ClaimState, ProcessMark, Session};
use crate::error::RepoError;
use crate::name;
use crate::store::{Created, Store, StoreError};
use blktide_format::claim::{ClaimFacts, EndFacts, Outcome, decode_claim, decode_end};
use blktide_format::manifest::{ImageHead, PREFIX_BYTES, Prefix, decode_prefix};
use blktide_format::object::{BODY_BYTES_MAX, is_of_session};
use blktide_format::repository::{self, RepositoryFacts};
use blktide_types::clock::{Random, WallTime};
use blktide_types::id::{
    Digest, DigestDomainId, HostId, ObjectId, RepositoryId, SessionId, VolumeId,
};
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
    facts: RepositoryFacts,
}

impl core::fmt::Debug for Repository {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Repository({})", self.facts.id)
    }
}

impl Repository {
    /// Makes a repository in a store that has none. Errors: `Exists`.
    pub fn init(
        store: Arc<dyn Store>,
        random: &dyn Random,
        now: WallTime,
    ) -> Result<Self, RepoError> {
        let mut domain_key = [0; 32];
        random.fill(&mut domain_key);
        let facts = RepositoryFacts {
            id: RepositoryId(random.id()),
            domain: DigestDomainId(random.id()),
            domain_key,
            created: now,
        };
        let bytes = repository::encode(&facts);
        match store
            .create(repository::NAME, &bytes)
            .map_err(RepoError::at("create", repository::NAME))?
        {
            Created::New => Ok(Self { store, facts }),
            Created::Existed => Err(RepoError::Exists),
        }
    }

    /// Opens the one that is there. Cost: one read.
    pub fn open(store: Arc<dyn Store>) -> Result<Self, RepoError> {
        let Some(bytes) = read_small(&*store, repository::NAME)? else {
            return Err(RepoError::NotARepository);
        };
        let facts = repository::decode(&bytes).map_err(RepoError::damaged(repository::NAME))?;
        Ok(Self { store, facts })
    }

    /// Its id.
    pub const fn id(&self) -> RepositoryId {
        self.facts.id
    }

    /// What its own object says.
    pub const fn facts(&self) -> &RepositoryFacts {
        &self.facts
    }

    /// The store it lies in.
    pub const fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// Volumes that it has claims of. Cost: one listing.
    pub fn volumes(&self) -> Result<Vec<VolumeId>, RepoError> {
        let mut volumes: Vec<VolumeId> = self
            .list(name::VOLUMES)?
            .iter()
            .filter_map(|n| n.parse().ok().filter(|id: &VolumeId| id.to_string() == *n))
            .collect();
        volumes.sort_unstable();
        Ok(volumes)
    }

    /// All images of all volumes. Cost: two small reads an image.
    pub fn images(&self) -> Result<Listing, RepoError> {
        let mut all = Listing::default();
        for volume in self.volumes()? {
            let of_volume = self.images_of(volume)?;
            all.images.extend(of_volume.images);
            all.damage.extend(of_volume.damage);
        }
        Ok(all)
    }

    /// All images of one volume, by number.
    pub fn images_of(&self, volume: VolumeId) -> Result<Listing, RepoError> {
        let mut listing = Listing::default();
        for sequence in self.sequences(volume)? {
            match self.image(volume, sequence) {
                Ok(Some(entry)) => listing.images.push(entry),
                Ok(None) => {}
                Err(e) => listing.damage.push(e),
            }
        }
        Ok(listing)
    }

    /// The newest image of `volume`: the highest committed number. Errors: `Damaged` if its end or manifest is.
    pub fn latest(&self, volume: VolumeId) -> Result<Option<ImageEntry>, RepoError> {
        for sequence in self.sequences(volume)?.into_iter().rev() {
            if let Some(entry) = self.image(volume, sequence)? {
                return Ok(Some(entry));
            }
        }
        Ok(None)
    }

    /// The image of this number, or `None` if the number is nobody's, still open, or given up. Cost: two small reads.
    pub fn image(&self, volume: VolumeId, sequence: u64) -> Result<Option<ImageEntry>, RepoError> {
        Ok(self
            .prefix(volume, sequence)?
            .map(|(prefix, digest)| ImageEntry {
                head: prefix.head,
                digest,
            }))
    }

    /// The prefix of an image's manifest and its digest, checked against the image's end.
    pub fn prefix(
        &self,
        volume: VolumeId,
        sequence: u64,
    ) -> Result<Option<(Prefix, Digest)>, RepoError> {
        let Some(end) = self.end_facts(volume, sequence)? else {
            return Ok(None);
        };
        let Outcome::Committed { image, digest } = end.outcome else {
            return Ok(None);
        };
        let manifest = name::of_claim(volume, sequence, "manifest");
        let mut bytes = vec![0; PREFIX_BYTES];
        let len = match self.store.get(&manifest, 0, &mut bytes) {
            Ok(len) => len,
            // Its end vouches for it: it was there.
            Err(StoreError::NotFound) => 0,
            Err(e) => return Err(RepoError::at("read", &manifest)(e)),
        };
        bytes.truncate(len);
        let prefix = decode_prefix(&bytes, self.facts.id, volume, sequence)
            .map_err(RepoError::damaged(&manifest))?;
        let found = Digest(*blake3::hash(&bytes).as_bytes());
        let head = &prefix.head;
        let fits = found == digest && head.image == image && head.session == end.session;
        let of_domain = head.domain == self.facts.domain;
        if !fits || !of_domain {
            let field = if fits { "digest domain" } else { "digest" };
            let source = blktide_format::FormatError::Identity { field };
            return Err(RepoError::damaged(&manifest)(source));
        }
        Ok(Some((prefix, digest)))
    }

    /// Reads a part of an image's manifest; fewer bytes than asked for: it is cut off.
    pub fn manifest_part(
        &self,
        volume: VolumeId,
        sequence: u64,
        offset_bytes: u64,
        buf: &mut [u8],
    ) -> Result<usize, RepoError> {
        self.read(&self.manifest_name(volume, sequence), offset_bytes, buf)
    }

    /// Name of an image's manifest.
    pub fn manifest_name(&self, volume: VolumeId, sequence: u64) -> String {
        name::of_claim(volume, sequence, "manifest")
    }

    /// Length of an object, or `None` if there is none.
    pub fn size(&self, name: &str) -> Result<Option<u64>, RepoError> {
        self.store
            .size(name)
            .map_err(RepoError::at("look up", name))
    }

    /// Reads a part of a pack; fewer bytes than asked for: it ends there.
    pub fn pack_part(
        &self,
        volume: VolumeId,
        pack: ObjectId,
        offset_bytes: u64,
        buf: &mut [u8],
    ) -> Result<usize, RepoError> {
        self.read(&name::pack(volume, pack), offset_bytes, buf)
    }

    /// Whether an image is marked to be pruned: nothing may be built on it any more.
    pub fn is_forgotten(&self, volume: VolumeId, sequence: u64) -> Result<bool, RepoError> {
        let mark = name::of_claim(volume, sequence, "forgotten");
        Ok(self.size(&mark)?.is_some())
    }

    /// The claims of `volume`, by number. Errors: `Damaged` if one is.
    pub fn claims(&self, volume: VolumeId) -> Result<Vec<ClaimEntry>, RepoError> {
        let mut claims = Vec::new();
        for sequence in self.sequences(volume)? {
            claims.push(self.claim_entry(volume, sequence)?);
        }
        Ok(claims)
    }

    /// The claim of this number and what became of it.
    pub fn claim_entry(&self, volume: VolumeId, sequence: u64) -> Result<ClaimEntry, RepoError> {
        let facts = self.claim_facts(volume, sequence)?;
        let end = self.end_facts(volume, sequence)?;
        let state = match end.map(|e| (e.session == facts.session, e.outcome)) {
            None => ClaimState::Open,
            Some((true, Outcome::Committed { digest, .. })) => ClaimState::Committed(digest),
            Some((true, Outcome::Abandoned)) => ClaimState::Abandoned,
            Some((false, _)) => {
                let end = name::of_claim(volume, sequence, "end");
                let source = blktide_format::FormatError::Identity { field: "session" };
                return Err(RepoError::damaged(&end)(source));
            }
        };
        Ok(ClaimEntry { facts, state })
    }

    /// Takes the next number. Waits: a flush or two. The base, if any, is pinned; it must be checked *after* this, by
    /// opening it as a base (blktide-image), so that prune and this backup see each other.
    pub fn claim(&self, request: &ClaimRequest, random: &dyn Random) -> Result<Session, RepoError> {
        Session::begin(self, request, random)
    }

    /// Gives up open claims of `host` whose process `is_alive` denies, and deletes their packs. Returns their numbers.
    /// Damaged claims are passed over. Cost: a listing, two small reads a claim.
    pub fn abandon_dead(
        &self,
        volume: VolumeId,
        host: HostId,
        now: WallTime,
        is_alive: &dyn Fn(&ProcessMark) -> bool,
    ) -> Result<Vec<u64>, RepoError> {
        let mut given_up = Vec::new();
        for sequence in self.sequences(volume)? {
            // The end first: of most claims it is there, and then the claim need not be read.
            match self.end_facts(volume, sequence) {
                Ok(None) => {}
                Ok(Some(_)) | Err(RepoError::Damaged { .. }) => continue,
                Err(e) => return Err(e),
            }
            let entry = match self.claim_entry(volume, sequence) {
                Ok(entry) => entry,
                Err(RepoError::Damaged { .. } | RepoError::NoImage) => continue,
                Err(e) => return Err(e),
            };
            let is_dead = entry.facts.host == host && !is_alive(&entry.process());
            if entry.state == ClaimState::Open && is_dead {
                self.abandon(volume, sequence, now)?;
                given_up.push(sequence);
            }
        }
        Ok(given_up)
    }

    /// Gives up an open claim, whoever made it (`repo unlock`; the caller has made sure that it is dead), and deletes what
    /// it left. Errors: `ClaimInUse` if it has become an image.
    pub fn abandon(&self, volume: VolumeId, sequence: u64, now: WallTime) -> Result<(), RepoError> {
        let facts = self.claim_facts(volume, sequence)?;
        if !claim::give_up(self, &facts, SessionId::NONE, now)? {
            return Err(RepoError::ClaimInUse);
        }
        if self.has_image_above(volume, sequence)? {
            // An image that was built on this one, while its end could still be seen, may need its packs: they are for prune.
            return Ok(());
        }
        let packs = self.packs_of(volume, facts.session)?;
        claim::delete(self, &facts, &packs);
        Ok(())
    }

    /// Whether a number above `sequence` is an image, or cannot be told not to be one.
    fn has_image_above(&self, volume: VolumeId, sequence: u64) -> Result<bool, RepoError> {
        let mut above = self
            .sequences(volume)?
            .into_iter()
            .filter(|s| *s > sequence);
        Ok(above.any(|s| match self.end_facts(volume, s) {
            Ok(Some(end)) => end.outcome != Outcome::Abandoned,
            Ok(None) => false,
            Err(_) => true,
        }))
    }

    /// Makes sure that the end of an image is durable, not only visible: whoever made it may have died before its folder
    /// was synced. Before anything is built on it. Waits: for a flush.
    ///
    /// Errors: `NoImage` if it is gone; the store's: then it may not be built on.
    pub fn vouch_for_end(&self, volume: VolumeId, sequence: u64) -> Result<(), RepoError> {
        let end = name::of_claim(volume, sequence, "end");
        let Some(bytes) = read_small(&*self.store, &end)? else {
            return Err(RepoError::NoImage);
        };
        match claim::make(&*self.store, &end, &bytes)? {
            claim::Made::Mine => Ok(()),
            claim::Made::Theirs => Err(RepoError::NoImage),
        }
    }

    /// Packs that bear a session's id. From listings: some may be missing.
    pub fn packs_of(
        &self,
        volume: VolumeId,
        session: SessionId,
    ) -> Result<Vec<ObjectId>, RepoError> {
        let folder = name::packs(volume);
        let mut packs = Vec::new();
        for part in self.list(&folder)? {
            let names = self.list(&format!("{folder}/{part}"))?;
            let ids = names.iter().filter_map(|n| n.parse::<ObjectId>().ok());
            packs.extend(ids.filter(|id| is_of_session(*id, session)));
        }
        packs.sort_unstable();
        Ok(packs)
    }

    /// Numbers that are claimed, ascending. The listing is a hint: what follows its highest is probed by name.
    pub fn sequences(&self, volume: VolumeId) -> Result<Vec<u64>, RepoError> {
        let listed = self.list(&name::volume(volume))?;
        let mut numbers: Vec<u64> = listed.iter().filter_map(|n| name::sequence(n)).collect();
        numbers.sort_unstable();
        let mut next = numbers.last().copied().unwrap_or(0).saturating_add(1);
        while self.size(&name::of_claim(volume, next, "open"))?.is_some() {
            numbers.push(next);
            next = next.saturating_add(1);
        }
        Ok(numbers)
    }

    pub(crate) fn newest_sequence(&self, volume: VolumeId) -> Result<u64, RepoError> {
        Ok(self.sequences(volume)?.last().copied().unwrap_or(0))
    }

    /// The machine of the newest readable claim below `sequence`.
    pub(crate) fn host_before(
        &self,
        volume: VolumeId,
        sequence: u64,
    ) -> Result<Option<HostId>, RepoError> {
        for number in self.sequences(volume)?.into_iter().rev() {
            if number >= sequence {
                continue;
            }
            match self.claim_facts(volume, number) {
                Ok(facts) => return Ok(Some(facts.host)),
                // A folder without a claim, or a damaged one, tells nothing: the one before it may.
                Err(RepoError::NoImage | RepoError::Damaged { .. }) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(None)
    }

    /// What the claim of this number says. Errors: `NoImage` if there is none.
    pub fn claim_facts(&self, volume: VolumeId, sequence: u64) -> Result<ClaimFacts, RepoError> {
        let open = name::of_claim(volume, sequence, "open");
        let Some(bytes) = read_small(&*self.store, &open)? else {
            return Err(RepoError::NoImage);
        };
        decode_claim(&bytes, self.facts.id, volume, sequence).map_err(RepoError::damaged(&open))
    }

    /// What the end of this number says; `None` if there is none.
    pub fn end_facts(
        &self,
        volume: VolumeId,
        sequence: u64,
    ) -> Result<Option<EndFacts>, RepoError> {
        let end = name::of_claim(volume, sequence, "end");
        let Some(bytes) = read_small(&*self.store, &end)? else {
            return Ok(None);
        };
        let facts = decode_end(&bytes, self.facts.id, volume, sequence)
            .map_err(RepoError::damaged(&end))?;
        Ok(Some(facts))
    }

    fn list(&self, folder: &str) -> Result<Vec<String>, RepoError> {
        self.store
            .list(folder)
            .map_err(RepoError::at("list", folder))
    }

    fn read(&self, name: &str, offset_bytes: u64, buf: &mut [u8]) -> Result<usize, RepoError> {
        self.store
            .get(name, offset_bytes, buf)
            .map_err(RepoError::at("read", name))
    }
}

/// A whole small object; `None` if there is none. A longer one is cut, and its decoder refuses it.
fn read_small(store: &dyn Store, name: &str) -> Result<Option<Vec<u8>>, RepoError> {
    let mut bytes = vec![0; BODY_BYTES_MAX];
    match store.get(name, 0, &mut bytes) {
        Ok(len) => {
            bytes.truncate(len);
            Ok(Some(bytes))
        }
        Err(StoreError::NotFound) => Ok(None),
        Err(e) => Err(RepoError::at("read", name)(e)),
    }
}
