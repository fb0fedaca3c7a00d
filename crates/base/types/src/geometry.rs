//! The shape of a volume: bytes, block, grain, sectors.

use crate::range::BlockRange;
use crate::unit::{BlockCount, BlockIndex, BlockSize};

/// The shape of a volume.
///
/// Invariant: `volume_bytes` is a multiple of `logical_sector_bytes`, not zero; `grain` divides `block_size`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    volume_bytes: u64,
    block_size: BlockSize,
    grain: BlockSize,
    logical_sector_bytes: u32,
    physical_sector_bytes: u32,
}

impl Geometry {
    /// A geometry, or `None` if the numbers contradict each other (see the invariant).
    pub const fn new(
        volume_bytes: u64,
        block_size: BlockSize,
        grain: BlockSize,
        logical_sector_bytes: u32,
        physical_sector_bytes: u32,
    ) -> Option<Self> {
        let sectors_fit = logical_sector_bytes.is_power_of_two()
            && logical_sector_bytes >= 512
            && logical_sector_bytes <= grain.bytes()
            && physical_sector_bytes.is_power_of_two()
            && physical_sector_bytes >= logical_sector_bytes;
        if volume_bytes == 0
            || volume_bytes > 1 << 62
            || !sectors_fit
            || !volume_bytes.is_multiple_of(logical_sector_bytes as u64)
            || grain.shift() > block_size.shift()
            || block_size.shift() < BlockSize::IMAGE_MIN.shift()
        {
            return None;
        }
        Some(Self {
            volume_bytes,
            block_size,
            grain,
            logical_sector_bytes,
            physical_sector_bytes,
        })
    }

    /// Bytes of the volume.
    pub const fn volume_bytes(&self) -> u64 {
        self.volume_bytes
    }

    /// Unit of image and snapshot.
    pub const fn block_size(&self) -> BlockSize {
        self.block_size
    }

    /// Unit of one bit of the tracker.
    pub const fn grain(&self) -> BlockSize {
        self.grain
    }

    /// Smallest addressable unit, bytes.
    pub const fn logical_sector_bytes(&self) -> u32 {
        self.logical_sector_bytes
    }

    /// Unit that the device writes without reading, bytes.
    pub const fn physical_sector_bytes(&self) -> u32 {
        self.physical_sector_bytes
    }

    /// Number of blocks, the short last one counted.
    pub const fn block_count(&self) -> BlockCount {
        self.block_size.count_of(self.volume_bytes)
    }

    /// Number of grains, the short last one counted.
    pub const fn grain_count(&self) -> u64 {
        self.grain.count_of(self.volume_bytes).0
    }

    /// All blocks of the volume.
    pub fn all_blocks(&self) -> BlockRange {
        BlockRange::new(BlockIndex(0), BlockIndex(self.block_count().0))
            .unwrap_or(BlockRange::first())
    }

    /// Bytes of `block`: the block size, or less for the last one; 0 past the end.
    pub const fn block_bytes(&self, block: BlockIndex) -> u32 {
        let (start, size) = (self.block_start(block), self.block_size.bytes_u64());
        if start >= self.volume_bytes {
            0
        } else if self.volume_bytes - start >= size {
            self.block_size.bytes()
        } else {
            #[expect(clippy::cast_possible_truncation, reason = "less than a block")]
            let short = (self.volume_bytes - start) as u32;
            short
        }
    }

    /// First byte of `block`; saturates past `u64::MAX`.
    pub const fn block_start(&self, block: BlockIndex) -> u64 {
        block.0.saturating_mul(self.block_size.bytes_u64())
    }

    /// First byte and number of bytes of `range`, cut at the end of the volume.
    pub fn bytes_of(&self, range: BlockRange) -> (u64, u64) {
        let start = self.block_start(range.start());
        let end = self.block_start(range.end()).min(self.volume_bytes);
        (start, end.saturating_sub(start))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn odd() -> Geometry {
        let block = BlockSize::new(65536).unwrap();
        Geometry::new(
            3 * 65536 + 512 * 7,
            block,
            BlockSize::new(4096).unwrap(),
            512,
            4096,
        )
        .unwrap()
    }

    #[test]
    fn the_last_block_is_short_and_counted() {
        let g = odd();
        assert_eq!(g.block_count(), BlockCount(4));
        assert_eq!(g.block_bytes(BlockIndex(2)), 65536);
        assert_eq!(g.block_bytes(BlockIndex(3)), 3584);
        assert_eq!(g.block_bytes(BlockIndex(4)), 0);
        assert_eq!(g.bytes_of(g.all_blocks()), (0, g.volume_bytes()));
        assert_eq!(g.grain_count(), 49);
    }

    #[test]
    fn contradictions_are_refused() {
        let (b, g) = (BlockSize::DEFAULT, BlockSize::IMAGE_MIN);
        assert!(Geometry::new(0, b, g, 512, 512).is_none());
        assert!(Geometry::new(513, b, g, 512, 512).is_none());
        assert!(
            Geometry::new(1 << 20, g, b, 512, 512).is_none(),
            "grain above block"
        );
        assert!(Geometry::new(1 << 20, b, g, 4096, 512).is_none());
        assert!(Geometry::new(1 << 20, b, BlockSize::new(512).unwrap(), 4096, 4096).is_none());
    }
}
