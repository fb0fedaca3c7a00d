//! Marks, banks, the epoch word and the table of generations (P2, P3).
//!
//! ```text
//! epoch word ──▶ live bank (marked before each write)   table copy ──▶ [oldest … open generation] ──▶ banks
//! ```
//!
//! **Invariant**: all that an epoch word refers to was complete before it was stored, and is not changed while it is
//! the newest. The open generation is the last of the table; its bank is the live one. 'Changed since G' is the
//! union of the banks from G's run on: merged runs give a superset, never less.

use crate::atomic::{AtomicU64, Ordering, Words, fence, index, wide};
use crate::broken::{Break, broken, step};
use blktide_format::shared::{self, generation, table};
use blktide_types::clock::WallTime;
use blktide_types::geometry::Geometry;
use blktide_types::id::GenerationName;
use blktide_types::set::BlockSet;
use blktide_types::unit::{BlockIndex, BlockSize};

/// The epoch word: all that a swap changes, in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Epoch(u64);

impl Epoch {
    /// An epoch; `sequence` is that of the newest snapshot, which lives if `snapshot`.
    pub fn new(bank: usize, table: usize, snapshot: bool, sequence: u64) -> Self {
        Self(wide(bank) & 0xff | (wide(table) & 1) << 8 | u64::from(snapshot) << 9 | sequence << 16)
    }

    /// The epoch that a word of the control memory says.
    pub const fn of_word(word: u64) -> Self {
        Self(word)
    }

    /// The word.
    pub const fn word(self) -> u64 {
        self.0
    }

    /// The live bank.
    pub fn bank(self) -> usize {
        index(self.0 & 0xff)
    }

    /// Which copy of the table holds.
    pub fn table(self) -> usize {
        index(self.0 >> 8 & 1)
    }

    /// The sequence of the snapshot that lives, if one does.
    pub fn snapshot(self) -> Option<u64> {
        (self.0 >> 9 & 1 == 1).then_some(self.0 >> 16)
    }

    /// The sequence of the newest snapshot, alive or not.
    pub const fn sequence(self) -> u64 {
        self.0 >> 16
    }
}

/// The banks of a volume and which one is live.
#[derive(Clone, Debug)]
pub struct Marks {
    epoch: Words,
    banks: Box<[Words]>,
    geometry: Geometry,
}

impl Marks {
    pub(crate) const fn new(epoch: Words, banks: Box<[Words]>, geometry: Geometry) -> Self {
        Self {
            epoch,
            banks,
            geometry,
        }
    }

    /// The epoch. To be loaded after entering; the gate orders it (P3).
    pub fn epoch(&self) -> Epoch {
        Epoch(self.epoch.load(0, Ordering::Relaxed))
    }

    /// Stores the epoch: the swap.
    pub(crate) fn swap(&self, epoch: Epoch) {
        self.epoch.store(0, epoch.0, Ordering::Release);
    }

    /// Marks every grain that `len_bytes` from `offset_bytes` touch in the live bank of `epoch`. Allocates nothing,
    /// waits for nothing; 64 grains at a time.
    pub fn mark(&self, epoch: Epoch, offset_bytes: u64, len_bytes: u64) {
        let grain = self.geometry.grain();
        let (mut start, mut end) = (
            offset_bytes >> grain.shift(),
            offset_bytes
                .saturating_add(len_bytes)
                .min(self.geometry.volume_bytes())
                .div_ceil(grain.bytes_u64()),
        );
        if broken(Break::PartialUnmarked) {
            start = offset_bytes.div_ceil(grain.bytes_u64());
        }
        if broken(Break::LastBlockMissed) {
            end = end.min(self.geometry.volume_bytes() >> grain.shift());
        }
        if let Some(bank) = self.banks.get(epoch.bank()) {
            mark_bits(bank.all(), start, end);
        }
    }

    /// Marks what word `word_index` of a bitmap with one bit a `watch_grain` says, in the live bank; what the caller stores
    /// afterwards, whoever sees it sees the marks.
    pub(crate) fn absorb(&self, watch_grain: BlockSize, word_index: usize, bits: u64) {
        let (epoch, shift) = (self.epoch(), watch_grain.shift());
        let start = wide(word_index).checked_mul(64 << shift);
        let (Some(start), mut rest) = (start, bits) else {
            return;
        };
        while rest != 0 {
            let first = rest.trailing_zeros();
            let run = (rest >> first).trailing_ones();
            let offset = start.saturating_add(u64::from(first) << shift);
            if offset >= self.geometry.volume_bytes() {
                break;
            }
            self.mark(epoch, offset, u64::from(run) << shift);
            rest &= u64::MAX.checked_shl(first.saturating_add(run)).unwrap_or(0);
        }
        if !broken(Break::NoAbsorbFence) {
            fence(Ordering::Release);
        }
    }

    /// The words of `bank`; none if there is no such bank.
    pub(crate) fn bank(&self, bank: usize) -> Option<&Words> {
        self.banks.get(bank)
    }

    /// Number of banks.
    pub(crate) fn banks(&self) -> usize {
        self.banks.len()
    }
}

/// Sets bits `start .. end`, by whole words; a bit that is set is not stored again.
pub(crate) fn mark_bits(words: &[AtomicU64], start: u64, end: u64) {
    if start >= end {
        return;
    }
    let (first, last) = (start / 64, (end - 1) / 64);
    for word in first..=last {
        let low = if word == first { start % 64 } else { 0 };
        let high = if word == last { (end - 1) % 64 } else { 63 };
        let bits = u64::MAX >> (63 - high) & u64::MAX << low;
        if let Some(word) = words.get(index(word))
            && word.load(Ordering::Relaxed) & bits != bits
        {
            step();
            word.fetch_or(bits, Ordering::Relaxed);
        }
    }
}

/// Whether any bit of `start .. end` is set.
pub(crate) fn any_bit(words: &[AtomicU64], start: u64, end: u64) -> bool {
    if start >= end {
        return false;
    }
    let (first, last) = (start / 64, (end - 1) / 64);
    (first..=last).any(|word| {
        let low = if word == first { start % 64 } else { 0 };
        let high = if word == last { (end - 1) % 64 } else { 63 };
        let bits = u64::MAX >> (63 - high) & u64::MAX << low;
        words
            .get(index(word))
            .is_some_and(|w| w.load(Ordering::Relaxed) & bits != 0)
    })
}

/// Whether any grain of `block` is marked in `bank`.
pub(crate) fn block_marked(geometry: &Geometry, bank: &[AtomicU64], block: BlockIndex) -> bool {
    let ratio = geometry.block_size().shift() - geometry.grain().shift();
    let start = block.0 << ratio;
    any_bit(bank, start, start.saturating_add(1 << ratio))
}

/// The blocks of which any grain is marked in `bank`. Waits: in proportion to the volume.
pub fn marked_blocks(geometry: &Geometry, bank: &[AtomicU64]) -> BlockSet {
    let ratio = geometry.block_size().shift() - geometry.grain().shift();
    let count = geometry.block_count();
    if ratio == 0 {
        let words = bank.iter().map(|w| w.load(Ordering::Relaxed));
        return BlockSet::from_words(count, words);
    }
    let mut set = BlockSet::new(count);
    for (word, base) in bank.iter().zip((0_u64..).step_by(64)) {
        let mut bits = word.load(Ordering::Relaxed);
        while bits != 0 {
            let grain = base + u64::from(bits.trailing_zeros());
            set.insert(BlockIndex(grain >> ratio));
            // The other grains of that block say nothing new.
            let next = ((grain >> ratio) + 1) << ratio;
            bits = match next - base {
                64.. => 0,
                skip => bits & u64::MAX << skip,
            };
        }
    }
    set
}

/// A generation in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Generation {
    /// Its name: random, drawn when it opened.
    pub name: GenerationName,
    /// Its number, for people.
    pub counter: u64,
    /// When it opened.
    pub opened: WallTime,
    /// Bank of the run it is in.
    pub(crate) bank: usize,
}

/// A generation as the bitmap file keeps it: name and the grains written in it.
///
/// The list is ordered, oldest first; the last is the open one. Of a merged run the youngest has all the bits and
/// the others none: the union from any of them on is then right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredGeneration {
    /// Its name.
    pub name: GenerationName,
    /// Its number, for people.
    pub counter: u64,
    /// When it opened.
    pub opened: WallTime,
    /// One bit a grain, lowest first; empty means none.
    pub words: Vec<u64>,
}

/// Reads copy `copy` of the table; `None` if it is not one.
pub(crate) fn load_table(words: &Words, banks: usize) -> Option<Vec<Generation>> {
    let count = index(words.load(table::COUNT, Ordering::Relaxed));
    let size = generation::WORDS;
    let entries = words.all().get(table::WORDS..)?;
    let entries = entries.get(..count.checked_mul(size)?)?;
    let sum = shared::table_sum(
        std::iter::once(wide(count)).chain(entries.iter().map(|w| w.load(Ordering::Relaxed))),
    );
    if count == 0 || sum != words.load(table::SUM, Ordering::Relaxed) {
        return None;
    }
    let list: Vec<_> = entries
        .chunks_exact(size)
        .map(|entry| {
            let word = |i| {
                entry
                    .get(i)
                    .map_or(0, |w: &AtomicU64| w.load(Ordering::Relaxed))
            };
            Generation {
                name: name_of(word(generation::NAME_0), word(generation::NAME_1)),
                counter: word(generation::COUNTER),
                opened: WallTime(word(generation::OPENED).cast_signed()),
                bank: index(word(generation::BANK)),
            }
        })
        .collect();
    list.iter().all(|g| g.bank < banks).then_some(list)
}

/// Writes a table. The copy must not be the one that the epoch names.
pub(crate) fn store_table(words: &Words, list: &[Generation]) {
    let entry = |g: &Generation| {
        let [a, b] = halves(g.name);
        [
            a,
            b,
            wide(g.bank),
            g.counter,
            g.opened.0.cast_unsigned(),
            0,
            0,
            0,
        ]
    };
    let all = list.iter().flat_map(entry);
    for (i, word) in all.clone().enumerate() {
        words.store(table::WORDS.saturating_add(i), word, Ordering::Relaxed);
    }
    let sum = shared::table_sum(std::iter::once(wide(list.len())).chain(all));
    words.store(table::SUM, sum, Ordering::Relaxed);
    words.store(table::COUNT, wide(list.len()), Ordering::Release);
}

/// An id as two words.
pub(crate) fn halves(name: GenerationName) -> [u64; 2] {
    let number = u128::from_le_bytes(name.0);
    let low = number & u128::from(u64::MAX);
    [low, number >> 64].map(|half| u64::try_from(half).unwrap_or(0))
}

/// Two words as an id.
pub(crate) fn name_of(low: u64, high: u64) -> GenerationName {
    GenerationName((u128::from(high) << 64 | u128::from(low)).to_le_bytes())
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests;
