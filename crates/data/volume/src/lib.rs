//! Frontend, engine and device joined: the server of one volume, its keeper, and the client that speaks to it.
//!
//! ```text
//!   blktided ── VolumeClient ──(volume socket)──▶ server: control thread ─┐
//!      └─ SnapshotReader ──(shared states, O_DIRECT reads)                 ├─ shared memory
//!                                       queue threads: fuse → engine → ring┘
//!                         keeper: holds the descriptors, starts servers
//! ```
#![forbid(unsafe_code)]

pub mod client;
pub mod error;
pub mod inherited;
pub mod keeper;
pub mod message;
pub mod options;
pub mod server;
pub mod snapshot_reader;

pub use client::VolumeClient;
pub use error::VolumeError;
pub use options::VolumeOptions;
pub use snapshot_reader::SnapshotReader;
