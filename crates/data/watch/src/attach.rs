//! Beginning to watch, and ending it.
//!
//! ```text
//! attach:  lock ─▶ obstacles? ─▶ load, pin (_NAME) ─▶ links: marks from here on ─▶ fence, if nobody uses it
//!          ─▶ hand-over of the bitmap: marker 'open', file consumed ─▶ NAME: attached ─▶ fence let go
//! detach:  closed (the fence is ours): drained, evidence, stored ─▶ pins gone
//!          live: marker says why, durable ─▶ pins gone
//! ```
//! **Invariant**: a stored bitmap is believed only if the links were there, and then the fence was ours, before its evidence was
//! looked at, and until the marker says 'open'; and it is stored only if nothing was marked since it was taken. Of a volume in use
//! nothing is believed.

use blktide_device::DeviceError;
use blktide_engine::Engine;
use blktide_engine::evidence::Occasion;
use blktide_format::shared::{self, Shape, WatchShape, control};
use blktide_sys::blockdev::{BlockDevice, Opener};
use blktide_sys::fence::Fenced;
use blktide_sys::{SysError, fs};
use blktide_types::geometry::Geometry;
use blktide_types::reason::Reason;
use blktide_types::unit::BlockSize;
use blktide_volume::bitmap::{self, HandoverDevice, Writers};
use blktide_volume::error::Refusal;
use blktide_volume::{VolumeError, VolumeOptions};
use std::sync::Arc;
use std::time::Duration;

use crate::counters::Running;
use crate::marker::{Marker, Plan, grain_for};
use crate::marks::Marks;
use crate::memory::PinnedMemory;
use crate::pins::{Pins, Unfinished};
use crate::probe::probe;
use crate::target::Target;
use crate::tracker::{ATTACHED, DETACHING, VolumeLock, Watched, engine_error, io_at, refused};

/// The longest that a bank of the engine may be for twelve of them to be kept in the kernel's memory, bytes.
const BANK_BYTES_MANY: usize = 8 << 20;

/// How an attach went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attached {
    /// It is watched from now on.
    Now,
    /// It was watched already.
    Before,
}

/// Begins to watch the volume; on a device that is in use as well: nothing of its way changes. `say` is told what was found.
///
/// Waits: for the kernel's check of the programs (a tenth of a second), for flushes of the state folder's disk.
/// Errors: `Refused` with `unwatchable` and why: what stands against the device, or what the kernel lacks; `Io` with the kernel's
/// words. Then nothing has changed, but for a bitmap of an earlier life that may be distrusted.
pub fn attach(
    options: &VolumeOptions,
    limit: Duration,
    say: &dyn Fn(&str),
) -> Result<Attached, VolumeError> {
    let pins = Pins::of(&options.runtime_dir, &options.name)?;
    let lock = VolumeLock::take(options, limit)?;
    let target = Target::of(&options.device)?;
    if pins.exist() {
        if is_whole(options, &pins, &target) {
            return Ok(Attached::Before);
        }
        say("what the kernel has of it is not whole, or of another device: begun anew");
        pins.remove()?;
    }
    refuse_obstacles(&target)?;
    let unfinished = pins.begin().map_err(|e| explained(&target, e))?;
    let mut watched = load(options, &target, &unfinished).map_err(|e| explained(&target, e))?;
    // No sooner: while it is ours a mount is refused. What is written before it is marked already.
    let fence = fence(options)?;
    let device = handover_device(options, &target, fence.as_ref())?;
    let writers = if fence.is_some() {
        Writers::None
    } else {
        Writers::Perhaps
    };
    let (engine, tracker) = (watched.engine.clone(), &mut watched.control);
    bitmap::open(options, (&device, writers), &engine, tracker, say)?;
    watched.begin_evidence(&target, fence.is_some())?;
    engine.set_word(control::STATE, ATTACHED);
    engine.set_word(control::SERVING, 1);
    unfinished.publish()?;
    drop((fence, lock));
    Ok(Attached::Now)
}

/// Whether what is pinned watches this device, and can be gone on with.
fn is_whole(options: &VolumeOptions, pins: &Pins, target: &Target) -> bool {
    let Ok(watched) = Watched::over(options, pins.clone()) else {
        return false;
    };
    let shape = watched.marks.shape();
    watched.engine.word(control::STATE) == ATTACHED
        && shape.device == packed(target.disk.major, target.disk.minor)
        && (shape.start_sector, shape.sectors) == (target.start_sector, target.sectors)
        && Running::of(pins).is_whole()
}

/// Two numbers in a word.
pub(crate) fn packed(high: u32, low: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

fn refuse_obstacles(target: &Target) -> Result<(), VolumeError> {
    if target.obstacles.is_empty() {
        return Ok(());
    }
    let path = &target.path;
    let each = target.obstacles.iter();
    let texts: Vec<String> = each
        .map(|o| format!("{o} [{}]. {}", o.code(), o.hint(path)))
        .collect();
    let message = format!("{} cannot be watched: {}", path.display(), texts.join("; "));
    Err(refused(Refusal::Unwatchable, message))
}

/// In plain words, if it failed because the kernel does not take the programs at all.
fn explained(target: &Target, error: VolumeError) -> VolumeError {
    let Err(missing) = probe() else {
        return error;
    };
    let message = format!("{} cannot be watched: {missing}", target.path.display());
    refused(Refusal::Unwatchable, message)
}

/// The fence, if nobody uses the device, and nobody has it open so that he could write: the fence itself does not keep him away.
pub(crate) fn fence(options: &VolumeOptions) -> Result<Option<Fenced>, VolumeError> {
    // First: as long as the fence is ours a mount is refused, and there may be many processes to look at.
    if writers_of(options)?.is_empty() {
        claim(options)
    } else {
        Ok(None)
    }
}

/// The fence, if nobody else has claimed the device.
pub(crate) fn claim(options: &VolumeOptions) -> Result<Option<Fenced>, VolumeError> {
    let path = &options.device;
    match Fenced::try_take(path) {
        Ok(taken) => Ok(taken),
        Err(SysError::Unfit { on, why }) => Err(VolumeError::Device {
            source: DeviceError::Unfit { path: on, why },
        }),
        Err(e) => Err(io_at("open", path)(e)),
    }
}

/// Who could write past a file system, and past the fence.
pub(crate) fn writers_of(options: &VolumeOptions) -> Result<Vec<Opener>, VolumeError> {
    let path = &options.device;
    let device = BlockDevice::at(path).map_err(io_at("look at", path))?;
    let writers = device.writers();
    writers.map_err(io_at("look for writers of", path))
}

pub(crate) fn handover_device(
    options: &VolumeOptions,
    target: &Target,
    fence: Option<&Fenced>,
) -> Result<HandoverDevice, VolumeError> {
    let open = || fs::open_direct_read(&options.device).map_err(io_at("open", &options.device));
    Ok(HandoverDevice {
        reader: open()?,
        flushed: match fence {
            Some(fence) => Arc::clone(fence.file()),
            None => Arc::new(open()?),
        },
        volume_bytes: target.limits.volume_bytes,
    })
}

fn shape(options: &VolumeOptions, target: &Target) -> Result<Shape, VolumeError> {
    let layout = |why: &str| VolumeError::Layout {
        why: why.to_owned(),
    };
    let block = BlockSize::new(options.block_size_bytes)
        .ok_or_else(|| layout("the block size is no power of two from 4096 to 1048576"))?;
    let limits = &target.limits;
    let geometry = Geometry::new(
        limits.volume_bytes,
        block,
        // The tracker counts what the image has; the kernel's bitmaps are finer.
        block,
        limits.logical_sector_bytes,
        limits.physical_sector_bytes,
    );
    let geometry = geometry
        .ok_or_else(|| layout("block, sector and size of the volume do not fit together"))?;
    let mut shape = Shape::usual(geometry);
    (shape.queues, shape.slots, shape.slot_payload_bytes) = (1, 1, 4096);
    shape.log_bytes = 4096;
    if shape.bank_words().saturating_mul(shared::WORD_BYTES) > BANK_BYTES_MANY {
        shape.banks = 4;
    }
    Ok(shape)
}

/// Loads everything; when it returns, everything is marked. No tracker has begun yet.
fn load(
    options: &VolumeOptions,
    target: &Target,
    unfinished: &Unfinished,
) -> Result<Watched, VolumeError> {
    let shape = shape(options, target)?;
    let block = shape.geometry.block_size();
    let asked = BlockSize::new(options.grain_bytes).unwrap_or(block);
    let plan = Plan {
        target,
        watch: WatchShape {
            volume: bitmap::volume_id(options)?,
            grain: grain_for(target.limits.volume_bytes, asked, block),
            device: packed(target.disk.major, target.disk.minor),
            start_sector: target.start_sector,
            sectors: target.sectors,
            bio_based: target.bio_based,
        },
        engine: shape,
    };
    let marker = Marker::load(&plan, unfinished)?;
    let pins = unfinished.as_pins();
    let memory = PinnedMemory::open(&pins, "marks")?;
    for (index, value) in plan.watch.head() {
        if let Some(word) = memory.words().get(index) {
            word.store(value, std::sync::atomic::Ordering::SeqCst);
        }
    }
    let marks = Marks::new(memory)?;
    let (control, banks) = (
        PinnedMemory::open(&pins, "control")?,
        PinnedMemory::open(&pins, "banks")?,
    );
    let engine = Engine::create(&control, &banks, shape).map_err(engine_error)?;
    marker.run(unfinished)?;
    Watched::of_parts(options, pins, marks, engine)
}

/// How a volume was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detached {
    /// Closed: its bitmap is stored, and believed at the next attach unless somebody writes meanwhile.
    Stored,
    /// In use: nothing marks any more, and the next backup reads everything.
    Live,
}

/// Whether a volume that is in use is to be let go of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InUse {
    /// No: `Refused` with `in-use`.
    Refuse,
    /// Yes; its bitmap is lost.
    LetGo,
}

/// Ends watching. Waits: for the lock; for flushes of the device and of the state folder's disk.
pub fn detach(
    options: &VolumeOptions,
    in_use: InUse,
    limit: Duration,
) -> Result<Detached, VolumeError> {
    let pins = Pins::of(&options.runtime_dir, &options.name)?;
    if !pins.exist() {
        return Err(crate::tracker::not_attached(options));
    }
    let mut watched = match Watched::open(options, limit) {
        Ok(watched) => watched,
        Err(e @ VolumeError::Refused { .. }) => return Err(e),
        // What is not whole, or was being detached by somebody who died: the marker says what is to be believed.
        Err(_) => return pins.remove().map(|()| Detached::Live),
    };
    let target = Target::of(&options.device);
    let fence = match &target {
        Ok(_) => fence(options)?,
        // The device is gone: nobody can use it, and nobody can say what became of it.
        Err(_) => None,
    };
    let detached = match (target, fence) {
        (Ok(target), Some(fence)) => {
            watched.store(&target, &fence)?;
            Detached::Stored
        }
        (target, _) => {
            if in_use == InUse::Refuse {
                return Err(in_use_by(options));
            }
            if let Ok(target) = target {
                let device = handover_device(options, &target, None)?;
                let reason = Reason::TrackingInterrupted;
                watched.engine.set_word(control::STATE, DETACHING);
                bitmap::give_up(options, &device, &watched.engine, reason)?;
            }
            Detached::Live
        }
    };
    pins.remove()?;
    Ok(detached)
}

fn in_use_by(options: &VolumeOptions) -> VolumeError {
    let writers = writers_of(options).unwrap_or_default();
    let names: Vec<String> = writers.iter().map(ToString::to_string).collect();
    let by = if names.is_empty() {
        String::new()
    } else {
        format!(": open for writing by {}", names.join(", "))
    };
    let message = format!("{} is in use{by}", options.device.display());
    refused(Refusal::InUse, message)
}

impl Watched {
    /// Stores the bitmap: the fence is ours.
    fn store(&mut self, target: &Target, fence: &Fenced) -> Result<(), VolumeError> {
        let options = self.options.clone();
        // What is in the page cache of the device's node is written, and marked, now.
        drop(fs::sync_data(&**fence.file()));
        self.drain();
        self.check(target, Occasion::Still);
        let device = handover_device(&options, target, Some(fence))?;
        // From here on nobody goes on with what is in the kernel: a bitmap that was stored might be believed.
        self.engine.set_word(control::STATE, DETACHING);
        bitmap::close(&options, &device, &self.engine, &self.control)?;
        // The fence keeps mounts away, not somebody who opens the node and writes, now or when nothing marks any more.
        let came = writers_of(&options).map_or(true, |writers| !writers.is_empty());
        let (reason, error) = if !self.drain().is_empty() {
            let path = options.device.display();
            let message = format!("{path} was written while its bitmap was being stored");
            (Reason::ForeignWrite, refused(Refusal::InUse, message))
        } else if came {
            (Reason::TrackingInterrupted, in_use_by(&options))
        } else {
            return Ok(());
        };
        bitmap::give_up(&options, &device, &self.engine, reason)?;
        self.engine.set_word(control::STATE, ATTACHED);
        Err(error)
    }
}
