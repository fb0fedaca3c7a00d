//! An entry of a pack: a frame of blocks or a page of the tree, with a small header of its own.
//!
//! ```text
//!   pack: ObjectHeader │ EntryHeader, payload │ EntryHeader, payload │ …      nothing between, nothing behind
//! ```
//!
//! So a pack can be read from its start without any map (salvage), and every stored byte is under a checksum. An entry's
//! checksum takes in pack and offset: an entry at another place is refused.

use crate::object::{crc64, field, length};
use crate::{FormatError, on_disk};
use blktide_types::id::ObjectId;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, IntoBytes};

/// First bytes of an entry.
pub const MAGIC: [u8; 4] = *b"BTe\n";
/// Bytes of an entry's header.
pub const HEADER_BYTES: u32 = 48;
/// The largest payload, raw or stored.
pub const PAYLOAD_BYTES_MAX: u32 = 1 << 20;
/// Blocks of a leaf, and children of an inner page.
pub const FAN_OUT: u64 = 64;
/// The highest level of a page: 64⁹ blocks are more than any volume has.
pub const LEVEL_MAX: u8 = 8;

/// How a payload is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Codec {
    /// As it is.
    Raw = 0,
    /// One zstd frame.
    Zstd = 1,
}

impl Codec {
    /// The number that is stored.
    pub const fn number(self) -> u8 {
        self as u8
    }

    /// The codec of a stored number.
    pub fn from_number(number: u8) -> Result<Self, FormatError> {
        match number {
            0 => Ok(Self::Raw),
            1 => Ok(Self::Zstd),
            other => Err(FormatError::Field {
                field: "codec",
                value: other.into(),
            }),
        }
    }
}

/// What an entry holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// Blocks of one leaf, ascending, one after another.
    Frame {
        /// Which blocks of the leaf: bit n is block `first_block + n`.
        blocks: u64,
    },
    /// A page of the tree.
    Page {
        /// 0 = leaf.
        level: u8,
    },
}

on_disk! {
    /// Before every payload in a pack.
    pub struct EntryHeader: 48 {
        /// `BTe\n`.
        0 => pub magic: [u8; 4],
        /// 1 frame, 2 page.
        4 => pub kind: u8,
        /// 0 raw, 1 zstd.
        5 => pub codec: u8,
        /// Level of a page, 0 = leaf; 0 for a frame.
        6 => pub level: u8,
        /// log2 of the block size.
        7 => pub block_shift: u8,
        /// Bytes of the payload once decompressed.
        8 => pub raw_bytes: U32,
        /// Bytes of the payload here.
        12 => pub stored_bytes: U32,
        /// First block of the leaf, or of what the page covers.
        16 => pub first_block: U64,
        /// Frame: which blocks of the leaf, lowest block in the lowest bit. Page: zero.
        24 => pub blocks: U64,
        /// CRC-64 of the payload as stored.
        32 => pub payload_checksum: U64,
        /// CRC-64 of the pack's id, the offset of this header in it (8 bytes), then bytes 0 to 39.
        40 => pub checksum: U64,
    }
}

/// What an entry's header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryFacts {
    /// What it holds.
    pub kind: EntryKind,
    /// How the payload is stored.
    pub codec: Codec,
    /// log2 of the block size.
    pub block_shift: u8,
    /// Bytes once decompressed.
    pub raw_bytes: u32,
    /// Bytes as stored.
    pub stored_bytes: u32,
    /// First block of the leaf, or of what the page covers.
    pub first_block: u64,
    /// CRC-64 of the payload as stored.
    pub payload_checksum: u64,
}

/// Where an entry lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The pack.
    pub pack: ObjectId,
    /// Offset of the entry's header in it.
    pub offset_bytes: u32,
    /// Bytes of the payload there.
    pub stored_bytes: u32,
    /// Bytes of the payload once decompressed.
    pub raw_bytes: u32,
    /// How it is stored.
    pub codec: Codec,
}

impl Place {
    /// The first byte after the entry.
    pub fn end_bytes(&self) -> u64 {
        u64::from(self.offset_bytes)
            .saturating_add(HEADER_BYTES.into())
            .saturating_add(self.stored_bytes.into())
    }
}

/// An entry's header, checksum included.
pub fn encode(facts: &EntryFacts, pack: ObjectId, offset_bytes: u32) -> EntryHeader {
    let (kind, level, blocks) = match facts.kind {
        EntryKind::Frame { blocks } => (1, 0, blocks),
        EntryKind::Page { level } => (2, level, 0),
    };
    let mut header = EntryHeader {
        magic: MAGIC,
        kind,
        codec: facts.codec.number(),
        level,
        block_shift: facts.block_shift,
        raw_bytes: U32::new(facts.raw_bytes),
        stored_bytes: U32::new(facts.stored_bytes),
        first_block: U64::new(facts.first_block),
        blocks: U64::new(blocks),
        payload_checksum: U64::new(facts.payload_checksum),
        checksum: U64::new(0),
    };
    header.checksum = U64::new(checksum(&header, pack, offset_bytes));
    header
}

/// The header's bytes.
pub fn header_bytes(header: &EntryHeader) -> &[u8] {
    header.as_bytes()
}

/// The header at the start of `bytes`, which lie at `offset_bytes` of `pack`. The payload is not looked at.
pub fn decode(
    bytes: &[u8],
    pack: ObjectId,
    offset_bytes: u32,
) -> Result<(EntryFacts, EntryHeader), FormatError> {
    let Ok((header, _)) = EntryHeader::read_from_prefix(bytes) else {
        return Err(length(size_of::<EntryHeader>(), bytes.len()));
    };
    if header.magic != MAGIC {
        let mut found = [0; 8];
        found
            .iter_mut()
            .zip(header.magic)
            .for_each(|(to, from)| *to = from);
        return Err(FormatError::Magic { found });
    }
    let computed = checksum(&header, pack, offset_bytes);
    if header.checksum.get() != computed {
        return Err(FormatError::Checksum {
            found: header.checksum.get(),
            computed,
        });
    }
    let kind = match header.kind {
        1 if header.level == 0 && header.blocks.get() != 0 => EntryKind::Frame {
            blocks: header.blocks.get(),
        },
        2 if header.level <= LEVEL_MAX && header.blocks.get() == 0 => EntryKind::Page {
            level: header.level,
        },
        other => {
            return Err(FormatError::Field {
                field: "kind",
                value: other.into(),
            });
        }
    };
    let (raw, stored) = (header.raw_bytes.get(), header.stored_bytes.get());
    let codec = Codec::from_number(header.codec)?;
    check_sizes(raw, stored, codec)?;
    let facts = EntryFacts {
        kind,
        codec,
        block_shift: header.block_shift,
        raw_bytes: raw,
        stored_bytes: stored,
        first_block: header.first_block.get(),
        payload_checksum: header.payload_checksum.get(),
    };
    Ok((facts, header))
}

/// Refuses sizes that no writer makes: nothing is allocated by a length that has not passed here.
pub(crate) fn check_sizes(raw: u32, stored: u32, codec: Codec) -> Result<(), FormatError> {
    let raw_fits = (1..=PAYLOAD_BYTES_MAX).contains(&raw);
    field("raw_bytes", raw_fits, raw)?;
    let stored_fits = match codec {
        Codec::Raw => stored == raw,
        Codec::Zstd => (1..raw).contains(&stored),
    };
    field("stored_bytes", stored_fits, stored)
}

fn checksum(header: &EntryHeader, pack: ObjectId, offset_bytes: u32) -> u64 {
    let (covered, _) = header
        .as_bytes()
        .split_at(core::mem::offset_of!(EntryHeader, checksum));
    let offset = u64::from(offset_bytes).to_le_bytes();
    crc64(&[&pack.0, &offset, covered])
}
