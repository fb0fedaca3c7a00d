//! The control side of a volume's tracker: lives, generations, snapshots, distrust, hints.
//!
//! ```text
//! begin_life ─▶ … prepare ─▶ hold ─▶ poll … Held ─▶ commit ─▶ (snapshot lives) ─▶ end_snapshot ─▶ … ─▶ export
//! take_over  ─▶ …                 └─▶ release, expiry: nothing happened
//!
//! adopt      ─▶ absorb … prepare_generation ─▶ open_prepared ─▶ settle ─▶ …      where the kernel marks: no gate, no snapshot
//! ```
//!
//! **Invariant**: one control side a volume. It alone stores the epoch word; it writes only to the copy of the table that the
//! epoch does not name, and only to banks that no table names (or ORs into a closed one: a superset). So its death
//! at any moment leaves a table that is right.

use crate::atomic::Ordering;
use crate::broken::{Break, broken};
use crate::engine::{Engine, Inner};
use crate::error::EngineError;
use crate::snapshot::Snapshot;
use crate::state::Revocation;
use crate::tracker::{Epoch, Generation, StoredGeneration, load_table, store_table};
use blktide_format::shared::{control, queue};
use blktide_types::clock::WallTime;
use blktide_types::id::GenerationName;
use blktide_types::io::RevokeCause;
use blktide_types::reason::Reason;
use std::sync::{Arc, PoisonError};

mod generations;
mod hints;
mod snapshots;
mod watched;

pub use hints::Hint;
pub use snapshots::{Absent, Limits, Prepared, SnapshotMemories, SnapshotRequest};
pub use watched::{Opened, PreparedGeneration};

use generations::{or_into, position, prepare_bank};
use snapshots::Living;

/// How a tracker stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trust {
    /// Why it is not trusted; `None`: it is.
    pub reason: Option<Reason>,
    /// Since when.
    pub since: WallTime,
}

/// The control side.
#[derive(Debug)]
pub struct Control {
    engine: Engine,
    living: Option<Living>,
    /// Counts changes of the table that a prepared snapshot cannot survive.
    version: u64,
    /// The base that was asked for last: kept like a hinted one, if there is room.
    asked_base: Option<GenerationName>,
}

impl Control {
    pub(crate) fn new(engine: &Engine) -> Self {
        Self {
            engine: engine.clone(),
            living: None,
            version: 0,
            asked_base: None,
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
        // One stays free for the next generation.
        let last_bank = inner.marks.banks().saturating_sub(2).max(1);
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
            // No tick yet: the keeper does not count the wait for the fence.
            words.store(queue::TICK, 0, Ordering::Relaxed);
            words.store(queue::OUTSTANDING, 0, Ordering::Relaxed);
        }
        self.reopen(fresh);
        Ok(())
    }

    /// Goes on where a former control side ended, at whatever moment: no snapshot lives, and a table that does not check is
    /// distrusted, with `fresh` as the only name.
    fn reopen(&mut self, fresh: (GenerationName, WallTime)) {
        let inner = Arc::clone(&self.engine.inner);
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

    /// Forgets all names, says why, and goes on with one that nobody knows (P2). The
    /// snapshot that lives is revoked, unless it leans on nothing and the tracker alone is in doubt.
    pub fn distrust(
        &mut self,
        (reason, wall): (Reason, WallTime),
        detail: &str,
        fresh: GenerationName,
    ) {
        let leans = self.living.as_ref().is_some_and(|l| l.base_resolved);
        if leans || reason != Reason::TrackerSuspect {
            self.revoke(RevokeCause::Distrusted);
        }
        // Names first: a death in between loses the reason, not the distrust. The other way round the names would still be
        // known, and an image that names one of them could end the distrust (`trust`).
        if !broken(Break::DistrustKeepsNames) {
            self.forget_names(wall, fresh);
        }
        self.remember_distrust((reason, wall), detail);
    }

    /// Says that the tracker is distrusted, and since when, and forgets nothing: a full image was owed when the last life
    /// ended, and still is.
    pub fn remember_distrust(&self, (reason, wall): (Reason, WallTime), detail: &str) {
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

#[cfg(test)]
#[cfg(not(loom))]
mod tests;
