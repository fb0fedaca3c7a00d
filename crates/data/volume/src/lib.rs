//! Frontend, engine and device joined: the server of one volume, its keeper, and the client that speaks to it.
//!
//! ```text
//!   blktided ── VolumeClient ──(volume socket)──▶ server: control thread ─┐
//!      └─ SnapshotReader ──(shared states, O_DIRECT reads)                 ├─ shared memory
//!                                       queue threads: fuse → engine → ring┘
//!                         keeper: holds the descriptors, starts servers
//! ```
#![forbid(unsafe_code)]

pub mod bitmap;
pub mod client;
mod detach;
pub mod error;
mod inherited;
pub mod keeper;
mod log;
mod memory;
pub mod message;
pub mod options;
mod preserves;
mod save_area;
pub mod server;
mod serving;
pub mod snapshot_reader;
mod snapshotting;
mod start;
mod transport;
mod verbs;
mod worker;

pub use client::VolumeClient;
pub use error::VolumeError;
pub use options::VolumeOptions;
pub use snapshot_reader::SnapshotReader;
