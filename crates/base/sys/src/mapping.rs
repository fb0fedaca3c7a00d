//! Shared memory as this process sees it: words with atomic access, ranges that the kernel fills.
//!
//! Invariant: `base` is a live mapping of `len` bytes (a multiple of the page) of memory that cannot shrink; it
//! is unmapped when the last owner is gone, and never before an operation in flight on it (those hold an
//! `Arc`). Rust code sees it through atomics only: other processes write to it.

use crate::Result;
use crate::error::SysError;
use crate::memfd::Memfd;
use nix::sys::mman::{MapFlags, MlockAllFlags, ProtFlags, mlock, mlockall, mmap, munlock, munmap};
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

/// Bytes of a page of memory.
pub const PAGE_BYTES: usize = 4096;

/// Memory mapped shared, for reading and writing.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the memory is reached through atomics or by the kernel only.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

/// Memory mapped shared, for reading only: somebody else writes it.
#[derive(Debug)]
pub struct ReadOnlyMapping(Mapping);

impl Mapping {
    /// Maps all of `memory`.
    pub fn new(memory: &Memfd) -> Result<Self> {
        Self::map(memory, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)
    }

    /// Maps the first `bytes` bytes (rounded up to whole pages) of the BPF array behind `fd`.
    ///
    /// Refused unless that is an array, made to be mapped, of at least this size. An array cannot shrink, and a mapping
    /// of it outlives its pin, its descriptors and its programs.
    pub fn of_bpf_array(fd: &impl AsFd, bytes: usize) -> Result<Self> {
        Self::map_array(fd, bytes, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)
    }

    fn map_array(fd: &impl AsFd, bytes: usize, protection: ProtFlags) -> Result<Self> {
        let whole = crate::bpf::array_bytes(fd)?;
        let fits = u64::try_from(bytes).is_ok_and(|bytes| bytes <= whole);
        let len = bytes.checked_next_multiple_of(PAGE_BYTES).filter(|_| fits);
        let len = len.ok_or_else(|| SysError::unfit("BPF map", "it is smaller than it must be"))?;
        Self::map_fd(fd, "BPF map", len, protection)
    }

    fn map(memory: &Memfd, protection: ProtFlags) -> Result<Self> {
        let len = usize::try_from(memory.bytes())
            .map_err(|e| SysError::call("mmap", "memfd", io::Error::other(e)))?;
        Self::map_fd(memory, "memfd", len, protection)
    }

    /// The caller knows that what is behind `fd` has `len` bytes and cannot shrink.
    fn map_fd(
        fd: &impl AsFd,
        name: &'static str,
        len: usize,
        protection: ProtFlags,
    ) -> Result<Self> {
        let fail = |e: io::Error| SysError::call("mmap", name, e);
        let size = NonZeroUsize::new(len).ok_or_else(|| SysError::unfit(name, "it is empty"))?;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no memory that exists.
        let mapped = unsafe { mmap(None, size, protection, MapFlags::MAP_SHARED, fd, 0) };
        let base = mapped.map_err(|e| fail(e.into()))?.cast();
        Ok(Self { base, len })
    }

    /// Bytes.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Never: an empty mapping cannot be made.
    pub const fn is_empty(&self) -> bool {
        false
    }

    /// All of it as words, in host order.
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: base is page-aligned and maps `len` bytes for as long as `self` lives; all access is atomic.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().cast(), self.len / 8) }
    }

    fn cells(&self) -> &[AtomicU8] {
        // SAFETY: as for `words`.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().cast(), self.len) }
    }

    /// Copies bytes out, each read atomically; false (and `out` untouched) if the range is not all inside.
    pub fn copy_out(&self, offset: usize, out: &mut [u8]) -> bool {
        let Some(cells) = offset
            .checked_add(out.len())
            .and_then(|end| self.cells().get(offset..end))
        else {
            return false;
        };
        for (to, from) in out.iter_mut().zip(cells) {
            *to = from.load(Ordering::Relaxed);
        }
        true
    }

    /// Copies bytes in, each written atomically; false (and nothing written) if the range is not all inside.
    pub fn copy_in(&self, offset: usize, bytes: &[u8]) -> bool {
        let Some(cells) = offset
            .checked_add(bytes.len())
            .and_then(|end| self.cells().get(offset..end))
        else {
            return false;
        };
        for (to, from) in cells.iter().zip(bytes) {
            to.store(*from, Ordering::Relaxed);
        }
        true
    }

    /// Touches every page of a range (whole pages around it), so that no later access can fault on a missing page.
    ///
    /// Contents stay as they are.
    pub fn populate(&self, offset: usize, len: usize) -> io::Result<()> {
        let (from, to) = self.pages(offset, len)?;
        for page in (from..to).step_by(PAGE_BYTES) {
            if let Some(word) = self.words().get(page / 8) {
                // A write that changes nothing: a read would leave shmem's pages unallocated in this mapping.
                word.fetch_or(0, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// Locks a range (whole pages around it) in memory. `EPERM`/`ENOMEM` where `RLIMIT_MEMLOCK` forbids it.
    pub fn lock(&self, offset: usize, len: usize) -> io::Result<()> {
        let (address, bytes) = self.part(offset, len)?;
        // SAFETY: the range lies inside this mapping.
        Ok(unsafe { mlock(address.cast(), bytes) }?)
    }

    /// The opposite of [`Self::lock`].
    pub fn unlock(&self, offset: usize, len: usize) -> io::Result<()> {
        let (address, bytes) = self.part(offset, len)?;
        // SAFETY: the range lies inside this mapping.
        Ok(unsafe { munlock(address.cast(), bytes) }?)
    }

    fn part(&self, offset: usize, len: usize) -> io::Result<(NonNull<u8>, usize)> {
        let (from, to) = self.pages(offset, len)?;
        Ok((self.raw(from, to - from)?, to - from))
    }

    fn pages(&self, offset: usize, len: usize) -> io::Result<(usize, usize)> {
        let end = offset
            .checked_add(len)
            .filter(|end| *end <= self.len)
            .ok_or_else(outside)?;
        let to = end.next_multiple_of(PAGE_BYTES).min(self.len);
        Ok((offset - offset % PAGE_BYTES, to))
    }

    /// The address of a range, for the kernel. Errors if the range is not all inside.
    pub(crate) fn raw(&self, offset: usize, len: usize) -> io::Result<NonNull<u8>> {
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.len);
        if !inside {
            return Err(outside());
        }
        // SAFETY: offset is at most len, so the address stays inside the mapping or one past its end.
        Ok(unsafe { self.base.add(offset) })
    }
}

fn outside() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "range outside the mapping")
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `map` with this length; nobody borrows from `self` any more.
        let unmapped = unsafe { munmap(self.base.cast(), self.len) };
        debug_assert!(unmapped.is_ok(), "munmap of our own mapping");
    }
}

impl ReadOnlyMapping {
    /// Maps all of the memory behind a received descriptor. Refused if that memory could shrink.
    pub fn from_fd(fd: OwnedFd) -> Result<Self> {
        Self::new(&Memfd::from_fd(fd)?)
    }

    /// Maps all of `memory` for reading.
    pub fn new(memory: &Memfd) -> Result<Self> {
        Ok(Self(Mapping::map(memory, ProtFlags::PROT_READ)?))
    }

    /// Maps the first `bytes` bytes of a BPF array for reading, as [`Mapping::of_bpf_array`].
    ///
    /// The descriptor must be open for writing all the same: the kernel maps no array through another (`EINVAL`).
    pub fn of_bpf_array(fd: &impl AsFd, bytes: usize) -> Result<Self> {
        Ok(Self(Mapping::map_array(fd, bytes, ProtFlags::PROT_READ)?))
    }

    /// Number of words.
    pub fn word_count(&self) -> usize {
        self.0.len / 8
    }

    /// All words, to be loaded. A store would fault: this process cannot write there.
    pub fn words(&self) -> &[AtomicU64] {
        self.0.words()
    }

    /// The word at `index`; `None` past the end.
    pub fn load(&self, index: usize, order: Ordering) -> Option<u64> {
        self.0.words().get(index).map(|w| w.load(order))
    }

    /// All words, lowest first, loaded relaxed.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.0.words().iter().map(|w| w.load(Ordering::Relaxed))
    }

    /// Copies bytes out, as [`Mapping::copy_out`].
    pub fn copy_out(&self, offset: usize, out: &mut [u8]) -> bool {
        self.0.copy_out(offset, out)
    }
}

/// Locks all memory of this process, now and in future.
///
/// Threads started afterwards lock their whole stacks: make those small.
pub fn lock_all() -> io::Result<()> {
    Ok(mlockall(
        MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE,
    )?)
}

/// Locks what this process has touched and will touch, page by page: large sparse mappings stay sparse.
pub fn lock_all_when_touched() -> io::Result<()> {
    let touched = MlockAllFlags::from_bits_retain(libc::MCL_ONFAULT);
    Ok(mlockall(
        MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE | touched,
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_mappings_are_one_memory() {
        let memory = Memfd::create("blktide-test", 3 * 4096).unwrap();
        let (a, b) = (
            Mapping::new(&memory).unwrap(),
            Mapping::new(&memory).unwrap(),
        );
        let c = ReadOnlyMapping::from_fd(memory.reopen_read_only().unwrap()).unwrap();
        a.words()[513].store(77, Ordering::SeqCst);
        assert_eq!(b.words()[513].load(Ordering::SeqCst), 77);
        assert_eq!(c.load(513, Ordering::SeqCst), Some(77));
        assert_eq!(c.load(3 * 512, Ordering::SeqCst), None);
        a.populate(0, a.len()).unwrap();
        assert_eq!(
            b.words()[513].load(Ordering::SeqCst),
            77,
            "touching changes nothing"
        );
        assert!(a.copy_in(4095, &[1, 2, 3]));
        let mut out = [0; 3];
        assert!(b.copy_out(4095, &mut out));
        assert_eq!(out, [1, 2, 3]);
        assert!(!b.copy_out(3 * 4096 - 2, &mut out));
        assert!(!a.copy_in(usize::MAX, &[1]));
        memory.punch(4096, 4096).unwrap();
        assert_eq!(a.words()[513].load(Ordering::SeqCst), 0);
    }

    #[test]
    fn ranges_outside_are_refused() {
        let memory = Memfd::create("blktide-test", 4096).unwrap();
        let mapping = Mapping::new(&memory).unwrap();
        mapping.raw(4096, 0).unwrap();
        mapping.raw(4096, 1).unwrap_err();
        mapping.lock(1, 4096).unwrap_err();
        mapping.lock(0, 4096).unwrap();
        mapping.unlock(0, 4096).unwrap();
    }
}
