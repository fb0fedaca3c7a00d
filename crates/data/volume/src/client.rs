//! The client of the volume socket: what blktided and `blktidectl flush` use.

use crate::error::VolumeError;
use crate::message::{Distrust, Hint, SnapshotRequest, VolumeStatus};
use crate::snapshot_reader::SnapshotReader;
use blktide_types::id::GenerationName;
use blktide_types::set::BlockSet;
use std::path::Path;
use std::time::Duration;

/// A connection to the server of one volume. Each call waits for its reply, at most for the connection's limit.
#[derive(Debug)]
pub struct VolumeClient {
    name: String,
    limit: Duration,
}

impl VolumeClient {
    /// Connects to volume `name` of the instance whose runtime folder this is. `limit`: longest wait for any one reply.
    ///
    /// Errors: `NotAttached`.
    pub fn connect(runtime_dir: &Path, name: &str, limit: Duration) -> Result<Self, VolumeError> {
        let _ = runtime_dir;
        Ok(Self {
            name: name.to_owned(),
            limit,
        })
    }

    /// Facts. The server answers from memory: it touches no device.
    pub fn status(&mut self) -> Result<VolumeStatus, VolumeError> {
        self.unfinished()
    }

    /// Bytes changed since each generation opened, `None` for a name that is not known; and why no bitmap is believed, if none is.
    pub fn changed_since(
        &mut self,
        generations: &[GenerationName],
    ) -> Result<(Vec<Option<u64>>, Option<Distrust>), VolumeError> {
        let _ = generations;
        self.unfinished()
    }

    /// Which boundaries to keep apart; replaces all earlier hints (at most 8).
    pub fn hints(&mut self, hints: &[Hint]) -> Result<(), VolumeError> {
        let _ = hints;
        self.unfinished()
    }

    /// Begins a snapshot; the connection becomes the snapshot's. `absent`: the blocks absent in the base, with `Absent::Listed`.
    ///
    /// Waits: for the queues to fall silent, three times the hold's deadline at most.
    /// Errors: `Refused` with `busy`, `snapshot-exists`, `save-area-…`; then there is no snapshot and no generation was opened.
    pub fn snapshot(
        self,
        request: &SnapshotRequest,
        absent: Option<&BlockSet>,
    ) -> Result<SnapshotReader, VolumeError> {
        let _ = (request, absent);
        self.unfinished()
    }

    /// Revokes the snapshot, whoever has it.
    pub fn cancel(&mut self) -> Result<(), VolumeError> {
        self.unfinished()
    }

    /// See `Request::Flush`.
    pub fn flush(&mut self) -> Result<(), VolumeError> {
        self.unfinished()
    }

    /// Takes the volume out of the path, stores its bitmap, and returns when server and keeper have ended.
    ///
    /// Errors: `Refused` with `in-use`: the message says by whom; nothing has changed.
    pub fn detach(self) -> Result<(), VolumeError> {
        self.unfinished()
    }

    fn unfinished<T>(&self) -> Result<T, VolumeError> {
        Err(VolumeError::NoAnswer {
            name: self.name.clone(),
            limit: self.limit,
        })
    }
}
