//! Blocks that are stored before it is known which ones the image wants, some of them several times.
//!
//! ```text
//!   EarlyWriter: put ─▶ frames, in the session's packs        what each block has become ─▶ spool (a file)
//!        finish ─▶ EarlyBlocks ─┐
//!   ImageWriter: keep(blocks) ◀─┘ the newest record of each, into the tree as if put; no content is touched again
//! ```
//! What was replaced, and what is not kept, stays in its pack unused, like what an incremental replaces in its base's frames.
//! In memory there are 8 bytes a leaf, whatever was put.
//!
//! **Invariant**: what is kept of a block is its newest `put`, of the same session.

use super::frames::{Framer, Sink};
use super::spool::{Spool, invalid};
use super::tree::{LeafPart, New, join};
use super::{Content, ImageWriter, Stored, bits, masks};
use crate::error::ImageError;
use blktide_format::entry::{FAN_OUT, Place};
use blktide_format::page::{BlockKind, Leaf, LeafBlock};
use blktide_repo::Session;
use blktide_types::geometry::Geometry;
use blktide_types::id::SessionId;
use blktide_types::range::BlockRange;
use blktide_types::set::BlockSet;
use blktide_types::unit::{BlockCount, BlockIndex};
use std::fs::File;
use std::io;

/// Stores blocks for an image that is yet to begin. Used by several threads at once.
pub struct EarlyWriter<'a> {
    session: &'a Session,
    framer: Framer,
    spool: Spool,
}

impl core::fmt::Debug for EarlyWriter<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("EarlyWriter")
            .field("session", self.session)
            .finish_non_exhaustive()
    }
}

impl<'a> EarlyWriter<'a> {
    /// Begins. `spool` can be read and written and is nobody else's: an unlinked file, or memory; it grows by about 60
    /// bytes a block put, whatever the block's size, and is written over from its start.
    pub fn new(session: &'a Session, geometry: Geometry, spool: File) -> Self {
        Self {
            session,
            framer: Framer::new(session, geometry),
            spool: Spool::new(spool),
        }
    }

    /// Stores blocks as [`ImageWriter::put`] does; any block, at any time, again: the later `put` replaces the earlier.
    /// Of two at the same time either may.
    ///
    /// Errors: nothing can be made of it any more, nor of the session.
    pub fn put(&self, blocks: &[(BlockIndex, Content<'_>)]) -> Result<Stored, ImageError> {
        self.framer.put(self.session, blocks, self)
    }

    /// No more is put: what is there can be kept. Errors: a record could not be written.
    pub fn finish(self) -> Result<EarlyBlocks, ImageError> {
        self.spool.check()?;
        Ok(EarlyBlocks {
            session: self.session.facts().session,
            geometry: *self.framer.geometry(),
            spool: self.spool,
        })
    }
}

impl Sink for EarlyWriter<'_> {
    fn admit(&self, leaf: u64, mask: u64) -> Result<(), ImageError> {
        let entries = entries(self.framer.geometry(), leaf);
        if bits(mask).all(|n| usize::from(n) < entries) {
            return Ok(());
        }
        Err(ImageError::Misuse("a block past the end"))
    }

    fn record(&self, leaf: u64, part: &LeafPart) -> Result<(), ImageError> {
        let geometry = self.framer.geometry();
        let mut page = Leaf {
            first_block: leaf.saturating_mul(FAN_OUT),
            block_shift: geometry.block_size().shift(),
            blocks: vec![LeafBlock::Constant(BlockKind::Absent); entries(geometry, leaf)],
            frames: part.frames.clone(),
        };
        let mut mask = 0;
        for (n, new) in &part.blocks {
            if let Some(to) = page.blocks.get_mut(usize::from(*n)) {
                *to = (*new).into();
                mask |= 1 << n;
            }
        }
        self.spool.append(leaf, mask, &page.encode())
    }
}

/// Blocks that are stored and can be kept.
#[derive(Debug)]
pub struct EarlyBlocks {
    session: SessionId,
    geometry: Geometry,
    spool: Spool,
}

impl EarlyBlocks {
    /// What the blocks `mask` of `leaf` have become.
    fn of_leaf(&self, leaf: u64, mask: u64) -> Result<LeafPart, ImageError> {
        let first_block = leaf.saturating_mul(FAN_OUT);
        let shift = self.geometry.block_size().shift();
        let entries = entries(&self.geometry, leaf);
        let mut missing = mask;
        let mut next = self.spool.newest(leaf);
        let mut pages = Vec::new();
        while missing != 0 {
            let offset = next.ok_or(ImageError::Misuse("a block to keep that was never put"))?;
            let record = self.spool.read(leaf, offset)?;
            let newest = missing & record.mask;
            if newest != 0 {
                let page = Leaf::decode(&record.page, shift, first_block, entries)
                    .map_err(|e| invalid(io::Error::new(io::ErrorKind::InvalidData, e)))?;
                pages.push((newest, page));
            }
            missing &= !newest;
            next = record.previous;
        }
        let nothing: (LeafBlock, &[Place]) = (LeafBlock::Constant(BlockKind::Absent), &[]);
        let mut sources = vec![nothing; entries];
        for (newest, page) in &pages {
            let of_page = page.blocks.iter().zip(&mut sources).zip(0_u8..);
            for ((block, to), _) in of_page.filter(|(_, n)| newest >> n & 1 == 1) {
                *to = (*block, &page.frames);
            }
        }
        let joined = join(first_block, shift, &sources)?;
        let kept = (0..64).zip(&joined.blocks);
        let kept = kept.filter(|(n, _)| mask >> n & 1 == 1);
        Ok(LeafPart {
            blocks: kept.map(|(n, block)| (n, New::from(*block))).collect(),
            frames: joined.frames,
        })
    }
}

impl ImageWriter {
    /// Takes the wanted blocks that are in `blocks` and within `range` as they were put early, as if each were put now.
    /// By several threads at once, each block once; leaf by leaf, best in ranges of whole leaves (64 blocks). Returns how
    /// many. Cost: a read of the spool for each call that put blocks of a leaf, a page for each leaf that is complete.
    ///
    /// Errors: the image cannot be made any more; abandon it. `Misuse`: a block that was never put early, is not wanted,
    /// or was put.
    pub fn keep(
        &self,
        early: &EarlyBlocks,
        blocks: &BlockSet,
        range: BlockRange,
    ) -> Result<BlockCount, ImageError> {
        self.keep_all(early, blocks, range)
            .inspect_err(|_| self.tree.fail())
    }

    fn keep_all(
        &self,
        early: &EarlyBlocks,
        blocks: &BlockSet,
        range: BlockRange,
    ) -> Result<BlockCount, ImageError> {
        let geometry = self.framer.geometry();
        if early.session != self.session.facts().session
            || early.geometry != *geometry
            || blocks.len() != geometry.block_count()
        {
            return Err(ImageError::Misuse("early blocks of another image"));
        }
        let mut count = 0_u64;
        for (leaf, in_range) in masks(range, self.tree.leaves()) {
            let word = usize::try_from(leaf).ok();
            let word = word.and_then(|n| blocks.words().get(n));
            let mask = word.copied().unwrap_or(0) & in_range;
            if mask == 0 {
                continue;
            }
            self.admit(leaf, mask)?;
            self.record(leaf, &early.of_leaf(leaf, mask)?)?;
            count = count.saturating_add(mask.count_ones().into());
        }
        Ok(BlockCount(count))
    }
}

/// Blocks of `leaf`: fewer than 64 at the volume's end, none behind it.
fn entries(geometry: &Geometry, leaf: u64) -> usize {
    let first = leaf.saturating_mul(FAN_OUT);
    let left = geometry.block_count().0.saturating_sub(first).min(FAN_OUT);
    usize::try_from(left).unwrap_or(0)
}

#[cfg(test)]
mod tests;
