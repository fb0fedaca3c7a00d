//! Getting entries out of packs: neighbours with one request, each header checked against what the tree says.

use super::ImageReader;
use crate::error::ImageError;
use blktide_format::entry::{self, EntryFacts, EntryKind, HEADER_BYTES, Place};
use blktide_format::object::crc64;
use blktide_format::{FormatError, page};
use blktide_repo::{RepoError, StoreError, name};
use blktide_types::range::BlockRange;

/// Bytes that one request asks for at most, entries larger than that alone excepted.
const REQUEST_BYTES_MAX: u64 = 2 << 20;
/// Bytes between two entries that are rather read than skipped.
const GAP_BYTES_MAX: u64 = 64 << 10;

/// An entry that is needed, and what the tree says of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    /// Where it lies.
    pub(crate) place: Place,
    /// What it is; `None`: a frame, whichever blocks it holds.
    pub(crate) kind: Option<EntryKind>,
    /// First block of the leaf, or of what the page covers.
    pub(crate) first_block: u64,
}

impl Wanted {
    /// The page of `level` whose blocks are `range`.
    pub(crate) const fn page(level: u8, range: BlockRange, place: &Place) -> Self {
        Self {
            place: *place,
            kind: Some(EntryKind::Page { level }),
            first_block: range.start().0,
        }
    }
}

/// An entry as it was found.
pub(crate) struct Found<'a> {
    /// Its header.
    pub(crate) header: &'a [u8],
    /// Its payload as stored.
    pub(crate) payload: &'a [u8],
    /// What its header says.
    pub(crate) facts: EntryFacts,
}

/// One entry's payload.
pub(crate) fn one(
    reader: &ImageReader,
    wanted: &Wanted,
    range: BlockRange,
) -> Result<Vec<u8>, ImageError> {
    let mut result = Err(ImageError::Misuse("no entry"));
    many(reader, &[*wanted], range, &mut |_, found| {
        result = found.map(|f| f.payload.to_vec());
    });
    result
}

/// Reads all of `wanted`, which is sorted by pack and offset, and hands each to `each` by its position in `wanted`.
/// `range` is what an error names.
pub(crate) fn many(
    reader: &ImageReader,
    wanted: &[Wanted],
    range: BlockRange,
    each: &mut dyn FnMut(usize, Result<Found<'_>, ImageError>),
) {
    let mut next = 0;
    let mut buf = Vec::new();
    while let Some(first) = wanted.get(next) {
        let start = u64::from(first.place.offset_bytes);
        let mut end = first.place.end_bytes();
        let rest = wanted.get(next..).unwrap_or_default();
        let with = |w: &&Wanted| {
            let (from, to) = (u64::from(w.place.offset_bytes), w.place.end_bytes());
            let joins = w.place.pack == first.place.pack
                && from <= end.saturating_add(GAP_BYTES_MAX)
                && to.saturating_sub(start) <= REQUEST_BYTES_MAX;
            if joins {
                end = end.max(to);
            }
            joins
        };
        let count = rest.iter().take_while(with).count().max(1);
        // A place's sizes have been checked: an entry has at most 1 MiB, a request twice that.
        buf.resize(usize::try_from(end.saturating_sub(start)).unwrap_or(0), 0);
        let volume = reader.head().volume;
        let read = reader
            .repository()
            .pack_part(volume, first.place.pack, start, &mut buf);
        for (i, w) in rest.iter().enumerate().take(count) {
            let found = match &read {
                Ok(len) => check(buf.get(..*len).unwrap_or_default(), start, w)
                    .map_err(|e| damaged(reader, w, range, Some(e))),
                Err(e) => Err(unread(reader, w, range, e)),
            };
            each(next.saturating_add(i), found);
        }
        next = next.saturating_add(count);
    }
}

/// The entry in bytes that were read from `start` on.
fn check<'a>(bytes: &'a [u8], start: u64, wanted: &Wanted) -> Result<Found<'a>, FormatError> {
    let place = &wanted.place;
    let at = u64::from(place.offset_bytes).saturating_sub(start);
    let at = usize::try_from(at).unwrap_or(usize::MAX);
    let entry = bytes.get(at..).unwrap_or_default();
    let (facts, _) = entry::decode(entry, place.pack, place.offset_bytes)?;
    let is_meant = facts.codec == place.codec
        && facts.raw_bytes == place.raw_bytes
        && facts.stored_bytes == place.stored_bytes
        && facts.first_block == wanted.first_block
        && match (wanted.kind, facts.kind) {
            (Some(kind), found) => kind == found,
            (None, EntryKind::Frame { .. }) => true,
            (None, EntryKind::Page { .. }) => false,
        };
    if !is_meant {
        return Err(FormatError::Identity { field: "place" });
    }
    let header_bytes = usize::try_from(HEADER_BYTES).unwrap_or(0);
    let stored = usize::try_from(facts.stored_bytes).unwrap_or(usize::MAX);
    let cut = FormatError::Length {
        need: u64::from(facts.stored_bytes),
        have: u64::try_from(entry.len()).unwrap_or(u64::MAX),
    };
    let (Some(header), Some(payload)) = (
        entry.get(..header_bytes),
        entry.get(header_bytes..header_bytes.saturating_add(stored)),
    ) else {
        return Err(cut);
    };
    let computed = crc64(&[payload]);
    if computed != facts.payload_checksum {
        return Err(FormatError::Checksum {
            found: facts.payload_checksum,
            computed,
        });
    }
    Ok(Found {
        header,
        payload,
        facts,
    })
}

fn damaged(
    reader: &ImageReader,
    wanted: &Wanted,
    range: BlockRange,
    source: Option<FormatError>,
) -> ImageError {
    let what = match wanted.kind {
        Some(EntryKind::Page { .. }) => "a page",
        Some(EntryKind::Frame { .. }) | None => "a frame",
    };
    ImageError::Damaged {
        range,
        object: name::pack(reader.head().volume, wanted.place.pack),
        what,
        source,
    }
}

/// A pack that is gone is damage; a store that fails is a failure. The error is shared by several entries, hence copied.
fn unread(
    reader: &ImageReader,
    wanted: &Wanted,
    range: BlockRange,
    error: &RepoError,
) -> ImageError {
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "a pack's part can only fail in the store"
    )]
    match error {
        RepoError::Store {
            source: StoreError::NotFound,
            name,
            ..
        } => ImageError::Damaged {
            range,
            object: name.clone(),
            what: "a pack that is gone",
            source: None,
        },
        RepoError::Store {
            verb,
            name,
            source: StoreError::Io(e),
        } => RepoError::Store {
            verb,
            name: name.clone(),
            source: StoreError::Io(std::io::Error::new(e.kind(), e.to_string())),
        }
        .into(),
        _ => damaged(reader, wanted, range, None),
    }
}

/// Blocks of the leaf that `block` lies in.
pub(super) const fn leaf_of(block: u64) -> u64 {
    block / entry::FAN_OUT
}

const _: () = assert!(page::PAGE_BYTES_MAX < entry::PAYLOAD_BYTES_MAX);
