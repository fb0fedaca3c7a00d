//! One request's life: enter → gate? → mark → preserve what is wanted → perform → leave → complete.
//!
//! ```text
//!                     ┌──────────── gate set: left, waits outside ◀───────────┐
//! Start ─▶ [enter] ─▶ mark ─▶ look at each block ─▶ Perform ─▶ leave ─▶ Complete
//!             ▲                 │        ▲                       └─▶ next piece ─▶ [enter]
//!             │                 ▼        │
//!             └── left, waits ◀─ busy    Preserve … Preserved (several in flight)
//! ```
//!
//! Events in, actions out; both bounded, nothing allocated. Each piece of a request goes the whole way: a write is one
//! piece, zeroes are cut (P8).
//! **Invariant**: when `Perform` of a write is handed out the request is inside, its grains are marked in the live bank of
//! an epoch looked at after entering, and each block of it is unwanted, preserved, done, or the snapshot revoked. A
//! request that waits outside has no block in `PRESERVING`.

use crate::broken::{Break, broken};
use crate::consequence::Errno;
use crate::gate::Entry;
use crate::queue::{Known, Queue};
use crate::snapshot::{Overflow, Snapshot};
use crate::state::{Look, SaveSlot};
use crate::tracker::Epoch;
use blktide_format::shared::queue;
use blktide_types::clock::Instant;
use blktide_types::io::RevokeCause;
use blktide_types::range::BlockRange;
use blktide_types::unit::BlockIndex;
use core::time::Duration;

/// Preserves of one request in flight at most.
pub const LANES: usize = 8;
/// Zeroes inside a snapshot's wanted set go in pieces of at most so many bytes (P8).
pub const PIECE_BYTES_WANTED: u64 = 1 << 20;
/// Zeroes elsewhere: a hold waits for one piece at most.
pub const PIECE_BYTES: u64 = 64 << 20;
/// How soon a request that waits for a snapshot looks again.
const AGAIN_SOON: Duration = Duration::from_millis(1);

/// What a request asks for. Bytes; multiples of the logical sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Read.
    Read {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Write; `durable` asks for stable storage before the answer (FUA).
    Write {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Whether it must be on stable storage when it completes.
        durable: bool,
    },
    /// Make bytes read as zeroes; `keep` keeps the space allocated (`ZERO_RANGE`), else it may be given back (`PUNCH_HOLE`).
    Zero {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Whether to keep the space allocated.
        keep: bool,
    },
    /// Everything that was completed to stable storage.
    Flush,
}

impl Operation {
    const fn span(self) -> (u64, u64) {
        match self {
            Self::Read { offset, len }
            | Self::Write { offset, len, .. }
            | Self::Zero { offset, len, .. } => (offset, len),
            Self::Flush => (0, 0),
        }
    }
}

/// Which preserve of a request an event is about; one of an earlier life of the request is recognised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    serial: u32,
    lane: u8,
}

impl Ticket {
    /// As a number, to travel with an I/O.
    pub fn number(self) -> u64 {
        u64::from(self.serial) << 8 | u64::from(self.lane)
    }

    /// Back from a number.
    pub fn of_number(number: u64) -> Self {
        let [lane, a, b, c, d, ..] = number.to_le_bytes();
        Self {
            serial: u32::from_le_bytes([a, b, c, d]),
            lane,
        }
    }
}

/// What became of a preserve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The original lies in its slot: a read(2) of the save area gives it.
    Safe,
    /// The original could not be read.
    Unreadable,
    /// The save area took nothing more (ENOSPC).
    SaveAreaFull,
    /// The save area failed.
    SaveAreaFailed,
}

/// What a request is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// It has arrived, or was found in its slot by a successor.
    Start(Operation),
    /// A preserve has ended.
    Preserved(Ticket, Outcome),
    /// What `Perform` asked for has ended: bytes done, or the error.
    Performed(Result<u64, Errno>),
    /// The gate has opened, or time has passed: look again. Harmless at any moment.
    Again,
}

/// What the volume must do for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Read `len` bytes of the device at `offset`, write them to the save area at `slot`; then [`Event::Preserved`].
    /// The buffer is the volume's own: the request may be over before this is (it was given up).
    Preserve {
        /// To be given back.
        ticket: Ticket,
        /// Which block, for the log.
        block: BlockIndex,
        /// Where to.
        slot: SaveSlot,
        /// First byte on the device.
        offset: u64,
        /// Bytes: the block's; less for a short last one.
        len: u64,
    },
    /// Do this on the device; then [`Event::Performed`]. `done` bytes of the request lie before it.
    Perform {
        /// What is to be done.
        operation: Operation,
        /// Bytes of the request that were done before: where in the payload to go on.
        done: u64,
    },
    /// Answer: bytes, or the error. The request is over.
    Complete(Result<u64, Errno>),
    /// It waits outside until the gate opens: then [`Event::Again`].
    WaitGate,
    /// It waits outside for a snapshot: [`Event::Again`] by `until` at the latest, or when a preserve of another request ends.
    WaitSnapshot {
        /// When to look again.
        until: Instant,
    },
}

/// Actions of one step, in order.
#[derive(Clone, Debug)]
pub struct Actions {
    list: [Option<Action>; LANES + 2],
    len: usize,
}

impl Default for Actions {
    fn default() -> Self {
        Self::new()
    }
}

impl Actions {
    /// None.
    pub const fn new() -> Self {
        Self {
            list: [None; LANES + 2],
            len: 0,
        }
    }

    /// Takes all of them out, in order.
    pub fn drain(&mut self) -> impl Iterator<Item = Action> + use<> {
        self.len = 0;
        core::mem::replace(&mut self.list, [None; LANES + 2])
            .into_iter()
            .flatten()
    }

    fn push(&mut self, action: Action) {
        if let Some(place) = self.list.get_mut(self.len) {
            *place = Some(action);
            self.len += 1;
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// No request.
    Idle,
    /// Outside, at the gate.
    AtGate,
    /// Outside, for a snapshot.
    ForSnapshot,
    /// Inside, originals are being preserved.
    Preserving,
    /// Inside (or a read or flush, which need not be), being performed.
    Performing,
}

/// A request; one a slot, used again and again.
#[derive(Debug)]
pub struct Request {
    operation: Operation,
    stage: Stage,
    serial: u32,
    done: u64,
    piece_end: u64,
    next_block: u64,
    lanes: [Option<(BlockIndex, SaveSlot)>; LANES],
    sequence: u64,
    arrived: Instant,
    was_outside: bool,
    held_until: Option<Instant>,
}

impl Default for Request {
    fn default() -> Self {
        Self::new()
    }
}

impl Request {
    /// An idle one.
    pub const fn new() -> Self {
        Self {
            operation: Operation::Flush,
            stage: Stage::Idle,
            serial: 0,
            done: 0,
            piece_end: 0,
            next_block: 0,
            lanes: [None; LANES],
            sequence: 0,
            arrived: Instant(0),
            was_outside: false,
            held_until: None,
        }
    }

    /// Whether there is no request in it.
    pub const fn is_idle(&self) -> bool {
        matches!(self.stage, Stage::Idle)
    }

    /// Whether it waits outside: [`Event::Again`] moves it.
    pub const fn is_outside(&self) -> bool {
        matches!(self.stage, Stage::AtGate | Stage::ForSnapshot)
    }

    /// When it will have been held for the snapshot as long as it may (P8): [`Event::Again`] is due then, also if it
    /// waits for nothing but preserves that never end.
    pub const fn deadline(&self) -> Option<Instant> {
        self.held_until
    }

    /// One step. `queue` is that of the request's slot.
    pub fn step(&mut self, queue: &mut Queue, event: Event, now: Instant, actions: &mut Actions) {
        match (event, self.stage) {
            (Event::Start(operation), Stage::Idle) => self.start(queue, operation, now, actions),
            (Event::Again, Stage::AtGate | Stage::ForSnapshot) => self.again(queue, now, actions),
            (Event::Again, Stage::Preserving) => self.held_too_long(queue, now, actions),
            (Event::Preserved(ticket, outcome), _) => {
                self.preserved(queue, (ticket, outcome), now, actions);
            }
            (Event::Performed(result), Stage::Performing) => {
                self.performed(queue, result, now, actions);
            }
            (Event::Start(_) | Event::Again | Event::Performed(_), _) => {}
        }
    }

    fn start(&mut self, queue: &mut Queue, operation: Operation, now: Instant, out: &mut Actions) {
        let (offset, len) = operation.span();
        let volume_bytes = queue.engine.shape().geometry.volume_bytes();
        self.operation = operation;
        self.serial = self.serial.wrapping_add(1);
        self.done = 0;
        self.lanes = [None; LANES];
        self.piece_end = offset.saturating_add(len);
        self.arrived = now;
        self.was_outside = false;
        self.held_until = None;
        if offset.checked_add(len).is_none_or(|end| end > volume_bytes) {
            // trap TD4: a write beyond the map never passes silently.
            return self.complete(queue, Err(Errno::INVALID), out);
        }
        match operation {
            Operation::Read { .. } | Operation::Flush => self.perform(queue, now, out),
            Operation::Write { .. } | Operation::Zero { .. } if len == 0 => {
                self.complete(queue, Ok(0), out);
            }
            Operation::Write { .. } | Operation::Zero { .. } => self.enter(queue, now, out),
        }
    }

    fn again(&mut self, queue: &mut Queue, now: Instant, out: &mut Actions) {
        if self.stage == Stage::ForSnapshot && self.held_until.is_some_and(|t| now >= t) {
            self.revoke(queue, RevokeCause::WaitLimit);
        }
        if self.stage == Stage::AtGate && queue.gate_is_set() {
            out.push(Action::WaitGate);
            return;
        }
        queue.unpark(self.stage == Stage::ForSnapshot);
        self.enter(queue, now, out);
    }

    /// Enters with the piece that begins at `done`, marks it, and goes on to its blocks.
    fn enter(&mut self, queue: &mut Queue, now: Instant, out: &mut Actions) {
        let early = broken(Break::LookBeforeEntering).then(|| queue.engine.inner.marks.epoch());
        if queue.engine.inner.gate.enter(queue.number) == Entry::Shut {
            queue.park(false);
            self.go_outside(Stage::AtGate);
            out.push(Action::WaitGate);
            return;
        }
        let epoch = early.unwrap_or_else(|| queue.engine.inner.marks.epoch());
        self.stage = Stage::Preserving;
        let (offset, len) = self.operation.span();
        let snapshot = if queue.engine.inner.passes_through() {
            None
        } else {
            match queue.known(epoch) {
                Known::None => None,
                Known::This(snapshot) => Some(snapshot),
                Known::NotYet => return self.wait(queue, false, now, out),
            }
        };
        let start = offset.saturating_add(self.done);
        self.piece_end = piece_end(
            self.operation,
            (start, offset.saturating_add(len)),
            snapshot.as_deref(),
            queue,
        );
        self.next_block = start >> queue.engine.shape().geometry.block_size().shift();
        self.mark(queue, epoch, false);
        self.sequence = snapshot.as_ref().map_or(0, |s| s.sequence());
        self.go_on(queue, snapshot.as_deref(), now, out);
    }

    fn mark(&self, queue: &Queue, epoch: Epoch, late: bool) {
        let zero = matches!(self.operation, Operation::Zero { .. });
        let skipped = broken(Break::MarkAfterWrite) != late
            || broken(Break::NoteTrusted)
            || broken(Break::DiscardUnmarked) && zero
            || broken(Break::ParkedUnmarked) && self.was_outside
            || queue.engine.inner.passes_through();
        if !skipped {
            let start = self.operation.span().0.saturating_add(self.done);
            let len = self.piece_end.saturating_sub(start);
            queue.engine.inner.marks.mark(epoch, start, len);
        }
    }

    /// Looks at the blocks of the piece from `next_block` on; performs it when all may be overwritten.
    fn go_on(
        &mut self,
        queue: &mut Queue,
        snapshot: Option<&Snapshot>,
        now: Instant,
        out: &mut Actions,
    ) {
        let geometry = queue.engine.shape().geometry;
        let end_block = self.piece_end.div_ceil(geometry.block_size().bytes_u64());
        let mut busy = false;
        if let Some(snapshot) = snapshot {
            while self.next_block < end_block && !busy {
                let block = BlockIndex(self.next_block);
                let Some(lane) = self.lanes.iter().position(Option::is_none) else {
                    break;
                };
                let unpreserved = broken(Break::DiscardUnpreserved)
                    && matches!(self.operation, Operation::Zero { .. });
                if !snapshot.wants(block) || unpreserved {
                    self.next_block += 1;
                    continue;
                }
                match snapshot.writers.look(block, &mut queue.slot_from) {
                    Look::Free => self.next_block += 1,
                    Look::Preserve(slot) => {
                        self.preserve(snapshot, (lane, block, slot), now, out);
                        self.next_block += 1;
                    }
                    Look::Full if snapshot.overflow == Overflow::GiveUp => {
                        snapshot.revoke(RevokeCause::SaveAreaFull);
                    }
                    Look::Wait | Look::Full => busy = true,
                }
            }
        } else {
            self.next_block = end_block;
        }
        let in_flight = self.lanes.iter().any(Option::is_some);
        if busy && !in_flight {
            let limit = snapshot.map_or(AGAIN_SOON, |s| s.wait_limit);
            self.held_until.get_or_insert(now.after(limit));
            self.wait(queue, true, now, out);
        } else if !in_flight || broken(Break::OverwriteBeforeCopy) && self.next_block >= end_block {
            self.perform(queue, now, out);
        }
    }

    fn preserve(
        &mut self,
        snapshot: &Snapshot,
        (lane, block, slot): (usize, BlockIndex, SaveSlot),
        now: Instant,
        out: &mut Actions,
    ) {
        let geometry = &snapshot.geometry;
        if let Some(place) = self.lanes.get_mut(lane) {
            *place = Some((block, slot));
        }
        self.held_until
            .get_or_insert(now.after(snapshot.wait_limit));
        out.push(Action::Preserve {
            ticket: Ticket {
                serial: self.serial,
                lane: u8::try_from(lane).unwrap_or(0),
            },
            block,
            slot,
            offset: geometry.block_start(block),
            len: u64::from(geometry.block_bytes(block)),
        });
    }

    fn preserved(
        &mut self,
        queue: &mut Queue,
        (ticket, outcome): (Ticket, Outcome),
        now: Instant,
        out: &mut Actions,
    ) {
        if ticket.serial != self.serial {
            return;
        }
        let lane = self.lanes.get_mut(usize::from(ticket.lane));
        let Some((block, slot)) = lane.and_then(Option::take) else {
            return;
        };
        let Some(snapshot) = queue
            .snapshot()
            .filter(|s| s.sequence() == self.sequence)
            .cloned()
        else {
            // It has ended: nobody wants the copy.
            return self.after_preserve(queue, None, now, out);
        };
        match outcome {
            Outcome::Safe => {
                snapshot.writers.preserved(block, slot);
                queue.words.add(queue::PRESERVED, 1);
            }
            Outcome::Unreadable => {
                snapshot.revoke(RevokeCause::OriginalUnreadable);
            }
            Outcome::SaveAreaFull => {
                snapshot.revoke(RevokeCause::SaveAreaFull);
            }
            Outcome::SaveAreaFailed => {
                snapshot.revoke(RevokeCause::SaveAreaFailed);
            }
        }
        self.after_preserve(queue, Some(&snapshot), now, out);
    }

    fn after_preserve(
        &mut self,
        queue: &mut Queue,
        snapshot: Option<&Snapshot>,
        now: Instant,
        out: &mut Actions,
    ) {
        if self.stage == Stage::Preserving {
            self.go_on(queue, snapshot, now, out);
        }
    }

    /// Inside, preserves are under way and do not end: after the limit the snapshot goes, the write goes on (P8).
    fn held_too_long(&mut self, queue: &mut Queue, now: Instant, out: &mut Actions) {
        if self.held_until.is_none_or(|t| now < t) {
            return;
        }
        self.revoke(queue, RevokeCause::WaitLimit);
        // What is under way ends in buffers and slots of its own; its tickets are void from here on.
        self.serial = self.serial.wrapping_add(1);
        self.lanes = [None; LANES];
        let snapshot = queue
            .snapshot()
            .filter(|s| s.sequence() == self.sequence)
            .cloned();
        self.go_on(queue, snapshot.as_deref(), now, out);
    }

    fn revoke(&self, queue: &Queue, cause: RevokeCause) {
        if let Some(snapshot) = queue.snapshot().filter(|s| s.sequence() == self.sequence) {
            snapshot.revoke(cause);
        }
    }

    /// Leaves, and waits outside for the snapshot; if `limited`, only if not too many do (P8).
    fn wait(&mut self, queue: &mut Queue, limited: bool, now: Instant, out: &mut Actions) {
        queue.engine.inner.gate.leave(queue.number);
        if !limited || queue.may_park() {
            queue.park(true);
            self.go_outside(Stage::ForSnapshot);
            let soon = now.after(AGAIN_SOON);
            let until = self.held_until.map_or(soon, |t| t.min(soon));
            out.push(Action::WaitSnapshot { until });
        } else {
            self.revoke(queue, RevokeCause::QueueFull);
            self.enter(queue, now, out);
        }
    }

    fn go_outside(&mut self, stage: Stage) {
        self.stage = stage;
        self.was_outside = true;
    }

    fn perform(&mut self, queue: &Queue, now: Instant, out: &mut Actions) {
        self.stage = Stage::Performing;
        if self.was_outside || self.held_until.is_some() {
            queue.waited(now.since(self.arrived));
        }
        if self.is_counted() && broken(Break::LeaveBeforeWritten) {
            queue.engine.inner.gate.leave(queue.number);
        }
        let (offset, _) = self.operation.span();
        let offset = offset.saturating_add(self.done);
        let len = self.piece_end.saturating_sub(offset);
        let operation = match self.operation {
            Operation::Write { durable, .. } => Operation::Write {
                offset,
                len,
                durable,
            },
            Operation::Zero { keep, .. } => Operation::Zero { offset, len, keep },
            Operation::Read { .. } => Operation::Read { offset, len },
            Operation::Flush => Operation::Flush,
        };
        out.push(Action::Perform {
            operation,
            done: self.done,
        });
    }

    fn performed(
        &mut self,
        queue: &mut Queue,
        result: Result<u64, Errno>,
        now: Instant,
        out: &mut Actions,
    ) {
        let (offset, len) = self.operation.span();
        let flush = self.operation == Operation::Flush;
        if flush {
            return self.complete(queue, result.map(|_| 0), out);
        }
        let bytes = match result {
            // Nothing done and no error: the device ends before the volume does.
            Ok(0) => Err(Errno::IO),
            other => other,
        };
        match bytes {
            Ok(bytes) => {
                let left = self
                    .piece_end
                    .saturating_sub(offset.saturating_add(self.done));
                let bytes = bytes.min(left);
                if broken(Break::MarkAfterWrite) {
                    self.mark(queue, queue.engine.inner.marks.epoch(), true);
                }
                self.done = self.done.saturating_add(bytes);
                if bytes < left {
                    self.perform(queue, now, out);
                } else if self.done < len {
                    self.leave(queue);
                    self.held_until = None;
                    self.was_outside = false;
                    self.arrived = now;
                    self.enter(queue, now, out);
                } else {
                    self.leave(queue);
                    self.complete(queue, Ok(len), out);
                }
            }
            Err(errno) => {
                self.leave(queue);
                self.complete(queue, Err(errno), out);
            }
        }
    }

    /// Leaves when the piece is performed.
    fn leave(&self, queue: &Queue) {
        if self.is_counted() && !broken(Break::LeaveBeforeWritten) {
            queue.engine.inner.gate.leave(queue.number);
        }
    }

    /// Whether the request is counted while inside: what changes nothing need not be.
    const fn is_counted(&self) -> bool {
        matches!(
            self.operation,
            Operation::Write { .. } | Operation::Zero { .. }
        )
    }

    fn complete(&mut self, queue: &Queue, result: Result<u64, Errno>, out: &mut Actions) {
        let word = match (result, self.operation) {
            (Err(_), _) => queue::FAILED,
            (Ok(_), Operation::Read { .. }) => queue::READ_BYTES,
            (Ok(_), Operation::Write { .. }) => queue::WRITTEN_BYTES,
            (Ok(_), Operation::Zero { .. }) => queue::ZEROED_BYTES,
            (Ok(_), Operation::Flush) => queue::FLUSHES,
        };
        let amount = match (result, self.operation) {
            (
                Ok(bytes),
                Operation::Read { .. } | Operation::Write { .. } | Operation::Zero { .. },
            ) => bytes,
            (Ok(_), Operation::Flush) | (Err(_), _) => 1,
        };
        queue.words.add(word, amount);
        queue.words.add(queue::FINISHED, 1);
        self.stage = Stage::Idle;
        self.held_until = None;
        out.push(Action::Complete(result));
    }
}

/// Where the piece of `operation` that begins at `start` ends.
fn piece_end(
    operation: Operation,
    (start, end): (u64, u64),
    snapshot: Option<&Snapshot>,
    queue: &Queue,
) -> u64 {
    if !matches!(operation, Operation::Zero { .. }) {
        return end;
    }
    let end = end.min(start.saturating_add(PIECE_BYTES));
    let size = queue.engine.shape().geometry.block_size();
    let Some(snapshot) = snapshot.filter(|s| s.revoked().is_none()) else {
        return end;
    };
    let Some(range) = BlockRange::covering(size, start, end.saturating_sub(start)) else {
        return end;
    };
    match snapshot.first_unfinished(range) {
        None => end,
        Some(block) => {
            let wanted_from = block.0.saturating_mul(size.bytes_u64());
            end.min(wanted_from.max(start.saturating_add(PIECE_BYTES_WANTED)))
        }
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests;
