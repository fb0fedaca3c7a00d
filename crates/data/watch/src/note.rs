//! The note that a freeze of ours may have begun, in the kernel's memory: for whoever comes after a control side that was killed
//! together with its guards.
//!
//! **Invariant**: it stands there from before the freezing call until each file system is known to be thawed. Whoever dies, or
//! does not know, leaves it.

use blktide_engine::Memory;
use blktide_format::shared::watch;
use std::sync::Arc;
use std::sync::atomic::Ordering;

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
        let note = Self {
            memory: Arc::clone(memory),
            since: since.max(1),
        };
        if let Some(word) = memory.words().get(watch::FROZEN_SINCE) {
            word.store(note.since, Ordering::SeqCst);
        }
        note
    }

    /// It is known to be over. A note that another freeze has made since stays.
    pub(crate) fn take_back(self) {
        if let Some(word) = self.memory.words().get(watch::FROZEN_SINCE) {
            let _another = word.compare_exchange(self.since, 0, Ordering::SeqCst, Ordering::SeqCst);
        }
    }
}
