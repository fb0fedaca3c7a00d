//! The real clocks and the real randomness.

use crate::host;
use blktide_types::clock::{Clock, Instant, Random, WallTime};
use nix::time::{ClockId, clock_gettime};
use std::sync::Mutex;

/// The kernel's clocks.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Instant {
        Instant(u64::try_from(nanos(ClockId::CLOCK_BOOTTIME)).unwrap_or(0))
    }

    fn wall(&self) -> WallTime {
        WallTime(nanos(ClockId::CLOCK_REALTIME))
    }
}

fn nanos(clock: ClockId) -> i64 {
    clock_gettime(clock).map_or(0, |t| {
        t.tv_sec()
            .saturating_mul(1_000_000_000)
            .saturating_add(t.tv_nsec())
    })
}

/// The kernel's random numbers, mixed with the boot id, both clocks, the process and a count.
///
/// A virtual machine that is put back to an earlier state may draw the same numbers again (P2); what is
/// mixed in differs then.
#[derive(Debug)]
pub struct SystemRandom {
    state: Mutex<blake3::Hasher>,
}

impl SystemRandom {
    /// A source; reads the boot id once.
    pub fn new() -> Self {
        let mut state = blake3::Hasher::new_derive_key("blktide 2026 random names");
        state.update(&host::boot_id().map_or([0; 16], |id| id.0));
        state.update(&std::process::id().to_le_bytes());
        Self {
            state: Mutex::new(state),
        }
    }
}

impl Default for SystemRandom {
    fn default() -> Self {
        Self::new()
    }
}

impl Random for SystemRandom {
    fn fill(&self, out: &mut [u8]) {
        let mut fresh = [0_u8; 32];
        kernel_random(&mut fresh);
        let mut state = self
            .state
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        state.update(&fresh);
        state.update(&nanos(ClockId::CLOCK_BOOTTIME).to_le_bytes());
        state.update(&nanos(ClockId::CLOCK_REALTIME).to_le_bytes());
        state.finalize_xof().fill(out);
    }
}

/// Waits only while the machine has not yet gathered randomness after its boot.
fn kernel_random(out: &mut [u8; 32]) {
    let mut done = 0;
    while let Some(rest) = out.get_mut(done..).filter(|r| !r.is_empty()) {
        // SAFETY: `rest` is writable memory of the length given.
        let got = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match usize::try_from(got) {
            Ok(n) => done += n,
            Err(_) if std::io::Error::last_os_error().kind() == std::io::ErrorKind::Interrupted => {
            }
            // getrandom(2) without flags fails on no kernel that runs this program (3.17).
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_go_forward() {
        let (a, b) = (SystemClock.now(), SystemClock.now());
        assert!(a <= b && a.0 > 0);
        assert!(SystemClock.wall().0 > 1_700_000_000_000_000_000);
    }

    #[test]
    fn no_number_twice() {
        let random = SystemRandom::new();
        let ids: std::collections::HashSet<_> = (0..100).map(|_| random.id()).collect();
        assert_eq!(ids.len(), 100);
    }
}
