//! A store in a folder of a local or mounted file system.

use crate::store::{Created, Store, StoreError, Upload};
use std::path::{Path, PathBuf};

/// A store in a folder.
#[derive(Debug)]
pub struct FolderStore {
    root: PathBuf,
}

impl FolderStore {
    /// The store in `root`, which exists. Does no I/O.
    pub fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    /// The folder.
    pub fn root(&self) -> &Path {
        &self.root
    }
}

impl Store for FolderStore {
    fn create(&self, _name: &str, _bytes: &[u8]) -> Result<Created, StoreError> {
        Err(StoreError::NotFound)
    }
    fn upload(&self, _name: &str) -> Result<Box<dyn Upload>, StoreError> {
        Err(StoreError::NotFound)
    }
    fn get(&self, _name: &str, _offset_bytes: u64, _buf: &mut [u8]) -> Result<usize, StoreError> {
        Err(StoreError::NotFound)
    }
    fn size(&self, _name: &str) -> Result<Option<u64>, StoreError> {
        Err(StoreError::NotFound)
    }
    fn list(&self, _folder: &str) -> Result<Vec<String>, StoreError> {
        Err(StoreError::NotFound)
    }
    fn delete(&self, _name: &str) -> Result<(), StoreError> {
        Err(StoreError::NotFound)
    }
}
