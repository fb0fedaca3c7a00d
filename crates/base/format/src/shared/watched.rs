//! The memory that the kernel's programs mark in: its constants, written once and checked when it is opened.
//!
//! **Invariant**: nothing in it is believed unchecked; the sizes fit each other and the memory.

use super::{MAGIC, PAGE_WORDS, SharedError, VERSION, count, watch, wide, words_of};
use blktide_types::id::VolumeId;
use blktide_types::unit::BlockSize;

/// Bytes of a sector, as the kernel counts them.
const SECTOR_SHIFT: u8 = 9;
/// The largest volume, sectors.
const SECTORS_MAX: u64 = 1 << 53;

/// What is watched, and how finely.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WatchShape {
    /// The volume.
    pub volume: VolumeId,
    /// Unit of one bit.
    pub grain: BlockSize,
    /// The whole disk, as its requests name it: major << 32 | minor.
    pub device: u64,
    /// First sector of the volume on its disk.
    pub start_sector: u64,
    /// Sectors of the volume.
    pub sectors: u64,
    /// Whether the disk's driver takes bios: no completion is seen.
    pub bio_based: bool,
}

impl WatchShape {
    /// Words of a bitmap that hold bits.
    pub fn bit_words(&self) -> usize {
        let bits_shift = self.grain.shift().saturating_sub(SECTOR_SHIFT);
        let last = self.sectors.saturating_sub(1) >> bits_shift;
        words_of(last.saturating_add(1))
    }

    /// Words from bitmap A to bitmap B: whole pages.
    pub fn bitmap_words(&self) -> usize {
        self.bit_words().next_multiple_of(PAGE_WORDS)
    }

    /// First word of the bitmap that is live in `generation`.
    pub fn bitmap(&self, generation: u64) -> usize {
        let skipped = if generation & 1 == 0 {
            0
        } else {
            self.bitmap_words()
        };
        watch::WORDS.saturating_add(skipped)
    }

    /// Words of the memory.
    pub fn words(&self) -> usize {
        watch::WORDS.saturating_add(self.bitmap_words().saturating_mul(2))
    }

    /// The constant words of the head, as (index, value), magic last.
    pub fn head(&self) -> [(usize, u64); 10] {
        let id = u128::from_le_bytes(self.volume.0);
        let half = |number: u128| u64::try_from(number & u128::from(u64::MAX)).unwrap_or(0);
        [
            (watch::VERSION, VERSION),
            (watch::BITMAP_WORDS, wide(self.bitmap_words())),
            (watch::GRAIN_SHIFT, u64::from(self.grain.shift())),
            (watch::START_SECTOR, self.start_sector),
            (watch::SECTORS, self.sectors),
            (watch::DEVICE, self.device),
            (watch::BIO_BASED, u64::from(self.bio_based)),
            (watch::VOLUME_ID_0, half(id)),
            (watch::VOLUME_ID_1, half(id >> 64)),
            (watch::MAGIC, MAGIC),
        ]
    }

    /// What a head declares, or what is wrong with it. `word` gives the words of the head.
    pub fn of_head(word: impl Fn(usize) -> u64) -> Result<Self, SharedError> {
        let (found, version) = (word(watch::MAGIC), word(watch::VERSION));
        if found != MAGIC {
            return Err(SharedError::Magic { found });
        }
        let incompat = word(watch::INCOMPAT);
        if version != VERSION || incompat != 0 {
            return Err(SharedError::Version { version, incompat });
        }
        let wrong = |index| SharedError::Head { index };
        let grain = u8::try_from(word(watch::GRAIN_SHIFT)).ok();
        let grain = grain.and_then(BlockSize::from_shift);
        let id = u128::from(word(watch::VOLUME_ID_1)) << 64 | u128::from(word(watch::VOLUME_ID_0));
        let shape = Self {
            volume: VolumeId(id.to_le_bytes()),
            grain: grain.ok_or(wrong(watch::GRAIN_SHIFT))?,
            device: word(watch::DEVICE),
            start_sector: word(watch::START_SECTOR),
            sectors: word(watch::SECTORS),
            bio_based: word(watch::BIO_BASED) == 1,
        };
        let checks = [
            (watch::SECTORS, (1..=SECTORS_MAX).contains(&shape.sectors)),
            (watch::START_SECTOR, shape.start_sector <= SECTORS_MAX),
            (watch::BIO_BASED, word(watch::BIO_BASED) <= 1),
            (
                watch::BITMAP_WORDS,
                count(word(watch::BITMAP_WORDS)) == shape.bitmap_words(),
            ),
        ];
        match checks.into_iter().find(|(_, right)| !right) {
            Some((index, _)) => Err(wrong(index)),
            None => Ok(shape),
        }
    }
}
