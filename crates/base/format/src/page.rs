//! A page of the tree (P11): what its blocks or children are, and, apart from that, where they lie.
//!
//! ```text
//!   PageHead │ kinds (4 bits each) │ content digests │ physical digests │ frame, slot │ places │ packs
//!            └──── content: digested ────────────────┘└──────── place: not digested ───────────────┘
//!                                    (inner pages only) (leaves only)
//! ```
//!
//! A digest stands for each block of kind `data`, and for each child that is a page; blocks and subtrees of one other kind are
//! a number only. **Invariant**: a page has one encoding; what decodes encodes to the same bytes.

use crate::entry::{Codec, FAN_OUT, LEVEL_MAX, Place, check_sizes};
use crate::object::{field, length};
use crate::{FormatError, on_disk};
use blktide_types::id::{Digest, ObjectId};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, IntoBytes};

/// First bytes of a page.
pub const MAGIC: [u8; 4] = *b"BTp\n";
/// Bytes of the kinds of a page.
const KINDS_BYTES: usize = 32;
/// The kind of a child that is a page.
const KIND_PAGE: u8 = 15;
/// No page is longer than this: 64 children with two digests, a place and a pack each.
pub const PAGE_BYTES_MAX: u32 = 24 + 32 + 64 * (32 + 32 + 16 + 16);

/// What a block of an image is. The numbers are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum BlockKind {
    /// Not read, because the file system did not use it.
    Absent = 0,
    /// All zero.
    Zero = 1,
    /// With content.
    Data = 2,
    /// Left out as asked.
    Excluded = 3,
    /// The device could not read it.
    Unreadable = 4,
}

impl BlockKind {
    /// The number that is stored.
    pub const fn number(self) -> u8 {
        self as u8
    }

    /// The kind of a stored number.
    pub fn from_number(number: u8) -> Result<Self, FormatError> {
        Ok(match number {
            0 => Self::Absent,
            1 => Self::Zero,
            2 => Self::Data,
            3 => Self::Excluded,
            4 => Self::Unreadable,
            other => {
                return Err(FormatError::Field {
                    field: "block kind",
                    value: other.into(),
                });
            }
        })
    }

    /// Whether an image has no content of such a block: it must be read again on top of it (P10).
    pub const fn is_without_content(self) -> bool {
        match self {
            Self::Absent | Self::Excluded | Self::Unreadable => true,
            Self::Zero | Self::Data => false,
        }
    }
}

on_disk! {
    /// Begins a page.
    pub struct PageHead: 24 {
        /// `BTp\n`.
        0 => pub magic: [u8; 4],
        /// 0 = leaf.
        4 => pub level: u8,
        /// log2 of the block size.
        5 => pub block_shift: u8,
        /// Blocks of a leaf, or children of an inner page: 1 to 64.
        6 => pub entries: U16,
        /// First block.
        8 => pub first_block: U64,
        /// Number of places: frames of a leaf, pages below an inner page.
        16 => pub places: U16,
        /// Number of packs that these lie in.
        18 => pub packs: U16,
        /// Zero.
        20 => pub reserved: U32,
    }
}

on_disk! {
    /// Where a frame or page lies.
    pub struct PlaceRecord: 16 {
        /// Which of the page's packs.
        0 => pub pack: u8,
        /// 0 raw, 1 zstd.
        1 => pub codec: u8,
        /// Zero.
        2 => pub reserved: U16,
        /// Offset of the entry's header in the pack.
        4 => pub offset: U32,
        /// Bytes of the payload there.
        8 => pub stored_bytes: U32,
        /// Bytes of the payload once decompressed.
        12 => pub raw_bytes: U32,
    }
}

/// What a block of a leaf is, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeafBlock {
    /// Without content of its own; never [`BlockKind::Data`].
    Constant(BlockKind),
    /// With content.
    Data {
        /// Digest of its bytes.
        digest: Digest,
        /// Which of the leaf's frames.
        frame: u8,
        /// Which block of the frame.
        slot: u8,
    },
}

/// A page of level 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// Its first block, a multiple of 64.
    pub first_block: u64,
    /// log2 of the block size.
    pub block_shift: u8,
    /// Its blocks: 64, or fewer at the volume's end.
    pub blocks: Vec<LeafBlock>,
    /// The frames that they lie in; each is used by a block.
    pub frames: Vec<Place>,
}

/// A child of an inner page, or the root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Child {
    /// All blocks below are of this kind; never [`BlockKind::Data`].
    Constant(BlockKind),
    /// A page.
    Page {
        /// Digest of what the blocks below are.
        content: Digest,
        /// BLAKE3 of the page as it is stored.
        physical: Digest,
        /// Where it is.
        place: Place,
    },
}

/// A page of a level above 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inner {
    /// Its level, 1 or more.
    pub level: u8,
    /// Its first block.
    pub first_block: u64,
    /// log2 of the block size.
    pub block_shift: u8,
    /// Its children: 64, or fewer at the volume's end.
    pub children: Vec<Child>,
}

/// Blocks that one child of a page of `level` covers.
pub fn child_span(level: u8) -> u64 {
    FAN_OUT.saturating_pow(level.into())
}

/// Level of the root of a volume of `blocks` blocks.
pub fn root_level(blocks: u64) -> u8 {
    (0..LEVEL_MAX)
        .find(|level| child_span(level.saturating_add(1)) >= blocks)
        .unwrap_or(LEVEL_MAX)
}

impl Leaf {
    /// The bytes that its content digest is taken of.
    pub fn content_bytes(&self) -> Vec<u8> {
        content_bytes(0, &self.kinds(), self.digests())
    }

    /// The page as it is stored.
    pub fn encode(&self) -> Vec<u8> {
        let head = Head {
            level: 0,
            block_shift: self.block_shift,
            entries: self.blocks.len(),
            first_block: self.first_block,
        };
        let mut middle = Vec::new();
        self.digests().for_each(|d| middle.extend_from_slice(&d.0));
        let of = |b: &LeafBlock| match b {
            LeafBlock::Constant(_) => None,
            LeafBlock::Data { frame, slot, .. } => Some((*frame, *slot)),
        };
        middle.extend(self.blocks.iter().filter_map(of).map(|(frame, _)| frame));
        middle.extend(self.blocks.iter().filter_map(of).map(|(_, slot)| slot));
        encode(&head, &self.kinds(), &middle, &self.frames)
    }

    /// The leaf in `bytes`, which is to begin at `first_block` and have `entries` blocks.
    pub fn decode(
        bytes: &[u8],
        block_shift: u8,
        first_block: u64,
        entries: usize,
    ) -> Result<Self, FormatError> {
        let expected = Head {
            level: 0,
            block_shift,
            entries,
            first_block,
        };
        let (mut rest, places) = Cursor::open(bytes, &expected)?;
        let kinds = rest.kinds(entries)?;
        let is_data = |k: &u8| *k == BlockKind::Data.number();
        let count = kinds.iter().filter(|k| is_data(k)).count();
        let digests = rest.digests(count)?;
        let frames_of = rest.take(count)?;
        let slots = rest.take(count)?;
        let frames = rest.places(places)?;
        let mut data = digests.into_iter().zip(frames_of.iter().zip(slots));
        let mut blocks = Vec::with_capacity(entries);
        for kind in &kinds {
            blocks.push(if is_data(kind) {
                let Some((digest, (frame, slot))) = data.next() else {
                    return Err(length(count, 0));
                };
                LeafBlock::Data {
                    digest,
                    frame: *frame,
                    slot: *slot,
                }
            } else {
                LeafBlock::Constant(BlockKind::from_number(*kind)?)
            });
        }
        let leaf = Self {
            first_block,
            block_shift,
            blocks,
            frames,
        };
        leaf.check_slots()?;
        Ok(leaf)
    }

    /// Every frame is used, every block lies within its frame, and no two share a slot.
    fn check_slots(&self) -> Result<(), FormatError> {
        let block_bytes = 1_u32.checked_shl(self.block_shift.into()).unwrap_or(0);
        let mut used = vec![0_u64; self.frames.len()];
        for block in &self.blocks {
            let LeafBlock::Data { frame, slot, .. } = block else {
                continue;
            };
            let place = self.frames.get(usize::from(*frame));
            let mask = used.get_mut(usize::from(*frame));
            let (Some(place), Some(mask)) = (place, mask) else {
                return Err(FormatError::Field {
                    field: "frame",
                    value: (*frame).into(),
                });
            };
            let bit = 1_u64.checked_shl((*slot).into()).unwrap_or(0);
            let start = u32::from(*slot).saturating_mul(block_bytes);
            let fits = start < place.raw_bytes && bit != 0 && *mask & bit == 0;
            field("slot", fits, *slot)?;
            *mask |= bit;
        }
        field("frame", used.iter().all(|m| *m != 0), u64::MAX)
    }

    fn kinds(&self) -> Vec<u8> {
        let kind = |b: &LeafBlock| match b {
            LeafBlock::Constant(kind) => kind.number(),
            LeafBlock::Data { .. } => BlockKind::Data.number(),
        };
        self.blocks.iter().map(kind).collect()
    }

    fn digests(&self) -> impl Iterator<Item = &Digest> {
        self.blocks.iter().filter_map(|b| match b {
            LeafBlock::Constant(_) => None,
            LeafBlock::Data { digest, .. } => Some(digest),
        })
    }
}

impl Inner {
    /// The bytes that its content digest is taken of.
    pub fn content_bytes(&self) -> Vec<u8> {
        let contents = self.pages().map(|(content, _, _)| content);
        content_bytes(self.level, &self.kinds(), contents)
    }

    /// The page as it is stored.
    pub fn encode(&self) -> Vec<u8> {
        let head = Head {
            level: self.level,
            block_shift: self.block_shift,
            entries: self.children.len(),
            first_block: self.first_block,
        };
        let mut middle = Vec::new();
        self.pages()
            .for_each(|(content, _, _)| middle.extend_from_slice(&content.0));
        self.pages()
            .for_each(|(_, physical, _)| middle.extend_from_slice(&physical.0));
        let places: Vec<Place> = self.pages().map(|(_, _, place)| *place).collect();
        encode(&head, &self.kinds(), &middle, &places)
    }

    /// The page in `bytes`, which is to be of `level`, begin at `first_block` and have `entries` children.
    pub fn decode(
        bytes: &[u8],
        level: u8,
        block_shift: u8,
        first_block: u64,
        entries: usize,
    ) -> Result<Self, FormatError> {
        let expected = Head {
            level,
            block_shift,
            entries,
            first_block,
        };
        let (mut rest, places) = Cursor::open(bytes, &expected)?;
        let kinds = rest.kinds(entries)?;
        let is_page = |k: &u8| *k == KIND_PAGE;
        let count = kinds.iter().filter(|k| is_page(k)).count();
        field("places", places == count, u64::MAX)?;
        let contents = rest.digests(count)?;
        let physicals = rest.digests(count)?;
        let places = rest.places(count)?;
        let mut pages = contents.into_iter().zip(physicals).zip(places);
        let mut children = Vec::with_capacity(entries);
        for kind in &kinds {
            children.push(if is_page(kind) {
                let Some(((content, physical), place)) = pages.next() else {
                    return Err(length(count, 0));
                };
                Child::Page {
                    content,
                    physical,
                    place,
                }
            } else {
                let kind = BlockKind::from_number(*kind)?;
                field("child", kind != BlockKind::Data, kind.number())?;
                Child::Constant(kind)
            });
        }
        Ok(Self {
            level,
            first_block,
            block_shift,
            children,
        })
    }

    fn kinds(&self) -> Vec<u8> {
        let kind = |c: &Child| match c {
            Child::Constant(kind) => kind.number(),
            Child::Page { .. } => KIND_PAGE,
        };
        self.children.iter().map(kind).collect()
    }

    fn pages(&self) -> impl Iterator<Item = (&Digest, &Digest, &Place)> {
        self.children.iter().filter_map(|c| match c {
            Child::Constant(_) => None,
            Child::Page {
                content,
                physical,
                place,
            } => Some((content, physical, place)),
        })
    }
}

/// What a reader knows of a page before it reads it.
#[derive(Clone, Copy, Debug)]
struct Head {
    level: u8,
    block_shift: u8,
    entries: usize,
    first_block: u64,
}

fn content_bytes<'a>(
    level: u8,
    kinds: &[u8],
    digests: impl Iterator<Item = &'a Digest>,
) -> Vec<u8> {
    let entries = u16::try_from(kinds.len()).unwrap_or(u16::MAX);
    let mut out = vec![level];
    out.extend_from_slice(&entries.to_le_bytes());
    out.extend_from_slice(&packed(kinds));
    digests.for_each(|d| out.extend_from_slice(&d.0));
    out
}

/// Kinds in 4 bits each, the lower of a pair in the lower bits.
fn packed(kinds: &[u8]) -> [u8; KINDS_BYTES] {
    let mut out = [0; KINDS_BYTES];
    for (to, pair) in out.iter_mut().zip(kinds.chunks(2)) {
        let low = pair.first().copied().unwrap_or(0);
        let high = pair.get(1).copied().unwrap_or(0);
        *to = low | high << 4;
    }
    out
}

fn encode(head: &Head, kinds: &[u8], middle: &[u8], places: &[Place]) -> Vec<u8> {
    let mut packs: Vec<ObjectId> = Vec::new();
    let mut records = Vec::new();
    for place in places {
        let pack = packs
            .iter()
            .position(|p| *p == place.pack)
            .unwrap_or_else(|| {
                packs.push(place.pack);
                packs.len().saturating_sub(1)
            });
        let record = PlaceRecord {
            pack: u8::try_from(pack).unwrap_or(u8::MAX),
            codec: place.codec.number(),
            reserved: U16::new(0),
            offset: U32::new(place.offset_bytes),
            stored_bytes: U32::new(place.stored_bytes),
            raw_bytes: U32::new(place.raw_bytes),
        };
        records.extend_from_slice(record.as_bytes());
    }
    let small = |n: usize| U16::new(u16::try_from(n).unwrap_or(u16::MAX));
    let head = PageHead {
        magic: MAGIC,
        level: head.level,
        block_shift: head.block_shift,
        entries: small(head.entries),
        first_block: U64::new(head.first_block),
        places: small(places.len()),
        packs: small(packs.len()),
        reserved: U32::new(0),
    };
    let mut out = head.as_bytes().to_vec();
    out.extend_from_slice(&packed(kinds));
    out.extend_from_slice(middle);
    out.extend_from_slice(&records);
    for pack in &packs {
        out.extend_from_slice(&pack.0);
    }
    out
}

/// The rest of a page's bytes, taken piece by piece.
struct Cursor<'a> {
    rest: &'a [u8],
    packs: Vec<ObjectId>,
}

impl<'a> Cursor<'a> {
    /// Checks the head and takes the packs from the end. Returns the number of places, too.
    fn open(bytes: &'a [u8], expected: &Head) -> Result<(Self, usize), FormatError> {
        let Ok((head, rest)) = PageHead::read_from_prefix(bytes) else {
            return Err(length(size_of::<PageHead>(), bytes.len()));
        };
        if head.magic != MAGIC {
            return Err(FormatError::Field {
                field: "magic",
                value: u64::MAX,
            });
        }
        if head.level != expected.level {
            return Err(FormatError::Identity { field: "level" });
        }
        if head.first_block.get() != expected.first_block {
            return Err(FormatError::Identity {
                field: "first_block",
            });
        }
        if head.block_shift != expected.block_shift {
            return Err(FormatError::Identity {
                field: "block_shift",
            });
        }
        let entries = usize::from(head.entries.get());
        let known = entries == expected.entries && (1..=64).contains(&entries);
        field("entries", known, head.entries.get())?;
        let places = usize::from(head.places.get());
        field("places", places <= 64, head.places.get())?;
        let packs = usize::from(head.packs.get());
        field("packs", packs <= places, head.packs.get())?;
        field("reserved", head.reserved.get() == 0, head.reserved.get())?;
        let need = packs.saturating_mul(16);
        let Some(split) = rest.len().checked_sub(need) else {
            return Err(length(need, rest.len()));
        };
        let (rest, tail) = rest.split_at(split);
        let (ids, _) = tail.as_chunks::<16>();
        let packs = ids.iter().map(|id| ObjectId(*id)).collect();
        Ok((Self { rest, packs }, places))
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], FormatError> {
        let Some((taken, rest)) = self.rest.split_at_checked(count) else {
            return Err(length(count, self.rest.len()));
        };
        self.rest = rest;
        Ok(taken)
    }

    fn kinds(&mut self, entries: usize) -> Result<Vec<u8>, FormatError> {
        let bytes = self.take(KINDS_BYTES)?;
        let all = bytes.iter().flat_map(|b| [b & 15, b >> 4]);
        let kinds: Vec<u8> = all.clone().take(entries).collect();
        field("kinds", all.skip(entries).all(|k| k == 0), u64::MAX)?;
        Ok(kinds)
    }

    fn digests(&mut self, count: usize) -> Result<Vec<Digest>, FormatError> {
        let bytes = self.take(count.saturating_mul(32))?;
        let (digests, _) = bytes.as_chunks::<32>();
        Ok(digests.iter().map(|d| Digest(*d)).collect())
    }

    /// The places: what is left must be exactly these, and packs appear in the order of their first use.
    fn places(&mut self, count: usize) -> Result<Vec<Place>, FormatError> {
        let bytes = self.take(count.saturating_mul(size_of::<PlaceRecord>()))?;
        field("page length", self.rest.is_empty(), u64::MAX)?;
        let mut seen = 0_usize;
        let mut places = Vec::with_capacity(count);
        for chunk in bytes.chunks_exact(size_of::<PlaceRecord>()) {
            let Ok(record) = PlaceRecord::read_from_bytes(chunk) else {
                return Err(length(size_of::<PlaceRecord>(), chunk.len()));
            };
            let index = usize::from(record.pack);
            field("pack", index <= seen, record.pack)?;
            if index == seen {
                seen = seen.saturating_add(1);
            }
            let Some(pack) = self.packs.get(index) else {
                return Err(FormatError::Field {
                    field: "pack",
                    value: record.pack.into(),
                });
            };
            let codec = Codec::from_number(record.codec)?;
            check_sizes(record.raw_bytes.get(), record.stored_bytes.get(), codec)?;
            field(
                "reserved",
                record.reserved.get() == 0,
                record.reserved.get(),
            )?;
            let offset = record.offset.get();
            field("offset", offset >= 128, offset)?;
            places.push(Place {
                pack: *pack,
                offset_bytes: offset,
                stored_bytes: record.stored_bytes.get(),
                raw_bytes: record.raw_bytes.get(),
                codec,
            });
        }
        field("packs", seen == self.packs.len(), u64::MAX)?;
        Ok(places)
    }
}
