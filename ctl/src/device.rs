//! What is to become a volume: looked at before anything is done, refused where it must not be tracked.

use blktide_api::failure::{Failure, FailureCode};
use blktide_sys::blockdev::{BlockDevice, is_unclaimed, openers_of};
use blktide_sys::fs;
use blktide_sys::mounts::{self, DeviceNumber};
use blktide_volume::VolumeError;
use blktide_watch::{Missing, Obstacle, Target};
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};

use crate::context::chain;
use crate::file_system;
use crate::modes::Facts;

/// A device or file that could be tracked.
#[derive(Debug)]
pub(crate) struct Found {
    /// Where its name leads.
    pub(crate) real: PathBuf,
    /// The name that a reboot does not change, as far as there is one.
    pub(crate) stable: PathBuf,
    /// In words.
    pub(crate) what: String,
    /// Its size.
    pub(crate) bytes: u64,
    /// Its number; `None`: it is a regular file.
    pub(crate) number: Option<DeviceNumber>,
    /// Who uses it, if somebody does.
    pub(crate) used_by: Option<String>,
    /// What an administrator should know.
    pub(crate) note: Option<String>,
}

/// Looks at a device, a file, or the device of a mount point.
///
/// Errors: what is never tracked, naming what to take instead.
pub(crate) fn look(path: &Path) -> Result<Found, Failure> {
    let failed = |error: &dyn std::error::Error| {
        let message = format!("{}: {}", path.display(), chain(error));
        Failure::new(FailureCode::DeviceRefused, message)
    };
    let real = std::fs::canonicalize(path).map_err(|e| failed(&e))?;
    let found = std::fs::metadata(&real).map_err(|e| failed(&e))?;
    if found.is_dir() {
        return of_mount_point(&real);
    }
    if found.file_type().is_block_device() {
        return device(path, &real);
    }
    if found.is_file() {
        return file(&real, found.len());
    }
    Err(refused(
        &real,
        "neither a block device nor a regular file nor a mount point",
        "",
    ))
}

fn refused(path: &Path, why: &str, instead: &str) -> Failure {
    Failure::new(
        FailureCode::DeviceRefused,
        format!("{}: {why}", path.display()),
    )
    .hint(instead)
}

fn of_mount_point(at: &Path) -> Result<Found, Failure> {
    let mount = mounts::at(at).ok().flatten().ok_or_else(|| {
        refused(
            at,
            "a folder, and nothing is mounted there",
            "Give the device.",
        )
    })?;
    // The source may be a name that nothing has (`/dev/root`); the number may be that of no device (btrfs).
    let node = match BlockDevice::of_number(mount.device) {
        Ok(device) if mount.device.major != 0 => device.node(),
        _ => mount.source.clone(),
    };
    if !node.is_absolute() || std::fs::metadata(&node).is_ok_and(|found| found.is_dir()) {
        let source = mount.source.display();
        let why = format!("what is mounted there ({source}) is no device");
        return Err(refused(at, &why, ""));
    }
    look(&node)
}

impl Found {
    /// What decides about its mode. `lacks`: what the kernel has not.
    pub(crate) fn facts(&self, lacks: Option<&Missing>) -> Facts {
        Facts {
            is_file: self.number.is_none(),
            used_by: self.used_by.clone(),
            file_system: file_system::on(&self.real),
            against_watch: self.against_watch(lacks),
            against_fuse: against_fuse(),
        }
    }

    fn against_watch(&self, lacks: Option<&Missing>) -> Vec<String> {
        if self.number.is_none() {
            return Vec::new();
        }
        let mut against: Vec<String> = lacks.iter().map(ToString::to_string).collect();
        match Target::of(&self.real) {
            Ok(target) => {
                let told = |o: &Obstacle| format!("{o} [{}]. {}", o.code(), o.hint(&self.real));
                against.extend(target.obstacles.iter().map(told));
            }
            Err(VolumeError::Device { source }) => against.push(chain(&source)),
            Err(error) => against.push(chain(&error)),
        }
        against
    }
}

/// What this machine lacks for mode fuse.
pub(crate) fn against_fuse() -> Vec<String> {
    let needed = [
        ("/dev/fuse", "there is no /dev/fuse (modprobe fuse)"),
        (
            "/dev/loop-control",
            "there are no loop devices (modprobe loop)",
        ),
    ];
    let missing = needed.iter().filter(|(path, _)| !Path::new(path).exists());
    missing.map(|(_, why)| (*why).to_owned()).collect()
}

fn device(given: &Path, real: &Path) -> Result<Found, Failure> {
    let failed = |error: &dyn std::error::Error| refused(real, &chain(error), "");
    let device = BlockDevice::at(real).map_err(|e| failed(&e))?;
    if device.is_read_only().map_err(|e| failed(&e))? {
        return Err(refused(
            real,
            "read-only",
            "What never changes needs no tracker.",
        ));
    }
    if device.is_zoned() {
        return Err(refused(real, "a zoned device", ""));
    }
    let bytes = device.bytes().map_err(|e| failed(&e))?;
    if let Some((what, instead)) = member(real) {
        return Err(refused(real, what, instead));
    }
    let (model, serial) = device.model_and_serial();
    let what = match (model, serial) {
        (Some(model), Some(serial)) => format!("{model}, serial {serial}"),
        (Some(one), None) | (None, Some(one)) => one,
        (None, None) => "block device".to_owned(),
    };
    let stable = stable_name(given, real);
    Ok(Found {
        used_by: user_of(&device, real)?,
        note: (stable == real)
            .then(|| "no name in /dev/disk that a reboot does not change was found".to_owned()),
        real: real.to_owned(),
        stable,
        what,
        bytes,
        number: Some(device.number()),
    })
}

fn user_of(device: &BlockDevice, real: &Path) -> Result<Option<String>, Failure> {
    let failed = |error: &dyn std::error::Error| refused(real, &chain(error), "");
    if device.is_swap().map_err(|e| failed(&e))? {
        return Err(refused(real, "swap", "Swap is not backed up."));
    }
    let mounts = device.mounts().map_err(|e| failed(&e))?;
    if !mounts.is_empty() {
        let at: Vec<String> = mounts.iter().map(|m| m.at.display().to_string()).collect();
        return Ok(Some(format!("mounted at {}", at.join(", "))));
    }
    let holders = device.holders().map_err(|e| failed(&e))?;
    if !holders.is_empty() {
        return Ok(Some(format!("{} is built on it", holders.join(", "))));
    }
    if is_unclaimed(real).map_err(|e| failed(&e))? {
        return Ok(None);
    }
    let names: Vec<String> = openers_of(real)
        .unwrap_or_default()
        .iter()
        .map(ToString::to_string)
        .collect();
    Ok(Some(if names.is_empty() {
        "the kernel has it".to_owned()
    } else {
        names.join(", ")
    }))
}

fn file(real: &Path, bytes: u64) -> Result<Found, Failure> {
    let kind = fs::kind_of(real).map_err(|e| refused(real, &chain(&e), ""))?;
    if kind.is_remote() {
        return Err(refused(
            real,
            "on a file system of another machine, or on FUSE: its locks are no fence",
            "Take a file on a local file system.",
        ));
    }
    if bytes < 4096 {
        return Err(refused(
            real,
            "smaller than one block",
            "truncate -s SIZE makes it larger.",
        ));
    }
    Ok(Found {
        real: real.to_owned(),
        stable: real.to_owned(),
        what: "regular file".to_owned(),
        bytes,
        number: None,
        used_by: loop_device_on(real).map(|name| format!("{name} is bound to it")),
        note: None,
    })
}

/// The loop device that has `real` as its file.
fn loop_device_on(real: &Path) -> Option<String> {
    let entries = std::fs::read_dir("/sys/class/block").ok()?;
    entries.flatten().find_map(|entry| {
        let backing = std::fs::read_to_string(entry.path().join("loop/backing_file")).ok()?;
        (Path::new(backing.trim_end()) == real)
            .then(|| format!("/dev/{}", entry.file_name().to_string_lossy()))
    })
}

/// A name below `/dev/disk` (or `/dev/mapper`) that leads to the device: one by its hardware or its identity first.
fn stable_name(given: &Path, real: &Path) -> PathBuf {
    if given.starts_with("/dev/disk/by-id") || given.starts_with("/dev/disk/by-partuuid") {
        return given.to_owned();
    }
    let order = ["/dev/disk/by-id", "/dev/disk/by-partuuid"];
    for folder in order {
        let mut names: Vec<PathBuf> = std::fs::read_dir(folder)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| std::fs::canonicalize(path).is_ok_and(|p| p == real))
            .collect();
        // `dm-uuid-…` and `md-uuid-…` name the thing, `dm-name-…` only what it is called.
        names.sort_by_key(|path| {
            let name = path.file_name().map(|n| n.to_string_lossy().into_owned());
            let name = name.unwrap_or_default();
            (!name.contains("-uuid-"), name.contains("-name-"), name)
        });
        if let Some(first) = names.into_iter().next() {
            return first;
        }
    }
    real.to_owned()
}

/// What belongs to something larger, and what to take instead.
fn member(real: &Path) -> Option<(&'static str, &'static str)> {
    let mut head = vec![0; 128 << 10];
    let mut opened = File::open(real).ok()?;
    let got = opened.read(&mut head).ok()?;
    head.truncate(got);
    let at = |offset: usize, magic: &[u8]| head.get(offset..offset + magic.len()) == Some(magic);
    let md = [0xfc, 0x4e, 0x2b, 0xa9];
    if at(0, &md) || at(4096, &md) || md_at_the_end(&mut opened, &md) {
        return Some(("a member of an md array", "Take the array, /dev/md…."));
    }
    if (0..4).any(|sector| at(sector * 512, b"LABELONE")) {
        return Some((
            "an LVM physical volume",
            "Take the logical volume, /dev/VG/LV.",
        ));
    }
    if at(4086, b"SWAPSPACE2") || at(4086, b"SWAP-SPACE") {
        return Some(("swap", "Swap is not backed up."));
    }
    let btrfs_devices = head.get(0x1_0000 + 0x88..0x1_0000 + 0x90);
    if at(0x1_0040, b"_BHRfS_M") && btrfs_devices.is_some_and(|n| n != [1, 0, 0, 0, 0, 0, 0, 0]) {
        return Some(("a member of a btrfs of several devices", ""));
    }
    None
}

/// md's version 1.0 lies 8 to 12 KiB before the end, 0.90 in the last 64 KiB.
fn md_at_the_end(opened: &mut File, md: &[u8]) -> bool {
    let mut found = || -> std::io::Result<bool> {
        let bytes = opened.seek(SeekFrom::End(0))?;
        let mut tail = vec![0; 128 << 10];
        let start = bytes.saturating_sub(128 << 10) & !4095;
        opened.seek(SeekFrom::Start(start))?;
        let got = opened.read(&mut tail)?;
        tail.truncate(got);
        Ok(tail.chunks(4096).any(|part| part.starts_with(md)))
    };
    found().unwrap_or(false)
}
