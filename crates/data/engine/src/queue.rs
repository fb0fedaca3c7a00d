//! One queue's side of the engine: its counters, and the snapshot it knows.
//!
//! **Invariant**: one thread owns a queue; no lock is waited for, nothing is allocated.

use crate::atomic::{Ordering, Words};
use crate::engine::Engine;
use crate::error::EngineError;
use crate::snapshot::Snapshot;
use crate::tracker::Epoch;
use blktide_format::shared::queue;
use core::time::Duration;
use std::sync::Arc;

/// A queue.
#[derive(Debug)]
pub struct Queue {
    pub(crate) engine: Engine,
    pub(crate) number: usize,
    pub(crate) words: Words,
    snapshot: Option<Arc<Snapshot>>,
    /// Where the last save slot was found.
    pub(crate) slot_from: u32,
    parked: u32,
    parked_max: u32,
}

/// What a queue knows of the snapshot that an epoch names.
pub(crate) enum Known {
    /// No snapshot lives.
    None,
    /// This one.
    This(Arc<Snapshot>),
    /// One lives and the control side is just handing it over: look again at once.
    NotYet,
}

impl Queue {
    pub(crate) fn new(engine: &Engine, number: usize) -> Result<Self, EngineError> {
        let inner = &engine.inner;
        let words = inner
            .queues
            .get(number)
            .ok_or(EngineError::NoSuchQueue { queue: number })?;
        let slots = inner.shape.slots / inner.shape.queues.max(1);
        Ok(Self {
            number,
            words: words.clone(),
            snapshot: None,
            slot_from: 0,
            parked: 0,
            parked_max: u32::try_from(slots / 2).unwrap_or(u32::MAX).max(1),
            engine: engine.clone(),
        })
    }

    /// Its number.
    pub const fn number(&self) -> usize {
        self.number
    }

    /// Whether a hold lives.
    pub fn gate_is_set(&self) -> bool {
        self.engine.inner.gate.is_set()
    }

    /// The snapshot that this queue knows: the one whose blocks its `Preserve` actions are about.
    pub fn snapshot(&self) -> Option<&Arc<Snapshot>> {
        self.snapshot.as_ref()
    }

    /// Counts a turn of the thread, and tells how much it has outstanding at the device (P7: hung or waiting).
    pub fn tick(&self, outstanding: u64) {
        self.words.add(queue::TICK, 1);
        self.words
            .store(queue::OUTSTANDING, outstanding, Ordering::Relaxed);
    }

    /// Requests of this queue that wait for a snapshot, at most, before it is revoked (P8): half of its slots.
    pub const fn set_parked_max(&mut self, parked_max: u32) {
        self.parked_max = parked_max;
    }

    /// Lets go of a snapshot that has ended. The fast path does so by itself at the next write; an idle queue
    /// may call this now and then, so that the memory is given back.
    pub fn refresh(&mut self) {
        let living = self.engine.inner.marks.epoch().snapshot();
        if self.snapshot.as_ref().map(|s| s.sequence()) != living {
            self.snapshot = None;
        }
    }

    /// The snapshot that `epoch` names. Must be inside.
    pub(crate) fn known(&mut self, epoch: Epoch) -> Known {
        let Some(sequence) = epoch.snapshot() else {
            self.snapshot = None;
            return Known::None;
        };
        if self
            .snapshot
            .as_ref()
            .is_none_or(|s| s.sequence() != sequence)
        {
            let Ok(handed) = self.engine.inner.snapshot.try_lock() else {
                return Known::NotYet;
            };
            self.snapshot.clone_from(&handed);
        }
        match &self.snapshot {
            Some(s) if s.sequence() == sequence => Known::This(Arc::clone(s)),
            Some(_) | None => Known::NotYet,
        }
    }

    /// Whether one more request may wait for a snapshot (P8).
    pub(crate) const fn may_park(&self) -> bool {
        self.parked < self.parked_max
    }

    /// Counts a request that goes to wait outside.
    pub(crate) fn park(&mut self, for_snapshot: bool) {
        self.parked += u32::from(for_snapshot);
        self.words.add(queue::PARKED, 1);
    }

    /// Counts it back.
    pub(crate) fn unpark(&mut self, for_snapshot: bool) {
        self.parked = self.parked.saturating_sub(u32::from(for_snapshot));
        self.words.add(queue::PARKED, u64::MAX);
    }

    /// Notes how long a request was outside.
    pub(crate) fn waited(&self, time: Duration) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.words.raise(queue::LONGEST_WAIT, nanos);
    }
}
