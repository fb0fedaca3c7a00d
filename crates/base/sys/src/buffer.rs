//! Buffers as direct I/O wants them: owned, zeroed, aligned to 4096 bytes.
//!
//! Invariant: `ptr` is aligned to [`AlignedBuffer::ALIGN`] and owns `len` initialised bytes (`len` > 0).

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// An owned, aligned run of bytes.
pub struct AlignedBuffer {
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: the buffer is owned memory without ties to a thread.
unsafe impl Send for AlignedBuffer {}
// SAFETY: a shared buffer can only be read.
unsafe impl Sync for AlignedBuffer {}

impl AlignedBuffer {
    /// Alignment in bytes, of the address; give lengths that are a multiple of it, too.
    pub const ALIGN: usize = 4096;

    /// `len` zero bytes (at least one). Aborts if memory is exhausted, as `Vec` does.
    pub fn new(len: usize) -> Self {
        let layout = Self::layout(len);
        // SAFETY: the layout's size is not zero.
        let raw = unsafe { alloc_zeroed(layout) };
        let Some(ptr) = NonNull::new(raw) else {
            handle_alloc_error(layout)
        };
        Self {
            ptr,
            len: layout.size(),
        }
    }

    /// A copy of `bytes`, padded with zeroes to a multiple of [`Self::ALIGN`].
    pub fn padded(bytes: &[u8]) -> Self {
        let mut buffer = Self::new(bytes.len().max(1).next_multiple_of(Self::ALIGN));
        for (to, from) in buffer.iter_mut().zip(bytes) {
            *to = *from;
        }
        buffer
    }

    fn layout(len: usize) -> Layout {
        Layout::from_size_align(len.max(1), Self::ALIGN)
            .unwrap_or_else(|_| handle_alloc_error(Layout::new::<u8>()))
    }

    pub(crate) fn as_raw(&mut self) -> *mut u8 {
        self.ptr.as_ptr()
    }
}

impl Drop for AlignedBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout, and freed here only.
        unsafe { dealloc(self.ptr.as_ptr(), Self::layout(self.len)) }
    }
}

impl Deref for AlignedBuffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `ptr` owns `len` initialised bytes for as long as `self` lives.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: `ptr` owns `len` initialised bytes, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl fmt::Debug for AlignedBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBuffer({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aligned_zeroed_and_padded() {
        for len in [1, 512, 4096, 70_000] {
            let buffer = AlignedBuffer::new(len);
            assert_eq!(buffer.as_ptr() as usize % AlignedBuffer::ALIGN, 0);
            assert_eq!(buffer.len(), len);
            assert!(buffer.iter().all(|b| *b == 0));
        }
        let padded = AlignedBuffer::padded(&[7; 5000]);
        assert_eq!((padded.len(), padded[4999], padded[5000]), (8192, 7, 0));
    }
}
