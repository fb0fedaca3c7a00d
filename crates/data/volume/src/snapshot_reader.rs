//! The reader's side of a snapshot (P1): device, fence, look, compare-and-swap; originals from the save area.
//!
//! **Invariant**: what `read_blocks` returns was the block's content at the instant, proven by a won compare-and-swap and a
//! look at 'revoked' after it. Once revoked, always revoked: nothing more is given out.

use crate::client::VolumeClient;
use crate::error::VolumeError;
use crate::memory::{ForeignMemory, SharedMemory};
use crate::message::{Reply, Request, SnapshotBegun, SnapshotFigures};
use crate::server::engine_error;
use blktide_engine::atomic::Memory;
use blktide_engine::state::{Found, SaveSlot, slot_offset};
use blktide_engine::{Begun, Engine, EngineError, ReaderMemories, SnapshotView};
use blktide_sys::fs;
use blktide_types::geometry::Geometry;
use blktide_types::io::{BlockOutcome, BlockRead, RevokeCause, SnapshotRead, SourceError};
use blktide_types::range::BlockRange;
use blktide_types::set::BlockSet;
use blktide_types::unit::{BlockCount, BlockIndex};
use core::time::Duration;
use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// A snapshot, read by several threads at once. Dropping it ends the snapshot.
#[derive(Debug)]
pub struct SnapshotReader {
    begun: SnapshotBegun,
    geometry: Geometry,
    view: SnapshotView,
    device: OwnedFd,
    save: OwnedFd,
    /// Where originals were found; each entry is checked before it is used.
    places: Mutex<HashMap<u64, u32>>,
    /// Number of the cause for which this reader has given up; 0: it has not.
    given_up: AtomicU8,
    client: Mutex<VolumeClient>,
}

impl SnapshotReader {
    pub(crate) fn new(
        client: VolumeClient,
        begun: SnapshotBegun,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Self, VolumeError> {
        let all: Result<[OwnedFd; 7], _> = descriptors.try_into();
        let Ok([control, banks, states, index, wanted, save, device]) = all else {
            return Err(client.protocol());
        };
        let open = |source| client.failed(source);
        let states: Arc<dyn Memory> = Arc::new(SharedMemory::from_fd(states).map_err(open)?);
        let memories = ReaderMemories {
            control: ForeignMemory::from_fd(control).map_err(open)?,
            banks: ForeignMemory::from_fd(banks).map_err(open)?,
            index: ForeignMemory::from_fd(index).map_err(open)?,
            wanted: ForeignMemory::from_fd(wanted).map_err(open)?,
            states,
        };
        let shape = Engine::shape_of(&memories.control).map_err(engine_error)?;
        let facts = Begun {
            id: begun.snapshot.0,
            sequence: begun.sequence,
            opened: begun.generation.0,
            counter: begun.counter,
            closed_bank: begun.closed_bank,
            base_resolved: begun.base_resolved,
            held: Duration::from_nanos(begun.held_ns),
        };
        let view = match SnapshotView::open(&shape, &memories, &facts, begun.slots) {
            Ok(view) => view,
            Err(EngineError::Revoked { cause }) => return Err(VolumeError::Revoked(cause)),
            Err(e) => return Err(engine_error(e)),
        };
        Ok(Self {
            geometry: shape.geometry,
            begun,
            view,
            device,
            save,
            places: Mutex::default(),
            given_up: AtomicU8::new(0),
            client: Mutex::new(client),
        })
    }

    /// Facts of the snapshot: generation opened, whether the base was resolved, why nothing is believed, the instant.
    pub const fn begun(&self) -> &SnapshotBegun {
        &self.begun
    }

    /// Drops all that is not in `keep` (P10). There is no way to add.
    pub fn shrink(&mut self, keep: &BlockSet) {
        let mut dropped = self.view.wanted().clone();
        dropped.subtract(keep);
        self.view.shrink(&dropped);
    }

    /// Revokes it: readers get `Revoked(Cancelled)` from here on, writers no longer preserve.
    pub fn cancel(&self) {
        self.give_up(RevokeCause::Cancelled);
        // If the server cannot be asked it is dead, and the snapshot with it.
        let _asked: Result<(), VolumeError> = self.client().done(&Request::Cancel);
    }

    /// Ends it and says what it has cost. After `finish` of a complete backup, or to give up.
    pub fn end(self) -> Result<SnapshotFigures, VolumeError> {
        let mut client = self.client();
        let request = Request::SnapshotEnd {
            snapshot: self.begun.snapshot,
        };
        let reply = client.call(&request, &[])?.0;
        if let Reply::SnapshotEnded(figures) = reply {
            Ok(figures)
        } else {
            Err(client.unexpected(reply))
        }
    }

    fn client(&self) -> std::sync::MutexGuard<'_, VolumeClient> {
        self.client.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn give_up(&self, cause: RevokeCause) -> SourceError {
        self.given_up.store(cause.number(), Ordering::SeqCst);
        SourceError::Revoked(cause)
    }

    fn still_reading(&self) -> Result<(), SourceError> {
        match RevokeCause::from_number(self.given_up.load(Ordering::SeqCst)) {
            None => Ok(()),
            Some(cause) => Err(SourceError::Revoked(cause)),
        }
    }

    /// Reads from the device; says for each block whether it could be read.
    fn read_device(&self, range: BlockRange, buf: &mut [u8]) -> Vec<bool> {
        let count = usize::try_from(range.count().0).unwrap_or(0);
        let (offset, bytes) = self.geometry.bytes_of(range);
        let len = usize::try_from(bytes).unwrap_or(0);
        let all = buf.get_mut(..len);
        if all.is_some_and(
            |all| matches!(fs::read_full(&self.device, offset, all), Ok(n) if n == len),
        ) {
            return vec![true; count];
        }
        let size = self.geometry.block_size().bytes_usize();
        let one = |(block, part): (BlockIndex, &mut [u8])| {
            let bytes = usize::try_from(self.geometry.block_bytes(block)).unwrap_or(0);
            let offset = self.geometry.block_start(block);
            part.get_mut(..bytes).is_some_and(
                |p| matches!(fs::read_full(&self.device, offset, p), Ok(n) if n == bytes),
            )
        };
        range.blocks().zip(buf.chunks_mut(size)).map(one).collect()
    }

    /// Takes one block whose bytes were just read (or could not be).
    fn take(
        &self,
        block: BlockIndex,
        readable: bool,
        part: &mut [u8],
    ) -> Result<BlockOutcome, SourceError> {
        loop {
            match self.view.take(block) {
                Found::Taken if readable => return Ok(BlockOutcome::Data),
                Found::Taken => {
                    self.mark_unreadable(block);
                    return Ok(BlockOutcome::Unreadable);
                }
                Found::Revoked(cause) => return Err(self.give_up(cause)),
                Found::Gone => return Err(asked_twice(block)),
                Found::Preserved => {
                    let Some(slot) = self.place_of(block) else {
                        continue;
                    };
                    self.copy(slot, part)?;
                    match self.view.readers().take_copy(block) {
                        Found::Taken => return Ok(BlockOutcome::Data),
                        Found::Revoked(cause) => return Err(self.give_up(cause)),
                        Found::Gone | Found::Preserved => return Err(asked_twice(block)),
                    }
                }
            }
        }
    }

    fn copy(&self, slot: SaveSlot, part: &mut [u8]) -> Result<(), SourceError> {
        let offset = slot_offset(slot, self.geometry.block_size().bytes_u64());
        match fs::read_full(&self.save, offset, part) {
            Ok(n) if n == part.len() => Ok(()),
            Ok(_) => Err(SourceError::Io(io::ErrorKind::UnexpectedEof.into())),
            Err(e) => Err(SourceError::Io(e)),
        }
    }

    /// The save slot of a block that was found preserved. Waits: in proportion to the slots, now and then.
    fn place_of(&self, block: BlockIndex) -> Option<SaveSlot> {
        let slots = &self.view.readers().slots;
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = places.get(&block.0).copied().map(SaveSlot)
            && slots.block_of(found) == Some(block)
        {
            return Some(found);
        }
        places.clear();
        for slot in (0..slots.peak()).map(SaveSlot) {
            if let Some(named) = slots.block_of(slot) {
                places.insert(named.0, slot.0);
            }
        }
        places.get(&block.0).copied().map(SaveSlot)
    }

    /// The next incremental reads it again.
    fn mark_unreadable(&self, block: BlockIndex) {
        let request = Request::Unreadable {
            first: block.0,
            count: 1,
        };
        if self.client().done(&request).is_err() {
            // Not marked: then this image may not be leant on.
            self.give_up(RevokeCause::ServerDied);
        }
    }
}

impl BlockRead for SnapshotReader {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read_blocks(
        &self,
        range: BlockRange,
        buf: &mut [u8],
    ) -> Result<Vec<BlockOutcome>, SourceError> {
        self.still_reading()?;
        let size = self.geometry.block_size().bytes_usize();
        let fits = BlockCount(u64::try_from(buf.len() / size).unwrap_or(0)) == range.count()
            && buf.len().is_multiple_of(size)
            && range.end().0 <= self.geometry.block_count().0;
        if !fits {
            return Err(invalid("the buffer is not that of the range"));
        }
        if let Some(block) = range.blocks().find(|b| !self.view.wanted().contains(*b)) {
            return Err(invalid(&format!("{block} is not wanted")));
        }
        let readable = self.read_device(range, buf);
        let mut outcomes = Vec::with_capacity(readable.len());
        for ((block, part), readable) in range.blocks().zip(buf.chunks_mut(size)).zip(readable) {
            let outcome = self.take(block, readable, part)?;
            let bytes = usize::try_from(self.geometry.block_bytes(block)).unwrap_or(0);
            if let Some(past_the_end) = part.get_mut(bytes..) {
                past_the_end.fill(0);
            }
            outcomes.push(outcome);
        }
        self.still_reading()?;
        Ok(outcomes)
    }
}

impl SnapshotRead for SnapshotReader {
    fn wanted(&self) -> &BlockSet {
        self.view.wanted()
    }

    fn changed(&self) -> Option<&BlockSet> {
        self.view.changed()
    }

    fn finish(&self) -> Result<(), SourceError> {
        self.still_reading()?;
        match self.view.complete() {
            Ok(true) => Ok(()),
            Ok(false) => Err(invalid("not every wanted block was taken")),
            Err(cause) => Err(self.give_up(cause)),
        }
    }
}

fn asked_twice(block: BlockIndex) -> SourceError {
    invalid(&format!("{block} was taken before"))
}

fn invalid(why: &str) -> SourceError {
    SourceError::Io(io::Error::new(io::ErrorKind::InvalidInput, why))
}
