//! What a block of an image is.

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
