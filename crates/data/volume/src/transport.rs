//! Messages of the volume socket as packets: JSON and descriptors, both bounded.

use crate::message::MESSAGE_BYTES_MAX;
use blktide_sys::socket::PacketSocket;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

/// Sends `message` with `descriptors` beside it, whole or not at all.
pub(crate) fn send(
    socket: &PacketSocket,
    message: &impl Serialize,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let bytes = serde_json::to_vec(message).map_err(io::Error::other)?;
    if bytes.len() > MESSAGE_BYTES_MAX {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "message too long",
        ));
    }
    socket.send(&bytes, descriptors)
}

/// What has come in.
#[derive(Debug)]
pub(crate) enum Incoming<T> {
    /// A message and its descriptors.
    Message(T, Vec<OwnedFd>),
    /// Something that is no message of this protocol.
    Garbage,
    /// The other side is gone.
    Closed,
}

/// Receives one message. Waits as the socket was told to.
pub(crate) fn receive<T: DeserializeOwned>(socket: &PacketSocket) -> io::Result<Incoming<T>> {
    let mut buffer = vec![0; MESSAGE_BYTES_MAX];
    let received = match socket.receive(&mut buffer) {
        Err(e) if e.kind() == io::ErrorKind::InvalidData => return Ok(Incoming::Garbage),
        Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(Incoming::Closed),
        other => other?,
    };
    if received.bytes == 0 {
        return Ok(Incoming::Closed);
    }
    let bytes = buffer.get(..received.bytes).unwrap_or_default();
    Ok(match serde_json::from_slice(bytes) {
        Ok(message) => Incoming::Message(message, received.descriptors),
        Err(_) => Incoming::Garbage,
    })
}
