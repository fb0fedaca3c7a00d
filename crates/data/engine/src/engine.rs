//! The engine over the shared memory of one volume: what queues and control have in common.
//!
//! **Invariant**: whatever a successor needs is in the memories; what is here can be made anew from them.

use crate::atomic::{Memory, Ordering, Words};
use crate::control::Control;
use crate::error::EngineError;
use crate::gate::Gate;
use crate::queue::Queue;
use crate::snapshot::Snapshot;
use crate::tracker::Marks;
use blktide_format::shared::{Shape, control, queue};
use std::sync::{Arc, Mutex};

/// What queues and control share. Cloning gives another handle.
#[derive(Clone, Debug)]
pub struct Engine {
    pub(crate) inner: Arc<Inner>,
}

/// The parts of an engine.
#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) shape: Shape,
    pub(crate) control: Arc<dyn Memory>,
    pub(crate) head: Words,
    pub(crate) gate: Gate,
    pub(crate) marks: Marks,
    pub(crate) tables: [Words; 2],
    pub(crate) hints: Words,
    pub(crate) queues: Box<[Words]>,
    /// The newest snapshot. Queues look here once a snapshot, and only by `try_lock`: no queue waits for it.
    pub(crate) snapshot: Mutex<Option<Arc<Snapshot>>>,
}

impl Engine {
    /// Makes fresh, zeroed memories those of a volume of `shape`. The next step is [`Control::begin_life`].
    pub fn create(
        control: &Arc<dyn Memory>,
        banks: &Arc<dyn Memory>,
        shape: Shape,
    ) -> Result<Self, EngineError> {
        let head = Words::new(control, 0, control::WORDS)?;
        for (index, value) in shape.head() {
            head.store(index, value, Ordering::Release);
        }
        Self::over(control, banks, shape)
    }

    /// Opens memories that another server made; a layout that this build does not know is refused, untouched.
    /// The next step is [`Control::take_over`].
    pub fn open(control: &Arc<dyn Memory>, banks: &Arc<dyn Memory>) -> Result<Self, EngineError> {
        Self::over(control, banks, Self::shape_of(control)?)
    }

    /// The shape that a control memory declares.
    pub fn shape_of(control: &Arc<dyn Memory>) -> Result<Shape, EngineError> {
        let head = Words::new(control, 0, control::WORDS)?;
        Shape::of_head(|i| head.load(i, Ordering::Acquire))
            .map_err(|source| EngineError::Layout { source })
    }

    fn over(
        control: &Arc<dyn Memory>,
        banks: &Arc<dyn Memory>,
        shape: Shape,
    ) -> Result<Self, EngineError> {
        let table = |copy| Words::new(control, shape.table(copy), shape.table_words());
        let queues = (0..shape.queues)
            .map(|q| Words::new(control, shape.queue(q), queue::WORDS))
            .collect::<Result<Box<[_]>, _>>()?;
        let inside: Vec<_> = (0..shape.queues)
            .map(|q| shape.queue(q).saturating_add(queue::INSIDE))
            .collect();
        let banks = (0..shape.banks)
            .map(|b| Words::new(banks, shape.bank(b), shape.bank_bit_words()))
            .collect::<Result<Box<[_]>, _>>()?;
        let epoch = Words::new(control, control::EPOCH, 1)?;
        Ok(Self {
            inner: Arc::new(Inner {
                control: Arc::clone(control),
                head: Words::new(control, 0, control::WORDS)?,
                gate: Gate::new(control, control::GATE, control::HOLD_SEQUENCE, &inside)?,
                marks: Marks::new(epoch, banks, shape.geometry),
                tables: [table(0)?, table(1)?],
                hints: Words::new(
                    control,
                    shape.hint(0),
                    shape.log().saturating_sub(shape.hint(0)),
                )?,
                queues,
                shape,
                snapshot: Mutex::new(None),
            }),
        })
    }

    /// The shape of the volume's memories.
    pub fn shape(&self) -> &Shape {
        &self.inner.shape
    }

    /// The queue numbered `queue`; each is one thread's, once.
    pub fn queue(&self, queue: usize) -> Result<Queue, EngineError> {
        Queue::new(self, queue)
    }

    /// The control side; one a volume, by one thread.
    pub fn control(&self) -> Control {
        Control::new(self)
    }

    /// Loads a word of the control head ([`control`]).
    pub fn word(&self, index: usize) -> u64 {
        self.inner.head.load(index, Ordering::SeqCst)
    }

    /// Stores a word of the control head that is the volume's own (pids, state, closing, …).
    pub fn set_word(&self, index: usize, value: u64) {
        self.inner.head.store(index, value, Ordering::SeqCst);
    }

    /// Whether a hold lives: who was told to wait at the gate may look again if not.
    pub fn gate_is_set(&self) -> bool {
        self.inner.gate.is_set()
    }

    /// A word of a queue's counters ([`queue`]).
    pub fn queue_word(&self, queue: usize, index: usize) -> u64 {
        self.inner
            .queues
            .get(queue)
            .map_or(0, |q| q.load(index, Ordering::Relaxed))
    }

    /// That word of all queues together.
    pub fn total(&self, index: usize) -> u64 {
        let load = |q: &Words| q.load(index, Ordering::Relaxed);
        self.inner.queues.iter().map(load).sum()
    }
}

impl Inner {
    /// Whether tracking is off.
    pub(crate) fn passes_through(&self) -> bool {
        self.head.load(control::PASS_THROUGH, Ordering::Relaxed) != 0
    }
}
