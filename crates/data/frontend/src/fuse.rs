//! The `fuse` frontend: one file in one folder, served to a loop device.
//!
//! ```text
//! read(2) ─▶ slot ─▶ READ WRITE FSYNC FALLOCATE: the volume's ─▶ 'done, result' ─▶ writev(2)
//!                └─▶ all else: answered here
//! ```
//! **Invariant**: requests are taken by read(2) of the queue's own thread, never by the ring: an orphaned kernel worker
//! could take one after the process's death, into memory that nobody looks at.

use crate::slots::Slots;
use crate::{Frontend, Next, Slot, Work};
use blktide_sys::Errno;
use blktide_sys::fuse::{Answer, FuseDevice, NODE_ROOT, Operation, Received, Request, VolumeShape};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

const PUNCH_HOLE: u32 = 2;
const ZERO_RANGE: u32 = 16;
const KEEP_SIZE: u32 = 1;

/// A request in a slot.
#[derive(Clone, Copy, Debug)]
struct Taken {
    unique: u64,
    work: Work,
}

/// What a request is.
enum Judged {
    /// The volume's.
    Work(Work),
    /// One that this answers at once.
    Answer(Answer),
    /// One that wants no answer.
    NoAnswer,
}

/// The FUSE side of one queue.
#[derive(Debug)]
pub struct FuseFrontend {
    device: FuseDevice,
    slots: Slots,
    shape: VolumeShape,
    free: Vec<Slot>,
    taken: Vec<Option<Taken>>,
    /// Slots not yet looked at after a predecessor's death.
    left: std::ops::Range<usize>,
}

impl FuseFrontend {
    /// The frontend of one queue, over the descriptor that all queues share.
    pub fn new(device: FuseDevice, slots: Slots, shape: VolumeShape) -> Self {
        Self {
            free: slots.all().collect(),
            taken: slots.all().map(|_| None).collect(),
            left: 0..slots.count(),
            device,
            slots,
            shape,
        }
    }

    /// The slots, for transfers of their payloads.
    pub const fn slots(&self) -> &Slots {
        &self.slots
    }

    /// What to do with the request that stands in `slot`.
    fn look(&mut self, slot: Slot) -> io::Result<Next> {
        let found = Request::decode(
            self.slots.mapping(),
            self.slots.header(slot),
            self.slots.capacity(),
        );
        let Ok(request) = found else {
            return self.damaged(slot);
        };
        match self.judge(&request) {
            Judged::Work(work) => {
                let unique = request.unique;
                if let Some(place) = self.taken.get_mut(slot.0) {
                    *place = Some(Taken { unique, work });
                }
                Ok(Next::Request(slot, work))
            }
            Judged::Answer(answer) => self.answer_now(slot, &answer),
            Judged::NoAnswer => {
                self.give_back(slot);
                Ok(Next::Handled)
            }
        }
    }

    /// A request that cannot be read must be answered all the same: its asker would wait for ever.
    fn damaged(&mut self, slot: Slot) -> io::Result<Next> {
        let mut unique = [0; 8];
        let at = self.slots.header(slot).saturating_add(8);
        if self.slots.mapping().copy_out(at, &mut unique) && unique != [0; 8] {
            let answer = Answer::error(u64::from_ne_bytes(unique), Errno::IO);
            return self.answer_now(slot, &answer);
        }
        self.give_back(slot);
        Ok(Next::Handled)
    }

    fn answer_now(&mut self, slot: Slot, answer: &Answer) -> io::Result<Next> {
        let answered = self.device.answer(answer);
        self.give_back(slot);
        answered.map(|_| Next::Handled)
    }

    fn judge(&self, request: &Request) -> Judged {
        let unique = request.unique;
        let too_long =
            |len: u32| usize::try_from(len).is_ok_and(|l| l > self.slots.payload_bytes());
        let answer = match request.operation {
            Operation::Read { len, .. } | Operation::Write { len, .. } if too_long(len) => {
                Answer::error(unique, Errno::INVAL)
            }
            Operation::Read { offset, len } => return Judged::Work(Work::Read { offset, len }),
            Operation::Write { offset, len } => return Judged::Work(Work::Write { offset, len }),
            Operation::Sync => return Judged::Work(Work::Flush),
            Operation::Fallocate { offset, len, mode } => match mode & !KEEP_SIZE {
                PUNCH_HOLE | ZERO_RANGE => {
                    let keep = mode & ZERO_RANGE != 0;
                    return Judged::Work(Work::Zero { offset, len, keep });
                }
                _ => Answer::error(unique, Errno::OPNOTSUPP),
            },
            Operation::Forget | Operation::Interrupt => return Judged::NoAnswer,
            Operation::Init(offered) if offered.suffices() => {
                Answer::init(unique, &offered, &self.shape)
            }
            Operation::Init(_) => Answer::error(unique, Errno::OPNOTSUPP),
            Operation::Lookup { volume: true } if request.node == NODE_ROOT => {
                Answer::entry(unique, &self.shape)
            }
            Operation::Lookup { .. } => Answer::error(unique, Errno::NOENT),
            Operation::SetAttr { size: Some(size) } if size != self.shape.volume_bytes => {
                Answer::error(unique, Errno::PERM)
            }
            Operation::GetAttr | Operation::SetAttr { .. } => {
                Answer::attr(unique, request.node, &self.shape)
            }
            Operation::Open | Operation::OpenDir => Answer::opened(unique),
            Operation::StatFs => Answer::statfs(unique, &self.shape),
            Operation::Nothing | Operation::Destroy => Answer::done(unique),
            Operation::Other(_) => Answer::error(unique, Errno::NOSYS),
        };
        Judged::Answer(answer)
    }

    fn answer(&self, slot: Slot, taken: Taken, result: Result<u64, Errno>) -> io::Result<()> {
        let unique = taken.unique;
        let (answer, data) = match (result, taken.work) {
            (Err(errno), _) => (Answer::error(unique, errno), 0),
            (Ok(_), Work::Read { len, .. }) => (Answer::data(unique, len), len),
            (Ok(_), Work::Write { len, .. }) => (Answer::written(unique, len), 0),
            (Ok(_), Work::Zero { .. } | Work::Flush) => (Answer::done(unique), 0),
        };
        // Given before, or nobody there any more: it is over all the same.
        if data == 0 {
            self.device.answer(&answer)?;
        } else {
            let len = usize::try_from(data).map_err(io::Error::other)?;
            let at = self.slots.payload(slot);
            self.device
                .answer_data(&answer, self.slots.mapping(), at, len)?;
        }
        Ok(())
    }

    fn give_back(&mut self, slot: Slot) {
        self.slots.clear(slot);
        if let Some(place) = self.taken.get_mut(slot.0) {
            *place = None;
        }
        self.free.push(slot);
    }
}

impl Frontend for FuseFrontend {
    fn run(&mut self) -> io::Result<Arc<OwnedFd>> {
        self.device.set_nonblocking(true)?;
        Ok(Arc::new(self.device.try_clone()?.into_fd()))
    }

    fn next_left(&mut self) -> Option<Next> {
        loop {
            let slot = Slot(self.left.next()?);
            let head = Request::decode(
                self.slots.mapping(),
                self.slots.header(slot),
                self.slots.capacity(),
            );
            if matches!(head, Err(blktide_sys::fuse::DecodeError::Empty)) {
                self.slots.clear(slot);
                continue;
            }
            self.free.retain(|s| *s != slot);
            let done = self.slots.result(slot);
            match (self.look(slot), done) {
                // It was performed: only the answer may be missing.
                (Ok(Next::Request(..)), Some(result)) => {
                    if self.complete(slot, result).is_ok() {
                        return Some(Next::Handled);
                    }
                }
                (Ok(next), _) => return Some(next),
                (Err(_), _) => {}
            }
        }
    }

    fn next(&mut self) -> io::Result<Next> {
        let Some(slot) = self.free.pop() else {
            return Ok(Next::NoSlot);
        };
        // The slot was cleared when it was given back.
        let received = self.device.receive(
            self.slots.mapping(),
            self.slots.header(slot),
            self.slots.capacity(),
        );
        match received {
            Ok(Received::Request(bytes)) => {
                self.slots.set_length(slot, bytes);
                self.look(slot)
            }
            Ok(Received::Nothing) => {
                self.free.push(slot);
                Ok(Next::Nothing)
            }
            Ok(Received::Gone) => {
                self.free.push(slot);
                Ok(Next::Gone)
            }
            Err(e) => {
                self.free.push(slot);
                Err(e)
            }
        }
    }

    fn complete(&mut self, slot: Slot, result: Result<u64, Errno>) -> io::Result<()> {
        let Some(taken) = self.taken.get(slot.0).copied().flatten() else {
            return Ok(());
        };
        if !matches!(taken.work, Work::Read { .. }) {
            self.slots.set_result(slot, result);
        }
        self.answer(slot, taken, result)?;
        self.give_back(slot);
        Ok(())
    }

    fn under_way(&self) -> usize {
        self.slots.count().saturating_sub(self.free.len())
    }

    fn stop(&mut self) {
        self.free.clear();
    }
}

#[cfg(test)]
mod tests;
