//! A set of blocks as runs: gap and length, in turn, each a little-endian base-128 number.
//!
//! **Invariant**: a set has one encoding: runs as long as possible, numbers as short as possible.

use crate::FormatError;
use crate::object::field;
use blktide_types::range::BlockRange;
use blktide_types::set::BlockSet;
use blktide_types::unit::{BlockCount, BlockIndex};

/// The bytes of `set`: for each run the clear blocks before it, then its length. The set's size is not in it.
pub fn encode(set: &BlockSet) -> Vec<u8> {
    let mut out = Vec::new();
    let mut at = 0;
    for run in set.runs() {
        put(&mut out, run.start().0.saturating_sub(at));
        put(&mut out, run.count().0);
        at = run.end().0;
    }
    out
}

/// The set of `len` blocks in `bytes`. Memory: the set's, known before.
pub fn decode(bytes: &[u8], len: BlockCount) -> Result<BlockSet, FormatError> {
    let mut set = BlockSet::new(len);
    let (mut rest, mut at, mut is_first) = (bytes, 0_u64, true);
    while !rest.is_empty() {
        let (gap, after) = take(rest)?;
        let (count, after) = take(after)?;
        field("gap", is_first || gap > 0, gap)?;
        let start = at.checked_add(gap);
        let end = start.and_then(|s| s.checked_add(count));
        let (Some(start), Some(end)) = (start, end.filter(|e| *e <= len.0)) else {
            return Err(FormatError::Field {
                field: "run",
                value: count,
            });
        };
        let Some(run) = BlockRange::new(BlockIndex(start), BlockIndex(end)) else {
            return Err(FormatError::Field {
                field: "run",
                value: count,
            });
        };
        set.insert_range(run);
        (rest, at, is_first) = (after, end, false);
    }
    Ok(set)
}

fn put(out: &mut Vec<u8>, mut number: u64) {
    while number >= 128 {
        out.push(number.to_le_bytes()[0] | 128);
        number >>= 7;
    }
    out.push(number.to_le_bytes()[0]);
}

fn take(bytes: &[u8]) -> Result<(u64, &[u8]), FormatError> {
    let mut number = 0_u64;
    for (i, byte) in bytes.iter().enumerate().take(9) {
        let shift = u32::try_from(i).unwrap_or(0).saturating_mul(7);
        number |= u64::from(byte & 127).checked_shl(shift).unwrap_or(0);
        if byte & 128 == 0 {
            field("number", i == 0 || *byte != 0, *byte)?;
            let rest = bytes.get(i.saturating_add(1)..).unwrap_or_default();
            return Ok((number, rest));
        }
    }
    Err(FormatError::Field {
        field: "number",
        value: u64::MAX,
    })
}
