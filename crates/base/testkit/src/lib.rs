//! For tests only: a disk that loses power, and a volume that cannot be wrong.
//!
//! * [`disk::SimDisk`]: folders, files and devices behind a volatile cache; cuts, torn writes, failing operations.
//! * [`reference::ReferenceVolume`]: a plain `Vec<u8>` with snapshots and change sets: the oracle.
//! * [`seed`]: numbers that replay; [`clock`]: time and randomness that a test holds in its hand;
//!   [`pattern`]: bytes that say where they belong.
#![forbid(unsafe_code)]
#![expect(
    clippy::indexing_slicing,
    clippy::expect_used,
    clippy::panic,
    clippy::missing_panics_doc,
    reason = "a tool of tests: its own faults end the test, at once and with a line number"
)]

pub mod clock;
pub mod disk;
pub mod pattern;
pub mod reference;
pub mod seed;
