//! The backing device: direct transfers, flush, identity, geometry, fence.
//!
//! ```text
//! Backing::open ─ fence ─▶ Limits, Reader (a separate read-only descriptor)
//!      └─▶ Transfers (one a queue thread): start ─▶ ring ─▶ next: Event
//! ```
//! Invariant: nothing goes through the page cache, and nothing is written without the fence (P6): between open and
//! drop no other process, and no operation of a dead one, can write.
#![forbid(unsafe_code)]

mod backing;
mod error;
pub mod transfers;

pub use backing::{Backing, Limits};
pub use error::{Consequence, DeviceError, TransferKind};
pub use transfers::{Event, Outcome, Target, Transfer, Transfers};
