//! What is known of a restore's target before anything is written to it.

use anyhow::Context;
use blktide_job::target::{TargetFacts, TargetKind};
use blktide_sys::blockdev::{BlockDevice, is_unclaimed, openers_of};
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use super::Found;

/// Facts of `target`; `repository` is where the image lies.
pub(super) fn of(target: &Path, repository: &Path) -> Found<TargetFacts> {
    let about = || target.display().to_string();
    let found = match fs::metadata(target) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(new_file()),
        other => other.with_context(about)?,
    };
    if found.file_type().is_block_device() {
        return device(target, repository).with_context(about);
    }
    anyhow::ensure!(
        found.is_file(),
        "{}: neither a file nor a block device",
        about()
    );
    Ok(TargetFacts {
        kind: TargetKind::File,
        bytes: found.len(),
        logical_sector_bytes: 512,
        mounted_at: None,
        in_use_by: loop_device_on(target),
        holds_repository: fs::canonicalize(target)?.starts_with(fs::canonicalize(repository)?),
        signature: if found.len() == 0 {
            None
        } else {
            Some(signature(target, found.len())?)
        },
    })
}

const fn new_file() -> TargetFacts {
    TargetFacts {
        kind: TargetKind::NewFile,
        bytes: u64::MAX,
        logical_sector_bytes: 512,
        mounted_at: None,
        in_use_by: None,
        holds_repository: false,
        signature: None,
    }
}

fn device(target: &Path, repository: &Path) -> Found<TargetFacts> {
    let device = BlockDevice::at(target)?;
    let bytes = device.bytes()?;
    let mounted_at = device.mounts()?.first().map(|m| m.at.display().to_string());
    let under = BlockDevice::under(repository)?;
    let claimed = || Ok::<_, anyhow::Error>(!is_unclaimed(target)?);
    let in_use_by = if device.is_swap()? {
        Some("swap".to_owned())
    } else if let Some(holder) = device.holders()?.first() {
        Some(holder.clone())
    } else if mounted_at.is_none() && claimed()? {
        let names: Vec<String> = openers_of(target)?
            .iter()
            .map(ToString::to_string)
            .collect();
        Some(if names.is_empty() {
            "the kernel".to_owned()
        } else {
            names.join(", ")
        })
    } else {
        None
    };
    let text = signature(target, bytes)?;
    Ok(TargetFacts {
        kind: TargetKind::Device,
        bytes,
        logical_sector_bytes: device.logical_sector_bytes()?,
        mounted_at,
        in_use_by,
        holds_repository: under.is_some_and(|u| u.number() == device.number()),
        signature: (text != NOTHING).then_some(text),
    })
}

const NOTHING: &str = "zeroes";

/// What the first MiB looks like.
fn signature(path: &Path, bytes: u64) -> Found<String> {
    let mut head = vec![0; usize::try_from(bytes.min(1 << 20))?];
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(0))?;
    file.read_exact(&mut head)?;
    let at = |offset: usize, magic: &[u8]| head.get(offset..offset + magic.len()) == Some(magic);
    let known = [
        (0x438, &[0x53, 0xef][..], "an ext4 file system"),
        (0, b"XFSB", "an XFS file system"),
        (0x1_0040, b"_BHRfS_M", "a btrfs file system"),
        (0, b"LUKS\xba\xbe", "a LUKS volume"),
        (0x218, b"LVM2 001", "an LVM physical volume"),
        (512, b"EFI PART", "a partition table"),
        (510, &[0x55, 0xaa], "a partition table or boot sector"),
    ];
    Ok(
        match known.iter().find(|(offset, magic, _)| at(*offset, magic)) {
            Some((_, _, name)) => (*name).to_owned(),
            None if head.iter().all(|b| *b == 0) => NOTHING.to_owned(),
            None => "data".to_owned(),
        },
    )
}

/// Model and serial number, as far as they are known.
pub(super) fn device_words(target: &Path) -> String {
    match BlockDevice::at(target).map(|device| device.model_and_serial()) {
        Ok((model, serial)) => format!(
            "a device, model {}, serial {}",
            model.as_deref().unwrap_or("unknown"),
            serial.as_deref().unwrap_or("unknown")
        ),
        Err(_) => "a device".to_owned(),
    }
}

/// The loop device that has `target` as its file.
fn loop_device_on(target: &Path) -> Option<String> {
    let real = fs::canonicalize(target).ok()?;
    let entries = fs::read_dir("/sys/class/block").ok()?;
    entries.flatten().find_map(|entry| {
        let backing = fs::read_to_string(entry.path().join("loop/backing_file")).ok()?;
        (Path::new(backing.trim_end()) == real)
            .then(|| format!("/dev/{}", entry.file_name().to_string_lossy()))
    })
}
