//! The targets of a restore: a new file, a file that existed, a block device.
//!
//! Written past the page cache where that is possible (three times as fast, and no cache is taken from the server); what is not
//! aligned for that (a file's short last block) goes through the cache.
//!
//! ```text
//!   Claimed (open, claimed, nothing changed) ──ready──▶ FileTarget (sized; written to)
//! ```
//! **Invariant**: a device is claimed exclusively by the kernel, a file by flock(2), for as long as the target is open: no tracker and
//! no other restore has it. What must be done before the first change is done between claim and `ready`.

use crate::error::JobError;
use crate::restore::{Background, ReadBack};
use crate::target::Refusal;
use blktide_sys::blockdev::direct_alignment;
use blktide_sys::buffer::AlignedBuffer;
use blktide_sys::fence::Fenced;
use blktide_sys::fs::{
    open_direct_write, read_full, sync_data, sync_folder, write_full, zero_range,
};
use blktide_sys::ring::Zeroing;
use blktide_sys::{Errno, SysError};
use blktide_types::io::{BUFFER_ALIGN, BlockWrite};
use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

/// A target that is open and claimed, and holds what it held.
#[derive(Debug)]
pub struct Claimed {
    path: PathBuf,
    opened: Opened,
}

#[derive(Debug)]
enum Opened {
    NewFile(File),
    File(File),
    Device(Fenced),
}

/// A file or device that an image is restored to.
#[derive(Debug)]
pub struct FileTarget {
    handle: Handle,
    zeroing: Zeroing,
    background: Background,
    /// The folder whose entry is new.
    folder: Option<PathBuf>,
}

#[derive(Debug)]
enum Handle {
    File {
        plain: File,
        /// Past the page cache, and what that wants offset and length to be a multiple of.
        direct: Option<(OwnedFd, u64)>,
    },
    Device(Fenced),
}

impl Claimed {
    /// A new file, empty so far.
    ///
    /// Errors: `Target`, also if something of that name exists; then nothing has changed. `Refused` if somebody was faster to lock it.
    pub fn create(path: &Path) -> Result<Self, JobError> {
        let plain = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path)
            .map_err(|source| target_error("created", source))?;
        lock(&plain)?;
        Ok(Self::of(path, Opened::NewFile(plain)))
    }

    /// A file that exists. Errors: `Refused` if somebody has locked it; `Target`. Nothing has changed.
    pub fn file(path: &Path) -> Result<Self, JobError> {
        let plain = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(|source| target_error("opened", source))?;
        lock(&plain)?;
        Ok(Self::of(path, Opened::File(plain)))
    }

    /// A block device. Errors: `Refused` if it is mounted or claimed by anything else; `Target`. Nothing has changed.
    pub fn device(path: &Path) -> Result<Self, JobError> {
        let fenced = Fenced::try_take(path)
            .map_err(|error| target_error("opened", sys_error(error)))?
            .ok_or_else(|| {
                JobError::Refused(Refusal::InUse {
                    by: "the kernel or another process".to_owned(),
                })
            })?;
        Ok(Self::of(path, Opened::Device(fenced)))
    }

    /// Makes a file `volume_bytes` long. `keep`: a file that existed is compared with, else it is emptied first, and sparse.
    ///
    /// Errors: `Target`; a file may be empty then.
    pub fn ready(self, volume_bytes: u64, keep: Background) -> Result<FileTarget, JobError> {
        let path = &self.path;
        match self.opened {
            Opened::NewFile(plain) => {
                let folder = path.parent().map(|parent| {
                    if parent.as_os_str().is_empty() {
                        Path::new(".").to_owned()
                    } else {
                        parent.to_owned()
                    }
                });
                FileTarget::of_file(path, plain, volume_bytes, Background::Zero, folder)
            }
            Opened::File(plain) => {
                if keep == Background::Zero {
                    plain
                        .set_len(0)
                        .map_err(|source| target_error("emptied", source))?;
                }
                FileTarget::of_file(path, plain, volume_bytes, keep, None)
            }
            Opened::Device(fenced) => Ok(FileTarget {
                handle: Handle::Device(fenced),
                zeroing: Zeroing::Zero,
                background: Background::Unknown,
                folder: None,
            }),
        }
    }

    fn of(path: &Path, opened: Opened) -> Self {
        Self {
            path: path.to_owned(),
            opened,
        }
    }
}

impl FileTarget {
    /// A new, sparse file of `volume_bytes`; `background` is [`Background::Zero`].
    ///
    /// Errors: those of [`Claimed::create`] and [`Claimed::ready`].
    pub fn create(path: &Path, volume_bytes: u64) -> Result<Self, JobError> {
        Claimed::create(path)?.ready(volume_bytes, Background::Zero)
    }

    /// A file that exists. Errors: those of [`Claimed::file`] and [`Claimed::ready`].
    pub fn overwrite(path: &Path, volume_bytes: u64, keep: Background) -> Result<Self, JobError> {
        Claimed::file(path)?.ready(volume_bytes, keep)
    }

    /// What it holds, for [`crate::restore::RestoreRequest`].
    pub const fn background(&self) -> Background {
        self.background
    }

    fn of_file(
        path: &Path,
        plain: File,
        volume_bytes: u64,
        background: Background,
        folder: Option<PathBuf>,
    ) -> Result<Self, JobError> {
        plain
            .set_len(volume_bytes)
            .map_err(|source| target_error("sized", source))?;
        let direct = open_direct_write(path).ok().map(|fd| {
            let align = direct_alignment(&fd)
                .ok()
                .flatten()
                .map_or(4096, |align| u64::from(align.offset_bytes));
            (fd, align)
        });
        Ok(Self {
            handle: Handle::File { plain, direct },
            zeroing: Zeroing::Punch,
            background,
            folder,
        })
    }

    /// The descriptor for bytes at this place.
    fn fd(&self, offset_bytes: u64, len_bytes: usize) -> BorrowedFd<'_> {
        match &self.handle {
            Handle::Device(fenced) => fenced.as_fd(),
            Handle::File {
                direct: Some((direct, align)),
                ..
            } if offset_bytes.is_multiple_of(*align)
                && u64::try_from(len_bytes).is_ok_and(|len| len.is_multiple_of(*align)) =>
            {
                direct.as_fd()
            }
            Handle::File { plain, .. } => plain.as_fd(),
        }
    }

    /// Zeroes by writing, where the file system or device has no other way.
    fn write_zeroes(&self, offset_bytes: u64, len_bytes: u64) -> io::Result<()> {
        const CHUNK: u64 = 1 << 20;
        let zeroes =
            AlignedBuffer::new(usize::try_from(len_bytes.min(CHUNK)).unwrap_or(BUFFER_ALIGN));
        let mut done = 0;
        while done < len_bytes {
            let step = (len_bytes - done).min(CHUNK);
            let part = usize::try_from(step)
                .ok()
                .and_then(|step| zeroes.get(..step))
                .unwrap_or(&zeroes);
            self.write_at(offset_bytes + done, part)?;
            done += step;
        }
        Ok(())
    }
}

impl BlockWrite for FileTarget {
    fn write_at(&self, offset_bytes: u64, buf: &[u8]) -> io::Result<()> {
        write_full(&self.fd(offset_bytes, buf.len()), offset_bytes, buf)
    }

    fn zero_at(&self, offset_bytes: u64, len_bytes: u64) -> io::Result<()> {
        if len_bytes == 0 {
            return Ok(());
        }
        let fd = match &self.handle {
            Handle::Device(fenced) => fenced.as_fd(),
            Handle::File { plain, .. } => plain.as_fd(),
        };
        match zero_range(&fd, self.zeroing, offset_bytes, len_bytes) {
            Err(error) if cannot_zero(&error) => self.write_zeroes(offset_bytes, len_bytes),
            other => other,
        }
    }

    fn flush(&self) -> io::Result<()> {
        match &self.handle {
            Handle::Device(fenced) => sync_data(&fenced.as_fd())?,
            Handle::File { plain, .. } => plain.sync_all()?,
        }
        match &self.folder {
            Some(folder) => sync_folder(folder).map_err(sys_error),
            None => Ok(()),
        }
    }
}

impl ReadBack for FileTarget {
    fn read_at(&self, offset_bytes: u64, buf: &mut [u8]) -> io::Result<()> {
        let wanted = buf.len();
        let got = read_full(&self.fd(offset_bytes, wanted), offset_bytes, buf)?;
        if got == wanted {
            Ok(())
        } else {
            Err(io::ErrorKind::UnexpectedEof.into())
        }
    }
}

fn cannot_zero(error: &io::Error) -> bool {
    [Errno::OPNOTSUPP, Errno::NOSYS, Errno::NODEV, Errno::INVAL].contains(&Errno::of(error))
}

fn lock(file: &File) -> Result<(), JobError> {
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => Err(JobError::Refused(Refusal::InUse {
            by: "a process that has locked it (a tracked volume's?)".to_owned(),
        })),
        // A file system without locks: nobody can have locked it.
        Ok(()) | Err(TryLockError::Error(_)) => Ok(()),
    }
}

const fn target_error(op: &'static str, source: io::Error) -> JobError {
    JobError::Target { op, source }
}

fn sys_error(error: SysError) -> io::Error {
    io::Error::other(error)
}
