//! The header that every object of a repository begins with, and the small objects' frame of header and body.
//!
//! ```text
//!   0            128
//!   ObjectHeader │ body …           small object: body_bytes and body_checksum are in the header
//!   ObjectHeader │ entries …        pack: neither, each entry has its own header (`entry`)
//!   ObjectHeader │ head, sections   manifest: the prefix has its own checksum (`manifest`)
//! ```
//!
//! **Invariant**: what decodes is whole, of this kind, and of the repository and volume that were asked for.

use crate::{FormatError, on_disk};
use blktide_types::id::{ObjectId, RepositoryId, SessionId, VolumeId};
use crc64fast::Digest as Crc64;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, IntoBytes};

/// Newest version written and read, of every kind of object.
pub const VERSION: u16 = 1;
/// Bytes of the header.
pub const HEADER_BYTES: usize = 128;
/// The largest body that a small object may have.
pub const BODY_BYTES_MAX: usize = 4096;

/// The kinds of objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum ObjectKind {
    /// The repository's own object.
    Repository = 1,
    /// A claim: `open`.
    Claim = 2,
    /// What became of a claim: `end`.
    End = 3,
    /// The manifest of an image.
    Manifest = 4,
    /// Frames and pages.
    Pack = 5,
}

impl ObjectKind {
    /// First bytes of such an object; the `\r\n` shows a transfer in text mode.
    pub const fn magic(self) -> [u8; 8] {
        match self {
            Self::Repository => *b"BTrepo\r\n",
            Self::Claim => *b"BTopen\r\n",
            Self::End => *b"BTend \r\n",
            Self::Manifest => *b"BTmani\r\n",
            Self::Pack => *b"BTpack\r\n",
        }
    }

    const fn number(self) -> u16 {
        self as u16
    }
}

on_disk! {
    /// Begins every object.
    pub struct ObjectHeader: 128 {
        /// `BTrepo`, `BTopen`, `BTend `, `BTmani` or `BTpack`, then `\r\n`.
        0 => pub magic: [u8; 8],
        /// Format version, 1.
        8 => pub version: U16,
        /// 1 repository, 2 claim, 3 end, 4 manifest, 5 pack.
        10 => pub kind: U16,
        /// Incompatible feature bits: an unknown one set, the object is refused.
        12 => pub incompat: U32,
        /// Compatible feature bits: unknown ones are ignored.
        16 => pub compat: U32,
        /// Cipher suite, 0 = plain.
        20 => pub suite: U32,
        /// Key, 0 = plain.
        24 => pub key: U64,
        /// The repository.
        32 => pub repository: [u8; 16],
        /// This object.
        48 => pub object: [u8; 16],
        /// The volume; zero in the repository's own object.
        64 => pub volume: [u8; 16],
        /// The run that wrote it, or whose claim it ends; zero in the repository's own object.
        80 => pub session: [u8; 16],
        /// Bytes after the header; zero in a pack.
        96 => pub body_bytes: U64,
        /// CRC-64 of the body; zero in a pack and in a manifest.
        104 => pub body_checksum: U64,
        /// Zero.
        112 => pub reserved: [u8; 8],
        /// CRC-64 of bytes 0 to 119.
        120 => pub checksum: U64,
    }
}

/// Who an object is and where it belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The repository.
    pub repository: RepositoryId,
    /// The object.
    pub object: ObjectId,
    /// The volume.
    pub volume: VolumeId,
    /// The run.
    pub session: SessionId,
}

/// What a reader knows beforehand of the object that it asks for; `None`: not known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Expected {
    /// The repository.
    pub repository: Option<RepositoryId>,
    /// The object.
    pub object: Option<ObjectId>,
    /// The volume.
    pub volume: Option<VolumeId>,
    /// The run.
    pub session: Option<SessionId>,
}

/// CRC-64/XZ of all `parts`, one after another.
pub fn crc64(parts: &[&[u8]]) -> u64 {
    let mut digest = Crc64::new();
    for part in parts {
        digest.write(part);
    }
    digest.sum64()
}

/// The id of object `counter` of a session: its first 12 bytes, then the counter, big-endian.
pub fn object_id(session: SessionId, counter: u32) -> ObjectId {
    let mut id = session.0;
    for (to, from) in id.iter_mut().skip(12).zip(counter.to_be_bytes()) {
        *to = from;
    }
    ObjectId(id)
}

/// Whether `object` was made by `session`.
pub fn is_of_session(object: ObjectId, session: SessionId) -> bool {
    object
        .0
        .iter()
        .zip(session.0)
        .take(12)
        .all(|(a, b)| *a == b)
}

/// Counter of a session's claim; packs count up from 0.
pub const COUNTER_CLAIM: u32 = u32::MAX;
/// Counter of a session's manifest.
pub const COUNTER_MANIFEST: u32 = u32::MAX - 1;
/// Counter of a session's end.
pub const COUNTER_END: u32 = u32::MAX - 2;

/// A header, checksum included.
pub fn encode_header(
    kind: ObjectKind,
    identity: Identity,
    body_bytes: u64,
    body_checksum: u64,
) -> ObjectHeader {
    let mut header = ObjectHeader {
        magic: kind.magic(),
        version: U16::new(VERSION),
        kind: U16::new(kind.number()),
        incompat: U32::new(0),
        compat: U32::new(0),
        suite: U32::new(0),
        key: U64::new(0),
        repository: identity.repository.0,
        object: identity.object.0,
        volume: identity.volume.0,
        session: identity.session.0,
        body_bytes: U64::new(body_bytes),
        body_checksum: U64::new(body_checksum),
        reserved: [0; 8],
        checksum: U64::new(0),
    };
    header.checksum = U64::new(header_checksum(&header));
    header
}

/// The header's bytes.
pub fn header_bytes(header: &ObjectHeader) -> &[u8] {
    header.as_bytes()
}

/// A small object: header and body.
pub fn encode_small(kind: ObjectKind, identity: Identity, body: &[u8]) -> Vec<u8> {
    let length = u64::try_from(body.len()).unwrap_or(u64::MAX);
    let mut out = encode_header(kind, identity, length, crc64(&[body]))
        .as_bytes()
        .to_vec();
    out.extend_from_slice(body);
    out
}

/// The header at the start of `bytes`, checked, and its identity.
pub fn decode_header(
    bytes: &[u8],
    kind: ObjectKind,
    expected: Expected,
) -> Result<(ObjectHeader, Identity), FormatError> {
    let Ok((header, _)) = ObjectHeader::read_from_prefix(bytes) else {
        return Err(length(HEADER_BYTES, bytes.len()));
    };
    if header.magic != kind.magic() {
        return Err(FormatError::Magic {
            found: header.magic,
        });
    }
    // The version stands before the checksum: a later one may compute it otherwise.
    if header.version.get() != VERSION {
        return Err(FormatError::Version {
            found: header.version.get(),
            supported: VERSION,
        });
    }
    let computed = header_checksum(&header);
    if header.checksum.get() != computed {
        return Err(FormatError::Checksum {
            found: header.checksum.get(),
            computed,
        });
    }
    if header.incompat.get() != 0 {
        return Err(FormatError::Feature {
            bits: header.incompat.get(),
        });
    }
    field(
        "kind",
        header.kind.get() == kind.number(),
        header.kind.get(),
    )?;
    field("suite", header.suite.get() == 0, header.suite.get())?;
    field("key", header.key.get() == 0, header.key.get())?;
    field("reserved", header.reserved == [0; 8], u64::MAX)?;
    let identity = Identity {
        repository: RepositoryId(header.repository),
        object: ObjectId(header.object),
        volume: VolumeId(header.volume),
        session: SessionId(header.session),
    };
    belongs("repository", expected.repository, identity.repository)?;
    belongs("volume", expected.volume, identity.volume)?;
    belongs("session", expected.session, identity.session)?;
    belongs("object", expected.object, identity.object)?;
    Ok((header, identity))
}

/// The body of a small object, checked.
pub fn decode_small(
    bytes: &[u8],
    kind: ObjectKind,
    expected: Expected,
) -> Result<(Identity, &[u8]), FormatError> {
    let (header, identity) = decode_header(bytes, kind, expected)?;
    let body = bytes.get(HEADER_BYTES..).unwrap_or_default();
    let need = header.body_bytes.get();
    if u64::try_from(body.len()).unwrap_or(u64::MAX) != need {
        return Err(FormatError::Length {
            need: need.saturating_add(128),
            have: u64::try_from(bytes.len()).unwrap_or(u64::MAX),
        });
    }
    let computed = crc64(&[body]);
    if header.body_checksum.get() != computed {
        return Err(FormatError::Checksum {
            found: header.body_checksum.get(),
            computed,
        });
    }
    Ok((identity, body))
}

/// `Err` unless `holds`.
pub(crate) fn field(
    field: &'static str,
    holds: bool,
    value: impl Into<u64>,
) -> Result<(), FormatError> {
    if holds {
        Ok(())
    } else {
        Err(FormatError::Field {
            field,
            value: value.into(),
        })
    }
}

/// The error of a wrong length.
pub(crate) fn length(need: usize, have: usize) -> FormatError {
    FormatError::Length {
        need: u64::try_from(need).unwrap_or(u64::MAX),
        have: u64::try_from(have).unwrap_or(u64::MAX),
    }
}

/// Text in a fixed field, cut at a character's edge, the rest zero.
pub(crate) fn encode_text<const N: usize>(text: &str) -> [u8; N] {
    let mut out = [0; N];
    let mut at = 0_usize;
    for c in text.chars().filter(|c| *c != '\0') {
        let mut bytes = [0; 4];
        let bytes = c.encode_utf8(&mut bytes).as_bytes();
        let end = at.saturating_add(bytes.len());
        let Some(to) = out.get_mut(at..end) else {
            break;
        };
        to.copy_from_slice(bytes);
        at = end;
    }
    out
}

/// Text of a fixed field; what lies behind it must be zero.
pub(crate) fn decode_text(bytes: &[u8], name: &'static str) -> Result<String, FormatError> {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    let (text, rest) = bytes.split_at(end);
    field(name, rest.iter().all(|b| *b == 0), u64::MAX)?;
    match core::str::from_utf8(text) {
        Ok(text) => Ok(text.to_owned()),
        Err(_not_utf8) => Err(FormatError::Field {
            field: name,
            value: u64::MAX,
        }),
    }
}

fn belongs<T: PartialEq + Copy>(
    field: &'static str,
    expected: Option<T>,
    found: T,
) -> Result<(), FormatError> {
    match expected {
        Some(expected) if expected != found => Err(FormatError::Identity { field }),
        Some(_) | None => Ok(()),
    }
}

fn header_checksum(header: &ObjectHeader) -> u64 {
    let (covered, _) = header
        .as_bytes()
        .split_at(core::mem::offset_of!(ObjectHeader, checksum));
    crc64(&[covered])
}

#[cfg(test)]
mod tests;
