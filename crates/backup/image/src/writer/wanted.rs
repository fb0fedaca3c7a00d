//! Which nodes of the tree will get new children: known before the first block comes, so that a node is known to be
//! complete when its last child is.
//!
//! One bit a leaf, and one a node of each level above: 1/64 of the wanted set.

use super::WantedWords;
use blktide_format::entry::FAN_OUT;

/// Which nodes are touched.
pub(super) struct Touched {
    /// Level by level: word `n` has a bit for each child of node `n` of the level above.
    levels: Vec<Vec<u64>>,
    /// Wanted blocks.
    pub(super) blocks: u64,
}

impl Touched {
    /// Asks for each of `leaves` words once. `root_level`: of the volume.
    pub(super) fn new(leaves: u64, root_level: u8, wanted: &WantedWords) -> Self {
        let mut blocks = 0_u64;
        let mut below = Vec::new();
        let mut word = 0_u64;
        for leaf in 0..leaves {
            let mask = wanted(leaf);
            blocks = blocks.saturating_add(mask.count_ones().into());
            word |= u64::from(mask != 0) << (leaf % FAN_OUT);
            if leaf % FAN_OUT == FAN_OUT - 1 || leaf == leaves.saturating_sub(1) {
                below.push(word);
                word = 0;
            }
        }
        let mut levels = vec![below];
        for _ in 1..root_level {
            let words = levels.last().map(Vec::as_slice).unwrap_or_default();
            let above = words
                .chunks(64)
                .map(|chunk| {
                    chunk
                        .iter()
                        .zip(0..)
                        .fold(0, |word, (w, n)| word | u64::from(*w != 0) << n)
                })
                .collect();
            levels.push(above);
        }
        Self { levels, blocks }
    }

    /// The touched children of node `index` of `level` (1 or more).
    pub(super) fn children(&self, level: u8, index: u64) -> u64 {
        let words = self.levels.get(usize::from(level).saturating_sub(1));
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        words.and_then(|w| w.get(index)).copied().unwrap_or(0)
    }
}
