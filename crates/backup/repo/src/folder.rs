//! A store in a folder of a local or mounted file system.
//!
//! ```text
//!   folders above (made, parent synced) ─▶ unnamed file ─▶ write ─▶ fsync ─▶ linkat ─▶ fsync of the folder
//! ```
//! rename(2) is not used: it replaces. **Invariant**: what can be seen was on the medium before it got its name.

use crate::store::{Created, Store, StoreError, Upload};
use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

mod real;

/// What a folder store asks of the file system. Paths are relative to the store, parts joined by `/`; the store itself is
/// the empty path. A trait so that a test can put a disk under it that loses power.
pub trait FileSystem: Send + Sync {
    /// A file without a name in `folder`; `is_large`: written by large, aligned pieces.
    fn unnamed(&self, folder: &str, is_large: bool) -> io::Result<Box<dyn UnnamedFile>>;
    /// Makes one folder; no error if it exists.
    fn make_folder(&self, folder: &str) -> io::Result<()>;
    /// Makes the names in `folder` durable.
    fn sync_folder(&self, folder: &str) -> io::Result<()>;
    /// Reads until `buf` is full or the file ends.
    fn read(&self, path: &str, offset_bytes: u64, buf: &mut [u8]) -> io::Result<usize>;
    /// Length of a file.
    fn size(&self, path: &str) -> io::Result<u64>;
    /// Names in a folder.
    fn list(&self, folder: &str) -> io::Result<Vec<String>>;
    /// Removes a file and makes that durable.
    fn remove(&self, path: &str) -> io::Result<()>;
}

/// A file that has no name yet.
pub trait UnnamedFile: Send + Sync {
    /// Writes all of `bytes`.
    fn write_at(&self, offset_bytes: u64, bytes: &[u8]) -> io::Result<()>;
    /// Cuts or grows it.
    fn set_len(&self, len_bytes: u64) -> io::Result<()>;
    /// Syncs it, then gives it `name` in its folder unless that is taken. The folder is not synced.
    fn link(self: Box<Self>, name: &str) -> io::Result<Created>;
}

/// A store in a folder.
pub struct FolderStore {
    files: Arc<dyn FileSystem>,
    settled: Arc<Mutex<Settled>>,
}

#[derive(Default)]
struct Settled {
    /// Folders of which this process has seen each name above durable.
    folders: BTreeSet<String>,
    /// Folders whose sync has failed. The kernel tells that once, and a later sync succeeds all the same: names in them
    /// can be seen and may be gone after a power cut, so no creation in them is believed any more.
    doubtful: BTreeSet<String>,
}

impl core::fmt::Debug for FolderStore {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("FolderStore").finish_non_exhaustive()
    }
}

impl FolderStore {
    /// The store in `root`, which exists. Does no I/O.
    pub fn new(root: &Path) -> Self {
        Self::on(Arc::new(real::RealFolder::new(root)))
    }

    /// A store on another file system than the kernel's.
    pub fn on(files: Arc<dyn FileSystem>) -> Self {
        Self {
            files,
            settled: Arc::default(),
        }
    }

    /// Makes `folder` exist, and every name on the way to it durable: also of folders that somebody else made and
    /// perhaps had no time to sync.
    fn settle(&self, folder: &str) -> Result<(), StoreError> {
        if lock(&self.settled).folders.contains(folder) {
            return Ok(());
        }
        let ends = folder
            .match_indices('/')
            .map(|(at, _)| at)
            .chain([folder.len()]);
        let mut parent = "";
        for end in ends {
            let path = folder.get(..end).unwrap_or(folder);
            if !path.is_empty() && !lock(&self.settled).folders.contains(path) {
                self.files.make_folder(path).map_err(StoreError::of)?;
                sync(&*self.files, &self.settled, parent)?;
                lock(&self.settled).folders.insert(path.to_owned());
            }
            parent = path;
        }
        Ok(())
    }

    fn unnamed(&self, name: &str, is_large: bool) -> Result<FolderUpload, StoreError> {
        let (folder, last) = name.rsplit_once('/').unwrap_or(("", name));
        self.settle(folder)?;
        let file = match self.files.unnamed(folder, is_large) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                // Somebody has removed the folder since: make it again, once.
                lock(&self.settled).folders.clear();
                self.settle(folder)?;
                self.files.unnamed(folder, is_large)
            }
            other => other,
        };
        Ok(FolderUpload {
            files: Arc::clone(&self.files),
            settled: Arc::clone(&self.settled),
            file: file.map_err(StoreError::of)?,
            folder: folder.to_owned(),
            name: last.to_owned(),
        })
    }
}

fn lock(settled: &Mutex<Settled>) -> MutexGuard<'_, Settled> {
    settled.lock().unwrap_or_else(PoisonError::into_inner)
}

fn sync(files: &dyn FileSystem, settled: &Mutex<Settled>, folder: &str) -> Result<(), StoreError> {
    if lock(settled).doubtful.contains(folder) {
        let why = "an earlier sync of the folder failed";
        return Err(StoreError::Io(io::Error::other(why)));
    }
    files.sync_folder(folder).map_err(|e| {
        lock(settled).doubtful.insert(folder.to_owned());
        StoreError::of(e)
    })
}

struct FolderUpload {
    files: Arc<dyn FileSystem>,
    settled: Arc<Mutex<Settled>>,
    file: Box<dyn UnnamedFile>,
    folder: String,
    name: String,
}

impl FolderUpload {
    fn link(self) -> Result<Created, StoreError> {
        let created = self.file.link(&self.name).map_err(StoreError::of)?;
        // Also where another's object was there before: it is durable when we say so.
        sync(&*self.files, &self.settled, &self.folder)?;
        Ok(created)
    }
}

impl Upload for FolderUpload {
    fn write_at(&self, offset_bytes: u64, bytes: &[u8]) -> Result<(), StoreError> {
        self.file
            .write_at(offset_bytes, bytes)
            .map_err(StoreError::of)
    }

    fn publish(self: Box<Self>, len_bytes: u64) -> Result<Created, StoreError> {
        self.file.set_len(len_bytes).map_err(StoreError::of)?;
        self.link()
    }
}

impl Store for FolderStore {
    fn create(&self, name: &str, bytes: &[u8]) -> Result<Created, StoreError> {
        let upload = self.unnamed(name, false)?;
        upload.write_at(0, bytes)?;
        upload.link()
    }

    fn upload(&self, name: &str) -> Result<Box<dyn Upload>, StoreError> {
        Ok(Box::new(self.unnamed(name, true)?))
    }

    fn get(&self, name: &str, offset_bytes: u64, buf: &mut [u8]) -> Result<usize, StoreError> {
        self.files
            .read(name, offset_bytes, buf)
            .map_err(StoreError::of)
    }

    fn size(&self, name: &str) -> Result<Option<u64>, StoreError> {
        match self.files.size(name).map_err(StoreError::of) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(StoreError::NotFound) => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn list(&self, folder: &str) -> Result<Vec<String>, StoreError> {
        match self.files.list(folder).map_err(StoreError::of) {
            Err(StoreError::NotFound) => Ok(Vec::new()),
            other => other,
        }
    }

    fn delete(&self, name: &str) -> Result<(), StoreError> {
        match self.files.remove(name).map_err(StoreError::of) {
            Err(StoreError::NotFound) => Ok(()),
            other => other,
        }
    }
}

#[cfg(test)]
mod tests;
