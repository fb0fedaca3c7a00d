//! Loop devices with direct I/O: what makes a block device of the file that FUSE serves.
//!
//! Invariant: a device made here has its direct-I/O flag set, or is not handed out: without it the page cache
//! would hold writes that nobody has marked.

use crate::Result;
use crate::blockdev::BlockDevice;
use crate::error::{Errno, SysError, check};
use crate::mounts::DeviceNumber;
use blktide_types::clock::{Clock, Instant};
use nix::fcntl::{OFlag, open};
use nix::sys::stat::{Mode, SFlag};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

const LOOP_CLR_FD: libc::c_ulong = 0x4c01;
const LOOP_GET_STATUS64: libc::c_ulong = 0x4c05;
const LOOP_CONFIGURE: libc::c_ulong = 0x4c0a;
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4c82;
const FLAG_DIRECT_IO: u32 = 16;
const LOOP_MAJOR: u32 = 7;

#[repr(C)]
#[derive(Clone, Copy)]
struct LoopInfo64 {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo64,
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<LoopInfo64>() == 232 && size_of::<LoopConfig>() == 304);

impl LoopInfo64 {
    const EMPTY: Self = Self {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        size_limit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: 0,
        file_name: [0; 64],
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
}

/// What a loop device is bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Binding {
    /// The file system of its file (packed device number) and the file's inode.
    pub file: (u64, u64),
    /// Whether transfers pass the page cache by.
    pub direct: bool,
}

impl Binding {
    /// The device number of its file's file system.
    pub fn file_system(&self) -> DeviceNumber {
        DeviceNumber::from_raw(self.file.0)
    }
}

/// How a loop device is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoopOptions<'a> {
    /// Bytes of its sector.
    pub sector_bytes: u32,
    /// Name shown by losetup(8), at most 63 bytes.
    pub name: &'a str,
    /// Requests it may have under way.
    pub queue_requests: u32,
    /// Bytes of its largest request.
    pub max_request_bytes: u32,
}

/// One loop device, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoopDevice {
    number: u32,
}

impl LoopDevice {
    /// Binds a free device to all of `file` with direct I/O. Makes its node where no udev does.
    ///
    /// Waits: for the file's server (the kernel asks for its size and reads its first sectors).
    /// Errors: nothing is bound.
    pub fn create(file: &impl AsFd, options: &LoopOptions<'_>) -> Result<Self> {
        for _ in 0..64 {
            let device = Self::free()?;
            let node = device.open_node()?;
            match configure(&node, file, options) {
                Ok(()) => return device.checked(options),
                // Someone else was faster to this one.
                Err(e) if Errno::of(&e) == Errno::BUSY => {}
                Err(e) => return Err(SysError::call("LOOP_CONFIGURE", device.node(), e)),
            }
        }
        Err(SysError::unfit(
            "/dev/loop-control",
            "every loop device was taken at once",
        ))
    }

    fn checked(self, options: &LoopOptions<'_>) -> Result<Self> {
        let set_up = self.binding().and_then(|bound| match bound {
            Some(Binding { direct: true, .. }) => self.set_limits(options),
            _ => Err(SysError::unfit(self.node(), "no direct I/O on this file")),
        });
        if let Err(e) = set_up {
            self.clear()?;
            return Err(e);
        }
        Ok(self)
    }

    fn free() -> Result<Self> {
        let path = "/dev/loop-control";
        let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC;
        let control =
            open(path, flags, Mode::empty()).map_err(|e| SysError::call("open", path, e.into()))?;
        let number = ioctl_number(&control, LOOP_CTL_GET_FREE, 0)
            .map_err(|e| SysError::call("LOOP_CTL_GET_FREE", path, e))?;
        let number = u32::try_from(number)
            .map_err(|e| SysError::call("LOOP_CTL_GET_FREE", path, io::Error::other(e)))?;
        Ok(Self { number })
    }

    /// The device of this number, bound or not.
    pub const fn of_number(number: u32) -> Self {
        Self { number }
    }

    /// The device whose node stands at `path`.
    pub fn at(path: &Path) -> Result<Self> {
        let found = BlockDevice::at(path)?.number();
        if found.major != LOOP_MAJOR {
            return Err(SysError::unfit(path, "not a loop device"));
        }
        Ok(Self {
            number: found.minor,
        })
    }

    /// Its number.
    pub const fn number(&self) -> u32 {
        self.number
    }

    /// Its device number.
    pub const fn device_number(&self) -> DeviceNumber {
        DeviceNumber {
            major: LOOP_MAJOR,
            minor: self.number,
        }
    }

    /// Its node.
    pub fn node(&self) -> PathBuf {
        PathBuf::from(format!("/dev/loop{}", self.number))
    }

    /// It as a block device.
    pub fn block_device(&self) -> Result<BlockDevice> {
        BlockDevice::of_number(self.device_number())
    }

    /// What it is bound to; `None` if to nothing.
    pub fn binding(&self) -> Result<Option<Binding>> {
        let path = self.node();
        let node = match open(&path, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()) {
            Ok(node) => node,
            Err(nix::Error::ENXIO | nix::Error::ENOENT | nix::Error::ENODEV) => return Ok(None),
            Err(e) => return Err(SysError::call("open", path, e.into())),
        };
        let mut info = LoopInfo64::EMPTY;
        let request = request(LOOP_GET_STATUS64).map_err(|e| SysError::call("ioctl", &path, e))?;
        // SAFETY: the request writes one LoopInfo64, which is writable for the length of the call.
        let asked = check(unsafe { libc::ioctl(node.as_raw_fd(), request, &raw mut info) });
        match asked {
            Ok(_) => {}
            Err(e) if Errno::of(&e) == Errno::NXIO => return Ok(None),
            Err(e) => return Err(SysError::call("LOOP_GET_STATUS64", path, e)),
        }
        Ok(Some(Binding {
            file: (info.device, info.inode),
            direct: info.flags & FLAG_DIRECT_IO != 0,
        }))
    }

    /// Unbinds it. If somebody has it open it goes with that opener, and not before: see [`Self::wait_unbound`].
    pub fn clear(&self) -> Result<()> {
        let node = self.open_node()?;
        match ioctl_number(&node, LOOP_CLR_FD, 0) {
            Ok(_) => Ok(()),
            Err(e) if Errno::of(&e) == Errno::NXIO => Ok(()),
            Err(e) => Err(SysError::call("LOOP_CLR_FD", self.node(), e)),
        }
    }

    /// Waits until it is bound to nothing, or `deadline` is past: true if it is unbound.
    pub fn wait_unbound(&self, clock: &dyn Clock, deadline: Instant) -> Result<bool> {
        loop {
            if !self.is_bound() {
                return Ok(true);
            }
            if clock.now() >= deadline {
                return Ok(false);
            }
            crate::event::pause(Duration::from_millis(2))
                .map_err(|e| SysError::call("poll", self.node(), e))?;
        }
    }

    /// Whether it is bound, by sysfs: opens nothing (an open would keep it).
    pub fn is_bound(&self) -> bool {
        Path::new(&format!("/sys/block/loop{}/loop/backing_file", self.number)).exists()
    }

    /// Requests and their size. The kernel rounds; a kernel that refuses is an error.
    fn set_limits(self, options: &LoopOptions<'_>) -> Result<()> {
        let queue = PathBuf::from(format!("/sys/block/loop{}/queue", self.number));
        let kib = (options.max_request_bytes / 1024).max(4);
        write_text(&queue.join("max_sectors_kb"), &kib.to_string())?;
        write_text(
            &queue.join("nr_requests"),
            &options.queue_requests.to_string(),
        )
    }

    fn open_node(self) -> Result<OwnedFd> {
        let path = self.node();
        let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC;
        let opened = match open(&path, flags, Mode::empty()) {
            Err(nix::Error::ENOENT) => {
                self.make_node(&path)?;
                open(&path, flags, Mode::empty())
            }
            other => other,
        };
        opened.map_err(|e| SysError::call("open", path, e.into()))
    }

    fn make_node(self, path: &Path) -> Result<()> {
        let number = nix::sys::stat::makedev(u64::from(LOOP_MAJOR), u64::from(self.number));
        let mode = Mode::from_bits_truncate(0o660);
        match nix::sys::stat::mknod(path, SFlag::S_IFBLK, mode, number) {
            Ok(()) | Err(nix::Error::EEXIST) => Ok(()),
            Err(e) => Err(SysError::call("mknod", path, e.into())),
        }
    }
}

fn configure(node: &OwnedFd, file: &impl AsFd, options: &LoopOptions<'_>) -> io::Result<()> {
    let mut info = LoopInfo64 {
        flags: FLAG_DIRECT_IO,
        ..LoopInfo64::EMPTY
    };
    for (to, from) in info.file_name.iter_mut().take(63).zip(options.name.bytes()) {
        *to = from;
    }
    let config = LoopConfig {
        fd: u32::try_from(file.as_fd().as_raw_fd()).map_err(io::Error::other)?,
        block_size: options.sector_bytes,
        info,
        reserved: [0; 8],
    };
    let request = request(LOOP_CONFIGURE)?;
    // SAFETY: the request reads one LoopConfig, which lives for the length of the call.
    check(unsafe { libc::ioctl(node.as_raw_fd(), request, &raw const config) }).map(|_| ())
}

fn ioctl_number(fd: &OwnedFd, number: libc::c_ulong, argument: libc::c_ulong) -> io::Result<i32> {
    let request = request(number)?;
    // SAFETY: used for requests that take a number, and touch no memory.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), request, argument) })
}

#[expect(
    clippy::useless_conversion,
    reason = "the type differs between C libraries"
)]
fn request(number: libc::c_ulong) -> io::Result<libc::Ioctl> {
    number.try_into().map_err(io::Error::other)
}

fn write_text(path: &Path, text: &str) -> Result<()> {
    let fail = |e| SysError::call("write", path, e);
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .open(path)
        .map_err(fail)?;
    io::Write::write_all(&mut file, text.as_bytes()).map_err(fail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_that_no_device_has_is_bound_to_nothing() {
        let device = LoopDevice::of_number(99_999);
        assert!(!device.is_bound());
        assert_eq!(device.binding().unwrap(), None);
        assert_eq!(device.node(), Path::new("/dev/loop99999"));
    }
}
