//! A small, safe `io_uring`: operations on files it knows, with memory that cannot go away under them.
//!
//! ```text
//! push (queued here) ──submit──▶ kernel ──completion──▶ drain: token, result, the buffer back
//! ```
//! Invariant: memory of an operation in flight is either owned by the ring (an [`AlignedBuffer`], given back by its
//! completion) or part of a [`Mapping`] that the ring holds. A ring dropped with operations in flight leaks
//! both: the kernel may still write there. Nothing is allocated per operation.
//!
//! A process that dies leaves its operations to the kernel; they may land later (see `fence`). Files are not *registered*
//! with the kernel: it lets a dead ring's registered files go after a grace period of its own only, 50 ms on 6.18, and
//! the successor would wait for its fence that long. An operation in flight holds its file all the same.

use crate::Result;
use crate::buffer::AlignedBuffer;
use crate::error::{Errno, SysError};
use crate::mapping::Mapping;
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

/// Files and mappings that one ring can know.
pub const REGISTERED_MAX: usize = 16;

/// A file that a ring knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileId(u32);

/// A mapping that a ring knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryId(usize);

/// Bytes of a known mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRange {
    /// Which mapping.
    pub memory: MemoryId,
    /// First byte in it.
    pub offset: usize,
    /// Number of bytes.
    pub len: u32,
}

/// What is over.
#[derive(Debug)]
pub struct Completion {
    /// The token that was given with the operation.
    pub token: u64,
    /// Bytes moved (or the events of a poll), or the kernel's error.
    pub result: core::result::Result<u32, Errno>,
    /// The buffer, of operations that had one of their own.
    pub buffer: Option<AlignedBuffer>,
    /// A poll that stays armed: more completions with this token follow.
    pub more: bool,
}

/// Why an operation was not taken. The buffer of an owned one comes back.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PushError {
    /// As many operations are in flight as the ring was made for. Drain first.
    #[error("the ring is full")]
    Full,
    /// The ring does not know that file (any more).
    #[error("the ring does not know that file")]
    UnknownFile,
    /// The range does not lie inside that mapping, or the length is zero or too long.
    #[error("the range is not inside the memory")]
    BadRange,
}

struct Operation {
    token: u64,
    buffer: Option<AlignedBuffer>,
    timeout: types::Timespec,
}

/// Modes of [`Ring::fallocate`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeroing {
    /// `FALLOC_FL_PUNCH_HOLE | KEEP_SIZE`: reads as zero; the space may be given back.
    Punch,
    /// `FALLOC_FL_ZERO_RANGE | KEEP_SIZE`: reads as zero; the space stays.
    Zero,
}

impl Zeroing {
    /// The flags of fallocate(2).
    pub const fn flags(self) -> i32 {
        libc::FALLOC_FL_KEEP_SIZE
            | match self {
                Self::Punch => libc::FALLOC_FL_PUNCH_HOLE,
                Self::Zero => libc::FALLOC_FL_ZERO_RANGE,
            }
    }
}

/// A ring. Belongs to one thread at a time.
pub struct Ring {
    queues: ManuallyDrop<IoUring>,
    slab: ManuallyDrop<Vec<Option<Operation>>>,
    free: Vec<usize>,
    mappings: ManuallyDrop<Vec<Arc<Mapping>>>,
    files: ManuallyDrop<Vec<Option<Arc<OwnedFd>>>>,
    in_flight: usize,
    ready: Vec<Completion>,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Ring({} in flight)", self.in_flight)
    }
}

impl Ring {
    /// A ring for at most `operations` in flight (polls and timeouts count, too).
    ///
    /// Errors: `ENOSYS`/`EPERM` where the kernel has no `io_uring`, or forbids it.
    pub fn new(operations: u32) -> Result<Self> {
        let fail = |call: &'static str| move |e| SysError::call(call, "", e);
        let ring = IoUring::builder()
            .setup_coop_taskrun()
            .dontfork()
            .build(operations)
            .or_else(|_| IoUring::builder().dontfork().build(operations))
            .map_err(fail("io_uring_setup"))?;
        let count = usize::try_from(operations).unwrap_or(0).max(1);
        let mut slab = Vec::with_capacity(count);
        slab.resize_with(count, || None);
        Ok(Self {
            queues: ManuallyDrop::new(ring),
            slab: ManuallyDrop::new(slab),
            free: (0..count).rev().collect(),
            mappings: ManuallyDrop::new(Vec::with_capacity(REGISTERED_MAX)),
            files: ManuallyDrop::new(Vec::with_capacity(REGISTERED_MAX)),
            in_flight: 0,
            ready: Vec::with_capacity(count),
        })
    }

    /// Makes a file known to the ring; it stays open until it is forgotten, or the ring ends.
    pub fn register_file(&mut self, file: Arc<OwnedFd>) -> Result<FileId> {
        let vacant = self.files.iter().position(Option::is_none);
        let index = vacant.unwrap_or(self.files.len());
        if index >= REGISTERED_MAX {
            return Err(SysError::unfit("ring", "it knows as many files as it can"));
        }
        let id = FileId(u32::try_from(index).unwrap_or(u32::MAX));
        match self.files.get_mut(index) {
            Some(place) => *place = Some(file),
            None => self.files.push(Some(file)),
        }
        Ok(id)
    }

    /// Forgets a file; its id may be given to another one. Operations on it that were pushed go on, and keep it open till then.
    pub fn forget_file(&mut self, id: FileId) -> Result<()> {
        self.submit()
            .map_err(|e| SysError::call("io_uring_enter", "", e))?;
        let index = usize::try_from(id.0).unwrap_or(usize::MAX);
        match self.files.get_mut(index).and_then(Option::take) {
            Some(_) => Ok(()),
            None => Err(SysError::unfit("ring", "it does not know that file")),
        }
    }

    fn file(&self, id: FileId) -> core::result::Result<types::Fd, PushError> {
        let index = usize::try_from(id.0).unwrap_or(usize::MAX);
        let known = self.files.get(index).and_then(Option::as_ref);
        known
            .map(|file| types::Fd(file.as_raw_fd()))
            .ok_or(PushError::UnknownFile)
    }

    /// Makes a mapping known to the ring; it stays mapped as long as the ring lives.
    pub fn register_memory(&mut self, mapping: Arc<Mapping>) -> Result<MemoryId> {
        if self.mappings.len() >= REGISTERED_MAX {
            return Err(SysError::unfit(
                "ring",
                "it knows as many mappings as it can",
            ));
        }
        self.mappings.push(mapping);
        Ok(MemoryId(self.mappings.len() - 1))
    }

    /// Operations that have been pushed and are not drained yet.
    pub const fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Reads from `file` at `offset` into `to`.
    pub fn read(
        &mut self,
        token: u64,
        file: FileId,
        offset: u64,
        to: MemoryRange,
    ) -> core::result::Result<(), PushError> {
        let address = self.address(to)?;
        let entry = opcode::Read::new(self.file(file)?, address, to.len)
            .offset(offset)
            .build();
        self.push(token, None, entry)
    }

    /// Writes `from` to `file` at `offset`.
    pub fn write(
        &mut self,
        token: u64,
        file: FileId,
        offset: u64,
        from: MemoryRange,
    ) -> core::result::Result<(), PushError> {
        let address = self.address(from)?;
        let entry = opcode::Write::new(self.file(file)?, address, from.len)
            .offset(offset)
            .build();
        self.push(token, None, entry)
    }

    /// Reads from `file` at `offset` into the first `len` bytes of a buffer of its own; it comes back with the completion.
    pub fn read_owned(
        &mut self,
        token: u64,
        at: (FileId, u64),
        mut buffer: AlignedBuffer,
        len: u32,
    ) -> core::result::Result<(), (PushError, AlignedBuffer)> {
        if !fits(len, buffer.len()) {
            return Err((PushError::BadRange, buffer));
        }
        let file = match self.file(at.0) {
            Ok(file) => file,
            Err(e) => return Err((e, buffer)),
        };
        let address = buffer.as_raw();
        let entry = opcode::Read::new(file, address, len).offset(at.1).build();
        self.push_owned(token, buffer, entry)
    }

    /// Writes the first `len` bytes of a buffer of its own to `file` at `offset`; it comes back with the completion.
    pub fn write_owned(
        &mut self,
        token: u64,
        at: (FileId, u64),
        mut buffer: AlignedBuffer,
        len: u32,
    ) -> core::result::Result<(), (PushError, AlignedBuffer)> {
        if !fits(len, buffer.len()) {
            return Err((PushError::BadRange, buffer));
        }
        let file = match self.file(at.0) {
            Ok(file) => file,
            Err(e) => return Err((e, buffer)),
        };
        let address = buffer.as_raw();
        let entry = opcode::Write::new(file, address, len).offset(at.1).build();
        self.push_owned(token, buffer, entry)
    }

    /// fdatasync(2) of `file`: what is complete now, not what is in flight.
    pub fn sync_data(&mut self, token: u64, file: FileId) -> core::result::Result<(), PushError> {
        let entry = opcode::Fsync::new(self.file(file)?)
            .flags(types::FsyncFlags::DATASYNC)
            .build();
        self.push(token, None, entry)
    }

    /// Makes `len` bytes from `offset` read as zero; never changes the file's size.
    pub fn fallocate(
        &mut self,
        token: u64,
        file: FileId,
        mode: Zeroing,
        range: (u64, u64),
    ) -> core::result::Result<(), PushError> {
        let entry = opcode::Fallocate::new(self.file(file)?, range.1)
            .offset(range.0)
            .mode(mode.flags())
            .build();
        self.push(token, None, entry)
    }

    /// Completes whenever `file` becomes readable, until the ring ends or a completion says that no more follow.
    ///
    /// Edge-triggered: read the file until it would block before waiting again.
    pub fn poll_readable(
        &mut self,
        token: u64,
        file: FileId,
    ) -> core::result::Result<(), PushError> {
        let events = u32::try_from(libc::POLLIN | libc::POLLERR | libc::POLLHUP).unwrap_or(1);
        let entry = opcode::PollAdd::new(self.file(file)?, events)
            .multi(true)
            .build();
        self.push(token, None, entry)
    }

    /// Completes once when `file` is readable.
    pub fn poll_once(&mut self, token: u64, file: FileId) -> core::result::Result<(), PushError> {
        let events = u32::try_from(libc::POLLIN | libc::POLLERR | libc::POLLHUP).unwrap_or(1);
        let entry = opcode::PollAdd::new(self.file(file)?, events).build();
        self.push(token, None, entry)
    }

    /// Completes with `ETIME` after `after`.
    pub fn timeout(&mut self, token: u64, after: Duration) -> core::result::Result<(), PushError> {
        let index = self.free.last().copied().ok_or(PushError::Full)?;
        let operation = Operation {
            token,
            buffer: None,
            timeout: types::Timespec::from(after),
        };
        let place = self.slab.get_mut(index).ok_or(PushError::Full)?;
        // The address stays: the slab never grows.
        let timespec: *const types::Timespec = &raw const place.insert(operation).timeout;
        let entry = opcode::Timeout::new(timespec).build();
        self.queue(index, entry)
    }

    /// Hands all that was pushed to the kernel. Waits for nothing.
    pub fn submit(&mut self) -> io::Result<()> {
        self.enter(0, None)
    }

    /// Hands all over and waits until at least one operation is complete, or `limit` is over (`None`: for ever).
    ///
    /// A signal ends the wait early. Then [`Self::drain`].
    pub fn submit_and_wait(&mut self, limit: Option<Duration>) -> io::Result<()> {
        if !self.ready.is_empty() {
            return self.enter(0, None);
        }
        self.enter(1, limit)
    }

    /// The next completion, if one is there. Makes no system call.
    pub fn next_completion(&mut self) -> Option<Completion> {
        if let Some(kept) = self.ready.pop() {
            return Some(kept);
        }
        let entry = self.queues.completion().next()?;
        self.finish(&entry)
    }

    /// Each completion that is there. Makes no system call.
    pub fn drain(&mut self) -> impl Iterator<Item = Completion> {
        std::iter::from_fn(|| self.next_completion())
    }

    fn enter(&mut self, want: usize, limit: Option<Duration>) -> io::Result<()> {
        loop {
            let timespec = limit.map(types::Timespec::from);
            let entered = match &timespec {
                Some(t) if want > 0 => {
                    let arguments = types::SubmitArgs::new().timespec(t);
                    self.queues.submitter().submit_with_args(want, &arguments)
                }
                _ => self.queues.submitter().submit_and_wait(want),
            };
            match entered {
                Ok(_) => {}
                // The completion queue has overflowed to the kernel's list: drain, then the rest goes in.
                Err(e) if Errno::of(&e) == Errno::BUSY => {}
                // The kernel is short of memory for the moment; what was pushed is still queued here.
                Err(e) if Errno::of(&e) == Errno::AGAIN => {
                    crate::event::pause(Duration::from_millis(1))?;
                }
                Err(e) if matches!(Errno::of(&e), Errno::TIME | Errno::INTR) => return Ok(()),
                Err(e) => return Err(e),
            }
            let rest = self.queues.submission();
            if rest.is_empty() {
                return Ok(());
            }
            drop(rest);
            self.keep_ready();
        }
    }

    /// Makes room in the completion queue.
    fn keep_ready(&mut self) {
        loop {
            let next = self.queues.completion().next();
            let Some(entry) = next else { return };
            if let Some(done) = self.finish(&entry) {
                self.ready.insert(0, done);
            }
        }
    }

    fn finish(&mut self, entry: &cqueue::Entry) -> Option<Completion> {
        let index = usize::try_from(entry.user_data()).ok()?;
        let more = cqueue::more(entry.flags());
        let place = self.slab.get_mut(index)?;
        let (token, buffer) = if more {
            (place.as_ref()?.token, None)
        } else {
            let over = place.take()?;
            self.free.push(index);
            self.in_flight -= 1;
            (over.token, over.buffer)
        };
        let result = u32::try_from(entry.result()).or(Err(Errno(entry.result().saturating_neg())));
        Some(Completion {
            token,
            result,
            buffer,
            more,
        })
    }

    fn address(&self, range: MemoryRange) -> core::result::Result<*mut u8, PushError> {
        let mapping = self
            .mappings
            .get(range.memory.0)
            .ok_or(PushError::BadRange)?;
        let len = usize::try_from(range.len).unwrap_or(usize::MAX);
        let address = mapping
            .raw(range.offset, len)
            .or(Err(PushError::BadRange))?;
        Ok(address.as_ptr())
    }

    fn push_owned(
        &mut self,
        token: u64,
        buffer: AlignedBuffer,
        entry: squeue::Entry,
    ) -> core::result::Result<(), (PushError, AlignedBuffer)> {
        if self.free.is_empty() {
            return Err((PushError::Full, buffer));
        }
        let index = self.free.last().copied().unwrap_or(0);
        match self.push(token, Some(buffer), entry) {
            Ok(()) => Ok(()),
            Err(e) => {
                let back = self
                    .slab
                    .get_mut(index)
                    .and_then(Option::take)
                    .and_then(|o| o.buffer);
                Err((e, back.unwrap_or_else(|| AlignedBuffer::new(1))))
            }
        }
    }

    fn push(
        &mut self,
        token: u64,
        buffer: Option<AlignedBuffer>,
        entry: squeue::Entry,
    ) -> core::result::Result<(), PushError> {
        let index = self.free.last().copied().ok_or(PushError::Full)?;
        let place = self.slab.get_mut(index).ok_or(PushError::Full)?;
        *place = Some(Operation {
            token,
            buffer,
            timeout: types::Timespec::new(),
        });
        self.queue(index, entry)
    }

    /// Queues `entry` for the operation that stands at `index`, the last of the free list.
    fn queue(&mut self, index: usize, entry: squeue::Entry) -> core::result::Result<(), PushError> {
        let entry = entry.user_data(u64::try_from(index).unwrap_or(u64::MAX));
        if self.queues.submission().is_full() && self.enter(0, None).is_err() {
            return Err(PushError::Full);
        }
        let mut queue = self.queues.submission();
        // SAFETY: the memory the entry names is owned by the slab or part of a mapping that the ring holds;
        // both stay until the completion (see the invariant), and the file is open until it has been submitted.
        let pushed = unsafe { queue.push(&entry) };
        drop(queue);
        if pushed.is_err() {
            return Err(PushError::Full);
        }
        self.free.pop();
        self.in_flight += 1;
        Ok(())
    }
}

fn fits(len: u32, buffer: usize) -> bool {
    len > 0 && usize::try_from(len).is_ok_and(|l| l <= buffer)
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: nobody uses the ring after this; dropped once, here.
        unsafe { ManuallyDrop::drop(&mut self.queues) };
        // SAFETY: as above; operations in flight hold their files themselves.
        unsafe { ManuallyDrop::drop(&mut self.files) };
        if self.in_flight == 0 {
            // SAFETY: no operation is in flight, so the kernel writes to none of this memory any more.
            unsafe { ManuallyDrop::drop(&mut self.slab) };
            // SAFETY: as above.
            unsafe { ManuallyDrop::drop(&mut self.mappings) };
        }
    }
}

#[cfg(test)]
mod tests;
