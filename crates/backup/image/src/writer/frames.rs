//! Blocks become frames: what every way of storing them shares.
//!
//! ```text
//!   blocks ─▶ cut by leaf ─▶ admitted ─▶ zero test, digest, frame ─▶ appended ─▶ recorded
//!                            └─────────────── `Sink`: who keeps what they have become ──┘
//! ```
//! **Invariant**: equal blocks get equal digests, and frames of equal shape, whoever records them.

use super::tree::{LeafPart, New};
use super::{Content, Stored};
use crate::codec::{Compressor, Pool};
use crate::digest::Digests;
use crate::error::ImageError;
use blktide_format::entry::{EntryKind, FAN_OUT};
use blktide_format::page::BlockKind;
use blktide_repo::{NewEntry, Session};
use blktide_types::geometry::Geometry;
use blktide_types::unit::BlockIndex;

/// Raw bytes that a frame of several blocks holds at most.
const FRAME_BYTES: usize = 64 << 10;
/// Blocks that a frame holds at most.
const FRAME_BLOCKS: usize = 16;

/// Who keeps what blocks have become.
pub(super) trait Sink {
    /// Whether blocks of `leaf` may be stored: asked before anything is appended.
    fn admit(&self, leaf: u64, mask: u64) -> Result<(), ImageError>;

    /// What admitted blocks of `leaf` have become.
    fn record(&self, leaf: u64, part: &LeafPart) -> Result<(), ImageError>;
}

/// Makes frames, in the threads that call it.
pub(super) struct Framer {
    geometry: Geometry,
    digests: Digests,
    pool: Pool,
}

impl Framer {
    pub(super) fn new(session: &Session, geometry: Geometry) -> Self {
        let facts = session.repository().facts();
        Self {
            geometry,
            digests: Digests::new(facts.domain, &facts.domain_key),
            pool: Pool::default(),
        }
    }

    pub(super) const fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    pub(super) const fn digests(&self) -> &Digests {
        &self.digests
    }

    /// Stores blocks in the session's packs and tells `sink` of them, leaf by leaf.
    pub(super) fn put(
        &self,
        session: &Session,
        blocks: &[(BlockIndex, Content<'_>)],
        sink: &impl Sink,
    ) -> Result<Stored, ImageError> {
        let mut stored = Stored::default();
        let same_leaf = |a: &(BlockIndex, Content<'_>), b: &(BlockIndex, Content<'_>)| {
            a.0.0 / FAN_OUT == b.0.0 / FAN_OUT && a.0 < b.0
        };
        let mut compressor = self.pool.take()?;
        let result = blocks.chunk_by(same_leaf).try_for_each(|part| {
            let leaf = part.first().map_or(0, |(block, _)| block.0 / FAN_OUT);
            let mask = part.iter().fold(0, |m, (b, _)| m | 1 << (b.0 % FAN_OUT));
            sink.admit(leaf, mask)?;
            let part = self.store(session, part, &mut compressor, &mut stored)?;
            sink.record(leaf, &part)
        });
        self.pool.put(compressor);
        result.map(|()| stored)
    }

    /// Blocks of one leaf.
    fn store(
        &self,
        session: &Session,
        blocks: &[(BlockIndex, Content<'_>)],
        compressor: &mut Compressor,
        stored: &mut Stored,
    ) -> Result<LeafPart, ImageError> {
        let mut part = LeafPart::default();
        let mut data: Vec<(BlockIndex, &[u8])> = Vec::new();
        for (block, content) in blocks {
            let kind = match content {
                Content::Bytes(bytes) => {
                    let len = usize::try_from(self.geometry.block_bytes(*block)).unwrap_or(0);
                    let bytes = bytes
                        .get(..len)
                        .ok_or(ImageError::Misuse("too few bytes for a block"))?;
                    if !is_zero(bytes) {
                        data.push((*block, bytes));
                        continue;
                    }
                    stored.zero_blocks = stored.zero_blocks.saturating_add(1);
                    BlockKind::Zero
                }
                Content::Unreadable => BlockKind::Unreadable,
                Content::Absent => BlockKind::Absent,
                Content::Excluded => BlockKind::Excluded,
            };
            part.blocks.push((number(*block), New::Constant(kind)));
        }
        self.append(session, &data, compressor, &mut part)?;
        for place in &part.frames {
            let bytes = place.end_bytes().saturating_sub(place.offset_bytes.into());
            stored.stored_bytes = stored.stored_bytes.saturating_add(bytes);
        }
        let count = u64::try_from(data.len()).unwrap_or(u64::MAX);
        stored.data_blocks = stored.data_blocks.saturating_add(count);
        Ok(part)
    }

    /// Blocks of one leaf with content, in frames.
    fn append(
        &self,
        session: &Session,
        data: &[(BlockIndex, &[u8])],
        compressor: &mut Compressor,
        to: &mut LeafPart,
    ) -> Result<(), ImageError> {
        let block_size = self.geometry.block_size();
        let per_frame = (FRAME_BYTES / block_size.bytes_usize()).clamp(1, FRAME_BLOCKS);
        for part in data.chunks(per_frame) {
            compressor.raw.clear();
            let (mut blocks, mut first_block) = (0, 0);
            for ((block, bytes), slot) in part.iter().zip(0..) {
                first_block = block.0 - block.0 % FAN_OUT;
                blocks |= 1 << (block.0 % FAN_OUT);
                compressor.raw.extend_from_slice(bytes);
                let frame = u8::try_from(to.frames.len()).unwrap_or(u8::MAX);
                to.blocks.push((
                    number(*block),
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
            to.frames.push(session.append(&NewEntry {
                kind: EntryKind::Frame { blocks },
                first_block,
                block_shift: block_size.shift(),
                codec,
                raw_bytes,
                payload,
            })?);
        }
        Ok(())
    }
}

/// Which block of its leaf.
fn number(block: BlockIndex) -> u8 {
    u8::try_from(block.0 % FAN_OUT).unwrap_or(u8::MAX)
}

/// Whether all bytes are zero, eight words at a time.
fn is_zero(bytes: &[u8]) -> bool {
    let (chunks, rest) = bytes.as_chunks::<64>();
    rest.iter().all(|b| *b == 0) && chunks.iter().all(|c| *c == [0; 64])
}
