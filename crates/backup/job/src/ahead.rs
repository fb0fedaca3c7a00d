//! Copying a volume that has no copy-on-write: while it is in use, round by round, until what is left is taken at an instant.
//!
//! ```text
//!   first round ─▶ read now ─▶ stored early ─┐
//!        ┌───────────────────────────────────┘
//!        └▶ next? ─▶ again: these copies are void ─▶ read now ─▶ stored early ─▶ next? …
//!             └─▶ the instant: wanted, last ─▶ wanted less last: kept        last: read from the snapshot, put
//! ```
//! **Invariant**: of each block of the image the copy is one that was made, and that no round has voided since.

use crate::error::JobError;
use crate::pass::{Pass, Reading};
use crate::pieces::Pieces;
use crate::source::{Begun, CopyAhead, Round, RoundCost, begin_error};
use blktide_image::{EarlyBlocks, EarlyWriter, ImageWriter};
use blktide_repo::Session;
use blktide_types::io::SnapshotRead;
use blktide_types::range::BlockRange;
use blktide_types::set::BlockSet;
use std::fs::File;

/// Blocks of a leaf of the image's tree: what is kept and read together, so that few leaves are begun at a time.
const LEAF_BLOCKS: u64 = 64;

/// What was copied when the instant came.
pub(crate) struct Copied {
    early: EarlyBlocks,
    /// Of these the early copy is taken.
    kept: BlockSet,
    /// These are read from the snapshot.
    last: BlockSet,
}

/// Copies `ahead` until its instant.
///
/// Errors: nothing is left at the volume once `ahead` is dropped; the session can only be given up.
pub(crate) fn copy(
    ahead: &dyn CopyAhead,
    spool: File,
    session: &Session,
    reading: &Reading<'_>,
) -> Result<(Begun, Copied), JobError> {
    let blocks = reading.geometry.block_count();
    let clock = reading.control.clock();
    let early = EarlyWriter::new(session, reading.geometry, spool);
    let mut copied = BlockSet::new(blocks);
    let mut round = ahead.first();
    reading.control.set_total(0);
    let (begun, last) = loop {
        if round.len() != blocks {
            return Err(JobError::Mismatch {
                what: "a round is of another size",
            });
        }
        let (from, from_bytes) = (clock.now(), reading.read_bytes());
        reading.control.add_total(reading.bytes_of(&round));
        reading.all(Pass {
            blocks: &round,
            read: &|range, buf| ahead.read_now(range, buf),
            put: &|blocks| early.put(blocks),
        })?;
        copied.union_with(&round);
        reading.control.check()?;
        let cost = RoundCost {
            read_bytes: reading.read_bytes().saturating_sub(from_bytes),
            took: clock.now().since(from),
        };
        match ahead.next(cost).map_err(begin_error)? {
            // Their copies are void, and replaced before anything else is asked.
            Round::Again(void) => round = void,
            Round::Instant { begun, last } => break (begun, last),
        }
    };
    let snapshot = &*begun.snapshot;
    if snapshot.geometry() != reading.geometry {
        return Err(JobError::Mismatch {
            what: "the volume's shape changed while it was copied",
        });
    }
    let kept = kept(snapshot.wanted(), &last, &copied)?;
    let early = early.finish()?;
    Ok((begun, Copied { early, kept, last }))
}

/// The blocks whose early copies are of the instant. The volume is not believed blindly: what it does not want to be read
/// now must have been copied.
fn kept(wanted: &BlockSet, last: &BlockSet, copied: &BlockSet) -> Result<BlockSet, JobError> {
    if last.len() != copied.len() || !last.is_subset_of(wanted) {
        return Err(JobError::Mismatch {
            what: "what is left to read is not wanted",
        });
    }
    let mut kept = wanted.clone();
    kept.subtract(last);
    if !kept.is_subset_of(copied) {
        return Err(JobError::Mismatch {
            what: "a copy that was never made is said to be of the instant",
        });
    }
    Ok(kept)
}

impl Copied {
    /// Makes the image whole: keeps what was copied, and reads the rest from `snapshot`.
    pub(crate) fn complete(
        &self,
        reading: &Reading<'_>,
        snapshot: &dyn SnapshotRead,
        writer: &ImageWriter,
    ) -> Result<(), JobError> {
        reading.control.add_total(reading.bytes_of(&self.last));
        let pass = Pass {
            blocks: &self.last,
            read: &|range, buf| snapshot.read_blocks(range, buf),
            put: &|blocks| writer.put(blocks),
        };
        let leaves = Pieces::new(reading.geometry.block_count().0, LEAF_BLOCKS);
        let holds = |range: BlockRange| {
            let first = self.last.next_from(range.start());
            first.is_some_and(|block| block < range.end())
        };
        reading.by_pieces(&leaves, snapshot.wanted(), &|leaf, buffer| {
            writer.keep(&self.early, &self.kept, leaf)?;
            for piece in leaf.pieces(reading.piece_blocks()).filter(|p| holds(*p)) {
                reading.control.check()?;
                reading.take(pass, piece, buffer)?;
            }
            Ok(())
        })
    }
}
