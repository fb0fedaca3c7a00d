//! Work cut into pieces that workers take in ascending order, an atomic position being all that they share.

use crate::error::JobError;
use crate::running::Control;
use blktide_types::range::BlockRange;
use blktide_types::set::BlockSet;
use blktide_types::unit::BlockIndex;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

/// Bytes that a worker reads, digests and stores in one go: larger gained nothing, smaller costs the disk.
pub(crate) const PIECE_BYTES: u64 = 1 << 20;

/// Workers if nothing else is asked for: two more than cores, so that reads are in flight while all cores compress.
pub fn default_workers() -> usize {
    thread::available_parallelism()
        .map_or(2, core::num::NonZero::get)
        .saturating_add(2)
        .max(4)
}

/// Hands out pieces: the blocks `n × piece .. (n + 1) × piece`, cut at the end, ascending.
#[derive(Debug)]
pub(crate) struct Pieces {
    next: AtomicU64,
    piece_blocks: u64,
    end: u64,
}

impl Pieces {
    pub(crate) fn new(blocks: u64, piece_blocks: u64) -> Self {
        Self {
            next: AtomicU64::new(0),
            piece_blocks: piece_blocks.max(1),
            end: blocks,
        }
    }

    /// The next piece, whatever is in it.
    pub(crate) fn next_any(&self) -> Option<BlockRange> {
        self.take(Some)
    }

    /// The next piece that holds a block of `set`.
    pub(crate) fn next_in(&self, set: &BlockSet) -> Option<BlockRange> {
        self.take(|from| set.next_from(BlockIndex(from)).map(|block| block.0))
    }

    fn take(&self, find: impl Fn(u64) -> Option<u64>) -> Option<BlockRange> {
        let mut next = self.next.load(Ordering::Relaxed);
        loop {
            let first = find(next).filter(|first| *first < self.end)?;
            let start = first - first % self.piece_blocks;
            let end = start.saturating_add(self.piece_blocks).min(self.end);
            match self
                .next
                .compare_exchange_weak(next, end, Ordering::Relaxed, Ordering::Relaxed)
            {
                Ok(_) => return BlockRange::new(BlockIndex(start), BlockIndex(end)),
                Err(seen) => next = seen,
            }
        }
    }
}

/// The runs of `set` within `range`, ascending.
pub(crate) fn runs_within(
    set: &BlockSet,
    range: BlockRange,
) -> impl Iterator<Item = BlockRange> + '_ {
    let mut from = range.start();
    core::iter::from_fn(move || {
        let start = set.next_from(from).filter(|start| *start < range.end())?;
        let mut end = BlockIndex(start.0.saturating_add(1));
        while end < range.end() && set.contains(end) {
            end = BlockIndex(end.0.saturating_add(1));
        }
        from = end;
        BlockRange::new(start, end)
    })
}

/// What ends all workers when one fails.
#[derive(Debug, Default)]
pub(crate) struct Failure {
    stop: AtomicBool,
    first: Mutex<Option<JobError>>,
}

impl Failure {
    /// Whether the work is to end.
    pub(crate) fn is_set(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn set(&self, error: JobError) {
        self.stop.store(true, Ordering::Relaxed);
        self.first
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get_or_insert(error);
    }
}

/// Runs `work` in `workers` threads (0: the default) and waits for all of them. `work` looks at the failure between two
/// pieces. Errors: the first that a worker met.
pub(crate) fn in_parallel(
    workers: usize,
    control: &Control,
    work: &(dyn Fn(&Failure) -> Result<(), JobError> + Sync),
) -> Result<(), JobError> {
    let workers = if workers == 0 {
        default_workers()
    } else {
        workers
    };
    let failure = Failure::default();
    thread::scope(|scope| {
        let mut handles = Vec::with_capacity(workers);
        for n in 0..workers {
            let started = thread::Builder::new()
                .name(format!("worker-{n}"))
                .spawn_scoped(scope, || {
                    if let Err(error) = work(&failure) {
                        failure.set(error);
                    }
                });
            match started {
                Ok(handle) => handles.push(handle),
                // Fewer workers are slower, not wrong.
                Err(_) if n > 0 => break,
                Err(source) => failure.set(JobError::Threads { source }),
            }
        }
        for handle in handles {
            if handle.join().is_err() {
                failure.set(JobError::Died);
            }
        }
    });
    control.check()?;
    failure
        .first
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner)
        .map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use super::*;
    use blktide_types::unit::BlockCount;
    use proptest::prelude::*;

    proptest! {
        /// Each block of the set is in exactly one piece, pieces ascend, runs are the set.
        #[test]
        fn pieces_cover_the_set_once(len in 1_u64..400, piece in 1_u64..70, picks in proptest::collection::btree_set(0_u64..400, 0..60)) {
            let mut set = BlockSet::new(BlockCount(len));
            for block in &picks { set.insert(BlockIndex(*block)); }
            let pieces = Pieces::new(len, piece);
            let mut seen = Vec::new();
            let mut last_end = 0;
            while let Some(range) = pieces.next_in(&set) {
                prop_assert!(range.start().0 >= last_end && range.count().0 <= piece);
                prop_assert_eq!(range.start().0 % piece, 0);
                last_end = range.end().0;
                let before = seen.len();
                for run in runs_within(&set, range) { seen.extend(run.blocks().map(|b| b.0)); }
                prop_assert!(seen.len() > before, "no piece without a block of the set");
            }
            prop_assert_eq!(seen, picks.into_iter().filter(|b| *b < len).collect::<Vec<_>>());
            let all = Pieces::new(len, piece);
            let total: u64 = core::iter::from_fn(|| all.next_any()).map(|r| r.count().0).sum();
            prop_assert_eq!(total, len);
        }
    }
}
