//! Writing an image: blocks in, by several threads; a tree and a manifest out.
//!
//! ```text
//!   put ─▶ claimed in its leaf ─▶ zero test, digest, frame ─▶ appended ─▶ recorded in its leaf
//!                                                                          └ last one of the leaf: page (`tree`)
//! ```
//! Memory: the leaves that are begun and not complete, one page a level, the pack table. With blocks put nearly ascending
//! that does not grow with the volume.

use crate::error::ImageError;
use crate::reader::ImageReader;
use blktide_format::entry::FAN_OUT;
use blktide_format::manifest::{Consistency, Counters, ImageHead, ImageKind};
use blktide_format::page::BlockKind;
use blktide_repo::Session;
use blktide_types::clock::WallTime;
use blktide_types::geometry::Geometry;
use blktide_types::id::{Digest, GenerationName};
use blktide_types::range::BlockRange;
use blktide_types::reason::Reason;
use blktide_types::set::BlockSet;
use blktide_types::unit::BlockIndex;
use frames::{Framer, Sink};
use std::sync::Arc;
use tree::{LeafPart, New, Tree};

pub mod early;
mod frames;
mod manifest;
mod spool;
mod tree;
mod wanted;

/// Answers for leaf `n` which of the blocks `64 n .. 64 n + 64` will be written, lowest block in the lowest bit: that is
/// word `n` of the wanted set. Must not change while the image is being written.
pub type WantedWords = Arc<dyn Fn(u64) -> u64 + Send + Sync>;

/// What a block is to be in the image.
#[derive(Clone, Copy, Debug)]
pub enum Content<'a> {
    /// These bytes: the block's, of its true length (the volume's last block may be short; more are not looked at). All
    /// zero is stored as zero.
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
pub struct ImageWriter {
    session: Session,
    framer: Framer,
    base: Option<Arc<ImageReader>>,
    tree: Tree,
}

impl core::fmt::Debug for ImageWriter {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("ImageWriter")
            .field("session", &self.session)
            .finish_non_exhaustive()
    }
}

impl ImageWriter {
    /// Begins. With a base (of the same size and block size, from the same volume and repository, opened by
    /// [`ImageReader::open_base`]) what is not wanted stays as it is there; without, it is absent.
    ///
    /// Cost: `wanted` is asked once for every leaf.
    pub fn new(
        session: Session,
        geometry: Geometry,
        base: Option<Arc<ImageReader>>,
        wanted: &WantedWords,
    ) -> Result<Self, ImageError> {
        if let Some(base) = &base {
            let (of_base, claim) = (base.geometry(), session.facts());
            if of_base.volume_bytes() != geometry.volume_bytes()
                || of_base.block_size() != geometry.block_size()
                || base.head().volume != claim.volume
                || base.repository().id() != session.repository().id()
            {
                return Err(ImageError::Misuse("a base of another shape or volume"));
            }
            // What is not pinned may be pruned under us.
            if claim.base != Some((base.head().image, base.head().sequence)) {
                return Err(ImageError::Misuse("a base that the claim does not pin"));
            }
        }
        let framer = Framer::new(&session, geometry);
        let tree = Tree::new(geometry, base.clone(), Arc::clone(wanted));
        Ok(Self {
            session,
            framer,
            base,
            tree,
        })
    }

    /// Stores wanted blocks, each once: zero test, digest, frame, append, in the calling thread. Ascending in `blocks`;
    /// about 1 MiB a call is best. Blocks of one leaf (64) are packed into frames together.
    ///
    /// Errors: the image cannot be made any more; abandon it.
    pub fn put(&self, blocks: &[(BlockIndex, Content<'_>)]) -> Result<Stored, ImageError> {
        self.framer
            .put(&self.session, blocks, self)
            .inspect_err(|_| self.tree.fail())
    }

    /// Makes all wanted blocks of `range` that were not put yet of one kind without content. Errors: `Misuse` for
    /// [`BlockKind::Data`].
    pub fn mark(&self, range: BlockRange, kind: BlockKind) -> Result<(), ImageError> {
        if kind == BlockKind::Data {
            return Err(ImageError::Misuse("marking blocks as data"));
        }
        for (leaf, in_range) in masks(range, self.tree.leaves()) {
            let taken = self.tree.take(leaf, in_range);
            let part = LeafPart {
                blocks: bits(taken).map(|n| (n, New::Constant(kind))).collect(),
                frames: Vec::new(),
            };
            if !part.blocks.is_empty() {
                self.record(leaf, &part)?;
            }
        }
        Ok(())
    }

    /// Bytes appended to packs so far, pages included.
    pub fn stored_bytes(&self) -> u64 {
        self.session.stored_bytes()
    }

    /// The session.
    pub const fn session(&self) -> &Session {
        &self.session
    }

    /// The image it builds on.
    pub const fn base(&self) -> Option<&Arc<ImageReader>> {
        self.base.as_ref()
    }

    /// Makes everything durable, then the image visible. No `put` runs meanwhile. Waits: for the store.
    ///
    /// Errors: `Incomplete`: wanted blocks are missing. Any: it is not known to be an image; [`Self::abandon`] finds out.
    pub fn commit(&self, facts: &ImageFacts) -> Result<Committed, ImageError> {
        manifest::commit(self, facts)
    }

    /// Gives it up: no image, packs deleted as far as possible. Can be repeated. Waits: for the store.
    ///
    /// Returns false if it is an image after all (a commit whose reply was lost): then nothing has been deleted.
    pub fn abandon(&self, now: WallTime) -> Result<bool, ImageError> {
        self.tree.fail();
        Ok(self.session.abandon(now)?)
    }
}

impl Sink for ImageWriter {
    fn admit(&self, leaf: u64, mask: u64) -> Result<(), ImageError> {
        if self.tree.take(leaf, mask) == mask {
            return Ok(());
        }
        Err(ImageError::Misuse(
            "a block that is not wanted, or was put before",
        ))
    }

    fn record(&self, leaf: u64, part: &LeafPart) -> Result<(), ImageError> {
        let digests = self.framer.digests();
        self.tree.record(&self.session, digests, leaf, part)
    }
}

/// The leaves that `range` touches, each with the blocks of it that are in `range`.
fn masks(range: BlockRange, leaves: u64) -> impl Iterator<Item = (u64, u64)> {
    let first = range.start().0 / FAN_OUT;
    let last = range.end().0.saturating_sub(1) / FAN_OUT;
    (first..=last.min(leaves.saturating_sub(1))).map(move |leaf| {
        let start = leaf.saturating_mul(FAN_OUT);
        let in_range = (0..FAN_OUT)
            .filter(|n| range.contains(BlockIndex(start.saturating_add(*n))))
            .fold(0, |mask, n| mask | 1 << n);
        (leaf, in_range)
    })
}

/// The numbers of the bits that are set, ascending.
fn bits(mask: u64) -> impl Iterator<Item = u8> {
    (0..64_u8).filter(move |n| mask >> n & 1 == 1)
}

#[cfg(test)]
mod tests;
