//! The manifest of an image: its fixed head, and the directory of its sections (P12).
//!
//! **Invariant**: head, directory and root lie in the first [`PREFIX_BYTES`]; reading these opens an image, whatever
//! its history. The directory names the digest of every section, so the prefix's digest stands for the whole manifest.

use crate::entry::{Codec, LEVEL_MAX, Place, check_sizes};
use crate::object::{
    self, COUNTER_MANIFEST, Expected, Identity, ObjectKind, crc64, field, length, object_id,
};
use crate::page::{BlockKind, Child};
use crate::{FormatError, on_disk};
use blktide_types::id::{Digest, ObjectId, RepositoryId, VolumeId};
use zerocopy::little_endian::{I64, U16, U32, U64};
use zerocopy::{FromBytes, IntoBytes};

mod facts;
mod head;

pub use facts::{Consistency, Counters, ImageHead, ImageKind, KindCounts};
use head::{decode_head, encode_head};

/// Bytes at the start of a manifest that hold head, directory and root.
pub const PREFIX_BYTES: usize = 4096;

/// Most sections that a manifest has.
pub const SECTIONS_MAX: usize = 32;
/// Section of the pack table.
pub const SECTION_PACKS: u16 = 2;
/// Section of the changed set: as the tracker claimed it.
pub const SECTION_CHANGED: u16 = 3;
/// Section of the file system's evidence.
pub const SECTION_EVIDENCE: u16 = 4;

const HEAD_AT: usize = object::HEADER_BYTES;
const ROOT_AT: usize = 1152;
const DIRECTORY_AT: usize = 1280;
const CHECKSUM_AT: usize = PREFIX_BYTES - 8;

on_disk! {
    /// The head of a manifest, at byte 128. Never encrypted.
    pub struct ManifestHead: 1024 {
        /// The image.
        0 => pub image: [u8; 16],
        /// The machine.
        16 => pub host: [u8; 16],
        /// The image that it shares blocks with; zero without one.
        32 => pub base: [u8; 16],
        /// The generation that opened at the instant; zero if nothing tracks.
        48 => pub generation: [u8; 16],
        /// Name of the digests' key.
        64 => pub domain: [u8; 16],
        /// Group of images of one instant; zero: none.
        80 => pub group: [u8; 16],
        /// BLAKE3 of the first 4096 bytes of the previous image's manifest; zero if there was none.
        96 => pub previous: [u8; 32],
        /// State id: digest of what all blocks are.
        128 => pub state: [u8; 32],
        /// State id of the base; zero without one.
        160 => pub base_state: [u8; 32],
        /// Number of the image.
        192 => pub sequence: U64,
        /// Number of the base; 0 without one.
        200 => pub base_sequence: U64,
        /// Bytes of the volume.
        208 => pub volume_bytes: U64,
        /// The instant, nanoseconds since 1970 UTC; shown only.
        216 => pub instant: I64,
        /// The commit, nanoseconds since 1970 UTC; shown only.
        224 => pub committed: I64,
        /// 1 full, 2 incremental, 3 digest.
        232 => pub kind: u8,
        /// Why it is not incremental: the number of a reason; 0: it is.
        233 => pub reason: u8,
        /// 1 unmounted, 2 frozen, 3 instant, 4 none.
        234 => pub consistency: u8,
        /// log2 of the block size.
        235 => pub block_shift: u8,
        /// log2 of the tracker's grain.
        236 => pub grain_shift: u8,
        /// log2 of the logical sector.
        237 => pub logical_sector_shift: u8,
        /// log2 of the physical sector.
        238 => pub physical_sector_shift: u8,
        /// Bytes of a block's digest: 32.
        239 => pub digest_bytes: u8,
        /// Bytes read from the volume.
        240 => pub read_bytes: U64,
        /// Bytes of the blocks that the tracker called changed.
        248 => pub changed_bytes: U64,
        /// Bytes added to the repository in packs.
        256 => pub stored_bytes: U64,
        /// Bytes of originals preserved for it.
        264 => pub preserved_bytes: U64,
        /// How long the backup took, nanoseconds.
        272 => pub duration: U64,
        /// The longest that a write waited for it, nanoseconds.
        280 => pub longest_wait: U64,
        /// The longest freeze, nanoseconds.
        288 => pub longest_freeze: U64,
        /// Blocks with content.
        296 => pub blocks_data: U64,
        /// Blocks of zeroes.
        304 => pub blocks_zero: U64,
        /// Blocks not read because unused.
        312 => pub blocks_absent: U64,
        /// Blocks left out as asked.
        320 => pub blocks_excluded: U64,
        /// Blocks that could not be read.
        328 => pub blocks_unreadable: U64,
        /// Name of the volume, UTF-8, zero-filled.
        336 => pub volume_name: [u8; 64],
        /// Name of the machine, UTF-8, zero-filled.
        400 => pub host_name: [u8; 64],
        /// What identifies the device, UTF-8, zero-filled.
        464 => pub device: [u8; 128],
        /// Zero.
        592 => pub reserved: [u8; 432],
    }
}

on_disk! {
    /// The root section, at byte 1152: what the topmost page is, and where.
    pub struct RootRecord: 128 {
        /// A block kind: all blocks are of it, and the rest is zero. 15: a page.
        0 => pub kind: u8,
        /// Level of the page.
        1 => pub level: u8,
        /// 0 raw, 1 zstd.
        2 => pub codec: u8,
        /// Zero.
        3 => pub reserved: [u8; 5],
        /// Content digest.
        8 => pub content: [u8; 32],
        /// BLAKE3 of the page as stored.
        40 => pub physical: [u8; 32],
        /// The pack that it lies in.
        72 => pub pack: [u8; 16],
        /// Offset of the entry's header in the pack.
        88 => pub offset: U32,
        /// Bytes of the payload there.
        92 => pub stored_bytes: U32,
        /// Bytes of the payload once decompressed.
        96 => pub raw_bytes: U32,
        /// Zero.
        100 => pub reserved_more: [u8; 28],
    }
}

on_disk! {
    /// One section in the directory, which begins at byte 1288 after an 8-byte count; unused rows are zero.
    pub struct SectionRecord: 56 {
        /// 2 pack table, 3 changed set, 4 evidence; 5 to 31 are reserved.
        0 => pub id: U16,
        /// Bit 0: a reader that does not know the section refuses the image.
        2 => pub flags: U16,
        /// Zero.
        4 => pub reserved: U32,
        /// Where it begins: each right behind the one before, the first at 4096.
        8 => pub offset: U64,
        /// Its length.
        16 => pub bytes: U64,
        /// BLAKE3 of it.
        24 => pub digest: [u8; 32],
    }
}

on_disk! {
    /// One pack in the pack table, ascending by id.
    pub struct PackRecord: 72 {
        /// The pack.
        0 => pub pack: [u8; 16],
        /// Its length.
        16 => pub bytes: U64,
        /// BLAKE3 of its header and of its entries' headers, in order.
        24 => pub digest: [u8; 32],
        /// Frames in it that this image uses.
        56 => pub frames: U32,
        /// Pages in it that this image uses.
        60 => pub pages: U32,
        /// Entries in it, used or not.
        64 => pub entries: U32,
        /// Zero.
        68 => pub reserved: U32,
    }
}

/// A section outside the prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Section {
    /// Which.
    pub id: u16,
    /// Whether a reader must know it.
    pub is_critical: bool,
    /// Where it begins.
    pub offset_bytes: u64,
    /// Its length.
    pub bytes: u64,
    /// BLAKE3 of it.
    pub digest: Digest,
}

/// A pack that an image uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackRow {
    /// The pack.
    pub pack: ObjectId,
    /// Its length.
    pub bytes: u64,
    /// BLAKE3 of its header and of its entries' headers, in order.
    pub digest: Digest,
    /// Frames in it that the image uses.
    pub frames: u32,
    /// Pages in it that the image uses.
    pub pages: u32,
    /// Entries in it, used or not.
    pub entries: u32,
}

/// What the prefix of a manifest says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prefix {
    /// The image's facts.
    pub head: ImageHead,
    /// The tree.
    pub root: Child,
    /// The other sections, in order.
    pub sections: Vec<Section>,
}

impl Prefix {
    /// Length of the whole manifest.
    pub fn manifest_bytes(&self) -> u64 {
        self.sections
            .last()
            .map_or(4096, |s| s.offset_bytes.saturating_add(s.bytes))
    }

    /// The section `id`.
    pub fn section(&self, id: u16) -> Option<&Section> {
        self.sections.iter().find(|s| s.id == id)
    }
}

/// The first [`PREFIX_BYTES`] of a manifest.
pub fn encode_prefix(repository: RepositoryId, prefix: &Prefix) -> Vec<u8> {
    let head = &prefix.head;
    let identity = Identity {
        repository,
        object: object_id(head.session, COUNTER_MANIFEST),
        volume: head.volume,
        session: head.session,
    };
    let body = prefix.manifest_bytes().saturating_sub(128);
    let header = object::encode_header(ObjectKind::Manifest, identity, body, 0);
    let mut out = header.as_bytes().to_vec();
    out.extend_from_slice(encode_head(head).as_bytes());
    out.extend_from_slice(encode_root(&prefix.root, root_level_of(head)).as_bytes());
    let count = u64::try_from(prefix.sections.len()).unwrap_or(u64::MAX);
    out.extend_from_slice(&count.to_le_bytes());
    for section in prefix.sections.iter().take(SECTIONS_MAX) {
        let record = SectionRecord {
            id: U16::new(section.id),
            flags: U16::new(section.is_critical.into()),
            reserved: U32::new(0),
            offset: U64::new(section.offset_bytes),
            bytes: U64::new(section.bytes),
            digest: section.digest.0,
        };
        out.extend_from_slice(record.as_bytes());
    }
    out.resize(CHECKSUM_AT, 0);
    let checksum = crc64(&[&out]);
    out.extend_from_slice(&checksum.to_le_bytes());
    out
}

/// What the prefix in `bytes` says: the manifest of `volume` at `sequence`. More bytes may follow.
pub fn decode_prefix(
    bytes: &[u8],
    repository: RepositoryId,
    volume: VolumeId,
    sequence: u64,
) -> Result<Prefix, FormatError> {
    let expected = Expected {
        repository: Some(repository),
        volume: Some(volume),
        ..Expected::default()
    };
    let (header, identity) = object::decode_header(bytes, ObjectKind::Manifest, expected)?;
    let Some(prefix) = bytes.get(..PREFIX_BYTES) else {
        return Err(length(PREFIX_BYTES, bytes.len()));
    };
    let (covered, checksum) = prefix.split_at(CHECKSUM_AT);
    let found = U64::read_from_bytes(checksum).map_or(0, U64::get);
    let computed = crc64(&[covered]);
    if found != computed {
        return Err(FormatError::Checksum { found, computed });
    }
    if identity.object != object_id(identity.session, COUNTER_MANIFEST) {
        return Err(FormatError::Identity { field: "object" });
    }
    let Ok(record) = ManifestHead::read_from_bytes(prefix.get(HEAD_AT..ROOT_AT).unwrap_or(&[]))
    else {
        return Err(length(PREFIX_BYTES, bytes.len()));
    };
    if record.sequence.get() != sequence {
        return Err(FormatError::Identity { field: "sequence" });
    }
    let head = decode_head(&record, volume, identity.session)?;
    let Ok(root) = RootRecord::read_from_bytes(prefix.get(ROOT_AT..DIRECTORY_AT).unwrap_or(&[]))
    else {
        return Err(length(PREFIX_BYTES, bytes.len()));
    };
    let root = decode_root(&root, root_level_of(&head))?;
    let sections = decode_sections(prefix.get(DIRECTORY_AT..CHECKSUM_AT).unwrap_or(&[]))?;
    let prefix = Prefix {
        head,
        root,
        sections,
    };
    let body = prefix.manifest_bytes().saturating_sub(128);
    field(
        "body_bytes",
        header.body_bytes.get() == body,
        header.body_bytes.get(),
    )?;
    field(
        "body_checksum",
        header.body_checksum.get() == 0,
        header.body_checksum.get(),
    )?;
    Ok(prefix)
}

/// The pack table, ascending by id.
pub fn encode_packs(rows: &[PackRow]) -> Vec<u8> {
    let mut out = Vec::with_capacity(rows.len().saturating_mul(size_of::<PackRecord>()));
    for row in rows {
        let record = PackRecord {
            pack: row.pack.0,
            bytes: U64::new(row.bytes),
            digest: row.digest.0,
            frames: U32::new(row.frames),
            pages: U32::new(row.pages),
            entries: U32::new(row.entries),
            reserved: U32::new(0),
        };
        out.extend_from_slice(record.as_bytes());
    }
    out
}

/// The pack table in `bytes`.
pub fn decode_packs(bytes: &[u8]) -> Result<Vec<PackRow>, FormatError> {
    let size = size_of::<PackRecord>();
    field(
        "pack table",
        bytes.len().is_multiple_of(size),
        u64::try_from(bytes.len()).unwrap_or(u64::MAX),
    )?;
    let mut rows: Vec<PackRow> = Vec::with_capacity(bytes.len().checked_div(size).unwrap_or(0));
    for chunk in bytes.chunks_exact(size) {
        let Ok(record) = PackRecord::read_from_bytes(chunk) else {
            return Err(length(size, chunk.len()));
        };
        let row = PackRow {
            pack: ObjectId(record.pack),
            bytes: record.bytes.get(),
            digest: Digest(record.digest),
            frames: record.frames.get(),
            pages: record.pages.get(),
            entries: record.entries.get(),
        };
        let ascends = rows.last().is_none_or(|last| last.pack < row.pack);
        field("pack", ascends, u64::MAX)?;
        let used = u64::from(row.frames).saturating_add(row.pages.into());
        let fits = used > 0 && used <= row.entries.into() && record.reserved.get() == 0;
        field("entries", fits, row.entries)?;
        field("bytes", u32::try_from(row.bytes).is_ok(), row.bytes)?;
        rows.push(row);
    }
    Ok(rows)
}

fn root_level_of(head: &ImageHead) -> u8 {
    crate::page::root_level(head.geometry.block_count().0)
}

fn encode_root(root: &Child, level: u8) -> RootRecord {
    let mut record = RootRecord {
        kind: 15,
        level,
        codec: 0,
        reserved: [0; 5],
        content: [0; 32],
        physical: [0; 32],
        pack: [0; 16],
        offset: U32::new(0),
        stored_bytes: U32::new(0),
        raw_bytes: U32::new(0),
        reserved_more: [0; 28],
    };
    match root {
        Child::Constant(kind) => {
            record.kind = kind.number();
            record.level = 0;
        }
        Child::Page {
            content,
            physical,
            place,
        } => {
            record.codec = place.codec.number();
            record.content = content.0;
            record.physical = physical.0;
            record.pack = place.pack.0;
            record.offset = U32::new(place.offset_bytes);
            record.stored_bytes = U32::new(place.stored_bytes);
            record.raw_bytes = U32::new(place.raw_bytes);
        }
    }
    record
}

fn decode_root(record: &RootRecord, level: u8) -> Result<Child, FormatError> {
    if record.kind != 15 {
        let kind = BlockKind::from_number(record.kind)?;
        field("root", kind != BlockKind::Data, record.kind)?;
        let plain = *record == encode_root(&Child::Constant(kind), 0);
        field("root", plain, u64::MAX)?;
        return Ok(Child::Constant(kind));
    }
    let right_level = record.level == level && level <= LEVEL_MAX;
    field("root level", right_level, record.level)?;
    let codec = Codec::from_number(record.codec)?;
    check_sizes(record.raw_bytes.get(), record.stored_bytes.get(), codec)?;
    let zero = record.reserved == [0; 5] && record.reserved_more == [0; 28];
    field("reserved", zero, u64::MAX)?;
    field("offset", record.offset.get() >= 128, record.offset.get())?;
    Ok(Child::Page {
        content: Digest(record.content),
        physical: Digest(record.physical),
        place: Place {
            pack: ObjectId(record.pack),
            offset_bytes: record.offset.get(),
            stored_bytes: record.stored_bytes.get(),
            raw_bytes: record.raw_bytes.get(),
            codec,
        },
    })
}

fn decode_sections(bytes: &[u8]) -> Result<Vec<Section>, FormatError> {
    let Ok((count, rows)) = U64::read_from_prefix(bytes) else {
        return Err(length(8, bytes.len()));
    };
    let max = u64::try_from(SECTIONS_MAX).unwrap_or(0);
    field("sections", count.get() <= max, count.get())?;
    let count = usize::try_from(count.get()).unwrap_or(0);
    let size = size_of::<SectionRecord>();
    let (rows, rest) = rows
        .split_at_checked(count.saturating_mul(size))
        .unwrap_or((rows, &[]));
    field("reserved", rest.iter().all(|b| *b == 0), u64::MAX)?;
    let mut sections: Vec<Section> = Vec::with_capacity(count);
    let mut next = 4096_u64;
    for row in rows.chunks_exact(size) {
        let Ok(record) = SectionRecord::read_from_bytes(row) else {
            return Err(length(size, row.len()));
        };
        let section = decode_section(&record, next)?;
        let ascends = sections.last().is_none_or(|last| last.id < section.id);
        field("section", ascends, section.id)?;
        next = next.saturating_add(section.bytes);
        sections.push(section);
    }
    Ok(sections)
}

fn decode_section(record: &SectionRecord, offset: u64) -> Result<Section, FormatError> {
    let (id, flags) = (record.id.get(), record.flags.get());
    field("flags", flags <= 1, flags)?;
    field(
        "reserved",
        record.reserved.get() == 0,
        record.reserved.get(),
    )?;
    field("offset", record.offset.get() == offset, record.offset.get())?;
    let fits = record.bytes.get() <= 1 << 48;
    field("bytes", fits, record.bytes.get())?;
    let known = (SECTION_PACKS..=SECTION_EVIDENCE).contains(&id);
    if flags == 1 && !known {
        return Err(FormatError::Section { id });
    }
    Ok(Section {
        id,
        is_critical: flags == 1,
        offset_bytes: record.offset.get(),
        bytes: record.bytes.get(),
        digest: Digest(record.digest),
    })
}
