//! The jobs: backup, restore, verify, and why a backup is not incremental.
//!
//! ```text
//!   plan ──▶ backup ──▶ (image in the repository) ──▶ restore ──▶ target
//!   why and what        workers over a snapshot        verify
//! ```
//!
//! Everything here is plain threads. A job runs in threads of its own and is held by a [`running::Running`]: a
//! repository that hangs in the kernel hangs a thread of the job and never who waits for the job.
//! Knows neither the daemon nor its configuration: sources, targets, clocks and randomness are passed in.
//!
//! **Invariant**: a job that fails, is cancelled or dies leaves nothing visible in the repository and has changed
//! nothing that the next backup rests on (the position lives in the images, P2).
#![forbid(unsafe_code)]

mod ahead;
pub mod backup;
pub mod environment;
pub mod error;
pub mod file_target;
pub mod listing;
mod pass;
mod pieces;
pub mod plan;
mod rate;
pub mod restore;
pub mod running;
pub mod source;
pub mod target;
pub mod verify;

pub use pieces::default_workers;

#[cfg(test)]
mod tests;
