//! Words of shared memory: the atomics of `std`, or loom's when a model explores the engine.
//!
//! **Invariant**: nothing here hands out plain memory. Whatever two threads or two processes may touch at
//! once is an [`AtomicU64`].

use crate::broken::step;
use crate::error::EngineError;
use core::fmt;
use std::ops::Range;
use std::sync::Arc;

#[cfg(loom)]
pub use loom::sync::atomic::{AtomicU64, Ordering, fence};
#[cfg(not(loom))]
pub use std::sync::atomic::{AtomicU64, Ordering, fence};

/// A piece of memory that is read and written by atomics: a mapping, or plain memory in tests.
pub trait Memory: Send + Sync + fmt::Debug {
    /// All words. The same slice, of the same length, at each call.
    fn words(&self) -> &[AtomicU64];

    /// Makes `words` zero, touched and locked, so that marking in them can neither fault nor wait.
    ///
    /// Waits: in proportion to the range. A mapping may do better than these stores (punch, populate, lock).
    fn prepare(&self, words: Range<usize>) -> std::io::Result<()> {
        for word in self.words().get(words).unwrap_or_default() {
            step();
            word.store(0, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Says that `words` will only be read now and then: they need not be locked, and pages of zeroes may go.
    fn settle(&self, words: Range<usize>) {
        let _ = words;
    }
}

/// Plain memory, zeroed: for tests, and for what only one process needs.
pub struct PlainMemory(Box<[AtomicU64]>);

impl PlainMemory {
    /// `words` words of zero.
    pub fn new(words: usize) -> Arc<Self> {
        Arc::new(Self((0..words).map(|_| AtomicU64::new(0)).collect()))
    }
}

impl fmt::Debug for PlainMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PlainMemory({} words)", self.0.len())
    }
}

impl Memory for PlainMemory {
    fn words(&self) -> &[AtomicU64] {
        &self.0
    }
}

/// A stretch of a [`Memory`] whose bounds were checked once.
#[derive(Clone, Debug)]
pub(crate) struct Words {
    memory: Arc<dyn Memory>,
    start: usize,
    len: usize,
}

impl Words {
    /// `len` words of `memory` from `start`.
    pub(crate) fn new(
        memory: &Arc<dyn Memory>,
        start: usize,
        len: usize,
    ) -> Result<Self, EngineError> {
        let found = memory.words().len();
        if start.checked_add(len).is_none_or(|end| end > found) {
            return Err(EngineError::MemoryTooSmall {
                needed: start.saturating_add(len),
                found,
            });
        }
        Ok(Self {
            memory: Arc::clone(memory),
            start,
            len,
        })
    }

    /// The words.
    pub(crate) fn all(&self) -> &[AtomicU64] {
        let end = self.start.saturating_add(self.len);
        self.memory.words().get(self.start..end).unwrap_or_default()
    }

    /// Word `index`, if there is one.
    pub(crate) fn at(&self, index: usize) -> Option<&AtomicU64> {
        self.all().get(index)
    }

    /// Loads word `index`; zero past the end.
    pub(crate) fn load(&self, index: usize, order: Ordering) -> u64 {
        self.at(index).map_or(0, |w| w.load(order))
    }

    /// Stores word `index`; nothing happens past the end.
    pub(crate) fn store(&self, index: usize, value: u64, order: Ordering) {
        if let Some(word) = self.at(index) {
            step();
            word.store(value, order);
        }
    }

    /// Adds to word `index` and returns what it held.
    pub(crate) fn add(&self, index: usize, value: u64) -> u64 {
        step();
        self.at(index)
            .map_or(0, |w| w.fetch_add(value, Ordering::Relaxed))
    }

    /// Raises word `index` to at least `value`.
    pub(crate) fn raise(&self, index: usize, value: u64) {
        if let Some(word) = self.at(index)
            && word.load(Ordering::Relaxed) < value
        {
            step();
            word.fetch_max(value, Ordering::Relaxed);
        }
    }

    /// Prepares all of them: see [`Memory::prepare`].
    pub(crate) fn prepare(&self) -> std::io::Result<()> {
        self.memory
            .prepare(self.start..self.start.saturating_add(self.len))
    }

    /// Settles all of them: see [`Memory::settle`].
    pub(crate) fn settle(&self) {
        self.memory
            .settle(self.start..self.start.saturating_add(self.len));
    }
}

/// A `u64` as an index; what does not fit is past every end.
pub(crate) fn index(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// An index as a `u64`.
pub(crate) fn wide(value: usize) -> u64 {
    u64::try_from(value).unwrap_or(u64::MAX)
}
