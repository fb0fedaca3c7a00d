//! The client of the volume socket: what blktided and `blktidectl flush` use.

use crate::error::VolumeError;
use crate::message::{Distrust, Hint, Reply, Request, SnapshotRequest, Text, VolumeStatus};
use crate::options::volume_socket;
use crate::snapshot_reader::SnapshotReader;
use crate::transport::{self, Incoming};
use blktide_sys::clock::SystemClock;
use blktide_sys::event;
use blktide_sys::memfd::Memfd;
use blktide_sys::process::PidFd;
use blktide_sys::socket::PacketSocket;
use blktide_types::clock::Clock;
use blktide_types::id::GenerationName;
use blktide_types::set::BlockSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Longest that a detach may take: it waits for the loop device's writes and for the bitmap file.
const DETACH_LIMIT: Duration = Duration::from_secs(120);
/// Longest that a keeper may take to end after its server.
const KEEPER_LIMIT: Duration = Duration::from_secs(10);

/// A connection to the server of one volume. Each call waits for its reply, at most for the connection's limit.
#[derive(Debug)]
pub struct VolumeClient {
    name: String,
    limit: Duration,
    path: PathBuf,
    socket: PacketSocket,
}

impl VolumeClient {
    /// Connects to volume `name` of the instance whose runtime folder this is. `limit`: longest wait for any one reply.
    ///
    /// Errors: `NotAttached`.
    pub fn connect(runtime_dir: &Path, name: &str, limit: Duration) -> Result<Self, VolumeError> {
        let absent = |source: io::Error| VolumeError::NotAttached {
            name: name.to_owned(),
            source,
        };
        let path = volume_socket(runtime_dir, name);
        let socket = PacketSocket::connect(&path).map_err(|e| absent(io::Error::other(e)))?;
        socket.set_time_limit(Some(limit)).map_err(absent)?;
        Ok(Self {
            name: name.to_owned(),
            limit,
            path,
            socket,
        })
    }

    /// Facts. The server answers from memory: it touches no device.
    pub fn status(&mut self) -> Result<VolumeStatus, VolumeError> {
        let reply = self.call(&Request::Status, &[])?.0;
        if let Reply::Status(status) = reply {
            Ok(*status)
        } else {
            Err(self.unexpected(reply))
        }
    }

    /// Bytes changed since each generation opened, `None` for a name that is not known; and why no bitmap is believed, if none is.
    pub fn changed_since(
        &mut self,
        generations: &[GenerationName],
    ) -> Result<(Vec<Option<u64>>, Option<Distrust>), VolumeError> {
        let request = Request::ChangedSince {
            generations: generations.iter().copied().map(Text).collect(),
        };
        let reply = self.call(&request, &[])?.0;
        if let Reply::ChangedSince {
            changed_bytes,
            distrust,
        } = reply
        {
            Ok((changed_bytes, distrust))
        } else {
            Err(self.unexpected(reply))
        }
    }

    /// Which boundaries to keep apart; replaces all earlier hints (at most 8).
    pub fn hints(&mut self, hints: &[Hint]) -> Result<(), VolumeError> {
        self.done(&Request::Hints {
            hints: hints.to_vec(),
        })
    }

    /// Begins a snapshot; the connection becomes the snapshot's. `absent`: the blocks absent in the base, with `Absent::Listed`.
    ///
    /// Waits: for the queues to fall silent, three times the hold's deadline at most.
    /// Errors: `Refused` with `busy`, `snapshot-exists`, `save-area-…`; then there is no snapshot and no generation was opened.
    pub fn snapshot(
        mut self,
        request: &SnapshotRequest,
        absent: Option<&BlockSet>,
    ) -> Result<SnapshotReader, VolumeError> {
        let sealed =
            absent
                .map(sealed_set)
                .transpose()
                .map_err(|source| VolumeError::Connection {
                    name: self.name.clone(),
                    source,
                })?;
        let beside: Vec<BorrowedFd<'_>> = sealed.iter().map(AsFd::as_fd).collect();
        let (reply, descriptors) = self.call(&Request::SnapshotBegin(request.clone()), &beside)?;
        if let Reply::Snapshot(begun) = reply {
            SnapshotReader::new(self, *begun, descriptors)
        } else {
            Err(self.unexpected(reply))
        }
    }

    /// Says that a full image was committed whose instant opened `generation`: the tracker is trusted from there on.
    ///
    /// Errors: `Refused` with `invalid` if that generation has been forgotten meanwhile.
    pub fn trust(&mut self, generation: GenerationName) -> Result<(), VolumeError> {
        self.done(&Request::Trust {
            generation: Text(generation),
        })
    }

    /// Revokes the snapshot, whoever has it.
    pub fn cancel(&mut self) -> Result<(), VolumeError> {
        self.done(&Request::Cancel)
    }

    /// See `Request::Flush`.
    pub fn flush(&mut self) -> Result<(), VolumeError> {
        self.done(&Request::Flush)
    }

    /// Takes the volume out of the path, stores its bitmap, and returns when server and keeper have ended.
    ///
    /// Errors: `Refused` with `in-use`: the message says by whom; nothing has changed.
    pub fn detach(mut self) -> Result<(), VolumeError> {
        self.limit = self.limit.max(DETACH_LIMIT);
        let limited = self.socket.set_time_limit(Some(self.limit));
        limited.map_err(|e| self.failed(e))?;
        self.done(&Request::Detach)?;
        // The server's end closes the connection.
        match transport::receive::<Reply>(&self.socket).map_err(|e| self.failed(e))? {
            Incoming::Closed => self.keeper_gone(),
            Incoming::Message(..) | Incoming::Garbage => Err(self.protocol()),
        }
    }

    /// Waits until the keeper has tidied up: the socket's name goes last.
    fn keeper_gone(&self) -> Result<(), VolumeError> {
        let deadline = SystemClock.now().after(KEEPER_LIMIT);
        while self.path.exists() {
            if SystemClock.now() >= deadline {
                let limit = KEEPER_LIMIT;
                let name = self.name.clone();
                return Err(VolumeError::NoAnswer { name, limit });
            }
            event::pause(Duration::from_millis(2)).map_err(|e| self.failed(e))?;
        }
        Ok(())
    }

    /// Asks for all descriptors, as a new keeper; `own` is this process. In the order of `Inherited`.
    pub(crate) fn adopt(&mut self, own: &PidFd) -> Result<Vec<OwnedFd>, VolumeError> {
        let (reply, descriptors) = self.call(&Request::Adopt, &[own.as_fd()])?;
        if matches!(reply, Reply::Adopted { .. }) {
            Ok(descriptors)
        } else {
            Err(self.unexpected(reply))
        }
    }

    /// Asks for something whose only answer is that it was done.
    pub(crate) fn done(&mut self, request: &Request) -> Result<(), VolumeError> {
        let reply = self.call(request, &[])?.0;
        if reply == Reply::Done {
            Ok(())
        } else {
            Err(self.unexpected(reply))
        }
    }

    /// Sends a request and waits for its reply.
    pub(crate) fn call(
        &mut self,
        request: &Request,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(Reply, Vec<OwnedFd>), VolumeError> {
        transport::send(&self.socket, request, descriptors).map_err(|e| self.failed(e))?;
        match transport::receive(&self.socket).map_err(|e| self.failed(e))? {
            Incoming::Message(reply, descriptors) => Ok((reply, descriptors)),
            Incoming::Garbage => Err(self.protocol()),
            Incoming::Closed => Err(self.failed(io::ErrorKind::ConnectionReset.into())),
        }
    }

    pub(crate) fn unexpected(&self, reply: Reply) -> VolumeError {
        if let Reply::Error { kind, message } = reply {
            VolumeError::Refused { kind, message }
        } else {
            self.protocol()
        }
    }

    pub(crate) fn protocol(&self) -> VolumeError {
        VolumeError::Protocol {
            name: self.name.clone(),
        }
    }

    pub(crate) fn failed(&self, source: io::Error) -> VolumeError {
        let name = self.name.clone();
        if source.kind() == io::ErrorKind::WouldBlock {
            let limit = self.limit;
            VolumeError::NoAnswer { name, limit }
        } else {
            VolumeError::Connection { name, source }
        }
    }
}

/// A set as a memfd of its words, in host order.
pub(crate) fn sealed_set(set: &BlockSet) -> io::Result<Memfd> {
    let bytes: Vec<u8> = set.words().iter().flat_map(|w| w.to_ne_bytes()).collect();
    let length = u64::try_from(bytes.len().max(8)).map_err(io::Error::other)?;
    let memory = Memfd::create("blktide-set", length).map_err(io::Error::other)?;
    let mut done = 0;
    while let Some(rest) = bytes.get(done..).filter(|r| !r.is_empty()) {
        let offset = u64::try_from(done).map_err(io::Error::other)?;
        done += memory.write_at(offset, rest)?;
    }
    Ok(memory)
}
