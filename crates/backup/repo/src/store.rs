//! What a repository asks of the place where its objects lie (P13): four verbs, the same for a folder and an object store.
//!
//! **Invariant**: an object is whole from the moment it can be seen, and never changes.

use std::io;

/// Whether a create made the object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Created {
    /// It was not there, and is now, durably.
    New,
    /// Somebody had made one of that name before; nothing was changed.
    Existed,
}

/// Why a store could not do it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// No object has that name.
    #[error("it is not there")]
    NotFound,
    /// No room; nothing is visible of what was being written.
    #[error("no space is left")]
    Full,
    /// The store failed. After a failed create the object may be there all the same: read it back.
    #[error("the store failed")]
    Io(#[source] io::Error),
}

impl StoreError {
    /// The error for `error`, with "not found" and "no space" told apart.
    pub fn of(error: io::Error) -> Self {
        #[expect(
            clippy::wildcard_enum_match_arm,
            reason = "io::ErrorKind is open; two of its kinds have a meaning here"
        )]
        match error.kind() {
            io::ErrorKind::NotFound => Self::NotFound,
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Full,
            _ => Self::Io(error),
        }
    }
}

/// A large object that is being written, invisible until it is published.
pub trait Upload: Send + Sync {
    /// Writes `bytes` at `offset_bytes`; both are multiples of 4096. Used by several threads at once.
    fn write_at(&self, offset_bytes: u64, bytes: &[u8]) -> Result<(), StoreError>;

    /// Cuts it to `len_bytes` and makes it visible, durably. Waits: for all of it to be on the medium.
    fn publish(self: Box<Self>, len_bytes: u64) -> Result<Created, StoreError>;
}

/// Where objects lie. Names are relative, parts joined by `/`.
pub trait Store: Send + Sync {
    /// Makes `name` hold `bytes`, unless it exists. Durable when it returns. Waits: two flushes.
    ///
    /// Errors: it may be there all the same (a lost reply).
    fn create(&self, name: &str, bytes: &[u8]) -> Result<Created, StoreError>;

    /// Begins a large object.
    fn upload(&self, name: &str) -> Result<Box<dyn Upload>, StoreError>;

    /// Reads from `offset_bytes` until `buf` is full or the object ends; the number of bytes read.
    fn get(&self, name: &str, offset_bytes: u64, buf: &mut [u8]) -> Result<usize, StoreError>;

    /// Bytes of the object, or `None` if there is none.
    fn size(&self, name: &str) -> Result<Option<u64>, StoreError>;

    /// Names directly below `folder`, unordered. A hint: it may lack what was just created.
    fn list(&self, folder: &str) -> Result<Vec<String>, StoreError>;

    /// Removes an object; no error if there is none.
    fn delete(&self, name: &str) -> Result<(), StoreError>;
}
