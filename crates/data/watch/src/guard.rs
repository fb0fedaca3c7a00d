//! The thaw guard: a process that freezes a file system and thaws it, whatever becomes of who asked.
//!
//! ```text
//!  asker: Guard ──(SEQPACKET socket)── guard: `blktided thaw-guard`, memory locked
//!    freeze n, limit ───────────────▶  FIFREEZE
//!    ◀────────────────────── frozen n  waits for: thaw n │ its limit │ the asker's end
//!    thaw n ────────────────────────▶  FITHAW
//!    ◀──────── thawed n: why, how long
//!  Both hold a descriptor of the mount that was opened before. The guard dies: the asker thaws. The asker dies: the guard does.
//! ```
//! Invariant: a file system that a guard has frozen is thawed at the latest when its limit is over, unless guard and asker
//! are both killed or both stopped. Between freezing and thawing the guard makes system calls only: it opens, allocates and
//! logs nothing. [`Frozen::thaw`] is `Ok` only if the file system was frozen from the guard's answer until it was called.

mod message;
mod process;

pub use process::run;

use crate::note::FreezeNote;
use blktide_sys::SysError;
use blktide_sys::blockdev::{FreezeError, thaw};
use blktide_sys::event::{Signals, pause, wait_readable};
use blktide_sys::process::{Exit, PidFd};
use blktide_sys::socket::PacketSocket;
use blktide_sys::spawn::{Launch, Program, launch};
use message::{By, MESSAGE_BYTES, Reply, Request};
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

/// The word that makes `blktided` a thaw guard; it is its one argument.
pub const ROLE: &str = "thaw-guard";
/// The longest limit that a guard accepts; longer ones are cut to it.
pub const LIMIT_MAX: Duration = Duration::from_secs(60);

/// Where the guard finds its socket and the mount.
const SOCKET_NUMBER: i32 = 3;
const MOUNT_NUMBER: i32 = 4;
/// A new guard has locked its memory by then.
const START_PATIENCE: Duration = Duration::from_secs(20);
/// Then a guard that was asked to thaw is taken for stopped: the asker thaws.
const THAW_PATIENCE: Duration = Duration::from_secs(2);
/// A guard that nobody needs has ended by then.
const END_PATIENCE: Duration = Duration::from_secs(2);
/// Tries of our own to thaw, and the time between two.
const THAW_TRIES: u32 = 50;
const THAW_PAUSE: Duration = Duration::from_millis(20);

/// What came of freezing by a guard.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GuardError {
    /// Nothing runs, nothing is frozen.
    #[error("the thaw guard could not be started")]
    Start(#[source] SysError),
    /// The guard's own side failed before or after all freezes.
    #[error("the thaw guard could not {what}")]
    Process {
        /// What it could not.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// It is not frozen by us; if by somebody else it still is.
    #[error("the file system was not frozen")]
    Freeze(#[source] FreezeError),
    /// The kernel is still at it; the file system is thawed as soon as that ends. This guard is of no use any more.
    #[error("freezing the file system took longer than {} ms", patience.as_millis())]
    Slow {
        /// How long was waited.
        patience: Duration,
    },
    /// The guard has thawed it before it was asked to.
    #[error("the file system was thawed after {} ms, because the limit was over", frozen.as_millis())]
    Expired {
        /// How long it was frozen.
        frozen: Duration,
    },
    /// Somebody else has thawed it at some time before we did.
    #[error("somebody else has thawed the file system")]
    ThawedByAnother,
    /// The guard was killed or stopped, or said what it must not. Nothing is frozen; this guard is of no use any more.
    #[error("the thaw guard was lost{}", if *thawed { "; the file system was thawed without it" } else { "" })]
    Lost {
        /// Whether it was found frozen, and thawed by this process.
        thawed: bool,
    },
    /// Neither the guard nor this process could thaw it: **it may still be frozen**.
    #[error("the file system could not be thawed")]
    StillFrozen(#[source] FreezeError),
}

impl GuardError {
    /// Whether the file system may be frozen by us after this, or become so.
    pub const fn may_be_frozen(&self) -> bool {
        match self {
            Self::Slow { .. } | Self::StillFrozen(_) => true,
            Self::Start(_)
            | Self::Process { .. }
            | Self::Freeze(_)
            | Self::Expired { .. }
            | Self::ThawedByAnother
            | Self::Lost { .. } => false,
        }
    }
}

/// A freeze that lasted as long as it was to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thawed {
    /// How long the freezing call took; writers wait from its beginning.
    pub call: Duration,
    /// From its end until the end of the thawing call.
    pub frozen: Duration,
}

/// A guard process and the mount that it freezes, again and again. Dropped, it ends.
#[derive(Debug)]
pub struct Guard {
    /// `None`: the guard is lost, or busy with a freeze that was given up.
    socket: Option<PacketSocket>,
    process: PidFd,
    mount: Option<OwnedFd>,
    number: u64,
    refused: u64,
    abandoned: Abandoned,
}

/// Whether a freeze was given up while the call was under way.
#[derive(Debug)]
enum Abandoned {
    No,
    /// Who sees it end takes the note back.
    Yes(Option<FreezeNote>),
}

/// What the guard says, or does not.
enum Heard {
    Reply(Reply),
    Nothing,
    Gone,
}

impl Guard {
    /// Starts a guard of the file system that `mount` (its root, or any file in it) lies on. Waits: some milliseconds.
    ///
    /// `program` is `blktided`: [`Program::this`] there. As long as the guard lives `mount` keeps the file system in use.
    pub fn start(program: &Program, mount: OwnedFd) -> Result<Self, GuardError> {
        let (socket, theirs) = PacketSocket::pair().map_err(fault("make a socket"))?;
        let started = launch(&Launch {
            program,
            // The `@`: a machine that shuts down does not kill it. It ends by itself, after who may need it.
            arguments: &[OsStr::new("@blktided"), OsStr::new(ROLE)],
            environment: &[],
            descriptors: &[
                (theirs.as_fd(), SOCKET_NUMBER),
                (mount.as_fd(), MOUNT_NUMBER),
            ],
            new_session: true,
        });
        let process = started.map_err(GuardError::Start)?.process;
        // Else its end would not be seen.
        drop(theirs);
        let mut guard = Self {
            socket: Some(socket),
            process,
            mount: Some(mount),
            number: 0,
            refused: 0,
            abandoned: Abandoned::No,
        };
        match guard.hear(START_PATIENCE) {
            Heard::Reply(Reply::Ready { refused }) => guard.refused = refused,
            Heard::Reply(_) | Heard::Nothing | Heard::Gone => {
                guard.kill();
                return Err(GuardError::Lost { thawed: false });
            }
        }
        Ok(guard)
    }

    /// Its process.
    pub fn pid(&self) -> i32 {
        self.process.pid()
    }

    /// What the kernel refused it, for a warning: without these it may be slow or killed when memory is short.
    pub fn refused(&self) -> Vec<&'static str> {
        process::refused_words(self.refused)
    }

    /// Freezes the file system for `limit` at most, counted from when it is frozen. Dirty data should be written before:
    /// the call writes the rest, and writers wait meanwhile.
    ///
    /// A call that lasts longer than `patience` is given up (`Slow`).
    pub fn freeze(
        &mut self,
        limit: Duration,
        patience: Duration,
    ) -> Result<Frozen<'_>, GuardError> {
        let call = self.ask_to_freeze(limit, patience)?;
        Ok(self.frozen(call))
    }

    /// What [`Self::ask_to_freeze`] has frozen.
    pub(crate) const fn frozen(&mut self, call: Duration) -> Frozen<'_> {
        Frozen {
            guard: self,
            call,
            over: false,
        }
    }

    /// As [`Self::freeze`]; returns how long the call took. It is to be thawed, or this guard dropped.
    pub(crate) fn ask_to_freeze(
        &mut self,
        limit: Duration,
        patience: Duration,
    ) -> Result<Duration, GuardError> {
        if self.socket.is_none() {
            return Err(GuardError::Lost { thawed: false });
        }
        self.number = self.number.saturating_add(1);
        let number = self.number;
        if !self.say(Request::Freeze { number, limit }) {
            return Err(self.lost());
        }
        match self.hear(patience) {
            Heard::Reply(Reply::Frozen { number: n, call }) if n == number => Ok(call),
            Heard::Reply(Reply::Failed { number: n, errno }) if n == number => {
                Err(GuardError::Freeze(FreezeError::of_freeze(errno)))
            }
            Heard::Nothing => {
                // It sees the end of the socket when its call returns.
                self.socket = None;
                self.abandoned = Abandoned::Yes(None);
                Err(GuardError::Slow { patience })
            }
            Heard::Reply(_) | Heard::Gone => Err(self.lost()),
        }
    }

    /// Leaves `note` to whoever comes to know that the freeze which failed by `error` is over: at once, or when the call ends.
    pub(crate) fn abandon(&mut self, note: FreezeNote, error: &GuardError) {
        if matches!(error, GuardError::Slow { .. }) {
            self.abandoned = Abandoned::Yes(Some(note));
        } else if !error.may_be_frozen() {
            note.take_back();
        }
    }

    fn thaw(&mut self, call: Duration) -> Result<Thawed, GuardError> {
        let number = self.number;
        // If that cannot be said, what was said before can still be heard.
        self.say(Request::Thaw { number });
        let Heard::Reply(Reply::Thawed(thawed)) = self.hear(THAW_PATIENCE) else {
            return Err(self.lost());
        };
        if thawed.number != number {
            return Err(self.lost());
        }
        let frozen = thawed.frozen;
        match (thawed.error.map(FreezeError::of_thaw), thawed.by) {
            (None, By::Asked) => Ok(Thawed { call, frozen }),
            (None, By::Limit) => Err(GuardError::Expired { frozen }),
            (Some(FreezeError::NotFrozen), _) => Err(GuardError::ThawedByAnother),
            (None, By::End | By::Fault) | (Some(_), _) => Err(self.lost()),
        }
    }

    fn say(&self, request: Request) -> bool {
        let socket = self.socket.as_ref();
        socket.is_some_and(|s| s.send(&request.encode(), &[]).is_ok())
    }

    fn hear(&self, patience: Duration) -> Heard {
        let Some(socket) = &self.socket else {
            return Heard::Gone;
        };
        if !wait_readable(socket, Some(patience)).unwrap_or(true) {
            return Heard::Nothing;
        }
        let mut bytes = [0; MESSAGE_BYTES];
        match socket.receive_bytes(&mut bytes) {
            Ok(got) => Reply::decode(bytes.get(..got)).map_or(Heard::Gone, Heard::Reply),
            Err(_) => Heard::Gone,
        }
    }

    /// The guard is of no use any more: this process thaws what it may have left frozen.
    fn lost(&mut self) -> GuardError {
        self.kill();
        let Some(mount) = &self.mount else {
            return GuardError::Lost { thawed: false };
        };
        match thaw_patiently(mount) {
            Ok(()) => GuardError::Lost { thawed: true },
            Err(FreezeError::NotFrozen) => GuardError::Lost { thawed: false },
            Err(e) => GuardError::StillFrozen(e),
        }
    }

    /// Only a guard that is dead thaws nothing later, which might be another's freeze then.
    fn kill(&mut self) {
        self.socket = None;
        // It may have ended before; and if it does not end in time there is nothing more to be done about it.
        drop(self.process.signal(Signals::Kill));
        drop(wait_readable(&self.process, Some(END_PATIENCE)));
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let alive = self.socket.take().is_some();
        if alive && !wait_readable(&self.process, Some(END_PATIENCE)).unwrap_or(true) {
            self.kill();
        }
        let abandoned = std::mem::replace(&mut self.abandoned, Abandoned::No);
        if matches!(abandoned, Abandoned::No) && matches!(self.process.try_wait(), Ok(Some(_))) {
            return;
        }
        // Its call may not have returned yet. Somebody has to stay and see it thaw.
        if let (Ok(process), Some(mount)) = (self.process.try_clone(), self.mount.take()) {
            let watch = move || see_out(&process, &mount, abandoned);
            drop(std::thread::Builder::new().spawn(watch));
        }
    }
}

/// Waits for the end of a guard, and thaws if it was given up and did not.
fn see_out(process: &PidFd, mount: &OwnedFd, abandoned: Abandoned) {
    let exit = process.wait();
    let Abandoned::Yes(note) = abandoned else {
        return;
    };
    let over = matches!(exit, Ok(Exit::Code(0)))
        || matches!(thaw_patiently(mount), Ok(()) | Err(FreezeError::NotFrozen));
    if let Some(note) = note.filter(|_| over) {
        note.take_back();
    }
}

/// A file system that a guard has frozen. Dropped, it is thawed.
#[derive(Debug)]
pub struct Frozen<'g> {
    guard: &'g mut Guard,
    call: Duration,
    over: bool,
}

impl Frozen<'_> {
    /// How long the freezing call took.
    pub const fn call(&self) -> Duration {
        self.call
    }

    /// Whether the freeze is known to be over: then going on is in vain. Takes no memory.
    pub fn is_over(&self) -> bool {
        let socket = self.guard.socket.as_ref();
        socket.is_none_or(|s| wait_readable(s, Some(Duration::ZERO)).unwrap_or(true))
    }

    /// Thaws it. `Ok`: it was frozen all the time until now. (Only somebody who thaws it and freezes it again is not noticed:
    /// the kernel tells no difference.)
    pub fn thaw(mut self) -> Result<Thawed, GuardError> {
        self.over = true;
        self.guard.thaw(self.call)
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        if !self.over {
            // Nobody relies on this freeze any more.
            drop(self.guard.thaw(self.call));
        }
    }
}

/// Tries again after errors that may pass (a superblock that could not be written).
fn thaw_patiently(mount: &impl AsFd) -> Result<(), FreezeError> {
    let mut tries = 0;
    loop {
        tries += 1;
        match thaw(mount) {
            Err(e) if !matches!(e, FreezeError::NotFrozen) && tries < THAW_TRIES => {
                drop(pause(THAW_PAUSE));
            }
            ended => return ended,
        }
    }
}

fn fault(what: &'static str) -> impl Fn(io::Error) -> GuardError {
    move |source| GuardError::Process { what, source }
}
