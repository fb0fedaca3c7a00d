//! The oracle: a volume that is a `Vec<u8>`, its snapshots copies, its change sets plain bits.
//!
//! It shares no code with the tracker: sizes are divided here, bits are bitvec's.

use bitvec::vec::BitVec;
use blktide_types::set::BlockSet;
use blktide_types::unit::{BlockCount, BlockIndex};
use std::collections::BTreeMap;

/// What a volume must hold and have reported.
#[derive(Clone, Debug)]
pub struct ReferenceVolume {
    bytes: Vec<u8>,
    block_bytes: usize,
    snapshots: BTreeMap<String, Vec<u8>>,
    consumers: BTreeMap<String, BitVec>,
}

impl ReferenceVolume {
    /// A volume of `len_bytes` zeroes, whose change sets count blocks of `block_bytes` (the tracker's grain or the
    /// image's block, as the test wants to compare).
    pub fn new(len_bytes: usize, block_bytes: usize) -> Self {
        assert!(
            len_bytes > 0 && block_bytes > 0,
            "an empty reference volume"
        );
        Self {
            bytes: vec![0; len_bytes],
            block_bytes,
            snapshots: BTreeMap::new(),
            consumers: BTreeMap::new(),
        }
    }

    /// The whole content.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Number of blocks, the short last one counted.
    pub fn block_count(&self) -> usize {
        self.bytes.len().div_ceil(self.block_bytes)
    }

    /// Content of `block`; the last may be short.
    pub fn block(&self, block: usize) -> &[u8] {
        Self::block_in(&self.bytes, block, self.block_bytes)
    }

    /// A write.
    pub fn write(&mut self, offset_bytes: usize, data: &[u8]) {
        self.bytes[offset_bytes..offset_bytes + data.len()].copy_from_slice(data);
        self.touch(offset_bytes, data.len());
    }

    /// A write of zeroes; on a `fuse` volume also a discard (P9).
    pub fn zero(&mut self, offset_bytes: usize, len_bytes: usize) {
        self.bytes[offset_bytes..offset_bytes + len_bytes].fill(0);
        self.touch(offset_bytes, len_bytes);
    }

    /// Marks a range as changed, its content as before: what a tracker may see that was about to be written.
    pub fn touch(&mut self, offset_bytes: usize, len_bytes: usize) {
        if len_bytes == 0 {
            return;
        }
        let first = offset_bytes / self.block_bytes;
        let last = (offset_bytes + len_bytes - 1) / self.block_bytes;
        for changed in self.consumers.values_mut() {
            changed[first..=last].fill(true);
        }
    }

    /// Keeps the content of this instant under `name`, replacing what had that name.
    pub fn snapshot(&mut self, name: &str) {
        self.snapshots.insert(name.to_owned(), self.bytes.clone());
    }

    /// The content kept under `name`.
    pub fn snapshot_bytes(&self, name: &str) -> &[u8] {
        self.snapshots
            .get(name)
            .unwrap_or_else(|| panic!("no snapshot {name}"))
    }

    /// Content of `block` in the snapshot `name`.
    pub fn snapshot_block(&self, name: &str, block: usize) -> &[u8] {
        Self::block_in(self.snapshot_bytes(name), block, self.block_bytes)
    }

    /// Forgets a snapshot.
    pub fn drop_snapshot(&mut self, name: &str) {
        self.snapshots.remove(name);
    }

    /// Starts the change set of `consumer` anew: nothing has changed since now.
    pub fn begin(&mut self, consumer: &str) {
        let clear = BitVec::repeat(false, self.block_count());
        self.consumers.insert(consumer.to_owned(), clear);
    }

    /// Blocks written since `consumer` began, whether their bytes differ or not.
    pub fn changed(&self, consumer: &str) -> BlockSet {
        let bits = self
            .consumers
            .get(consumer)
            .unwrap_or_else(|| panic!("no consumer {consumer}"));
        self.set_of(bits.iter_ones())
    }

    /// Blocks whose bytes differ from the snapshot `name`: what a change set must at least hold.
    pub fn differs_from(&self, name: &str) -> BlockSet {
        let differing =
            (0..self.block_count()).filter(|b| self.block(*b) != self.snapshot_block(name, *b));
        self.set_of(differing)
    }

    fn set_of(&self, blocks: impl Iterator<Item = usize>) -> BlockSet {
        let number = |n: usize| u64::try_from(n).expect("a block number");
        let mut set = BlockSet::new(BlockCount(number(self.block_count())));
        for block in blocks {
            set.insert(BlockIndex(number(block)));
        }
        set
    }

    fn block_in(bytes: &[u8], block: usize, block_bytes: usize) -> &[u8] {
        let start = block * block_bytes;
        &bytes[start..bytes.len().min(start + block_bytes)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_consumer_sees_what_came_after_it() {
        let mut volume = ReferenceVolume::new(10_000, 4096);
        assert_eq!(volume.block_count(), 3);
        volume.begin("a");
        volume.write(4095, &[1, 2]);
        volume.snapshot("then");
        volume.begin("b");
        volume.zero(9_999, 1);
        let blocks = |name| {
            volume
                .changed(name)
                .blocks()
                .map(|b| b.0)
                .collect::<Vec<_>>()
        };
        assert_eq!(blocks("a"), [0, 1, 2]);
        assert_eq!(blocks("b"), [2]);
        assert!(
            volume.differs_from("then").is_empty(),
            "zero over zero is no difference"
        );
        assert_eq!(volume.block(2).len(), 10_000 - 8192);
        assert_eq!(volume.snapshot_block("then", 1)[0], 2);
    }
}
