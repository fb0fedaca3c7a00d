//! Time that moves only when a test says so, and randomness that replays.

use crate::seed::{Numbers, Seed};
use blktide_types::clock::{Clock, Instant, Random, WallTime};
use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;
use std::sync::{Mutex, PoisonError};

/// A clock that stands still until [`TestClock::advance`].
#[derive(Debug, Default)]
pub struct TestClock {
    nanos: AtomicU64,
}

impl TestClock {
    /// A clock at its origin.
    pub fn new() -> Self {
        Self::default()
    }

    /// Moves both clocks on.
    pub fn advance(&self, by: Duration) {
        let by = u64::try_from(by.as_nanos()).expect("a test's time fits");
        self.nanos.fetch_add(by, Ordering::SeqCst);
    }
}

impl Clock for TestClock {
    fn now(&self) -> Instant {
        Instant(self.nanos.load(Ordering::SeqCst))
    }

    fn wall(&self) -> WallTime {
        let nanos = i64::try_from(self.nanos.load(Ordering::SeqCst)).expect("a test's time fits");
        // 2026-11-17T00:00:00Z, so that what is printed looks like a time.
        WallTime(1_794_873_600_000_000_000 + nanos)
    }
}

/// Random numbers of a seed.
#[derive(Debug)]
pub struct TestRandom {
    numbers: Mutex<Numbers>,
}

impl TestRandom {
    /// The numbers of `seed`.
    pub const fn new(seed: Seed) -> Self {
        Self {
            numbers: Mutex::new(seed.numbers()),
        }
    }
}

impl Random for TestRandom {
    fn fill(&self, out: &mut [u8]) {
        self.numbers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .fill(out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_moves_when_told_and_ids_differ() {
        let clock = TestClock::new();
        let before = clock.now();
        assert_eq!(clock.now(), before);
        clock.advance(Duration::from_millis(5));
        assert_eq!(clock.now().since(before), Duration::from_millis(5));
        let (one, two) = (TestRandom::new(Seed(1)), TestRandom::new(Seed(1)));
        assert_eq!(one.id(), two.id());
        assert_ne!(one.id(), one.id());
    }
}
