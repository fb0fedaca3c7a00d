//! What is to be watched: facts of the device, and what stands against it.
//!
//! **Invariant**: what could write to the volume without being seen is refused here, or seen at each sample of the evidence, or
//! named in `docs/watch.md` as what nobody can see.

use blktide_device::Limits;
use blktide_sys::blockdev::BlockDevice;
use blktide_sys::mounts::DeviceNumber;
use blktide_volume::VolumeError;
use std::io;
use std::path::{Path, PathBuf};

use crate::pins::failed;

/// A device that could be watched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The node.
    pub path: PathBuf,
    /// The device.
    pub number: DeviceNumber,
    /// The disk that it is, or is a partition of: the events name this one.
    pub disk: DeviceNumber,
    /// Where it begins on the disk, sectors of 512 bytes.
    pub start_sector: u64,
    /// Its size, sectors of 512 bytes.
    pub sectors: u64,
    /// It has no requests of its own (device-mapper, md, zram): only bios are seen.
    pub bio_based: bool,
    /// Size and sectors as the volume has them.
    pub limits: Limits,
    /// What stands against it.
    pub obstacles: Vec<Obstacle>,
}

/// Why a device cannot be watched.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Obstacle {
    /// Another device is built on it: what goes through that one may come here unseen (md re-sends bios).
    Holders(Vec<String>),
    /// Zone append writes where the device chooses.
    Zoned,
    /// Stores to mapped memory reach it without any request.
    Dax,
    /// The kernel does not count its sectors, so that nobody could tell whether one went by.
    StatisticsOff,
    /// A loop device whose file somebody else has open for writing.
    FileOpen {
        /// The file.
        file: PathBuf,
        /// By whom.
        by: String,
    },
}

impl Obstacle {
    /// What it is, for scripts.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Holders(_) => "holders",
            Self::Zoned => "zoned",
            Self::Dax => "dax",
            Self::StatisticsOff => "statistics-off",
            Self::FileOpen { .. } => "file-open",
        }
    }

    /// What to do about it.
    pub fn hint(&self, device: &Path) -> String {
        match self {
            Self::Holders(names) => {
                let top = names.first().map_or("", String::as_str);
                format!("Watch the device on top: /dev/{top}.")
            }
            Self::Zoned | Self::Dax => {
                "Mode watch cannot see all writes to it; nothing in this version can.".to_owned()
            }
            Self::StatisticsOff => {
                let name = device.file_name().unwrap_or_default().to_string_lossy();
                format!(
                    "echo 1 > /sys/class/block/{name}/queue/iostats (of a partition: its disk's)"
                )
            }
            Self::FileOpen { .. } => {
                "End that program, or track the file itself: --mode fuse.".to_owned()
            }
        }
    }
}

impl std::fmt::Display for Obstacle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Holders(names) => write!(f, "{} is built on it", names.join(", ")),
            Self::Zoned => f.write_str("it is a zoned device"),
            Self::Dax => f.write_str("it is written by stores to memory (DAX)"),
            Self::StatisticsOff => {
                f.write_str("the kernel does not count its sectors (queue/iostats is 0)")
            }
            Self::FileOpen { file, by } => {
                write!(f, "its file {} is open for writing: {by}", file.display())
            }
        }
    }
}

impl Target {
    /// Whether it is a partition.
    pub fn is_partition(&self) -> bool {
        self.number != self.disk
    }

    /// Looks at the device at `path`; opens it for reading only.
    ///
    /// Errors: `Device` if it is no block device that could be a volume, `Io`.
    pub fn of(path: &Path) -> Result<Self, VolumeError> {
        let fail = |e: blktide_sys::SysError| failed("look at", path, io::Error::other(e));
        let device = BlockDevice::at(path).map_err(fail)?;
        let limits = Limits::of(path).map_err(|source| VolumeError::Device { source })?;
        let mut obstacles = Vec::new();
        let holders = device.holders().map_err(fail)?;
        if !holders.is_empty() {
            obstacles.push(Obstacle::Holders(holders));
        }
        if device.is_zoned() {
            obstacles.push(Obstacle::Zoned);
        }
        if device.is_dax() {
            obstacles.push(Obstacle::Dax);
        }
        if !device.counts() {
            obstacles.push(Obstacle::StatisticsOff);
        }
        if let Some(obstacle) = writer_of_the_file(&device) {
            obstacles.push(obstacle);
        }
        Ok(Self {
            path: path.to_owned(),
            number: device.number(),
            disk: device.whole_disk().map_err(fail)?.number(),
            start_sector: device.start_sector().map_err(fail)?,
            sectors: device.bytes().map_err(fail)? / 512,
            bio_based: device.is_bio_based(),
            limits,
            obstacles,
        })
    }
}

/// Who writes a loop device's file past the loop device, at this moment.
pub(crate) fn writer_of_the_file(device: &BlockDevice) -> Option<Obstacle> {
    let file = device.loop_backing_file()?;
    let writers = blktide_sys::blockdev::writers_of(&file).ok()?;
    let names: Vec<String> = writers.iter().map(ToString::to_string).collect();
    (!names.is_empty()).then(|| Obstacle::FileOpen {
        file,
        by: names.join(", "),
    })
}
