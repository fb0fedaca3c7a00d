//! XFS: superblock, AGF, AGI and AGFL of each group, and the head of the log.
//!
//! Every mount that writes ends with an unmount record, so the log's head moves. Strong only with a log inside whose
//! last record is that of a clean unmount.
//! Source: `fs/xfs/xfs_log_recover.c` and `libxfs/xfs_log_format.h` of Linux 6.12.

use super::reader::{Collector, Fields};
use super::{Class, Kind};

const MAGIC: &[u8] = b"XFSB";
const RECORD_MAGIC: u32 = 0xfeed_babe;
/// Basic block: unit of the log.
const BASIC_BYTES: u64 = 512;
/// How far back from the head its last record begins at most: a record of 256 KiB, padded to a stripe of as much.
const RECORD_BASICS_MAX: u64 = 1100;
const HEADER_CYCLE_BYTES: u32 = 32 << 10;
const VERSION_2: u32 = 2;
const OPERATION_UNMOUNT: u8 = 0x20;

/// `None` if it is none.
pub(super) fn collect(collector: &mut Collector<'_>) -> Option<(Kind, Class)> {
    let superblock = collector.read(0, 512)?;
    if superblock.get(..4)? != MAGIC {
        return None;
    }
    let block_bytes = power_of_two(superblock.be32(4)?.into(), 512..=65536)?;
    let sector_bytes = power_of_two(superblock.be16(102)?.into(), 512..=32768)?;
    let group_blocks = u64::from(superblock.be32(84)?);
    let group_count = u64::from(superblock.be32(88)?);
    for group in 0..group_count {
        // Superblock (copies of it but in the first), AGF, AGI, AGFL: the first four sectors of a group.
        let at = group
            .saturating_mul(group_blocks)
            .saturating_mul(block_bytes);
        if !collector.cover(at, sector_bytes.saturating_mul(4)) {
            return Some((Kind::Xfs, Class::Weak));
        }
    }
    let complete = superblock.get(126) == Some(&0);
    let clean = log(collector, &superblock, block_bytes).unwrap_or(false);
    let class = if clean && complete {
        Class::Strong
    } else {
        Class::Weak
    };
    Some((Kind::Xfs, class))
}

fn power_of_two(number: u64, range: core::ops::RangeInclusive<u64>) -> Option<u64> {
    (number.is_power_of_two() && range.contains(&number)).then_some(number)
}

/// The log, counted in basic blocks.
struct Log {
    at: u64,
    basics: u64,
}

/// Covers the log's last record and the block after it: whether the log is inside and ends with a clean unmount.
fn log(collector: &mut Collector<'_>, superblock: &[u8], block_bytes: u64) -> Option<bool> {
    let start = superblock.be64(48)?;
    if start == 0 {
        return Some(false);
    }
    let shift = u32::from(*superblock.get(124)?);
    let group = start.checked_shr(shift)?;
    let within = start.checked_sub(group.checked_shl(shift)?)?;
    let at = group
        .checked_mul(superblock.be32(84)?.into())?
        .checked_add(within)?
        .checked_mul(block_bytes)?;
    let bytes = u64::from(superblock.be32(96)?).checked_mul(block_bytes)?;
    let log = Log {
        at,
        basics: bytes / BASIC_BYTES,
    };
    let head = log.head(collector)?;
    let record = log.last_record(collector, head)?;
    // The record may go round the end.
    let mut next = record.start;
    for _ in 0..=record.basics {
        collector.cover(log.offset(next)?, BASIC_BYTES);
        next = (next + 1) % log.basics;
    }
    Some(record.unmount && record.start.checked_add(record.basics)? % log.basics == head)
}

struct Record {
    start: u64,
    basics: u64,
    unmount: bool,
}

impl Log {
    fn offset(&self, basic: u64) -> Option<u64> {
        self.at.checked_add(basic.checked_mul(BASIC_BYTES)?)
    }

    fn read(&self, collector: &mut Collector<'_>, basic: u64) -> Option<Vec<u8>> {
        collector.read(self.offset(basic)?, BASIC_BYTES)
    }

    /// How often the log had gone round when a basic block was written.
    fn cycle(&self, collector: &mut Collector<'_>, basic: u64) -> Option<u32> {
        let bytes = self.read(collector, basic)?;
        match bytes.be32(0)? {
            RECORD_MAGIC => bytes.be32(4),
            cycle => Some(cycle),
        }
    }

    /// The block that would be written next: the first of an older cycle than the log's beginning.
    fn head(&self, collector: &mut Collector<'_>) -> Option<u64> {
        let first = self.cycle(collector, 0)?;
        let (mut new, mut old) = (0, self.basics.checked_sub(1)?);
        if self.cycle(collector, old)? == first {
            return Some(0);
        }
        while old.checked_sub(new)? > 1 {
            let middle = new.midpoint(old);
            if self.cycle(collector, middle)? == first {
                new = middle;
            } else {
                old = middle;
            }
        }
        Some(old)
    }

    fn last_record(&self, collector: &mut Collector<'_>, head: u64) -> Option<Record> {
        for back in 1..=RECORD_BASICS_MAX.min(self.basics) {
            let start = (head.checked_add(self.basics)?.checked_sub(back)?) % self.basics;
            let header = self.read(collector, start)?;
            if header.be32(0)? != RECORD_MAGIC {
                continue;
            }
            let data_basics = u64::from(header.be32(12)?).div_ceil(BASIC_BYTES);
            let headers = match header.be32(8)? {
                VERSION_2 => u64::from(header.be32(320)?.div_ceil(HEADER_CYCLE_BYTES).max(1)),
                _ => 1,
            };
            let operation = self.read(collector, start.checked_add(headers)? % self.basics)?;
            let single = header.be32(40)? == 1;
            return Some(Record {
                start,
                basics: headers.checked_add(data_basics)?.min(RECORD_BASICS_MAX),
                unmount: single && operation.get(9)? & OPERATION_UNMOUNT != 0,
            });
        }
        None
    }
}
