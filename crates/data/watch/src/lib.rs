//! Mode `watch`: marks set by the kernel beside the way of a write, for volumes that nothing may be put into.
//!
//! ```text
//!   kernel:  block_bio_queue · block_rq_issue · block_rq_complete ─▶ bitmaps A, B      pinned: needs no process
//!   here:    Watched: swap, drain ─▶ the engine's generations (pinned, too) · evidence · hand-over of the bitmap file
//!            Ahead: copy ahead, freeze, last blocks ─▶ an image of one instant
//!            guard: the process that ends every freeze
//! ```
//! Nothing here is in the way of a write: it can neither delay, fail nor change one, but for a freeze that was asked for.
//!
//! **Invariant**: a write whose submitter has been told that it is done is marked in a bitmap that will be drained into a generation
//! that is open then, or something says 'distrust'.
#![forbid(unsafe_code)]

mod ahead;
mod attach;
mod copy;
mod counters;
mod evidence;
pub mod guard;
mod image;
mod limits;
mod marker;
mod marks;
mod memory;
mod native;
mod note;
mod pins;
mod probe;
mod quiet;
mod still;
mod target;
mod tracker;

pub use ahead::{Ahead, AheadRequest, Next};
pub use attach::{Attached, Detached, InUse, attach, detach};
pub use image::InstantImage;
pub use limits::{FreezeLimits, OverBudget};
pub use native::{Native, NativeImage};
pub use pins::{BPFFS, Pins};
pub use probe::{Missing, probe};
pub use target::{Obstacle, Target};
pub use tracker::Watched;
