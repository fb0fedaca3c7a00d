//! The words everything else is written in.
//!
//! Nothing here does I/O, reads a clock, or allocates without a bound.
#![forbid(unsafe_code)]

pub mod clock;
pub mod geometry;
pub mod id;
pub mod io;
pub mod range;
pub mod reason;
pub mod set;
pub mod unit;
