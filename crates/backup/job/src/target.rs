//! Whether a restore may write to its target: the refusals, fed with facts.
//!
//! The facts come from the system (the binaries collect them); what follows from them is decided here, in one place,
//! so that it can be tested without devices.
//!
//! **Invariant**: a target that is mounted, in use or too small is refused whatever the options.

use core::fmt;

/// What a target is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetKind {
    /// Does not exist yet: a new sparse file is made.
    NewFile,
    /// A regular file that exists.
    File,
    /// A block device.
    Device,
}

/// What is known of a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetFacts {
    /// What it is.
    pub kind: TargetKind,
    /// Its size in bytes; of a new file what the file system could hold, `u64::MAX` if unknown.
    pub bytes: u64,
    /// Logical sector; 512 for files.
    pub logical_sector_bytes: u32,
    /// Where it, or a part of it, is mounted.
    pub mounted_at: Option<String>,
    /// Who else has it open or built on it: a dm or md device, swap, a process.
    pub in_use_by: Option<String>,
    /// Whether the repository that is read from lies on it.
    pub holds_repository: bool,
    /// What it seems to hold, for people: `ext4 file system`, `partition table`. For a file: `data`, if it is not empty.
    pub signature: Option<String>,
}

/// What may become of what a target holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contents {
    /// A target that holds something is refused.
    Keep,
    /// `--overwrite`.
    Overwrite,
}

/// Why a restore is refused. Nothing has been written.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// It, or a part of it, is mounted.
    Mounted {
        /// Where.
        at: String,
    },
    /// Something holds it.
    InUse {
        /// What.
        by: String,
    },
    /// The image does not fit.
    TooSmall {
        /// Bytes of the target.
        target_bytes: u64,
        /// Bytes of the image's volume.
        needed_bytes: u64,
    },
    /// It holds something, and `--overwrite` was not given.
    NotEmpty {
        /// What, for people.
        signature: String,
    },
    /// Partition tables and file systems count in sectors of the size they were made on (512e and 4Kn differ).
    SectorSize {
        /// Of the target, bytes.
        target_bytes: u32,
        /// Of the image's volume, bytes.
        image_bytes: u32,
    },
    /// The repository that the image is read from lies on it.
    HoldsRepository,
}

impl Refusal {
    /// The word of the interface.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Mounted { .. } => "target_mounted",
            Self::InUse { .. } => "target_in_use",
            Self::TooSmall { .. } => "target_too_small",
            Self::NotEmpty { .. } => "target_not_empty",
            Self::SectorSize { .. } => "target_sector_size",
            Self::HoldsRepository => "target_holds_repository",
        }
    }

    /// What to do about it, for people.
    pub const fn hint(&self) -> &'static str {
        match self {
            Self::Mounted { .. } => "unmount it first",
            Self::InUse { .. } => "end what uses it first",
            Self::TooSmall { .. } => "take a target that is as large as the image's volume",
            Self::NotEmpty { .. } => {
                "check that it is the right one; then --overwrite writes over what it holds"
            }
            Self::SectorSize { .. } => {
                "take a target of the same logical sector size, or restore to a file"
            }
            Self::HoldsRepository => "take another target",
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mounted { at } => write!(f, "the target is mounted at {at}"),
            Self::InUse { by } => write!(f, "the target is in use by {by}"),
            Self::TooSmall {
                target_bytes,
                needed_bytes,
            } => write!(
                f,
                "the target has {target_bytes} bytes, the image needs {needed_bytes}"
            ),
            Self::NotEmpty { signature } => write!(f, "the target holds something: {signature}"),
            Self::SectorSize {
                target_bytes,
                image_bytes,
            } => write!(
                f,
                "the target's logical sector is {target_bytes} bytes, the image's {image_bytes}"
            ),
            Self::HoldsRepository => f.write_str("the repository lies on the target"),
        }
    }
}

/// Whether an image of `volume_bytes` with sectors of `sector_bytes` may be written to a target.
///
/// Errors: the first refusal of this order: mounted, in use, repository, too small, sector size, not empty.
pub fn check(
    target: &TargetFacts,
    volume_bytes: u64,
    sector_bytes: u32,
    contents: Contents,
) -> Result<(), Refusal> {
    if let Some(at) = &target.mounted_at {
        return Err(Refusal::Mounted { at: at.clone() });
    }
    if let Some(by) = &target.in_use_by {
        return Err(Refusal::InUse { by: by.clone() });
    }
    if target.holds_repository {
        return Err(Refusal::HoldsRepository);
    }
    // An existing file grows to its image.
    if target.kind != TargetKind::File && target.bytes < volume_bytes {
        return Err(Refusal::TooSmall {
            target_bytes: target.bytes,
            needed_bytes: volume_bytes,
        });
    }
    if target.kind == TargetKind::Device && target.logical_sector_bytes != sector_bytes {
        return Err(Refusal::SectorSize {
            target_bytes: target.logical_sector_bytes,
            image_bytes: sector_bytes,
        });
    }
    if let (Some(signature), Contents::Keep) = (&target.signature, contents) {
        return Err(Refusal::NotEmpty {
            signature: signature.clone(),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
