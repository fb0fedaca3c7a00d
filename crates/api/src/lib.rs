//! The control protocol: requests, replies, errors, client; and the names, units and configuration that both programs share.
//!
//! ```text
//!   blktidectl ── client ──▶ wire (JSON + NUL, unix socket) ──▶ blktided
//!        └─ config, name, unit, failure, status: the same words on both sides ─┘
//! ```
//! Everything that an administrator reads or types has its one definition here. Nothing here opens a
//! configuration file: the binaries read, this parses.
#![forbid(unsafe_code)]

pub mod client;
pub mod config;
pub mod failure;
pub mod message;
pub mod name;
pub mod reason_text;
pub mod record;
pub mod status;
pub mod time;
pub mod unit;
pub mod wire;
