//! The bitmap file: a volume's generations at rest, from a clean stop to the next attach (P2, P4).
//!
//! ```text
//! BitmapHeader · (GenerationHead · bits) × generation_count, oldest first · EvidenceBlock
//! ```
//! Bits are one a grain. **Invariant**: the checksum covers every byte of the file but itself, so that all
//! generations are believed or distrusted together. What is right in itself may still be another volume's, of
//! another size or of an older life: that is the hand-over's to judge, by the header's fields.

use crate::{FormatError, on_disk};
use blktide_types::clock::WallTime;
use blktide_types::geometry::Geometry;
use blktide_types::id::{GenerationName, LifeId, VolumeId};
use blktide_types::range::BlockRange;
use blktide_types::reason::Reason;
use blktide_types::set::BlockSet;
use blktide_types::unit::{BlockCount, BlockIndex};
use zerocopy::little_endian::{I64, U16, U32, U64};
use zerocopy::{FromBytes, IntoBytes};

/// First bytes of the file; the `\r\n` shows a transfer in text mode.
pub const MAGIC: [u8; 8] = *b"BTbmap\r\n";
/// First bytes of a file that was consumed: it belongs to a life that has ended.
pub const MAGIC_CONSUMED: [u8; 8] = *b"BTused\r\n";
/// Newest version written and read.
pub const VERSION: u16 = 1;
/// Most generations in a file; what has more was not written by us.
pub const GENERATIONS_MAX: u32 = 64;

const HEADER_BYTES: usize = size_of::<BitmapHeader>();
const ENCODING_WORDS: u32 = 1;
const ENCODING_RUNS: u32 = 2;

on_disk! {
    /// Header of a bitmap file.
    pub struct BitmapHeader: 112 {
        /// `BTbmap\r\n`; `BTused\r\n` once the file has been consumed.
        0 => pub magic: [u8; 8],
        /// Format version, 1.
        8 => pub version: U16,
        /// log2 of the image's block in bytes.
        10 => pub block_shift: u8,
        /// log2 of the grain in bytes: what one bit stands for.
        11 => pub grain_shift: u8,
        /// Features without which the file cannot be read; an unknown one set, it is refused.
        12 => pub incompat: U32,
        /// Features that may be ignored.
        16 => pub compat: U32,
        /// Number of generations, 1 to 64.
        20 => pub generation_count: U32,
        /// The volume that the bits are about.
        24 => pub volume_id: [u8; 16],
        /// The life that ended when this was written; the marker names it.
        40 => pub life_id: [u8; 16],
        /// Bytes of the volume.
        56 => pub volume_bytes: U64,
        /// Bytes of the whole file.
        64 => pub file_bytes: U64,
        /// Number of the reason why the volume was distrusted, and no full image made since; 0: it was trusted.
        72 => pub distrust: u8,
        /// Zero.
        73 => pub reserved: [u8; 7],
        /// Since when it was distrusted: nanoseconds since 1970 in UTC; 0 if it was trusted.
        80 => pub distrust_time: I64,
        /// Zero.
        88 => pub reserved_2: [u8; 16],
        /// CRC-64/XZ of bytes 0 to 103, then of all bytes from 112 on.
        104 => pub checksum: U64,
    }
}

on_disk! {
    /// Head of one generation in a bitmap file.
    pub struct GenerationHead: 48 {
        /// Its name.
        0 => pub name: [u8; 16],
        /// Its number, for people.
        16 => pub counter: U64,
        /// When it opened: nanoseconds since 1970 in UTC; for people.
        24 => pub opened: I64,
        /// 1: the bits, in 64-bit words, lowest grain first. 2: runs, each first grain and count of grains (two 64-bit numbers), ascending, never touching.
        32 => pub encoding: U32,
        /// Zero.
        36 => pub reserved: U32,
        /// Bytes that follow this head.
        40 => pub payload_bytes: U64,
    }
}

on_disk! {
    /// What the volume looked like when the file was written: the evidence against foreign writes (P5).
    pub struct EvidenceBlock: 64 {
        /// What was found: 0 could not be read, 1 nothing known, 2 ext4, 3 XFS.
        0 => pub kind: u8,
        /// 1 strong, 2 weak.
        1 => pub class: u8,
        /// Version of the rules by which it was taken; others cannot be compared with it.
        2 => pub rules: U16,
        /// Zero.
        4 => pub reserved: U32,
        /// BLAKE3 over the structures.
        8 => pub digest: [u8; 32],
        /// Bytes that the digest covers.
        40 => pub covered_bytes: U64,
        /// Zero.
        48 => pub reserved_2: [u8; 16],
    }
}

/// One generation: its name, and what was written in it, one bit a grain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generation {
    /// Its name (P2).
    pub name: GenerationName,
    /// Its number, for people.
    pub counter: u64,
    /// When it opened; for people.
    pub opened: WallTime,
    /// The grains that were written in it.
    pub grains: BlockSet,
}

/// What a bitmap file is written from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Content {
    /// The volume.
    pub volume: VolumeId,
    /// The life that ends.
    pub life: LifeId,
    /// The volume's shape.
    pub geometry: Geometry,
    /// Why, and since when, the volume is distrusted: no full image was made since. `None`: it is trusted.
    pub distrust: Option<(Reason, WallTime)>,
    /// Oldest first; the last one is open.
    pub generations: Vec<Generation>,
    /// The evidence of this instant.
    pub evidence: EvidenceBlock,
}

/// A bitmap file whose checksum holds; whose it is has not been looked at.
#[derive(Clone, Copy, Debug)]
pub struct Checked<'a> {
    header: BitmapHeader,
    generations: &'a [u8],
    evidence: EvidenceBlock,
}

/// The file as it is stored.
///
/// Errors: `Field` if there is no generation, or more than [`GENERATIONS_MAX`].
pub fn encode(content: &Content) -> Result<Vec<u8>, FormatError> {
    let count = u32::try_from(content.generations.len())
        .ok()
        .filter(|n| (1..=GENERATIONS_MAX).contains(n))
        .ok_or(FormatError::Field {
            field: "generation_count",
            value: u64::try_from(content.generations.len()).unwrap_or(u64::MAX),
        })?;
    let mut header = BitmapHeader {
        magic: MAGIC,
        version: U16::new(VERSION),
        block_shift: content.geometry.block_size().shift(),
        grain_shift: content.geometry.grain().shift(),
        incompat: U32::new(0),
        compat: U32::new(0),
        generation_count: U32::new(count),
        volume_id: content.volume.0,
        life_id: content.life.0,
        volume_bytes: U64::new(content.geometry.volume_bytes()),
        file_bytes: U64::new(0),
        distrust: content.distrust.map_or(0, |(reason, _)| reason.number()),
        reserved: [0; 7],
        distrust_time: I64::new(content.distrust.map_or(0, |(_, since)| since.0)),
        reserved_2: [0; 16],
        checksum: U64::new(0),
    };
    let mut out = vec![0; HEADER_BYTES];
    for generation in &content.generations {
        encode_generation(generation, &mut out);
    }
    out.extend_from_slice(content.evidence.as_bytes());
    header.file_bytes = U64::new(length(&out));
    let (head, body) = out.split_at_mut(HEADER_BYTES);
    header.checksum = U64::new(checksum(&header, body));
    head.copy_from_slice(header.as_bytes());
    Ok(out)
}

/// What a file is overwritten with, from its first byte, before it is unlinked: so that it can never be
/// believed again, whatever happens to its name.
pub fn consumed(volume: VolumeId, life: LifeId) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    for (to, from) in header.iter_mut().zip(
        MAGIC_CONSUMED
            .iter()
            .chain(&[0; 16])
            .chain(&volume.0)
            .chain(&life.0),
    ) {
        *to = *from;
    }
    header
}

/// Checks magic, version, features, length and checksum.
pub fn decode(bytes: &[u8]) -> Result<Checked<'_>, FormatError> {
    let Ok((header, body)) = BitmapHeader::read_from_prefix(bytes) else {
        return Err(FormatError::Length {
            need: length(&[0; HEADER_BYTES]),
            have: length(bytes),
        });
    };
    if header.magic != MAGIC {
        return Err(FormatError::Magic {
            found: header.magic,
        });
    }
    if header.version.get() != VERSION {
        return Err(FormatError::Version {
            found: header.version.get(),
            supported: VERSION,
        });
    }
    if header.file_bytes.get() != length(bytes) {
        return Err(FormatError::Length {
            need: header.file_bytes.get(),
            have: length(bytes),
        });
    }
    let computed = checksum(&header, body);
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
    let count = header.generation_count.get();
    if !(1..=GENERATIONS_MAX).contains(&count) {
        return Err(field("generation_count", count.into()));
    }
    if header.reserved != [0; 7] || header.reserved_2 != [0; 16] {
        return Err(field("reserved", u64::MAX));
    }
    if header.distrust != 0 && Reason::from_number(header.distrust).is_none() {
        return Err(field("distrust", header.distrust.into()));
    }
    let Ok((generations, evidence)) = EvidenceBlock::read_from_suffix(body) else {
        return Err(FormatError::Length {
            need: length(&[0; size_of::<EvidenceBlock>()]),
            have: length(body),
        });
    };
    Ok(Checked {
        header,
        generations,
        evidence,
    })
}

impl Checked<'_> {
    /// The volume that the file is about.
    pub const fn volume(&self) -> VolumeId {
        VolumeId(self.header.volume_id)
    }

    /// The life that ended with it.
    pub const fn life(&self) -> LifeId {
        LifeId(self.header.life_id)
    }

    /// Whether it counts the grains of a volume of this shape.
    pub const fn fits(&self, geometry: &Geometry) -> bool {
        self.header.volume_bytes.get() == geometry.volume_bytes()
            && self.header.block_shift == geometry.block_size().shift()
            && self.header.grain_shift == geometry.grain().shift()
    }

    /// Why, and since when, the volume was distrusted; `None`: it was trusted.
    pub fn distrust(&self) -> Option<(Reason, WallTime)> {
        let since = WallTime(self.header.distrust_time.get());
        Reason::from_number(self.header.distrust).map(|reason| (reason, since))
    }

    /// The evidence of the instant at which it was written.
    pub const fn evidence(&self) -> EvidenceBlock {
        self.evidence
    }

    /// The generations, oldest first, each counting the grains of `geometry`.
    ///
    /// What is allocated follows from `geometry` and [`GENERATIONS_MAX`], not from the file. Errors: `Identity` if the
    /// file does not [fit](Self::fits), `Field` or `Length` if no writer of ours made it.
    pub fn generations(&self, geometry: &Geometry) -> Result<Vec<Generation>, FormatError> {
        if !self.fits(geometry) {
            return Err(FormatError::Identity { field: "size" });
        }
        let mut rest = self.generations;
        let mut all = Vec::new();
        for _ in 0..self.header.generation_count.get() {
            let (generation, after) = decode_generation(rest, geometry.grain_count())?;
            if all.iter().any(|g: &Generation| g.name == generation.name) {
                return Err(field("name", u64::MAX));
            }
            all.push(generation);
            rest = after;
        }
        if rest.is_empty() {
            Ok(all)
        } else {
            Err(field("file_bytes", self.header.file_bytes.get()))
        }
    }
}

fn encode_generation(generation: &Generation, out: &mut Vec<u8>) {
    let words = generation.grains.words();
    let run_count = generation.grains.runs().count();
    let mut payload = Vec::new();
    // A run takes as much as two words; on a tie the words are as good and faster.
    let encoding = if run_count.saturating_mul(2) < words.len() {
        for run in generation.grains.runs() {
            payload.extend_from_slice(&run.start().0.to_le_bytes());
            payload.extend_from_slice(&run.count().0.to_le_bytes());
        }
        ENCODING_RUNS
    } else {
        payload.extend(words.iter().flat_map(|w| w.to_le_bytes()));
        ENCODING_WORDS
    };
    let head = GenerationHead {
        name: generation.name.0,
        counter: U64::new(generation.counter),
        opened: I64::new(generation.opened.0),
        encoding: U32::new(encoding),
        reserved: U32::new(0),
        payload_bytes: U64::new(length(&payload)),
    };
    out.extend_from_slice(head.as_bytes());
    out.extend_from_slice(&payload);
}

fn decode_generation(bytes: &[u8], grain_count: u64) -> Result<(Generation, &[u8]), FormatError> {
    let short = |need| FormatError::Length {
        need,
        have: length(bytes),
    };
    let Ok((head, after)) = GenerationHead::read_from_prefix(bytes) else {
        return Err(short(48));
    };
    let need = head.payload_bytes.get();
    let Some((payload, rest)) = usize::try_from(need)
        .ok()
        .and_then(|n| after.split_at_checked(n))
    else {
        return Err(short(need));
    };
    if head.reserved.get() != 0 || head.name == [0; 16] {
        return Err(field("generation head", u64::MAX));
    }
    let (words, left) = payload.as_chunks::<8>();
    if !left.is_empty() {
        return Err(field("payload_bytes", need));
    }
    let words = words.iter().map(|w| u64::from_le_bytes(*w));
    let grains = match head.encoding.get() {
        ENCODING_WORDS => decode_words(words, grain_count)?,
        ENCODING_RUNS => decode_runs(words, grain_count)?,
        other => return Err(field("encoding", other.into())),
    };
    let generation = Generation {
        name: GenerationName(head.name),
        counter: head.counter.get(),
        opened: WallTime(head.opened.get()),
        grains,
    };
    Ok((generation, rest))
}

fn decode_words(
    words: impl ExactSizeIterator<Item = u64> + Clone,
    grain_count: u64,
) -> Result<BlockSet, FormatError> {
    let set = BlockSet::from_words(BlockCount(grain_count), words.clone());
    // Equal to what was read: no word too few or too many, no bit past the end.
    if set.words().iter().copied().eq(words) {
        Ok(set)
    } else {
        Err(field("bits", u64::MAX))
    }
}

fn decode_runs(
    mut words: impl ExactSizeIterator<Item = u64>,
    grain_count: u64,
) -> Result<BlockSet, FormatError> {
    let mut set = BlockSet::new(BlockCount(grain_count));
    let mut free_from = 0;
    while let Some(start) = words.next() {
        let end = words
            .next()
            .and_then(|count| start.checked_add(count))
            .filter(|end| *end <= grain_count && start >= free_from);
        let run = end.and_then(|end| BlockRange::new(BlockIndex(start), BlockIndex(end)));
        let Some(run) = run else {
            return Err(field("run", start));
        };
        set.insert_range(run);
        // Neighbours would have been one run.
        free_from = run.end().0.saturating_add(1);
    }
    Ok(set)
}

fn checksum(header: &BitmapHeader, body: &[u8]) -> u64 {
    let mut digest = crc64fast::Digest::new();
    let (covered, _) = header
        .as_bytes()
        .split_at(core::mem::offset_of!(BitmapHeader, checksum));
    digest.write(covered);
    digest.write(body);
    digest.sum64()
}

const fn field(field: &'static str, value: u64) -> FormatError {
    FormatError::Field { field, value }
}

fn length(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
