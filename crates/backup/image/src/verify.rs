//! Proving that an image can be restored.
//!
//! ```text
//!   each image, oldest first:  manifest, pack table ─▶ pages ─▶ frames          what an earlier one has shown is passed over
//!   each pack:                 every byte in a frame or page that was looked at, or else it is read from its start
//!   anything bad:              every image again, pages only, for the blocks that it loses by it
//! ```
//! Damage is collected as ranges; nothing stops at it.

use crate::error::ImageError;
use crate::reader::ImageReader;
use blktide_format::claim::Outcome;
use blktide_repo::{RepoError, Repository};
use blktide_types::id::{ObjectId, SessionId, VolumeId};
use blktide_types::range::BlockRange;
use packs::Packs;
use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

mod packs;
mod walk;

/// Something that is not as it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// The volume; `None` for the repository's own object.
    pub volume: Option<VolumeId>,
    /// Number of the image or claim; `None` for what no image needs.
    pub sequence: Option<u64>,
    /// The blocks of that image that are lost by it; `None` if it costs no block.
    pub range: Option<BlockRange>,
    /// The object.
    pub object: String,
    /// What is wrong.
    pub what: String,
}

/// What a verification found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Proof {
    /// Images looked at.
    pub images: u64,
    /// Bytes read from packs and checked.
    pub checked_bytes: u64,
    /// Whether all was looked at: `go_on` did not end it.
    pub is_complete: bool,
    /// All damage, by volume and number.
    pub damage: Vec<Damage>,
}

/// How deep to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// Every page and every small object; that packs exist with their size.
    Structure,
    /// Every stored byte.
    Data,
}

/// Looks at one image (`Some(volume, sequence)`) or at the whole repository, collects all damage and does not stop.
///
/// `threads` work at the data; `go_on` is told the bytes checked since it was last called, and ends the search by returning
/// false. Pages and frames that several images share are looked at once. Objects of sessions that were given up are not
/// looked at. Errors: the repository cannot be listed, or the one image does not exist.
pub fn verify(
    repository: &Repository,
    image: Option<(VolumeId, u64)>,
    depth: Depth,
    threads: usize,
    go_on: &(dyn Fn(u64) -> bool + Sync),
) -> Result<Proof, ImageError> {
    let search = Search {
        repository,
        depth,
        threads: threads.max(1),
        go_on,
        is_ended: AtomicBool::new(false),
        checked_bytes: AtomicU64::new(0),
        bad: Mutex::default(),
        damage: Mutex::default(),
        packs: Packs::default(),
    };
    let mut images = 0;
    if let Some((volume, sequence)) = image {
        if repository
            .image(volume, sequence)
            .is_ok_and(|i| i.is_none())
        {
            return Err(RepoError::NoImage.into());
        }
        images = search.volume(volume, &[sequence], false);
    } else {
        if let Err(e) = Repository::open(repository.store().clone()) {
            search.note(None, None, None, &e);
        }
        for volume in repository.volumes()? {
            let sequences = repository.sequences(volume)?;
            images += search.volume(volume, &sequences, true);
        }
    }
    let mut damage = search
        .damage
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    damage.sort_by_key(|d| {
        (
            d.volume,
            d.sequence,
            d.range.map(BlockRange::start),
            d.object.clone(),
        )
    });
    damage.dedup();
    Ok(Proof {
        images,
        checked_bytes: search.checked_bytes.into_inner(),
        is_complete: !search.is_ended.into_inner(),
        damage: joined(damage),
    })
}

struct Search<'a> {
    repository: &'a Repository,
    depth: Depth,
    threads: usize,
    go_on: &'a (dyn Fn(u64) -> bool + Sync),
    is_ended: AtomicBool,
    checked_bytes: AtomicU64,
    /// Entries that are damaged, with why.
    bad: Mutex<BTreeMap<(ObjectId, u32), (String, String)>>,
    damage: Mutex<Vec<Damage>>,
    packs: Packs,
}

impl Search<'_> {
    /// Images of one volume, ascending. `is_all`: these are all that there are. Returns how many there were.
    fn volume(&self, volume: VolumeId, sequences: &[u64], is_all: bool) -> u64 {
        let mut images = 0;
        let mut seen = BTreeSet::new();
        let mut readers = Vec::new();
        let newest = sequences.iter().rev().find(|s| {
            let end = self.repository.end_facts(volume, **s).ok().flatten();
            end.is_some_and(|e| matches!(e.outcome, Outcome::Committed { .. }))
        });
        self.packs.clear();
        for sequence in sequences {
            if self.is_ended() {
                return images;
            }
            let session = is_all.then(|| self.claim(volume, *sequence)).flatten();
            let reader = match ImageReader::open(self.repository, volume, *sequence) {
                Ok(reader) => reader,
                Err(ImageError::Repository(RepoError::NoImage)) => continue,
                Err(e) => {
                    images += 1;
                    self.note(Some(volume), Some(*sequence), None, &e);
                    continue;
                }
            };
            images += 1;
            if session.is_some_and(|s| s != reader.head().session) {
                let field = blktide_format::FormatError::Identity { field: "session" };
                self.note(Some(volume), Some(*sequence), None, &field);
            }
            self.manifest(&reader);
            walk::image(self, &reader, &seen, newest == Some(sequence));
            seen.insert(walk::session_of(ObjectId(reader.head().session.0)));
            readers.push(*sequence);
        }
        if is_all && self.depth == Depth::Data {
            packs::scan_rest(self, volume);
        }
        if !lock(&self.bad).is_empty() {
            for sequence in readers {
                if let Ok(reader) = ImageReader::open(self.repository, volume, sequence) {
                    walk::attribute(self, &reader);
                }
            }
            lock(&self.bad).clear();
        }
        images
    }

    /// A claim and its end. Returns the claim's session.
    fn claim(&self, volume: VolumeId, sequence: u64) -> Option<SessionId> {
        match self.repository.claim_entry(volume, sequence) {
            Ok(entry) => return Some(entry.facts.session),
            Err(RepoError::NoImage) => {
                // A folder alone is what a cut leaves that came before the claim.
                if !matches!(self.repository.end_facts(volume, sequence), Ok(None)) {
                    self.note(Some(volume), Some(sequence), None, &RepoError::NoImage);
                }
            }
            Err(e) => self.note(Some(volume), Some(sequence), None, &e),
        }
        None
    }

    /// All of a manifest behind its prefix, and that the packs it names are there.
    fn manifest(&self, reader: &ImageReader) {
        let head = reader.head();
        let at = (Some(head.volume), Some(head.sequence));
        for error in reader.check_manifest() {
            self.note(at.0, at.1, None, &error);
        }
        let Ok(rows) = reader.packs() else {
            return;
        };
        for row in rows {
            let pack = blktide_repo::name::pack(head.volume, row.pack);
            match self.repository.size(&pack) {
                Ok(Some(bytes)) if bytes == row.bytes => {}
                Ok(found) => {
                    let wrong = blktide_format::FormatError::Length {
                        need: row.bytes,
                        have: found.unwrap_or(0),
                    };
                    self.note_object(at.0, at.1, pack, &wrong);
                }
                Err(e) => self.note(at.0, at.1, None, &e),
            }
            if self.depth == Depth::Data && !self.packs.expect(&row) {
                let other = blktide_format::FormatError::Identity { field: "pack row" };
                self.note_object(
                    at.0,
                    at.1,
                    self.repository.manifest_name(head.volume, head.sequence),
                    &other,
                );
            }
        }
    }

    fn is_ended(&self) -> bool {
        self.is_ended.load(Ordering::Relaxed)
    }

    /// Counts bytes that were checked; false: enough.
    fn count(&self, bytes: u64) -> bool {
        self.checked_bytes.fetch_add(bytes, Ordering::Relaxed);
        if !(self.go_on)(bytes) {
            self.is_ended.store(true, Ordering::Relaxed);
        }
        !self.is_ended()
    }

    fn note(
        &self,
        volume: Option<VolumeId>,
        sequence: Option<u64>,
        range: Option<BlockRange>,
        error: &(dyn Error + 'static),
    ) {
        let object = object_of(error).unwrap_or_else(|| match (volume, sequence) {
            (Some(volume), Some(sequence)) => self.repository.manifest_name(volume, sequence),
            (Some(_), None) | (None, _) => "repository".to_owned(),
        });
        lock(&self.damage).push(Damage {
            volume,
            sequence,
            range,
            object,
            what: chain(error),
        });
    }

    fn note_object(
        &self,
        volume: Option<VolumeId>,
        sequence: Option<u64>,
        object: String,
        error: &(dyn Error + 'static),
    ) {
        lock(&self.damage).push(Damage {
            volume,
            sequence,
            range: None,
            object,
            what: chain(error),
        });
    }

    /// An entry that is damaged: which images lose what by it is found out at the end.
    fn spoil(&self, pack: ObjectId, offset_bytes: u32, error: &ImageError) {
        let object = object_of(error).unwrap_or_default();
        let why = (object, what_of(error));
        lock(&self.bad).insert((pack, offset_bytes), why);
    }
}

/// Neighbouring ranges of one image and one cause as one.
fn joined(damage: Vec<Damage>) -> Vec<Damage> {
    let mut out: Vec<Damage> = Vec::new();
    for next in damage {
        if let Some(last) = out.last_mut()
            && last.volume == next.volume
            && last.sequence == next.sequence
            && last.object == next.object
            && last.what == next.what
            && let (Some(a), Some(b)) = (last.range, next.range)
            && a.end() >= b.start()
        {
            last.range = BlockRange::new(a.start(), a.end().max(b.end()));
            continue;
        }
        out.push(next);
    }
    out
}

/// The object that an error is about.
fn object_of(error: &(dyn Error + 'static)) -> Option<String> {
    if let Some(ImageError::Damaged { object, .. }) = error.downcast_ref() {
        return Some(object.clone());
    }
    let repo = match error.downcast_ref() {
        Some(ImageError::Repository(repo)) => Some(repo),
        Some(
            ImageError::Damaged { .. }
            | ImageError::Compress(_)
            | ImageError::Incomplete { .. }
            | ImageError::Spool { .. }
            | ImageError::Misuse(_),
        )
        | None => error.downcast_ref(),
    };
    match repo {
        Some(RepoError::Damaged { name, .. } | RepoError::Store { name, .. }) => Some(name.clone()),
        Some(_) | None => None,
    }
}

/// What is wrong, without the blocks, which a [`Damage`] names itself.
fn what_of(error: &ImageError) -> String {
    match error {
        ImageError::Damaged { what, source, .. } => match source {
            Some(source) => format!("{what}: {source}"),
            None => (*what).to_owned(),
        },
        ImageError::Repository(_)
        | ImageError::Compress(_)
        | ImageError::Incomplete { .. }
        | ImageError::Spool { .. }
        | ImageError::Misuse(_) => chain(error),
    }
}

/// An error and all below it.
fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text = format!("{text}: {source}");
        next = source.source();
    }
    text
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
