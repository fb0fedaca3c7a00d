//! A state folder on the simulated disk, seen by people who look after each operation, and with rules left out on purpose.

use super::super::{Found, Identity, Name, Surroundings};
use crate::evidence::Evidence;
use blktide_format::{bitmap_file, marker};
use blktide_testkit::disk::{Node, SimDisk};
use blktide_types::geometry::Geometry;
use blktide_types::id::{BootId, LifeId, VolumeId};
use blktide_types::unit::BlockSize;
use std::io;

/// One rule left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Plant {
    /// At attach the file is overwritten and unlinked, and neither is synced.
    FileNotSynced,
    /// The file is left as it is.
    FileNotDestroyed,
    /// The marker goes on saying `closed` while the volume is written.
    MarkerNotOpened,
    /// The marker says `open` in the cache only.
    MarkerNotSynced,
    /// The first write is let through when the hand-over begins.
    FirstWriteEarly,
    /// A write comes after the bits were taken for the file.
    WriteAfterExport,
    /// What the marker says is not looked at.
    MarkerUnchecked,
    /// The marker's state is looked at, the life that it names is not.
    LifeUnchecked,
    /// An operation that failed is taken for done.
    FailedTakenForDone,
    /// What can be read is taken for what is on the disk: no second write, no second unlink.
    ReadTakenForDurable,
}

pub(super) const VOLUME: VolumeId = VolumeId(*b"the volume's id!");

/// Eight grains of 512 bytes.
pub(super) fn identity(life: u8, boot: u8) -> Identity {
    let grain = BlockSize::new(512).unwrap();
    Identity {
        volume: VOLUME,
        life: LifeId([life; 16]),
        boot: BootId([boot; 16]),
        geometry: Geometry::new(4096, BlockSize::IMAGE_MIN, grain, 512, 512).unwrap(),
        exclusive: false,
    }
}

/// The folder, as the drivers of the machines use it.
pub(super) struct Folder<'a> {
    pub(super) disk: &'a SimDisk,
    pub(super) node: Node,
    pub(super) plant: Option<Plant>,
    /// Whether it is an attach that runs.
    pub(super) attaching: bool,
    pub(super) evidence: Evidence,
    /// Called after each operation of the disk.
    pub(super) look: &'a mut dyn FnMut(&SimDisk),
}

impl Folder<'_> {
    fn left_out(&self, plant: Plant) -> bool {
        self.attaching && self.plant == Some(plant)
    }

    fn operate<T: Default>(
        &mut self,
        operation: impl FnOnce(&SimDisk, Node) -> io::Result<T>,
    ) -> io::Result<T> {
        let result = operation(self.disk, self.node);
        (self.look)(self.disk);
        match result {
            Err(_) if self.plant == Some(Plant::FailedTakenForDone) => Ok(T::default()),
            result => result,
        }
    }

    fn put_at(&mut self, name: Name, bytes: &[u8]) -> io::Result<()> {
        let node = match self.disk.peek_entry(self.node, name.file_name()) {
            Some(node) => node,
            None => self
                .operate(|disk, folder| disk.create(folder, name.file_name()).map(Some))?
                .ok_or(io::ErrorKind::NotFound)?,
        };
        let mut done = 0;
        while done < bytes.len() {
            done += self
                .operate(|disk, _| disk.write_at(node, done as u64, &bytes[done..]))?
                .max(1);
        }
        if self.disk.peek(node).len() != bytes.len() {
            self.operate(|disk, _| disk.set_len(node, bytes.len() as u64))?;
        }
        Ok(())
    }
}

impl Surroundings for Folder<'_> {
    fn read(&mut self, name: Name, limit_bytes: u64) -> io::Result<Option<Vec<u8>>> {
        let Ok(node) = self.disk.open(self.node, name.file_name()) else {
            return Ok(None);
        };
        assert!(limit_bytes > 300);
        let bytes = self.disk.read(node)?;
        if name == Name::Marker {
            let file = peek(self.disk, self.node, Name::Bitmap);
            return Ok(Some(marker_as_read(bytes, file.as_deref(), self.plant)));
        }
        Ok(Some(bytes))
    }

    fn put(&mut self, name: Name, bytes: &[u8]) -> io::Result<()> {
        let skip = match name {
            Name::Marker => {
                let says_open = peek(self.disk, self.node, name)
                    .and_then(|b| marker::decode(&b).ok())
                    .is_some_and(|m| m.state != marker::State::Closed);
                self.left_out(Plant::MarkerNotOpened)
                    || says_open && self.left_out(Plant::ReadTakenForDurable)
            }
            Name::Bitmap => {
                let gone = peek(self.disk, self.node, name).is_none();
                self.left_out(Plant::FileNotDestroyed)
                    || gone && self.left_out(Plant::ReadTakenForDurable)
            }
        };
        if skip {
            Ok(())
        } else {
            self.put_at(name, bytes)
        }
    }

    fn sync(&mut self, name: Name) -> io::Result<()> {
        let skip = match name {
            Name::Marker => self.left_out(Plant::MarkerNotSynced),
            Name::Bitmap => self.left_out(Plant::FileNotSynced),
        };
        match self.disk.peek_entry(self.node, name.file_name()) {
            Some(node) if !skip => self.operate(|disk, _| disk.sync(node)),
            Some(_) | None => Ok(()),
        }
    }

    fn unlink(&mut self, name: Name) -> io::Result<()> {
        if self.left_out(Plant::FileNotDestroyed) {
            return Ok(());
        }
        match self.operate(|disk, folder| disk.unlink(folder, name.file_name())) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }

    fn sync_folder(&mut self) -> io::Result<()> {
        if self.left_out(Plant::FileNotSynced) {
            return Ok(());
        }
        self.operate(SimDisk::sync)
    }

    fn flush_device(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn evidence(&mut self) -> Evidence {
        self.evidence
    }
}

/// A file's content, for a test's eyes.
pub(super) fn peek(disk: &SimDisk, folder: Node, name: Name) -> Option<Vec<u8>> {
    disk.peek_entry(folder, name.file_name())
        .map(|n| disk.peek(n))
}

/// What would be found by an attach now.
pub(super) fn found(disk: &SimDisk, folder: Node, plant: Option<Plant>) -> (Found, Found) {
    let wrap = |content: Option<Vec<u8>>| content.map_or(Found::Absent, Found::Content);
    let file = peek(disk, folder, Name::Bitmap);
    let marker = peek(disk, folder, Name::Marker);
    let marker = marker.map(|m| marker_as_read(m, file.as_deref(), plant));
    (wrap(marker), wrap(file))
}

/// The marker's bytes, or those that a reader who does not check them might as well have seen.
fn marker_as_read(bytes: Vec<u8>, file: Option<&[u8]>, plant: Option<Plant>) -> Vec<u8> {
    let (Ok(mut said), Some(Ok(file))) = (marker::decode(&bytes), file.map(bitmap_file::decode))
    else {
        return bytes;
    };
    match plant {
        Some(Plant::MarkerUnchecked) => {
            said.state = marker::State::Closed;
            said.life = file.life();
        }
        Some(Plant::LifeUnchecked) => said.life = file.life(),
        _ => return bytes,
    }
    marker::encode(&said).to_vec()
}
