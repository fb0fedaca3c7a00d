//! Opening what lies under a volume: fence first, then facts.
//!
//! Invariant: the volume's bytes are a multiple of its logical sector; what a file has beyond them is never touched.

use crate::error::DeviceError;
use blktide_sys::blockdev::{self, BlockDevice};
use blktide_sys::buffer::AlignedBuffer;
use blktide_sys::fence::{BackingKind, Fenced};
use blktide_sys::{Errno, SysError, fs};
use blktide_types::clock::{Clock, Instant};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What a backing device can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// What it is.
    pub kind: BackingKind,
    /// Size in bytes, rounded down to the logical sector.
    pub volume_bytes: u64,
    /// Smallest unit of a direct transfer, bytes: 512 to 4096.
    pub logical_sector_bytes: u32,
    /// Unit that it writes without reading, bytes.
    pub physical_sector_bytes: u32,
}

const SECTOR_MAX: u32 = 4096;

impl Limits {
    /// The limits of what stands at `path`, without the fence: to lay memory out before a server takes it.
    ///
    /// Opens it for reading only. `Unfit` as [`Backing::open`] would say.
    pub fn of(path: &Path) -> Result<Self, DeviceError> {
        let open = |source| DeviceError::open(path, source);
        let kind = match BackingKind::of(path) {
            Ok(kind) => kind,
            Err(SysError::Unfit { on, why }) => return Err(DeviceError::Unfit { path: on, why }),
            Err(source) => return Err(open(source)),
        };
        let device = match kind {
            BackingKind::BlockDevice => Some(BlockDevice::at(path).map_err(open)?),
            BackingKind::RegularFile => None,
        };
        let file = fs::open_direct_read(path).map_err(open)?;
        limits((path, kind), &file, device.as_ref())
    }
}

/// A fenced backing device.
#[derive(Debug)]
pub struct Backing {
    fenced: Fenced,
    limits: Limits,
    device: Option<BlockDevice>,
}

impl Backing {
    /// Waits until nobody else can write to what stands at `path` (P6), and opens it for direct transfers.
    ///
    /// `deadline` `None`: for ever (a takeover, where only a dead predecessor's operations can be in the way).
    pub fn open(
        path: &Path,
        clock: &dyn Clock,
        deadline: Option<Instant>,
    ) -> Result<Self, DeviceError> {
        let fenced = match Fenced::take(path, clock, deadline) {
            Ok(fenced) => fenced,
            Err(SysError::TimedOut { on, .. }) => return Err(DeviceError::InUse { path: on }),
            Err(SysError::Unfit { on, why }) => return Err(DeviceError::Unfit { path: on, why }),
            Err(source) => return Err(DeviceError::open(path, source)),
        };
        let open = |source| DeviceError::open(path, source);
        let device = match fenced.kind() {
            BackingKind::BlockDevice => Some(BlockDevice::at(path).map_err(open)?),
            BackingKind::RegularFile => None,
        };
        let limits = limits((path, fenced.kind()), &fenced, device.as_ref())?;
        Ok(Self {
            fenced,
            limits,
            device,
        })
    }

    /// What it can do.
    pub const fn limits(&self) -> Limits {
        self.limits
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        self.fenced.path()
    }

    /// The fenced descriptor, for rings of this process only.
    pub const fn file(&self) -> &Arc<OwnedFd> {
        self.fenced.file()
    }

    /// A separate descriptor of the same device, read-only and direct: for snapshot readers, in other processes too.
    pub fn reader(&self) -> Result<OwnedFd, DeviceError> {
        let path = PathBuf::from(format!("/proc/self/fd/{}", self.fenced.file().as_raw_fd()));
        fs::open_direct_read(&path).map_err(|e| DeviceError::open(self.path(), e))
    }

    /// Its size now, bytes, rounded as in [`Limits`].
    pub fn current_bytes(&self) -> Result<u64, DeviceError> {
        bytes_of(&self.fenced, self.limits.logical_sector_bytes)
    }

    /// `Resized` if it has another size than at the attach.
    pub fn check_size(&self) -> Result<(), DeviceError> {
        let (was_bytes, is_bytes) = (self.limits.volume_bytes, self.current_bytes()?);
        if was_bytes == is_bytes {
            Ok(())
        } else {
            Err(DeviceError::Resized {
                was_bytes,
                is_bytes,
            })
        }
    }

    /// Whether the path still leads to it.
    pub fn is_still_at_path(&self) -> Result<bool, DeviceError> {
        self.fenced
            .is_still_at_path()
            .map_err(|e| DeviceError::open(self.path(), e))
    }

    /// 512-byte sectors written to it by anybody since it appeared, and discarded; `None` for a file, or where the
    /// kernel does not count. Compare with our own count at a quiet moment (P5).
    pub fn sectors_changed(&self) -> Option<u64> {
        let device = self.device.as_ref().filter(|d| d.counts())?;
        let found = device.counters().ok()?;
        Some(
            found
                .sectors_written
                .saturating_add(found.sectors_discarded),
        )
    }
}

fn bytes_of(file: &impl AsFd, sector_bytes: u32) -> Result<u64, DeviceError> {
    let bytes = fs::size_of(file).map_err(|source| DeviceError::Transfer {
        kind: crate::TransferKind::Read,
        offset: 0,
        len: 0,
        errno: Errno::of(&source),
    })?;
    Ok(bytes - bytes % u64::from(sector_bytes.max(1)))
}

fn limits(
    what: (&Path, BackingKind),
    file: &impl AsFd,
    device: Option<&BlockDevice>,
) -> Result<Limits, DeviceError> {
    let (path, kind) = what;
    let open = |source| DeviceError::open(path, source);
    let unfit = |why| DeviceError::Unfit {
        path: path.to_owned(),
        why,
    };
    let (logical, physical) = if let Some(device) = device {
        if device.is_read_only().map_err(open)? {
            return Err(unfit("the device is read-only"));
        }
        if device.is_zoned() {
            return Err(unfit("a zoned device cannot be tracked"));
        }
        (
            device.logical_sector_bytes().map_err(open)?,
            device.physical_sector_bytes().map_err(open)?,
        )
    } else {
        let sector = file_sector(file).map_err(open)?;
        (sector, SECTOR_MAX.max(sector))
    };
    if logical > SECTOR_MAX || !logical.is_power_of_two() {
        return Err(unfit("its sectors are larger than 4096 bytes"));
    }
    let volume_bytes = bytes_of(file, logical)?;
    if volume_bytes == 0 {
        return Err(unfit("it is empty"));
    }
    Ok(Limits {
        kind,
        volume_bytes,
        logical_sector_bytes: logical,
        physical_sector_bytes: physical.max(logical),
    })
}

/// The unit of direct transfers of a file: what the kernel says, else (before 6.1) what it takes.
fn file_sector(file: &impl AsFd) -> Result<u32, SysError> {
    if let Some(found) = blockdev::direct_alignment(file)? {
        return Ok(found.offset_bytes.max(512));
    }
    let mut buffer = AlignedBuffer::new(512);
    Ok(match fs::read_full(file, 512, &mut buffer) {
        Ok(_) => 512,
        Err(_) => SECTOR_MAX,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use blktide_sys::clock::SystemClock;

    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str, bytes: u64) -> Self {
            let path = PathBuf::from("/var/tmp")
                .join(format!("blktide-device-{name}-{}", std::process::id()));
            std::fs::File::create(&path)
                .unwrap()
                .set_len(bytes)
                .unwrap();
            Self(path)
        }

        fn open(&self) -> Result<Backing, DeviceError> {
            Backing::open(&self.0, &SystemClock, Some(SystemClock.now()))
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            std::fs::remove_file(&self.0).unwrap();
        }
    }

    #[test]
    fn an_odd_size_is_rounded_down_to_the_sector() {
        let file = Scratch::new("odd", (1 << 20) + 4096 + 100);
        let backing = file.open().unwrap();
        let limits = backing.limits();
        assert_eq!(limits.kind, BackingKind::RegularFile);
        assert_eq!(
            limits.volume_bytes % u64::from(limits.logical_sector_bytes),
            0
        );
        assert!(limits.volume_bytes <= (1 << 20) + 4196 && limits.volume_bytes > 1 << 20);
        assert_eq!(backing.sectors_changed(), None);
        assert_eq!(Limits::of(&file.0).unwrap(), limits);
    }

    #[test]
    fn another_size_is_noticed() {
        let file = Scratch::new("resized", 1 << 20);
        let backing = file.open().unwrap();
        backing.check_size().unwrap();
        std::fs::OpenOptions::new()
            .write(true)
            .open(&file.0)
            .unwrap()
            .set_len(1 << 19)
            .unwrap();
        let error = backing.check_size().unwrap_err();
        assert!(matches!(
            error,
            DeviceError::Resized {
                was_bytes: 0x10_0000,
                is_bytes: 0x8_0000
            }
        ));
    }

    /// P6, in small: a second tracker is refused, a reader is not.
    #[test]
    fn one_writer_and_any_reader() {
        let file = Scratch::new("fenced", 1 << 20);
        let backing = file.open().unwrap();
        assert!(matches!(file.open(), Err(DeviceError::InUse { .. })));
        let reader = backing.reader().unwrap();
        assert!(
            fs::write_full(&reader, 0, &AlignedBuffer::new(4096))
                .is_err_and(|e| Errno::of(&e) == Errno::BADF)
        );
        drop(backing);
        file.open().unwrap();
    }

    #[test]
    fn what_cannot_be_tracked_is_refused() {
        let empty = Scratch::new("empty", 0);
        assert!(matches!(empty.open(), Err(DeviceError::Unfit { .. })));
        let deadline = Some(SystemClock.now());
        let null = Backing::open(Path::new("/dev/null"), &SystemClock, deadline);
        assert!(matches!(null, Err(DeviceError::Unfit { .. })));
        let none = Backing::open(Path::new("/nowhere/at/all"), &SystemClock, deadline);
        assert!(matches!(none, Err(DeviceError::Open { .. })));
    }
}
