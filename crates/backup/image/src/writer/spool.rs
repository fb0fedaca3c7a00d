//! A file of records, each of some blocks of one leaf, found by the leaf, newest first.
//!
//! ```text
//!   leaf ─▶ its newest record ─▶ the one before it ─▶ …        RecordHead: leaf, mask, previous, length, checksum │ a leaf's page
//!   └ in memory, 8 bytes a leaf   └ each names its predecessor, which lies before it in the file
//! ```
//! The file is of this process alone and dies with it. What comes back is looked at all the same: it lay on somebody's disk.
//!
//! **Invariant**: a record that is read is one that was written for that leaf, whole; a chain of records ends.

use crate::error::ImageError;
use blktide_format::entry::FAN_OUT;
use blktide_format::object::crc64;
use blktide_format::page::PAGE_BYTES_MAX;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Bytes of a record before its page.
const HEAD_BYTES: u64 = 40;
/// Where a chain ends.
const NONE: u64 = u64::MAX;
/// Newest records of that many neighbouring leaves lie together in memory.
const GROUP: u64 = FAN_OUT;

/// A record as it comes back.
#[derive(Debug)]
pub(super) struct Record {
    /// The blocks of the leaf that it tells of.
    pub(super) mask: u64,
    /// What they are: a leaf's page.
    pub(super) page: Vec<u8>,
    /// Where the record before it lies.
    pub(super) previous: Option<u64>,
}

/// The file, and where each leaf's newest record lies in it. Used by several threads at once.
#[derive(Debug)]
pub(super) struct Spool {
    file: File,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    end: u64,
    newest: BTreeMap<u64, Box<[u64]>>,
    is_failed: bool,
}

impl State {
    fn slot(&mut self, leaf: u64) -> Option<&mut u64> {
        let group = self
            .newest
            .entry(leaf / GROUP)
            .or_insert_with(|| (0..GROUP).map(|_| NONE).collect());
        group.get_mut(usize::try_from(leaf % GROUP).ok()?)
    }
}

impl Spool {
    /// Writes from the start of `file`, over whatever it holds.
    pub(super) fn new(file: File) -> Self {
        Self {
            file,
            state: Mutex::default(),
        }
    }

    /// Adds a record. Of two calls one after another the later one's is the newer.
    ///
    /// Errors: then the spool has failed for good.
    pub(super) fn append(&self, leaf: u64, mask: u64, page: &[u8]) -> Result<(), ImageError> {
        let length = u32::try_from(page.len()).map_err(|e| invalid(io::Error::other(e)))?;
        let mut state = self.lock();
        if state.is_failed {
            return Err(failed());
        }
        let offset = state.end;
        state.end = offset
            .saturating_add(HEAD_BYTES)
            .saturating_add(length.into());
        let previous = state
            .slot(leaf)
            .map_or(NONE, |slot| core::mem::replace(slot, offset));
        drop(state);
        let mut bytes = Vec::with_capacity(page.len().saturating_add(64));
        for word in [leaf, mask, previous, length.into()] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        let checksum = crc64(&[&offset.to_le_bytes(), &bytes, page]);
        bytes.extend_from_slice(&checksum.to_le_bytes());
        bytes.extend_from_slice(page);
        self.file.write_all_at(&bytes, offset).map_err(|source| {
            self.lock().is_failed = true;
            ImageError::Spool {
                op: "written",
                source,
            }
        })
    }

    /// Whether every record was written. Errors: else.
    pub(super) fn check(&self) -> Result<(), ImageError> {
        if self.lock().is_failed {
            return Err(failed());
        }
        Ok(())
    }

    /// Where the newest record of `leaf` lies.
    pub(super) fn newest(&self, leaf: u64) -> Option<u64> {
        let state = self.lock();
        let group = state.newest.get(&(leaf / GROUP))?;
        let offset = group.get(usize::try_from(leaf % GROUP).ok()?)?;
        Some(*offset).filter(|offset| *offset != NONE)
    }

    /// The record of `leaf` at `offset`.
    pub(super) fn read(&self, leaf: u64, offset: u64) -> Result<Record, ImageError> {
        let mut words = [[0; 8]; 5];
        self.read_at(words.as_flattened_mut(), offset)?;
        let [of, mask, previous, length, checksum] = words.map(u64::from_le_bytes);
        let fits = of == leaf
            && length <= PAGE_BYTES_MAX.into()
            && (previous == NONE || previous < offset);
        if !fits {
            return Err(damaged());
        }
        let mut page = vec![0; usize::try_from(length).unwrap_or(0)];
        self.read_at(&mut page, offset.saturating_add(HEAD_BYTES))?;
        let [head @ .., _] = &words;
        if crc64(&[&offset.to_le_bytes(), head.as_flattened(), &page]) != checksum {
            return Err(damaged());
        }
        Ok(Record {
            mask,
            page,
            previous: Some(previous).filter(|previous| *previous != NONE),
        })
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), ImageError> {
        self.file
            .read_exact_at(buf, offset)
            .map_err(|source| ImageError::Spool { op: "read", source })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What was read is not what was written.
pub(super) fn invalid(source: io::Error) -> ImageError {
    ImageError::Spool { op: "read", source }
}

fn damaged() -> ImageError {
    invalid(io::Error::new(
        io::ErrorKind::InvalidData,
        "a record is not as it was written",
    ))
}

fn failed() -> ImageError {
    ImageError::Spool {
        op: "written",
        source: io::Error::other("an earlier record could not be written"),
    }
}
