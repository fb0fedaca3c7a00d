//! Waiting for events: counters, timers, signals, and poll(2) over all of them.

use crate::error::retry;
use nix::sys::eventfd::{EfdFlags, EventFd as NixEventFd};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd as NixSignalFd};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{
    ClockId, Expiration, TimerFd as NixTimerFd, TimerFlags, TimerSetTimeFlags,
};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

/// A counter that a thread or process can wait for.
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl EventFd {
    /// A counter at zero; non-blocking.
    pub fn new() -> io::Result<Self> {
        let fd =
            NixEventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self(fd.into()))
    }

    /// The counter behind an inherited or received descriptor.
    pub const fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Wakes who waits. Never waits itself: a counter that is full is ringing already.
    pub fn ring(&self) {
        let rung = nix::unistd::write(&self.0, &1_u64.to_ne_bytes());
        debug_assert!(matches!(rung, Ok(8) | Err(nix::errno::Errno::EAGAIN)));
    }

    /// Silences it; true if it was ringing.
    pub fn take(&self) -> bool {
        let mut count = [0; 8];
        nix::unistd::read(&self.0, &mut count).is_ok()
    }

    /// Another handle of the same counter.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self(self.0.try_clone()?))
    }

    /// The descriptor, to hand on.
    pub fn into_fd(self) -> OwnedFd {
        self.0
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A timer that can be waited for; it counts while the machine is suspended, too.
#[derive(Debug)]
pub struct TimerFd(NixTimerFd);

impl TimerFd {
    /// A timer that is not set; non-blocking.
    pub fn new() -> io::Result<Self> {
        let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
        Ok(Self(NixTimerFd::new(ClockId::CLOCK_BOOTTIME, flags)?))
    }

    /// Rings once, `after` from now (a nanosecond at least).
    pub fn once(&self, after: Duration) -> io::Result<()> {
        let expiration =
            Expiration::OneShot(TimeSpec::from_duration(after.max(Duration::from_nanos(1))));
        Ok(self.0.set(expiration, TimerSetTimeFlags::empty())?)
    }

    /// Rings every `period`.
    pub fn every(&self, period: Duration) -> io::Result<()> {
        let period = TimeSpec::from_duration(period.max(Duration::from_nanos(1)));
        Ok(self
            .0
            .set(Expiration::Interval(period), TimerSetTimeFlags::empty())?)
    }

    /// Rings no more.
    pub fn stop(&self) -> io::Result<()> {
        Ok(self.0.unset()?)
    }

    /// Silences it; true if it had rung.
    pub fn take(&self) -> bool {
        let mut count = [0; 8];
        nix::unistd::read(self.0.as_fd(), &mut count).is_ok()
    }
}

impl AsFd for TimerFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Signals that processes here know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signals {
    /// SIGHUP: read the configuration again.
    Reload,
    /// SIGINT.
    Interrupt,
    /// SIGTERM.
    Terminate,
    /// SIGCHLD.
    Child,
    /// SIGKILL; can be sent, not received.
    Kill,
    /// SIGSTOP; can be sent, not received.
    Stop,
    /// SIGCONT.
    Continue,
    /// SIGUSR1.
    User1,
    /// SIGPIPE; ignored by Rust programs anyway.
    Pipe,
}

impl Signals {
    pub(crate) const fn number(self) -> i32 {
        self.nix() as i32
    }

    pub(crate) const fn nix(self) -> Signal {
        match self {
            Self::Reload => Signal::SIGHUP,
            Self::Interrupt => Signal::SIGINT,
            Self::Terminate => Signal::SIGTERM,
            Self::Child => Signal::SIGCHLD,
            Self::Kill => Signal::SIGKILL,
            Self::Stop => Signal::SIGSTOP,
            Self::Continue => Signal::SIGCONT,
            Self::User1 => Signal::SIGUSR1,
            Self::Pipe => Signal::SIGPIPE,
        }
    }
}

/// Signals as events. They stay blocked in this thread and in those it starts later: make it before any.
#[derive(Debug)]
pub struct SignalFd(NixSignalFd);

impl SignalFd {
    /// Blocks `signals` and makes them events.
    pub fn new(signals: &[Signals]) -> io::Result<Self> {
        let mut set = SigSet::empty();
        for signal in signals {
            set.add(signal.nix());
        }
        set.thread_block()?;
        Ok(Self(NixSignalFd::with_flags(
            &set,
            SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK,
        )?))
    }

    /// The next signal that has arrived.
    pub fn take(&self) -> io::Result<Option<Signals>> {
        let Some(info) = self.0.read_signal()? else {
            return Ok(None);
        };
        let number = i32::try_from(info.ssi_signo).unwrap_or(0);
        let all = [
            Signals::Reload,
            Signals::Interrupt,
            Signals::Terminate,
            Signals::Child,
            Signals::Continue,
            Signals::User1,
            Signals::Pipe,
        ];
        Ok(all.into_iter().find(|s| s.nix() as i32 == number))
    }
}

impl AsFd for SignalFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What came of waiting for one thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// Nothing yet.
    Waiting,
    /// It can be read, or written.
    Ready,
    /// The other side is gone, or it is in error (POLLHUP, POLLERR); there may still be something to read.
    HungUp,
    /// It is not an open descriptor (POLLNVAL).
    Invalid,
}

/// One thing to wait for.
#[derive(Clone, Copy, Debug)]
pub struct Watched<'a> {
    fd: BorrowedFd<'a>,
    for_writing: bool,
    /// What came of it.
    pub readiness: Readiness,
}

impl<'a> Watched<'a> {
    /// Waits until `fd` can be read.
    pub fn readable(fd: &'a impl AsFd) -> Self {
        Self::of(fd, false)
    }

    /// Waits until `fd` can be written.
    pub fn writable(fd: &'a impl AsFd) -> Self {
        Self::of(fd, true)
    }

    fn of(fd: &'a impl AsFd, for_writing: bool) -> Self {
        Self {
            fd: fd.as_fd(),
            for_writing,
            readiness: Readiness::Waiting,
        }
    }

    fn raw(self) -> libc::pollfd {
        libc::pollfd {
            fd: self.fd.as_raw_fd(),
            events: if self.for_writing {
                libc::POLLOUT
            } else {
                libc::POLLIN
            },
            revents: 0,
        }
    }

    /// Whether there is anything to do about it.
    pub fn is_ready(&self) -> bool {
        self.readiness != Readiness::Waiting
    }
}

/// Waits until one of `watched` is ready or `limit` is over (`None`: for ever); says how many are.
///
/// Returns early with 0 when a signal arrives.
pub fn poll(watched: &mut [Watched<'_>], limit: Option<Duration>) -> io::Result<usize> {
    let mut raw: Vec<libc::pollfd> = watched.iter().copied().map(Watched::raw).collect();
    poll_raw(&mut raw, watched, limit)
}

/// The same, without taking any memory: for where the file system may be frozen that memory would have to be won from.
pub fn poll_few<const N: usize>(
    watched: &mut [Watched<'_>; N],
    limit: Option<Duration>,
) -> io::Result<usize> {
    let mut raw = watched.map(Watched::raw);
    poll_raw(&mut raw, watched, limit)
}

/// `raw` has an entry for each of `watched`.
fn poll_raw(
    raw: &mut [libc::pollfd],
    watched: &mut [Watched<'_>],
    limit: Option<Duration>,
) -> io::Result<usize> {
    let millis = limit.map_or(-1, |l| {
        let rounded = l.as_nanos().div_ceil(1_000_000);
        i32::try_from(rounded).unwrap_or(i32::MAX)
    });
    let count = libc::nfds_t::try_from(raw.len()).map_err(io::Error::other)?;
    // SAFETY: `raw` holds `count` entries that the kernel may write to for the length of the call.
    let ready = crate::error::check(unsafe { libc::poll(raw.as_mut_ptr(), count, millis) });
    let ready = match ready {
        Err(e) if e.kind() == io::ErrorKind::Interrupted => return Ok(0),
        other => other?,
    };
    for (to, from) in watched.iter_mut().zip(raw) {
        to.readiness = if from.revents == 0 {
            Readiness::Waiting
        } else if from.revents & libc::POLLNVAL != 0 {
            Readiness::Invalid
        } else if from.revents & (libc::POLLHUP | libc::POLLERR) != 0 {
            Readiness::HungUp
        } else {
            Readiness::Ready
        };
    }
    usize::try_from(ready).map_err(io::Error::other)
}

/// Waits until `fd` can be read, or `limit` is over; true if it can.
pub fn wait_readable(fd: &impl AsFd, limit: Option<Duration>) -> io::Result<bool> {
    let mut one = [Watched::readable(fd)];
    Ok(retry(|| poll_few(&mut one, limit))? > 0)
}

/// Lets `time` go by. For what the kernel announces by no event (a loop device that is being released).
pub fn pause(time: Duration) -> io::Result<()> {
    poll_few(&mut [], Some(time)).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_rings_once() {
        let event = EventFd::new().unwrap();
        assert!(!wait_readable(&event, Some(Duration::ZERO)).unwrap());
        event.ring();
        event.ring();
        assert!(wait_readable(&event, None).unwrap());
        assert!(event.take());
        assert!(!event.take());
    }

    #[test]
    fn a_timer_rings() {
        let timer = TimerFd::new().unwrap();
        timer.once(Duration::from_millis(2)).unwrap();
        assert!(wait_readable(&timer, Some(Duration::from_secs(10))).unwrap());
        assert!(timer.take());
        assert!(!timer.take());
        timer.once(Duration::ZERO).unwrap();
        assert!(wait_readable(&timer, Some(Duration::from_secs(10))).unwrap());
    }

    #[test]
    fn a_closed_pipe_hangs_up() {
        let (read, write) = nix::unistd::pipe().unwrap();
        drop(write);
        let mut watched = [Watched::readable(&read)];
        assert_eq!(poll(&mut watched, None).unwrap(), 1);
        assert_eq!(watched[0].readiness, Readiness::HungUp);
        assert!(watched[0].is_ready());
    }

    #[test]
    fn signals_are_events() {
        // In a thread of its own: the mask is a thread's.
        let seen = std::thread::spawn(|| {
            let signals = SignalFd::new(&[Signals::User1]).unwrap();
            assert_eq!(signals.take().unwrap(), None);
            // SAFETY: names the calling thread; takes nothing.
            let thread = unsafe { libc::pthread_self() };
            // SAFETY: sends a blocked signal to this very thread, which lives.
            let sent = unsafe { libc::pthread_kill(thread, libc::SIGUSR1) };
            assert_eq!(sent, 0);
            signals.take().unwrap()
        });
        assert_eq!(seen.join().unwrap(), Some(Signals::User1));
    }
}
