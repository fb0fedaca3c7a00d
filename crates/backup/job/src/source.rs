//! Where a backup's snapshot comes from: the seam to the volume.

use blktide_format::manifest::Consistency;
use blktide_types::clock::WallTime;
use blktide_types::geometry::Geometry;
use blktide_types::id::{GenerationName, SnapshotId};
use blktide_types::io::{RevokeCause, SnapshotRead};
use blktide_types::reason::Reason;
use blktide_types::set::BlockSet;
use core::time::Duration;
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

    /// What a snapshot has cost the writers so far.
    fn cost(&self, id: SnapshotId) -> SnapshotCost {
        let _: SnapshotId = id;
        SnapshotCost::default()
    }
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
