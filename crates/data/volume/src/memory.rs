//! Shared memory as the engine wants it, over memory files.
//!
//! **Invariant**: a bank that is about to be marked is zero, touched and locked; one that was closed may be sparse.

use blktide_engine::Memory;
use blktide_sys::mapping::{Mapping, PAGE_BYTES, ReadOnlyMapping};
use blktide_sys::memfd::Memfd;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

const WORD: usize = 8;

/// A memory file, mapped for reading and writing.
#[derive(Debug)]
pub(crate) struct SharedMemory {
    file: Memfd,
    mapping: Arc<Mapping>,
}

impl SharedMemory {
    /// Fresh, zeroed memory of at least `words` words, whole pages.
    pub(crate) fn create(name: &str, words: usize) -> io::Result<Self> {
        let bytes = words
            .max(1)
            .checked_mul(WORD)
            .and_then(|b| b.checked_next_multiple_of(PAGE_BYTES))
            .ok_or(io::ErrorKind::InvalidInput)?;
        let bytes = u64::try_from(bytes).map_err(io::Error::other)?;
        Self::of(Memfd::create(name, bytes).map_err(io::Error::other)?)
    }

    /// The memory behind a descriptor that was inherited or received.
    pub(crate) fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        Self::of(Memfd::from_fd(fd).map_err(io::Error::other)?)
    }

    fn of(file: Memfd) -> io::Result<Self> {
        let mapping = Arc::new(Mapping::new(&file).map_err(io::Error::other)?);
        Ok(Self { file, mapping })
    }

    /// The mapping, for rings.
    pub(crate) const fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// A descriptor through which the memory can only be read.
    pub(crate) fn read_only(&self) -> io::Result<OwnedFd> {
        self.file.reopen_read_only().map_err(io::Error::other)
    }

    /// Touches and locks all of it. Without the right to lock it is only touched; false then.
    pub(crate) fn touch_and_lock(&self) -> io::Result<bool> {
        let bytes = self.mapping.len();
        self.file
            .allocate(0, u64::try_from(bytes).map_err(io::Error::other)?)?;
        // Locking touches each page in the kernel, which is quicker than doing it here.
        if self.mapping.lock(0, bytes).is_ok() {
            return Ok(true);
        }
        self.mapping.populate(0, bytes)?;
        Ok(false)
    }

    /// As the engine takes it.
    pub(crate) fn shared(self: &Arc<Self>) -> Arc<dyn Memory> {
        let shared: Arc<Self> = Arc::clone(self);
        shared
    }

    fn bytes_of(words: &Range<usize>) -> Option<(usize, usize)> {
        let offset = words.start.checked_mul(WORD)?;
        let len = words.len().checked_mul(WORD)?;
        Some((offset, len.checked_next_multiple_of(PAGE_BYTES)?))
            .filter(|(offset, _)| offset % PAGE_BYTES == 0)
    }
}

impl AsFd for SharedMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Memory for SharedMemory {
    fn words(&self) -> &[AtomicU64] {
        self.mapping.words()
    }

    fn prepare(&self, words: Range<usize>) -> io::Result<()> {
        let Some((offset, len)) = Self::bytes_of(&words) else {
            for word in self.words().get(words).unwrap_or_default() {
                word.store(0, Ordering::Relaxed);
            }
            return Ok(());
        };
        let at = |n: usize| u64::try_from(n).map_err(io::Error::other);
        self.file.punch(at(offset)?, at(len)?)?;
        self.file.allocate(at(offset)?, at(len)?)?;
        match self.mapping.lock(offset, len) {
            Ok(()) => Ok(()),
            // Said once, in `status`, by who could not lock the rest either.
            Err(e) if is_forbidden(&e) => self.mapping.populate(offset, len),
            Err(e) => Err(e),
        }
    }

    fn settle(&self, words: Range<usize>) {
        let Some((offset, len)) = Self::bytes_of(&words) else {
            return;
        };
        if self.mapping.unlock(offset, len).is_err() {
            return;
        }
        for page in (offset..offset.saturating_add(len)).step_by(PAGE_BYTES) {
            let first = page / WORD;
            let part = self
                .words()
                .get(first..first.saturating_add(PAGE_BYTES / WORD));
            let empty =
                part.is_some_and(|words| words.iter().all(|w| w.load(Ordering::Relaxed) == 0));
            if empty
                && let (Ok(at), Ok(len)) = (u64::try_from(page), u64::try_from(PAGE_BYTES))
                && self.file.punch(at, len).is_err()
            {
                return;
            }
        }
    }
}

fn is_forbidden(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::PermissionDenied | io::ErrorKind::OutOfMemory
    ) || matches!(error.raw_os_error(), Some(1 | 11 | 12))
}

/// Memory that another process writes and this one reads.
#[derive(Debug)]
pub(crate) struct ForeignMemory(ReadOnlyMapping);

impl ForeignMemory {
    /// The memory behind a received descriptor.
    pub(crate) fn from_fd(fd: OwnedFd) -> io::Result<Arc<dyn Memory>> {
        let mapping = ReadOnlyMapping::from_fd(fd).map_err(io::Error::other)?;
        Ok(Arc::new(Self(mapping)))
    }
}

impl Memory for ForeignMemory {
    fn words(&self) -> &[AtomicU64] {
        self.0.words()
    }

    fn prepare(&self, _words: Range<usize>) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bank_is_zero_when_it_is_prepared_and_keeps_its_bits_when_it_is_settled() {
        let memory = SharedMemory::create("blktide-test", 4 * 512).unwrap();
        let words = memory.words();
        for word in words {
            word.store(u64::MAX, Ordering::Relaxed);
        }
        // 600 words: all of one page, a part of the next, which is the bank's to its end.
        memory.prepare(512..512 + 600).unwrap();
        assert_eq!(words[511].load(Ordering::Relaxed), u64::MAX);
        assert_eq!(words[512].load(Ordering::Relaxed), 0);
        assert_eq!(words[512 + 599].load(Ordering::Relaxed), 0);
        assert_eq!(words[3 * 512].load(Ordering::Relaxed), u64::MAX);
        words[1100].store(5, Ordering::Relaxed);
        memory.settle(512..512 + 600);
        assert_eq!(words[1100].load(Ordering::Relaxed), 5);
        assert_eq!(words[600].load(Ordering::Relaxed), 0);
    }

    #[test]
    fn what_only_reads_sees_what_is_written() {
        let memory = SharedMemory::create("blktide-test", 8).unwrap();
        let other = ForeignMemory::from_fd(memory.read_only().unwrap()).unwrap();
        memory.words()[3].store(9, Ordering::Relaxed);
        assert_eq!(other.words()[3].load(Ordering::Relaxed), 9);
        other.prepare(0..1).unwrap_err();
    }
}
