//! A folder store on a disk that loses power, with faults that can be planted.

use blktide_repo::Created;
use blktide_repo::folder::{FileSystem, FolderStore, UnnamedFile};
use blktide_testkit::disk::{Node, SimDisk};
use std::io;
use std::sync::{Arc, Mutex};

/// A mistake that is made on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Planted {
    /// None.
    Nothing,
    /// A file gets its name before its content is synced.
    LinkBeforeSync,
    /// The folder is not synced after a name was given.
    FolderNotSynced,
    /// Folders that were made are not synced into their parents.
    ParentsNotSynced,
    /// Packs get their names only after the end has got its: manifest and end before packs.
    PacksAfterEnd,
    /// The manifest gets its name only after the end.
    ManifestAfterEnd,
    /// A name is given by rename(2), which replaces.
    Rename,
}

/// A file system on a simulated disk.
#[derive(Clone)]
pub(super) struct SimFolder {
    disk: Arc<SimDisk>,
    planted: Planted,
    late: Arc<Mutex<Vec<(Node, Node, String)>>>,
}

/// A store on `disk`.
pub(super) fn store(disk: &Arc<SimDisk>, planted: Planted) -> FolderStore {
    FolderStore::on(Arc::new(SimFolder {
        disk: Arc::clone(disk),
        planted,
        late: Arc::default(),
    }))
}

impl SimFolder {
    fn node(&self, path: &str) -> io::Result<Node> {
        let parts = path.split('/').filter(|p| !p.is_empty());
        parts
            .into_iter()
            .try_fold(self.disk.root(), |folder, part| {
                self.disk
                    .peek_entry(folder, part)
                    .ok_or(io::ErrorKind::NotFound.into())
            })
    }

    fn split<'a>(&self, path: &'a str) -> io::Result<(Node, &'a str)> {
        let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
        Ok((self.node(folder)?, name))
    }

    /// Does what a planted fault has put off.
    fn catch_up(&self) -> io::Result<()> {
        for (node, folder, name) in self.late.lock().unwrap().drain(..) {
            self.disk.sync(node)?;
            self.disk.link(node, folder, &name)?;
            self.disk.sync(folder)?;
        }
        Ok(())
    }
}

impl FileSystem for SimFolder {
    fn unnamed(&self, folder: &str, _is_large: bool) -> io::Result<Box<dyn UnnamedFile>> {
        Ok(Box::new(SimFile {
            folder: self.node(folder)?,
            path: folder.to_owned(),
            node: self.disk.create_unnamed()?,
            files: self.clone(),
        }))
    }

    fn make_folder(&self, folder: &str) -> io::Result<()> {
        let (parent, name) = self.split(folder)?;
        match self.disk.create_folder(parent, name) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other.map(drop),
        }
    }

    fn sync_folder(&self, folder: &str) -> io::Result<()> {
        let last = folder.rsplit('/').next().unwrap_or("");
        let is_above = folder.is_empty() || matches!(last, "volumes" | "packs") || last.len() == 32;
        let is_left_out = if is_above {
            self.planted == Planted::ParentsNotSynced
        } else {
            self.planted == Planted::FolderNotSynced
        };
        if is_left_out {
            return Ok(());
        }
        self.disk.sync(self.node(folder)?)
    }

    fn read(&self, path: &str, offset_bytes: u64, buf: &mut [u8]) -> io::Result<usize> {
        self.disk.read_at(self.node(path)?, offset_bytes, buf)
    }

    fn size(&self, path: &str) -> io::Result<u64> {
        self.disk.len(self.node(path)?)
    }

    fn list(&self, folder: &str) -> io::Result<Vec<String>> {
        self.disk.list(self.node(folder)?)
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        let (folder, name) = self.split(path)?;
        self.disk.unlink(folder, name)?;
        self.disk.sync(folder)
    }
}

struct SimFile {
    files: SimFolder,
    folder: Node,
    path: String,
    node: Node,
}

impl UnnamedFile for SimFile {
    fn write_at(&self, offset_bytes: u64, bytes: &[u8]) -> io::Result<()> {
        let (mut at, mut rest) = (offset_bytes, bytes);
        while !rest.is_empty() {
            let written = self.files.disk.write_at(self.node, at, rest)?;
            at += written as u64;
            rest = &rest[written..];
        }
        Ok(())
    }

    fn set_len(&self, len_bytes: u64) -> io::Result<()> {
        self.files.disk.set_len(self.node, len_bytes)
    }

    fn link(self: Box<Self>, name: &str) -> io::Result<Created> {
        let planted = self.files.planted;
        let is_late = (planted == Planted::PacksAfterEnd && self.path.contains("/packs/"))
            || (planted == Planted::ManifestAfterEnd && name == "manifest");
        if is_late {
            let late = (self.node, self.folder, name.to_owned());
            self.files.late.lock().unwrap().push(late);
            return Ok(Created::New);
        }
        if planted != Planted::LinkBeforeSync {
            self.files.disk.sync(self.node)?;
        }
        if planted == Planted::Rename && self.files.disk.peek_entry(self.folder, name).is_some() {
            self.files.disk.unlink(self.folder, name)?;
        }
        let created = match self.files.disk.link(self.node, self.folder, name) {
            Ok(()) => Created::New,
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Created::Existed,
            Err(e) => return Err(e),
        };
        if name == "end" {
            self.files.catch_up()?;
        }
        Ok(created)
    }
}
