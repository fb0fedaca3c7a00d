//! Making a volume stand still for a moment.
//!
//! | the volume | by | the image then is |
//! |---|---|---|
//! | a file system is mounted from it | freezing it (each, for a disk with several) | `frozen` |
//! | nobody uses it | the fence, for that moment | `unmounted` |
//! | a program writes it directly | nothing | `none`: parts of it are of different moments |
//!
//! **Invariant**: while it stands still nothing of ours writes to a file system, logs, or opens a file.

use blktide_engine::evidence::Occasion;
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

use crate::attach::fence;
use crate::guard::{Frozen, Guard};
use crate::tracker::{Watched, io_at};
use blktide_sys::spawn::Program;

/// Longest that the freeze call itself may take: it writes what is dirty.
const PATIENCE: Duration = Duration::from_secs(60);

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

/// Thaws what a control side has left frozen that was killed together with its guards. What is not frozen stays as it is.
pub(crate) fn thaw_left_over(options: &VolumeOptions) {
    let device = BlockDevice::at(&options.device);
    let mounts = device.and_then(|d| d.mounts_anywhere()).unwrap_or_default();
    for mount in mounts {
        if let Ok(folder) = mount.open() {
            // It was not frozen, or it is thawed now; there is nobody to tell.
            drop(thaw(&folder));
        }
    }
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
            return Ok(match fence(options)? {
                Some(_taken) => Self::Fence,
                None => Self::Impossible,
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

    /// Stands still from here on, for `limit` at most. Waits: for the file system's own flush.
    pub(crate) fn begin(
        &mut self,
        watched: &Watched,
        limit: Duration,
    ) -> Result<Standing<'_>, VolumeError> {
        if let Self::Freeze(_) = self {
            // Said before, so that whoever comes after us and our guards knows.
            watched.note_freeze(SystemClock.now().0.max(1));
        }
        let begun = self.stand_still(&watched.options, limit);
        begun.inspect_err(|_| watched.note_freeze(0))
    }

    fn stand_still(
        &mut self,
        options: &VolumeOptions,
        limit: Duration,
    ) -> Result<Standing<'_>, VolumeError> {
        let path = &options.device;
        match self {
            Self::Freeze(systems) => {
                let mut frozen = Vec::with_capacity(systems.len());
                for mounted in systems {
                    let one = mounted.guard.freeze(limit, PATIENCE);
                    frozen.push(one.map_err(io_at("freeze", path))?);
                }
                Ok(Standing::Frozen(frozen))
            }
            Self::Fence => match fence(options)? {
                Some(fence) => {
                    // What was written to the node and lies in its page cache belongs to this moment.
                    drop(fs::sync_data(&**fence.file()));
                    Ok(Standing::Fenced(fence))
                }
                // Somebody has come meanwhile.
                None => Err(crate::tracker::refused(
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
        let ended = self.go_on();
        watched.note_freeze(0);
        ended
    }

    fn go_on(self) -> (Duration, bool) {
        match self {
            Self::Frozen(mut all) => {
                let (mut longest, mut whole) = (Duration::ZERO, true);
                while let Some(one) = all.pop() {
                    match one.thaw() {
                        // Writers wait from the beginning of the call.
                        Ok(thawed) => {
                            longest = longest.max(thawed.call.saturating_add(thawed.frozen));
                        }
                        Err(_) => whole = false,
                    }
                }
                (longest, whole)
            }
            Self::Fenced(_) | Self::Moving => (Duration::ZERO, true),
        }
    }

    /// What a sample of this moment is.
    pub(crate) const fn occasion(&self) -> Occasion {
        if self.is_quiet() {
            Occasion::Still
        } else {
            Occasion::Closing
        }
    }

    /// Whether nobody can be writing.
    pub(crate) const fn is_quiet(&self) -> bool {
        !matches!(self, Self::Moving)
    }
}
