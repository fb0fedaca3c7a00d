//! What can go wrong in the processes of a volume, and between them and their client.

use blktide_types::io::RevokeCause;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// An error of a volume's keeper, server or client.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VolumeError {
    /// Nobody listens at the volume socket: the volume is not attached, or keeper and server are dead.
    #[error("volume {name} is not attached")]
    NotAttached {
        /// The volume.
        name: String,
        /// What connecting gave.
        source: io::Error,
    },
    /// The server did not answer within the limit. What was asked may still happen.
    #[error("volume {name} did not answer within {limit:?}")]
    NoAnswer {
        /// The volume.
        name: String,
        /// The limit.
        limit: Duration,
    },
    /// The server refused, for a reason from a closed list. Nothing has changed.
    #[error("{message}")]
    Refused {
        /// Which refusal.
        kind: Refusal,
        /// In words, for people.
        message: String,
    },
    /// The answer is not one of this protocol.
    #[error("volume {name} answered something else than was asked")]
    Protocol {
        /// The volume.
        name: String,
    },
    /// The connection failed.
    #[error("the connection to volume {name} failed")]
    Connection {
        /// The volume.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// The snapshot is gone.
    #[error("the snapshot was revoked: {0}")]
    Revoked(RevokeCause),
    /// A keeper of this volume runs already.
    #[error("volume {name} is attached already")]
    AlreadyAttached {
        /// The volume.
        name: String,
    },
    /// The options contradict the device.
    #[error("the volume cannot be laid out: {why}")]
    Layout {
        /// What does not fit.
        why: String,
    },
    /// A file or a kernel object could not be had.
    #[error("{what} failed: {path}")]
    Io {
        /// What was done.
        what: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The backing device refused.
    #[error("the backing device cannot be served")]
    Device {
        /// Why.
        source: blktide_device::DeviceError,
    },
    /// The engine refused.
    #[error("the tracker refused")]
    Engine {
        /// Why.
        source: blktide_engine::EngineError,
    },
    /// The bitmap could not be handed over. Nothing is served.
    #[error("the volume's bitmap could not be taken over")]
    Handover {
        /// Why.
        source: blktide_engine::handover::HandoverError,
    },
    /// The connection to the kernel ended without a detach: the node's users get errors.
    #[error("the frontend is gone without a detach")]
    FrontendGone,
    /// The server ended before the volume was attached.
    #[error("the server of volume {name} ended before the volume was attached: {why}")]
    ServerEnded {
        /// The volume.
        name: String,
        /// Its last words.
        why: String,
    },
}

/// Why a server refused. A closed list; the words are on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Refusal {
    /// The node is open, mounted or held.
    InUse,
    /// The queues did not fall silent within the deadline, three times.
    Busy,
    /// One snapshot at a time.
    SnapshotExists,
    /// No such snapshot, or it is another connection's.
    NoSnapshot,
    /// The save area would lie on the tracked volume.
    SaveAreaOnVolume,
    /// The save area cannot be made.
    SaveAreaFailed,
    /// Tracking is off: the volume passes everything through.
    PassingThrough,
    /// The request makes no sense.
    Invalid,
    /// The volume is being detached.
    Detaching,
    /// A living keeper has the volume.
    KeeperAlive,
    /// Mode watch cannot see everything that is written to this device.
    Unwatchable,
    /// The kernel refused.
    Failed,
}
