//! Beginning and ending a snapshot: prepare, hold, commit.
//!
//! ```text
//! asked ─▶ prepare (nobody waits) ─▶ hold ─▶ silent ─▶ checks ─▶ commit ─▶ answered
//!                                     └─ expired: again, three times, then 'busy'
//! ```
//! **Invariant**: the gate is set only while `Pending` has a hold, and never longer than its deadline.

use crate::error::{Refusal, VolumeError};
use crate::memory::SharedMemory;
use crate::message::{
    Absent, Overflow, Reply, SnapshotBegun, SnapshotFigures, SnapshotRequest, Text,
};
use crate::save_area::{SaveFile, chain};
use crate::server::{engine_error, io_error};
use crate::serving::Server;
use blktide_engine::state::SlotIndex;
use blktide_engine::{
    Begun, EngineError, Hold, HoldState, Limits, Prepared, Snapshot, SnapshotMemories,
};
use blktide_format::shared::{control, queue};
use blktide_sys::clock::SystemClock;
use blktide_types::clock::{Clock, Instant, Random, WallTime};
use blktide_types::id::SnapshotId;
use blktide_types::reason::Reason;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// How often a hold that expired is tried again.
const TRIES: u32 = 3;
/// So long a hold is looked at without a pause: in-flight writes of a quick device end meanwhile.
const SPIN: Duration = Duration::from_millis(2);
/// A reader that only slows down a save area's filling may rest this long.
const LEASE_MIN: Duration = Duration::from_secs(60);

/// A snapshot that lives.
#[derive(Debug)]
pub(crate) struct Open {
    pub(crate) connection: u64,
    pub(crate) snapshot: SnapshotId,
    pub(crate) preserved_before: u64,
    living: Arc<Snapshot>,
    index: Arc<SharedMemory>,
    slots: u32,
}

impl Open {
    /// Places of the save area that were used at least once.
    pub(crate) fn peak(&self) -> u64 {
        debug_assert!(self.living.sequence() > 0);
        let touched = blktide_format::shared::index::TOUCHED;
        let word = self.index.mapping().words().get(touched);
        word.map_or(0, |w| w.load(Ordering::Relaxed))
            .min(u64::from(self.slots))
    }
}

/// A snapshot whose instant has not come yet.
#[derive(Debug)]
pub(crate) struct Pending {
    pub(crate) connection: u64,
    asked: SnapshotRequest,
    absent: Vec<u64>,
    id: SnapshotId,
    made: Made,
    prepared: Prepared,
    hold: Option<Hold>,
    tries: u32,
}

impl Pending {
    /// Whether the gate may be set for it.
    pub(crate) const fn holds(&self) -> bool {
        self.hold.is_some()
    }

    /// How long the control thread may wait for something else.
    pub(crate) fn patience(&self) -> Duration {
        match &self.hold {
            Some(hold) if SystemClock.now().since(hold.begun()) < SPIN => Duration::ZERO,
            Some(_) | None => Duration::from_millis(1),
        }
    }
}

/// The memories made for a snapshot.
#[derive(Debug)]
struct Made {
    states: Arc<SharedMemory>,
    index: Arc<SharedMemory>,
    wanted: Arc<SharedMemory>,
    save: Arc<SaveFile>,
}

impl Server {
    pub(crate) fn begin_snapshot(
        &mut self,
        connection: u64,
        asked: SnapshotRequest,
        descriptors: Vec<OwnedFd>,
    ) {
        // A revoked one is over, though its reader may hang in a repository for ever: it stays revoked, for the word
        // names all older sequences.
        let over = |open: &Open| open.living.revoked().is_some();
        if self.open.as_ref().is_some_and(over) {
            self.end_snapshot();
        }
        if self.open.is_some() || self.pending.is_some() {
            let why = "another backup of this volume is under way";
            return self.refuse(connection, Refusal::SnapshotExists, why);
        }
        match self.prepare(connection, asked, descriptors) {
            Ok(pending) => self.pending = Some(pending),
            Err(VolumeError::Refused { kind, message }) => self.refuse(connection, kind, &message),
            Err(VolumeError::Engine {
                source: EngineError::PassingThrough,
            }) => {
                let why = "the volume passes everything through: detach and attach it";
                self.refuse(connection, Refusal::PassingThrough, why);
            }
            Err(e) => self.refuse(connection, Refusal::Failed, &chain(&e)),
        }
    }

    fn prepare(
        &mut self,
        connection: u64,
        asked: SnapshotRequest,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Pending, VolumeError> {
        let failed = |e| io_error("make the snapshot's memory", e);
        let shape = *self.engine.shape();
        let blocks = shape.geometry.block_count().0;
        let block_bytes = shape.geometry.block_size().bytes_u64();
        let absent = absent_words(asked.absent, descriptors, shape.wanted_bit_words())?;
        let node = self.loop_device().map(|l| l.device_number());
        let save = SaveFile::create(&asked.save_area, node, block_bytes, blocks)?;
        let create = |name, words| SharedMemory::create(name, words).map(Arc::new);
        let index_words = SlotIndex::words(save.slots);
        let made = Made {
            states: create("blktide-states", shape.states_words()).map_err(failed)?,
            index: create("blktide-index", index_words).map_err(failed)?,
            wanted: create("blktide-wanted", shape.wanted_words()).map_err(failed)?,
            save: Arc::new(save),
        };
        for memory in [&made.states, &made.index, &made.wanted] {
            memory.touch_and_lock().map_err(failed)?;
        }
        let id = SnapshotId(self.random.id());
        let prepared = self.plan(id, &asked, &absent, &made)?;
        Ok(Pending {
            connection,
            asked,
            absent,
            id,
            made,
            prepared,
            hold: None,
            tries: 0,
        })
    }

    fn plan(
        &mut self,
        id: SnapshotId,
        asked: &SnapshotRequest,
        absent: &[u64],
        made: &Made,
    ) -> Result<Prepared, VolumeError> {
        let limit = Duration::from_millis(asked.wait_limit_ms.clamp(10, 3_600_000));
        let overflow = match asked.overflow {
            Overflow::GiveUp => blktide_engine::Overflow::GiveUp,
            Overflow::Wait => blktide_engine::Overflow::Wait,
        };
        let save: Arc<SaveFile> = Arc::clone(&made.save);
        // What is distrusted is not leant on, although its names may be known: a full image that was committed and of
        // which the tracker has not heard yet (it is told afterwards) must not make the next backup half a one.
        let trusted = self.tracker.trusted().reason.is_none();
        let request = blktide_engine::SnapshotRequest {
            id,
            opens: self.fresh(),
            opens_at: SystemClock.wall(),
            base: asked.base.map(|b| b.0).filter(|_| trusted),
            absent: match asked.absent {
                Absent::None | Absent::Listed if trusted => blktide_engine::Absent::Words(absent),
                Absent::All | Absent::None | Absent::Listed => blktide_engine::Absent::Everything,
            },
            limits: Limits {
                overflow,
                wait_limit: limit,
                lease: match asked.overflow {
                    Overflow::Wait => limit,
                    // No write waits for the reader: it costs places in the save area only.
                    Overflow::GiveUp => limit.max(LEASE_MIN),
                },
            },
            memories: SnapshotMemories {
                states: made.states.shared(),
                index: made.index.shared(),
                wanted: made.wanted.shared(),
                save_slots: made.save.slots,
                save_area: save,
            },
        };
        self.tracker.prepare(&request).map_err(engine_error)
    }

    /// The instant, if the queues are silent; tried again and again by the control thread.
    pub(crate) fn go_on_with_hold(&mut self) {
        let Some(mut pending) = self.pending.take() else {
            return;
        };
        let now = SystemClock.now();
        let Some(mut hold) = pending.hold.take() else {
            if self.recovered() {
                self.hold(&mut pending, now);
            }
            return self.keep_or_give_up(pending);
        };
        match self.tracker.poll(&mut hold, now) {
            HoldState::Waiting => {
                pending.hold = Some(hold);
                self.pending = Some(pending);
            }
            HoldState::Over => {
                self.queues.ring();
                self.keep_or_give_up(pending);
            }
            HoldState::Held => self.commit(pending, &hold, now),
        }
    }

    fn hold(&self, pending: &mut Pending, now: Instant) {
        pending.tries = pending.tries.saturating_add(1);
        let limit = Duration::from_millis(pending.asked.hold_deadline_ms.clamp(1, 10_000));
        pending.hold = self.tracker.hold(now, limit).ok();
    }

    fn keep_or_give_up(&mut self, pending: Pending) {
        if pending.tries < TRIES || pending.hold.is_some() {
            self.pending = Some(pending);
            return;
        }
        self.tracker.abandon(&pending.prepared);
        let why = "the volume's writes did not pause for an instant; try again";
        self.refuse(pending.connection, Refusal::Busy, why);
    }

    fn commit(&mut self, mut pending: Pending, hold: &Hold, now: Instant) {
        if let Some((reason, detail)) = self.gone_past_us() {
            self.tracker.release(hold);
            self.queues.ring();
            self.distrust(reason, &detail);
            return self.plan_again(pending, &detail);
        }
        let wall = SystemClock.wall();
        match self.tracker.commit(hold, &pending.prepared, now) {
            Ok(begun) => {
                self.queues.ring();
                self.opened(&pending, &begun, wall);
            }
            Err(EngineError::PlanStale) => {
                self.queues.ring();
                self.plan_again(pending, "the tracker changed meanwhile; try again");
            }
            Err(_) => {
                self.queues.ring();
                pending.hold = None;
                self.keep_or_give_up(pending);
            }
        }
    }

    fn plan_again(&mut self, mut pending: Pending, why: &str) {
        self.tracker.abandon(&pending.prepared);
        let planned = self.plan(pending.id, &pending.asked, &pending.absent, &pending.made);
        match planned {
            Ok(prepared) if pending.tries < TRIES => {
                pending.prepared = prepared;
                self.pending = Some(pending);
            }
            Ok(prepared) => {
                self.tracker.abandon(&prepared);
                self.refuse(pending.connection, Refusal::Busy, why);
            }
            Err(e) => self.refuse(pending.connection, Refusal::Failed, &chain(&e)),
        }
    }

    fn opened(&mut self, pending: &Pending, begun: &Begun, wall: WallTime) {
        for number in 0..self.engine.shape().queues {
            self.reset_wait(number);
        }
        let Some(living) = self.tracker.snapshot().cloned() else {
            return;
        };
        self.open = Some(Open {
            connection: pending.connection,
            snapshot: pending.id,
            preserved_before: self.engine.total(queue::PRESERVED),
            living,
            index: Arc::clone(&pending.made.index),
            slots: pending.made.save.slots,
        });
        let geometry = self.engine.shape().geometry;
        let reply = SnapshotBegun {
            snapshot: Text(pending.id),
            generation: Text(begun.opened),
            base_resolved: begun.base_resolved,
            distrust: self.distrusted(),
            instant_ns: wall.0,
            held_ns: u64::try_from(begun.held.as_nanos()).unwrap_or(u64::MAX),
            volume_bytes: geometry.volume_bytes(),
            block_size_bytes: geometry.block_size().bytes(),
            grain_bytes: geometry.grain().bytes(),
            logical_sector_bytes: geometry.logical_sector_bytes(),
            physical_sector_bytes: geometry.physical_sector_bytes(),
            slots: pending.made.save.slots,
            sequence: begun.sequence,
            counter: begun.counter,
            closed_bank: begun.closed_bank,
        };
        match self.descriptors_of(&pending.made) {
            Ok(beside) => {
                let reply = Reply::Snapshot(Box::new(reply));
                // If the asker is gone, so is its snapshot: closing it ends it.
                self.reply_with(pending.connection, &reply, &beside);
            }
            Err(e) => {
                self.end_snapshot();
                self.refuse(pending.connection, Refusal::Failed, &chain(&e));
            }
        }
    }

    fn descriptors_of(&self, made: &Made) -> Result<Vec<OwnedFd>, VolumeError> {
        let failed = |e| io_error("hand the snapshot on", e);
        let read_only = |fd: &OwnedFd| -> Result<OwnedFd, VolumeError> {
            let memory = SharedMemory::from_fd(fd.try_clone().map_err(failed)?).map_err(failed)?;
            memory.read_only().map_err(failed)
        };
        let states = {
            use std::os::fd::AsFd;
            made.states.as_fd().try_clone_to_owned().map_err(failed)?
        };
        Ok(vec![
            read_only(&self.inherited.control)?,
            read_only(&self.inherited.banks)?,
            states,
            made.index.read_only().map_err(failed)?,
            made.wanted.read_only().map_err(failed)?,
            made.save.reader()?,
            self.backing
                .reader()
                .map_err(|source| VolumeError::Device { source })?,
        ])
    }

    fn reset_wait(&self, number: usize) {
        let index = self.engine.shape().queue(number);
        let index = index.saturating_add(queue::LONGEST_WAIT);
        if let Some(word) = self.queues.control.mapping().words().get(index) {
            word.store(0, Ordering::Relaxed);
        }
    }

    /// Lets a snapshot go whose instant has not come.
    pub(crate) fn abandon_pending(&mut self) {
        let Some(pending) = self.pending.take() else {
            return;
        };
        if let Some(hold) = &pending.hold {
            self.tracker.release(hold);
        }
        self.tracker.abandon(&pending.prepared);
        self.queues.ring();
        self.refuse(
            pending.connection,
            Refusal::Busy,
            "the backup was cancelled",
        );
    }

    /// Ends the snapshot that lives, and says what it has cost.
    pub(crate) fn end_snapshot(&mut self) -> SnapshotFigures {
        let figures = self.figures();
        if self.open.take().is_some() && self.tracker.end_snapshot().is_ok() {
            self.queues.ring();
        }
        figures
    }

    /// Whether something was written past us while we are in the path (P5), or could have been (P9). Nobody is inside.
    pub(crate) fn gone_past_us(&self) -> Option<(Reason, String)> {
        if let Some(device) = self.loop_device() {
            let path = PathBuf::from(format!("/sys/block/loop{}/loop/dio", device.number()));
            let direct = std::fs::read_to_string(&path);
            if direct.is_ok_and(|d| d.trim() != "1") {
                let detail = "direct I/O of the loop device was switched off";
                return Some((Reason::TrackingInterrupted, detail.to_owned()));
            }
        }
        let ours = self.engine.word(control::SECTORS_WRITTEN);
        let theirs = self.backing.sectors_changed()?;
        // None of ours is under way, so both counts stand still. What we counted and the device did not (a write that
        // failed) must not hide as much of somebody else's for ever.
        self.engine.set_word(control::SECTORS_WRITTEN, theirs);
        if theirs <= ours {
            return None;
        }
        let more = theirs.saturating_sub(ours);
        let detail = format!("{more} sectors were written to the backing device past the tracker");
        Some((Reason::ForeignWrite, detail))
    }
}

fn absent_words(
    asked: Absent,
    descriptors: Vec<OwnedFd>,
    words: usize,
) -> Result<Vec<u64>, VolumeError> {
    if asked != Absent::Listed {
        return Ok(Vec::new());
    }
    let missing = || VolumeError::Refused {
        kind: Refusal::Invalid,
        message: "the bitmap of absent blocks is missing or of another size".to_owned(),
    };
    let memory = descriptors.into_iter().next().ok_or_else(missing)?;
    let memory = SharedMemory::from_fd(memory)
        .map_err(|e| io_error("map the bitmap of absent blocks", e))?;
    let found = memory.mapping().words().get(..words).ok_or_else(missing);
    Ok(found?.iter().map(|w| w.load(Ordering::Relaxed)).collect())
}
