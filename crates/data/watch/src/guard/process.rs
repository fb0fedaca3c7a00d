//! The guard's own process: hardens itself, then serves one asker until that ends.
//!
//! ```text
//!   ready ─▶ waits ── freeze ─▶ FIFREEZE ─▶ frozen ── thaw │ limit │ end │ fault ─▶ FITHAW ─▶ thawed ─┐
//!              ▲                    └──▶ failed ─┐                                                    │
//!              └─────────────────────────────────┴────────────────────────────────────────────────────┘
//! ```
//! Invariant: there is no way from FIFREEZE but through FITHAW; on it nothing is opened, allocated or logged, and no message
//! is waited to be taken.

use super::message::{By, MESSAGE_BYTES, Over, Reply, Request};
use super::{GuardError, LIMIT_MAX, MOUNT_NUMBER, SOCKET_NUMBER, fault, thaw_patiently};
use blktide_sys::Errno;
use blktide_sys::blockdev::{FreezeError, freeze};
use blktide_sys::clock::SystemClock;
use blktide_sys::event::{Signals, TimerFd, Watched, poll_few};
use blktide_sys::process::inherited_descriptor;
use blktide_sys::socket::PacketSocket;
use blktide_sys::{mapping, process};
use blktide_types::clock::Clock;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

const NICENESS: i32 = -10;

/// The guard, until its asker ends. Its descriptors are inherited: started by `Guard::start`, never by hand.
///
/// Call it first in `main`: no thread runs, nothing is open yet.
pub fn run() -> Result<(), GuardError> {
    let inherited = |number| inherited_descriptor(number).map_err(fault("find what it inherits"));
    let socket = PacketSocket::from_fd(inherited(SOCKET_NUMBER)?);
    let mount = Mount(inherited(MOUNT_NUMBER)?);
    let refused = harden();
    let served = Post::new(&socket, &mount, &SystemClock).and_then(|post| post.serve(refused));
    served.map_err(fault("serve"))
}

/// What can be refused (in a container), in the order of the bits.
const HARDENINGS: [&str; 5] = [
    "locked memory",
    "an OOM score of -1000",
    "I/O flusher",
    "blocked signals",
    "niceness",
];

pub(super) fn refused_words(bits: u64) -> Vec<&'static str> {
    let named = HARDENINGS.into_iter().enumerate();
    named
        .filter(|(i, _)| bits >> i & 1 == 1)
        .map(|(_, word)| word)
        .collect()
}

fn harden() -> u64 {
    let ignored = [
        process::forbid_core_dumps(),
        process::lift_memory_lock_limit(),
        process::set_thread_name("blktide-thaw"),
    ];
    debug_assert_eq!(ignored.len(), 3, "none of these is needed");
    // A signal that ends a whole group of processes would end both who can thaw.
    let ends = [Signals::Terminate, Signals::Interrupt, Signals::Reload];
    let steps = [
        mapping::lock_all(),
        process::set_oom_score_adjustment(-1000),
        process::set_io_flusher(),
        process::block_signals(&ends),
        process::set_niceness(NICENESS),
    ];
    let bits = steps.into_iter().enumerate();
    bits.fold(0, |all, (i, step)| all | u64::from(step.is_err()) << i)
}

/// What is frozen and thawed; a stand-in for it in tests.
trait Freezes {
    fn freeze(&self) -> Result<(), FreezeError>;
    fn thaw(&self) -> Result<(), FreezeError>;
}

struct Mount(OwnedFd);

impl Freezes for Mount {
    fn freeze(&self) -> Result<(), FreezeError> {
        freeze(&self.0)
    }

    fn thaw(&self) -> Result<(), FreezeError> {
        thaw_patiently(&self.0)
    }
}

/// All that the guard works with, made before the first freeze.
struct Post<'a, M> {
    socket: &'a PacketSocket,
    mount: &'a M,
    clock: &'a dyn Clock,
    timer: TimerFd,
}

impl<'a, M: Freezes> Post<'a, M> {
    fn new(socket: &'a PacketSocket, mount: &'a M, clock: &'a dyn Clock) -> io::Result<Self> {
        // An asker that takes no messages must not keep a thaw waiting.
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket,
            mount,
            clock,
            timer: TimerFd::new()?,
        })
    }

    fn serve(&self, refused: u64) -> io::Result<()> {
        self.tell(Reply::Ready { refused })?;
        loop {
            poll_few(&mut [Watched::readable(self.socket)], None)?;
            match self.hear() {
                Ok(Some(Request::Freeze { number, limit })) => self.hold(number, limit)?,
                // It crossed with our word that the limit was over.
                Ok(Some(Request::Thaw { .. })) => {}
                Ok(None) => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// One freeze, from its beginning to its end.
    fn hold(&self, number: u64, limit: Duration) -> io::Result<()> {
        let begun = self.clock.now();
        if let Err(e) = self.mount.freeze() {
            let errno = e.errno();
            return self.tell(Reply::Failed { number, errno });
        }
        let frozen = self.clock.now();
        let call = frozen.since(begun);
        let by = match self.say_frozen(number, call, limit) {
            Ok(()) => self.wait(number),
            Err(_) => By::Fault,
        };
        let error = self.mount.thaw().err().map(|e| e.errno());
        let over = Over {
            number,
            frozen: self.clock.now().since(frozen),
            by,
            error,
        };
        self.tell(Reply::Thawed(over)).and(left_frozen(error))
    }

    fn say_frozen(&self, number: u64, call: Duration, limit: Duration) -> io::Result<()> {
        self.timer.once(limit.min(LIMIT_MAX))?;
        self.tell(Reply::Frozen { number, call })
    }

    /// Until the freeze is to end.
    fn wait(&self, number: u64) -> By {
        loop {
            let mut watched = [
                Watched::readable(self.socket),
                Watched::readable(&self.timer),
            ];
            if poll_few(&mut watched, None).is_err() {
                return By::Fault;
            }
            let [said, over] = watched;
            // The asker first: what is frozen when it has asked is frozen until it asked.
            if said.is_ready() {
                match self.hear() {
                    Ok(Some(Request::Thaw { number: n })) if n == number => return By::Asked,
                    Ok(Some(Request::Thaw { .. })) => {}
                    Ok(None) => return By::End,
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                    Ok(Some(Request::Freeze { .. })) | Err(_) => return By::Fault,
                }
            }
            if over.is_ready() {
                return By::Limit;
            }
        }
    }

    /// An asker that has ended is found by who hears next.
    fn tell(&self, reply: Reply) -> io::Result<()> {
        match self.socket.send(&reply.encode(), &[]) {
            Err(e) if is_end(&e) => Ok(()),
            told => told,
        }
    }

    /// The next request; `None`: the asker has ended.
    fn hear(&self) -> io::Result<Option<Request>> {
        let mut bytes = [0; MESSAGE_BYTES];
        let got = match self.socket.receive_bytes(&mut bytes) {
            Ok(0) => return Ok(None),
            Err(e) if is_end(&e) => return Ok(None),
            got => got?,
        };
        let request = Request::decode(bytes.get(..got));
        request
            .map(Some)
            .ok_or_else(|| io::ErrorKind::InvalidData.into())
    }
}

fn is_end(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset};
    [BrokenPipe, ConnectionReset].contains(&error.kind())
}

/// An end that is not clean makes the asker look whether it has to thaw.
fn left_frozen(error: Option<Errno>) -> io::Result<()> {
    match error {
        None | Some(Errno::INVAL) => Ok(()),
        Some(errno) => Err(errno.error()),
    }
}

#[cfg(test)]
mod tests;
