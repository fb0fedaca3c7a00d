//! A limit on what is read per second: each piece has its time, in turn.
//!
//! **Invariant**: in any stretch of time not more is let through than rate × time and one piece a worker.

use crate::error::JobError;
use crate::running::Control;
use blktide_types::clock::Instant;
use core::sync::atomic::{AtomicU64, Ordering};

/// A limit; 0 bytes a second is none.
#[derive(Debug)]
pub(crate) struct Rate {
    bytes_per_second: u64,
    free_at_ns: AtomicU64,
}

impl Rate {
    pub(crate) const fn new(bytes_per_second: u64) -> Self {
        Self {
            bytes_per_second,
            free_at_ns: AtomicU64::new(0),
        }
    }

    /// The largest piece that takes at most half a second: a reader that makes no progress for long loses its snapshot
    /// (P8), so a low rate must mean small pieces, not long pauses.
    pub(crate) fn piece_bytes(&self, wished_bytes: u64, block_bytes: u64) -> u64 {
        if self.bytes_per_second == 0 {
            return wished_bytes;
        }
        let blocks = (self.bytes_per_second / 2 / block_bytes).max(1);
        wished_bytes.min(blocks.saturating_mul(block_bytes))
    }

    /// Waits until `bytes` may be read. Errors: cancelled meanwhile.
    pub(crate) fn wait(&self, bytes: u64, control: &Control) -> Result<(), JobError> {
        if self.bytes_per_second == 0 {
            return Ok(());
        }
        let cost_ns =
            u64::try_from(u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second))
                .unwrap_or(u64::MAX);
        let mut free_at = self.free_at_ns.load(Ordering::Relaxed);
        loop {
            let start = free_at.max(control.clock().now().0);
            match self.free_at_ns.compare_exchange_weak(
                free_at,
                start.saturating_add(cost_ns),
                Ordering::Relaxed,
                Ordering::Relaxed,
            ) {
                Ok(_) => return control.pause_until(Instant(start)),
                Err(seen) => free_at = seen,
            }
        }
    }
}
