//! The memory that the kernel marks in, as this side sees it: the engine's [`WatchMarks`] over a pinned map, and its head.
//!
//! ```text
//! head (512 words) │ bitmap A │ bitmap B        one bit a watch grain
//!   GENERATION: even: A is live; odd: B
//! ```

use blktide_engine::{Memory, WatchMarks};
use blktide_format::shared::{WatchShape, watch};
use blktide_volume::VolumeError;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::tracker::{engine_error, shared_error};

/// The `marks` map.
#[derive(Debug)]
pub(crate) struct Marks {
    memory: Arc<dyn Memory>,
    inner: WatchMarks,
    shape: WatchShape,
}

impl Marks {
    /// Over the map. Errors: `Layout` if its head is not whole; `Engine` if it is smaller than that says.
    pub(crate) fn new(memory: Arc<dyn Memory>) -> Result<Self, VolumeError> {
        let head = |index: usize| {
            let word = memory.words().get(index);
            word.map_or(0, |w| w.load(Ordering::Acquire))
        };
        let shape = WatchShape::of_head(head).map_err(shared_error)?;
        let marks = WatchMarks::new(&memory, &shape).map_err(engine_error)?;
        Ok(Self {
            memory,
            inner: marks,
            shape,
        })
    }

    /// What is watched, and how finely.
    pub(crate) const fn shape(&self) -> &WatchShape {
        &self.shape
    }

    /// All of it, for the samples of the evidence in its head.
    pub(crate) fn memory(&self) -> &dyn Memory {
        &*self.memory
    }

    /// The same, to be kept.
    pub(crate) const fn shared(&self) -> &Arc<dyn Memory> {
        &self.memory
    }

    /// A word of the head.
    pub(crate) fn word(&self, index: usize) -> u64 {
        let word = self.memory.words().get(index);
        word.map_or(0, |w| w.load(Ordering::SeqCst))
    }

    /// Stores a word of the head that is this side's own.
    pub(crate) fn set_word(&self, index: usize, value: u64) {
        if let Some(word) = self
            .memory
            .words()
            .get(index)
            .filter(|_| index < watch::WORDS)
        {
            word.store(value, Ordering::SeqCst);
        }
    }

    /// Marks that were given up: since it moved nothing may be believed.
    pub(crate) fn lost(&self) -> u64 {
        self.inner.lost()
    }

    /// Number of the newest swap.
    pub(crate) fn generation(&self) -> u64 {
        self.inner.generation()
    }

    /// See [`WatchMarks::swap`].
    pub(crate) fn swap(&self) {
        self.inner.swap();
    }

    /// Takes what the newest swap has closed: `absorb` has each word safe when it returns, and only then its bits go.
    pub(crate) fn drain_closed(&self, mut absorb: impl FnMut(usize, u64)) {
        let each = |index, bits| {
            absorb(index, bits);
            ControlFlow::Continue::<()>(())
        };
        // It never breaks off.
        let _whole: ControlFlow<()> = self.inner.drain_closed(each);
    }

    /// The words of both bitmaps together that are not zero, with their index: what is marked and not taken yet.
    pub(crate) fn peek(&self) -> impl Iterator<Item = (usize, u64)> + '_ {
        let both = self.bitmap(0).iter().zip(self.bitmap(1)).enumerate();
        both.filter_map(|(index, (a, b))| {
            let bits = a.load(Ordering::Relaxed) | b.load(Ordering::Relaxed);
            (bits != 0).then_some((index, bits))
        })
    }

    fn bitmap(&self, generation: u64) -> &[AtomicU64] {
        let from = self.shape.bitmap(generation);
        let all = self.memory.words();
        all.get(from..from.saturating_add(self.shape.bit_words()))
            .unwrap_or_default()
    }
}
