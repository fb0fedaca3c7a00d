//! A set of blocks of one volume: one bit a block, in words, with runs.
//!
//! For sets that one thread owns (wanted, absent, changed). The live bitmap that writers mark is the
//! engine's, in shared memory.

use crate::range::BlockRange;
use crate::unit::{BlockCount, BlockIndex};

/// A set of blocks out of `0 .. len`.
///
/// Invariant: bits at and past `len` are clear.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockSet {
    words: Vec<u64>,
    len: u64,
}

impl BlockSet {
    /// The empty set of a volume of `len` blocks.
    pub fn new(len: BlockCount) -> Self {
        Self {
            words: vec![0; word_count(len.0)],
            len: len.0,
        }
    }

    /// Every block of a volume of `len` blocks.
    pub fn full(len: BlockCount) -> Self {
        let mut set = Self {
            words: vec![u64::MAX; word_count(len.0)],
            len: len.0,
        };
        set.trim();
        set
    }

    /// A set from words, lowest block first; missing words are clear, what lies past `len` is dropped.
    pub fn from_words(len: BlockCount, words: impl IntoIterator<Item = u64>) -> Self {
        let mut set = Self::new(len);
        for (to, from) in set.words.iter_mut().zip(words) {
            *to = from;
        }
        set.trim();
        set
    }

    /// The words, lowest block first; bits past the end are clear.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Number of blocks that could be in it.
    pub const fn len(&self) -> BlockCount {
        BlockCount(self.len)
    }

    /// Whether no block is in it.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|w| *w == 0)
    }

    /// Number of blocks in it.
    pub fn count(&self) -> BlockCount {
        BlockCount(self.words.iter().map(|w| u64::from(w.count_ones())).sum())
    }

    /// Whether `block` is in it; false past the end.
    pub fn contains(&self, block: BlockIndex) -> bool {
        self.words
            .get(word_of(block.0))
            .is_some_and(|w| w >> (block.0 % 64) & 1 == 1)
    }

    /// Puts `block` in; nothing happens past the end.
    pub fn insert(&mut self, block: BlockIndex) {
        if block.0 < self.len
            && let Some(w) = self.words.get_mut(word_of(block.0))
        {
            *w |= 1 << (block.0 % 64);
        }
    }

    /// Takes `block` out.
    pub fn remove(&mut self, block: BlockIndex) {
        if let Some(w) = self.words.get_mut(word_of(block.0)) {
            *w &= !(1 << (block.0 % 64));
        }
    }

    /// Puts in all of `range` that lies before the end.
    pub fn insert_range(&mut self, range: BlockRange) {
        for block in range.start().0..range.end().0.min(self.len) {
            self.insert(BlockIndex(block));
        }
    }

    /// Puts in what is in `other`.
    pub fn union_with(&mut self, other: &Self) {
        for (to, from) in self.words.iter_mut().zip(&other.words) {
            *to |= from;
        }
        self.trim();
    }

    /// Takes out what is in `other`.
    pub fn subtract(&mut self, other: &Self) {
        for (to, from) in self.words.iter_mut().zip(&other.words) {
            *to &= !from;
        }
    }

    /// Whether each block of it is in `other`.
    pub fn is_subset_of(&self, other: &Self) -> bool {
        self.blocks().all(|b| other.contains(b))
    }

    /// The first block at or after `from` that is in it.
    pub fn next_from(&self, from: BlockIndex) -> Option<BlockIndex> {
        self.find(from.0, 0)
    }

    /// Each block in it, ascending.
    pub fn blocks(&self) -> impl Iterator<Item = BlockIndex> {
        let mut next = Some(BlockIndex(0));
        std::iter::from_fn(move || {
            let found = self.next_from(next?)?;
            next = found.0.checked_add(1).map(BlockIndex);
            Some(found)
        })
    }

    /// Each run of neighbours in it, ascending, as long as possible.
    pub fn runs(&self) -> impl Iterator<Item = BlockRange> {
        let mut next = 0;
        std::iter::from_fn(move || {
            let start = self.find(next, 0)?;
            let end = self
                .find(start.0, u64::MAX)
                .map_or(self.len, |b| b.0.min(self.len));
            next = end;
            BlockRange::new(start, BlockIndex(end))
        })
    }

    /// The first block from `from` on whose bit, exclusive-or `flip`, is set.
    fn find(&self, from: u64, flip: u64) -> Option<BlockIndex> {
        let mut mask = u64::MAX.checked_shl(u32::try_from(from % 64).unwrap_or(0))?;
        let first = word_of(from);
        for (i, word) in self.words.iter().enumerate().skip(first) {
            let hit = (word ^ flip) & mask;
            if hit != 0 {
                let base = u64::try_from(i).unwrap_or(u64::MAX).saturating_mul(64);
                return Some(BlockIndex(
                    base.saturating_add(u64::from(hit.trailing_zeros())),
                ));
            }
            mask = u64::MAX;
        }
        None
    }

    fn trim(&mut self) {
        if !self.len.is_multiple_of(64)
            && let Some(last) = self.words.last_mut()
        {
            *last &= (1 << (self.len % 64)) - 1;
        }
    }
}

fn word_of(block: u64) -> usize {
    usize::try_from(block / 64).unwrap_or(usize::MAX)
}

fn word_count(len: u64) -> usize {
    usize::try_from(len.div_ceil(64)).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        /// Against a plain set of numbers.
        #[test]
        fn agrees_with_a_plain_set(len in 1_u64..300, picks in proptest::collection::vec((any::<bool>(), 0_u64..320), 0..80)) {
            let (mut set, mut truth) = (BlockSet::new(BlockCount(len)), BTreeSet::new());
            for (add, block) in picks {
                if add { set.insert(BlockIndex(block)); if block < len { truth.insert(block); } }
                else { set.remove(BlockIndex(block)); truth.remove(&block); }
            }
            prop_assert_eq!(set.blocks().map(|b| b.0).collect::<Vec<_>>(), truth.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(set.count().0, truth.len() as u64);
            let runs: Vec<_> = set.runs().collect();
            prop_assert_eq!(runs.iter().flat_map(|r| r.blocks().map(|b| b.0).collect::<Vec<_>>()).collect::<BTreeSet<_>>(), truth);
            prop_assert!(runs.windows(2).all(|w| w[0].end().0 < w[1].start().0), "neighbouring runs are one");
        }
    }

    #[test]
    fn full_ends_at_the_end() {
        for len in [1, 63, 64, 65, 128, 130] {
            let set = BlockSet::full(BlockCount(len));
            assert_eq!(set.count(), BlockCount(len));
            assert_eq!(set.runs().count(), 1);
            assert!(!set.contains(BlockIndex(len)));
        }
    }
}
