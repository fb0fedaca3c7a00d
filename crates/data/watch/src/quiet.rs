//! Making a volume stand still for a moment.
//!
//! | the volume | by | the image then is |
//! |---|---|---|
//! | a file system is mounted from it | freezing it (each, for a disk with several) | `frozen` |
//! | nobody uses it | the fence, for that moment | `unmounted` |
//! | a program writes it directly, or has it open so that it can | nothing | `none`: parts of it are of different moments |
//!
//! The fence keeps mounts and other exclusive users away, and neither keeps away who has opened the node (or another partition of a
//! disk that is partly mounted) plainly. So whoever closes a generation also sees for himself that no write is under way.
//!
//! **Invariant**: while it stands still nothing of ours writes to a file system, logs, or opens a file.

use blktide_format::manifest::Consistency;
use blktide_sys::blockdev::{BlockDevice, thaw};
use blktide_sys::clock::SystemClock;
use blktide_sys::fence::Fenced;
use blktide_sys::fs;
use blktide_sys::mounts::{DeviceNumber, Reachable};
use blktide_types::clock::Clock;
use blktide_volume::{VolumeError, VolumeOptions};
use std::os::fd::OwnedFd;
use std::time::Duration;

use crate::ahead::FreezeLimits;
use crate::attach::fence;
use crate::guard::{Frozen, Guard, GuardError, LIMIT_MAX};
use crate::tracker::{Watched, io_at};
use blktide_sys::spawn::Program;

/// Longest that the freeze call itself may take.
pub(crate) const PATIENCE_MAX: Duration = Duration::from_secs(60);

/// How a volume is made to stand still.
#[derive(Debug)]
pub(crate) enum Quiet {
    /// By freezing what is mounted; the guards hold the thaw.
    Freeze(Vec<Mounted>),
    /// By the fence: nobody uses it.
    Fence,
    /// Not at all.
    Impossible,
}

fn has_no_writers(options: &VolumeOptions) -> Result<bool, VolumeError> {
    let path = &options.device;
    let device = BlockDevice::at(path).map_err(io_at("look at", path))?;
    Ok(device.writers().is_empty())
}

/// How long after its begin a freeze of ours, whose control side and guards were killed, may yet come to be.
pub(crate) const LEFT_OVER: Duration =
    Duration::from_secs(PATIENCE_MAX.as_secs() + LIMIT_MAX.as_secs());

/// Thaws what a control side has left frozen that was killed together with its guards. What is not frozen stays as it is. Returns
/// whether something was thawed.
pub(crate) fn thaw_left_over(options: &VolumeOptions) -> bool {
    let mut thawed = false;
    let device = BlockDevice::at(&options.device);
    let mounts = device.and_then(|d| d.mounts_anywhere()).unwrap_or_default();
    for mount in mounts {
        if let Ok(folder) = mount.open() {
            thawed |= thaw(&folder).is_ok();
        }
    }
    thawed
}

/// A file system that can be frozen.
#[derive(Debug)]
pub(crate) struct Mounted {
    guard: Guard,
    /// For syncing it.
    folder: OwnedFd,
}

impl Quiet {
    /// What can be done about this device now. Starts the guards, from `program`.
    pub(crate) fn of(options: &VolumeOptions, program: &Program) -> Result<Self, VolumeError> {
        let path = &options.device;
        let device = BlockDevice::at(path).map_err(io_at("look at", path))?;
        let mounts = device
            .mounts_anywhere()
            .map_err(io_at("find the mounts of", path))?;
        if mounts.is_empty() {
            let fenced = fence(options)?;
            return Ok(if fenced.is_some() && device.writers().is_empty() {
                Self::Fence
            } else {
                Self::Impossible
            });
        }
        let mut systems: Vec<(DeviceNumber, Mounted)> = Vec::new();
        for mount in mounts {
            let number = mount.mount.device;
            if !systems.iter().any(|(known, _)| *known == number)
                && let Some(mounted) = Mounted::of(&mount, program)?
            {
                systems.push((number, mounted));
            }
        }
        let systems: Vec<Mounted> = systems.into_iter().map(|(_, mounted)| mounted).collect();
        Ok(if systems.is_empty() {
            Self::Impossible
        } else {
            Self::Freeze(systems)
        })
    }

    /// What an image of such a moment is.
    pub(crate) const fn consistency(&self) -> Consistency {
        match self {
            Self::Freeze(_) => Consistency::Frozen,
            Self::Fence => Consistency::Unmounted,
            Self::Impossible => Consistency::None,
        }
    }

    /// What is dirty in memory goes to the volume, so that the freeze has less to do. Waits: for that.
    pub(crate) fn sync(&self) {
        if let Self::Freeze(systems) = self {
            for mounted in systems {
                // A freeze syncs as well, and says if it cannot.
                drop(fs::sync_file_system(&mounted.folder));
            }
        }
    }

    /// Stands still from here on, for the limit at most. Waits: for the file system's own flush.
    pub(crate) fn begin(
        &mut self,
        watched: &Watched,
        limits: &FreezeLimits,
    ) -> Result<Standing<'_>, VolumeError> {
        let options = &watched.options;
        let path = &options.device;
        match self {
            Self::Freeze(systems) => {
                // Said before, so that whoever comes after us and our guards knows.
                watched.note_freeze(SystemClock.now().0.max(1));
                let mut all = Vec::with_capacity(systems.len());
                for mounted in systems {
                    let patience = limits.patience.min(PATIENCE_MAX);
                    match mounted.guard.freeze(limits.limit, patience) {
                        Ok(one) => all.push(one),
                        Err(error) => {
                            let (_, over) = thaw_all(all);
                            note_thaw(watched, over.max(Over::of(&error)));
                            return Err(io_at("freeze", path)(error));
                        }
                    }
                }
                Ok(Standing::Frozen(all))
            }
            Self::Fence => match fence(options)? {
                Some(fence) if has_no_writers(options)? => {
                    // What was written to the node and lies in its page cache belongs to this moment.
                    drop(fs::sync_data(&**fence.file()));
                    Ok(Standing::Fenced(fence))
                }
                // Somebody has come meanwhile.
                Some(_) | None => Err(crate::tracker::refused(
                    blktide_volume::error::Refusal::Busy,
                    format!("{} was taken into use during the backup", path.display()),
                )),
            },
            Self::Impossible => Ok(Standing::Moving),
        }
    }
}

impl Mounted {
    fn of(mount: &Reachable, program: &Program) -> Result<Option<Self>, VolumeError> {
        // A mount of a single file; another one of the same file system will do.
        let Ok(folder) = mount.open() else {
            return Ok(None);
        };
        let copy = folder.try_clone().map_err(io_at("open", &mount.path))?;
        Ok(Some(Self {
            guard: Guard::start(program, copy)
                .map_err(io_at("start the thaw guard of", &mount.path))?,
            folder,
        }))
    }
}

/// A volume that stands still, or does as if.
#[derive(Debug)]
pub(crate) enum Standing<'a> {
    Frozen(Vec<Frozen<'a>>),
    Fenced(#[expect(dead_code, reason = "held, not used")] Fenced),
    Moving,
}

impl Standing<'_> {
    /// Goes on. Returns how long it stood still at most, and whether it did so until now.
    pub(crate) fn end(self, watched: &Watched) -> (Duration, bool) {
        match self {
            Self::Frozen(all) => {
                let (longest, over) = thaw_all(all);
                note_thaw(watched, over);
                (longest, over == Over::Whole)
            }
            Self::Fenced(_) | Self::Moving => (Duration::ZERO, true),
        }
    }

    /// Whether those who write by a file system, or exclusively, are kept from it.
    pub(crate) const fn is_quiet(&self) -> bool {
        !matches!(self, Self::Moving)
    }
}

/// How freezes have ended: the worst of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Over {
    /// Each lasted until it was thawed here.
    Whole,
    /// Somebody or something else has thawed one before.
    Broken,
    /// One is not known to be over: who comes after us is to know.
    MayBeFrozen,
}

impl Over {
    const fn of(error: &GuardError) -> Self {
        if error.may_be_frozen() {
            Self::MayBeFrozen
        } else {
            Self::Broken
        }
    }
}

fn note_thaw(watched: &Watched, over: Over) {
    if over != Over::MayBeFrozen {
        watched.note_freeze(0);
    }
}

/// Thaws them, the last one first. Returns how long writers waited at most.
fn thaw_all(mut all: Vec<Frozen<'_>>) -> (Duration, Over) {
    let (mut longest, mut over) = (Duration::ZERO, Over::Whole);
    while let Some(one) = all.pop() {
        match one.thaw() {
            // Writers wait from the beginning of the call.
            Ok(thawed) => longest = longest.max(thawed.call.saturating_add(thawed.frozen)),
            Err(error) => {
                if let GuardError::Expired { frozen } = error {
                    longest = longest.max(frozen);
                }
                over = over.max(Over::of(&error));
            }
        }
    }
    (longest, over)
}
