//! Where requests come from: FUSE under a loop device.
//!
//! ```text
//! kernel ─ request ─▶ slot (shared memory) ─ next ─▶ volume … engine … device ─ complete ─▶ answer ─▶ kernel
//! ```
//! A frontend brings requests and answers them; it knows neither blocks nor snapshots. Each has `new`, `run`, `stop`.
//! **Invariant**: a request that was taken from the kernel stands in a slot until it has been answered, so that who comes
//! after a dead server finds it.
#![forbid(unsafe_code)]

pub mod fuse;
pub mod slots;

use blktide_sys::Errno;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// What a request asks of the volume. Bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Fill the slot's payload.
    Read {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u32,
    },
    /// Write the slot's payload.
    Write {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u32,
    },
    /// Make bytes read as zeroes.
    Zero {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Whether the space must stay allocated.
        keep: bool,
    },
    /// What was answered so far to stable storage.
    Flush,
}

/// Number of a slot of this queue, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot(pub usize);

/// What came of asking for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// One for the volume.
    Request(Slot, Work),
    /// One that the frontend has answered itself. There may be more.
    Handled,
    /// None is waiting.
    Nothing,
    /// Every slot is taken: ask again when one has been completed.
    NoSlot,
    /// The frontend is gone for good: nobody will ask again.
    Gone,
}

/// What brings requests to one queue.
pub trait Frontend {
    /// Begins to bring requests: the descriptor that becomes readable when [`Frontend::next`] may have one.
    fn run(&mut self) -> io::Result<Arc<OwnedFd>>;

    /// The next request that a dead predecessor left in a slot of this queue; `None` when there are no more. Before [`Frontend::next`].
    fn next_left(&mut self) -> Option<Next>;

    /// Takes the next request from the kernel. Waits for nothing; allocates nothing.
    fn next(&mut self) -> io::Result<Next>;

    /// Answers a request and frees its slot. The result of what changed the volume stands in the slot before it is answered.
    ///
    /// Errors: the answer could not be given, and the slot stays as it is.
    fn complete(&mut self, slot: Slot, result: Result<u64, Errno>) -> io::Result<()>;

    /// Requests that have been taken and not answered.
    fn under_way(&self) -> usize;

    /// Lets go of what `run` took. Requests in slots stay there.
    fn stop(&mut self);
}
