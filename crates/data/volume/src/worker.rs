//! A queue's thread: takes requests, performs what the engine says by its ring, answers.
//!
//! ```text
//! frontend.next ─▶ engine ─┬─ Perform ──▶ ring ─▶ Performed ─▶ engine ─▶ Complete ─▶ frontend.complete
//!                          ├─ Preserve ─▶ ring: read device, write save area ─▶ Preserved
//!                          └─ Wait…     ─▶ woken by the control thread's bell, or by the clock
//! ```
//! **Invariant**: nothing is allocated per request, no lock is waited for, nothing is opened; the thread waits in one
//! place, its ring. It ends only when the frontend is gone and nothing is under way.

use crate::memory::SharedMemory;
use crate::preserves::{Copied, Preserves};
use blktide_device::{Backing, DeviceError};
use blktide_device::{Event as Done, Outcome, Target, Transfer, Transfers};
use blktide_engine::{Action, Actions, Engine, Errno, Event, Operation, Queue, Request};
use blktide_format::shared::control;
use blktide_frontend::slots::Slots;
use blktide_frontend::{Frontend, Next, Slot, Work};
use blktide_sys::clock::SystemClock;
use blktide_sys::event::EventFd;
use blktide_sys::ring::{MemoryId, MemoryRange, Zeroing};
use blktide_types::clock::{Clock, Instant};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// An idle thread still turns this often, so that it is not taken for a hung one.
const IDLE: Duration = Duration::from_secs(1);
/// Room in the ring beside one operation a slot: preserves (two each at most), watches.
const SPARE_OPERATIONS: u32 = 64;

const FRONTEND: u64 = 1 << 56;
const BELL: u64 = 2 << 56;
const PERFORM: u64 = 3 << 56;
const PRESERVE: u64 = 4 << 56;
const KIND: u64 = 0xff << 56;

/// What control and a queue's thread say to each other.
#[derive(Debug)]
pub(crate) struct Bell {
    /// Rung by control: the gate has opened, a snapshot has ended.
    pub(crate) rings: EventFd,
    /// Every request that a dead predecessor left is done.
    pub(crate) recovered: AtomicBool,
}

/// A queue's thread.
pub(crate) struct Worker<F> {
    control: Arc<SharedMemory>,
    queue: Queue,
    frontend: F,
    slots: Slots,
    transfers: Transfers,
    payloads: MemoryId,
    preserves: Preserves,
    bell: Arc<Bell>,
    requests: Vec<Request>,
    waits: Vec<Wait>,
    performing: Vec<u64>,
    waiting: usize,
    left: usize,
    left_slots: Vec<bool>,
    source: Source,
    failed: Option<io::Error>,
    under_way: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wait {
    No,
    Gate,
    Until(Instant),
}

/// What the frontend may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// Perhaps a request.
    More,
    /// Nothing, until it says so.
    Empty,
    /// Nothing ever again.
    Gone,
}

/// What a worker is made of.
pub(crate) struct Parts<'a, F> {
    pub(crate) engine: &'a Engine,
    pub(crate) control: Arc<SharedMemory>,
    pub(crate) number: usize,
    pub(crate) backing: &'a Backing,
    pub(crate) frontend: F,
    pub(crate) slots: Slots,
    pub(crate) bell: Arc<Bell>,
}

impl<F: Frontend> Worker<F> {
    /// A worker, with all the memory it will ever need.
    pub(crate) fn new(parts: Parts<'_, F>) -> io::Result<Self> {
        let count = parts.slots.count();
        let operations = u32::try_from(count).map_err(other)?;
        let operations = operations.saturating_add(SPARE_OPERATIONS);
        let mut transfers = Transfers::new(parts.backing, operations).map_err(other)?;
        let payloads = transfers
            .register_memory(Arc::clone(parts.slots.mapping()))
            .map_err(other)?;
        let block = parts.engine.shape().geometry.block_size();
        let preserves = Preserves::new(&mut transfers, block, PRESERVE, count)?;
        Ok(Self {
            control: parts.control,
            queue: parts.engine.queue(parts.number).map_err(other)?,
            frontend: parts.frontend,
            slots: parts.slots,
            transfers,
            payloads,
            preserves,
            bell: parts.bell,
            requests: (0..count).map(|_| Request::new()).collect(),
            waits: vec![Wait::No; count],
            performing: vec![0; count],
            waiting: 0,
            left: 0,
            left_slots: vec![false; count],
            source: Source::More,
            failed: None,
            under_way: 0,
        })
    }

    /// Serves until the frontend is gone. An error: this process cannot serve; its successor finds the requests in the slots.
    pub(crate) fn serve(&mut self) -> io::Result<()> {
        let watched = self.frontend.run()?;
        let frontend = self.transfers.register_file(watched).map_err(other)?;
        let rings = Arc::new(self.bell.rings.try_clone()?.into_fd());
        let rings = self.transfers.register_file(rings).map_err(other)?;
        self.finish_left();
        self.transfers.watch(FRONTEND, frontend).map_err(other)?;
        self.transfers.watch(BELL, rings).map_err(other)?;
        loop {
            if let Some(error) = self.failed.take() {
                return Err(error);
            }
            if self.source == Source::Gone && self.under_way == 0 && self.preserves.under_way() == 0
            {
                self.frontend.stop();
                return Ok(());
            }
            self.take_requests()?;
            let busy = self.under_way.saturating_add(self.preserves.under_way());
            self.queue.tick(busy);
            let limit = self.limit();
            self.transfers.wait(Some(limit)).map_err(other)?;
            while let Some(done) = self.transfers.next_event() {
                self.happened(done);
            }
            self.look_at_clock();
        }
    }

    /// Starts what a dead predecessor left in this queue's slots.
    fn finish_left(&mut self) {
        while let Some(next) = self.frontend.next_left() {
            if let Next::Request(slot, work) = next {
                if let Some(place) = self.left_slots.get_mut(slot.0) {
                    *place = true;
                    self.left = self.left.saturating_add(1);
                }
                add_word(&self.control, control::LEFT_REQUESTS, 1);
                self.step(slot, Event::Start(operation_of(work)));
            }
        }
        self.note_left(None);
    }

    fn note_left(&mut self, slot: Option<Slot>) {
        if let Some(place) = slot.and_then(|s| self.left_slots.get_mut(s.0))
            && std::mem::take(place)
        {
            self.left = self.left.saturating_sub(1);
        }
        if self.left == 0 {
            self.bell.recovered.store(true, Ordering::Release);
        }
    }

    fn take_requests(&mut self) -> io::Result<()> {
        while self.source == Source::More {
            match self.frontend.next()? {
                Next::Request(slot, work) => self.step(slot, Event::Start(operation_of(work))),
                Next::Handled => {}
                Next::Nothing => self.source = Source::Empty,
                Next::NoSlot => return Ok(()),
                Next::Gone => self.source = Source::Gone,
            }
        }
        Ok(())
    }

    fn happened(&mut self, done: Done) {
        let number = done.token & !KIND;
        match (done.token & KIND, done.outcome) {
            (FRONTEND, _) if self.source == Source::Empty => self.source = Source::More,
            (BELL, _) => {
                self.bell.rings.take();
                self.queue.refresh();
                self.preserves
                    .forget_old(&mut self.transfers, self.queue.snapshot());
                self.again(|wait| matches!(wait, Wait::Gate));
            }
            (PERFORM, Outcome::Done(result)) => {
                let slot = Slot(usize::try_from(number).unwrap_or(usize::MAX));
                self.under_way = self.under_way.saturating_sub(1);
                let bytes = self.performing.get(slot.0).copied().unwrap_or(0);
                let result = result.map(|()| bytes).map_err(|e| errno_of(&e));
                self.step(slot, Event::Performed(result));
            }
            (PRESERVE, Outcome::Done(result)) => {
                let copied = self.preserves.advance(&mut self.transfers, number, result);
                if let Some(copied) = copied {
                    self.preserved(&copied);
                }
                while let Some(failed) = self.preserves.next_failed() {
                    self.preserved(&failed);
                }
            }
            (_, Outcome::Done(_) | Outcome::Readable | Outcome::TimedOut) => {}
        }
    }

    fn preserved(&mut self, copied: &Copied) {
        self.step(copied.slot, Event::Preserved(copied.ticket, copied.outcome));
        self.again(|wait| matches!(wait, Wait::Until(_)));
    }

    /// One step of a slot's request, and all that follows from it.
    fn step(&mut self, slot: Slot, event: Event) {
        let now = SystemClock.now();
        let mut actions = Actions::new();
        let Some(request) = self.requests.get_mut(slot.0) else {
            return;
        };
        request.step(&mut self.queue, event, now, &mut actions);
        if !request.is_outside() {
            self.set_wait(slot, Wait::No);
        }
        for action in actions.drain() {
            match action {
                Action::Perform { operation, done } => self.perform(slot, operation, done),
                Action::Preserve {
                    ticket,
                    slot: save,
                    offset,
                    len,
                    ..
                } => {
                    let Some(snapshot) = self.queue.snapshot().cloned() else {
                        // It has ended meanwhile; the request waits for this copy all the same.
                        let outcome = blktide_engine::Outcome::SaveAreaFailed;
                        self.preserved(&Copied {
                            slot,
                            ticket,
                            outcome,
                        });
                        continue;
                    };
                    let copy = crate::preserves::Copy {
                        slot,
                        ticket,
                        save,
                        offset,
                        len,
                        snapshot,
                    };
                    if let Some(copied) = self.preserves.start(&mut self.transfers, copy) {
                        self.preserved(&copied);
                    }
                }
                Action::Complete(result) => {
                    let result = result.map_err(|e| blktide_sys::Errno(e.0));
                    if let Err(e) = self.frontend.complete(slot, result) {
                        self.failed = Some(e);
                    }
                    self.note_left(Some(slot));
                }
                Action::WaitGate => self.set_wait(slot, Wait::Gate),
                Action::WaitSnapshot { until } => self.set_wait(slot, Wait::Until(until)),
            }
        }
    }

    fn perform(&mut self, slot: Slot, operation: Operation, done: u64) {
        let transfer = match operation {
            Operation::Read { offset, len } => self
                .payload(slot, done, len)
                .map(|to| Transfer::Read { offset, to }),
            Operation::Write { offset, len, .. } => {
                self.count_written(len);
                self.payload(slot, done, len)
                    .map(|from| Transfer::Write { offset, from })
            }
            Operation::Zero { offset, len, keep } => {
                self.count_written(len);
                let mode = if keep { Zeroing::Zero } else { Zeroing::Punch };
                Some(Transfer::Zero { mode, offset, len })
            }
            Operation::Flush => Some(Transfer::Flush),
        };
        let bytes = match operation {
            Operation::Read { len, .. }
            | Operation::Write { len, .. }
            | Operation::Zero { len, .. } => len,
            Operation::Flush => 0,
        };
        if let Some(place) = self.performing.get_mut(slot.0) {
            *place = bytes;
        }
        let token = PERFORM | u64::try_from(slot.0).unwrap_or(0);
        let started = transfer.map(|t| self.transfers.start(token, Target::Backing, t));
        if let Some(Ok(())) = started {
            self.under_way = self.under_way.saturating_add(1);
        } else {
            // The ring has room for one operation a slot, and payloads lie in slots: never seen.
            self.step(slot, Event::Performed(Err(Errno::IO)));
        }
    }

    fn payload(&self, slot: Slot, done: u64, len: u64) -> Option<MemoryRange> {
        let skip = usize::try_from(done).ok()?;
        let len = u32::try_from(len).ok()?;
        let end = skip.checked_add(usize::try_from(len).ok()?)?;
        (end <= self.slots.payload_bytes()).then(|| MemoryRange {
            memory: self.payloads,
            offset: self.slots.payload(slot).saturating_add(skip),
            len,
        })
    }

    /// Before the write is submitted, so that the device's own count never exceeds ours (P5).
    fn count_written(&self, bytes: u64) {
        add_word(&self.control, control::SECTORS_WRITTEN, bytes.div_ceil(512));
    }

    fn set_wait(&mut self, slot: Slot, wait: Wait) {
        if let Some(place) = self.waits.get_mut(slot.0) {
            let was = std::mem::replace(place, wait);
            let (was, is) = (was != Wait::No, wait != Wait::No);
            self.waiting = match (was, is) {
                (true, false) => self.waiting.saturating_sub(1),
                (false, true) => self.waiting.saturating_add(1),
                (true, true) | (false, false) => self.waiting,
            };
        }
    }

    fn again(&mut self, which: impl Fn(Wait) -> bool) {
        if self.waiting == 0 {
            return;
        }
        for slot in self.slots.all() {
            if self.waits.get(slot.0).is_some_and(|w| which(*w)) {
                self.step(slot, Event::Again);
            }
        }
    }

    /// Who has waited long enough looks again; who has been held too long gives up (P8).
    fn look_at_clock(&mut self) {
        if self.waiting == 0 && self.preserves.under_way() == 0 {
            return;
        }
        let now = SystemClock.now();
        let gate_open = !self.queue.gate_is_set();
        self.again(|wait| match wait {
            Wait::No => false,
            Wait::Gate => gate_open,
            Wait::Until(until) => now >= until,
        });
        for slot in self.slots.all() {
            let due = self.requests.get(slot.0).and_then(Request::deadline);
            if due.is_some_and(|d| now >= d) {
                self.step(slot, Event::Again);
            }
        }
    }

    fn limit(&self) -> Duration {
        if self.waiting == 0 && self.preserves.under_way() == 0 {
            return IDLE;
        }
        let now = SystemClock.now();
        let due = self.requests.iter().filter_map(Request::deadline);
        let until = self.waits.iter().filter_map(|w| match w {
            Wait::Until(until) => Some(*until),
            Wait::No | Wait::Gate => None,
        });
        let next = due.chain(until).map(|t| t.since(now)).min();
        // Not zero: a bound that is due now was looked at just before.
        next.unwrap_or(IDLE).clamp(Duration::from_micros(100), IDLE)
    }
}

fn operation_of(work: Work) -> Operation {
    match work {
        Work::Read { offset, len } => Operation::Read {
            offset,
            len: u64::from(len),
        },
        Work::Write { offset, len } => Operation::Write {
            offset,
            len: u64::from(len),
            durable: false,
        },
        Work::Zero { offset, len, keep } => Operation::Zero { offset, len, keep },
        Work::Flush => Operation::Flush,
    }
}

/// The number that a failed transfer is answered with.
fn errno_of(error: &DeviceError) -> Errno {
    match error.consequence() {
        blktide_device::Consequence::FailRequest(errno) => Errno(errno.0),
        blktide_device::Consequence::Retry
        | blktide_device::Consequence::Refuse
        | blktide_device::Consequence::Distrust
        | blktide_device::Consequence::Stop => Errno::IO,
    }
}

/// Adds to a word of the control memory.
fn add_word(control: &SharedMemory, index: usize, value: u64) {
    if let Some(word) = control.mapping().words().get(index) {
        word.fetch_add(value, Ordering::Relaxed);
    }
}

fn other(error: impl std::error::Error + Send + Sync + 'static) -> io::Error {
    io::Error::other(error)
}
