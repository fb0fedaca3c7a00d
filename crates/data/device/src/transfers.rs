//! Transfers of one queue thread: started, continued when short, ended by one event each.
//!
//! ```text
//! start ─▶ [in the ring] ─▶ all bytes ──────────▶ Event { Done(Ok) }
//!              ▲  │ short: the rest again
//!              └──┘ EAGAIN, EINTR: again, at most RETRIES_MAX times
//!                 └ error, end of the device ──▶ Event { Done(Err) }
//! ```
//! Invariant: each token that was started gets exactly one `Done`, and its memory is the kernel's until then.
//! Nothing is allocated per transfer.

use crate::backing::Backing;
use crate::error::{DeviceError, TransferKind};
use blktide_sys::mapping::Mapping;
use blktide_sys::ring::{Completion, FileId, MemoryId, MemoryRange, PushError, Ring, Zeroing};
use blktide_sys::{Errno, SysError};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

/// How often one transfer is tried again without getting on.
const RETRIES_MAX: u8 = 16;

/// Where a transfer goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The backing device.
    Backing,
    /// Another file that was made known: a save area.
    File(FileId),
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transfer {
    /// Fills the memory from `offset` on.
    Read {
        /// First byte, a multiple of the sector.
        offset: u64,
        /// Where to; the length is a multiple of the sector.
        to: MemoryRange,
    },
    /// Writes the memory at `offset`.
    Write {
        /// First byte, a multiple of the sector.
        offset: u64,
        /// Where from; the length is a multiple of the sector.
        from: MemoryRange,
    },
    /// Makes a range read as zero. `EOPNOTSUPP` where the device cannot: nothing has changed then.
    Zero {
        /// How.
        mode: Zeroing,
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
    },
    /// Everything that has been answered so far to stable storage.
    Flush,
}

/// What came of it.
#[derive(Debug)]
pub enum Outcome {
    /// A transfer is over.
    Done(Result<(), DeviceError>),
    /// A watched file can be read. It stays watched.
    Readable,
    /// A timer has run out.
    TimedOut,
}

/// Something that has happened.
#[derive(Debug)]
pub struct Event {
    /// The token that was given with it.
    pub token: u64,
    /// What.
    pub outcome: Outcome,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Moving(FileId, Transfer),
    Watching(FileId),
    Timing,
}

#[derive(Clone, Copy, Debug)]
struct Progress {
    token: u64,
    kind: Kind,
    /// Bytes moved.
    done: u32,
    retries: u8,
}

/// The transfers of one queue thread, and what else it waits for.
#[derive(Debug)]
pub struct Transfers {
    ring: Ring,
    backing: FileId,
    sector_bytes: u32,
    slab: Vec<Option<Progress>>,
    free: Vec<usize>,
}

impl Transfers {
    /// Room for `operations` at once: transfers, watched files and timers.
    pub fn new(backing: &Backing, operations: u32) -> Result<Self, DeviceError> {
        Self::with(
            Arc::clone(backing.file()),
            backing.limits().logical_sector_bytes,
            operations,
        )
    }

    fn with(file: Arc<OwnedFd>, sector_bytes: u32, operations: u32) -> Result<Self, DeviceError> {
        let fail = |source| DeviceError::Ring { source };
        let mut ring = Ring::new(operations).map_err(fail)?;
        let backing = ring.register_file(file).map_err(fail)?;
        let count = usize::try_from(operations).unwrap_or(0).max(1);
        Ok(Self {
            ring,
            backing,
            sector_bytes: sector_bytes.max(1),
            slab: vec![None; count],
            free: (0..count).rev().collect(),
        })
    }

    /// Makes memory known that transfers go to and from.
    pub fn register_memory(&mut self, mapping: Arc<Mapping>) -> Result<MemoryId, DeviceError> {
        self.ring
            .register_memory(mapping)
            .map_err(|source| DeviceError::Ring { source })
    }

    /// Makes another file known: a save area, something to watch.
    pub fn register_file(&mut self, file: Arc<OwnedFd>) -> Result<FileId, DeviceError> {
        self.ring
            .register_file(file)
            .map_err(|source| DeviceError::Ring { source })
    }

    /// Forgets such a file. Call it when nothing of it is under way.
    pub fn forget_file(&mut self, file: FileId) -> Result<(), DeviceError> {
        self.ring
            .forget_file(file)
            .map_err(|source| DeviceError::Ring { source })
    }

    /// Transfers, watches and timers that are under way.
    pub const fn in_flight(&self) -> usize {
        self.ring.in_flight()
    }

    /// Starts a transfer; it gets one event. It reaches the kernel with the next [`Self::submit`] or [`Self::wait`].
    ///
    /// `Full`: as many are under way as there is room for. `BadRange`: the memory is not what was made known.
    pub fn start(
        &mut self,
        token: u64,
        target: Target,
        transfer: Transfer,
    ) -> Result<(), PushError> {
        let file = match target {
            Target::Backing => self.backing,
            Target::File(file) => file,
        };
        self.begin(token, Kind::Moving(file, transfer))
    }

    /// Watches a file for ever: an event whenever it becomes readable. Read it until it would block.
    pub fn watch(&mut self, token: u64, file: FileId) -> Result<(), PushError> {
        self.begin(token, Kind::Watching(file))
    }

    /// One event after `after`.
    pub fn timer(&mut self, token: u64, after: Duration) -> Result<(), PushError> {
        let index = self.place(token, Kind::Timing)?;
        let pushed = self.ring.timeout(u64_of(index), after);
        self.placed(index, pushed)
    }

    /// Hands all that was started to the kernel. Waits for nothing.
    pub fn submit(&mut self) -> Result<(), DeviceError> {
        self.ring.submit().map_err(ring_failed)
    }

    /// Hands all over and waits for an event, at most `limit` (`None`: for ever). A signal ends the wait early.
    pub fn wait(&mut self, limit: Option<Duration>) -> Result<(), DeviceError> {
        self.ring.submit_and_wait(limit).map_err(ring_failed)
    }

    /// The next event, if there is one. What continues a short transfer is started here: submit afterwards.
    pub fn next_event(&mut self) -> Option<Event> {
        while let Some(completion) = self.ring.next_completion() {
            if let Some(event) = self.advance(&completion) {
                return Some(event);
            }
        }
        None
    }

    fn begin(&mut self, token: u64, kind: Kind) -> Result<(), PushError> {
        let index = self.place(token, kind)?;
        let pushed = self.push(index);
        self.placed(index, pushed)
    }

    fn place(&mut self, token: u64, kind: Kind) -> Result<usize, PushError> {
        let index = self.free.pop().ok_or(PushError::Full)?;
        if let Some(place) = self.slab.get_mut(index) {
            *place = Some(Progress {
                token,
                kind,
                done: 0,
                retries: 0,
            });
        }
        Ok(index)
    }

    fn placed(&mut self, index: usize, pushed: Result<(), PushError>) -> Result<(), PushError> {
        if pushed.is_err() {
            self.vacate(index);
        }
        pushed
    }

    fn vacate(&mut self, index: usize) {
        if self.slab.get_mut(index).and_then(Option::take).is_some() {
            self.free.push(index);
        }
    }

    /// Pushes what is left to do of the transfer at `index`.
    fn push(&mut self, index: usize) -> Result<(), PushError> {
        let Some(Some(progress)) = self.slab.get(index).copied() else {
            return Err(PushError::BadRange);
        };
        let (token, done) = (u64_of(index), progress.done);
        match progress.kind {
            Kind::Moving(file, Transfer::Read { offset, to }) => self.ring.read(
                token,
                file,
                offset.saturating_add(u64::from(done)),
                rest(to, done),
            ),
            Kind::Moving(file, Transfer::Write { offset, from }) => self.ring.write(
                token,
                file,
                offset.saturating_add(u64::from(done)),
                rest(from, done),
            ),
            Kind::Moving(file, Transfer::Zero { mode, offset, len }) => {
                self.ring.fallocate(token, file, mode, (offset, len))
            }
            Kind::Moving(file, Transfer::Flush) => self.ring.sync_data(token, file),
            Kind::Watching(file) => self.ring.poll_readable(token, file),
            Kind::Timing => Err(PushError::BadRange),
        }
    }

    fn advance(&mut self, completion: &Completion) -> Option<Event> {
        let index = usize::try_from(completion.token).ok()?;
        let progress = (*self.slab.get(index)?)?;
        let token = progress.token;
        match progress.kind {
            Kind::Timing => {
                self.vacate(index);
                Some(Event {
                    token,
                    outcome: Outcome::TimedOut,
                })
            }
            Kind::Watching(_) => {
                if !completion.more && self.push(index).is_err() {
                    self.vacate(index);
                }
                Some(Event {
                    token,
                    outcome: Outcome::Readable,
                })
            }
            Kind::Moving(_, transfer) => {
                let over = self.moved(index, progress, completion.result)?;
                self.vacate(index);
                let result = over.map_err(|errno| failed(transfer, errno));
                Some(Event {
                    token,
                    outcome: Outcome::Done(result),
                })
            }
        }
    }

    /// What a completion means for a transfer; `None`: it goes on.
    fn moved(
        &mut self,
        index: usize,
        progress: Progress,
        result: Result<u32, Errno>,
    ) -> Option<Result<(), Errno>> {
        let Kind::Moving(_, transfer) = progress.kind else {
            return Some(Err(Errno::INVAL));
        };
        let wanted = match transfer {
            Transfer::Read { to: range, .. } | Transfer::Write { from: range, .. } => range.len,
            Transfer::Zero { .. } | Transfer::Flush => return self.whole(index, progress, result),
        };
        let moved = match result {
            Ok(n) => n,
            Err(errno) => return self.again(index, progress, errno),
        };
        let total = progress.done.saturating_add(moved);
        if total >= wanted {
            return Some(Ok(()));
        }
        // The rest begins at a sector. Nothing moved at all: the device ends here.
        let done = total - total % self.sector_bytes;
        if moved == 0 || done == progress.done {
            return Some(Err(Errno::IO));
        }
        self.go_on(
            index,
            Progress {
                done,
                retries: 0,
                ..progress
            },
        )
    }

    fn whole(
        &mut self,
        index: usize,
        progress: Progress,
        result: Result<u32, Errno>,
    ) -> Option<Result<(), Errno>> {
        match result {
            Ok(_) => Some(Ok(())),
            Err(errno) => self.again(index, progress, errno),
        }
    }

    fn again(
        &mut self,
        index: usize,
        progress: Progress,
        errno: Errno,
    ) -> Option<Result<(), Errno>> {
        let flush = matches!(progress.kind, Kind::Moving(_, Transfer::Flush));
        let transient = errno == Errno::AGAIN || errno == Errno::INTR;
        if flush || !transient || progress.retries >= RETRIES_MAX {
            return Some(Err(errno));
        }
        self.go_on(
            index,
            Progress {
                retries: progress.retries + 1,
                ..progress
            },
        )
    }

    fn go_on(&mut self, index: usize, progress: Progress) -> Option<Result<(), Errno>> {
        if let Some(place) = self.slab.get_mut(index) {
            *place = Some(progress);
        }
        match self.push(index) {
            Ok(()) => None,
            Err(_) => Some(Err(Errno::IO)),
        }
    }
}

fn rest(range: MemoryRange, done: u32) -> MemoryRange {
    MemoryRange {
        offset: range
            .offset
            .saturating_add(usize::try_from(done).unwrap_or(usize::MAX)),
        len: range.len.saturating_sub(done),
        ..range
    }
}

fn failed(transfer: Transfer, errno: Errno) -> DeviceError {
    let (kind, offset, len) = match transfer {
        Transfer::Read { offset, to } => (TransferKind::Read, offset, u64::from(to.len)),
        Transfer::Write { offset, from } => (TransferKind::Write, offset, u64::from(from.len)),
        Transfer::Zero { offset, len, .. } => (TransferKind::Zero, offset, len),
        Transfer::Flush => (TransferKind::Flush, 0, 0),
    };
    DeviceError::Transfer {
        kind,
        offset,
        len,
        errno,
    }
}

fn ring_failed(source: std::io::Error) -> DeviceError {
    let source = SysError::Call {
        call: "io_uring_enter",
        on: std::path::PathBuf::new(),
        source,
    };
    DeviceError::Ring { source }
}

fn u64_of(index: usize) -> u64 {
    u64::try_from(index).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
