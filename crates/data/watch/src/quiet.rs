//! Making a volume stand still for a moment.
//!
//! | the volume | by | the image then is |
//! |---|---|---|
//! | a file system is mounted from it | freezing it (each, for a disk with several) | `frozen` |
//! | nobody uses it | the fence, for that moment | `unmounted` |
//! | a program can write it directly, or a file system cannot be frozen, and nothing is written | nothing | `instant` |
//! | the same, and something is | nothing | `none`: parts of it are of different moments |
//!
//! The fence keeps mounts and other exclusive users away, a freeze its own file system; neither keeps away who has a node of the
//! volume, of its disk or of a partition open plainly. So those are looked for just before, and whoever closes a generation sees
//! for himself that nothing is written: see [`Watched::drain_still`].
//!
//! **Invariant**: while it stands still nothing of ours writes to a file system, logs, or opens a file.

use blktide_format::manifest::Consistency;
use blktide_sys::blockdev::{BlockDevice, FreezeError, thaw};
use blktide_sys::clock::SystemClock;
use blktide_sys::fence::Fenced;
use blktide_sys::fs;
use blktide_sys::mounts::{DeviceNumber, Reachable};
use blktide_types::clock::{Clock, Instant};
use blktide_volume::error::Refusal;
use blktide_volume::{VolumeError, VolumeOptions};
use std::os::fd::OwnedFd;
use std::time::Duration;

use crate::attach::{claim, fence, writers_of};
use crate::guard::{Frozen, Guard, GuardError, LIMIT_MAX};
use crate::limits::{FreezeLimits, PATIENCE_MAX};
use crate::note::{FreezeNote, LeftOver};
use crate::tracker::{Watched, io_at};
use blktide_sys::spawn::Program;

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

/// What is mounted from it, one by one, anywhere.
fn mounts_of(options: &VolumeOptions) -> Result<Vec<Reachable>, VolumeError> {
    let path = &options.device;
    let device = BlockDevice::at(path).map_err(io_at("look at", path))?;
    device
        .mounts_anywhere()
        .map_err(io_at("find the mounts of", path))
}

/// How long after its begin a freeze of ours, whose control side and guards were killed, may yet come to be.
pub(crate) const LEFT_OVER: Duration =
    Duration::from_secs(PATIENCE_MAX.as_secs() + LIMIT_MAX.as_secs());

/// Thaws what a control side has left frozen that was killed together with its guards. What is not frozen stays as it is.
pub(crate) fn thaw_left_over(options: &VolumeOptions) {
    for mount in mounts_of(options).unwrap_or_default() {
        if let Ok(folder) = mount.open() {
            drop(thaw(&folder));
        }
    }
}

/// Who else can write, and when that was looked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Look {
    /// Nobody, as far as is known.
    alone: bool,
    /// Its end.
    pub(crate) at: Instant,
    pub(crate) took: Duration,
}

/// Whether a kind of file system can be frozen (vfat and squashfs cannot).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Freezing {
    /// As far as is known.
    Can,
    Cannot,
}

/// A file system that is to be frozen.
#[derive(Debug)]
pub(crate) struct Mounted {
    number: DeviceNumber,
    /// Nobody can write through any of its mounts.
    read_only: bool,
    freezing: Freezing,
    guard: Guard,
    /// For syncing it.
    folder: OwnedFd,
}

impl Quiet {
    /// What can be done about this device now. Starts the guards, from `program`.
    pub(crate) fn of(options: &VolumeOptions, program: &Program) -> Result<Self, VolumeError> {
        let mounts = mounts_of(options)?;
        if mounts.is_empty() {
            return Ok(fence(options)?.map_or(Self::Impossible, |_| Self::Fence));
        }
        let mut systems: Vec<Mounted> = Vec::new();
        for mount in &mounts {
            if !is_one_of(&systems, mount)
                && let Some(mounted) = Mounted::of(mount, program)?
            {
                systems.push(mounted);
            }
        }
        // One that cannot be had goes on, whatever becomes of the others.
        let all = mounts.iter().all(|mount| is_one_of(&systems, mount));
        Ok(if all {
            Self::Freeze(systems)
        } else {
            Self::Impossible
        })
    }

    /// What an image is of a moment at which nobody else can write.
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

    /// Looks who else can write, just before [`Self::begin`]. Waits: there may be many processes to look at.
    ///
    /// Errors: `Refused` with `in-use`: somebody has come since it was decided how to make it stand still.
    pub(crate) fn look(&mut self, options: &VolumeOptions) -> Result<Look, VolumeError> {
        let come = |what: &str| {
            let message = format!("{} {what} during the backup", options.device.display());
            crate::tracker::refused(Refusal::InUse, message)
        };
        let from = SystemClock.now();
        let mut alone = writers_of(options)?.is_empty();
        match self {
            Self::Freeze(systems) => {
                let mounts = mounts_of(options)?;
                if !mounts.iter().all(|mount| is_one_of(systems, mount)) {
                    return Err(come("was mounted once more"));
                }
                for system in systems {
                    let mut its = mounts.iter().filter(|m| m.mount.device == system.number);
                    system.read_only = its.all(|m| m.mount.read_only);
                }
            }
            Self::Fence if !alone => return Err(come("was taken into use")),
            Self::Fence => {}
            Self::Impossible => alone = false,
        }
        let at = SystemClock.now();
        Ok(Look {
            alone,
            at,
            took: at.since(from),
        })
    }

    /// Stands still from here on, for the limit at most. Waits: for the file system's own flush.
    pub(crate) fn begin(
        &mut self,
        watched: &Watched,
        limits: &FreezeLimits,
        look: Look,
    ) -> Result<Standing<'_>, VolumeError> {
        let options = &watched.options;
        let path = &options.device;
        let busy = |what: &str| {
            let message = format!("{} {what}", path.display());
            crate::tracker::refused(Refusal::InUse, message)
        };
        match self {
            Self::Freeze(systems) => {
                if watched.left_over().is_some_and(LeftOver::is_under_way) {
                    return Err(busy("is still being frozen by a backup that was given up"));
                }
                let mut alone = look.alone;
                // Said before, so that whoever comes after us and our guards knows.
                let note = watched.note_freeze(SystemClock.now());
                let patience = limits.patience.min(PATIENCE_MAX);
                let mut calls = Vec::with_capacity(systems.len());
                // Nothing is asked of the memory from here on.
                let mut all = Vec::with_capacity(systems.len());
                let failed = systems.iter_mut().find_map(|mounted| {
                    let asked = mounted.freeze(limits.limit, patience, &note);
                    asked.map(|call| calls.push(call)).err()
                });
                if let Some(error) = failed {
                    let (_, over) = thaw_all(frozen(systems, calls.iter().copied()));
                    if over != Over::MayBeFrozen
                        && let Some(mounted) = systems.get_mut(calls.len())
                    {
                        mounted.guard.abandon(note, &error);
                    }
                    return Err(io_at("freeze", path)(error));
                }
                alone &= systems
                    .iter()
                    .all(|s| s.freezing == Freezing::Can || s.read_only);
                all.extend(frozen(systems, calls.into_iter()));
                Ok(Standing::Frozen { all, note, alone })
            }
            Self::Fence => match claim(options)? {
                Some(fence) => {
                    // What was written to the node and lies in its page cache belongs to this moment.
                    drop(fs::sync_data(&**fence.file()));
                    Ok(Standing::Fenced(fence))
                }
                None => Err(busy("was taken into use during the backup")),
            },
            Self::Impossible => Ok(Standing::Moving),
        }
    }
}

/// Those that were frozen, by calls that took so long.
fn frozen<C>(systems: &mut [Mounted], calls: C) -> impl DoubleEndedIterator<Item = Frozen<'_>>
where
    C: DoubleEndedIterator<Item = Option<Duration>> + ExactSizeIterator,
{
    let pairs = systems.iter_mut().zip(calls);
    pairs.filter_map(|(mounted, call)| Some(mounted.guard.frozen(call?)))
}

fn is_one_of(systems: &[Mounted], mount: &Reachable) -> bool {
    systems.iter().any(|s| s.number == mount.mount.device)
}

impl Mounted {
    /// How long the call took; `None`: it is of a kind that cannot be frozen, and goes on.
    fn freeze(
        &mut self,
        limit: Duration,
        patience: Duration,
        note: &FreezeNote,
    ) -> Result<Option<Duration>, GuardError> {
        if self.freezing == Freezing::Cannot {
            return Ok(None);
        }
        note.asks(self.guard.pid());
        match self.guard.ask_to_freeze(limit, patience) {
            Err(GuardError::Freeze(FreezeError::NotSupported)) => {
                self.freezing = Freezing::Cannot;
                Ok(None)
            }
            asked => asked.map(Some),
        }
    }

    fn of(mount: &Reachable, program: &Program) -> Result<Option<Self>, VolumeError> {
        // A mount of a single file; another one of the same file system will do.
        let Ok(folder) = mount.open() else {
            return Ok(None);
        };
        let copy = folder.try_clone().map_err(io_at("open", &mount.path))?;
        Ok(Some(Self {
            number: mount.mount.device,
            read_only: false,
            freezing: Freezing::Can,
            guard: Guard::start(program, copy)
                .map_err(io_at("start the thaw guard of", &mount.path))?,
            folder,
        }))
    }
}

/// A volume that stands still, or does as if.
#[derive(Debug)]
pub(crate) enum Standing<'a> {
    Frozen {
        all: Vec<Frozen<'a>>,
        note: FreezeNote,
        /// As far as is known nobody else can write: not past the file systems, nor through one that cannot be frozen.
        alone: bool,
    },
    Fenced(#[expect(dead_code, reason = "held, not used")] Fenced),
    Moving,
}

impl Standing<'_> {
    /// Goes on. Returns how long it stood still at most, and whether it did so until now.
    pub(crate) fn end(self) -> (Duration, bool) {
        match self {
            Self::Frozen { all, note, .. } => {
                let (longest, over) = thaw_all(all.into_iter());
                if over != Over::MayBeFrozen {
                    note.take_back();
                }
                (longest, over == Over::Whole)
            }
            Self::Fenced(_) | Self::Moving => (Duration::ZERO, true),
        }
    }

    /// Whether nobody can write to it, as far as is known: whether nobody does is to be seen.
    pub(crate) const fn is_alone(&self) -> bool {
        match self {
            Self::Frozen { alone, .. } => *alone,
            Self::Fenced(_) => true,
            Self::Moving => false,
        }
    }
}

/// How freezes have ended: the worst of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Over {
    /// Each lasted until it was thawed here.
    Whole,
    /// Somebody or something else has thawed one before.
    Broken,
    /// One is not known to be over.
    MayBeFrozen,
}

/// Thaws them, the last one first. Returns how long writers waited at most.
fn thaw_all<'a>(all: impl DoubleEndedIterator<Item = Frozen<'a>>) -> (Duration, Over) {
    let (mut longest, mut over) = (Duration::ZERO, Over::Whole);
    for one in all.rev() {
        match one.thaw() {
            // Writers wait from the beginning of the call.
            Ok(thawed) => longest = longest.max(thawed.call.saturating_add(thawed.frozen)),
            Err(error) => {
                if let GuardError::Expired { frozen } = error {
                    longest = longest.max(frozen);
                }
                over = over.max(if error.may_be_frozen() {
                    Over::MayBeFrozen
                } else {
                    Over::Broken
                });
            }
        }
    }
    (longest, over)
}
