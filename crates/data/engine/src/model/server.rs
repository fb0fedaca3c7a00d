//! A volume's server as the model drives it: queues, requests, and the I/O under way.

use crate::atomic::Memory;
use crate::control::Control;
use crate::engine::Engine;
use crate::queue::Queue;
use crate::request::{Action, Actions, Event, Operation, Outcome, Request, Ticket};
use crate::state::SaveSlot;
use crate::{Errno, Snapshot};
use blktide_testkit::disk::{Node, SimDisk};
use blktide_testkit::pattern::stamped;
use blktide_types::clock::Instant;
use std::sync::{Arc, Mutex};

/// The save area of one snapshot: its bytes.
pub(super) type Area = Mutex<Vec<u8>>;

/// A request in shared memory: what a successor finds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    pub(super) operation: Operation,
    /// Number of the write, for its bytes.
    pub(super) sequence: u64,
}

/// An I/O under way.
#[derive(Debug)]
pub(super) enum Io {
    Perform {
        slot: usize,
        operation: Operation,
        landed: u64,
    },
    Preserve {
        slot: usize,
        ticket: Ticket,
        to: SaveSlot,
        offset: u64,
        len: u64,
        snapshot: Arc<Snapshot>,
        copy: Option<Vec<u8>>,
    },
}

/// What a step did to the volume, for the reference.
pub(super) enum Done {
    /// Sectors were written by the write of that number; 0: zeroes.
    Wrote(u64, u64, u64),
    /// Bytes of a range are not known: something failed over it.
    Unsure(u64, u64),
    /// A request was answered.
    Completed(usize, Result<u64, Errno>),
    /// Read: slot, offset, len: to be compared.
    Read(u64, u64),
    Flushed,
}

pub(super) struct Server {
    pub(super) engine: Engine,
    pub(super) control: Control,
    pub(super) queues: Vec<Queue>,
    pub(super) requests: Vec<Request>,
    pub(super) io: Vec<Io>,
    pub(super) waited: u64,
}

impl Server {
    pub(super) fn new(engine: Engine) -> Self {
        let shape = *engine.shape();
        Self {
            control: engine.control(),
            queues: (0..shape.queues)
                .map(|q| engine.queue(q).unwrap())
                .collect(),
            requests: (0..shape.slots).map(|_| Request::new()).collect(),
            io: Vec::new(),
            waited: 0,
            engine,
        }
    }

    /// Gives a slot's request an event, and notes what is to be done.
    pub(super) fn step(&mut self, slot: usize, event: Event, now: Instant, done: &mut Vec<Done>) {
        let count = self.queues.len();
        let queue = &mut self.queues[slot % count];
        let mut actions = Actions::new();
        self.requests[slot].step(queue, event, now, &mut actions);
        for action in actions.drain() {
            match action {
                Action::Preserve {
                    ticket,
                    slot: to,
                    offset,
                    len,
                    ..
                } => self.io.push(Io::Preserve {
                    slot,
                    ticket,
                    to,
                    offset,
                    len,
                    snapshot: Arc::clone(self.queues[slot % count].snapshot().unwrap()),
                    copy: None,
                }),
                Action::Perform { operation, .. } => self.io.push(Io::Perform {
                    slot,
                    operation,
                    landed: 0,
                }),
                Action::Complete(result) => done.push(Done::Completed(slot, result)),
                Action::WaitGate | Action::WaitSnapshot { .. } => self.waited += 1,
            }
        }
    }

    /// Takes I/O `n` one step further.
    pub(super) fn land(
        &mut self,
        n: usize,
        whole: bool,
        slots: &[Option<Slot>],
        disk: (&SimDisk, Node),
    ) -> (Option<(usize, Event)>, Vec<Done>) {
        let mut done = Vec::new();
        let event = match &mut self.io[n] {
            Io::Preserve {
                slot,
                ticket,
                to,
                offset,
                len,
                snapshot,
                copy,
            } => match copy.take() {
                None => {
                    let mut bytes = vec![0; usize::try_from(*len).unwrap()];
                    disk.0.read_at(disk.1, *offset, &mut bytes).unwrap();
                    *copy = Some(bytes);
                    None
                }
                Some(bytes) => {
                    let size = self.engine.shape().geometry.block_size().bytes_usize();
                    let area = snapshot.save_area().downcast_ref::<Area>().unwrap();
                    let start = usize::try_from(to.0).unwrap() * size;
                    area.lock().unwrap()[start..start + bytes.len()].copy_from_slice(&bytes);
                    Some((*slot, Event::Preserved(*ticket, Outcome::Safe)))
                }
            },
            Io::Perform {
                slot,
                operation,
                landed,
            } => {
                let sequence = slots[*slot].map_or(0, |s| s.sequence);
                let (slot, operation) = (*slot, *operation);
                match operation {
                    Operation::Write { offset, len, .. } | Operation::Zero { offset, len, .. } => {
                        let zero = matches!(operation, Operation::Zero { .. });
                        let number = if zero { 0 } else { sequence };
                        let half = (len / 2) & !511;
                        let until = if *landed == 0 && !whole && half > 0 {
                            half
                        } else {
                            len
                        };
                        put(disk, offset + *landed, until - *landed, number);
                        *landed = until;
                        if until == len {
                            done.push(Done::Wrote(offset, len, number));
                            Some((slot, Event::Performed(Ok(len))))
                        } else {
                            None
                        }
                    }
                    Operation::Read { offset, len } => {
                        done.push(Done::Read(offset, len));
                        Some((slot, Event::Performed(Ok(len))))
                    }
                    Operation::Flush => {
                        disk.0.sync(disk.1).unwrap();
                        done.push(Done::Flushed);
                        Some((slot, Event::Performed(Ok(0))))
                    }
                }
            }
        };
        if event.is_some() {
            self.io.swap_remove(n);
        }
        (event, done)
    }

    /// I/O `n` ends short: the half that is done is told.
    pub(super) fn short(
        &mut self,
        n: usize,
        slots: &[Option<Slot>],
        disk: (&SimDisk, Node),
    ) -> (Option<(usize, Event)>, Vec<Done>) {
        let Io::Perform {
            slot,
            operation: Operation::Write { offset, len, .. },
            landed,
        } = &self.io[n]
        else {
            return (None, Vec::new());
        };
        let (slot, offset, half, landed) = (*slot, *offset, (len / 2) & !511, *landed);
        if half == 0 || landed > half {
            return (None, Vec::new());
        }
        let number = slots[slot].map_or(0, |s| s.sequence);
        put(disk, offset + landed, half - landed, number);
        self.io.swap_remove(n);
        (
            Some((slot, Event::Performed(Ok(half)))),
            vec![Done::Wrote(offset, half, number)],
        )
    }

    /// I/O `n` fails where it stands.
    pub(super) fn fail(&mut self, n: usize, kind: u64) -> (Option<(usize, Event)>, Vec<Done>) {
        let outcome = [
            Outcome::Unreadable,
            Outcome::SaveAreaFull,
            Outcome::SaveAreaFailed,
        ][usize::try_from(kind % 3).unwrap()];
        match self.io.swap_remove(n) {
            Io::Preserve { slot, ticket, .. } => {
                (Some((slot, Event::Preserved(ticket, outcome))), Vec::new())
            }
            Io::Perform {
                slot, operation, ..
            } => {
                let done = match operation {
                    Operation::Write { offset, len, .. } | Operation::Zero { offset, len, .. } => {
                        vec![Done::Unsure(offset, len)]
                    }
                    Operation::Read { .. } | Operation::Flush => Vec::new(),
                };
                (Some((slot, Event::Performed(Err(Errno::IO)))), done)
            }
        }
    }

    /// The server dies: its writes that are under way land or do not, and then the fence is passed.
    pub(super) fn die(self, slots: &[Option<Slot>], disk: (&SimDisk, Node), coin: u64) {
        for (i, io) in self.io.into_iter().enumerate() {
            if let Io::Perform {
                slot,
                operation: Operation::Write { offset, len, .. },
                landed,
            } = io
                && coin >> (i % 64) & 1 == 1
            {
                let number = slots[slot].map_or(0, |s| s.sequence);
                put(disk, offset + landed, len - landed, number);
            }
        }
    }
}

fn put(disk: (&SimDisk, Node), offset: u64, len: u64, number: u64) {
    let bytes = bytes_of(offset, len, number);
    let count = disk.0.write_at(disk.1, offset, &bytes).unwrap();
    assert_eq!(count, bytes.len());
}

/// What write `number` puts at a range; zeroes for 0.
pub(super) fn bytes_of(offset: u64, len: u64, number: u64) -> Vec<u8> {
    let len = usize::try_from(len).unwrap();
    if number == 0 {
        vec![0; len]
    } else {
        stamped(len, offset, number)
    }
}

/// Memories of a volume's tracker.
pub(super) type Memories = (Arc<dyn Memory>, Arc<dyn Memory>);
