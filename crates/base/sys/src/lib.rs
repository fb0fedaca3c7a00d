//! Every unsafe line: mapped memory, rings, FUSE, loop, locks, processes, descriptors.
//!
//! The rules here: one unsafe operation a block, each with its `SAFETY:`; every public function is safe and
//! cannot be misused into undefined behaviour; descriptors are `OwnedFd`/`BorrowedFd`, opened close-on-exec;
//! memory that the kernel is writing to belongs to the operation until that is over.
#![expect(
    unsafe_code,
    reason = "the one crate that speaks to the kernel directly; tidy checks that it is the one"
)]

pub mod blockdev;
pub mod bpf;
pub mod buffer;
pub mod clock;
mod error;
pub mod event;
pub mod fence;
pub mod fs;
pub mod fuse;
pub mod host;
pub mod loopdev;
pub mod mapping;
pub mod memfd;
pub mod mounts;
pub mod process;
pub mod ring;
pub mod socket;
pub mod spawn;

pub use error::{Errno, SysError};

/// What the functions of this crate return where a bare `io::Error` would not say enough.
pub type Result<T> = core::result::Result<T, SysError>;
