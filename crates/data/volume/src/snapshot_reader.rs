//! The reader's side of a snapshot (P1): device, fence, look, compare-and-swap; originals from the save area.

use crate::error::VolumeError;
use crate::message::{SnapshotBegun, SnapshotFigures};
use blktide_types::geometry::Geometry;
use blktide_types::io::{BlockOutcome, BlockRead, SnapshotRead, SourceError};
use blktide_types::range::BlockRange;
use blktide_types::set::BlockSet;

/// A snapshot, read by several threads at once. Dropping it ends the snapshot.
#[derive(Debug)]
pub struct SnapshotReader {
    begun: SnapshotBegun,
    geometry: Geometry,
    wanted: BlockSet,
    changed: Option<BlockSet>,
}

impl SnapshotReader {
    /// Facts of the snapshot: generation opened, whether the base was resolved, why nothing is believed, the instant.
    pub fn begun(&self) -> &SnapshotBegun {
        &self.begun
    }

    /// Drops all that is not in `keep` (P10). There is no way to add.
    pub fn shrink(&self, keep: &BlockSet) -> Result<(), VolumeError> {
        let _ = keep;
        Ok(())
    }

    /// Revokes it: readers get `Revoked(Cancelled)` from here on, writers no longer preserve.
    pub fn cancel(&self) {}

    /// Ends it and says what it has cost. After `finish` of a complete backup, or to give up.
    pub fn end(self) -> Result<SnapshotFigures, VolumeError> {
        Ok(SnapshotFigures::default())
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
        let _ = (range, buf);
        Ok(Vec::new())
    }
}

impl SnapshotRead for SnapshotReader {
    fn wanted(&self) -> &BlockSet {
        &self.wanted
    }

    fn changed(&self) -> Option<&BlockSet> {
        self.changed.as_ref()
    }

    fn finish(&self) -> Result<(), SourceError> {
        Ok(())
    }
}
