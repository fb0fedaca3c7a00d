//! An image: the tree of what the blocks are and where they lie.
//!
//! ```text
//!   ImageWriter: put(blocks) ─▶ zero test ─▶ digest ─▶ frame ─▶ pack        (many threads)
//!                    └ leaf complete ─▶ merge with the base's leaf ─▶ page ─▶ pack ─▶ … ─▶ root
//!   ImageReader: root ─▶ inner pages ─▶ leaf ─▶ frame ─▶ block, each verified by its parent's digest
//! ```
//!
//! **Invariant**: equal states of a volume have equal state ids, however and in whatever order they were written (P11).
#![forbid(unsafe_code)]

mod codec;
pub mod digest;
pub mod error;
pub mod reader;
pub mod verify;
pub mod writer;

#[cfg(test)]
mod commit_tests;
#[cfg(test)]
mod golden_tests;
#[cfg(test)]
mod testing;

pub use blktide_format::page::BlockKind;
pub use error::ImageError;
pub use reader::ImageReader;
pub use verify::{Damage, Depth, Proof, verify};
pub use writer::early::{EarlyBlocks, EarlyWriter};
pub use writer::{Committed, Content, ImageFacts, ImageWriter, Stored, WantedWords};
