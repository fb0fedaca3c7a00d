//! Why the engine refuses.

use blktide_format::shared::SharedError;
use blktide_types::id::GenerationName;
use blktide_types::io::RevokeCause;
use std::io;

/// Why the engine refuses. None of these touches a write: requests go on as before.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// A memory is shorter than its layout says. Nothing was done.
    #[error("a shared memory has {found} words where {needed} are needed")]
    MemoryTooSmall {
        /// Words needed.
        needed: usize,
        /// Words there are.
        found: usize,
    },
    /// A memory is not what it should be. Nothing was done.
    #[error("the control memory is not of this volume's layout")]
    Layout {
        /// What is wrong.
        #[source]
        source: SharedError,
    },
    /// A queue that does not exist was asked for.
    #[error("there is no queue {queue}")]
    NoSuchQueue {
        /// Its number.
        queue: usize,
    },
    /// Another hold lives. Try again.
    #[error("hold {holder} is under way")]
    Held {
        /// Its number.
        holder: u64,
    },
    /// The hold expired or was released before it was committed: no swap took place.
    #[error("hold {hold} is over")]
    HoldOver {
        /// Its number.
        hold: u64,
    },
    /// The table of generations changed since the snapshot was prepared: prepare it again. No swap took place.
    #[error("the prepared snapshot is out of date")]
    PlanStale,
    /// A snapshot lives already; one a volume at a time.
    #[error("a snapshot is under way")]
    SnapshotUnderWay,
    /// There is no snapshot to which this could apply.
    #[error("there is no such snapshot")]
    NoSnapshot,
    /// The snapshot was revoked before it was seen: what was read of it may be of a later instant.
    #[error("the snapshot was revoked: {cause}")]
    Revoked {
        /// Why.
        cause: RevokeCause,
    },
    /// Tracking is off: everything passes through, and nothing can be said of a change.
    #[error("tracking is off")]
    PassingThrough,
    /// No bank is free for the next generation. Cannot be with fewer hints than banks less three.
    #[error("no bank is free for a new generation")]
    NoBank,
    /// The next generation's bank could not be made ready. Nothing changed.
    #[error("the memory of a new generation could not be made ready")]
    BankNotReady {
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The tracker does not know this generation: what changed since is not known (`bitmap-stale`).
    #[error("the tracker does not know generation {name}")]
    UnknownGeneration {
        /// Its name.
        name: GenerationName,
    },
    /// A set of blocks or grains counts another volume's.
    #[error("a bitmap has {found} words where {needed} are needed")]
    OtherSize {
        /// Words needed.
        needed: usize,
        /// Words there are.
        found: usize,
    },
}
