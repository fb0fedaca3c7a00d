//! What a freeze does to the superblock of an ext4: all that was written is in its place, and the journal is empty.

use std::ops::Range;

/// Where the superblock lies in the volume's first unit.
const SUPERBLOCK: Range<usize> = 1024..2048;
/// The features of which one says that the journal is to be replayed.
const INCOMPATIBLE: Range<usize> = 0x60..0x64;
const NEEDS_RECOVERY: u8 = 4;
/// What freeze and thaw each write anew: the time of writing, the features (the journal, the list of orphans), the sum of what was
/// written, more of the time, the checksum.
const WRITTEN: [Range<usize>; 5] = [
    0x30..0x34,
    0x60..0x68,
    0x178..0x180,
    0x274..0x275,
    0x3fc..0x400,
];

/// Whether `unit`, the volume's first, is of a moment in which the file system was frozen, and but for that is as in `thawed`.
pub(super) fn stands_still(unit: &[u8], thawed: &[u8]) -> bool {
    let (Some(is), Some(was)) = (unit.get(SUPERBLOCK), thawed.get(SUPERBLOCK)) else {
        return false;
    };
    let replays = |block: &[u8]| {
        let first = block.get(INCOMPATIBLE).and_then(<[u8]>::first);
        first.is_some_and(|byte| byte & NEEDS_RECOVERY != 0)
    };
    let same = |at: usize| unit.get(at) == thawed.get(at);
    let written = |at: usize| {
        let inside = at.checked_sub(SUPERBLOCK.start);
        inside.is_some_and(|at| WRITTEN.iter().any(|range| range.contains(&at)))
    };
    !replays(is) && replays(was) && (0..unit.len()).all(|at| same(at) || written(at))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_freeze_is_a_freeze() {
        let mut thawed = vec![7; 4096];
        let mut frozen = thawed.clone();
        frozen[1024 + 0x60] &= !NEEDS_RECOVERY;
        assert!(stands_still(&frozen, &thawed));
        assert!(!stands_still(&thawed, &thawed), "the journal is in use");
        assert!(!stands_still(&frozen, &frozen), "a clean unmount");
        frozen[1024 + 0x30] = 8;
        assert!(stands_still(&frozen, &thawed));
        for at in [0, 1023, 1024 + 0x34, 2048, 4095] {
            let mut other = frozen.clone();
            other[at] = 9;
            assert!(!stands_still(&other, &thawed), "byte {at}");
        }
        thawed.truncate(100);
        assert!(!stands_still(&frozen, &thawed));
    }
}
