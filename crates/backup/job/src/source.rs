//! Where a backup's snapshot comes from: the seam to the volume.
//!
//! ```text
//!   copy_ahead ─▶ none ─▶ begin ─▶ Begun: the snapshot, read while the volume goes on
//!        └─▶ CopyAhead ─▶ read_now, next … ─▶ Instant ─▶ Begun, of which only the last blocks are read
//! ```
//! **Invariant**: a snapshot that has begun is of one instant, and no change after it is forgotten.

use crate::error::JobError;
use blktide_format::manifest::Consistency;
use blktide_types::clock::WallTime;
use blktide_types::geometry::Geometry;
use blktide_types::id::{GenerationName, SnapshotId};
use blktide_types::io::{BlockOutcome, RevokeCause, SnapshotRead, SourceError};
use blktide_types::range::BlockRange;
use blktide_types::reason::Reason;
use blktide_types::set::BlockSet;
use core::time::Duration;
use std::fs::File;
use std::io;
use std::sync::Arc;

/// What a backup asks of the volume.
#[derive(Clone, Debug)]
pub struct SnapshotAsk {
    /// The generation that opened at the base image's instant; `None`: there is no base, all is wanted.
    pub base: Option<GenerationName>,
    /// The blocks that the base has no content of (P10); only with a base.
    pub absent: Option<BlockSet>,
}

/// Why there is no snapshot.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BeginError {
    /// Writers were not seen through within the hold's deadline; nothing has changed, ask again later.
    #[error("the volume was too busy for a snapshot")]
    Busy,
    /// Another backup has its snapshot.
    #[error("another backup of the volume is running")]
    Taken,
    /// The volume's server ended it while it began.
    #[error("the snapshot was revoked: {0}")]
    Revoked(RevokeCause),
    /// The volume's server could not be asked, or could not make it.
    #[error("the volume made no snapshot")]
    Io(#[source] io::Error),
}

impl From<SourceError> for BeginError {
    fn from(error: SourceError) -> Self {
        match error {
            SourceError::Revoked(cause) => Self::Revoked(cause),
            SourceError::Io(source) => Self::Io(source),
        }
    }
}

pub(crate) fn begin_error(error: BeginError) -> JobError {
    match error {
        BeginError::Busy | BeginError::Taken => JobError::Busy,
        BeginError::Revoked(cause) => JobError::SnapshotRevoked { cause },
        BeginError::Io(source) => JobError::Volume { source },
    }
}

/// A snapshot that has begun. Dropping `snapshot` ends it at the volume.
#[derive(Clone)]
pub struct Begun {
    /// The blocks at the instant.
    pub snapshot: Arc<dyn SnapshotRead>,
    /// Its id.
    pub id: SnapshotId,
    /// The generation that opened at the instant; [`GenerationName::NONE`] where nothing tracks.
    pub opened: GenerationName,
    /// What the tracker says of the base that it was asked for. Anything but `Resolved`: all blocks are wanted.
    pub tracker: TrackerSays,
    /// What the file system showed of itself at the instant (P5), opaque; may be empty.
    pub evidence: Vec<u8>,
    /// When it was; shown, never used for order.
    pub instant: WallTime,
    /// How quiet the volume was.
    pub consistency: Consistency,
}

impl core::fmt::Debug for Begun {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Begun")
            .field("id", &self.id)
            .field("opened", &self.opened)
            .field("tracker", &self.tracker)
            .finish_non_exhaustive()
    }
}

/// What the tracker says of the changes since the base it was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrackerSays {
    /// Trusted, and it knows the base's generation: `wanted` is changed ∪ absent.
    Resolved,
    /// Trusted; it does not know that name, or was given none.
    Unresolved,
    /// Not to be believed.
    Distrusted(Reason),
    /// Nothing tracks.
    Off,
}

/// A volume that snapshots can be made of.
pub trait SnapshotSource: Send + Sync {
    /// The volume's shape now.
    fn geometry(&self) -> Geometry;

    /// Begins a snapshot. Waits: for writers in flight, at most the hold's deadline.
    ///
    /// Errors: then no snapshot exists and no change is forgotten.
    fn begin(&self, ask: &SnapshotAsk) -> Result<Begun, BeginError>;

    /// Begins to copy the volume while it is in use, if that is how images of it are made; `None`: it has copy-on-write,
    /// and [`Self::begin`] is asked instead.
    ///
    /// Errors: as of [`Self::begin`].
    fn copy_ahead(&self, ask: &SnapshotAsk) -> Result<Option<Box<dyn CopyAhead>>, BeginError> {
        let _: &SnapshotAsk = ask;
        Ok(None)
    }

    /// A file of nobody else's, for what is remembered of the blocks that [`Self::copy_ahead`] lets copy: about 60 bytes a
    /// copy. Without a name, on a disk that is not the volume, or in memory.
    fn spool(&self) -> io::Result<File> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// What a snapshot has cost the writers so far.
    fn cost(&self, id: SnapshotId) -> SnapshotCost {
        let _: SnapshotId = id;
        SnapshotCost::default()
    }
}

/// A volume that has no copy-on-write: it is copied while it is in use, until what is left can be taken in an instant.
///
/// Dropping it before the instant ends it at the volume, and no change is forgotten; after the instant the snapshot is on
/// its own.
pub trait CopyAhead: Send + Sync {
    /// The volume's shape; the snapshot's must be the same.
    fn geometry(&self) -> Geometry;

    /// What the tracker says of the base that it was asked for. What it says at the instant may be worse: then all blocks
    /// are wanted.
    fn tracker(&self) -> TrackerSays;

    /// The blocks of the first round. A superset of what will be wanted costs reading; what is missing is left for
    /// `last`.
    fn first(&self) -> BlockSet;

    /// Reads blocks as they are now: of no instant, torn perhaps. By several threads at once, any block, as often as
    /// asked. `buf` as in [`blktide_types::io::BlockRead::read_blocks`].
    fn read_now(&self, range: BlockRange, buf: &mut [u8])
    -> Result<Vec<BlockOutcome>, SourceError>;

    /// Ends a round, all blocks of which have been read; no read is under way. All copies made so far of the blocks that it
    /// answers with are void. `cost`: of the round that ends. Waits: for what was written before to be written, at the
    /// instant for writers in flight. Not asked again after the instant.
    ///
    /// Errors: as of [`SnapshotSource::begin`].
    fn next(&self, cost: RoundCost) -> Result<Round, BeginError>;
}

/// What comes after a round.
#[derive(Debug)]
pub enum Round {
    /// Another one: these blocks were written while they were copied, or after. Their copies are void; copy them, then ask
    /// again.
    Again(BlockSet),
    /// The instant has been.
    Instant {
        /// The snapshot. Its `wanted` are all blocks of the image; only those of `last` are read from it, each once, and
        /// then it is finished.
        begun: Begun,
        /// The wanted blocks that are yet to be read, from the snapshot: they were not copied, or their copies are void.
        /// The copy of every other wanted block is of the instant.
        last: BlockSet,
    },
}

/// What a round has cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RoundCost {
    /// Bytes that were read.
    pub read_bytes: u64,
    /// How long reading and storing them took.
    pub took: Duration,
}

/// What a snapshot has cost the writers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SnapshotCost {
    /// The longest that one write has waited for it.
    pub longest_wait: Duration,
    /// The longest that the file system was frozen.
    pub longest_freeze: Duration,
    /// Bytes of originals that were preserved.
    pub preserved_bytes: u64,
}
