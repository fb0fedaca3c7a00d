//! Every byte that outlives the process or leaves it, and how it is checked.
//!
//! One module is one file type. A module declares its structures with [`on_disk!`], which
//! fixes each offset at compile time and yields the table that `docs/format.md` shows.
//! Decoding never panics, never trusts a length, and never returns unchecked data.
#![forbid(unsafe_code)]
#![expect(
    missing_debug_implementations,
    reason = "zerocopy's derives make types of their own that the lint sees inside a macro"
)]
#![warn(clippy::arithmetic_side_effects)]

pub mod bitmap_file;
pub mod claim;
pub mod entry;
mod error;
mod layout;
pub mod manifest;
pub mod marker;
pub mod object;
pub mod page;
pub mod repository;
pub mod runs;
pub mod shared;

pub use error::FormatError;
pub use layout::{Field, Layout};

/// Layouts of all structures, in the order of `docs/format.md`.
pub const LAYOUTS: &[Layout] = &[
    object::ObjectHeader::LAYOUT,
    repository::RepositoryBody::LAYOUT,
    claim::ClaimBody::LAYOUT,
    claim::EndBody::LAYOUT,
    entry::EntryHeader::LAYOUT,
    page::PageHead::LAYOUT,
    page::PlaceRecord::LAYOUT,
    manifest::ManifestHead::LAYOUT,
    manifest::RootRecord::LAYOUT,
    manifest::SectionRecord::LAYOUT,
    manifest::PackRecord::LAYOUT,
    bitmap_file::BitmapHeader::LAYOUT,
    bitmap_file::GenerationHead::LAYOUT,
    bitmap_file::EvidenceBlock::LAYOUT,
    marker::MarkerBlock::LAYOUT,
    shared::control::LAYOUT,
    shared::queue::LAYOUT,
    shared::table::LAYOUT,
    shared::generation::LAYOUT,
    shared::hint::LAYOUT,
    shared::states::LAYOUT,
    shared::index::LAYOUT,
    shared::slot::LAYOUT,
    shared::watch::LAYOUT,
    shared::sample::LAYOUT,
];
