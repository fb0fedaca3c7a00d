//! The control side of a volume whose data path is not ours: marks come from elsewhere, generations change without a gate.
//!
//! ```text
//! kernel's bitmaps ──drain──▶ absorb ──▶ open generation's bank
//! prepare_generation (all that takes time) ─▶ freeze ─▶ drain, absorb ─▶ open_prepared (one store) ─▶ thaw ─▶ settle
//! ```
//! Whoever drains clears a word of its source only after [`Control::absorb`] has returned: a death in between leaves the marks
//! in both places. What is absorbed falls into the generation that is open then; so all writes of a generation that closes
//! must have been drained before, which is what the freeze is for.
//!
//! **Invariant**: as for every control side: its death at any moment leaves a table that is right, and names that mean at least
//! what they meant.

use super::Control;
use super::generations::{Wish, position};
use crate::control::Trust;
use crate::error::EngineError;
use crate::tracker::Epoch;
use blktide_types::clock::WallTime;
use blktide_types::id::GenerationName;
use blktide_types::set::BlockSet;
use blktide_types::unit::BlockSize;

/// A generation that lacks nothing but its opening. Letting it go leaves everything as it is.
#[derive(Clone, Copy, Debug)]
pub struct PreparedGeneration {
    opens: GenerationName,
    counter: u64,
    base_resolved: bool,
    epoch: Epoch,
    version: u64,
}

impl PreparedGeneration {
    /// Whether the base is known: if not, everything is wanted, and the backup is not incremental.
    pub const fn base_resolved(&self) -> bool {
        self.base_resolved
    }
}

/// A generation that has opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened {
    /// Its name: what the image of this instant records.
    pub name: GenerationName,
    /// Its number, for people.
    pub counter: u64,
    /// Whether the base was known when it was prepared.
    pub base_resolved: bool,
}

impl Control {
    /// Goes on with the memories of a control side that died or ended, at whatever moment. There was never a snapshot, and
    /// nobody ever stood at the gate: [`Self::take_over`] is for those.
    ///
    /// A table that does not check is distrusted, with `fresh` as the only name. Says how the tracker stands.
    pub fn adopt(&mut self, fresh: (GenerationName, WallTime)) -> Trust {
        self.reopen(fresh);
        self.trusted()
    }

    /// Takes over marks that were made elsewhere: `bits` is word `word_index` of a bitmap with one bit a `watch_grain`, lowest
    /// first. Every grain of ours that they touch is marked in the open generation; bits past the volume are nobody's.
    ///
    /// What the caller stores after this, whoever sees it sees the marks: so the word may be cleared (by `fetch_and(!bits)`: it may
    /// have gained bits). Allocates nothing, waits for nothing.
    pub fn absorb(&self, watch_grain: BlockSize, word_index: usize, bits: u64) {
        self.engine
            .inner
            .marks
            .absorb(watch_grain, word_index, bits);
    }

    /// Whether a base is known: what changed since it can be said.
    pub fn resolves(&self, base: GenerationName) -> bool {
        let known = |table: Vec<_>| position(&table, base).is_some();
        !self.engine.inner.passes_through() && self.table().is_some_and(known)
    }

    /// Gets the next generation ready: names dropped, neighbours merged, a bank zeroed, the table written. `opens` is random and was
    /// never used before, `at` is for people; `base` is kept apart like a hinted boundary, and need not be known.
    ///
    /// Waits: in proportion to the volume's bitmap. Errors: nothing changed, but neighbours may be merged.
    pub fn prepare_generation(
        &mut self,
        opens: GenerationName,
        at: WallTime,
        base: Option<GenerationName>,
    ) -> Result<PreparedGeneration, EngineError> {
        let next = self.make_next(Wish {
            opens,
            at,
            base,
            // As random as `opens`, and another.
            fresh: GenerationName(opens.0.map(|byte| !byte)),
        })?;
        let sequence = self.engine.inner.marks.epoch().sequence();
        Ok(PreparedGeneration {
            opens: next.name,
            counter: next.counter,
            base_resolved: next.base.is_some(),
            epoch: next.epoch(false, sequence),
            version: next.version,
        })
    }

    /// The instant: one store. What was absorbed before is in generations that are closed now. Afterwards, when nobody waits any
    /// more, [`Self::settle`].
    ///
    /// Errors: `PlanStale` if the table changed since `prepare_generation`, or another was prepared: nothing happened.
    pub fn open_prepared(&mut self, prepared: &PreparedGeneration) -> Result<Opened, EngineError> {
        if prepared.version != self.version || self.living.is_some() {
            return Err(EngineError::PlanStale);
        }
        self.engine.inner.marks.swap(prepared.epoch);
        self.version = self.version.wrapping_add(1);
        Ok(Opened {
            name: prepared.opens,
            counter: prepared.counter,
            base_resolved: prepared.base_resolved,
        })
    }

    /// The blocks written since `from` opened and before `until` did: what the image of `until`'s instant has new. A superset where
    /// runs are merged. Waits: in proportion to the volume's bitmap.
    pub fn changed_between(
        &self,
        from: GenerationName,
        until: GenerationName,
    ) -> Result<BlockSet, EngineError> {
        if self.engine.inner.passes_through() {
            return Err(EngineError::PassingThrough);
        }
        let list = self.table().unwrap_or_default();
        let unknown = |name| EngineError::UnknownGeneration { name };
        let start = position(&list, from).ok_or_else(|| unknown(from))?;
        let end = list.iter().position(|g| g.name == until);
        let end = end.ok_or_else(|| unknown(until))?;
        let closed = list.get(start..end);
        // `until` is older than `from`.
        self.union(closed.ok_or_else(|| unknown(until))?)
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests;
