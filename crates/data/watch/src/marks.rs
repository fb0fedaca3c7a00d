//! The bitmaps that the kernel marks, as this side sees them: ending a kernel generation, and taking what it has marked.
//!
//! ```text
//! head (512 words) │ bitmap A │ bitmap B        one bit a watch grain
//!   GENERATION: even: A is live; odd: B
//! ```
//! **Invariant**: a bit leaves a bitmap only after it is in the open generation of the engine. So whoever dies between has
//! lost nothing; the next one takes it again.

use blktide_engine::Memory;
use blktide_format::shared::{SharedError, WatchShape, watch};
use blktide_sys::mapping::Mapping;
use std::sync::atomic::{AtomicU64, Ordering};

/// The `marks` map, mapped.
#[derive(Debug)]
pub(crate) struct Marks {
    mapping: Mapping,
    shape: WatchShape,
}

/// Its head, for the samples of the evidence.
impl Memory for Marks {
    fn words(&self) -> &[AtomicU64] {
        self.head()
    }
}

impl Marks {
    /// Over a mapped map. Errors: its head is not whole, or it is smaller than that says.
    pub(crate) fn new(mapping: Mapping) -> Result<Self, SharedError> {
        let head = |index: usize| {
            let word = mapping.words().get(index);
            word.map_or(0, |w| w.load(Ordering::Acquire))
        };
        let shape = WatchShape::of_head(head)?;
        if shape.words() > mapping.words().len() {
            return Err(SharedError::Head {
                index: watch::BITMAP_WORDS,
            });
        }
        Ok(Self { mapping, shape })
    }

    /// What is watched, and how finely.
    pub(crate) const fn shape(&self) -> &WatchShape {
        &self.shape
    }

    /// The words of the head.
    pub(crate) fn head(&self) -> &[AtomicU64] {
        let all = self.mapping.words();
        all.get(..watch::WORDS).unwrap_or_default()
    }

    /// A word of the head; zero past its end.
    pub(crate) fn word(&self, index: usize) -> u64 {
        let word = self.head().get(index);
        word.map_or(0, |w| w.load(Ordering::SeqCst))
    }

    /// Stores a word of the head that is this side's own.
    pub(crate) fn set_word(&self, index: usize, value: u64) {
        if let Some(word) = self.head().get(index) {
            word.store(value, Ordering::SeqCst);
        }
    }

    /// The bitmap of a generation.
    fn bitmap(&self, generation: u64) -> &[AtomicU64] {
        let from = self.shape.bitmap(generation);
        let all = self.mapping.words();
        all.get(from..from.saturating_add(self.shape.bit_words()))
            .unwrap_or_default()
    }

    /// Ends the kernel's generation: what is marked from here on goes to the other bitmap. Returns the one that ended.
    pub(crate) fn swap(&self) -> u64 {
        let generation = self.head().get(watch::GENERATION);
        generation.map_or(0, |g| g.fetch_add(1, Ordering::SeqCst))
    }

    /// Takes what `generation`, which has ended, has marked: `absorb` gets each word that is not zero, with its index, and
    /// must have it safe when it returns; only then its bits go. Returns the number of bits.
    ///
    /// A marker that was late may set a bit here while this runs, or after: then it has set it in the live bitmap as well.
    /// Waits: a pass over the bitmap.
    pub(crate) fn drain(&self, generation: u64, mut absorb: impl FnMut(usize, u64)) -> u64 {
        let mut taken = 0_u64;
        for (index, word) in self.bitmap(generation).iter().enumerate() {
            if word.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let bits = word.load(Ordering::Acquire);
            absorb(index, bits);
            word.fetch_and(!bits, Ordering::AcqRel);
            taken = taken.saturating_add(bits.count_ones().into());
        }
        self.set_word(watch::DRAINED, generation.wrapping_add(1));
        taken
    }

    /// The generation that ended last, if whoever ended it died before all of it was taken.
    pub(crate) fn left_over(&self) -> Option<u64> {
        let swaps = self.word(watch::GENERATION);
        (self.word(watch::DRAINED) != swaps).then(|| swaps.wrapping_sub(1))
    }

    /// The words of both bitmaps together that are not zero, with their index: what is marked and not taken yet.
    pub(crate) fn peek(&self) -> impl Iterator<Item = (usize, u64)> + '_ {
        let both = self.bitmap(0).iter().zip(self.bitmap(1)).enumerate();
        both.filter_map(|(index, (a, b))| {
            let bits = a.load(Ordering::Relaxed) | b.load(Ordering::Relaxed);
            (bits != 0).then_some((index, bits))
        })
    }
}
