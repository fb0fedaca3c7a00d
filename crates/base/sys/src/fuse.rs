//! FUSE, as far as one file in one folder needs it: the wire, the device, the mount.
//!
//! ```text
//! kernel ─ receive ─▶ a range of shared memory ─ decode ─▶ Request   (the payload of a write stays where it is)
//! kernel ◀─ answer ── Answer (a fixed array), with data from shared memory or without
//! ```
//! Invariant: a request is taken by read(2) of the calling thread into memory that outlives the process, so
//! that one who dies leaves it where a successor finds it. The headers are [`WRITE_HEADERS_BYTES`] long, so placed that
//! the payload of a write begins on a page.
//!
//! `ENOSYS` is answered to no READ, WRITE, FSYNC or FALLOCATE: the kernel would never ask again.

mod mount;
mod wire;

pub use mount::{Connection, max_request_timeout_seconds, mount, unmount};
pub use wire::{Answer, DecodeError, InitRequest, Operation, Request, VolumeShape};

use crate::Result;
use crate::error::{Errno, SysError, check};
use crate::mapping::Mapping;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// Node of the folder.
pub const NODE_ROOT: u64 = 1;
/// Node of the volume's file.
pub const NODE_VOLUME: u64 = 2;
/// Name of the volume's file in the folder.
pub const VOLUME_FILE: &str = "volume";
/// Bytes of the headers before the payload of a WRITE.
pub const WRITE_HEADERS_BYTES: usize = 80;

/// What came of waiting for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// A request of this many bytes stands in the memory.
    Request(usize),
    /// None is waiting (the descriptor is non-blocking), or one was withdrawn. Nothing was taken.
    Nothing,
    /// The connection is over: unmounted or aborted.
    Gone,
}

/// What came of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answered {
    /// The asker has it.
    Given,
    /// It had been given before, by who died after it.
    GivenBefore,
    /// The connection is over.
    Gone,
}

/// The descriptor of /dev/fuse. One for all threads, no clones; who holds it keeps the mount alive.
#[derive(Debug)]
pub struct FuseDevice(OwnedFd);

impl FuseDevice {
    /// Opens /dev/fuse, blocking; without effect until it is mounted.
    pub fn open() -> Result<Self> {
        use nix::fcntl::{OFlag, open};
        let path = "/dev/fuse";
        let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC;
        open(path, flags, nix::sys::stat::Mode::empty())
            .map(Self)
            .map_err(|e| SysError::call("open", path, e.into()))
    }

    /// The device behind an inherited or received descriptor.
    pub const fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Whether `receive` returns `Nothing` instead of waiting. All holders of the descriptor see it.
    pub fn set_nonblocking(&self, on: bool) -> io::Result<()> {
        crate::socket::set_nonblocking(self.0.as_fd(), on)
    }

    /// Another handle of the same descriptor (not a clone of the connection).
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self(self.0.try_clone()?))
    }

    /// Takes one request into `len` bytes of `memory` at `offset`.
    ///
    /// `len` is at least [`WRITE_HEADERS_BYTES`] + `max_write` and 8192, else `EINVAL`. Populate the memory first: a
    /// process killed while the kernel copies into a page that is missing gives the asker an error.
    pub fn receive(&self, memory: &Mapping, offset: usize, len: usize) -> io::Result<Received> {
        let to = memory.raw(offset, len)?;
        loop {
            // SAFETY: `to` is `len` bytes of a live mapping that Rust code sees through atomics only.
            let got = unsafe { libc::read(self.0.as_raw_fd(), to.as_ptr().cast(), len) };
            let error = match check(got) {
                Ok(0) => return Ok(Received::Gone),
                Ok(n) => {
                    return usize::try_from(n)
                        .map(Received::Request)
                        .map_err(io::Error::other);
                }
                Err(e) => e,
            };
            match Errno::of(&error) {
                // ENOENT: the request was withdrawn while it was being handed over.
                Errno::INTR | Errno::NOENT => {}
                Errno::AGAIN => return Ok(Received::Nothing),
                Errno::NODEV => return Ok(Received::Gone),
                _ => return Err(error),
            }
        }
    }

    /// Answers without data.
    pub fn answer(&self, answer: &Answer) -> io::Result<Answered> {
        self.write(&[part(answer.bytes())])
    }

    /// Answers a READ with `len` bytes of `memory` at `offset`; make `answer` by [`Answer::data`] with that `len`.
    pub fn answer_data(
        &self,
        answer: &Answer,
        memory: &Mapping,
        offset: usize,
        len: usize,
    ) -> io::Result<Answered> {
        let data = libc::iovec {
            iov_base: memory.raw(offset, len)?.as_ptr().cast(),
            iov_len: len,
        };
        self.write(&[part(answer.bytes()), data])
    }

    fn write(&self, parts: &[libc::iovec]) -> io::Result<Answered> {
        let count = i32::try_from(parts.len()).map_err(io::Error::other)?;
        loop {
            // SAFETY: each part is readable memory that lives through the call; the kernel only reads it.
            let wrote = unsafe { libc::writev(self.0.as_raw_fd(), parts.as_ptr(), count) };
            let Err(error) = check(wrote) else {
                return Ok(Answered::Given);
            };
            match Errno::of(&error) {
                Errno::INTR => {}
                Errno::NOENT => return Ok(Answered::GivenBefore),
                Errno::NODEV | Errno::PERM => return Ok(Answered::Gone),
                _ => return Err(error),
            }
        }
    }

    /// The descriptor, to hand on.
    pub fn into_fd(self) -> OwnedFd {
        self.0
    }
}

impl AsFd for FuseDevice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn part(bytes: &[u8]) -> libc::iovec {
    libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    }
}
