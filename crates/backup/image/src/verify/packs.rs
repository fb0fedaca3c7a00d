//! That every byte of every pack was looked at, and that its entries are all there.
//!
//! Entries come by way of the tree, in any order. When those of a pack add up to its length, the digest of their headers must
//! be the one in the pack table. What does not add up in the end (an older image is gone) is read from its start.

use super::{Search, lock};
use blktide_format::FormatError;
use blktide_format::entry::{self, EntryHeader, HEADER_BYTES};
use blktide_format::manifest::PackRow;
use blktide_format::object::{self, Expected, ObjectKind, crc64, decode_header};
use blktide_repo::name;
use blktide_types::id::{Digest, ObjectId, VolumeId};
use std::collections::BTreeMap;
use std::sync::Mutex;

/// Headers that are kept at most: beyond, a pack is read from its start at the end.
const HEADERS_MAX: usize = 200_000;
/// Bytes of one request.
const PIECE_BYTES: usize = 4 << 20;

#[derive(Default)]
pub(super) struct Packs {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    packs: BTreeMap<ObjectId, Pack>,
    headers: usize,
}

struct Pack {
    row: PackRow,
    covered_bytes: u64,
    headers: BTreeMap<u32, Vec<u8>>,
    state: Looked,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Looked {
    /// Entries are being gathered.
    Gathering,
    /// Too many headers: to be read from its start.
    ToScan,
    /// All was looked at.
    Done,
}

impl Packs {
    pub(super) fn clear(&self) {
        *lock(&self.state) = State::default();
    }

    /// A pack of an image's table. False: an earlier image said otherwise of it.
    pub(super) fn expect(&self, row: &PackRow) -> bool {
        let mut state = lock(&self.state);
        let pack = state.packs.entry(row.pack).or_insert_with(|| Pack {
            row: *row,
            covered_bytes: u64::from(128_u32),
            headers: BTreeMap::new(),
            state: Looked::Gathering,
        });
        pack.row.bytes == row.bytes
            && pack.row.digest == row.digest
            && pack.row.entries == row.entries
    }

    /// An entry that was looked at. Returns the pack's headers, in order, once they are complete.
    pub(super) fn looked_at(
        &self,
        pack: ObjectId,
        offset_bytes: u32,
        header: &[u8],
        entry_bytes: u64,
    ) -> Option<(PackRow, Vec<Vec<u8>>)> {
        let mut state = lock(&self.state);
        let is_full = state.headers >= HEADERS_MAX;
        let entry = state.packs.get_mut(&pack)?;
        if entry.state != Looked::Gathering {
            return None;
        }
        if is_full {
            let dropped = std::mem::take(&mut entry.headers).len();
            entry.state = Looked::ToScan;
            state.headers = state.headers.saturating_sub(dropped);
            return None;
        }
        if entry
            .headers
            .insert(offset_bytes, header.to_vec())
            .is_some()
        {
            return None;
        }
        entry.covered_bytes = entry.covered_bytes.saturating_add(entry_bytes);
        let complete = (entry.covered_bytes == entry.row.bytes).then(|| {
            entry.state = Looked::Done;
            let headers = std::mem::take(&mut entry.headers);
            (entry.row, headers.into_values().collect::<Vec<_>>())
        });
        state.headers = state.headers.saturating_add(1);
        if let Some((_, headers)) = &complete {
            state.headers = state.headers.saturating_sub(headers.len());
        }
        complete
    }

    fn rest(&self) -> Vec<PackRow> {
        let state = lock(&self.state);
        let open = state.packs.values().filter(|p| p.state != Looked::Done);
        open.map(|p| p.row).collect()
    }
}

/// Checks a pack all of whose entries were looked at: its own header, and that these are the entries it was made of.
pub(super) fn complete(search: &Search<'_>, volume: VolumeId, row: &PackRow, headers: &[Vec<u8>]) {
    let pack = name::pack(volume, row.pack);
    let mut header = vec![0; object::HEADER_BYTES];
    let read = search
        .repository
        .pack_part(volume, row.pack, 0, &mut header);
    let checked = match read {
        Ok(len) => {
            header.truncate(len);
            check_header(search, volume, row, &header)
        }
        Err(e) => {
            search.note_object(Some(volume), None, pack, &e);
            return;
        }
    };
    search.count(u64::from(128_u32));
    let mut hasher = blake3::Hasher::new();
    hasher.update(&header);
    for entry in headers {
        hasher.update(entry);
    }
    let checked = checked.and_then(|()| check_digest(row, &hasher, headers.len()));
    if let Err(e) = checked {
        search.note_object(Some(volume), None, pack, &e);
    }
}

fn check_header(
    search: &Search<'_>,
    volume: VolumeId,
    row: &PackRow,
    header: &[u8],
) -> Result<(), FormatError> {
    let expected = Expected {
        repository: Some(search.repository.id()),
        object: Some(row.pack),
        volume: Some(volume),
        session: None,
    };
    let (header, identity) = decode_header(header, ObjectKind::Pack, expected)?;
    if !object::is_of_session(row.pack, identity.session) {
        return Err(FormatError::Identity { field: "session" });
    }
    if header.body_bytes.get() != 0 || header.body_checksum.get() != 0 {
        return Err(FormatError::Field {
            field: "body_bytes",
            value: header.body_bytes.get(),
        });
    }
    Ok(())
}

fn check_digest(row: &PackRow, hasher: &blake3::Hasher, entries: usize) -> Result<(), FormatError> {
    if u32::try_from(entries) != Ok(row.entries) {
        return Err(FormatError::Field {
            field: "entries",
            value: u64::try_from(entries).unwrap_or(u64::MAX),
        });
    }
    if Digest(*hasher.finalize().as_bytes()) != row.digest {
        return Err(FormatError::Identity { field: "digest" });
    }
    Ok(())
}

/// Reads packs of which not all was looked at.
pub(super) fn scan_rest(search: &Search<'_>, volume: VolumeId) {
    for row in search.packs.rest() {
        if search.is_ended() {
            return;
        }
        let pack = name::pack(volume, row.pack);
        match scan(search, volume, &row) {
            Ok(Ok(())) => {}
            Ok(Err(e)) => search.note_object(Some(volume), None, pack, &e),
            Err(e) => search.note_object(Some(volume), None, pack, &e),
        }
    }
}

/// One pack from its start: every header and every payload by its checksum.
fn scan(
    search: &Search<'_>,
    volume: VolumeId,
    row: &PackRow,
) -> Result<Result<(), FormatError>, blktide_repo::RepoError> {
    let mut buf = vec![0; PIECE_BYTES];
    let mut hasher = blake3::Hasher::new();
    let (mut at, mut entries) = (0_u64, 0_usize);
    while at < row.bytes {
        let len = search
            .repository
            .pack_part(volume, row.pack, at, &mut buf)?;
        let mut rest = buf.get(..len).unwrap_or_default();
        let before = at;
        if at == 0 {
            let (header, after) = rest
                .split_at_checked(object::HEADER_BYTES)
                .unwrap_or((rest, &[]));
            if let Err(e) = check_header(search, volume, row, header) {
                return Ok(Err(e));
            }
            hasher.update(header);
            (rest, at) = (after, 128);
        }
        loop {
            match entry_at(row.pack, at, rest) {
                Ok(Some((header, whole))) => {
                    hasher.update(entry::header_bytes(&header));
                    entries = entries.saturating_add(1);
                    rest = rest.get(whole..).unwrap_or_default();
                    at = at.saturating_add(u64::try_from(whole).unwrap_or(0));
                }
                Ok(None) => break,
                Err(e) => return Ok(Err(e)),
            }
        }
        if at == before {
            return Ok(Err(FormatError::Length {
                need: row.bytes,
                have: at,
            }));
        }
        if !search.count(at.saturating_sub(before)) {
            return Ok(Ok(()));
        }
    }
    Ok(check_digest(row, &hasher, entries))
}

/// The entry at the start of `bytes` and its whole length; `None` if not all of it is there.
fn entry_at(
    pack: ObjectId,
    at: u64,
    bytes: &[u8],
) -> Result<Option<(EntryHeader, usize)>, FormatError> {
    let header_bytes = usize::try_from(HEADER_BYTES).unwrap_or(0);
    if bytes.len() < header_bytes {
        return Ok(None);
    }
    let offset = u32::try_from(at).unwrap_or(u32::MAX);
    let (facts, header) = entry::decode(bytes, pack, offset)?;
    let stored = usize::try_from(facts.stored_bytes).unwrap_or(usize::MAX);
    let whole = header_bytes.saturating_add(stored);
    let Some(payload) = bytes.get(header_bytes..whole) else {
        return Ok(None);
    };
    let computed = crc64(&[payload]);
    if computed != facts.payload_checksum {
        return Err(FormatError::Checksum {
            found: facts.payload_checksum,
            computed,
        });
    }
    Ok(Some((header, whole)))
}
