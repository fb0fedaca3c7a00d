//! A snapshot's begin and end, from the control side (P1, P3, P8, P10).
//!
//! **Invariant**: everything that the epoch word will name is complete before the hold; in the hold there is one store.

use super::Control;
use super::generations::Wish;
use crate::atomic::{Memory, Ordering, Words};
use crate::broken::{Break, broken};
use crate::error::EngineError;
use crate::gate::{Hold, HoldState};
use crate::snapshot::{Begun, Overflow, SaveArea, Snapshot, fill, write_heads};
use crate::state::{Revocation, SlotIndex, States, Writers};
use crate::tracker::{Epoch, Generation};
use blktide_format::shared::control;
use blktide_types::clock::{Instant, WallTime};
use blktide_types::id::{GenerationName, SnapshotId};
use blktide_types::io::RevokeCause;
use blktide_types::set::BlockSet;
use core::time::Duration;
use std::sync::Arc;

/// Save slots that a waiting writer looks through at a time.
const WAITING_TRIES: u32 = 1024;

/// What a base image lacks.
#[derive(Clone, Copy, Debug)]
pub enum Absent<'a> {
    /// There is no base: everything is wanted.
    Everything,
    /// One bit a block, lowest first; missing words are clear.
    Words(&'a [u64]),
}

/// A snapshot that is asked for. The memories are fresh and zeroed, made for this snapshot alone (P6).
#[derive(Debug)]
pub struct SnapshotRequest<'a> {
    /// Its id.
    pub id: SnapshotId,
    /// Name of the generation that will open: random, never used before.
    pub opens: GenerationName,
    /// When that is, for people.
    pub opens_at: WallTime,
    /// The generation that the base image's instant opened; `None` without a base.
    pub base: Option<GenerationName>,
    /// What the base lacks.
    pub absent: Absent<'a>,
    /// What to do when the save area is full.
    pub limits: Limits,
    /// States, slot index, wanted bitmaps.
    pub memories: SnapshotMemories,
}

/// The memories of a snapshot, for the server. Sizes in words: [`blktide_format::shared::Shape::states_words`],
/// [`SlotIndex::words`], [`blktide_format::shared::Shape::wanted_words`].
#[derive(Clone)]
pub struct SnapshotMemories {
    /// States: blktided writes to them.
    pub states: Arc<dyn Memory>,
    /// Slot index.
    pub index: Arc<dyn Memory>,
    /// Wanted and changed before the swap.
    pub wanted: Arc<dyn Memory>,
    /// Number of places in the save area, a block each.
    pub save_slots: u32,
    /// The volume's own: queues find it in their snapshot.
    pub save_area: SaveArea,
}

impl core::fmt::Debug for SnapshotMemories {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "SnapshotMemories({} save slots)", self.save_slots)
    }
}

/// How much a snapshot may cost the writers (P8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// What happens when the save area is full.
    pub overflow: Overflow,
    /// The longest that any one write is held.
    pub wait_limit: Duration,
    /// The longest that the reader may make no progress.
    pub lease: Duration,
}

/// A snapshot that is ready for its instant.
#[derive(Debug)]
pub struct Prepared {
    snapshot: Arc<Snapshot>,
    opens: GenerationName,
    counter: u64,
    base_resolved: bool,
    epoch: Epoch,
    version: u64,
    lease: Duration,
}

impl Prepared {
    /// Whether the base is known: if not, everything is wanted, and the backup is not incremental.
    pub const fn base_resolved(&self) -> bool {
        self.base_resolved
    }
}

/// A living snapshot.
#[derive(Debug)]
pub(super) struct Living {
    pub(super) snapshot: Arc<Snapshot>,
    pub(super) base_resolved: bool,
    lease: Duration,
    lease_seen: u64,
    lease_at: Option<Instant>,
}

impl Control {
    /// Gets a snapshot ready for its instant: bank, table, wanted bitmaps. No request waits meanwhile.
    ///
    /// Waits: in proportion to the volume's bitmap. Errors: nothing changed, but neighbours may be merged.
    pub fn prepare(&mut self, asked: &SnapshotRequest<'_>) -> Result<Prepared, EngineError> {
        let inner = Arc::clone(&self.engine.inner);
        let next = self.make_next(Wish {
            opens: asked.opens,
            at: asked.opens_at,
            base: asked.base,
            // As random as a name.
            fresh: GenerationName(asked.id.0),
        })?;
        let epoch = inner.marks.epoch();
        let live = inner.marks.bank(epoch.bank()).ok_or(EngineError::NoBank)?;
        self.write_wanted(
            &asked.memories.wanted,
            asked.absent,
            next.base,
            &next.before,
        )?;
        let sequence = epoch
            .sequence()
            .max(
                inner
                    .head
                    .load(control::SNAPSHOT_SEQUENCE, Ordering::Relaxed),
            )
            .saturating_add(1);
        let snapshot = Arc::new(self.make_snapshot(asked, sequence, live)?);
        inner
            .head
            .store(control::SNAPSHOT_SEQUENCE, sequence, Ordering::SeqCst);
        self.set_snapshot(Some(Arc::clone(&snapshot)));
        Ok(Prepared {
            snapshot,
            opens: next.name,
            counter: next.counter,
            base_resolved: next.base.is_some(),
            epoch: next.epoch(true, sequence),
            version: next.version,
            lease: asked.limits.lease,
        })
    }

    fn make_snapshot(
        &self,
        asked: &SnapshotRequest<'_>,
        sequence: u64,
        live: &Words,
    ) -> Result<Snapshot, EngineError> {
        let inner = &self.engine.inner;
        let geometry = inner.shape.geometry;
        let blocks = geometry.block_count();
        let memories = &asked.memories;
        let slots = memories.save_slots;
        write_heads(
            &memories.states,
            (&memories.index, slots),
            sequence,
            blocks.0,
        )?;
        Ok(Snapshot {
            id: asked.id,
            sequence,
            writers: Writers {
                states: States::new(&memories.states, blocks)?,
                slots: SlotIndex::new(&memories.index, slots)?,
                revocation: Revocation::new(&inner.control, sequence)?,
                tries: match asked.limits.overflow {
                    Overflow::GiveUp => slots,
                    Overflow::Wait => slots.min(WAITING_TRIES),
                },
            },
            before: Words::new(
                &memories.wanted,
                inner.shape.wanted(0),
                inner.shape.wanted_bit_words(),
            )?,
            closed: live.clone(),
            geometry,
            overflow: asked.limits.overflow,
            wait_limit: asked.limits.wait_limit,
            save_area: Arc::clone(&memories.save_area),
        })
    }

    /// Sets the gate, for `limit` at most (P3). Then [`Self::poll`] until it is held.
    pub fn hold(&self, now: Instant, limit: Duration) -> Result<Hold, EngineError> {
        self.engine.inner.gate.hold(now, limit)
    }

    /// Where a hold stands; to be asked again and again. Once it is `Over`, who waits at the gate must be woken.
    pub fn poll(&self, hold: &mut Hold, now: Instant) -> HoldState {
        self.engine.inner.gate.poll(hold, now)
    }

    /// Ends a hold; nothing happened. Who waits at the gate must be woken.
    pub fn release(&self, hold: &Hold) -> bool {
        self.engine.inner.gate.expire(hold.id())
    }

    /// The instant: one store. Then the gate is open: who waits at it must be woken.
    ///
    /// Errors: `HoldOver` if the hold no longer lives (hold again), `PlanStale` if the table changed since `prepare`
    /// (prepare again); no swap took place.
    pub fn commit(
        &mut self,
        hold: &Hold,
        prepared: &Prepared,
        now: Instant,
    ) -> Result<Begun, EngineError> {
        let inner = &self.engine.inner;
        if prepared.version != self.version || self.living.is_some() {
            inner.gate.expire(hold.id());
            return Err(EngineError::PlanStale);
        }
        inner.gate.begin_commit(hold)?;
        let before = inner.marks.epoch();
        if broken(Break::GateOpensFirst) {
            inner.gate.open();
        }
        inner.marks.swap(prepared.epoch);
        inner.gate.open();
        let time = now.since(hold.begun());
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        inner.head.raise(control::LONGEST_HOLD, nanos);
        if broken(Break::WrongBankCleared)
            && let Some(bank) = inner.marks.bank(before.bank())
        {
            for word in bank.all() {
                word.store(0, Ordering::Relaxed);
            }
        }
        let begun = Begun {
            id: prepared.snapshot.id(),
            sequence: prepared.snapshot.sequence(),
            opened: prepared.opens,
            counter: prepared.counter,
            closed_bank: before.bank(),
            base_resolved: prepared.base_resolved,
            held: time,
        };
        self.version = self.version.wrapping_add(1);
        self.living = Some(Living {
            snapshot: Arc::clone(&prepared.snapshot),
            base_resolved: prepared.base_resolved,
            lease: prepared.lease,
            lease_seen: 0,
            lease_at: Some(now),
        });
        Ok(begun)
    }

    /// Lets a prepared snapshot go that will not be committed.
    pub fn abandon(&mut self, prepared: &Prepared) {
        if self.living.is_none() {
            prepared.snapshot.revoke(RevokeCause::Cancelled);
            self.set_snapshot(None);
        }
    }

    /// The snapshot that lives, if one does.
    pub fn snapshot(&self) -> Option<&Arc<Snapshot>> {
        self.living.as_ref().map(|l| &l.snapshot)
    }

    /// Revokes the snapshot that lives; says whether this did it. It must still be ended.
    pub fn revoke(&self, cause: RevokeCause) -> bool {
        self.living
            .as_ref()
            .is_some_and(|l| l.snapshot.revoke(cause))
    }

    /// Ends the snapshot that lives: it is revoked (for a reader that still reads), and new writes no longer look at it.
    /// Its memories may go when the returned handle is the last one: queues let go at their next write, or by
    /// [`crate::Queue::refresh`].
    pub fn end_snapshot(&mut self) -> Result<Arc<Snapshot>, EngineError> {
        let living = self.living.take().ok_or(EngineError::NoSnapshot)?;
        let inner = &self.engine.inner;
        living.snapshot.revoke(RevokeCause::Cancelled);
        let peak = u64::from(living.snapshot.writers.slots.peak());
        inner
            .head
            .store(control::SAVE_SLOTS_PEAK, peak, Ordering::Relaxed);
        let epoch = inner.marks.epoch();
        inner.marks.swap(Epoch::new(
            epoch.bank(),
            epoch.table(),
            false,
            epoch.sequence(),
        ));
        self.set_snapshot(None);
        self.settle();
        Ok(living.snapshot)
    }

    /// To be called now and then: revokes a snapshot whose reader makes no progress (P8).
    pub fn tick(&mut self, now: Instant) {
        if let Some(living) = &mut self.living {
            let lease = living.snapshot.writers.states.lease();
            let at = *living.lease_at.get_or_insert(now);
            if lease != living.lease_seen {
                living.lease_seen = lease;
                living.lease_at = Some(now);
            } else if now.since(at) > living.lease {
                living.snapshot.revoke(RevokeCause::ReaderStalled);
            }
        }
    }

    /// Fills the two bitmaps of what is wanted and what has changed, as far as the banks that are closed already say.
    fn write_wanted(
        &self,
        memory: &Arc<dyn Memory>,
        absent: Absent<'_>,
        base: Option<usize>,
        list: &[Generation],
    ) -> Result<(), EngineError> {
        let shape = &self.engine.inner.shape;
        let count = shape.geometry.block_count();
        let closed = list.split_last().map_or(list, |(_, closed)| closed);
        let changed = match base {
            Some(from) => self.union(closed.get(from..).unwrap_or_default())?,
            None => BlockSet::full(count),
        };
        let mut wanted = match absent {
            Absent::Everything => BlockSet::full(count),
            Absent::Words(words) => BlockSet::from_words(count, words.iter().copied()),
        };
        wanted.union_with(&changed);
        for (bitmap, set) in [(0, &wanted), (1, &changed)] {
            let words = Words::new(memory, shape.wanted(bitmap), shape.wanted_bit_words())?;
            fill(&words, set.words().iter().copied());
        }
        Ok(())
    }
}
