//! Two bitmaps that the kernel's programs mark in, and how marks leave them (P14).
//!
//! ```text
//! a program, at queue, issue and completion        whoever holds the volume's lock
//! ┌▶ g = generation                                swap:   generation += 1, full barrier
//! │  set bits in bitmap g & 1                      drain:  w = word of the closed bitmap
//! │  full barrier                                          absorb w
//! └─ again if generation moved                             word &= !w
//! ```
//! [`WatchMarks::mark`] is what the programs do, stated in Rust; the programs themselves are C. What the models of this crate
//! explore is this statement: whoever changes one changes the other.
//!
//! A mark whose second look finds the generation unmoved was there before the swap, so the drain sees it. Any other is set again
//! in the bitmap that is live now; what it left in the closed one is an extra bit. So a drain owes nobody a second visit, and no
//! swap waits for anybody.
//!
//! A write that is under way over a swap was marked in the closed generation, and lands after its block was read: it is marked again
//! when it completes, before its submitter is told. Where no completion is seen (a driver that takes bios) generations change
//! inside a freeze only.
//!
//! **Invariant**: a write that completes after its block was read is marked in the generation that was live then, or in a later one;
//! or [`WatchMarks::lost`] has moved. A bit leaves a bitmap only after it was absorbed.

use crate::atomic::{AtomicU64, Memory, Ordering, Words, fence};
use crate::broken::{Break, broken, step};
use crate::error::EngineError;
use crate::tracker::mark_bits;
use blktide_format::shared::{WatchShape, watch};
use core::ops::ControlFlow;
use std::sync::Arc;

/// Turns that a mark takes before it is given up.
const TURNS: u32 = 16;

/// The memory that the kernel marks in.
#[derive(Clone, Debug)]
pub struct WatchMarks {
    generation: Words,
    lost: Words,
    bitmaps: [Words; 2],
    turns: u32,
}

impl WatchMarks {
    /// The marks in `memory`, of a head that declares `shape`.
    pub fn new(memory: &Arc<dyn Memory>, shape: &WatchShape) -> Result<Self, EngineError> {
        let bits = shape.bit_words();
        Ok(Self {
            generation: Words::new(memory, watch::GENERATION, 1)?,
            lost: Words::new(memory, watch::LOST, 1)?,
            bitmaps: [
                Words::new(memory, shape.bitmap(0), bits)?,
                Words::new(memory, shape.bitmap(1), bits)?,
            ],
            turns: TURNS,
        })
    }

    /// Two words of `memory`, then two bitmaps of one word: for small worlds.
    #[cfg(all(test, loom))]
    pub(crate) fn small(memory: &Arc<dyn Memory>, turns: u32) -> Result<Self, EngineError> {
        Ok(Self {
            generation: Words::new(memory, 0, 1)?,
            lost: Words::new(memory, 1, 1)?,
            bitmaps: [Words::new(memory, 2, 1)?, Words::new(memory, 3, 1)?],
            turns,
        })
    }

    /// Number of the newest swap.
    pub fn generation(&self) -> u64 {
        self.generation.load(0, Ordering::Acquire)
    }

    /// Marks that were given up: since it moved nothing may be believed.
    pub fn lost(&self) -> u64 {
        self.lost.load(0, Ordering::Relaxed)
    }

    /// Marks the grains `start .. end`: what a program does before it lets a write go on, and again when it has completed.
    ///
    /// The full barrier before the second look is needed though no bit may have been stored: another write may have set it. The first
    /// look is an acquire, which is free: in the kernel the address of the word depends on it.
    pub fn mark(&self, start: u64, end: u64) {
        for _ in 0..self.turns {
            let generation = self.generation();
            let mut moved = broken(Break::LookBeforeBits) && self.generation() != generation;
            mark_bits(self.live(generation).all(), start, end);
            if !broken(Break::NoMarkFence) {
                fence(Ordering::SeqCst);
            }
            if !broken(Break::NoSecondLook) && !broken(Break::LookBeforeBits) {
                moved = self.generation.load(0, Ordering::Relaxed) != generation;
            }
            if !moved {
                return;
            }
        }
        if !broken(Break::LostUnsaid) {
            self.lost.add(0, 1);
        }
    }

    /// Ends a generation: the other bitmap is live. Its number. To be called only when the closed bitmap was drained since the swap
    /// before: what it still holds would be taken for marks of the new generation.
    ///
    /// Where no completion is seen: inside a freeze only.
    pub fn swap(&self) -> u64 {
        step();
        let before = self
            .generation
            .at(0)
            .map_or(0, |g| g.fetch_add(1, Ordering::SeqCst));
        if !broken(Break::NoSwapFence) {
            fence(Ordering::SeqCst);
        }
        before.wrapping_add(1)
    }

    /// Drains the bitmap that the newest swap closed: after each swap, and first of all by a successor of a process that died. Each
    /// word that is not zero is given to `absorb`, by index; it is cleared after that. If `absorb` breaks off the word stays as it is.
    ///
    /// Waits: in proportion to the bitmap.
    pub fn drain_closed<B>(
        &self,
        absorb: impl FnMut(usize, u64) -> ControlFlow<B>,
    ) -> ControlFlow<B> {
        drain(self.live(self.generation().wrapping_add(1)), absorb)
    }

    /// Drains the bitmap that is live, as [`Self::drain_closed`] does the other: what was marked so far is absorbed and no
    /// generation ends. Only where completions are seen: a write that is under way is marked again by its completion.
    pub fn drain_live<B>(
        &self,
        absorb: impl FnMut(usize, u64) -> ControlFlow<B>,
    ) -> ControlFlow<B> {
        drain(self.live(self.generation()), absorb)
    }

    /// The bitmap that is live in `generation`.
    const fn live(&self, generation: u64) -> &Words {
        let [even, odd] = &self.bitmaps;
        if generation & 1 == 0 { even } else { odd }
    }
}

fn drain<B>(
    bitmap: &Words,
    mut absorb: impl FnMut(usize, u64) -> ControlFlow<B>,
) -> ControlFlow<B> {
    for (index, word) in bitmap.all().iter().enumerate() {
        let bits = word.load(Ordering::Relaxed);
        if bits == 0 {
            continue;
        }
        if broken(Break::ClearBeforeAbsorb) {
            clear(word, bits);
        }
        absorb(index, bits)?;
        if !broken(Break::ClearBeforeAbsorb) {
            clear(word, bits);
        }
    }
    // What is read of the device from here on is read after the words were cleared, for a completion that finds them set.
    fence(Ordering::SeqCst);
    ControlFlow::Continue(())
}

/// Clears what was absorbed, and nothing that came after.
fn clear(word: &AtomicU64, bits: u64) {
    step();
    if broken(Break::ClearByStore) {
        word.store(0, Ordering::Relaxed);
    } else {
        word.fetch_and(!bits, Ordering::Relaxed);
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests;
