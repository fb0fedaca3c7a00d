//! The kernel's file system under a folder store.

use super::{FileSystem, UnnamedFile};
use crate::store::Created;
use blktide_sys::fs::Unnamed;
use blktide_sys::{SysError, fs};
use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// Files that are kept open for reading: packs are read piece by piece.
const OPEN_MAX: usize = 32;
/// Others may list a repository, and not read it.
const MODE_FILE: u32 = 0o600;

pub(super) struct RealFolder {
    root: PathBuf,
    open: Mutex<VecDeque<(String, Arc<OwnedFd>)>>,
}

impl RealFolder {
    pub(super) fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            open: Mutex::new(VecDeque::new()),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        if name.is_empty() {
            self.root.clone()
        } else {
            self.root.join(name)
        }
    }

    /// The file of an object, most recently used last. Objects never change, so an open one is never stale.
    fn opened(&self, name: &str) -> io::Result<Arc<OwnedFd>> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let found = open.iter().position(|(n, _)| n == name);
        if let Some(entry) = found.and_then(|at| open.remove(at)) {
            let fd = Arc::clone(&entry.1);
            open.push_back(entry);
            return Ok(fd);
        }
        drop(open);
        let fd = Arc::new(fs::open_read(&self.path(name)).map_err(plain)?);
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.len() >= OPEN_MAX {
            open.pop_front();
        }
        open.push_back((name.to_owned(), Arc::clone(&fd)));
        Ok(fd)
    }
}

impl FileSystem for RealFolder {
    fn unnamed(&self, folder: &str, is_large: bool) -> io::Result<Box<dyn UnnamedFile>> {
        let unnamed = Unnamed::create(&self.path(folder), MODE_FILE, is_large).map_err(plain)?;
        Ok(Box::new(RealFile { unnamed }))
    }

    fn make_folder(&self, folder: &str) -> io::Result<()> {
        match std::fs::create_dir(self.path(folder)) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other,
        }
    }

    fn sync_folder(&self, folder: &str) -> io::Result<()> {
        fs::sync_folder(&self.path(folder)).map_err(plain)
    }

    fn read(&self, path: &str, offset_bytes: u64, buf: &mut [u8]) -> io::Result<usize> {
        fs::read_full(&*self.opened(path)?, offset_bytes, buf)
    }

    fn size(&self, path: &str) -> io::Result<u64> {
        let facts = std::fs::symlink_metadata(self.path(path))?;
        if facts.is_file() {
            Ok(facts.len())
        } else {
            Err(io::ErrorKind::NotFound.into())
        }
    }

    fn list(&self, folder: &str) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(self.path(folder))? {
            // A name that is not text is none of ours.
            if let Ok(name) = entry?.file_name().into_string() {
                names.push(name);
            }
        }
        Ok(names)
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        self.open
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|(n, _)| n != path);
        fs::remove_durably(&self.path(path)).map_err(plain)?;
        Ok(())
    }
}

struct RealFile {
    unnamed: Unnamed,
}

impl UnnamedFile for RealFile {
    fn write_at(&self, offset_bytes: u64, bytes: &[u8]) -> io::Result<()> {
        self.unnamed.file().write_all_at(bytes, offset_bytes)
    }

    fn set_len(&self, len_bytes: u64) -> io::Result<()> {
        self.unnamed.file().set_len(len_bytes)
    }

    fn link(self: Box<Self>, name: &str) -> io::Result<Created> {
        Ok(match self.unnamed.link(name).map_err(plain)? {
            fs::Created::Made => Created::New,
            fs::Created::Existed => Created::Existed,
        })
    }
}

/// The kernel's word of it, with call and path in its chain.
fn plain(error: SysError) -> io::Error {
    let kind = match error.errno() {
        Some(errno) => errno.error().kind(),
        None => io::ErrorKind::Other,
    };
    io::Error::new(kind, error)
}
