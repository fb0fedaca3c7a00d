//! The note that a freeze of ours may have begun, in the kernel's memory: for whoever comes after a control side that was killed
//! together with its guards.
//!
//! **Invariant**: it stands there from before the freezing call until each file system is known to be thawed. Whoever dies, or
//! does not know, leaves it.

use blktide_engine::Memory;
use blktide_format::shared::watch;
use blktide_types::clock::Instant;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// A note that was made. Dropped, it stays.
#[derive(Debug)]
pub(crate) struct FreezeNote {
    memory: Arc<dyn Memory>,
    /// Boot clock, nanoseconds; not 0.
    since: u64,
}

impl FreezeNote {
    /// Notes in the marks' `memory` that a freeze is about to be asked for.
    pub(crate) fn begin(memory: &Arc<dyn Memory>, since: u64) -> Self {
        let since = since.max(1);
        if let Some(word) = memory.words().get(watch::FROZEN_SINCE) {
            word.store(since, Ordering::SeqCst);
        }
        Self {
            memory: Arc::clone(memory),
            since,
        }
    }

    /// Notes which guard is asked next: if its call never returns, it is that one's.
    pub(crate) fn asks(&self, guard: i32) {
        if let Some(word) = self.memory.words().get(watch::FROZEN_GUARD) {
            word.store(u64::try_from(guard).unwrap_or(0), Ordering::SeqCst);
        }
    }

    /// It is known to be over. A note that another freeze has made since stays.
    pub(crate) fn take_back(self) {
        if let Some(word) = self.memory.words().get(watch::FROZEN_SINCE) {
            let _another = word.compare_exchange(self.since, 0, Ordering::SeqCst, Ordering::SeqCst);
        }
    }
}

/// A freeze that somebody has left noted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LeftOver {
    age: Duration,
    guard: i32,
}

impl LeftOver {
    /// What stands in the head of the marks; `None`: nothing.
    pub(crate) fn of(head: &dyn Fn(usize) -> u64, now: Instant) -> Option<Self> {
        let since = head(watch::FROZEN_SINCE);
        (since != 0).then(|| Self {
            age: Duration::from_nanos(now.0.saturating_sub(since)),
            guard: i32::try_from(head(watch::FROZEN_GUARD)).unwrap_or(0),
        })
    }

    /// Whether nobody can be at it any more: its time is over, and the guard that was asked last is gone.
    pub(crate) fn is_over(self, longest: Duration) -> bool {
        self.age > longest && !self.is_under_way()
    }

    /// Whether the guard that was asked last lives: no other freeze may be noted in the place of its own.
    pub(crate) fn is_under_way(self) -> bool {
        is_guard(self.guard)
    }
}

/// Whether a process of this number is a thaw guard, alive or dying in its call.
fn is_guard(pid: i32) -> bool {
    // One that is dying has no command line any more.
    std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| {
        line.is_empty() || String::from_utf8_lossy(&line).contains(crate::guard::ROLE)
    })
}
