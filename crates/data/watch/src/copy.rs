//! Reading the device, and the last blocks of an image in memory.
//!
//! Always by a descriptor of its own, direct: what the page cache of the node has is not what the device has.

use blktide_sys::buffer::AlignedBuffer;
use blktide_sys::fs;
use blktide_types::geometry::Geometry;
use blktide_types::io::{BlockOutcome, SourceError};
use blktide_types::range::BlockRange;
use blktide_types::set::BlockSet;
use blktide_types::unit::BlockIndex;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Threads that read while the volume stands still: a disk with a queue is quicker with several.
const READERS: usize = 8;
/// Bytes of one such read at most.
const READ_BYTES: u64 = 1 << 20;

/// The device, for reading.
#[derive(Debug)]
pub(crate) struct Reader {
    pub(crate) device: OwnedFd,
    pub(crate) geometry: Geometry,
}

impl Reader {
    /// Reads the blocks of `range` as they are now. What cannot be read is told block by block.
    pub(crate) fn read(
        &self,
        range: BlockRange,
        buf: &mut [u8],
    ) -> Result<Vec<BlockOutcome>, SourceError> {
        let size = self.geometry.block_size().bytes_usize();
        let count = usize::try_from(range.count().0).unwrap_or(usize::MAX);
        if count.checked_mul(size) != Some(buf.len())
            || range.end().0 > self.geometry.block_count().0
        {
            let why = "the buffer is not that of the range";
            return Err(SourceError::Io(io::Error::new(
                io::ErrorKind::InvalidInput,
                why,
            )));
        }
        let (offset, bytes) = self.geometry.bytes_of(range);
        let len = usize::try_from(bytes).unwrap_or(0);
        let (all, rest) = buf.split_at_mut(len.min(buf.len()));
        rest.fill(0);
        if matches!(fs::read_full(&self.device, offset, all), Ok(n) if n == len) {
            return Ok(vec![BlockOutcome::Data; count]);
        }
        let blocks = range.blocks().zip(buf.chunks_mut(size));
        Ok(blocks
            .map(|(block, part)| self.read_one(block, part))
            .collect())
    }

    fn read_one(&self, block: BlockIndex, part: &mut [u8]) -> BlockOutcome {
        let bytes = usize::try_from(self.geometry.block_bytes(block)).unwrap_or(0);
        let offset = self.geometry.block_start(block);
        let read = part
            .get_mut(..bytes)
            .is_some_and(|p| matches!(fs::read_full(&self.device, offset, p), Ok(n) if n == bytes));
        if read {
            BlockOutcome::Data
        } else {
            part.fill(0);
            BlockOutcome::Unreadable
        }
    }
}

/// Blocks that were read while the volume stood still.
#[derive(Debug)]
pub(crate) struct Last {
    runs: Vec<(BlockRange, usize)>,
    memory: AlignedBuffer,
    outcomes: Vec<BlockOutcome>,
}

impl Last {
    /// Memory for `blocks` blocks, there and touched, so that nothing is waited for while the volume stands still.
    pub(crate) fn memory_for(geometry: &Geometry, blocks: u64) -> AlignedBuffer {
        let count = usize::try_from(blocks).unwrap_or(0);
        let size = geometry.block_size().bytes_usize();
        let mut memory = AlignedBuffer::new(count.saturating_mul(size));
        memory.fill(0xff);
        memory
    }

    /// Reads `set`, with several threads. `None`: the memory is too small for it.
    pub(crate) fn read(
        reader: &Reader,
        set: &BlockSet,
        mut memory: AlignedBuffer,
    ) -> Result<Option<Self>, SourceError> {
        let size = reader.geometry.block_size().bytes_usize();
        let runs = pieces(reader, set);
        let mut parts = Vec::with_capacity(runs.len());
        let mut rest: &mut [u8] = &mut memory;
        for (run, at) in &runs {
            let len = usize::try_from(run.count().0)
                .unwrap_or(usize::MAX)
                .saturating_mul(size);
            let Some((part, left)) = rest.split_at_mut_checked(len) else {
                return Ok(None);
            };
            rest = left;
            parts.push(std::sync::Mutex::new((*run, *at, part)));
        }
        let next = AtomicUsize::new(0);
        let work = || -> Result<Vec<(usize, Vec<BlockOutcome>)>, SourceError> {
            let mut done = Vec::new();
            while let Some(one) = parts.get(next.fetch_add(1, Ordering::Relaxed)) {
                let mut one = one
                    .lock()
                    .unwrap_or_else(std::sync::PoisonError::into_inner);
                let (run, at, part) = &mut *one;
                done.push((*at, reader.read(*run, part)?));
            }
            Ok(done)
        };
        let threads = READERS.min(parts.len());
        let results = std::thread::scope(|scope| {
            let all: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            let join = |thread: std::thread::ScopedJoinHandle<'_, _>| {
                let died = || Err(SourceError::Io(io::Error::other("a reading thread died")));
                thread.join().unwrap_or_else(|_| died())
            };
            all.into_iter().map(join).collect::<Result<Vec<_>, _>>()
        });
        let mut told: Vec<_> = results?.into_iter().flatten().collect();
        told.sort_by_key(|(at, _)| *at);
        drop(parts);
        Ok(Some(Self {
            outcomes: told
                .into_iter()
                .flat_map(|(_, outcomes)| outcomes)
                .collect(),
            runs,
            memory,
        }))
    }

    /// Copies blocks out, ascending runs; `None` if one of them is not here.
    pub(crate) fn copy(
        &self,
        range: BlockRange,
        size: usize,
        buf: &mut [u8],
    ) -> Option<Vec<BlockOutcome>> {
        let mut outcomes = Vec::new();
        for (block, to) in range.blocks().zip(buf.chunks_mut(size)) {
            let after = self.runs.partition_point(|(run, _)| run.start() <= block);
            let (run, at) = self.runs.get(after.checked_sub(1)?)?;
            let within = usize::try_from(block.0.checked_sub(run.start().0)?).ok()?;
            let place = at.checked_add(within).filter(|_| run.contains(block))?;
            let from = place.checked_mul(size)?;
            to.copy_from_slice(self.memory.get(from..from.checked_add(size)?)?);
            outcomes.push(*self.outcomes.get(place)?);
        }
        Some(outcomes)
    }
}

/// The runs of a set, none longer than a read, with the number of blocks before each.
fn pieces(reader: &Reader, set: &BlockSet) -> Vec<(BlockRange, usize)> {
    let most = (READ_BYTES / reader.geometry.block_size().bytes_u64()).max(1);
    let mut pieces = Vec::new();
    let mut before = 0_usize;
    for run in set.runs() {
        let mut start = run.start().0;
        while start < run.end().0 {
            let end = start.saturating_add(most).min(run.end().0);
            if let Some(piece) = BlockRange::new(BlockIndex(start), BlockIndex(end)) {
                pieces.push((piece, before));
                before = before.saturating_add(usize::try_from(piece.count().0).unwrap_or(0));
            }
            start = end;
        }
    }
    pieces
}
