//! Units. An index, a count and a size are three types; converting is explicit.

use core::fmt;

/// Position of a block on a volume, counted in blocks from its first byte.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockIndex(pub u64);

/// A number of blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockCount(pub u64);

/// Bytes in a block, or in a grain: a power of two, 512 B to 1 MiB.
///
/// The *block* (unit of image and snapshot) is at least [`BlockSize::IMAGE_MIN`]; the *grain* (unit of
/// one bit) divides it and may be smaller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSize {
    shift: u8,
}

impl BlockSize {
    /// The default of an image's block: 64 KiB.
    pub const DEFAULT: Self = Self { shift: 16 };
    /// The smallest block of an image: 4 KiB.
    pub const IMAGE_MIN: Self = Self { shift: 12 };
    /// The largest: 1 MiB.
    pub const MAX: Self = Self { shift: 20 };

    /// The block size of `bytes`, or `None` if it is not a power of two in range.
    pub const fn new(bytes: u32) -> Option<Self> {
        if bytes.is_power_of_two() && bytes >= 512 && bytes <= 1 << 20 {
            #[expect(
                clippy::cast_possible_truncation,
                reason = "trailing zeros of a u32 are at most 32"
            )]
            let shift = bytes.trailing_zeros() as u8;
            Some(Self { shift })
        } else {
            None
        }
    }

    /// The block size whose base-2 logarithm is `shift`, 9 to 20.
    pub const fn from_shift(shift: u8) -> Option<Self> {
        if shift >= 9 && shift <= 20 {
            Some(Self { shift })
        } else {
            None
        }
    }

    /// Base-2 logarithm of the size in bytes.
    pub const fn shift(self) -> u8 {
        self.shift
    }

    /// Size in bytes.
    pub const fn bytes(self) -> u32 {
        1 << self.shift
    }

    /// Size in bytes, for arithmetic with offsets.
    pub const fn bytes_u64(self) -> u64 {
        1 << self.shift
    }

    /// Size in bytes, for lengths of buffers.
    pub const fn bytes_usize(self) -> usize {
        1 << self.shift
    }

    /// The block that byte `offset_bytes` lies in.
    pub const fn block_of(self, offset_bytes: u64) -> BlockIndex {
        BlockIndex(offset_bytes >> self.shift)
    }

    /// Number of blocks that `bytes` fill, the last perhaps partly.
    pub const fn count_of(self, bytes: u64) -> BlockCount {
        BlockCount(bytes.div_ceil(self.bytes_u64()))
    }
}

impl fmt::Display for BlockIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "block {}", self.0)
    }
}

impl fmt::Display for BlockSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.bytes() {
            b if b >= 1 << 20 => write!(f, "{} MiB", b >> 20),
            b if b >= 1 << 10 => write!(f, "{} KiB", b >> 10),
            b => write!(f, "{b} B"),
        }
    }
}
