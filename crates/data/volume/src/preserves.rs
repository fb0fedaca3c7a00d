//! Preserves under way: each reads an original into a buffer of this thread and writes it to the save area.
//!
//! ```text
//! start ─▶ [waits for a buffer] ─▶ read device ─▶ write save area ─▶ Copied
//! ```
//! **Invariant**: a buffer, and the snapshot it belongs to, stay until its operations are over, whatever became of the
//! request; so what lands late lands in a place that is still this snapshot's. Each copy is told of once, also one that
//! cannot be started: a request waits for it.

use crate::memory::SharedMemory;
use crate::save_area::SaveFile;
use blktide_device::DeviceError;
use blktide_device::{Target, Transfer, Transfers};
use blktide_engine::state::SaveSlot;
use blktide_engine::{Outcome, Snapshot, Ticket};
use blktide_frontend::Slot;
use blktide_sys::Errno;
use blktide_sys::ring::{FileId, MemoryId, MemoryRange};
use blktide_types::unit::BlockSize;
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

/// Buffers of a queue: so many preserves move at once.
const BUFFERS: usize = 16;
/// Save areas that a ring knows at once: the living one, and dead ones whose last operations run.
const FILES: usize = 4;

/// An original that is to be copied.
#[derive(Debug)]
pub(crate) struct Copy {
    /// Whose request.
    pub(crate) slot: Slot,
    /// Of that request.
    pub(crate) ticket: Ticket,
    /// Where to.
    pub(crate) save: SaveSlot,
    /// First byte on the device.
    pub(crate) offset: u64,
    /// Bytes.
    pub(crate) len: u64,
    /// For which snapshot.
    pub(crate) snapshot: Arc<Snapshot>,
}

/// What became of it.
#[derive(Debug)]
pub(crate) struct Copied {
    pub(crate) slot: Slot,
    pub(crate) ticket: Ticket,
    pub(crate) outcome: Outcome,
}

struct Moving {
    copy: Copy,
    file: FileId,
    writing: bool,
}

/// The preserves of one queue.
pub(crate) struct Preserves {
    memory: MemoryId,
    block: BlockSize,
    kind: u64,
    moving: Vec<Option<Moving>>,
    queued: VecDeque<Copy>,
    /// Queued ones that could not be started.
    failed: VecDeque<Copied>,
    files: Vec<(u64, FileId)>,
    count: u64,
}

impl Preserves {
    /// Those of a queue with `slots` requests; `kind` marks their tokens.
    pub(crate) fn new(
        transfers: &mut Transfers,
        block: BlockSize,
        kind: u64,
        slots: usize,
    ) -> io::Result<Self> {
        let words = (BUFFERS * block.bytes_usize()) / 8;
        let buffers = SharedMemory::create("blktide-originals", words)?;
        buffers.touch_and_lock()?;
        Ok(Self {
            memory: transfers
                .register_memory(Arc::clone(buffers.mapping()))
                .map_err(io::Error::other)?,
            block,
            kind,
            moving: (0..BUFFERS).map(|_| None).collect(),
            queued: VecDeque::with_capacity(slots * blktide_engine::LANES),
            failed: VecDeque::with_capacity(slots * blktide_engine::LANES),
            files: Vec::with_capacity(FILES),
            count: 0,
        })
    }

    /// How many are under way or queued.
    pub(crate) const fn under_way(&self) -> u64 {
        self.count
    }

    /// Starts one; says at once if that is not possible.
    pub(crate) fn start(&mut self, transfers: &mut Transfers, copy: Copy) -> Option<Copied> {
        self.count = self.count.saturating_add(1);
        if let Some(buffer) = self.moving.iter().position(Option::is_none) {
            self.read(transfers, buffer, copy)
        } else {
            self.queued.push_back(copy);
            None
        }
    }

    /// Goes on with the one of this number. `Some`: it is over; [`Self::next_failed`] may have more that are.
    pub(crate) fn advance(
        &mut self,
        transfers: &mut Transfers,
        number: u64,
        result: Result<(), DeviceError>,
    ) -> Option<Copied> {
        let buffer = usize::try_from(number).ok()?;
        let moving = self.moving.get_mut(buffer)?.take()?;
        let copied = match (result, moving.writing) {
            (Ok(()), false) => self.write(transfers, buffer, moving)?,
            (Ok(()), true) => self.over(&moving.copy, Outcome::Safe),
            (Err(_), false) => self.over(&moving.copy, Outcome::Unreadable),
            (Err(e), true) => self.over(&moving.copy, save_outcome(&e)),
        };
        while let Some(copy) = self.queued.pop_front() {
            match self.read(transfers, buffer, copy) {
                None => break,
                Some(failed) => self.failed.push_back(failed),
            }
        }
        Some(copied)
    }

    /// One that was queued and could not be started.
    pub(crate) fn next_failed(&mut self) -> Option<Copied> {
        self.failed.pop_front()
    }

    /// Forgets the save areas of ended snapshots.
    pub(crate) fn forget_old(&mut self, transfers: &mut Transfers, living: Option<&Arc<Snapshot>>) {
        let living = living.map(|s| s.sequence());
        let busy = |sequence: u64| {
            let moving = self.moving.iter().flatten().map(|m| &m.copy);
            let mut all = moving.chain(&self.queued);
            all.any(|c| c.snapshot.sequence() == sequence)
        };
        self.files.retain(|(sequence, file)| {
            let keep = living == Some(*sequence) || busy(*sequence);
            keep || transfers.forget_file(*file).is_err()
        });
    }

    fn read(&mut self, transfers: &mut Transfers, buffer: usize, copy: Copy) -> Option<Copied> {
        let Some(file) = self.file(transfers, &copy.snapshot) else {
            return Some(self.over(&copy, Outcome::SaveAreaFailed));
        };
        let range = self.range(buffer, copy.len);
        let transfer = range.map(|to| Transfer::Read {
            offset: copy.offset,
            to,
        });
        let token = self.token(buffer);
        let started = transfer.map(|t| transfers.start(token, Target::Backing, t));
        if !matches!(started, Some(Ok(()))) {
            return Some(self.over(&copy, Outcome::Unreadable));
        }
        if let Some(place) = self.moving.get_mut(buffer) {
            *place = Some(Moving {
                copy,
                file,
                writing: false,
            });
        }
        None
    }

    fn write(
        &mut self,
        transfers: &mut Transfers,
        buffer: usize,
        moving: Moving,
    ) -> Option<Copied> {
        let size = self.block.bytes_u64();
        // A whole block, also for the volume's short last one: the save area's sectors may be larger.
        let transfer = self.range(buffer, size).map(|from| Transfer::Write {
            offset: blktide_engine::state::slot_offset(moving.copy.save, size),
            from,
        });
        let token = self.token(buffer);
        let started = transfer.map(|t| transfers.start(token, Target::File(moving.file), t));
        if !matches!(started, Some(Ok(()))) {
            return Some(self.over(&moving.copy, Outcome::SaveAreaFailed));
        }
        if let Some(place) = self.moving.get_mut(buffer) {
            *place = Some(Moving {
                writing: true,
                ..moving
            });
        }
        None
    }

    fn over(&mut self, copy: &Copy, outcome: Outcome) -> Copied {
        self.count = self.count.saturating_sub(1);
        Copied {
            slot: copy.slot,
            ticket: copy.ticket,
            outcome,
        }
    }

    fn token(&self, buffer: usize) -> u64 {
        self.kind | u64::try_from(buffer).unwrap_or(0)
    }

    fn range(&self, buffer: usize, len: u64) -> Option<MemoryRange> {
        Some(MemoryRange {
            memory: self.memory,
            offset: buffer.checked_mul(self.block.bytes_usize())?,
            len: u32::try_from(len).ok()?,
        })
    }

    /// The snapshot's save area, as the ring knows it.
    fn file(&mut self, transfers: &mut Transfers, snapshot: &Arc<Snapshot>) -> Option<FileId> {
        let sequence = snapshot.sequence();
        if let Some((_, file)) = self.files.iter().find(|(s, _)| *s == sequence) {
            return Some(*file);
        }
        self.forget_old(transfers, Some(snapshot));
        if self.files.len() >= FILES {
            return None;
        }
        let save = SaveFile::of(snapshot)?;
        let file = transfers.register_file(Arc::clone(&save.file)).ok()?;
        self.files.push((sequence, file));
        Some(file)
    }
}

fn save_outcome(error: &DeviceError) -> Outcome {
    if let DeviceError::Transfer { errno, .. } = error
        && (*errno == Errno::NOSPC || *errno == Errno::DQUOT)
    {
        Outcome::SaveAreaFull
    } else {
        Outcome::SaveAreaFailed
    }
}

#[cfg(test)]
mod tests;
