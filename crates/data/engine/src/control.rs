//! The control side of a volume's tracker: lives, generations, snapshots, distrust, hints.
//!
//! ```text
//! begin_life ─▶ … prepare ─▶ hold ─▶ poll … Held ─▶ commit ─▶ (snapshot lives) ─▶ end_snapshot ─▶ … ─▶ export
//! take_over  ─▶ …                 └─▶ release, expiry: nothing happened
//! ```
//!
//! **Invariant**: one control side a volume. It alone stores the epoch word; it writes only to the copy of the table that the
//! epoch does not name, and only to banks that no table names (or ORs into a closed one: a superset). So its death
//! at any moment leaves a table that is right.

use crate::atomic::{Memory, Ordering, Words};
use crate::broken::{Break, broken};
use crate::engine::{Engine, Inner};
use crate::error::EngineError;
use crate::gate::{Hold, HoldState};
use crate::snapshot::{Begun, Overflow, SaveArea, Snapshot, fill, write_heads};
use crate::state::{Revocation, SlotIndex, States, Writers};
use crate::tracker::{Epoch, Generation, StoredGeneration, load_table, marked_blocks, store_table};
use blktide_format::shared::{control, queue};
use blktide_types::clock::{Instant, WallTime};
use blktide_types::id::{GenerationName, RepositoryId, SnapshotId};
use blktide_types::io::RevokeCause;
use blktide_types::range::BlockRange;
use blktide_types::reason::Reason;
use blktide_types::set::BlockSet;
use core::time::Duration;
use std::sync::{Arc, PoisonError};

mod hints;

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

/// How a tracker stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trust {
    /// Why it is not trusted; `None`: it is.
    pub reason: Option<Reason>,
    /// Since when.
    pub since: WallTime,
}

/// A living snapshot.
#[derive(Debug)]
struct Living {
    snapshot: Arc<Snapshot>,
    base_resolved: bool,
    lease: Duration,
    lease_seen: u64,
    lease_at: Option<Instant>,
}

/// The control side.
#[derive(Debug)]
pub struct Control {
    engine: Engine,
    living: Option<Living>,
    /// Counts changes of the table that a prepared snapshot cannot survive.
    version: u64,
}

impl Control {
    pub(crate) fn new(engine: &Engine) -> Self {
        Self {
            engine: engine.clone(),
            living: None,
            version: 0,
        }
    }

    /// Begins a life of the tracker: with the generations that a believed bitmap file held, oldest first, or with none
    /// and one generation that opens now as `fresh`. Before the first request.
    ///
    /// Waits: in proportion to the generations.
    pub fn begin_life(
        &mut self,
        stored: &[StoredGeneration],
        fresh: (GenerationName, WallTime),
    ) -> Result<(), EngineError> {
        let inner = Arc::clone(&self.engine.inner);
        let keep = inner.shape.generations.saturating_sub(1).max(1);
        let skipped = stored.len().saturating_sub(keep);
        let mut list: Vec<Generation> = Vec::new();
        let last_bank = inner.marks.banks().saturating_sub(3).max(1);
        let mut next_bank = 0;
        // Youngest first: the open generation has bank 0 for itself; one without bits shares the bank of the next
        // younger; when the banks are used up the oldest share the last one.
        for from in stored.iter().skip(skipped).rev() {
            let shares = list.len() > 1 && from.words.iter().all(|w| *w == 0);
            let bank = match list.last() {
                Some(younger) if shares => younger.bank,
                Some(_) | None => next_bank,
            };
            if !list.iter().any(|g| g.bank == bank) {
                prepare_bank(&inner, bank)?;
                next_bank = (bank + 1).min(last_bank);
            }
            or_into(&inner, bank, &from.words)?;
            list.push(Generation {
                name: from.name,
                counter: from.counter,
                opened: from.opened,
                bank,
            });
        }
        list.reverse();
        if list.is_empty() {
            prepare_bank(&inner, 0)?;
            list.push(Generation {
                name: fresh.0,
                counter: self.next_counter(),
                opened: fresh.1,
                bank: 0,
            });
        }
        let newest = list.iter().map(|g| g.counter).max().unwrap_or(0);
        inner.head.raise(control::GENERATION_COUNTER, newest);
        let [table, _] = &inner.tables;
        store_table(table, &list);
        inner.marks.swap(Epoch::new(0, 0, false, 0));
        Ok(())
    }

    /// Takes a dead server's memories over. Before the fence, and before any slot is touched: revokes its snapshot, first of
    /// all; then nobody is inside, the gate is open, no snapshot lives. Every slot's request must then be started again.
    ///
    /// A table that does not check is distrusted, with `fresh` as the only name.
    pub fn take_over(&mut self, fresh: (GenerationName, WallTime)) -> Result<(), EngineError> {
        let inner = Arc::clone(&self.engine.inner);
        let sequence = inner
            .head
            .load(control::SNAPSHOT_SEQUENCE, Ordering::SeqCst);
        if sequence > 0 && !broken(Break::TakeoverKeepsSnapshot) {
            Revocation::new(&inner.control, sequence)?.revoke(RevokeCause::ServerDied);
        }
        inner.gate.reset();
        for words in &inner.queues {
            words.store(queue::PARKED, 0, Ordering::Relaxed);
            words.store(queue::OUTSTANDING, 0, Ordering::Relaxed);
        }
        let epoch = inner.marks.epoch();
        let bank = if epoch.bank() < inner.marks.banks() {
            epoch.bank()
        } else {
            0
        };
        inner
            .marks
            .swap(Epoch::new(bank, epoch.table(), false, epoch.sequence()));
        self.living = None;
        self.set_snapshot(None);
        let right = self
            .table()
            .is_some_and(|t| t.last().is_some_and(|g| g.bank == epoch.bank()));
        if !right {
            self.distrust(
                (Reason::TrackingInterrupted, fresh.1),
                "the table of generations did not check",
                fresh.0,
            );
        }
        Ok(())
    }

    /// Switches tracking off: distrusts first, then nothing is marked and nothing preserved any more (fail-open).
    pub fn pass_through(&mut self, wall: WallTime, fresh: GenerationName) {
        if !broken(Break::SilentPassThrough) {
            self.distrust(
                (Reason::TrackingInterrupted, wall),
                "servers kept dying: everything passes through, unseen",
                fresh,
            );
        }
        self.revoke(RevokeCause::Detached);
        self.engine
            .inner
            .head
            .store(control::PASS_THROUGH, 1, Ordering::SeqCst);
    }

    /// Switches tracking on again, with names that nobody knows: what went before is forgotten. Before the first request.
    pub fn end_pass_through(&mut self, wall: WallTime, fresh: GenerationName) {
        self.forget_names(wall, fresh);
        self.engine
            .inner
            .head
            .store(control::PASS_THROUGH, 0, Ordering::SeqCst);
    }

    /// Gets a snapshot ready for its instant: bank, table, wanted bitmaps. No request waits meanwhile.
    ///
    /// Waits: in proportion to the volume's bitmap. Errors: nothing changed, but neighbours may be merged.
    pub fn prepare(&mut self, asked: &SnapshotRequest<'_>) -> Result<Prepared, EngineError> {
        let inner = Arc::clone(&self.engine.inner);
        if inner.passes_through() {
            return Err(EngineError::PassingThrough);
        }
        if self.living.is_some() {
            return Err(EngineError::SnapshotUnderWay);
        }
        let bank = self.free_bank()?;
        let bank_words = inner.marks.bank(bank).ok_or(EngineError::NoBank)?;
        if !broken(Break::WrongBankCleared) {
            bank_words
                .prepare()
                .map_err(|source| EngineError::BankNotReady { source })?;
        }
        let mut list = self.table().ok_or(EngineError::NoBank)?;
        let epoch = inner.marks.epoch();
        let live = inner.marks.bank(epoch.bank()).ok_or(EngineError::NoBank)?;
        let base = asked.base.and_then(|name| position(&list, name));
        self.write_wanted(&asked.memories.wanted, asked.absent, base, &list)?;
        let sequence = epoch
            .sequence()
            .max(
                inner
                    .head
                    .load(control::SNAPSHOT_SEQUENCE, Ordering::Relaxed),
            )
            .saturating_add(1);
        let geometry = inner.shape.geometry;
        let (states, slots) = (&asked.memories.states, asked.memories.save_slots);
        write_heads(
            states,
            (&asked.memories.index, slots),
            sequence,
            geometry.block_count().0,
        )?;
        let snapshot = Arc::new(Snapshot {
            id: asked.id,
            sequence,
            writers: Writers {
                states: States::new(states, geometry.block_count())?,
                slots: SlotIndex::new(&asked.memories.index, slots)?,
                revocation: Revocation::new(&inner.control, sequence)?,
            },
            before: Words::new(
                &asked.memories.wanted,
                inner.shape.wanted(0),
                inner.shape.wanted_bit_words(),
            )?,
            closed: live.clone(),
            geometry,
            overflow: asked.limits.overflow,
            wait_limit: asked.limits.wait_limit,
            save_area: Arc::clone(&asked.memories.save_area),
        });
        let counter = self.next_counter();
        let [low, ..] = counter.to_le_bytes();
        let name = broken(Break::NameReused).then_some(GenerationName([low; 16]));
        list.push(Generation {
            name: name.unwrap_or(asked.opens),
            counter,
            opened: asked.opens_at,
            bank,
        });
        let surplus = list.len().saturating_sub(inner.shape.generations);
        let table = 1 - epoch.table();
        if let Some(words) = inner.tables.get(table) {
            store_table(words, list.get(surplus..).unwrap_or_default());
        }
        inner
            .head
            .store(control::SNAPSHOT_SEQUENCE, sequence, Ordering::SeqCst);
        self.set_snapshot(Some(Arc::clone(&snapshot)));
        Ok(Prepared {
            snapshot,
            opens: name.unwrap_or(asked.opens),
            counter,
            base_resolved: base.is_some(),
            epoch: Epoch::new(bank, table, true, sequence),
            version: self.version,
            lease: asked.limits.lease,
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
        let held = now.since(hold.begun());
        let nanos = u64::try_from(held.as_nanos()).unwrap_or(u64::MAX);
        inner.head.raise(control::LONGEST_HOLD, nanos);
        if broken(Break::WrongBankCleared)
            && let Some(bank) = inner.marks.bank(before.bank())
        {
            let words = bank.all();
            words.iter().for_each(|w| w.store(0, Ordering::Relaxed));
        }
        let begun = Begun {
            id: prepared.snapshot.id(),
            sequence: prepared.snapshot.sequence(),
            opened: prepared.opens,
            counter: prepared.counter,
            closed_bank: before.bank(),
            base_resolved: prepared.base_resolved,
            held,
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
        if let Some(closed) = self.table().and_then(|t| t.iter().rev().nth(1).copied())
            && let Some(bank) = inner.marks.bank(closed.bank)
        {
            bank.settle();
        }
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

    /// Forgets all names, says why, and goes on with one that nobody knows (P2). The
    /// snapshot that lives is revoked, unless it leans on nothing and the tracker alone is in doubt.
    pub fn distrust(
        &mut self,
        (reason, wall): (Reason, WallTime),
        detail: &str,
        fresh: GenerationName,
    ) {
        let head = &self.engine.inner.head;
        let count = head.load(control::DISTRUST, Ordering::Relaxed) >> 8;
        for (i, chunk) in detail.as_bytes().chunks(8).enumerate().take(15) {
            let mut bytes = [0; 8];
            for (to, from) in bytes.iter_mut().zip(chunk) {
                *to = *from;
            }
            let index = control::DISTRUST_DETAIL.saturating_add(i);
            head.store(index, u64::from_ne_bytes(bytes), Ordering::Relaxed);
            head.store(index.saturating_add(1), 0, Ordering::Relaxed);
        }
        head.store(
            control::DISTRUST_WALL,
            wall.0.cast_unsigned(),
            Ordering::Relaxed,
        );
        let word = count.saturating_add(1) << 8 | u64::from(reason.number());
        head.store(control::DISTRUST, word, Ordering::SeqCst);
        let leans = self.living.as_ref().is_some_and(|l| l.base_resolved);
        if leans || reason != Reason::TrackerSuspect {
            self.revoke(RevokeCause::Distrusted);
        }
        if !broken(Break::DistrustKeepsNames) {
            self.forget_names(wall, fresh);
        }
    }

    /// An image that leans on nothing was committed, and its instant opened `name`: if that is known, nothing has been
    /// missed since, and the tracker is trusted again. False if it is not known.
    pub fn trust(&mut self, name: GenerationName) -> bool {
        let known = self.table().is_some_and(|t| position(&t, name).is_some());
        let head = &self.engine.inner.head;
        if known && !self.engine.inner.passes_through() {
            let count = head.load(control::DISTRUST, Ordering::Relaxed) & !0xff;
            head.store(control::DISTRUST, count, Ordering::SeqCst);
        }
        known
    }

    /// Whether the tracker is trusted.
    pub fn trusted(&self) -> Trust {
        trust_of(&self.engine.inner)
    }

    /// The distrust in detail, as it was given.
    pub fn distrust_detail(&self) -> String {
        let head = &self.engine.inner.head;
        let bytes: Vec<u8> = (control::DISTRUST_DETAIL..control::GATE)
            .flat_map(|i| head.load(i, Ordering::Relaxed).to_ne_bytes())
            .take_while(|b| *b != 0)
            .collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The generations, oldest first; the last is the open one.
    pub fn generations(&self) -> Vec<Generation> {
        self.table().unwrap_or_default()
    }

    /// The blocks written since `name` opened, up to now. Waits: in proportion to the volume's bitmap.
    pub fn changed_since(&self, name: GenerationName) -> Result<BlockSet, EngineError> {
        let unknown = EngineError::UnknownGeneration { name };
        if self.engine.inner.passes_through() {
            return Err(EngineError::PassingThrough);
        }
        let list = self.table().unwrap_or_default();
        let from = position(&list, name).ok_or(unknown)?;
        self.union(list.get(from..).unwrap_or_default())
    }

    /// Marks blocks in the open generation: what the next incremental must read again (an unreadable block, P10).
    pub fn mark(&self, range: BlockRange) {
        let inner = &self.engine.inner;
        let (start, len) = inner.shape.geometry.bytes_of(range);
        inner.marks.mark(inner.marks.epoch(), start, len);
    }

    /// All generations, as the bitmap file keeps them. Right only while the volume is provably closed (P4).
    pub fn export(&self) -> Vec<StoredGeneration> {
        let list = self.table().unwrap_or_default();
        let bits = |bank| self.engine.inner.marks.bank(bank).map(load_all);
        let youngest = |i: usize| {
            let next = list.get(i + 1);
            let this = list.get(i);
            next.map(|g| g.bank) != this.map(|g| g.bank)
        };
        list.iter()
            .enumerate()
            .map(|(i, g)| StoredGeneration {
                name: g.name,
                counter: g.counter,
                opened: g.opened,
                words: if youngest(i) {
                    bits(g.bank).unwrap_or_default()
                } else {
                    Vec::new()
                },
            })
            .collect()
    }

    fn table(&self) -> Option<Vec<Generation>> {
        let inner = &self.engine.inner;
        let words = inner.tables.get(inner.marks.epoch().table())?;
        load_table(words, inner.marks.banks())
    }

    /// Makes `list` the table in force; the live bank stays.
    fn set_table(&mut self, list: &[Generation]) {
        let inner = &self.engine.inner;
        let epoch = inner.marks.epoch();
        let table = 1 - epoch.table();
        if let Some(words) = inner.tables.get(table) {
            store_table(words, list);
        }
        let snapshot = epoch.snapshot().is_some();
        inner
            .marks
            .swap(Epoch::new(epoch.bank(), table, snapshot, epoch.sequence()));
        self.version = self.version.wrapping_add(1);
    }

    fn forget_names(&mut self, wall: WallTime, fresh: GenerationName) {
        let only = Generation {
            name: fresh,
            counter: self.next_counter(),
            opened: wall,
            bank: self.engine.inner.marks.epoch().bank(),
        };
        self.set_table(&[only]);
    }

    fn next_counter(&self) -> u64 {
        let head = &self.engine.inner.head;
        head.add(control::GENERATION_COUNTER, 1).saturating_add(1)
    }

    fn set_snapshot(&self, snapshot: Option<Arc<Snapshot>>) {
        let mut place = self
            .engine
            .inner
            .snapshot
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *place = snapshot;
    }

    /// A bank that no table names, after merging neighbours if need be.
    fn free_bank(&mut self) -> Result<usize, EngineError> {
        let banks = self.engine.inner.marks.banks();
        loop {
            let list = self.table().ok_or(EngineError::NoBank)?;
            let used = |bank| list.iter().any(|g| g.bank == bank);
            if let Some(bank) = (0..banks).find(|b| !used(*b)) {
                return Ok(bank);
            }
            self.merge(&list)?;
        }
    }

    /// Merges one pair of closed neighbours whose boundary no hint names: the younger's bits into the older's bank.
    fn merge(&mut self, list: &[Generation]) -> Result<(), EngineError> {
        let hints = self.hinted();
        let live = self.engine.inner.marks.epoch().bank();
        let boundary = list.windows(2).find_map(|pair| match pair {
            [older, younger]
                if older.bank != younger.bank
                    && younger.bank != live
                    && !hints.contains(&younger.name) =>
            {
                Some((older.bank, younger.bank))
            }
            _ => None,
        });
        let (older, younger) = boundary.ok_or(EngineError::NoBank)?;
        let inner = &self.engine.inner;
        let bits = inner.marks.bank(younger).map(load_all).unwrap_or_default();
        if !broken(Break::MergeForgets) {
            or_into(inner, older, &bits)?;
        }
        let merged: Vec<_> = list
            .iter()
            .map(|g| Generation {
                bank: if g.bank == younger { older } else { g.bank },
                ..*g
            })
            .collect();
        self.set_table(&merged);
        Ok(())
    }

    /// The blocks marked in any bank of `list`, each bank once.
    fn union(&self, list: &[Generation]) -> Result<BlockSet, EngineError> {
        let inner = &self.engine.inner;
        let geometry = &inner.shape.geometry;
        let mut set = BlockSet::new(geometry.block_count());
        let mut last = None;
        for generation in list {
            if last != Some(generation.bank) {
                let bank = inner.marks.bank(generation.bank);
                let bank = bank.ok_or(EngineError::NoBank)?;
                set.union_with(&marked_blocks(geometry, bank.all()));
                last = Some(generation.bank);
            }
        }
        Ok(set)
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

/// Whether the tracker is trusted.
pub(crate) fn trust_of(inner: &Inner) -> Trust {
    let [number, ..] = inner
        .head
        .load(control::DISTRUST, Ordering::SeqCst)
        .to_le_bytes();
    Trust {
        reason: match number {
            0 => None,
            known => Some(Reason::from_number(known).unwrap_or(Reason::TrackingInterrupted)),
        },
        since: WallTime(
            inner
                .head
                .load(control::DISTRUST_WALL, Ordering::Relaxed)
                .cast_signed(),
        ),
    }
}

/// Where a name stands: the start of its run.
fn position(list: &[Generation], name: GenerationName) -> Option<usize> {
    let at = list.iter().position(|g| g.name == name)?;
    let bank = list.get(at)?.bank;
    list.iter().position(|g| g.bank == bank)
}

fn prepare_bank(inner: &Inner, bank: usize) -> Result<(), EngineError> {
    inner
        .marks
        .bank(bank)
        .ok_or(EngineError::NoBank)?
        .prepare()
        .map_err(|source| EngineError::BankNotReady { source })
}

fn or_into(inner: &Inner, bank: usize, words: &[u64]) -> Result<(), EngineError> {
    let bank = inner.marks.bank(bank).ok_or(EngineError::NoBank)?.all();
    if words.len() > bank.len() {
        return Err(EngineError::OtherSize {
            needed: bank.len(),
            found: words.len(),
        });
    }
    for (to, from) in bank.iter().zip(words) {
        if *from != 0 {
            to.fetch_or(*from, Ordering::Relaxed);
        }
    }
    Ok(())
}

fn load_all(words: &Words) -> Vec<u64> {
    let load = |w: &crate::atomic::AtomicU64| w.load(Ordering::Relaxed);
    words.all().iter().map(load).collect()
}

/// A hint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hint {
    /// The repository whose newest image names it.
    pub repository: RepositoryId,
    /// The generation that opened at that image's instant.
    pub name: GenerationName,
}
