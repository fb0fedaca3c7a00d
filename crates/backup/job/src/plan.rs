//! Which kind of backup it will be, and why it is not incremental.
//!
//! The first line that holds gives the reason; if none holds, the backup is incremental.
//!
//! | # | what is so | reason |
//! |---|---|---|
//! | 1 | the repository has no image of the volume, and none is remembered | `first-backup` |
//! | 2 | a full backup was asked for | `asked` |
//! | 3 | another machine's claim or image is the volume's newest | `clone-detected` |
//! | 4 | the newest image, or something it needs, is gone | `base-image-gone` |
//! | 5 | the base has another block size | `block-size-changed` |
//! | 6 | the base has another size | `resized` |
//! | 7 | the base's device was another, or had other sectors | `device-changed` |
//! | 8 | the tracker is not trusted | the tracker's own reason |
//! | 9 | nothing tracks | `tracking-interrupted` |
//! | 10 | the tracker does not know the base's generation, and the newest image that is remembered is gone | `base-image-gone` |
//! | 11 | the tracker does not know the base's generation | `bitmap-stale` |
//!
//! Lines 1 to 7 are known before the snapshot begins, the others are the tracker's answer at its instant.
//!
//! **Invariant**: incremental needs a usable base of this volume, from this machine, of this geometry, and a trusted
//! tracker that knows the generation that opened at the base's instant. Anything in doubt is a full backup.

use crate::source::TrackerSays;
use blktide_format::manifest::ImageKind;
use blktide_types::geometry::Geometry;
use blktide_types::id::{GenerationName, HostId, ImageId};
use blktide_types::reason::Reason;

/// What a plan needs to know of an image that could be the base.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseFacts {
    /// Its id.
    pub image: ImageId,
    /// The machine that made it.
    pub host: HostId,
    /// The volume's shape then.
    pub geometry: Geometry,
    /// What identified the device, in words; empty if nothing did.
    pub device: String,
    /// The generation that opened at its instant; [`GenerationName::NONE`] where nothing tracked.
    pub generation: GenerationName,
}

/// What the repository has of the volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepositoryFacts {
    /// The newest image.
    pub newest: Newest,
    /// The machine of the volume's newest claim or image, if there is one.
    pub newest_host: Option<HostId>,
}

/// The newest image of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Newest {
    /// None was ever committed, as far as can be seen.
    None,
    /// It is there and lacks something that it needs.
    Unusable,
    /// It can be built on.
    Usable(BaseFacts),
}

/// What a plan rests on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlanFacts {
    /// `--full`.
    pub full_asked: bool,
    /// This machine.
    pub host: HostId,
    /// The volume's shape now.
    pub geometry: Geometry,
    /// What identifies the device, in words that a reboot does not change; empty if nothing does.
    pub device: String,
    /// What the repository has.
    pub repository: RepositoryFacts,
    /// The image that this machine remembers as the newest there (the tracker's hint), if any.
    pub remembered: Option<ImageId>,
}

/// What a backup will be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Its kind.
    pub kind: ImageKind,
    /// Why it is not incremental; `None` exactly for [`ImageKind::Incremental`].
    pub reason: Option<Reason>,
    /// What it builds on; `None` exactly for a full one.
    pub base: Option<BaseFacts>,
    /// Bytes that it reads from the volume.
    pub read_bytes: u64,
    /// Bytes that it stores at most: no block compresses, maps and manifest included.
    pub stored_bytes_max: u64,
}

/// The reason that is known before the tracker is asked, or the base to ask it for.
///
/// Errors: the reason (lines 1 to 7 of the table).
pub fn before_snapshot(facts: &PlanFacts) -> Result<&BaseFacts, Reason> {
    let repository = &facts.repository;
    if repository.newest == Newest::None && facts.remembered.is_none() {
        return Err(Reason::FirstBackup);
    }
    if facts.full_asked {
        return Err(Reason::Asked);
    }
    if repository.newest_host.is_some_and(|h| h != facts.host) {
        return Err(Reason::CloneDetected);
    }
    let Newest::Usable(base) = &repository.newest else {
        return Err(Reason::BaseImageGone);
    };
    if base.host != facts.host {
        return Err(Reason::CloneDetected);
    }
    let (then, now) = (base.geometry, facts.geometry);
    if then.block_size() != now.block_size() {
        return Err(Reason::BlockSizeChanged);
    }
    if then.volume_bytes() != now.volume_bytes() {
        return Err(Reason::Resized);
    }
    let device_known = !base.device.is_empty() && !facts.device.is_empty();
    if then.logical_sector_bytes() != now.logical_sector_bytes()
        || (device_known && base.device != facts.device)
    {
        return Err(Reason::DeviceChanged);
    }
    Ok(base)
}

/// The reason that the tracker's answer gives (lines 8 to 11); `None`: incremental on `base`.
pub fn after_snapshot(facts: &PlanFacts, base: &BaseFacts, tracker: TrackerSays) -> Option<Reason> {
    match tracker {
        TrackerSays::Distrusted(reason) => Some(reason),
        TrackerSays::Off => Some(Reason::TrackingInterrupted),
        TrackerSays::Unresolved => {
            let newer_gone = facts.remembered.is_some_and(|image| image != base.image);
            Some(if newer_gone {
                Reason::BaseImageGone
            } else {
                Reason::BitmapStale
            })
        }
        TrackerSays::Resolved if base.generation.is_none() => Some(Reason::BitmapStale),
        TrackerSays::Resolved => None,
    }
}

/// What a backup would be now. `tracker` is what it says for the base's generation, `changed_bytes` what it
/// counts since then (with what is absent in the base); both are looked at only if there is a base to ask for.
pub fn plan(facts: &PlanFacts, tracker: TrackerSays, changed_bytes: u64) -> Plan {
    let volume_bytes = facts.geometry.volume_bytes();
    let (reason, base) = match before_snapshot(facts) {
        Err(reason) => (Some(reason), None),
        Ok(base) => match after_snapshot(facts, base, tracker) {
            Some(reason) => (Some(reason), None),
            None => (None, Some(base.clone())),
        },
    };
    let read_bytes = if base.is_some() {
        changed_bytes.min(volume_bytes)
    } else {
        volume_bytes
    };
    Plan {
        kind: if base.is_some() {
            ImageKind::Incremental
        } else {
            ImageKind::Full
        },
        reason,
        base,
        read_bytes,
        stored_bytes_max: stored_bytes_max(&facts.geometry, read_bytes),
    }
}

/// The most that an image of `read_bytes` can take in the repository: nothing compresses and every block needs its own
/// pages up to the root.
pub(crate) fn stored_bytes_max(geometry: &Geometry, read_bytes: u64) -> u64 {
    /// Header of a frame, and its share of a full leaf.
    const PER_BLOCK: u64 = 256;
    /// A page of each level, for an incremental whose blocks lie far apart.
    const PAGES_PER_LEAF: u64 = 8192;
    /// Manifest, headers of packs, root.
    const FIXED: u64 = 64 << 10;
    let blocks = geometry.block_size().count_of(read_bytes).0;
    let leaves = blocks.min(geometry.block_count().0.div_ceil(64));
    read_bytes
        .saturating_add(blocks.saturating_mul(PER_BLOCK))
        .saturating_add(leaves.saturating_mul(PAGES_PER_LEAF))
        .saturating_add(FIXED)
}

#[cfg(test)]
mod tests;
