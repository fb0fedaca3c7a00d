//! What happens to a write. State machines only: no I/O, no clock, no thread.
//!
//! ```text
//! frontend ─▶ Request::step ─▶ [enter ─▶ mark ─▶ preserve ─▶ perform ─▶ leave] ─▶ Complete      a queue's thread each
//!                   │ atomics in shared memory (gate, epoch, banks, states)
//! Control: begin_life · take_over · prepare · hold · commit · end_snapshot · distrust · export   one control thread
//!          begin_life · adopt · absorb · prepare_generation · open_prepared                      where the kernel marks
//! SnapshotView: take · shrink · complete                                                    a backup's workers
//! ```
//!
//! **Invariant**: no write is performed whose grains are not marked in the generation it falls into, and none to a wanted
//! block whose original is not safe, unless the snapshot was revoked before.
#![forbid(unsafe_code)]

pub mod atomic;
mod broken;
pub mod consequence;
pub mod control;
mod engine;
mod error;
pub mod evidence;
pub mod gate;
pub mod handover;
#[cfg(test)]
#[cfg(not(loom))]
mod model;
mod queue;
mod request;
pub mod snapshot;
pub mod state;
pub mod tracker;
pub mod watch;
#[cfg(test)]
#[cfg(loom)]
mod worlds;

pub use atomic::{Memory, PlainMemory};
pub use consequence::Errno;
pub use control::{
    Absent, Control, Limits, Opened, Prepared, PreparedGeneration, SnapshotMemories,
    SnapshotRequest, Trust,
};
pub use engine::Engine;
pub use error::EngineError;
pub use gate::{Hold, HoldState};
pub use queue::Queue;
pub use request::{
    Action, Actions, Event, LANES, Operation, Outcome, PIECE_BYTES, PIECE_BYTES_WANTED, Request,
    Ticket,
};
pub use snapshot::{Begun, Overflow, ReaderMemories, Snapshot, SnapshotView};
pub use tracker::{Generation, StoredGeneration};
pub use watch::WatchMarks;
