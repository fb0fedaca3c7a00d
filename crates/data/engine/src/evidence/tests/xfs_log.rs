//! The head of XFS's log at every place that it can have, on logs written here by the kernel's rules.

use super::super::{Class, collect};
use super::Memory;

const BASICS: usize = 64;
const BLOCK_BYTES: usize = 4096;

/// A file system of one group whose log of 64 basic blocks lies in blocks 8 to 15.
struct Log {
    bytes: Vec<u8>,
    /// Basic blocks ever written.
    written: usize,
}

impl Log {
    fn new() -> Self {
        let mut bytes = vec![0; 64 * BLOCK_BYTES];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, b"XFSB");
        put(4, &4096_u32.to_be_bytes());
        put(48, &8_u64.to_be_bytes()); // logstart
        put(84, &64_u32.to_be_bytes()); // agblocks
        put(88, &1_u32.to_be_bytes()); // agcount
        put(96, &8_u32.to_be_bytes()); // logblocks
        put(102, &512_u16.to_be_bytes()); // sectsize
        put(124, &[6]); // agblklog
        Self { bytes, written: 0 }
    }

    /// A record: a header, and `data` basic blocks of which each begins with the cycle.
    fn record(&mut self, data: usize, operations: u32, flags: u8) {
        for basic in 0..=data {
            let cycle = u32::try_from(self.written / BASICS + 1).unwrap();
            let at = 8 * BLOCK_BYTES + self.written % BASICS * 512;
            let block = &mut self.bytes[at..at + 512];
            block.fill(0xaa);
            if basic == 0 {
                block[..4].copy_from_slice(&0xfeed_babe_u32.to_be_bytes());
                block[4..8].copy_from_slice(&cycle.to_be_bytes());
                block[8..12].copy_from_slice(&2_u32.to_be_bytes());
                let len = u32::try_from(data * 512).unwrap();
                block[12..16].copy_from_slice(&len.to_be_bytes());
                block[40..44].copy_from_slice(&operations.to_be_bytes());
                block[320..324].copy_from_slice(&(32_u32 << 10).to_be_bytes());
            } else {
                block[..4].copy_from_slice(&cycle.to_be_bytes());
                block[9] = if basic == 1 { flags } else { 0xaa };
            }
            self.written += 1;
        }
    }

    fn class(&self) -> Class {
        collect(&Memory::new(self.bytes.clone())).class()
    }
}

/// req A6: strong exactly after an unmount record, at every position of the head, before and after the log has gone round;
/// and each mount and unmount changes the evidence.
#[test]
fn the_head_is_found_everywhere() {
    for data in [1, 2, 5, 7] {
        let mut log = Log::new();
        let mut seen = Vec::new();
        for round in 0..200 {
            log.record(data, 3, 0);
            assert_eq!(log.class(), Class::Weak, "mounted, round {round} of {data}");
            log.record(1, 1, 0x20);
            assert_eq!(
                log.class(),
                Class::Strong,
                "unmounted, round {round} of {data}"
            );
            let evidence = collect(&Memory::new(log.bytes.clone()));
            assert!(
                !seen.contains(&evidence),
                "round {round} of {data} is like an earlier one"
            );
            seen.push(evidence);
        }
        assert!(log.written > 3 * BASICS);
    }
}

/// A log that is empty, whole of one cycle, or nonsense is weak, and is read in bounds.
#[test]
fn other_logs_are_weak() {
    let mut log = Log::new();
    assert_eq!(log.class(), Class::Weak, "nothing in it");
    log.record(BASICS - 1, 1, 0x20);
    log.bytes[8 * BLOCK_BYTES + 12..8 * BLOCK_BYTES + 16].copy_from_slice(&[0xff; 4]);
    assert_eq!(log.class(), Class::Weak, "a record longer than the log");
    let mut log = Log::new();
    log.record(1, 1, 0x20);
    log.bytes[48..56].copy_from_slice(&0_u64.to_be_bytes());
    assert_eq!(log.class(), Class::Weak, "log on another device");
    log.bytes[48..56].copy_from_slice(&u64::MAX.to_be_bytes());
    assert_eq!(log.class(), Class::Weak, "log past the end");
    log.bytes[124] = 200;
    assert_eq!(log.class(), Class::Weak);
}
