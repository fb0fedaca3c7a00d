//! ext2, ext3, ext4: primary superblock, group descriptors, journal superblock.
//!
//! A mount that writes moves the journal's sequence and the superblock; `e2fsck` moves the superblock. Strong only with
//! a journal inside, empty, and a file system that was unmounted cleanly.
//! Source: Documentation/filesystems/ext4 of Linux 6.12; `lib/ext2fs` of e2fsprogs 1.47.

use super::reader::{Collector, Fields};
use super::{Class, Kind};

const SUPERBLOCK_AT: u64 = 1024;
const SUPERBLOCK_BYTES: u64 = 1024;
const MAGIC: u16 = 0xef53;
const STATE_CLEAN: u16 = 1;
const COMPAT_JOURNAL: u32 = 0x4;
const COMPAT_SPARSE_SUPER2: u32 = 0x200;
const INCOMPAT_RECOVER: u32 = 0x4;
const INCOMPAT_JOURNAL_DEVICE: u32 = 0x8;
const INCOMPAT_META_GROUPS: u32 = 0x10;
const INCOMPAT_64BIT: u32 = 0x80;
const RO_COMPAT_SPARSE_SUPER: u32 = 0x1;
const RO_COMPAT_ORPHANS: u32 = 0x1_0000;
const INODE_EXTENTS: u32 = 0x8_0000;
const EXTENT_MAGIC: u16 = 0xf30a;
const EXTENT_DEPTH_MAX: u16 = 5;
const JOURNAL_MAGIC: u32 = 0xc03b_3998;

struct Superblock {
    bytes: Vec<u8>,
    block_bytes: u64,
    /// Block that holds the superblock.
    at_block: u64,
    first_block: u64,
    group_blocks: u64,
    group_count: u64,
    descriptor_bytes: u64,
}

/// `None` if it is none of them.
pub(super) fn collect(collector: &mut Collector<'_>) -> Option<(Kind, Class)> {
    let bytes = collector.read(SUPERBLOCK_AT, SUPERBLOCK_BYTES)?;
    if bytes.le16(0x38)? != MAGIC {
        return None;
    }
    let superblock = Superblock::new(bytes)?;
    collector.cover(SUPERBLOCK_AT, SUPERBLOCK_BYTES);
    for index in 0..superblock.descriptor_blocks() {
        let at = superblock.descriptor_block(index)?;
        let block_bytes = superblock.block_bytes;
        if !collector.cover(at.saturating_mul(block_bytes), block_bytes) {
            return Some((Kind::Ext4, Class::Weak));
        }
    }
    let journal_empty = journal(collector, &superblock).unwrap_or(false);
    let class = if journal_empty && superblock.clean() {
        Class::Strong
    } else {
        Class::Weak
    };
    Some((Kind::Ext4, class))
}

impl Superblock {
    fn new(bytes: Vec<u8>) -> Option<Self> {
        let shift = bytes.le32(0x18).filter(|s| *s <= 6)?;
        let block_bytes = 1024_u64 << shift;
        let incompat = bytes.le32(0x60)?;
        let wide = incompat & INCOMPAT_64BIT != 0;
        let high = if wide { bytes.le32(0x150)? } else { 0 };
        let blocks = u64::from(high) << 32 | u64::from(bytes.le32(4)?);
        let first_block = u64::from(bytes.le32(0x14)?);
        let group_blocks = u64::from(bytes.le32(0x20)?);
        let descriptor_bytes = if wide { bytes.le16(0xfe)?.into() } else { 32 };
        let sane = group_blocks > 0
            && first_block < blocks
            && (32..=1024).contains(&descriptor_bytes)
            && u64::is_power_of_two(descriptor_bytes);
        sane.then(|| Self {
            // With 1 KiB blocks the superblock is block 1, also where the first block is 0 (bigalloc).
            at_block: u64::from(block_bytes == 1024),
            block_bytes,
            first_block,
            group_blocks,
            group_count: blocks.saturating_sub(first_block).div_ceil(group_blocks),
            descriptor_bytes,
            bytes,
        })
    }

    fn compat(&self) -> u32 {
        self.bytes.le32(0x5c).unwrap_or(0)
    }

    fn incompat(&self) -> u32 {
        self.bytes.le32(0x60).unwrap_or(0)
    }

    fn ro_compat(&self) -> u32 {
        self.bytes.le32(0x64).unwrap_or(0)
    }

    fn clean(&self) -> bool {
        self.bytes.le16(0x3a) == Some(STATE_CLEAN)
            && self.incompat() & (INCOMPAT_RECOVER | INCOMPAT_JOURNAL_DEVICE) == 0
            && self.ro_compat() & RO_COMPAT_ORPHANS == 0
    }

    fn descriptors_per_block(&self) -> u64 {
        (self.block_bytes / self.descriptor_bytes).max(1)
    }

    fn descriptor_blocks(&self) -> u64 {
        self.group_count.div_ceil(self.descriptors_per_block())
    }

    /// The block that holds the `index`-th block of group descriptors.
    fn descriptor_block(&self, index: u64) -> Option<u64> {
        let first_meta = u64::from(self.bytes.le32(0x104)?);
        if self.incompat() & INCOMPAT_META_GROUPS == 0 || index < first_meta {
            return self.at_block.checked_add(1)?.checked_add(index);
        }
        let group = index.checked_mul(self.descriptors_per_block())?;
        let start = group
            .checked_mul(self.group_blocks)?
            .checked_add(self.first_block)?;
        let start = if group == 0 { self.at_block } else { start };
        start.checked_add(u64::from(self.has_superblock(group)))
    }

    /// Whether a group begins with a copy of the superblock.
    fn has_superblock(&self, group: u64) -> bool {
        if group == 0 {
            return true;
        }
        if self.compat() & COMPAT_SPARSE_SUPER2 != 0 {
            return [0x24c, 0x250]
                .iter()
                .any(|at| self.bytes.le32(*at).map(u64::from) == Some(group));
        }
        if group == 1 || self.ro_compat() & RO_COMPAT_SPARSE_SUPER == 0 {
            return true;
        }
        [3, 5, 7].iter().any(|base| {
            let mut power = *base;
            while power < group {
                power *= base;
            }
            power == group
        })
    }
}

/// Covers the journal's superblock: whether there is one inside and the journal is empty.
fn journal(collector: &mut Collector<'_>, superblock: &Superblock) -> Option<bool> {
    let number = u64::from(superblock.bytes.le32(0xe0)?);
    let elsewhere = superblock.bytes.le32(0xe4)? != 0;
    if superblock.compat() & COMPAT_JOURNAL == 0 || number == 0 || elsewhere {
        return Some(false);
    }
    let inode = read_inode(collector, superblock, number)?;
    let block = first_block(collector, superblock, &inode)?;
    let at = block.checked_mul(superblock.block_bytes)?;
    collector.cover(at, superblock.block_bytes);
    let journal = collector.read(at, 1024)?;
    Some(journal.be32(0)? == JOURNAL_MAGIC && journal.be32(28)? == 0)
}

fn read_inode(
    collector: &mut Collector<'_>,
    superblock: &Superblock,
    number: u64,
) -> Option<Vec<u8>> {
    let per_group = u64::from(superblock.bytes.le32(0x28)?);
    let old = superblock.bytes.le32(0x4c)? == 0;
    let inode_bytes = if old {
        128
    } else {
        u64::from(superblock.bytes.le16(0x58)?)
    };
    let index = number.checked_sub(1)?;
    let group = index.checked_div(per_group)?;
    if group >= superblock.group_count || !(128..=4096).contains(&inode_bytes) {
        return None;
    }
    let per_block = superblock.descriptors_per_block();
    let descriptor_at = superblock
        .descriptor_block(group / per_block)?
        .checked_mul(superblock.block_bytes)?
        .checked_add((group % per_block).checked_mul(superblock.descriptor_bytes)?)?;
    let descriptor = collector.read(descriptor_at, superblock.descriptor_bytes)?;
    let high = if superblock.descriptor_bytes >= 64 {
        descriptor.le32(0x28)?
    } else {
        0
    };
    let table = u64::from(high) << 32 | u64::from(descriptor.le32(8)?);
    let within = (index % per_group).checked_mul(inode_bytes)?;
    let at = table
        .checked_mul(superblock.block_bytes)?
        .checked_add(within)?;
    collector.read(at, 128)
}

/// Where the first block of a file lies.
fn first_block(
    collector: &mut Collector<'_>,
    superblock: &Superblock,
    inode: &[u8],
) -> Option<u64> {
    let map = inode.get(0x28..0x28 + 60)?;
    if inode.le32(0x20)? & INODE_EXTENTS == 0 {
        return map.le32(0).map(u64::from).filter(|b| *b != 0);
    }
    let mut node = map.to_vec();
    for _ in 0..=EXTENT_DEPTH_MAX {
        if node.le16(0)? != EXTENT_MAGIC || node.le16(2)? == 0 {
            return None;
        }
        let depth = node.le16(6)?;
        if depth == 0 {
            let low = u64::from(node.le32(20)?);
            let starts_there = node.le32(12)? == 0;
            let block = u64::from(node.le16(18)?) << 32 | low;
            return starts_there.then_some(block);
        }
        let next = u64::from(node.le16(20)?) << 32 | u64::from(node.le32(16)?);
        let at = next.checked_mul(superblock.block_bytes)?;
        node = collector.read(at, superblock.block_bytes)?;
    }
    None
}
