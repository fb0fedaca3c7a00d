//! Unix sockets that keep message boundaries and carry descriptors.
//!
//! A message is at most [`MESSAGE_MAX`] bytes and carries at most [`DESCRIPTORS_MAX`] descriptors.

use crate::Result;
use crate::error::{SysError, retry};
use nix::cmsg_space;
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType,
    UnixAddr, accept4, bind, connect, getsockopt, listen, recv, recvmsg, sendmsg, setsockopt,
    socket, socketpair, sockopt,
};
use nix::sys::time::TimeVal;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::Duration;

/// Bytes of the longest message.
pub const MESSAGE_MAX: usize = 64 << 10;
/// Descriptors that one message can carry.
pub const DESCRIPTORS_MAX: usize = 32;

/// Who is on the other side of a socket, as the kernel knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Process.
    pub pid: i32,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// The credentials of the peer of a connected unix socket of any type.
pub fn peer(socket: &impl AsFd) -> io::Result<Peer> {
    let found = getsockopt(&socket.as_fd(), sockopt::PeerCredentials)?;
    Ok(Peer {
        pid: found.pid(),
        uid: found.uid(),
        gid: found.gid(),
    })
}

/// A socket that others connect to.
#[derive(Debug)]
pub struct PacketListener(OwnedFd);

impl PacketListener {
    /// Listens at `path` with these permission bits; a socket that was there is replaced. Non-blocking.
    ///
    /// The caller makes sure that nobody else serves that path.
    pub fn bind(path: &Path, mode: u32) -> Result<Self> {
        let fail = |call: &'static str, e: nix::Error| SysError::call(call, path, e.into());
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(SysError::call("unlink", path, e));
            }
            _ => {}
        }
        let fd = packet_socket().map_err(|e| SysError::call("socket", path, e))?;
        let address = UnixAddr::new(path).map_err(|e| fail("bind", e))?;
        bind(fd.as_raw_fd(), &address).map_err(|e| fail("bind", e))?;
        let permissions = std::os::unix::fs::PermissionsExt::from_mode(mode);
        std::fs::set_permissions(path, permissions)
            .map_err(|e| SysError::call("chmod", path, e))?;
        let backlog = Backlog::new(64).map_err(|e| fail("listen", e))?;
        listen(&fd, backlog).map_err(|e| fail("listen", e))?;
        set_nonblocking(fd.as_fd(), true).map_err(|e| SysError::call("fcntl", path, e))?;
        Ok(Self(fd))
    }

    /// The listening socket behind an inherited descriptor.
    pub const fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Another handle of the same socket.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self(self.0.try_clone()?))
    }

    /// The next connection, if one waits. The connection is blocking.
    pub fn accept(&self) -> io::Result<Option<PacketSocket>> {
        match retry(|| Ok(accept4(self.0.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?)) {
            Ok(raw) => {
                // SAFETY: accept4 has just made this descriptor, and nobody else has it.
                let fd = unsafe { OwnedFd::from_raw_fd(raw) };
                Ok(Some(PacketSocket(fd)))
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(e) if e.raw_os_error() == Some(libc::ECONNABORTED) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// The descriptor, to hand on.
    pub fn into_fd(self) -> OwnedFd {
        self.0
    }
}

impl AsFd for PacketListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What came with a message.
#[derive(Debug, Default)]
pub struct Received {
    /// Bytes of the message; 0 with no descriptors = the other side has closed.
    pub bytes: usize,
    /// Its descriptors, in the order of the sender.
    pub descriptors: Vec<OwnedFd>,
}

/// One side of a connection; messages keep their boundaries.
#[derive(Debug)]
pub struct PacketSocket(OwnedFd);

impl PacketSocket {
    /// Connects to a listener. Waits only for a place in its queue.
    pub fn connect(path: &Path) -> Result<Self> {
        let fd = packet_socket().map_err(|e| SysError::call("socket", path, e))?;
        let address = UnixAddr::new(path).map_err(|e| SysError::call("connect", path, e.into()))?;
        connect(fd.as_raw_fd(), &address).map_err(|e| SysError::call("connect", path, e.into()))?;
        Ok(Self(fd))
    }

    /// Two connected sides.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (a, b) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )?;
        Ok((Self(a), Self(b)))
    }

    /// The connection behind an inherited descriptor.
    pub const fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Sends one message, whole or not at all. Without descriptors it takes no memory.
    ///
    /// `WouldBlock` if the time limit is over or the socket is non-blocking and full; `BrokenPipe` if the other side is gone.
    pub fn send(&self, message: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        if message.is_empty() || message.len() > MESSAGE_MAX || descriptors.len() > DESCRIPTORS_MAX
        {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let control = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &[] } else { &control[..] };
        let parts = [IoSlice::new(message)];
        let flags = MsgFlags::MSG_NOSIGNAL;
        retry(|| {
            Ok(sendmsg::<()>(
                self.0.as_raw_fd(),
                &parts,
                control,
                flags,
                None,
            )?)
        })
        .map(|_| ())
    }

    /// Receives one message into `buffer`.
    ///
    /// A message longer than the buffer, or with more descriptors than can be taken, is an error (`InvalidData`) and is gone.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<Received> {
        let mut space = cmsg_space!([RawFd; DESCRIPTORS_MAX]);
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let mut parts = [IoSliceMut::new(buffer)];
        let received = loop {
            match recvmsg::<()>(self.0.as_raw_fd(), &mut parts, Some(&mut space), flags) {
                Err(nix::Error::EINTR) => {}
                other => break other?,
            }
        };
        let mut descriptors = Vec::new();
        for message in received.cmsgs()? {
            if let ControlMessageOwned::ScmRights(raw) = message {
                for fd in raw {
                    // SAFETY: the kernel has just put this descriptor into our table, and nobody else has it.
                    descriptors.push(unsafe { OwnedFd::from_raw_fd(fd) });
                }
            }
        }
        let cut = MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC;
        if received.flags.intersects(cut) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "message too long",
            ));
        }
        Ok(Received {
            bytes: received.bytes,
            descriptors,
        })
    }

    /// Receives one message that carries no descriptors, without taking any memory; 0 bytes: the other side has closed.
    ///
    /// A message longer than the buffer is an error (`InvalidData`) and is gone; descriptors that come with it are closed.
    pub fn receive_bytes(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let raw = self.0.as_raw_fd();
        let bytes = retry(|| Ok(recv(raw, buffer, MsgFlags::MSG_TRUNC)?))?;
        if bytes > buffer.len() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(bytes)
    }

    /// Time limits of `send` and `receive`; `None`: wait for ever.
    pub fn set_time_limit(&self, limit: Option<Duration>) -> io::Result<()> {
        let limit = limit.map_or(Duration::ZERO, |l| l.max(Duration::from_micros(1)));
        let value = TimeVal::new(
            i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
            i64::from(limit.subsec_micros()),
        );
        setsockopt(&self.0, sockopt::ReceiveTimeout, &value)?;
        Ok(setsockopt(&self.0, sockopt::SendTimeout, &value)?)
    }

    /// Whether `send` and `receive` return `WouldBlock` instead of waiting.
    pub fn set_nonblocking(&self, on: bool) -> io::Result<()> {
        set_nonblocking(self.0.as_fd(), on)
    }

    /// Who is on the other side.
    pub fn peer(&self) -> io::Result<Peer> {
        peer(&self.0)
    }

    /// Another handle of the same side.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self(self.0.try_clone()?))
    }

    /// The descriptor, to hand on.
    pub fn into_fd(self) -> OwnedFd {
        self.0
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn packet_socket() -> io::Result<OwnedFd> {
    Ok(socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?)
}

/// Sets or clears `O_NONBLOCK` of an open file description (all its holders see it).
pub fn set_nonblocking(fd: BorrowedFd<'_>, on: bool) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let mut flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    flags.set(OFlag::O_NONBLOCK, on);
    fcntl(fd, FcntlArg::F_SETFL(flags))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memfd::Memfd;

    #[test]
    fn messages_keep_their_bounds_and_carry_descriptors() {
        let (a, b) = PacketSocket::pair().unwrap();
        let memory = Memfd::create("blktide-test", 4096).unwrap();
        memory.write_at(0, b"tide").unwrap();
        a.send(b"one", &[memory.as_fd()]).unwrap();
        a.send(b"two!", &[]).unwrap();
        let mut buffer = [0; 64];
        let first = b.receive(&mut buffer).unwrap();
        assert_eq!(&buffer[..first.bytes], b"one");
        let [fd]: [OwnedFd; 1] = first.descriptors.try_into().unwrap();
        let mut out = [0; 4];
        Memfd::from_fd(fd).unwrap().read_at(0, &mut out).unwrap();
        assert_eq!(&out, b"tide");
        assert_eq!(b.receive(&mut buffer).unwrap().bytes, 4);
        assert_eq!(
            b.peer().unwrap().pid,
            i32::try_from(std::process::id()).unwrap()
        );
        drop(a);
        assert_eq!(b.receive(&mut buffer).unwrap().bytes, 0);
        assert_eq!(
            b.send(b"x", &[]).unwrap_err().kind(),
            io::ErrorKind::BrokenPipe
        );
    }

    #[test]
    fn a_message_that_does_not_fit_is_an_error() {
        let (a, b) = PacketSocket::pair().unwrap();
        a.send(&[1; 100], &[]).unwrap();
        assert_eq!(
            b.receive(&mut [0; 10]).unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
    }

    #[test]
    fn bytes_alone() {
        let (a, b) = PacketSocket::pair().unwrap();
        let memory = Memfd::create("blktide-test", 4096).unwrap();
        a.send(b"tide", &[memory.as_fd()]).unwrap();
        a.send(b"too long", &[]).unwrap();
        a.send(b"x", &[]).unwrap();
        let mut buffer = [0; 4];
        assert_eq!(b.receive_bytes(&mut buffer).unwrap(), 4);
        assert_eq!(&buffer, b"tide");
        let cut = b.receive_bytes(&mut buffer).unwrap_err();
        assert_eq!(cut.kind(), io::ErrorKind::InvalidData);
        assert_eq!(b.receive_bytes(&mut buffer).unwrap(), 1);
        drop(a);
        assert_eq!(b.receive_bytes(&mut buffer).unwrap(), 0);
    }

    #[test]
    fn listening_connecting_and_limits() {
        let path = std::env::temp_dir().join(format!("blktide-sys-socket-{}", std::process::id()));
        let listener = PacketListener::bind(&path, 0o600).unwrap();
        assert!(listener.accept().unwrap().is_none());
        let client = PacketSocket::connect(&path).unwrap();
        let server = listener.accept().unwrap().unwrap();
        client
            .set_time_limit(Some(Duration::from_millis(1)))
            .unwrap();
        assert_eq!(
            client.receive(&mut [0; 10]).unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
        server.send(b"x", &[]).unwrap();
        assert_eq!(client.receive(&mut [0; 10]).unwrap().bytes, 1);
        drop(PacketListener::bind(&path, 0o600).unwrap());
        std::fs::remove_file(&path).unwrap();
    }
}
