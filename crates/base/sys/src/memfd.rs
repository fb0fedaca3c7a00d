//! Memory that is a descriptor: shared between processes, gone with the last holder.
//!
//! Invariant: a [`Memfd`] cannot shrink or grow (sealed), so a mapping of it cannot lose its pages.

use crate::Result;
use crate::error::{SysError, check, retry};
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// A sealed memory file of fixed size.
#[derive(Debug)]
pub struct Memfd {
    fd: OwnedFd,
    bytes: u64,
}

/// A file in memory that grows as it is written, for what has no better place. It may be swapped out.
pub fn growing(name: &str) -> Result<std::fs::File> {
    memory_file(name).map(std::fs::File::from)
}

fn memory_file(name: &str) -> Result<OwnedFd> {
    let error = |e: io::Error| SysError::call("memfd_create", name, e);
    let c_name = CString::new(name).map_err(|e| error(e.into()))?;
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    // MFD_NOEXEC_SEAL (6.3) says that this is not a program; older kernels do not know it.
    let no_exec = MFdFlags::from_bits_retain(MFD_NOEXEC_SEAL);
    memfd_create(c_name.as_c_str(), flags | no_exec)
        .or_else(|_| memfd_create(c_name.as_c_str(), flags))
        .map_err(|e| error(e.into()))
}

impl Memfd {
    /// `bytes` zero bytes, named `name` in /proc only, mode 0600, of fixed size for ever.
    ///
    /// Takes no memory until touched (see [`Self::allocate`]).
    pub fn create(name: &str, bytes: u64) -> Result<Self> {
        let error = |call: &'static str, e: io::Error| SysError::call(call, name, e);
        let fd = memory_file(name)?;
        let size = i64::try_from(bytes).map_err(|e| error("ftruncate", io::Error::other(e)))?;
        nix::sys::stat::fchmod(&fd, nix::sys::stat::Mode::from_bits_truncate(0o600))
            .map_err(|e| error("fchmod", e.into()))?;
        nix::unistd::ftruncate(&fd, size).map_err(|e| error("ftruncate", e.into()))?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
        fcntl(&fd, FcntlArg::F_ADD_SEALS(seals)).map_err(|e| error("F_ADD_SEALS", e.into()))?;
        Ok(Self { fd, bytes })
    }

    /// The memory file behind a descriptor that was inherited or received.
    ///
    /// Refused unless it is one that cannot shrink: else its owner could make our mapping fault.
    pub fn from_fd(fd: OwnedFd) -> Result<Self> {
        let seals = fcntl(&fd, FcntlArg::F_GET_SEALS)
            .map_err(|e| SysError::call("F_GET_SEALS", "memfd", e.into()))?;
        if !SealFlag::from_bits_truncate(seals).contains(SealFlag::F_SEAL_SHRINK) {
            return Err(SysError::unfit(
                "memfd",
                "it could be made shorter while mapped",
            ));
        }
        let stat =
            nix::sys::stat::fstat(&fd).map_err(|e| SysError::call("fstat", "memfd", e.into()))?;
        let bytes = u64::try_from(stat.st_size)
            .map_err(|e| SysError::call("fstat", "memfd", io::Error::other(e)))?;
        Ok(Self { fd, bytes })
    }

    /// Size in bytes.
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Another descriptor of the same memory that can only be read and mapped read-only.
    pub fn reopen_read_only(&self) -> Result<OwnedFd> {
        let path = format!("/proc/self/fd/{}", self.fd.as_raw_fd());
        nix::fcntl::open(
            path.as_str(),
            nix::fcntl::OFlag::O_RDONLY | nix::fcntl::OFlag::O_CLOEXEC,
            nix::sys::stat::Mode::empty(),
        )
        .map_err(|e| SysError::call("open", path, e.into()))
    }

    /// Another handle of the same memory, through the same open file description.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            fd: self.fd.try_clone()?,
            bytes: self.bytes,
        })
    }

    /// Takes the memory of a range now, so that touching it later cannot fail.
    pub fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        self.fallocate(FallocateFlags::empty(), offset, len)
    }

    /// Gives the memory of a range back; it reads as zero afterwards, in every mapping.
    pub fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        self.fallocate(flags, offset, len)
    }

    fn fallocate(&self, flags: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        let (offset, len) = (signed(offset)?, signed(len)?);
        retry(|| Ok(fallocate(&self.fd, flags, offset, len)?))
    }

    /// Copies bytes out by read(2): defined also while others write. Fewer at the end of the memory.
    pub fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<usize> {
        read_at(self.fd.as_fd(), offset, out)
    }

    /// Copies bytes in by write(2).
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        let offset = signed(offset)?;
        retry(|| Ok(nix::sys::uio::pwrite(&self.fd, bytes, offset)?))
    }

    /// The descriptor, to hand on.
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }
}

/// Copies bytes of a received read-only memory descriptor out by read(2).
pub fn read_at(fd: BorrowedFd<'_>, offset: u64, out: &mut [u8]) -> io::Result<usize> {
    let offset = signed(offset)?;
    retry(|| Ok(nix::sys::uio::pread(fd, out, offset)?))
}

impl AsFd for Memfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

const MFD_NOEXEC_SEAL: libc::c_uint = 0x8;

fn signed(value: u64) -> io::Result<i64> {
    i64::try_from(value).map_err(io::Error::other)
}

/// What is mapped in this process is not touched by this; see `mapping`.
pub(crate) fn descriptor_flags(fd: BorrowedFd<'_>) -> io::Result<i32> {
    // SAFETY: F_GETFL takes no argument and changes nothing.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fixed_in_size_and_shared() {
        let memory = Memfd::create("blktide-test", 8192).unwrap();
        nix::unistd::ftruncate(&memory.fd, 4096).unwrap_err();
        nix::unistd::ftruncate(&memory.fd, 16384).unwrap_err();
        assert_eq!(memory.write_at(4000, &[9; 200]).unwrap(), 200);
        let other = Memfd::from_fd(memory.try_clone().unwrap().into_fd()).unwrap();
        let mut out = [0; 200];
        assert_eq!(other.read_at(4000, &mut out).unwrap(), 200);
        assert_eq!(out, [9; 200]);
        other.punch(0, 4096).unwrap();
        memory.read_at(4000, &mut out).unwrap();
        assert_eq!((out[0], out[95], out[96]), (0, 0, 9));
    }

    #[test]
    fn read_only_is_read_only() {
        let memory = Memfd::create("blktide-test", 4096).unwrap();
        let fd = memory.reopen_read_only().unwrap();
        nix::sys::uio::pwrite(&fd, &[1], 0).unwrap_err();
        let flags = descriptor_flags(fd.as_fd()).unwrap();
        assert_eq!(flags & libc::O_ACCMODE, libc::O_RDONLY);
    }

    #[test]
    fn an_ordinary_file_is_refused() {
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        Memfd::from_fd(file.into()).unwrap_err();
    }
}
