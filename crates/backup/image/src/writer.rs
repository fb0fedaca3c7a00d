//! Writing an image.

use crate::error::ImageError;
use crate::kind::BlockKind;
use crate::reader::ImageReader;
use blktide_format::manifest::{Consistency, Counters, ImageHead, ImageKind};
use blktide_repo::Session;
use blktide_types::clock::WallTime;
use blktide_types::geometry::Geometry;
use blktide_types::id::{Digest, GenerationName};
use blktide_types::range::BlockRange;
use blktide_types::reason::Reason;
use blktide_types::set::BlockSet;
use blktide_types::unit::BlockIndex;
use std::sync::Arc;

/// Answers for leaf `n` which of the blocks `64 n .. 64 n + 64` will be written, lowest block in the lowest bit: that is
/// word `n` of the wanted set. Must not change while the image is being written.
pub type WantedWords = Arc<dyn Fn(u64) -> u64 + Send + Sync>;

/// What a block is to be in the image.
#[derive(Clone, Copy, Debug)]
pub enum Content<'a> {
    /// These bytes (the block's true length: the volume's last block may be short). All zero is stored as zero.
    Bytes(&'a [u8]),
    /// The device could not read it.
    Unreadable,
    /// Unused, or dropped from the wanted set.
    Absent,
    /// Left out as asked.
    Excluded,
}

/// What a `put` did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stored {
    /// Blocks with content.
    pub data_blocks: u64,
    /// Blocks that were all zero.
    pub zero_blocks: u64,
    /// Bytes that the blocks take in the repository, pages not counted.
    pub stored_bytes: u64,
}

/// What a commit must be told beyond the claim's facts.
#[derive(Clone, Debug)]
pub struct ImageFacts {
    /// What identifies the device, in words.
    pub device: String,
    /// The generation that opened at the instant.
    pub generation: GenerationName,
    /// Kind.
    pub kind: ImageKind,
    /// Why it is not incremental.
    pub reason: Option<Reason>,
    /// Consistency of the instant.
    pub consistency: Consistency,
    /// The instant.
    pub instant: WallTime,
    /// Now.
    pub committed: WallTime,
    /// What was counted; `stored_bytes` is filled in here.
    pub counters: Counters,
    /// What the tracker claimed to have changed; `None` for a full image.
    pub changed: Option<BlockSet>,
    /// Evidence of the file system, opaque.
    pub evidence: Vec<u8>,
    /// Digest of the previous image's manifest ([`blktide_repo::ImageEntry::digest`]); `NONE` if there was none.
    pub previous: Digest,
}

/// An image that now exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Committed {
    /// Its facts as stored.
    pub head: ImageHead,
    /// Digest of its manifest's prefix.
    pub digest: Digest,
}

/// Writes an image. Used by several threads at once. Dropped without an end it leaves an open claim.
#[derive(Debug)]
pub struct ImageWriter {
    session: Session,
}

impl ImageWriter {
    /// Begins. With a base (same geometry) what is not wanted stays as it is there; without, it is absent.
    pub fn new(
        session: Session,
        geometry: Geometry,
        base: Option<Arc<ImageReader>>,
        wanted: WantedWords,
    ) -> Result<Self, ImageError> {
        let (_, _, _) = (geometry, base, wanted(0));
        Ok(Self { session })
    }

    /// Stores wanted blocks, each once: zero test, digest, frame, append, in the calling thread. Ascending in `blocks`;
    /// ≤ 1 MiB a call is best. Blocks of one leaf (64) are packed into frames together.
    ///
    /// Errors: the image cannot be made any more; abandon it.
    pub fn put(&self, blocks: &[(BlockIndex, Content<'_>)]) -> Result<Stored, ImageError> {
        let _ = blocks;
        Err(ImageError::Misuse("not built"))
    }

    /// Marks all wanted blocks of `range` as of one kind without content.
    pub fn mark(&self, range: BlockRange, kind: BlockKind) -> Result<(), ImageError> {
        let (_, _) = (range, kind);
        Err(ImageError::Misuse("not built"))
    }

    /// Bytes appended to packs so far, pages included.
    pub fn stored_bytes(&self) -> u64 {
        0
    }

    /// Makes everything durable, then the image visible. Waits: for the store.
    ///
    /// Errors: no image, unless the reply was lost *and* could not be read back; the session is abandoned as far as possible.
    pub fn commit(self, facts: ImageFacts) -> Result<Committed, ImageError> {
        let _ = facts;
        Err(ImageError::Misuse("not built"))
    }

    /// Gives it up: no image, packs deleted as far as possible. Waits: for the store.
    pub fn abandon(self) -> Result<(), ImageError> {
        Ok(self.session.abandon()?)
    }
}
