//! Time and randomness, passed in: nothing below the binaries reads a clock or draws a number itself.

use core::time::Duration;

/// An instant of a monotonic clock, in nanoseconds since an arbitrary origin (the boot).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Instant(pub u64);

impl Instant {
    /// This instant, `by` later; saturates.
    #[must_use]
    pub fn after(self, by: Duration) -> Self {
        Self(
            self.0
                .saturating_add(u64::try_from(by.as_nanos()).unwrap_or(u64::MAX)),
        )
    }

    /// Time from `earlier` to here; zero if that is later.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

/// Wall-clock time: nanoseconds since 1970 in UTC. Shown to people, never used for order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct WallTime(pub i64);

/// The clocks.
pub trait Clock: Send + Sync {
    /// Monotonic, goes on while suspended (`CLOCK_BOOTTIME`).
    fn now(&self) -> Instant;
    /// Wall clock.
    fn wall(&self) -> WallTime;
}

/// A source of numbers that nobody can guess or repeat.
pub trait Random: Send + Sync {
    /// Fills `out`.
    fn fill(&self, out: &mut [u8]);

    /// 128 fresh bits; never all zero.
    fn id(&self) -> [u8; 16] {
        let mut id = [0; 16];
        while id == [0; 16] {
            self.fill(&mut id);
        }
        id
    }
}
