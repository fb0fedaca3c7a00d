//! Runs of blocks of one kind, found by going down only where kinds differ.

use super::{ImageReader, Page, fetch::leaf_of};
use crate::error::ImageError;
use blktide_format::entry::FAN_OUT;
use blktide_format::page::{BlockKind, Child, LeafBlock, child_span};
use blktide_types::range::BlockRange;
use blktide_types::unit::BlockIndex;

/// Runs of one kind, ascending, as long as possible.
#[derive(Debug)]
pub struct Runs<'a> {
    reader: &'a ImageReader,
    next: u64,
    end: u64,
    held: Option<(BlockRange, BlockKind)>,
    failed: Option<ImageError>,
}

impl ImageReader {
    /// Runs of one kind in `range`, ascending, as long as possible. A damaged page gives one `Err` item that names its
    /// blocks, and the rest goes on. Constant subtrees cost nothing. Memory: a few pages.
    pub fn runs(&self, range: BlockRange) -> Runs<'_> {
        Runs {
            reader: self,
            next: range.start().0,
            end: range.end().0.min(self.geometry().block_count().0),
            held: None,
            failed: None,
        }
    }

    /// What `block` is. Cost: the pages on the way down that are not in memory. Errors: `Misuse` past the end.
    pub fn kind_of(&self, block: BlockIndex) -> Result<BlockKind, ImageError> {
        if block.0 >= self.geometry().block_count().0 {
            return Err(ImageError::Misuse("a block past the end"));
        }
        Ok(self.segment(block.0)?.1)
    }

    /// What the blocks of `range` are, one by one.
    pub fn kinds(&self, range: BlockRange) -> Result<Vec<BlockKind>, ImageError> {
        let mut kinds = Vec::new();
        for run in self.runs(range) {
            let (run, kind) = run?;
            kinds.extend(run.blocks().map(|_| kind));
        }
        Ok(kinds)
    }

    /// The run from `block` on, not beyond the constant subtree or leaf that it lies in.
    fn segment(&self, block: u64) -> Result<(BlockRange, BlockKind), ImageError> {
        let mut child = *self.root();
        let mut level = self.root_level();
        let mut index = block / child_span(level.saturating_add(1));
        loop {
            if let Child::Constant(kind) = child {
                let end = self.span(level, index).end();
                return range_of(block, end.0).map(|r| (r, kind));
            }
            match self.page(level, index, &child)? {
                Page::Inner(inner) => {
                    let below = block / child_span(level);
                    let slot = usize::try_from(below % FAN_OUT).unwrap_or(usize::MAX);
                    child = match inner.children.get(slot) {
                        Some(child) => *child,
                        None => return Err(ImageError::Misuse("a block past the end")),
                    };
                    level = level.saturating_sub(1);
                    index = below;
                }
                Page::Leaf(leaf) => {
                    let first = leaf_of(block).saturating_mul(FAN_OUT);
                    let slot = usize::try_from(block.saturating_sub(first)).unwrap_or(usize::MAX);
                    let rest = leaf.blocks.get(slot..).unwrap_or_default();
                    let kind = rest.first().map_or(BlockKind::Absent, kind_of);
                    let len = rest.iter().take_while(|b| kind_of(b) == kind).count();
                    let len = u64::try_from(len).unwrap_or(0).max(1);
                    return range_of(block, block.saturating_add(len)).map(|r| (r, kind));
                }
            }
        }
    }
}

impl Iterator for Runs<'_> {
    type Item = Result<(BlockRange, BlockKind), ImageError>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Some(error) = self.failed.take() {
            return Some(Err(error));
        }
        while self.next < self.end {
            match self.reader.segment(self.next) {
                Ok((segment, kind)) => {
                    let end = segment.end().0.min(self.end);
                    let Ok(segment) = range_of(self.next, end) else {
                        break;
                    };
                    self.next = end;
                    match self.held {
                        Some((held, of)) if of == kind => {
                            self.held = range_of(held.start().0, end).ok().map(|r| (r, kind));
                        }
                        Some(_) => return self.held.replace((segment, kind)).map(Ok),
                        None => self.held = Some((segment, kind)),
                    }
                }
                Err(error) => {
                    // Whatever failed, the blocks of what it named are passed over, and at least one.
                    let past = match &error {
                        ImageError::Damaged { range, .. } => range.end().0,
                        ImageError::Repository(_)
                        | ImageError::Compress(_)
                        | ImageError::Incomplete { .. }
                        | ImageError::Spool { .. }
                        | ImageError::Misuse(_) => self.end,
                    };
                    self.next = past.max(self.next.saturating_add(1));
                    match self.held.take() {
                        Some(held) => {
                            self.failed = Some(error);
                            return Some(Ok(held));
                        }
                        None => return Some(Err(error)),
                    }
                }
            }
        }
        self.held.take().map(Ok)
    }
}

pub(super) const fn kind_of(block: &LeafBlock) -> BlockKind {
    match block {
        LeafBlock::Constant(kind) => *kind,
        LeafBlock::Data { .. } => BlockKind::Data,
    }
}

fn range_of(start: u64, end: u64) -> Result<BlockRange, ImageError> {
    BlockRange::new(BlockIndex(start), BlockIndex(end)).ok_or(ImageError::Misuse("an empty range"))
}
