//! Writing an image: blocks in, by several threads; a tree and a manifest out.
//!
//! ```text
//!   put ─▶ claimed in its leaf ─▶ zero test, digest, frame ─▶ appended ─▶ recorded in its leaf
//!                                                                          └ last one of the leaf: page (`tree`)
//! ```
//! Memory: the leaves that are begun and not complete, one page a level, the pack table. With blocks put nearly ascending
//! that does not grow with the volume.

use crate::codec::{Compressor, Pool};
use crate::digest::Digests;
use crate::error::ImageError;
use crate::reader::ImageReader;
use blktide_format::entry::{EntryKind, FAN_OUT};
use blktide_format::manifest::{Consistency, Counters, ImageHead, ImageKind};
use blktide_format::page::BlockKind;
use blktide_repo::{NewEntry, Session};
use blktide_types::clock::WallTime;
use blktide_types::geometry::Geometry;
use blktide_types::id::{Digest, GenerationName};
use blktide_types::range::BlockRange;
use blktide_types::reason::Reason;
use blktide_types::set::BlockSet;
use blktide_types::unit::BlockIndex;
use std::sync::Arc;
use tree::{New, Tree};

mod manifest;
mod tree;
mod wanted;

/// Answers for leaf `n` which of the blocks `64 n .. 64 n + 64` will be written, lowest block in the lowest bit: that is
/// word `n` of the wanted set. Must not change while the image is being written.
pub type WantedWords = Arc<dyn Fn(u64) -> u64 + Send + Sync>;

/// Raw bytes that a frame of several blocks holds at most.
const FRAME_BYTES: usize = 64 << 10;
/// Blocks that a frame holds at most.
const FRAME_BLOCKS: usize = 16;

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
    geometry: Geometry,
    base: Option<Arc<ImageReader>>,
    digests: Digests,
    tree: Tree,
    pool: Pool,
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
        let facts = session.repository().facts();
        let digests = Digests::new(facts.domain, &facts.domain_key);
        let tree = Tree::new(geometry, base.clone(), Arc::clone(wanted));
        Ok(Self {
            session,
            geometry,
            base,
            digests,
            tree,
            pool: Pool::default(),
        })
    }

    /// Stores wanted blocks, each once: zero test, digest, frame, append, in the calling thread. Ascending in `blocks`;
    /// about 1 MiB a call is best. Blocks of one leaf (64) are packed into frames together.
    ///
    /// Errors: the image cannot be made any more; abandon it.
    pub fn put(&self, blocks: &[(BlockIndex, Content<'_>)]) -> Result<Stored, ImageError> {
        let mut stored = Stored::default();
        let same_leaf = |a: &(BlockIndex, Content<'_>), b: &(BlockIndex, Content<'_>)| {
            a.0.0 / FAN_OUT == b.0.0 / FAN_OUT && a.0 < b.0
        };
        let mut compressor = self.pool.take()?;
        let result = blocks
            .chunk_by(same_leaf)
            .try_for_each(|part| self.put_in_leaf(part, &mut compressor, &mut stored));
        self.pool.put(compressor);
        if let Err(e) = result {
            self.tree.fail();
            return Err(e);
        }
        Ok(stored)
    }

    /// Makes all wanted blocks of `range` that were not put yet of one kind without content. Errors: `Misuse` for
    /// [`BlockKind::Data`].
    pub fn mark(&self, range: BlockRange, kind: BlockKind) -> Result<(), ImageError> {
        if kind == BlockKind::Data {
            return Err(ImageError::Misuse("marking blocks as data"));
        }
        let first = range.start().0 / FAN_OUT;
        let last = range.end().0.saturating_sub(1) / FAN_OUT;
        for leaf in first..=last.min(self.tree.leaves().saturating_sub(1)) {
            let start = leaf.saturating_mul(FAN_OUT);
            let in_range = (0..FAN_OUT)
                .filter(|n| range.contains(BlockIndex(start.saturating_add(*n))))
                .fold(0, |mask, n| mask | 1 << n);
            let taken = self.tree.take(leaf, in_range);
            let blocks: Vec<(u8, New)> = bits(taken).map(|n| (n, New::Constant(kind))).collect();
            if !blocks.is_empty() {
                self.record(leaf, &blocks, Vec::new())?;
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

    /// Blocks of one leaf.
    fn put_in_leaf(
        &self,
        blocks: &[(BlockIndex, Content<'_>)],
        compressor: &mut Compressor,
        stored: &mut Stored,
    ) -> Result<(), ImageError> {
        let Some((first, _)) = blocks.first() else {
            return Ok(());
        };
        let leaf = first.0 / FAN_OUT;
        let mask = blocks.iter().fold(0, |m, (b, _)| m | 1 << (b.0 % FAN_OUT));
        if self.tree.take(leaf, mask) != mask {
            return Err(ImageError::Misuse(
                "a block that is not wanted, or was put before",
            ));
        }
        let mut news = Vec::with_capacity(blocks.len());
        let mut data: Vec<(u8, &[u8])> = Vec::new();
        for (block, content) in blocks {
            let n = u8::try_from(block.0 % FAN_OUT).unwrap_or(u8::MAX);
            let kind = match content {
                Content::Bytes(bytes) => {
                    let len = usize::try_from(self.geometry.block_bytes(*block)).unwrap_or(0);
                    let bytes = bytes
                        .get(..len)
                        .ok_or(ImageError::Misuse("too few bytes for a block"))?;
                    if !is_zero(bytes) {
                        data.push((n, bytes));
                        continue;
                    }
                    stored.zero_blocks = stored.zero_blocks.saturating_add(1);
                    BlockKind::Zero
                }
                Content::Unreadable => BlockKind::Unreadable,
                Content::Absent => BlockKind::Absent,
                Content::Excluded => BlockKind::Excluded,
            };
            news.push((n, New::Constant(kind)));
        }
        let frames = self.append_frames(leaf, &data, compressor, &mut news)?;
        for place in &frames {
            let bytes = place.end_bytes().saturating_sub(place.offset_bytes.into());
            stored.stored_bytes = stored.stored_bytes.saturating_add(bytes);
        }
        let count = u64::try_from(data.len()).unwrap_or(u64::MAX);
        stored.data_blocks = stored.data_blocks.saturating_add(count);
        self.record(leaf, &news, frames)
    }

    /// Blocks with content, in frames.
    fn append_frames(
        &self,
        leaf: u64,
        data: &[(u8, &[u8])],
        compressor: &mut Compressor,
        news: &mut Vec<(u8, New)>,
    ) -> Result<Vec<blktide_format::entry::Place>, ImageError> {
        let block_size = self.geometry.block_size();
        let per_frame = (FRAME_BYTES / block_size.bytes_usize()).clamp(1, FRAME_BLOCKS);
        let mut frames = Vec::new();
        for part in data.chunks(per_frame) {
            compressor.raw.clear();
            let mut blocks = 0;
            for ((n, bytes), slot) in part.iter().zip(0..) {
                blocks |= 1_u64.checked_shl((*n).into()).unwrap_or(0);
                compressor.raw.extend_from_slice(bytes);
                let frame = u8::try_from(frames.len()).unwrap_or(u8::MAX);
                news.push((
                    *n,
                    New::Data {
                        digest: self.digests.of_block(bytes),
                        frame,
                        slot,
                    },
                ));
            }
            let raw_bytes = u32::try_from(compressor.raw.len())
                .map_err(|_too_long| ImageError::Misuse("a frame that is too large"))?;
            let (codec, payload) = compressor.compress();
            frames.push(self.session.append(&NewEntry {
                kind: EntryKind::Frame { blocks },
                first_block: leaf.saturating_mul(FAN_OUT),
                block_shift: block_size.shift(),
                codec,
                raw_bytes,
                payload,
            })?);
        }
        Ok(frames)
    }

    fn record(
        &self,
        leaf: u64,
        blocks: &[(u8, New)],
        frames: Vec<blktide_format::entry::Place>,
    ) -> Result<(), ImageError> {
        self.tree
            .record(&self.session, &self.digests, leaf, (blocks, frames))
    }
}

/// The numbers of the bits that are set, ascending.
fn bits(mask: u64) -> impl Iterator<Item = u8> {
    (0..64_u8).filter(move |n| mask >> n & 1 == 1)
}

/// Whether all bytes are zero, eight words at a time.
fn is_zero(bytes: &[u8]) -> bool {
    let (chunks, rest) = bytes.as_chunks::<64>();
    rest.iter().all(|b| *b == 0) && chunks.iter().all(|c| *c == [0; 64])
}

#[cfg(test)]
mod tests;
