//! A snapshot's states (P1): readers do not stop writers, and both meet in a compare-and-swap.
//!
//! ```text
//! WANTED ──writer's CAS──▶ PRESERVING ──copy safe, writer's CAS──▶ PRESERVED ──reader's CAS──▶ DONE
//!    └────────reader's CAS─────┴──────────────────────────────────────────────────────────────▶ DONE
//! ```
//!
//! **Invariant**: states only move forward while the snapshot lives; a block is taken by whoever's CAS made it
//! `DONE`, so once; a save slot is used again only when its owner was found `DONE` (acquire).
//! The reader's process may write to the states at will: nothing here takes them for an index or a length.

use crate::atomic::{AtomicU64, Memory, Ordering, Words, fence, index};
use crate::broken::{Break, broken};
use crate::error::EngineError;
use blktide_format::shared;
use blktide_types::io::RevokeCause;
use blktide_types::unit::{BlockCount, BlockIndex};
use std::sync::Arc;

/// What a snapshot knows of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Nobody has touched it since the instant (if it is wanted at all).
    Wanted,
    /// A writer is copying its original.
    Preserving,
    /// Its original lies in the save area.
    Preserved,
    /// It has been taken, or dropped: writers need not care any more.
    Done,
}

impl State {
    const fn bits(self) -> u64 {
        match self {
            Self::Wanted => 0,
            Self::Preserving => 1,
            Self::Preserved => 2,
            Self::Done => 3,
        }
    }

    const fn of_bits(bits: u64) -> Self {
        match bits & 3 {
            0 => Self::Wanted,
            1 => Self::Preserving,
            2 => Self::Preserved,
            _ => Self::Done,
        }
    }
}

/// The states of a snapshot's blocks: 32 to a word.
#[derive(Clone, Debug)]
pub struct States {
    words: Words,
    lease: Words,
    blocks: u64,
}

impl States {
    /// The states of `blocks` blocks in `memory`, laid out as in [`shared::states`].
    pub fn new(memory: &Arc<dyn Memory>, blocks: BlockCount) -> Result<Self, EngineError> {
        Self::at(memory, shared::states::WORDS, shared::states::LEASE, blocks)
    }

    /// The same with the places given: for small worlds.
    pub(crate) fn at(
        memory: &Arc<dyn Memory>,
        start: usize,
        lease: usize,
        blocks: BlockCount,
    ) -> Result<Self, EngineError> {
        Ok(Self {
            words: Words::new(memory, start, index(blocks.0.div_ceil(32)))?,
            lease: Words::new(memory, lease, 1)?,
            blocks: blocks.0,
        })
    }

    /// Number of blocks.
    pub const fn len(&self) -> BlockCount {
        BlockCount(self.blocks)
    }

    /// Whether there are none.
    pub const fn is_empty(&self) -> bool {
        self.blocks == 0
    }

    /// The state of `block`; past the end `Done`.
    pub fn look(&self, block: BlockIndex, order: Ordering) -> State {
        match self.word(block) {
            Some((word, shift)) => State::of_bits(word.load(order) >> shift),
            None => State::Done,
        }
    }

    /// Moves `block` from one state to another; false if it was in another state.
    ///
    /// A change of a neighbour in the same word is no failure: it is tried again.
    pub fn advance(&self, block: BlockIndex, from: State, to: State) -> bool {
        let Some((word, shift)) = self.word(block) else {
            return false;
        };
        let mut found = word.load(Ordering::Relaxed);
        loop {
            if State::of_bits(found >> shift) != from {
                return false;
            }
            let next = found & !(3 << shift) | to.bits() << shift;
            match word.compare_exchange(found, next, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return true,
                Err(now) => found = now,
            }
        }
    }

    /// Moves `block` to `Done` from any state, and says which it was.
    pub fn finish(&self, block: BlockIndex) -> State {
        match self.word(block) {
            Some((word, shift)) => {
                State::of_bits(word.fetch_or(3 << shift, Ordering::AcqRel) >> shift)
            }
            None => State::Done,
        }
    }

    /// Reader: counts its lease up, as a sign of progress (P8).
    pub fn renew(&self) {
        self.lease.add(0, 1);
    }

    /// What the lease stands at.
    pub fn lease(&self) -> u64 {
        self.lease.load(0, Ordering::Relaxed)
    }

    /// Stores a state without asking: what a broken rule does.
    fn force(&self, block: BlockIndex, to: State) {
        if let Some((word, shift)) = self.word(block) {
            word.fetch_and(!(3 << shift), Ordering::AcqRel);
            word.fetch_or(to.bits() << shift, Ordering::AcqRel);
        }
    }

    fn word(&self, block: BlockIndex) -> Option<(&AtomicU64, u64)> {
        if block.0 >= self.blocks {
            return None;
        }
        Some((self.words.at(index(block.0 / 32))?, block.0 % 32 * 2))
    }
}

/// The revoked word, seen from one snapshot.
///
/// It lies in the control memory, which every successor has: so a successor can revoke a snapshot whose states it
/// never saw. `sequence << 8 | cause`: that snapshot and all older ones are revoked.
#[derive(Clone, Debug)]
pub struct Revocation {
    word: Words,
    sequence: u64,
}

impl Revocation {
    /// The revocation of the snapshot numbered `sequence`, in the control memory.
    pub fn new(control: &Arc<dyn Memory>, sequence: u64) -> Result<Self, EngineError> {
        Self::at(control, shared::control::REVOKED, sequence)
    }

    pub(crate) fn at(
        memory: &Arc<dyn Memory>,
        word: usize,
        sequence: u64,
    ) -> Result<Self, EngineError> {
        Ok(Self {
            word: Words::new(memory, word, 1)?,
            sequence,
        })
    }

    /// Why the snapshot is revoked, if it is.
    pub fn cause(&self) -> Option<RevokeCause> {
        let word = self.word.load(0, Ordering::Relaxed);
        let [cause, ..] = word.to_le_bytes();
        (word >> 8 >= self.sequence)
            .then(|| RevokeCause::from_number(cause).unwrap_or(RevokeCause::ServerDied))
    }

    /// Writer: whether it is revoked; if so, what follows comes after it for everyone.
    pub(crate) fn seen(&self) -> bool {
        let seen = self.cause().is_some();
        if seen && !broken(Break::SeenRevokeNoFence) {
            fence(Ordering::SeqCst);
        }
        seen
    }

    /// Revokes the snapshot and all older ones; what the caller writes afterwards comes after it for everyone.
    /// Says whether this call did it.
    pub fn revoke(&self, cause: RevokeCause) -> bool {
        let to = self.sequence << 8 | u64::from(cause.number());
        let mut did = false;
        if let Some(word) = self.word.at(0) {
            let mut found = word.load(Ordering::Relaxed);
            while found >> 8 < self.sequence {
                match word.compare_exchange(found, to, Ordering::AcqRel, Ordering::Relaxed) {
                    Ok(_) => {
                        did = true;
                        break;
                    }
                    Err(now) => found = now,
                }
            }
            if cfg!(loom) {
                // Loom does not switch between an access and the fence after it: so another queue can see it here.
                word.fetch_max(to, Ordering::AcqRel);
            }
        }
        if !broken(Break::NoRevokeFence) {
            fence(Ordering::SeqCst);
        }
        did
    }
}

const FREE: u64 = 0;
const FILLING: u64 = 1;
const OWNED: u64 = 2;

/// A place in the save area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SaveSlot(pub u32);

/// Which block each save slot belongs to. Written by the server only; the reader looks blocks up in it.
#[derive(Clone, Debug)]
pub struct SlotIndex {
    block_of: Words,
    owner: Words,
    touched: Words,
    slots: u32,
}

impl SlotIndex {
    /// The index of `slots` save slots in `memory`, laid out as in [`shared::index`].
    pub fn new(memory: &Arc<dyn Memory>, slots: u32) -> Result<Self, EngineError> {
        Self::at(memory, shared::index::WORDS, shared::index::TOUCHED, slots)
    }

    pub(crate) fn at(
        memory: &Arc<dyn Memory>,
        start: usize,
        touched: usize,
        slots: u32,
    ) -> Result<Self, EngineError> {
        let count = index(u64::from(slots));
        Ok(Self {
            block_of: Words::new(memory, start, count)?,
            owner: Words::new(memory, start.saturating_add(count), count)?,
            touched: Words::new(memory, touched, 1)?,
            slots,
        })
    }

    /// Words that the index of `slots` save slots takes.
    pub fn words(slots: u32) -> usize {
        shared::index::WORDS.saturating_add(index(u64::from(slots) * 2))
    }

    /// Number of save slots.
    pub const fn len(&self) -> u32 {
        self.slots
    }

    /// Whether there are none.
    pub const fn is_empty(&self) -> bool {
        self.slots == 0
    }

    /// Save slots that were handed out at least once: the save area's peak.
    pub fn peak(&self) -> u32 {
        let touched = self.touched.load(0, Ordering::Relaxed);
        u32::try_from(touched).map_or(self.slots, |t| t.min(self.slots))
    }

    /// Reader: the block that `slot` was named for, if any. A hint, true only for a block found `Preserved` before.
    pub fn block_of(&self, slot: SaveSlot) -> Option<BlockIndex> {
        self.block_of
            .load(at(slot), Ordering::Relaxed)
            .checked_sub(1)
            .map(BlockIndex)
    }

    /// Reader: the slot of `block`, which was found `Preserved`. Waits: in proportion to the slots in use.
    pub fn slot_of(&self, block: BlockIndex) -> Option<SaveSlot> {
        (0..self.peak())
            .map(SaveSlot)
            .find(|s| self.block_of(*s) == Some(block))
    }

    /// Server: a free slot, now being filled. `from` is where the last one was found.
    ///
    /// Never used ones first; then those whose owner is `DONE`: the reader's CAS is the freeing. At most `tries` of these
    /// are looked at; the next call goes on behind them.
    fn claim(&self, states: &States, from: &mut u32, tries: u32) -> Option<SaveSlot> {
        let touched = self.touched.at(0)?;
        let mut next = touched.load(Ordering::Relaxed);
        while next < u64::from(self.slots) {
            match touched.compare_exchange(next, next + 1, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => {
                    // A queue that found all slots handed out may have found this one, still free, before us.
                    let slot = SaveSlot(u32::try_from(next).ok()?);
                    let owner = self.owner.at(at(slot))?;
                    let ours =
                        owner.compare_exchange(FREE, FILLING, Ordering::AcqRel, Ordering::Relaxed);
                    if ours.is_ok() {
                        return Some(slot);
                    }
                    next = touched.load(Ordering::Relaxed);
                }
                Err(now) => next = now,
            }
        }
        let order = if broken(Break::ReclaimRelaxed) {
            Ordering::Relaxed
        } else {
            Ordering::Acquire
        };
        let start = *from;
        for step in 0..tries.min(self.slots) {
            let slot = SaveSlot(start.wrapping_add(step) % self.slots);
            *from = slot.0.wrapping_add(1);
            let owner = self.owner.at(at(slot))?;
            let found = owner.load(Ordering::Acquire);
            let free = found == FREE
                || found >= OWNED && states.look(BlockIndex(found - OWNED), order) == State::Done;
            if free
                && owner
                    .compare_exchange(found, FILLING, Ordering::AcqRel, Ordering::Relaxed)
                    .is_ok()
            {
                return Some(slot);
            }
        }
        None
    }

    fn name(&self, slot: SaveSlot, block: BlockIndex) {
        self.block_of
            .store(at(slot), block.0.saturating_add(1), Ordering::Relaxed);
    }

    fn own(&self, slot: SaveSlot, block: Option<BlockIndex>) {
        let owner = block.map_or(FREE, |b| b.0.saturating_add(OWNED));
        self.owner.store(at(slot), owner, Ordering::Release);
    }
}

/// What a writer finds when it looks at a wanted block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// It may be overwritten.
    Free,
    /// It is the caller's to preserve into this slot; until then it may not be overwritten.
    Preserve(SaveSlot),
    /// Another request is preserving it.
    Wait,
    /// It must be preserved and no save slot is free.
    Full,
}

/// A snapshot's shared words, from the writers' side.
#[derive(Clone, Debug)]
pub struct Writers {
    /// States of the blocks.
    pub states: States,
    /// Save slots.
    pub slots: SlotIndex,
    /// Whether the snapshot is revoked.
    pub revocation: Revocation,
    /// Save slots that a look for a free one goes through at most. Fewer than all only where `Full` means 'look again
    /// soon': many requests that wait must not keep the queue's thread from its work.
    pub tries: u32,
}

impl Writers {
    /// Looks at a wanted `block` that is about to be overwritten. `from` remembers where slots were found.
    pub fn look(&self, block: BlockIndex, from: &mut u32) -> Look {
        loop {
            match self.states.look(block, Ordering::Acquire) {
                State::Done | State::Preserved => return Look::Free,
                State::Wanted | State::Preserving if self.revocation.seen() => return Look::Free,
                State::Preserving if broken(Break::NoWaitForPreserving) => return Look::Free,
                State::Preserving => return Look::Wait,
                State::Wanted => {
                    let Some(slot) = self.slots.claim(&self.states, from, self.tries) else {
                        return Look::Full;
                    };
                    if self.states.advance(block, State::Wanted, State::Preserving) {
                        self.slots.name(slot, block);
                        if broken(Break::OwnerBeforePreserved) {
                            self.slots.own(slot, Some(block));
                        }
                        if broken(Break::PreservedBeforeCopy) {
                            self.states
                                .advance(block, State::Preserving, State::Preserved);
                        }
                        return Look::Preserve(slot);
                    }
                    self.slots.own(slot, None);
                }
            }
        }
    }

    /// The copy of `block` in `slot` is safe: it may be overwritten.
    pub fn preserved(&self, block: BlockIndex, slot: SaveSlot) {
        let won = if broken(Break::PreservedByStore) {
            self.states.force(block, State::Preserved);
            true
        } else {
            self.states
                .advance(block, State::Preserving, State::Preserved)
                || broken(Break::PreservedBeforeCopy)
        };
        self.slots.own(slot, won.then_some(block));
    }
}

/// What a reader finds when it looks at a block whose bytes it has read from the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// The bytes from the device are the instant's, and the caller's.
    Taken,
    /// The original lies in the save area: find its slot, copy it, then [`Readers::take_copy`].
    Preserved,
    /// Somebody else has it, or it is not wanted: throw the bytes away.
    Gone,
    /// The snapshot is revoked: give up.
    Revoked(RevokeCause),
}

/// A snapshot's shared words, from the reader's side.
#[derive(Clone, Debug)]
pub struct Readers {
    /// States of the blocks.
    pub states: States,
    /// Save slots.
    pub slots: SlotIndex,
    /// Whether the snapshot is revoked.
    pub revocation: Revocation,
}

impl Readers {
    /// Takes `block`, whose bytes the caller has just read from the device.
    ///
    /// After a lost CAS it looks again; the device need not be read again, since what a won CAS proves (no
    /// overwrite had been submitted when the bytes were read) does not depend on when it was tried.
    pub fn take(&self, block: BlockIndex) -> Found {
        if !broken(Break::NoReaderFence) {
            fence(Ordering::SeqCst);
        }
        let order = if broken(Break::LookRelaxed) {
            Ordering::Relaxed
        } else {
            Ordering::Acquire
        };
        loop {
            match self.states.look(block, order) {
                State::Done => return Found::Gone,
                State::Preserved => return Found::Preserved,
                state @ (State::Wanted | State::Preserving) => {
                    if self.win(block, state) {
                        return self.taken();
                    }
                }
            }
        }
    }

    /// Takes `block`, which was found [`Found::Preserved`] and whose slot the caller has just copied
    /// (by read(2), never as plain memory).
    ///
    /// [`Found::Gone`]: somebody else was first, and the copy may be of another block by now.
    pub fn take_copy(&self, block: BlockIndex) -> Found {
        if !broken(Break::NoReaderFence) {
            fence(Ordering::SeqCst);
        }
        if self.win(block, State::Preserved) {
            self.taken()
        } else {
            Found::Gone
        }
    }

    /// Drops `block`: nobody will read it (P10).
    pub fn drop_block(&self, block: BlockIndex) {
        if broken(Break::ShrinkOnlyWanted) {
            self.states.advance(block, State::Wanted, State::Done);
        } else {
            self.states.finish(block);
        }
    }

    /// Whether every block of `wanted` is done and nothing was revoked: what a commit needs.
    pub fn complete(&self, wanted: impl Iterator<Item = BlockIndex>) -> Result<bool, RevokeCause> {
        let mut wanted = wanted;
        let done = wanted.all(|b| self.states.look(b, Ordering::Acquire) == State::Done);
        match self.revocation.cause() {
            Some(cause) if !done => Err(cause),
            Some(_) | None => Ok(done),
        }
    }

    fn win(&self, block: BlockIndex, from: State) -> bool {
        if broken(Break::TakeByStore) {
            self.states.finish(block);
            return true;
        }
        self.states.advance(block, from, State::Done) || broken(Break::LoserKeeps)
    }

    fn taken(&self) -> Found {
        match self.revocation.cause() {
            Some(cause) if !broken(Break::NoRevokedLoad) => Found::Revoked(cause),
            Some(_) | None => {
                self.states.renew();
                Found::Taken
            }
        }
    }
}

fn at(slot: SaveSlot) -> usize {
    index(u64::from(slot.0))
}

/// Bytes of the save area before `slot`, for blocks of `block_bytes`.
pub fn slot_offset(slot: SaveSlot, block_bytes: u64) -> u64 {
    u64::from(slot.0).saturating_mul(block_bytes)
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests;
