//! The state folder of the model's volume, on the simulated disk, and the power that may go at each of its operations.

use crate::evidence::{self, Evidence, ReadAt};
use crate::handover::{Name, Surroundings};
use blktide_testkit::disk::{Node, SimDisk};
use std::io;

/// What the hand-over acts on. Before each operation the disk is kept as it stands, if a test wants to cut there.
pub(super) struct Folder<'a> {
    pub(super) disk: &'a SimDisk,
    pub(super) device: Node,
    /// A planted fault: what attach writes is not written.
    pub(super) kept: bool,
    pub(super) moments: Option<&'a mut Vec<SimDisk>>,
}

impl Folder<'_> {
    fn moment(&mut self) {
        if let Some(moments) = &mut self.moments {
            moments.push(self.disk.fork());
        }
    }

    fn open(&self, name: Name) -> io::Result<Node> {
        self.disk.open(self.disk.root(), name.file_name())
    }
}

impl Surroundings for Folder<'_> {
    fn read(&mut self, name: Name, _limit_bytes: u64) -> io::Result<Option<Vec<u8>>> {
        match self.open(name) {
            Ok(node) => self.disk.read(node).map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn put(&mut self, name: Name, bytes: &[u8]) -> io::Result<()> {
        self.moment();
        if self.kept {
            return Ok(());
        }
        let node = match self.open(name) {
            Ok(node) => node,
            Err(_) => self.disk.create(self.disk.root(), name.file_name())?,
        };
        assert_eq!(self.disk.write_at(node, 0, bytes)?, bytes.len());
        self.disk.set_len(node, u64::try_from(bytes.len()).unwrap())
    }

    fn sync(&mut self, name: Name) -> io::Result<()> {
        self.moment();
        if self.kept {
            return Ok(());
        }
        self.open(name).and_then(|node| self.disk.sync(node))
    }

    fn unlink(&mut self, name: Name) -> io::Result<()> {
        self.moment();
        if self.kept {
            return Ok(());
        }
        match self.disk.unlink(self.disk.root(), name.file_name()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    fn sync_folder(&mut self) -> io::Result<()> {
        self.moment();
        self.disk.sync(self.disk.root())
    }

    fn flush_device(&mut self) -> io::Result<()> {
        self.moment();
        self.disk.sync(self.device)
    }

    /// Evidence that never shows anything: so whatever is believed wrongly is found, not excused.
    fn evidence(&mut self) -> Evidence {
        evidence::collect(&Blank)
    }
}

/// A device that always looks the same.
struct Blank;

impl ReadAt for Blank {
    fn len_bytes(&self) -> u64 {
        65536
    }

    fn read_exact_at(&self, _offset_bytes: u64, buf: &mut [u8]) -> io::Result<()> {
        buf.fill(0);
        Ok(())
    }
}
