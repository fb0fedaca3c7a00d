//! The facts of an image, as its manifest's head holds them.

use crate::page::BlockKind;
use blktide_types::clock::WallTime;
use blktide_types::geometry::Geometry;
use blktide_types::id::{
    Digest, DigestDomainId, GenerationName, HostId, ImageId, SessionId, VolumeId,
};
use blktide_types::reason::Reason;

/// What a backup read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ImageKind {
    /// Everything, sharing nothing with an earlier image.
    Full = 1,
    /// What changed since the base.
    Incremental = 2,
    /// Everything, storing what differs from the base. Not written yet.
    Digest = 3,
}

/// How consistent the instant was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Consistency {
    /// The volume was not mounted.
    Unmounted = 1,
    /// The file system was frozen.
    Frozen = 2,
    /// As after a power cut.
    Instant = 3,
    /// None.
    None = 4,
}

/// What a backup counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Bytes read from the volume.
    pub read_bytes: u64,
    /// Bytes of the blocks that the tracker called changed.
    pub changed_bytes: u64,
    /// Bytes added to the repository, the manifest not counted.
    pub stored_bytes: u64,
    /// Bytes of originals that were preserved for it.
    pub preserved_bytes: u64,
    /// How long the backup took, nanoseconds.
    pub duration_ns: u64,
    /// The longest that a write waited for it, nanoseconds.
    pub longest_wait_ns: u64,
    /// The longest freeze, nanoseconds.
    pub longest_freeze_ns: u64,
}

/// How many blocks of an image are of each kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KindCounts {
    /// With content.
    pub data: u64,
    /// All zero.
    pub zero: u64,
    /// Not read because unused.
    pub absent: u64,
    /// Left out as asked.
    pub excluded: u64,
    /// The device could not read them.
    pub unreadable: u64,
}

/// The facts of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageHead {
    /// This image.
    pub image: ImageId,
    /// The volume.
    pub volume: VolumeId,
    /// Name that the volume had.
    pub volume_name: String,
    /// The machine.
    pub host: HostId,
    /// Its name.
    pub host_name: String,
    /// What identifies the device, in words (cut to 128 bytes); compared for `device-changed`.
    pub device: String,
    /// The run that wrote it.
    pub session: SessionId,
    /// Number of the image: the sequence of its claim.
    pub sequence: u64,
    /// Digest of the previous image's manifest of this volume; [`Digest::NONE`] if there was none.
    pub previous: Digest,
    /// The image that it shares blocks with, and its sequence.
    pub base: Option<(ImageId, u64)>,
    /// Digest of what all blocks are (P11).
    pub state: Digest,
    /// The base's; [`Digest::NONE`] without one.
    pub base_state: Digest,
    /// The generation that opened at the instant; none if nothing tracks the volume.
    pub generation: GenerationName,
    /// Key of the digests.
    pub domain: DigestDomainId,
    /// Shape of the volume.
    pub geometry: Geometry,
    /// Kind.
    pub kind: ImageKind,
    /// Why it is not incremental.
    pub reason: Option<Reason>,
    /// Consistency of the instant.
    pub consistency: Consistency,
    /// The instant; shown, never used for order.
    pub instant: WallTime,
    /// When it was committed; shown, never used for order.
    pub committed: WallTime,
    /// What the backup counted.
    pub counters: Counters,
    /// Blocks of each kind.
    pub kinds: KindCounts,
}

impl KindCounts {
    /// All blocks.
    pub fn total(&self) -> Option<u64> {
        self.data
            .checked_add(self.zero)?
            .checked_add(self.absent)?
            .checked_add(self.excluded)?
            .checked_add(self.unreadable)
    }

    /// The count of `kind`.
    pub const fn of_mut(&mut self, kind: BlockKind) -> &mut u64 {
        match kind {
            BlockKind::Absent => &mut self.absent,
            BlockKind::Zero => &mut self.zero,
            BlockKind::Data => &mut self.data,
            BlockKind::Excluded => &mut self.excluded,
            BlockKind::Unreadable => &mut self.unreadable,
        }
    }
}
