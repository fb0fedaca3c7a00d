//! An instant of a watched volume, while its image is being stored.

use blktide_format::manifest::Consistency;
use blktide_types::clock::WallTime;
use blktide_types::geometry::Geometry;
use blktide_types::id::GenerationName;
use blktide_types::io::{BlockOutcome, BlockRead, SnapshotRead, SourceError};
use blktide_types::range::BlockRange;
use blktide_types::set::BlockSet;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::ahead::State;
use crate::copy::{Last, Reader};

/// The image's instant: what is wanted of it, and the blocks that were read in it.
#[derive(Debug)]
pub struct InstantImage {
    pub(crate) reader: Arc<Reader>,
    /// The volume's control side, for as long as the image is being stored.
    pub(crate) state: Arc<Mutex<State>>,
    pub(crate) wanted: BlockSet,
    pub(crate) changed: Option<BlockSet>,
    pub(crate) opened: GenerationName,
    pub(crate) instant: WallTime,
    pub(crate) consistency: Consistency,
    pub(crate) longest_freeze: Duration,
    pub(crate) last_blocks: BlockSet,
    pub(crate) last: Last,
}

impl InstantImage {
    /// The generation that opened at the instant.
    pub const fn opened(&self) -> GenerationName {
        self.opened
    }

    /// When it was.
    pub const fn instant(&self) -> WallTime {
        self.instant
    }

    /// How quiet the volume was.
    pub const fn consistency(&self) -> Consistency {
        self.consistency
    }

    /// The longest that the volume stood still for it.
    pub const fn longest_freeze(&self) -> Duration {
        self.longest_freeze
    }

    /// The blocks whose early copies are void: they are here.
    pub const fn last_blocks(&self) -> &BlockSet {
        &self.last_blocks
    }

    /// A full image was committed: from its instant on the tracker is trusted. False if that has been forgotten.
    pub fn trust(&self) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.watched.trust(self.opened)
    }
}

impl BlockRead for InstantImage {
    fn geometry(&self) -> Geometry {
        self.reader.geometry
    }

    /// Only [`Self::last_blocks`]; may be asked again.
    fn read_blocks(
        &self,
        range: BlockRange,
        buf: &mut [u8],
    ) -> Result<Vec<BlockOutcome>, SourceError> {
        let size = self.reader.geometry.block_size().bytes_usize();
        let whole = usize::try_from(range.count().0)
            .ok()
            .and_then(|n| n.checked_mul(size));
        let copied = (whole == Some(buf.len()))
            .then(|| self.last.copy(range, size, buf))
            .flatten();
        copied.ok_or_else(|| {
            let why = "blocks that were not read in the freeze";
            SourceError::Io(io::Error::new(io::ErrorKind::InvalidInput, why))
        })
    }
}

impl SnapshotRead for InstantImage {
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
