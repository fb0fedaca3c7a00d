//! Processes: watched by descriptor, and hardened so that the data path does not fail under memory pressure.

use crate::Result;
use crate::error::{SysError, check};
use crate::event::Signals;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// By itself, with this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
    /// It was not our child: its end is known, not its code.
    Unknown,
}

/// A process, by descriptor: never another one that got the same number. Readable when the process has ended.
#[derive(Debug)]
pub struct PidFd {
    fd: OwnedFd,
    pid: i32,
}

impl PidFd {
    /// The process `pid`. If it is not our child, make sure by other means that the number still is its.
    pub fn open(pid: i32) -> Result<Self> {
        let fail = |e| SysError::call("pidfd_open", pid.to_string(), e);
        // SAFETY: pidfd_open(2) takes two numbers and touches no memory of ours.
        let raw = check(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) }).map_err(fail)?;
        let raw = i32::try_from(raw).map_err(|e| fail(io::Error::other(e)))?;
        // SAFETY: the kernel has just made this descriptor, and nobody else has it.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        Ok(Self { fd, pid })
    }

    /// The process that connected to, or *listened* for, the other side of a unix socket.
    ///
    /// For a socket whose listener was inherited that is the process that called listen(2), not the one that
    /// accepts: there let the other side send a descriptor of itself ([`PidFd::of_self`]).
    pub fn of_peer(socket: &impl AsFd) -> Result<Self> {
        let fail = |e| SysError::call("SO_PEERCRED", "", e);
        let peer = crate::socket::peer(socket).map_err(fail)?;
        Self::open(peer.pid)
    }

    /// This process, to be sent to who shall watch it.
    pub fn of_self() -> Result<Self> {
        Self::open(own_pid())
    }

    /// The process behind a received descriptor. Refused if it is not one of a process.
    pub fn from_fd(fd: OwnedFd) -> Result<Self> {
        let path = format!("/proc/self/fdinfo/{}", fd.as_raw_fd());
        let text = std::fs::read_to_string(&path).map_err(|e| SysError::call("read", &path, e))?;
        let line = text.lines().find_map(|l| l.strip_prefix("Pid:"));
        let pid = line.and_then(|l| l.trim().parse().ok());
        let pid = pid.ok_or_else(|| SysError::unfit(path, "not a descriptor of a process"))?;
        Ok(Self { fd, pid })
    }

    /// The descriptor, to hand on.
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// Its number.
    pub const fn pid(&self) -> i32 {
        self.pid
    }

    /// Whether it has ended. Waits for nothing.
    pub fn has_ended(&self) -> io::Result<bool> {
        crate::event::wait_readable(&self.fd, Some(std::time::Duration::ZERO))
    }

    /// How it ended, if it has; waits for nothing. Takes the status of a child away.
    pub fn try_wait(&self) -> io::Result<Option<Exit>> {
        if !self.has_ended()? {
            return Ok(None);
        }
        let id = libc::id_t::try_from(self.fd.as_raw_fd()).map_err(io::Error::other)?;
        // SAFETY: siginfo_t is plain numbers; all zero is a value of it.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        let flags = libc::WEXITED | libc::WNOHANG;
        // SAFETY: `info` is writable for the length of the call.
        let waited = check(unsafe { libc::waitid(libc::P_PIDFD, id, &raw mut info, flags) });
        match waited {
            Ok(_) => {}
            Err(e) if e.raw_os_error() == Some(libc::ECHILD) => return Ok(Some(Exit::Unknown)),
            Err(e) => return Err(e),
        }
        // SAFETY: waitid has filled in a SIGCHLD's siginfo, which has a status.
        let status = unsafe { info.si_status() };
        Ok(Some(if info.si_code == libc::CLD_EXITED {
            Exit::Code(status)
        } else {
            Exit::Signal(status)
        }))
    }

    /// Waits for its end, for ever.
    pub fn wait(&self) -> io::Result<Exit> {
        loop {
            if let Some(exit) = self.try_wait()? {
                return Ok(exit);
            }
            crate::event::wait_readable(&self.fd, None)?;
        }
    }

    /// Sends a signal. `NotFound` (`ESRCH`) if it has ended.
    pub fn signal(&self, signal: Signals) -> io::Result<()> {
        let none = std::ptr::null::<libc::siginfo_t>();
        let (fd, number) = (self.fd.as_raw_fd(), signal.number());
        // SAFETY: pidfd_send_signal(2) with a null siginfo reads no memory of ours.
        check(unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, number, none, 0) })
            .map(|_| ())
    }

    /// Another handle of the same process.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            fd: self.fd.try_clone()?,
            pid: self.pid,
        })
    }

    /// Takes a copy of its descriptor number `number` (`pidfd_getfd(2)`); needs the right to trace it.
    pub fn take_descriptor(&self, number: i32) -> io::Result<OwnedFd> {
        let fd = self.fd.as_raw_fd();
        // SAFETY: pidfd_getfd(2) takes three numbers and touches no memory of ours.
        let raw = check(unsafe { libc::syscall(libc::SYS_pidfd_getfd, fd, number, 0) })?;
        let raw = i32::try_from(raw).map_err(io::Error::other)?;
        // SAFETY: the kernel has just made this descriptor, and nobody else has it.
        Ok(unsafe { OwnedFd::from_raw_fd(raw) })
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// This process's number.
pub fn own_pid() -> i32 {
    nix::unistd::getpid().as_raw()
}

/// This process's effective user.
pub fn own_uid() -> u32 {
    nix::unistd::geteuid().as_raw()
}

/// No core file: writing one takes long, and to a disk that may be tracked.
pub fn forbid_core_dumps() -> io::Result<()> {
    let none = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `none` is readable for the length of the call.
    check(unsafe { libc::setrlimit(libc::RLIMIT_CORE, &raw const none) }).map(|_| ())
}

/// Lifts the limit of locked memory. `PermissionDenied` without `CAP_SYS_RESOURCE`.
pub fn lift_memory_lock_limit() -> io::Result<()> {
    let all = libc::rlimit {
        rlim_cur: libc::RLIM_INFINITY,
        rlim_max: libc::RLIM_INFINITY,
    };
    // SAFETY: `all` is readable for the length of the call.
    check(unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const all) }).map(|_| ())
}

/// Lifts the limit of open descriptors to what this process may have.
pub fn lift_descriptor_limit() -> io::Result<()> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` is writable for the length of the call.
    check(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) })?;
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: `limit` is readable for the length of the call.
    check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) }).map(|_| ())
}

/// Tells the kernel that this process serves I/O: its allocations do not wait for I/O (`PR_SET_IO_FLUSHER`).
///
/// Inherited by threads started later. `EPERM` without `CAP_SYS_RESOURCE`: warn and go on.
pub fn set_io_flusher() -> io::Result<()> {
    const PR_SET_IO_FLUSHER: i32 = 57;
    // SAFETY: this prctl takes numbers only.
    check(unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) }).map(|_| ())
}

/// How readily the kernel kills this process when memory runs out: -1000 = never.
pub fn set_oom_score_adjustment(value: i32) -> io::Result<()> {
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .open("/proc/self/oom_score_adj")?;
    io::Write::write_all(&mut file, value.to_string().as_bytes())
}

/// How readily the scheduler runs this thread, and those and the processes it starts later: -20 first, 19 last.
///
/// `EACCES`/`EPERM` without `CAP_SYS_NICE`.
pub fn set_niceness(value: i32) -> io::Result<()> {
    // SAFETY: setpriority(2) takes numbers only.
    check(unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, value) }).map(|_| ())
}

/// The name that tools show for this thread; the first 15 bytes count.
pub fn set_thread_name(name: &str) -> io::Result<()> {
    let mut bytes = [0_u8; 16];
    for (to, from) in bytes.iter_mut().take(15).zip(name.bytes()) {
        *to = from;
    }
    // SAFETY: `bytes` is a string with a zero at its end, readable for the length of the call.
    check(unsafe { libc::prctl(libc::PR_SET_NAME, bytes.as_ptr(), 0, 0, 0) }).map(|_| ())
}

/// Blocks signals in this thread and in those it starts later; they wait until someone takes them.
pub fn block_signals(signals: &[Signals]) -> io::Result<()> {
    let mut set = nix::sys::signal::SigSet::empty();
    for signal in signals {
        set.add(signal.nix());
    }
    Ok(set.thread_block()?)
}

/// Takes ownership of an inherited descriptor by its number. Call once for each, early in `main`, before anything
/// else opens files.
///
/// `EBADF` if none was inherited there. It is close-on-exec from now on.
pub fn inherited_descriptor(number: i32) -> io::Result<OwnedFd> {
    if number < 3 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: F_SETFD with a number touches no memory; it fails if there is no such descriptor.
    check(unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    // SAFETY: the descriptor is open and, by the rule above, nobody else's in this process.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[expect(
        clippy::zombie_processes,
        reason = "it is waited for by its descriptor"
    )]
    fn start(program: &str, arguments: &[&str]) -> PidFd {
        let child = Command::new(program).args(arguments).spawn().unwrap();
        PidFd::open(i32::try_from(child.id()).unwrap()).unwrap()
    }

    #[test]
    fn the_end_of_a_child_is_seen() {
        let watched = start("/bin/sh", &["-c", "exit 7"]);
        assert_eq!(watched.wait().unwrap(), Exit::Code(7));
        assert_eq!(
            watched.try_wait().unwrap(),
            Some(Exit::Unknown),
            "its status is taken"
        );
        watched.signal(Signals::Kill).unwrap_err();
    }

    #[test]
    fn a_signal_ends_it() {
        let watched = start("/bin/sleep", &["1000"]);
        assert_eq!(watched.try_wait().unwrap(), None);
        watched.signal(Signals::Kill).unwrap();
        assert_eq!(watched.wait().unwrap(), Exit::Signal(libc::SIGKILL));
    }

    #[test]
    fn a_descriptor_of_oneself_can_be_sent() {
        let own = PidFd::from_fd(PidFd::of_self().unwrap().into_fd()).unwrap();
        assert_eq!(own.pid(), own_pid());
        assert!(!own.has_ended().unwrap());
        PidFd::from_fd(std::fs::File::open("/dev/null").unwrap().into()).unwrap_err();
    }

    #[test]
    fn no_core_and_a_name() {
        forbid_core_dumps().unwrap();
        std::thread::spawn(|| {
            set_thread_name("tide-test-with-a-long-name").unwrap();
            let name = std::fs::read_to_string("/proc/thread-self/comm").unwrap();
            assert_eq!(name.trim(), "tide-test-with-");
        })
        .join()
        .unwrap();
    }

    #[test]
    fn standard_descriptors_are_nobodys_inheritance() {
        inherited_descriptor(2).unwrap_err();
        inherited_descriptor(999_999).unwrap_err();
    }
}
