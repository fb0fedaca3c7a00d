//! Reading blocks: all frames of a range with few requests, each block checked by its own digest.

use super::fetch::{self, Found, Wanted, leaf_of};
use super::walk::kind_of;
use super::{ImageReader, LeafNode};
use crate::codec::decompress;
use crate::error::ImageError;
use blktide_format::entry::{FAN_OUT, Place};
use blktide_format::page::{BlockKind, Leaf, LeafBlock};
use blktide_repo::name;
use blktide_types::id::Digest;
use blktide_types::range::BlockRange;
use blktide_types::unit::BlockIndex;

/// What a lossy read got.
#[derive(Debug, Default)]
pub struct Salvaged {
    /// What each block is; `None`: it could not be had, and is zero in the buffer.
    pub kinds: Vec<Option<BlockKind>>,
    /// Why.
    pub errors: Vec<ImageError>,
}

/// Takes a block's bytes, or nothing; the error comes with the first block of a frame that cannot be had.
pub(crate) type EachBlock<'a> = dyn FnMut(BlockIndex, Result<&[u8], Option<ImageError>>) + 'a;

/// A block with content, and where it is in its frame.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    pub(crate) block: BlockIndex,
    pub(crate) position: u8,
    pub(crate) digest: Digest,
}

/// A frame of a leaf and the blocks that are needed of it.
#[derive(Clone, Debug)]
pub(crate) struct FrameOf {
    pub(crate) wanted: Wanted,
    pub(crate) slots: Vec<Slot>,
}

impl ImageReader {
    /// Reads the blocks of `range` into `buf` (count × block size bytes), each verified by its digest, and says what each
    /// is. Blocks without content, and bytes past the volume's end, are zero in `buf`. Neighbouring frames are read with
    /// one large request; ranges of about a MiB are best.
    ///
    /// Errors: the first that was met; `Damaged` names its blocks. What can be had is in `buf` all the same.
    pub fn read_blocks(
        &self,
        range: BlockRange,
        buf: &mut [u8],
    ) -> Result<Vec<BlockKind>, ImageError> {
        let salvaged = self.salvage_blocks(range, buf)?;
        if let Some(error) = salvaged.errors.into_iter().next() {
            return Err(error);
        }
        salvaged
            .kinds
            .into_iter()
            .map(|k| k.ok_or(ImageError::Misuse("a block without a word")))
            .collect()
    }

    /// Like [`Self::read_blocks`], but goes on at damage. Errors: `Misuse` only.
    pub fn salvage_blocks(
        &self,
        range: BlockRange,
        buf: &mut [u8],
    ) -> Result<Salvaged, ImageError> {
        let block_bytes = self.geometry().block_size().bytes_usize();
        let count = usize::try_from(range.count().0).unwrap_or(usize::MAX);
        if range.end().0 > self.geometry().block_count().0
            || count.checked_mul(block_bytes) != Some(buf.len())
        {
            return Err(ImageError::Misuse("a range or buffer that does not fit"));
        }
        buf.fill(0);
        let mut salvaged = Salvaged {
            kinds: vec![None; count],
            errors: Vec::new(),
        };
        let at = |block: u64| usize::try_from(block.saturating_sub(range.start().0)).ok();
        let mut frames = Vec::new();
        for leaf in leaf_of(range.start().0)..=leaf_of(range.end().0.saturating_sub(1)) {
            let Some(part) = self.span(0, leaf).intersect(range) else {
                continue;
            };
            let node = match self.leaf(leaf) {
                Ok(node) => node,
                Err(e) => {
                    salvaged.errors.push(e);
                    continue;
                }
            };
            for block in part.blocks() {
                let kind = match &node {
                    LeafNode::Constant(kind) => *kind,
                    LeafNode::Page(page) => page
                        .blocks
                        .get(usize::try_from(block.0 % FAN_OUT).unwrap_or(usize::MAX))
                        .map_or(BlockKind::Absent, kind_of),
                };
                if let Some(to) = at(block.0).and_then(|i| salvaged.kinds.get_mut(i)) {
                    *to = Some(kind);
                }
            }
            if let LeafNode::Page(page) = &node {
                frames.extend(frames_of(page, part));
            }
        }
        self.read_frames(&mut frames, &mut |block, bytes| match bytes {
            Ok(bytes) => {
                let start = at(block.0).and_then(|i| i.checked_mul(block_bytes));
                let to = start.and_then(|s| buf.get_mut(s..s.saturating_add(bytes.len())));
                if let Some(to) = to {
                    to.copy_from_slice(bytes);
                }
            }
            Err(error) => {
                if let Some(kind) = at(block.0).and_then(|i| salvaged.kinds.get_mut(i)) {
                    *kind = None;
                }
                salvaged.errors.extend(error);
            }
        });
        Ok(salvaged)
    }

    /// Reads frames and hands out each block asked for: its bytes, or nothing; the error comes with the first block of a
    /// frame. Sorts `frames` by place.
    pub(crate) fn read_frames(&self, frames: &mut [FrameOf], each: &mut EachBlock<'_>) {
        frames.sort_unstable_by_key(|f| (f.wanted.place.pack, f.wanted.place.offset_bytes));
        let wanted: Vec<Wanted> = frames.iter().map(|f| f.wanted).collect();
        fetch::many(self, &wanted, BlockRange::first(), &mut |i, found| {
            let Some(frame) = frames.get(i) else {
                return;
            };
            match found {
                Ok(found) => self.take_blocks(frame, &found, each),
                Err(e) => {
                    let mut error = Some(e);
                    for slot in &frame.slots {
                        let error = error.take().map(|e| at_blocks(e, frame));
                        each(slot.block, Err(error));
                    }
                }
            }
        });
    }

    /// Hands out the blocks of one frame.
    pub(crate) fn take_blocks(&self, frame: &FrameOf, found: &Found<'_>, each: &mut EachBlock<'_>) {
        let place = &frame.wanted.place;
        let raw = decompress(place.codec, found.payload, place.raw_bytes);
        for slot in &frame.slots {
            let size = self.geometry().block_size().bytes_usize();
            let start = usize::from(slot.position).saturating_mul(size);
            let len = usize::try_from(self.geometry().block_bytes(slot.block)).unwrap_or(0);
            let bytes = raw
                .as_ref()
                .ok()
                .and_then(|r| r.get(start..start.saturating_add(len)));
            if let Some(bytes) = bytes.filter(|b| self.digests().of_block(b) == slot.digest) {
                each(slot.block, Ok(bytes));
            } else {
                each(slot.block, Err(Some(self.not_meant(place, slot.block))));
            }
        }
    }

    fn not_meant(&self, place: &Place, block: BlockIndex) -> ImageError {
        let next = BlockIndex(block.0.saturating_add(1));
        ImageError::Damaged {
            range: BlockRange::new(block, next).unwrap_or(BlockRange::first()),
            object: name::pack(self.head().volume, place.pack),
            what: "a block that is not the one meant",
            source: None,
        }
    }
}

/// The frames that hold the blocks of `range` in `leaf`, with these blocks.
pub(crate) fn frames_of(leaf: &Leaf, range: BlockRange) -> Vec<FrameOf> {
    let mut frames: Vec<Option<FrameOf>> = vec![None; leaf.frames.len()];
    for (block, what) in (leaf.first_block..).zip(&leaf.blocks) {
        let LeafBlock::Data {
            digest,
            frame,
            slot,
        } = what
        else {
            continue;
        };
        let index = usize::from(*frame);
        let (Some(entry), Some(place)) = (frames.get_mut(index), leaf.frames.get(index)) else {
            continue;
        };
        if range.contains(BlockIndex(block)) {
            let frame = entry.get_or_insert_with(|| FrameOf {
                wanted: Wanted {
                    place: *place,
                    kind: None,
                    first_block: leaf.first_block,
                },
                slots: Vec::new(),
            });
            frame.slots.push(Slot {
                block: BlockIndex(block),
                position: *slot,
                digest: *digest,
            });
        }
    }
    frames.into_iter().flatten().collect()
}

/// `error` with the blocks of `frame` for its range.
fn at_blocks(error: ImageError, frame: &FrameOf) -> ImageError {
    match error {
        ImageError::Damaged {
            object,
            what,
            source,
            range,
        } => {
            let first = frame.slots.first().map(|s| s.block);
            let last = frame.slots.last().map(|s| s.block.0.saturating_add(1));
            let blocks = first
                .zip(last)
                .and_then(|(first, last)| BlockRange::new(first, BlockIndex(last)));
            ImageError::Damaged {
                range: blocks.unwrap_or(range),
                object,
                what,
                source,
            }
        }
        ImageError::Repository(_)
        | ImageError::Compress(_)
        | ImageError::Incomplete { .. }
        | ImageError::Spool { .. }
        | ImageError::Misuse(_) => error,
    }
}
