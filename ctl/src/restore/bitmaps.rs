//! The bitmap files of the volumes that a restore's target may be, or lie under.
//!
//! **Invariant**: when [`forget`] returns `Ok` no bitmap of such a volume is believed any more, and that is durable (P15). In doubt
//! a bitmap goes: that costs one full backup; one that stayed would cost what the next incremental backup leaves out.
//!
//! The target must be claimed before: else an attach and a detach meanwhile store a new bitmap.

use blktide_api::config::{Config, VolumeConfig};
use blktide_api::failure::{Failure, FailureCode};
use blktide_api::name::Name;
use blktide_sys::blockdev::BlockDevice;
use blktide_sys::mounts::DeviceNumber;
use blktide_types::id::VolumeId;
use std::fs::{self, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::context::{Common, chain};

/// The configuration; without any, one without volumes (a rescue system). One that is there and cannot be read: refused, since it
/// would say whose device the target is.
pub(super) fn configuration(common: &Common) -> Result<Config, Failure> {
    common.load_whatever_is_there().map_err(|failure| {
        Failure::new(
            FailureCode::TargetRefused,
            format!(
                "whether a volume lies on the target cannot be known: {}",
                failure.message
            ),
        )
        .hint("nothing was restored: mend the configuration, then try again")
    })
}

/// Makes the bitmap files go of all volumes that `target` is, may be, or lies under; returns whose went. `image`: the volume of
/// the image.
///
/// Waits: for a flush of the state folder's disk for each.
pub(super) fn forget(
    target: &Path,
    fresh: bool,
    image: VolumeId,
    config: &Config,
) -> Result<Vec<Name>, Failure> {
    let target = Target::of(target, fresh)?;
    let mut gone = Vec::new();
    for volume in config.volumes.values() {
        let folder = config.volume_state_dir(&volume.name);
        if target.may_be(volume, is_volume(&folder, image)) && remove(volume, &folder)? {
            gone.push(volume.name.clone());
        }
    }
    Ok(gone)
}

/// Whether there was one.
fn remove(volume: &VolumeConfig, folder: &Path) -> Result<bool, Failure> {
    let failed = |error: &dyn std::error::Error| {
        Failure::new(FailureCode::Failed, chain(error)).hint(format!(
            "nothing was restored: the bitmap of volume {} must go first, and does not",
            volume.name
        ))
    };
    match fs::metadata(folder) {
        // It was never attached.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(failed(&error)),
        Ok(_) => {
            blktide_sys::fs::remove_durably(&folder.join("bitmap")).map_err(|error| failed(&error))
        }
    }
}

/// Whether the volume of this state folder is the one that the image is of.
fn is_volume(folder: &Path, image: VolumeId) -> bool {
    fs::read_to_string(folder.join("volume-id"))
        .is_ok_and(|text| text.trim().parse::<VolumeId>().is_ok_and(|id| id == image))
}

/// What is restored to: open, so it is there.
struct Target {
    /// As it was named, from the root.
    named: PathBuf,
    real: PathBuf,
    found: Metadata,
    /// It was made just now.
    fresh: bool,
}

impl Target {
    fn of(path: &Path, fresh: bool) -> Result<Self, Failure> {
        let look = || {
            Ok(Self {
                named: std::path::absolute(path)?,
                real: fs::canonicalize(path)?,
                found: fs::metadata(path)?,
                fresh,
            })
        };
        look().map_err(|error: std::io::Error| {
            Failure::new(
                FailureCode::Failed,
                format!("{}: {}", path.display(), chain(&error)),
            )
        })
    }

    /// `is_image`: the image that is restored is of this volume.
    fn may_be(&self, volume: &VolumeConfig, is_image: bool) -> bool {
        let device = &volume.device;
        if std::path::absolute(device).is_ok_and(|named| named == self.named || named == self.real)
        {
            return true;
        }
        match fs::metadata(device) {
            Ok(found) => self.touches(&found),
            // It is away, or its link went with what the device held: nobody can tell.
            Err(_) if self.is_device() => is_image || device.starts_with("/dev"),
            Err(_) => is_image || !(self.fresh || device.starts_with("/dev")),
        }
    }

    /// Whether a write to the target may change what stands at `found`.
    fn touches(&self, found: &Metadata) -> bool {
        match (self.is_device(), found.file_type().is_block_device()) {
            (true, true) => related(number_of(&self.found), number_of(found)),
            (false, false) => is_same_file(&self.found, found),
            (true, false) => is_loop_on(number_of(&self.found), found),
            (false, true) => is_loop_on(number_of(found), &self.found),
        }
    }

    fn is_device(&self) -> bool {
        self.found.file_type().is_block_device()
    }
}

fn is_same_file(one: &Metadata, other: &Metadata) -> bool {
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

/// The same device, by whatever node; a disk and its partition; or one built on the other.
fn related(one: DeviceNumber, other: DeviceNumber) -> bool {
    let stands_on =
        |upper, lower| BlockDevice::of_number(upper).is_ok_and(|device| device.stands_on(lower));
    one == other || stands_on(one, other) || stands_on(other, one)
}

/// The number of the device that this node stands for.
fn number_of(node: &Metadata) -> DeviceNumber {
    DeviceNumber::from_raw(node.rdev())
}

/// Whether the device is, or is built on, a loop device whose file this is.
fn is_loop_on(device: DeviceNumber, file: &Metadata) -> bool {
    let Ok(device) = BlockDevice::of_number(device) else {
        return false;
    };
    let loops = fs::read_dir("/sys/class/block").into_iter().flatten();
    loops.flatten().any(|entry| {
        let text = |name: &str| fs::read_to_string(entry.path().join(name)).ok();
        let Some(path) = text("loop/backing_file") else {
            return false;
        };
        // First: the files of other loop devices may lie on a file system that hangs.
        let is_under = text("dev")
            .and_then(|number| DeviceNumber::parse(&number))
            .is_some_and(|number| device.stands_on(number));
        is_under
            && fs::metadata(path.trim_end_matches('\n'))
                .is_ok_and(|found| is_same_file(&found, file))
    })
}

#[cfg(test)]
mod tests;
