//! Passes over sets of blocks: read, then stored, by several workers, each its own piece, ascending.
//!
//! ```text
//!   pieces ─▶ rate ─▶ read ─▶ put        a backup has one pass over what is wanted, or one a round (`ahead`)
//!                      └ bytes read, unreadable blocks: counted over all passes
//! ```
//! **Invariant**: a pass that ends well has read and put each block of its set once.

use crate::error::JobError;
use crate::pieces::{Failure, PIECE_BYTES, Pieces, in_parallel, runs_within};
use crate::rate::Rate;
use crate::running::Control;
use blktide_image::{Content, ImageError, Stored};
use blktide_sys::buffer::AlignedBuffer;
use blktide_types::geometry::Geometry;
use blktide_types::io::{BlockOutcome, SourceError};
use blktide_types::range::BlockRange;
use blktide_types::set::BlockSet;
use blktide_types::unit::{BlockCount, BlockIndex};
use core::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Reads blocks.
type Read<'a> =
    &'a (dyn Fn(BlockRange, &mut [u8]) -> Result<Vec<BlockOutcome>, SourceError> + Sync);
/// Stores blocks.
type Put<'a> = &'a (dyn Fn(&[(BlockIndex, Content<'_>)]) -> Result<Stored, ImageError> + Sync);

/// What is read, from where and to where.
#[derive(Clone, Copy)]
pub(crate) struct Pass<'a> {
    pub(crate) blocks: &'a BlockSet,
    pub(crate) read: Read<'a>,
    pub(crate) put: Put<'a>,
}

/// What all passes of a backup share.
pub(crate) struct Reading<'a> {
    pub(crate) control: &'a Control,
    pub(crate) geometry: Geometry,
    workers: usize,
    rate: Rate,
    read_bytes: AtomicU64,
    unreadable: Mutex<BlockSet>,
}

impl<'a> Reading<'a> {
    /// `workers`, `max_read_rate`: as a request has them.
    pub(crate) fn new(
        control: &'a Control,
        geometry: Geometry,
        workers: usize,
        max_read_rate: u64,
    ) -> Self {
        Self {
            control,
            geometry,
            workers,
            rate: Rate::new(max_read_rate),
            read_bytes: AtomicU64::new(0),
            unreadable: Mutex::new(BlockSet::new(geometry.block_count())),
        }
    }

    /// Blocks that are read in one go.
    pub(crate) fn piece_blocks(&self) -> BlockCount {
        let block_bytes = self.geometry.block_size().bytes_u64();
        BlockCount((self.rate.piece_bytes(PIECE_BYTES, block_bytes) / block_bytes).max(1))
    }

    /// Bytes that the blocks of `set` have.
    pub(crate) fn bytes_of(&self, set: &BlockSet) -> u64 {
        set.runs().fold(0, |sum, run| {
            self.geometry.bytes_of(run).1.saturating_add(sum)
        })
    }

    /// Bytes read so far.
    pub(crate) fn read_bytes(&self) -> u64 {
        self.read_bytes.load(Ordering::Relaxed)
    }

    /// Blocks of `wanted` that could not be read when they were read last.
    pub(crate) fn unreadable(&self, wanted: &BlockSet) -> BlockSet {
        let mut unreadable = self.lock().clone();
        let mut others = unreadable.clone();
        others.subtract(wanted);
        unreadable.subtract(&others);
        unreadable
    }

    /// Reads and puts all blocks of `pass`.
    pub(crate) fn all(&self, pass: Pass<'_>) -> Result<(), JobError> {
        let pieces = Pieces::new(self.geometry.block_count().0, self.piece_blocks().0);
        let count = AtomicU64::new(0);
        self.by_pieces(&pieces, pass.blocks, &|piece, buffer| {
            let taken = self.take(pass, piece, buffer)?;
            count.fetch_add(taken, Ordering::Relaxed);
            Ok(())
        })?;
        if count.into_inner() != pass.blocks.count().0 {
            return Err(JobError::Mismatch {
                what: "the wanted set changed while it was read",
            });
        }
        Ok(())
    }

    /// Hands the pieces that hold a block of `set` to workers, each with a buffer of its own.
    pub(crate) fn by_pieces(
        &self,
        pieces: &Pieces,
        set: &BlockSet,
        work: &(dyn Fn(BlockRange, &mut AlignedBuffer) -> Result<(), JobError> + Sync),
    ) -> Result<(), JobError> {
        in_parallel(self.workers, self.control, &|failure: &Failure| {
            let mut buffer = AlignedBuffer::new(0);
            while !failure.is_set() {
                let Some(piece) = pieces.next_in(set) else {
                    break;
                };
                self.control.check()?;
                work(piece, &mut buffer)?;
            }
            Ok(())
        })
    }

    /// Reads what `pass` wants of `piece` and puts it. Returns how many blocks. `buffer` grows as needed.
    pub(crate) fn take(
        &self,
        pass: Pass<'_>,
        piece: BlockRange,
        buffer: &mut AlignedBuffer,
    ) -> Result<u64, JobError> {
        let block_bytes = self.geometry.block_size().bytes_usize();
        let needed = usize::try_from(piece.count().0)
            .unwrap_or(usize::MAX)
            .saturating_mul(block_bytes);
        if buffer.len() < needed {
            *buffer = AlignedBuffer::new(needed);
        }
        let mut rest: &mut [u8] = buffer;
        let mut outcomes: Vec<(BlockIndex, BlockOutcome)> = Vec::new();
        let mut parts: Vec<&[u8]> = Vec::new();
        let mut bytes = 0;
        for run in runs_within(pass.blocks, piece) {
            let (_, run_bytes) = self.geometry.bytes_of(run);
            self.rate.wait(run_bytes, self.control)?;
            let length = usize::try_from(run.count().0)
                .unwrap_or(usize::MAX)
                .saturating_mul(block_bytes);
            let Some((part, left)) = rest.split_at_mut_checked(length) else {
                return Err(JobError::Died);
            };
            rest = left;
            let got = (pass.read)(run, part)?;
            if got.len() != part.len() / block_bytes {
                return Err(JobError::Mismatch {
                    what: "a read told of another number of blocks",
                });
            }
            outcomes.extend(run.blocks().zip(got));
            parts.extend(part.chunks_exact(block_bytes));
            bytes += run_bytes;
        }
        let blocks = self.contents(outcomes, parts);
        let stored = (pass.put)(&blocks)?;
        self.read_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.control.advance(bytes, stored.stored_bytes);
        Ok(u64::try_from(blocks.len()).unwrap_or(u64::MAX))
    }

    fn contents<'b>(
        &self,
        outcomes: Vec<(BlockIndex, BlockOutcome)>,
        parts: Vec<&'b [u8]>,
    ) -> Vec<(BlockIndex, Content<'b>)> {
        let mut unreadable = self.lock();
        let content = |((block, outcome), part): ((BlockIndex, BlockOutcome), &'b [u8])| {
            let true_bytes = usize::try_from(self.geometry.block_bytes(block)).unwrap_or(0);
            match (outcome, part.get(..true_bytes)) {
                (BlockOutcome::Data, Some(bytes)) => {
                    unreadable.remove(block);
                    (block, Content::Bytes(bytes))
                }
                (BlockOutcome::Data, None) | (BlockOutcome::Unreadable, _) => {
                    unreadable.insert(block);
                    (block, Content::Unreadable)
                }
            }
        };
        outcomes.into_iter().zip(parts).map(content).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BlockSet> {
        self.unreadable
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
