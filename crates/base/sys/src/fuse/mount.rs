//! Mounting and unmounting, and the connection's switches in fusectl.

use super::FuseDevice;
use crate::Result;
use crate::error::SysError;
use crate::mounts;
use nix::mount::{MntFlags, MsFlags, umount2};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};

const FUSECTL: &str = "/sys/fs/fuse/connections";

/// Mounts the file system that `device` serves at the folder `at`. Returns at once; INIT then waits in `device`.
///
/// `name` is shown in mountinfo; it may not hold a comma.
pub fn mount(device: &FuseDevice, at: &Path, name: &str, max_read_bytes: u32) -> Result<()> {
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,max_read={max_read_bytes}",
        device.as_fd().as_raw_fd()
    );
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_NOATIME;
    nix::mount::mount(
        Some(name),
        at,
        Some("fuse.blktide"),
        flags,
        Some(options.as_str()),
    )
    .map_err(|e| SysError::call("mount", at, e.into()))
}

/// Unmounts. `EBUSY` while a file in it is open; with `lazy` it is taken out of sight at once and goes when the last
/// user does.
pub fn unmount(at: &Path, lazy: bool) -> Result<()> {
    let mut flags = MntFlags::UMOUNT_NOFOLLOW;
    flags.set(MntFlags::MNT_DETACH, lazy);
    umount2(at, flags).map_err(|e| SysError::call("umount", at, e.into()))
}

/// One connection, by the kernel's number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connection {
    folder: PathBuf,
}

impl Connection {
    /// The connection of what is mounted at `at`. Touches no file of it. Mounts fusectl if it is missing.
    pub fn of_mount(at: &Path) -> Result<Self> {
        let found =
            mounts::at(at)?.ok_or_else(|| SysError::unfit(at, "nothing is mounted there"))?;
        if !found.kind.starts_with("fuse") {
            return Err(SysError::unfit(at, "it is not a FUSE mount"));
        }
        let folder = Path::new(FUSECTL).join(found.device.minor.to_string());
        if !folder.exists() {
            let none: Option<&str> = None;
            nix::mount::mount(
                Some("fusectl"),
                FUSECTL,
                Some("fusectl"),
                MsFlags::empty(),
                none,
            )
            .map_err(|e| SysError::call("mount", FUSECTL, e.into()))?;
        }
        Ok(Self { folder })
    }

    /// Requests that wait for an answer.
    pub fn waiting(&self) -> Result<u64> {
        let path = self.folder.join("waiting");
        let text = std::fs::read_to_string(&path).map_err(|e| SysError::call("read", &path, e))?;
        text.trim()
            .parse()
            .map_err(|e| SysError::call("read", path, std::io::Error::other(e)))
    }

    /// Ends the connection for good: every request fails with EIO, now and later. For giving up only.
    pub fn abort(&self) -> Result<()> {
        let path = self.folder.join("abort");
        let fail = |e| SysError::call("write", &path, e);
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .open(&path)
            .map_err(fail)?;
        std::io::Write::write_all(&mut file, b"1").map_err(fail)
    }
}

/// The longest time in seconds that an administrator allows a FUSE request; 0 = no limit.
///
/// Anything but 0 makes the kernel abort a connection whose server is slow: warn.
pub fn max_request_timeout_seconds() -> u64 {
    std::fs::read_to_string("/proc/sys/fs/fuse/max_request_timeout")
        .ok()
        .and_then(|t| t.trim().parse().ok())
        .unwrap_or(0)
}
