//! Which image of a volume is meant: `@3`, `@latest`, `@2026-11-17`.

use blktide_types::clock::WallTime;

/// Which image of a volume is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// The image of this number.
    Number(u64),
    /// The newest.
    Latest,
    /// The newest whose instant lies in `from ..= until` (`from` may be the beginning of time).
    Newest {
        /// Earliest instant.
        from: WallTime,
        /// Latest instant.
        until: WallTime,
    },
}
