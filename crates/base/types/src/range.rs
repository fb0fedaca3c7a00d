//! Half-open ranges of blocks.

use crate::unit::{BlockCount, BlockIndex, BlockSize};

/// Blocks `start .. end`; `start < end` always.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockRange {
    start: BlockIndex,
    end: BlockIndex,
}

impl BlockRange {
    /// Blocks `start .. end`, or `None` if that is empty.
    pub const fn new(start: BlockIndex, end: BlockIndex) -> Option<Self> {
        if start.0 < end.0 {
            Some(Self { start, end })
        } else {
            None
        }
    }

    /// The first block alone.
    pub const fn first() -> Self {
        Self {
            start: BlockIndex(0),
            end: BlockIndex(1),
        }
    }

    /// Every block that bytes `offset_bytes .. offset_bytes + len_bytes` touch, partly or whole.
    ///
    /// `None` if the range is empty or ends past `u64::MAX`.
    pub fn covering(size: BlockSize, offset_bytes: u64, len_bytes: u64) -> Option<Self> {
        let last_byte = offset_bytes.checked_add(len_bytes.checked_sub(1)?)?;
        Some(Self {
            start: size.block_of(offset_bytes),
            end: BlockIndex(size.block_of(last_byte).0.checked_add(1)?),
        })
    }

    /// First block.
    pub const fn start(self) -> BlockIndex {
        self.start
    }

    /// The block after the last.
    pub const fn end(self) -> BlockIndex {
        self.end
    }

    /// Number of blocks; never zero.
    pub const fn count(self) -> BlockCount {
        BlockCount(self.end.0.saturating_sub(self.start.0))
    }

    /// Whether `block` is in the range.
    pub const fn contains(self, block: BlockIndex) -> bool {
        self.start.0 <= block.0 && block.0 < self.end.0
    }

    /// The blocks that are in both.
    pub fn intersect(self, other: Self) -> Option<Self> {
        Self::new(self.start.max(other.start), self.end.min(other.end))
    }

    /// Each block, ascending.
    pub fn blocks(self) -> impl DoubleEndedIterator<Item = BlockIndex> {
        (self.start.0..self.end.0).map(BlockIndex)
    }

    /// The range cut into pieces of at most `count` blocks, ascending. A `count` of zero is taken as one.
    pub fn pieces(self, count: BlockCount) -> impl Iterator<Item = Self> {
        let step = count.0.max(1);
        let mut next = self.start.0;
        std::iter::from_fn(move || {
            let start = next;
            let end = start.saturating_add(step).min(self.end.0);
            next = end;
            Self::new(BlockIndex(start), BlockIndex(end))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// req A5: no byte of a write lies outside the blocks that are marked for it.
        #[test]
        fn covering_covers_first_and_last_byte(
            shift in 9_u32..=20, offset in 0_u64..1 << 50, len in 1_u64..1 << 40,
        ) {
            let size = BlockSize::new(1 << shift).unwrap();
            let range = BlockRange::covering(size, offset, len).unwrap();
            prop_assert!(range.contains(size.block_of(offset)));
            prop_assert!(range.contains(size.block_of(offset + len - 1)));
            prop_assert!(range.count().0 >= 1);
        }

        #[test]
        fn pieces_are_the_range(start in 0_u64..1000, len in 1_u64..500, step in 0_u64..70) {
            let range = BlockRange::new(BlockIndex(start), BlockIndex(start + len)).unwrap();
            let all: Vec<u64> = range.pieces(BlockCount(step)).flat_map(|p| p.blocks().map(|b| b.0).collect::<Vec<_>>()).collect();
            prop_assert_eq!(all, (start..start + len).collect::<Vec<_>>());
        }
    }

    #[test]
    fn covering_rejects_what_is_not_a_range() {
        let size = BlockSize::new(4096).unwrap();
        assert_eq!(BlockRange::covering(size, 0, 0), None);
        assert_eq!(BlockRange::covering(size, u64::MAX, 2), None);
    }
}
