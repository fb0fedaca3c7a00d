//! Entering, holding, swapping (P3): who is inside, and how a hold waits until nobody is.
//!
//! ```text
//!           hold(id): CAS 0 → id            commit: CAS id → id + committing   open: store 0
//! gate: 0 ───────────────────────▶ id·2 ───────────────────────▶ id·2+1 ───────────────────▶ 0
//!                                   └── release or expiry: CAS id → 0 ──────────────────────▶ 0
//! ```
//!
//! **Invariant**: between a commit's CAS and the gate's opening no request is inside. A request enters *before*
//! it looks at gate, epoch, bit or state; one that finds the gate set leaves and waits outside.
//! Why both fences: without them the request may see the gate open and the hold may see the counter zero
//! (store buffering), and the write is in no generation.

use crate::atomic::{Memory, Ordering, Words, fence};
use crate::broken::{Break, broken};
use crate::error::EngineError;
use blktide_types::clock::Instant;
use core::time::Duration;
use std::sync::Arc;

/// What a request found when it entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// It is inside, and must leave.
    Inside,
    /// The gate is set: it has left again, and waits until the gate opens.
    Shut,
}

/// Where a hold stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HoldState {
    /// Requests are still inside.
    Waiting,
    /// Every queue has been seen empty: it can be committed.
    Held,
    /// Its deadline passed, or it was released: the gate is open.
    Over,
}

/// A hold that somebody asked for.
///
/// Dropping it does not open the gate: release it, or let it expire.
#[derive(Debug)]
pub struct Hold {
    id: u64,
    deadline: Instant,
    begun: Instant,
    seen_empty: u64,
}

impl Hold {
    /// Its number; a group's asker keeps it.
    pub const fn id(&self) -> u64 {
        self.id
    }

    /// When it ends by itself.
    pub const fn deadline(&self) -> Instant {
        self.deadline
    }

    /// When it began.
    pub const fn begun(&self) -> Instant {
        self.begun
    }
}

/// The gate of a volume, and who is inside.
#[derive(Clone, Debug)]
pub struct Gate {
    word: Words,
    sequence: Words,
    inside: Arc<[Words]>,
}

impl Gate {
    /// A gate whose word is word `gate` of `memory`, whose holds are counted in word `sequence`, and whose
    /// queues count who is inside in the words `inside`.
    pub fn new(
        memory: &Arc<dyn Memory>,
        gate: usize,
        sequence: usize,
        inside: &[usize],
    ) -> Result<Self, EngineError> {
        Ok(Self {
            word: Words::new(memory, gate, 1)?,
            sequence: Words::new(memory, sequence, 1)?,
            inside: inside
                .iter()
                .map(|i| Words::new(memory, *i, 1))
                .collect::<Result<_, _>>()?,
        })
    }

    /// Enters by `queue`, then looks at the gate.
    pub fn enter(&self, queue: usize) -> Entry {
        let early = broken(Break::LookBeforeEntering).then(|| self.word.load(0, Ordering::Acquire));
        if let Some(inside) = self.inside.get(queue) {
            inside.add(0, 1);
        }
        if !broken(Break::NoEnterFence) {
            fence(Ordering::SeqCst);
        }
        let order = if broken(Break::GateRelaxed) {
            Ordering::Relaxed
        } else {
            Ordering::Acquire
        };
        if early.unwrap_or_else(|| self.word.load(0, order)) == 0 {
            Entry::Inside
        } else {
            self.leave(queue);
            Entry::Shut
        }
    }

    /// Leaves `queue`: its write is complete, or it goes to wait outside.
    pub fn leave(&self, queue: usize) {
        let order = if broken(Break::LeaveRelaxed) {
            Ordering::Relaxed
        } else {
            Ordering::Release
        };
        if let Some(word) = self.inside.get(queue).and_then(|w| w.at(0)) {
            word.fetch_sub(1, order);
        }
    }

    /// Whether a hold lives.
    pub fn is_set(&self) -> bool {
        self.word.load(0, Ordering::Acquire) != 0
    }

    /// Requests inside, of all queues.
    pub fn inside(&self) -> u64 {
        self.inside
            .iter()
            .map(|w| w.load(0, Ordering::Relaxed))
            .sum()
    }

    /// Sets the gate; at most until `now + limit`. From here on nobody new gets inside.
    pub fn hold(&self, now: Instant, limit: Duration) -> Result<Hold, EngineError> {
        let id = self.sequence.add(0, 1).saturating_add(1);
        let word = self.gate_word()?;
        if let Err(holder) = word.compare_exchange(0, id << 1, Ordering::AcqRel, Ordering::Relaxed)
        {
            return Err(EngineError::Held {
                holder: holder >> 1,
            });
        }
        if !broken(Break::NoHoldFence) {
            fence(Ordering::SeqCst);
        }
        Ok(Hold {
            id,
            deadline: now.after(limit),
            begun: now,
            seen_empty: 0,
        })
    }

    /// Looks which queues are empty. Each need be seen so only once: what enters later finds the gate.
    ///
    /// Past its deadline the hold is expired, unless its commit has begun.
    pub fn poll(&self, hold: &mut Hold, now: Instant) -> HoldState {
        let order = if broken(Break::CountRelaxed) {
            Ordering::Relaxed
        } else {
            Ordering::Acquire
        };
        if self.word.load(0, Ordering::Relaxed) != hold.id << 1 {
            return HoldState::Over;
        }
        let mut empty = true;
        for (queue, inside) in self.inside.iter().enumerate() {
            let bit = 1_u64.checked_shl(u32::try_from(queue).unwrap_or(u32::MAX));
            let bit = bit.unwrap_or(0);
            if hold.seen_empty & bit == 0 {
                let skipped = broken(Break::NoWait) || (broken(Break::OneQueue) && queue > 0);
                if skipped || inside.load(0, order) == 0 {
                    hold.seen_empty |= bit;
                } else {
                    empty = false;
                }
            }
        }
        if now >= hold.deadline {
            self.expire(hold.id);
            HoldState::Over
        } else if empty {
            HoldState::Held
        } else {
            HoldState::Waiting
        }
    }

    /// Takes the hold for a commit: if this succeeds nobody is inside, and nobody can end it, until [`Self::open`].
    ///
    /// The hold must have been seen [`HoldState::Held`]; else, or if it is over, nothing happens.
    pub fn begin_commit(&self, hold: &Hold) -> Result<(), EngineError> {
        let over = EngineError::HoldOver { hold: hold.id };
        if broken(Break::ExpiredCommits) {
            return Ok(());
        }
        let every = self.every_queue();
        if hold.seen_empty & every != every {
            return Err(over);
        }
        let word = self.gate_word()?;
        let found = word.load(Ordering::Relaxed);
        let from = if broken(Break::NoHoldId) && found != 0 && found & 1 == 0 {
            found
        } else {
            hold.id << 1
        };
        word.compare_exchange(from, from | 1, Ordering::AcqRel, Ordering::Relaxed)
            .map(|_| ())
            .map_err(|_lost| over)
    }

    /// Opens the gate after a commit. Who waits at it must then be woken.
    pub fn open(&self) {
        self.word.store(0, 0, Ordering::Release);
    }

    /// Ends hold `id` unless its commit has begun; true if it lived. Who waits at the gate must then be woken.
    pub fn expire(&self, id: u64) -> bool {
        let Some(word) = self.word.at(0) else {
            return false;
        };
        if broken(Break::ExpiryIsAStore) {
            return word.swap(0, Ordering::AcqRel) != 0;
        }
        word.compare_exchange(id << 1, 0, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    }

    /// For a successor, before any request of its own: the gate is open and nobody is inside.
    ///
    /// Right only while the predecessor is dead and no queue of ours runs.
    pub(crate) fn reset(&self) {
        for inside in self.inside.iter() {
            inside.store(0, 0, Ordering::Relaxed);
        }
        self.word.store(0, 0, Ordering::SeqCst);
    }

    fn every_queue(&self) -> u64 {
        match self.inside.len() {
            64.. => u64::MAX,
            few => (1 << few) - 1,
        }
    }

    fn gate_word(&self) -> Result<&crate::atomic::AtomicU64, EngineError> {
        self.word.at(0).ok_or(EngineError::MemoryTooSmall {
            needed: 1,
            found: 0,
        })
    }
}
