//! The volume socket's messages: JSON, one message a packet, descriptors beside it.
//!
//! Every request has one reply. A connection that began a snapshot owns it: closing it ends the snapshot.

use crate::error::Refusal;
use blktide_types::id::{GenerationName, RepositoryId, SnapshotId};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Longest message, bytes.
pub const MESSAGE_BYTES_MAX: usize = 64 << 10;

/// Most descriptors beside one message.
pub const DESCRIPTORS_MAX: usize = 16;

/// What a client asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Facts. Reply: `Status`. Waits for nothing.
    Status,
    /// What changed since each of these generations opened. Reply: `ChangedSince`.
    ChangedSince {
        /// Names from manifests.
        generations: Vec<Text<GenerationName>>,
    },
    /// Which boundaries to keep apart (P2); replaces all earlier hints. Reply: `Done`.
    Hints {
        /// For each repository its newest image's generation.
        hints: Vec<Hint>,
    },
    /// Opens a generation and a snapshot at one instant (P3). Reply: `Snapshot`, with the descriptors of [`SnapshotBegun`].
    /// With `absent = Listed` one descriptor comes along: a sealed memfd of the bitmap, words in host order.
    SnapshotBegin(SnapshotRequest),
    /// Ends the snapshot of this connection. Reply: `SnapshotEnded`.
    SnapshotEnd {
        /// Which.
        snapshot: Text<SnapshotId>,
    },
    /// Revokes whatever snapshot there is. Reply: `Done`.
    Cancel,
    /// A full image was committed, and its instant opened this generation: what a distrust forgot is covered. Reply: `Done`.
    Trust {
        /// From `Snapshot`.
        generation: Text<GenerationName>,
    },
    /// These blocks could not be read for the image: they count as changed (P10). Reply: `Done`.
    Unreadable {
        /// First block.
        first: u64,
        /// Number of blocks.
        count: u64,
    },
    /// Everything of ours in shared memory is where it must be for a power cut. Reply: `Done`.
    Flush,
    /// Takes the volume out of the path and stores its bitmap. Reply: `Done` after the bitmap file is durable, `Error` `in-use` naming by whom.
    Detach,
    /// Hands all descriptors to a new keeper, whose own (pidfd) comes along. Reply: `Adopted`.
    Adopt,
}

/// What the server answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    /// It is so.
    Done,
    /// Facts.
    Status(Box<VolumeStatus>),
    /// In the order asked; `None`: the name is not known.
    ChangedSince {
        /// Bytes changed since each.
        changed_bytes: Vec<Option<u64>>,
        /// Why no bitmap is believed, if none is.
        distrust: Option<Distrust>,
    },
    /// A snapshot has begun.
    Snapshot(Box<SnapshotBegun>),
    /// A snapshot has ended.
    SnapshotEnded(SnapshotFigures),
    /// All that outlives servers, and last the server's own descriptor.
    Adopted {
        /// The server's process id.
        pid: u32,
    },
    /// Refused.
    Error {
        /// Which.
        kind: Refusal,
        /// In words.
        message: String,
    },
}

/// A boundary to keep apart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hint {
    /// Whose newest image it is.
    pub repository: Text<RepositoryId>,
    /// The generation that opened at that image's instant.
    pub generation: Text<GenerationName>,
}

/// What a snapshot is to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRequest {
    /// Generation that opened at the base image's instant; none: there is no base, everything is wanted.
    pub base: Option<Text<GenerationName>>,
    /// What is absent in the base.
    pub absent: Absent,
    /// Where originals go.
    pub save_area: SaveArea,
    /// When the save area is full.
    pub overflow: Overflow,
    /// Longest that any one write may wait for this snapshot, and longest that the reader may make no progress.
    pub wait_limit_ms: u64,
    /// How long the queues may be held.
    pub hold_deadline_ms: u64,
}

impl SnapshotRequest {
    /// A snapshot of everything, with the interface's defaults.
    pub fn everything(save_area: SaveArea) -> Self {
        Self {
            base: None,
            absent: Absent::All,
            save_area,
            overflow: Overflow::GiveUp,
            wait_limit_ms: 5000,
            hold_deadline_ms: 500,
        }
    }
}

/// Blocks that the base image does not have and that are therefore wanted in any case (P10).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Absent {
    /// None.
    None,
    /// A bitmap of them comes along.
    Listed,
    /// All blocks: nothing is left out.
    All,
}

/// Where originals are kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SaveArea {
    /// An unlinked file in this folder.
    Path {
        /// The folder.
        folder: PathBuf,
        /// At most so many bytes.
        limit_bytes: u64,
        /// Left free on that file system.
        min_free_bytes: u64,
    },
    /// Memory that is not swapped.
    Memory {
        /// At most so many bytes.
        limit_bytes: u64,
    },
}

/// What happens when the save area is full (P8).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Overflow {
    /// The snapshot is revoked; no write waits.
    GiveUp,
    /// Writes wait up to the limit; then it is revoked.
    Wait,
}

/// A snapshot that has begun. Descriptors beside it, in this order: control and banks (read-only), states (read-write), index and wanted (read-only), save area
/// (read-only), backing device (`O_RDONLY`, direct).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotBegun {
    /// Its id.
    pub snapshot: Text<SnapshotId>,
    /// The generation that opened at the instant: goes into the manifest.
    pub generation: Text<GenerationName>,
    /// Whether the base's generation was known; if not, everything is wanted.
    pub base_resolved: bool,
    /// Why no bitmap is believed, if none is.
    pub distrust: Option<Distrust>,
    /// Wall clock at the instant, nanoseconds since 1970.
    pub instant_ns: i64,
    /// How long the queues were held, nanoseconds.
    pub held_ns: u64,
    /// The volume, bytes.
    pub volume_bytes: u64,
    /// Unit of the snapshot, bytes.
    pub block_size_bytes: u32,
    /// Unit of the tracker, bytes.
    pub grain_bytes: u32,
    /// Bytes.
    pub logical_sector_bytes: u32,
    /// Bytes.
    pub physical_sector_bytes: u32,
    /// Save slots.
    pub slots: u32,
    /// Its number in the shared memory.
    pub sequence: u64,
    /// Number of the generation that opened, for people.
    pub counter: u64,
    /// Bank that the instant closed.
    pub closed_bank: usize,
}

/// What a snapshot has cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotFigures {
    /// Most bytes that were in the save area at one time.
    pub save_area_peak_bytes: u64,
    /// Bytes copied aside.
    pub preserved_bytes: u64,
    /// Longest that one write was delayed for it, nanoseconds.
    pub longest_wait_ns: u64,
}

/// Why no bitmap is believed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Distrust {
    /// The interface's word.
    pub reason: String,
    /// When, wall clock, nanoseconds since 1970.
    pub since_ns: i64,
    /// What was seen.
    pub detail: String,
}

/// State of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VolumeState {
    /// Being set up: the node is not there yet.
    Attaching,
    /// In the path, tracking.
    Attached,
    /// In the path, not tracking.
    PassingThrough,
    /// Being taken out.
    Detaching,
}

/// Facts about an attached volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// Its name.
    pub name: String,
    /// State.
    pub state: VolumeState,
    /// The server.
    pub pid: u32,
    /// Its keeper; 0 if that is dead.
    pub keeper_pid: u32,
    /// The volume's id.
    pub volume_id: String,
    /// The node to mount, a symlink.
    pub node: PathBuf,
    /// The loop device.
    pub loop_device: Option<PathBuf>,
    /// The backing device.
    pub device: PathBuf,
    /// Bytes.
    pub volume_bytes: u64,
    /// Unit of image and snapshot, bytes.
    pub block_size_bytes: u32,
    /// Unit of one bit, bytes.
    pub grain_bytes: u32,
    /// Bytes.
    pub logical_sector_bytes: u32,
    /// Bytes.
    pub physical_sector_bytes: u32,
    /// The open generation.
    pub generation: Text<GenerationName>,
    /// Its number, for people.
    pub generation_number: u64,
    /// Bytes changed in the open generation.
    pub changed_bytes: u64,
    /// Why no bitmap is believed, if none is.
    pub distrust: Option<Distrust>,
    /// Servers that have died.
    pub takeovers: u64,
    /// Longest pause of a takeover, nanoseconds.
    pub longest_pause_ns: u64,
    /// Requests served.
    pub requests: u64,
    /// Requests of dead servers that were finished.
    pub requests_finished: u64,
    /// The snapshot's figures, if there is one.
    pub snapshot: Option<SnapshotFigures>,
    /// What an administrator should know, as codes (`no-io-flusher`, `memory-not-locked`).
    pub warnings: Vec<String>,
}

/// A value that stands in JSON as its text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Text<T>(pub T);

impl<T: std::fmt::Display> Serialize for Text<T> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

impl<'de, T: std::str::FromStr<Err: std::fmt::Display>> Deserialize<'de> for Text<T> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map(Self).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests;
