//! Starting processes from memory: a copy of the program that no disk is needed for.
//!
//! ```text
//! launch: prepare everything ─ fork ─┬─ parent: waits until the exec has succeeded, or has the child's errno
//!                                    └─ child: session, signals, descriptors to their numbers, exec
//! ```
//! Invariant: between fork and exec the child makes system calls only (the parent may have other threads): it
//! allocates nothing and takes no lock. It inherits the descriptors named in the launch, the three standard
//! ones, and no other.

use crate::Result;
use crate::error::{SysError, check, retry};
use crate::process::PidFd;
use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl, open};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::Mode;
use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Descriptors that one launch can hand on.
pub const DESCRIPTORS_MAX: usize = 64;
const MFD_EXEC: libc::c_uint = 0x10;

/// A program that can be started.
#[derive(Debug)]
pub struct Program {
    file: OwnedFd,
    in_memory: bool,
    bytes: u64,
}

impl Program {
    /// A sealed copy of this very program in memory (also when its file is deleted or replaced).
    ///
    /// Where `vm.memfd_noexec` forbids to execute memory: the file itself, which then has to be read from its disk.
    pub fn this() -> Result<Self> {
        Self::copy_of(Path::new("/proc/self/exe"))
    }

    /// A sealed copy in memory of the program at `path`; the file itself where that is forbidden.
    pub fn copy_of(path: &Path) -> Result<Self> {
        let fail = |call| move |e: io::Error| SysError::call(call, path, e);
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let file = open(path, flags, Mode::empty()).map_err(|e| fail("open")(e.into()))?;
        let bytes = crate::fs::size_of(&file).map_err(fail("lseek"))?;
        let Some(copy) = executable_memory().map_err(fail("memfd_create"))? else {
            return Ok(Self {
                file,
                in_memory: false,
                bytes,
            });
        };
        let mut chunk = vec![0; 1 << 20];
        let mut done = 0;
        loop {
            let got = crate::fs::read_full(&file, done, &mut chunk).map_err(fail("read"))?;
            let Some(part) = chunk.get(..got).filter(|p| !p.is_empty()) else {
                break;
            };
            crate::fs::write_full(&copy, done, part).map_err(fail("write"))?;
            done += u64::try_from(got).unwrap_or(0);
        }
        let seals = SealFlag::F_SEAL_SEAL
            | SealFlag::F_SEAL_SHRINK
            | SealFlag::F_SEAL_GROW
            | SealFlag::F_SEAL_WRITE;
        fcntl(&copy, FcntlArg::F_ADD_SEALS(seals)).map_err(|e| fail("F_ADD_SEALS")(e.into()))?;
        // Read-only, so that exec does not find it open for writing (ETXTBSY).
        let path_of_copy = format!("/proc/self/fd/{}", copy.as_raw_fd());
        let file = open(path_of_copy.as_str(), flags, Mode::empty())
            .map_err(|e| fail("open")(e.into()))?;
        Ok(Self {
            file,
            in_memory: true,
            bytes: done,
        })
    }

    /// The program behind an inherited or received descriptor.
    pub fn from_fd(file: OwnedFd) -> Result<Self> {
        let bytes = crate::fs::size_of(&file).map_err(|e| SysError::call("lseek", "program", e))?;
        let seals = fcntl(&file, FcntlArg::F_GET_SEALS).unwrap_or(0);
        let in_memory = SealFlag::from_bits_truncate(seals).contains(SealFlag::F_SEAL_WRITE);
        Ok(Self {
            file,
            in_memory,
            bytes,
        })
    }

    /// Whether it can be started without any disk.
    pub const fn is_in_memory(&self) -> bool {
        self.in_memory
    }

    /// Its size.
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Keeps all of it in memory (never swapped out) until the returned lock is dropped.
    pub fn lock(&self) -> io::Result<ProgramLock> {
        use nix::sys::mman::{MapFlags, ProtFlags, mlock, mmap};
        let len = usize::try_from(self.bytes).map_err(io::Error::other)?;
        let size = std::num::NonZeroUsize::new(len).ok_or(io::ErrorKind::InvalidData)?;
        // SAFETY: a fresh private mapping at an address of the kernel's choice touches no memory that exists.
        let base = unsafe {
            mmap(
                None,
                size,
                ProtFlags::PROT_READ,
                MapFlags::MAP_PRIVATE,
                self.file.as_fd(),
                0,
            )
        }?;
        let held = ProgramLock { base, len };
        // SAFETY: the range is the mapping just made.
        unsafe { mlock(base, len) }?;
        Ok(held)
    }

    /// The descriptor, to hand on.
    pub fn as_descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Keeps a program in memory.
#[derive(Debug)]
pub struct ProgramLock {
    base: std::ptr::NonNull<libc::c_void>,
    len: usize,
}

// SAFETY: the mapping is never accessed; it is only held.
unsafe impl Send for ProgramLock {}
// SAFETY: as above.
unsafe impl Sync for ProgramLock {}

impl Drop for ProgramLock {
    fn drop(&mut self) {
        // SAFETY: mapped in `Program::lock` with this length; nobody has a reference into it.
        let unmapped = unsafe { nix::sys::mman::munmap(self.base, self.len) };
        debug_assert!(unmapped.is_ok(), "munmap of our own mapping");
    }
}

/// `None` where memory may not be executed.
fn executable_memory() -> io::Result<Option<OwnedFd>> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    match memfd_create(
        c"blktide-program",
        flags | MFdFlags::from_bits_retain(MFD_EXEC),
    ) {
        Ok(fd) => Ok(Some(fd)),
        // Kernels before 6.3 do not know the flag, and make every memory file executable.
        Err(nix::Error::EINVAL) => Ok(Some(memfd_create(c"blktide-program", flags)?)),
        Err(nix::Error::EACCES) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// A process to be started.
#[derive(Debug)]
pub struct Launch<'a> {
    /// What runs.
    pub program: &'a Program,
    /// Its arguments, `argv[0]` first (a leading `@` there: not to be killed at shutdown).
    pub arguments: &'a [&'a OsStr],
    /// Its environment, `NAME=value`.
    pub environment: &'a [&'a OsStr],
    /// Descriptors it inherits, each at this number (3 or more).
    pub descriptors: &'a [(BorrowedFd<'a>, RawFd)],
    /// Whether it leads a session of its own, so that no terminal's signals reach it.
    pub new_session: bool,
}

/// A process that was started. Wait for it, or it stays as a zombie.
#[derive(Debug)]
pub struct Child {
    /// It.
    pub process: PidFd,
}

/// Starts a process; returns when its exec has succeeded. Waits: about 1 ms.
///
/// Errors: nothing runs.
pub fn launch(launch: &Launch<'_>) -> Result<Child> {
    let name = || {
        launch
            .arguments
            .first()
            .map_or_else(Default::default, |n| n.to_os_string())
    };
    let fail = |call| move |e: io::Error| SysError::call(call, name(), e);
    let plan = Plan::new(launch).map_err(fail("prepare"))?;
    let (told, tells) =
        nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(|e| fail("pipe2")(e.into()))?;
    // SAFETY: the child makes system calls only, until it execs or exits (see `Plan::run`).
    let pid = check(unsafe { libc::fork() }).map_err(fail("fork"))?;
    if pid == 0 {
        plan.run(tells.as_raw_fd());
    }
    drop(tells);
    let process = PidFd::open(pid).inspect_err(|_| end(pid))?;
    let mut errno = [0; 4];
    let got = retry(|| Ok(nix::unistd::read(&told, &mut errno)?)).map_err(fail("read"))?;
    if got == 0 {
        return Ok(Child { process });
    }
    process.wait().map_err(fail("waitid"))?;
    Err(fail("exec")(io::Error::from_raw_os_error(
        i32::from_ne_bytes(errno),
    )))
}

/// Ends a child that cannot be watched: left alone it would run beside the one that is started in its place.
///
/// The number is still its own: nobody else reaps it.
fn end(pid: libc::pid_t) {
    // SAFETY: kill(2) takes two numbers.
    unsafe { libc::kill(pid, libc::SIGKILL) };
    // Waits for what has just been killed; how it ended is of no interest.
    drop(retry(|| {
        // SAFETY: waitpid(2) with a null status touches no memory of ours.
        check(unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) })
    }));
}

/// All that the child needs, ready made.
struct Plan {
    program: RawFd,
    _texts: Vec<CString>,
    arguments: Vec<*const libc::c_char>,
    environment: Vec<*const libc::c_char>,
    descriptors: Vec<(RawFd, RawFd)>,
    above: RawFd,
    new_session: bool,
}

impl Plan {
    fn new(launch: &Launch<'_>) -> io::Result<Self> {
        let bad = launch.descriptors.iter().any(|(_, to)| *to < 3);
        if bad || launch.descriptors.len() > DESCRIPTORS_MAX || launch.arguments.is_empty() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut texts = Vec::new();
        let mut pointers = |from: &[&OsStr]| -> io::Result<Vec<*const libc::c_char>> {
            let mut out = Vec::with_capacity(from.len() + 1);
            for text in from {
                let text = CString::new(text.as_bytes())?;
                // The bytes stay where they are when the CString moves.
                out.push(text.as_ptr());
                texts.push(text);
            }
            out.push(std::ptr::null());
            Ok(out)
        };
        let arguments = pointers(launch.arguments)?;
        let environment = pointers(launch.environment)?;
        let descriptors: Vec<_> = launch
            .descriptors
            .iter()
            .map(|(fd, to)| (fd.as_raw_fd(), *to))
            .collect();
        let above = descriptors.iter().map(|(_, to)| *to).max().unwrap_or(2) + 1;
        Ok(Self {
            program: launch.program.file.as_raw_fd(),
            _texts: texts,
            arguments,
            environment,
            descriptors,
            above,
            new_session: launch.new_session,
        })
    }

    /// The child's part. Never returns.
    fn run(&self, tells: RawFd) -> ! {
        // Moved first: a descriptor put to its number must not land on the pipe.
        let error = match move_above(tells, self.above) {
            Ok(told) => self
                .exec()
                .map_or_else(|e| (told, e), |never| match never {}),
            Err(e) => (tells, e),
        };
        let (told, error) = error;
        let bytes = error.raw_os_error().unwrap_or(libc::EIO).to_ne_bytes();
        // SAFETY: `bytes` is readable for the length of the call.
        unsafe { libc::write(told, bytes.as_ptr().cast(), bytes.len()) };
        // SAFETY: _exit(2) ends this process without running anything of ours.
        unsafe { libc::_exit(127) }
    }

    /// Becomes the program; returns only what stopped it.
    fn exec(&self) -> io::Result<std::convert::Infallible> {
        if self.new_session {
            // SAFETY: setsid(2) takes nothing.
            unsafe { libc::setsid() };
        }
        unblock_signals()?;
        // SAFETY: marks descriptors close-on-exec; touches no memory. Kernels before 5.11 refuse: then what was
        // opened without the mark is inherited, and nothing here opens without it.
        unsafe {
            libc::syscall(
                libc::SYS_close_range,
                3,
                u32::MAX,
                libc::CLOSE_RANGE_CLOEXEC,
            )
        };
        let program = move_above(self.program, self.above)?;
        let mut moved = [-1; DESCRIPTORS_MAX];
        for (place, (from, _)) in moved.iter_mut().zip(&self.descriptors) {
            *place = move_above(*from, self.above)?;
        }
        for (from, (_, to)) in moved.iter().zip(&self.descriptors) {
            // SAFETY: dup2(2) on numbers; what stood at `to` is a close-on-exec copy of the parent's.
            check(unsafe { libc::dup2(*from, *to) })?;
        }
        // SAFETY: the arrays end with null and point to strings that live; on success nothing of ours runs on.
        unsafe {
            libc::syscall(
                libc::SYS_execveat,
                program,
                c"".as_ptr(),
                self.arguments.as_ptr(),
                self.environment.as_ptr(),
                libc::AT_EMPTY_PATH,
            )
        };
        Err(io::Error::last_os_error())
    }
}

fn move_above(fd: RawFd, above: RawFd) -> io::Result<RawFd> {
    // SAFETY: fcntl(2) on a number; touches no memory.
    check(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, above) })
}

fn unblock_signals() -> io::Result<()> {
    // SAFETY: sigset_t is plain numbers; all zero is a value of it, and the empty set.
    let empty: libc::sigset_t = unsafe { std::mem::zeroed() };
    let old = std::ptr::null_mut();
    // SAFETY: `empty` is readable; the old mask is not asked for.
    check(unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const empty, old) }).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memfd::Memfd;
    use crate::process::Exit;

    fn os(text: &str) -> &OsStr {
        OsStr::new(text)
    }

    fn shell(script: &str, descriptors: &[(BorrowedFd<'_>, RawFd)]) -> Exit {
        let program = Program::copy_of(Path::new("/bin/sh")).unwrap();
        let arguments = [os("@sh"), os("-c"), os(script)];
        let environment = [os("PATH=/usr/bin:/bin"), os("TIDE=high")];
        let launch_it = Launch {
            program: &program,
            arguments: &arguments,
            environment: &environment,
            descriptors,
            new_session: true,
        };
        launch(&launch_it).unwrap().process.wait().unwrap()
    }

    /// P7: a program runs from memory, with its argv[0] and environment.
    #[test]
    fn from_memory_with_its_name() {
        let program = Program::copy_of(Path::new("/bin/sh")).unwrap();
        assert!(
            program.is_in_memory(),
            "vm.memfd_noexec is not 2 on test machines"
        );
        drop(program.lock().unwrap());
        assert_eq!(
            shell("test \"$0$TIDE\" = @shhigh && exit 9", &[]),
            Exit::Code(9)
        );
        assert_eq!(
            shell("readlink /proc/$$/exe | grep -q memfd && exit 4", &[]),
            Exit::Code(4)
        );
    }

    #[test]
    fn descriptors_arrive_at_their_numbers_and_no_others() {
        let (a, b) = (
            Memfd::create("a", 1).unwrap(),
            Memfd::create("b", 1).unwrap(),
        );
        a.write_at(0, b"A").unwrap();
        b.write_at(0, b"B").unwrap();
        // Crossed on purpose: each wants a low number that may be the other's.
        let (to_a, to_b) = (b.as_fd().as_raw_fd().max(3), a.as_fd().as_raw_fd().max(3));
        let script = format!(
            "test \"$(cat <&{to_a})$(cat <&{to_b})\" = AB && test $(ls /proc/$$/fd | wc -l) -le 6 && exit 3"
        );
        assert_eq!(
            shell(&script, &[(a.as_fd(), to_a), (b.as_fd(), to_b)]),
            Exit::Code(3)
        );
    }

    #[test]
    fn what_cannot_be_executed_is_an_error() {
        let program = Program::copy_of(Path::new("/etc/passwd")).unwrap();
        let arguments = [os("x")];
        let launch_it = Launch {
            program: &program,
            arguments: &arguments,
            environment: &[],
            descriptors: &[],
            new_session: false,
        };
        let refused = launch(&launch_it).unwrap_err();
        assert_eq!(
            refused.errno(),
            Some(crate::Errno(libc::ENOEXEC)),
            "{refused}"
        );
    }

    /// A child without a descriptor is not left running beside its replacement.
    #[test]
    fn a_child_that_cannot_be_watched_is_ended_and_reaped() {
        // Without an end of its own: it reads from a pipe that stays open.
        let mut child = std::process::Command::new("/bin/cat")
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let open = child.stdin.take();
        end(libc::pid_t::try_from(child.id()).unwrap());
        let reaped = child.wait().unwrap_err();
        assert_eq!(reaped.raw_os_error(), Some(libc::ECHILD), "{reaped}");
        drop(open);
    }

    #[test]
    fn signals_blocked_here_are_not_blocked_there() {
        let ended = std::thread::spawn(|| {
            crate::process::block_signals(&[crate::event::Signals::Terminate]).unwrap();
            shell("kill -TERM $$; exit 5", &[])
        });
        assert_eq!(ended.join().unwrap(), Exit::Signal(libc::SIGTERM));
    }
}
