//! Files and folders: durable creation, direct transfers, holes, facts of the file system.
//!
//! rename(2) is not used: it replaces. A file comes to exist complete and durable, or not at all.

use crate::Result;
use crate::buffer::AlignedBuffer;
use crate::error::{Errno, SysError, retry};
use crate::ring::Zeroing;
use nix::fcntl::{AT_FDCWD, AtFlags, FallocateFlags, OFlag, fallocate, open};
use nix::sys::stat::Mode;
use nix::unistd::{LinkatFlags, Whence, lseek64};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// `O_NOFOLLOW`, for `OpenOptions::custom_flags`: a symlink in the last place of a path is refused.
pub const NO_FOLLOW: i32 = libc::O_NOFOLLOW;

/// What came of a creation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Created {
    /// It is there, whole, and stays after a power cut.
    Made,
    /// Something of that name was there; it is untouched.
    Existed,
}

/// A file that is being written and has no name yet; dropped without [`Unnamed::publish`], it is gone.
#[derive(Debug)]
pub struct Unnamed {
    file: std::fs::File,
    folder: PathBuf,
    /// Where the file system has no `O_TMPFILE`: the name it bears meanwhile.
    temporary: Option<PathBuf>,
}

impl Unnamed {
    /// A new file in `folder`, mode `mode`; `direct`: opened `O_DIRECT` (left out where the file system has none).
    pub fn create(folder: &Path, mode: u32, direct: bool) -> Result<Self> {
        let base = libc::O_TMPFILE | if direct { libc::O_DIRECT } else { 0 };
        let named = |flags| {
            std::fs::OpenOptions::new()
                .read(true)
                .write(true)
                .mode(mode)
                .custom_flags(flags)
                .open(folder)
        };
        let opened = match named(base) {
            Err(e) if direct && Errno::of(&e) == Errno::INVAL => named(libc::O_TMPFILE),
            other => other,
        };
        match opened {
            Ok(file) => Ok(Self {
                file,
                folder: folder.to_owned(),
                temporary: None,
            }),
            Err(e)
                if matches!(
                    Errno::of(&e),
                    Errno::OPNOTSUPP | Errno::INVAL | Errno(libc::EISDIR)
                ) =>
            {
                Self::create_named(folder, mode)
            }
            Err(e) => Err(SysError::call("open O_TMPFILE", folder, e)),
        }
    }

    fn create_named(folder: &Path, mode: u32) -> Result<Self> {
        use blktide_types::clock::Random;
        let id = blktide_types::id::SessionId(crate::clock::SystemRandom::new().id());
        let path = folder.join(format!(".tmp-{id}"));
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&path)
            .map_err(|e| SysError::call("create", &path, e))?;
        Ok(Self {
            file,
            folder: folder.to_owned(),
            temporary: Some(path),
        })
    }

    /// The file, to write to.
    pub const fn file(&self) -> &std::fs::File {
        &self.file
    }

    /// Syncs the file, gives it `name` in its folder unless something bears it, and syncs the folder.
    ///
    /// Crash: nothing of that name, or the whole file. `Existed` too is only said when the other's name is durable.
    pub fn publish(self, name: &str) -> Result<Created> {
        let folder = self.folder.clone();
        let made = self.link(name)?;
        sync_folder(&folder)?;
        Ok(made)
    }

    /// Syncs the file and gives it `name` in its folder unless something bears it. The name is durable once the folder has
    /// been synced, which is left to the caller.
    pub fn link(self, name: &str) -> Result<Created> {
        let path = self.folder.join(name);
        self.file
            .sync_all()
            .map_err(|e| SysError::call("fsync", &path, e))?;
        let linked = match &self.temporary {
            None => link_unnamed(&self.file, &path),
            Some(temporary) => std::fs::hard_link(temporary, &path),
        };
        match linked {
            Ok(()) => Ok(Created::Made),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(Created::Existed),
            Err(e) => Err(SysError::call("linkat", path, e)),
        }
    }
}

impl Drop for Unnamed {
    fn drop(&mut self) {
        if let Some(path) = &self.temporary {
            // What stays behind after an error is a hidden file that nobody reads.
            drop(std::fs::remove_file(path));
        }
    }
}

fn link_unnamed(file: &std::fs::File, to: &Path) -> io::Result<()> {
    let empty = nix::unistd::linkat(
        file,
        "",
        AT_FDCWD,
        to,
        LinkatFlags::from_bits_retain(libc::AT_EMPTY_PATH),
    );
    match empty {
        // Without CAP_DAC_READ_SEARCH the kernel wants the way through /proc.
        Err(nix::Error::ENOENT | nix::Error::EPERM) => {
            let from = format!("/proc/self/fd/{}", file.as_raw_fd());
            let flags = AtFlags::AT_SYMLINK_FOLLOW;
            Ok(nix::unistd::linkat(
                AT_FDCWD,
                from.as_str(),
                AT_FDCWD,
                to,
                flags,
            )?)
        }
        other => Ok(other?),
    }
}

/// Makes `path` a new file that holds `bytes`, whole and durable, unless something of that name exists.
///
/// Waits: two flushes.
pub fn create_if_absent(path: &Path, bytes: &[u8], mode: u32) -> Result<Created> {
    let (folder, name) = split(path)?;
    let unnamed = Unnamed::create(folder, mode, false)?;
    unnamed
        .file()
        .write_all_at(bytes, 0)
        .map_err(|e| SysError::call("write", path, e))?;
    unnamed.publish(name)
}

/// Overwrites the beginning of an existing file in place and syncs it. Its length stays.
///
/// Crash: old bytes and new ones, mixed by sectors.
pub fn overwrite_in_place(path: &Path, bytes: &[u8]) -> Result<()> {
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(path)
        .map_err(|e| SysError::call("open", path, e))?;
    file.write_all_at(bytes, 0)
        .map_err(|e| SysError::call("write", path, e))?;
    file.sync_all()
        .map_err(|e| SysError::call("fsync", path, e))
}

/// Removes a file's name, durably; true if it was there.
pub fn remove_durably(path: &Path) -> Result<bool> {
    let (folder, _) = split(path)?;
    let was = match std::fs::remove_file(path) {
        Ok(()) => true,
        Err(e) if e.kind() == io::ErrorKind::NotFound => false,
        Err(e) => return Err(SysError::call("unlink", path, e)),
    };
    sync_folder(folder)?;
    Ok(was)
}

fn split(path: &Path) -> Result<(&Path, &str)> {
    let name = path.file_name().and_then(|n| n.to_str());
    let name = name.ok_or_else(|| SysError::unfit(path, "a path without a name"))?;
    let folder = path
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    Ok((folder, name))
}

/// Makes the names in `folder` stable.
pub fn sync_folder(folder: &Path) -> Result<()> {
    let opened = std::fs::File::open(folder).map_err(|e| SysError::call("open", folder, e))?;
    opened
        .sync_all()
        .map_err(|e| SysError::call("fsync", folder, e))
}

/// Makes `folder` and what is missing above it, each durable, with permission bits `mode`.
pub fn create_folders(folder: &Path, mode: u32) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    let parent = folder
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    if folder.is_dir() {
        return Ok(());
    }
    if !parent.is_dir() {
        create_folders(parent, mode)?;
    }
    match std::fs::DirBuilder::new().mode(mode).create(folder) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
            return Err(SysError::call("mkdir", folder, e));
        }
        _ => {}
    }
    sync_folder(parent)
}

/// Opens `path` for reading, `O_DIRECT`: what the device has, not what the page cache remembers.
pub fn open_direct_read(path: &Path) -> Result<OwnedFd> {
    open_with(path, OFlag::O_RDONLY | OFlag::O_DIRECT)
}

/// Opens `path` for reading and writing, `O_DIRECT`, without a claim (see `fence` for the tracker's own).
pub fn open_direct_write(path: &Path) -> Result<OwnedFd> {
    open_with(path, OFlag::O_RDWR | OFlag::O_DIRECT)
}

/// Notes the place that `path` leads to (`O_PATH`): neither read nor written through, it finds the same file or device again
/// by `/proc/self/fd/N`, whatever the path leads to then.
pub fn open_place(path: &Path) -> Result<OwnedFd> {
    open_with(path, OFlag::O_PATH)
}

/// Opens `path` for reading, through the page cache.
pub fn open_read(path: &Path) -> Result<OwnedFd> {
    open_with(path, OFlag::O_RDONLY)
}

fn open_with(path: &Path, flags: OFlag) -> Result<OwnedFd> {
    open(path, flags | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(|e| SysError::call("open", path, e.into()))
}

/// Reads into all of `out` from `offset` on; fewer bytes only at the end of the file. Says how many.
pub fn read_full(fd: &impl AsFd, offset: u64, out: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while let Some(rest) = out.get_mut(done..).filter(|r| !r.is_empty()) {
        let at = signed(offset)?.checked_add(i64::try_from(done).map_err(io::Error::other)?);
        let at = at.ok_or(io::ErrorKind::InvalidInput)?;
        match retry(|| Ok(nix::sys::uio::pread(fd, rest, at)?))? {
            0 => break,
            n => done += n,
        }
    }
    Ok(done)
}

/// Writes all of `bytes` at `offset`.
pub fn write_full(fd: &impl AsFd, offset: u64, bytes: &[u8]) -> io::Result<()> {
    let mut done = 0;
    while let Some(rest) = bytes.get(done..).filter(|r| !r.is_empty()) {
        let at = signed(offset)?.checked_add(i64::try_from(done).map_err(io::Error::other)?);
        let at = at.ok_or(io::ErrorKind::InvalidInput)?;
        match retry(|| Ok(nix::sys::uio::pwrite(fd, rest, at)?))? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            n => done += n,
        }
    }
    Ok(())
}

/// Like [`read_full`], into a new aligned buffer of `len` bytes (zero where the file ends).
pub fn read_aligned(fd: &impl AsFd, offset: u64, len: usize) -> io::Result<AlignedBuffer> {
    let mut buffer = AlignedBuffer::new(len);
    read_full(fd, offset, &mut buffer)?;
    Ok(buffer)
}

/// Data of the file to stable storage, with the size, without the times.
pub fn sync_data(fd: &impl AsFd) -> io::Result<()> {
    retry(|| Ok(nix::unistd::fdatasync(fd)?))
}

/// Everything that the file system of `fd` has in memory to its device.
pub fn sync_file_system(fd: &impl AsFd) -> io::Result<()> {
    // SAFETY: syncfs(2) touches no memory of ours.
    crate::error::check(unsafe { libc::syncfs(fd.as_fd().as_raw_fd()) }).map(|_| ())
}

/// Takes the space of a range, so that writing it cannot fail for lack of space. Grows the file if need be.
pub fn preallocate(fd: &impl AsFd, offset: u64, len: u64) -> io::Result<()> {
    fallocate_with(fd, FallocateFlags::empty(), (offset, len))
}

/// Makes a range read as zero; the size stays. `EOPNOTSUPP` where the file system or device cannot.
pub fn zero_range(fd: &impl AsFd, mode: Zeroing, offset: u64, len: u64) -> io::Result<()> {
    fallocate_with(
        fd,
        FallocateFlags::from_bits_retain(mode.flags()),
        (offset, len),
    )
}

fn fallocate_with(fd: &impl AsFd, flags: FallocateFlags, range: (u64, u64)) -> io::Result<()> {
    let (offset, len) = (signed(range.0)?, signed(range.1)?);
    retry(|| Ok(fallocate(fd, flags, offset, len)?))
}

/// The next range at or after `offset` that holds data, as far as the file system knows; `None`: only a hole follows.
pub fn next_data(fd: &impl AsFd, offset: u64) -> io::Result<Option<(u64, u64)>> {
    let start = match lseek64(fd, signed(offset)?, Whence::SeekData) {
        Err(nix::Error::ENXIO) => return Ok(None),
        other => other?,
    };
    let end = lseek64(fd, start, Whence::SeekHole)?;
    let unsigned = |v: i64| u64::try_from(v).map_err(io::Error::other);
    Ok(Some((unsigned(start)?, unsigned(end)?)))
}

/// Kinds of file systems that matter to the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileSystemKind {
    /// ext2, ext3, ext4.
    Ext,
    /// XFS.
    Xfs,
    /// btrfs.
    Btrfs,
    /// tmpfs: gone with the machine.
    Tmpfs,
    /// NFS.
    Nfs,
    /// SMB/CIFS.
    Smb,
    /// FUSE of any sort.
    Fuse,
    /// Another one, by its number (statfs(2)).
    Other(i64),
}

impl FileSystemKind {
    /// Whether its locks are held elsewhere, so that they end with the process (no fence).
    pub const fn is_remote(self) -> bool {
        match self {
            Self::Nfs | Self::Smb | Self::Fuse => true,
            Self::Other(number) => matches!(number, CEPH | V9FS | AFS | GFS2 | OCFS2),
            Self::Ext | Self::Xfs | Self::Btrfs | Self::Tmpfs => false,
        }
    }
}

const CEPH: i64 = 0x00c3_6400;
const V9FS: i64 = 0x0102_1997;
const AFS: i64 = 0x5346_414f;
const GFS2: i64 = 0x0116_1970;
const OCFS2: i64 = 0x7461_636f;

/// The kind of file system that `path` lies on.
pub fn kind_of(path: &Path) -> Result<FileSystemKind> {
    let found =
        nix::sys::statfs::statfs(path).map_err(|e| SysError::call("statfs", path, e.into()))?;
    #[expect(
        clippy::useless_conversion,
        reason = "the type differs between architectures"
    )]
    let number = i64::from(found.filesystem_type().0);
    Ok(match number {
        0xef53 => FileSystemKind::Ext,
        0x5846_5342 => FileSystemKind::Xfs,
        0x9123_683e => FileSystemKind::Btrfs,
        0x0102_1994 => FileSystemKind::Tmpfs,
        0x6969 => FileSystemKind::Nfs,
        0x517b | 0xff53_4d42 | 0xfe53_4d42 => FileSystemKind::Smb,
        0x6573_5546 => FileSystemKind::Fuse,
        other => FileSystemKind::Other(other),
    })
}

/// Bytes that an ordinary user can still store where `path` lies. May wait on a hung file system.
pub fn free_bytes(path: &Path) -> Result<u64> {
    let found =
        nix::sys::statvfs::statvfs(path).map_err(|e| SysError::call("statvfs", path, e.into()))?;
    Ok(found
        .blocks_available()
        .saturating_mul(found.fragment_size()))
}

/// Bytes of the file system that `path` lies on, used and free.
pub fn total_bytes(path: &Path) -> Result<u64> {
    let found =
        nix::sys::statvfs::statvfs(path).map_err(|e| SysError::call("statvfs", path, e.into()))?;
    Ok(found.blocks().saturating_mul(found.fragment_size()))
}

/// Whether two paths lie on the same mounted file system.
pub fn same_file_system(a: &Path, b: &Path) -> Result<bool> {
    Ok(device_of(a)? == device_of(b)?)
}

/// The device that the file system of `path` has, as stat(2) shows it.
pub fn device_of(path: &Path) -> Result<crate::mounts::DeviceNumber> {
    use std::os::unix::fs::MetadataExt;
    let found = std::fs::metadata(path).map_err(|e| SysError::call("stat", path, e))?;
    Ok(crate::mounts::DeviceNumber::from_raw(found.dev()))
}

/// Size in bytes of an open file or block device.
pub fn size_of(fd: &impl AsFd) -> io::Result<u64> {
    let end = lseek64(fd, 0, Whence::SeekEnd)?;
    u64::try_from(end).map_err(io::Error::other)
}

/// Whether `fd` was opened `O_DIRECT`.
pub fn is_direct(fd: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(crate::memfd::descriptor_flags(fd)? & libc::O_DIRECT != 0)
}

fn signed(value: u64) -> io::Result<i64> {
    i64::try_from(value).map_err(io::Error::other)
}

#[cfg(test)]
mod tests;
