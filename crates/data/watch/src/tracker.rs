//! The control side of a watched volume: one process at a time, under the volume's lock, over what lies in the kernel.
//!
//! ```text
//! open: lock ─▶ pins ─▶ memories ─▶ adopt ─▶ leftovers drained      then: drain · sample · generations · hints
//! look: pins ─▶ memories                                             only to be read, without the lock
//! ```
//! **Invariant**: whoever holds the lock may die at any moment: what it had taken from the kernel's bitmaps was in the open
//! generation before, and the table of generations is right at each store.

use blktide_engine::{Control, Engine, EngineError};
use blktide_format::shared::{SharedError, control, watch};
use blktide_sys::clock::{SystemClock, SystemRandom};
use blktide_sys::event::pause;
use blktide_sys::fs;
use blktide_types::clock::{Clock, Instant, Random, WallTime};
use blktide_types::geometry::Geometry;
use blktide_types::id::GenerationName;
use blktide_types::reason::Reason;
use blktide_types::set::BlockSet;
use blktide_types::unit::{BlockIndex, BlockSize};
use blktide_volume::bitmap::Life;
use blktide_volume::error::Refusal;
use blktide_volume::message::{Distrust, Hint, Text, VolumeState, VolumeStatus};
use blktide_volume::{VolumeError, VolumeOptions};
use std::io;
use std::path::Path;
use std::time::Duration;

use crate::counters::Counters;
use crate::marks::Marks;
use crate::memory::PinnedMemory;
use crate::note::{FreezeNote, LeftOver};
use crate::pins::{Pins, failed};
use crate::quiet::{LEFT_OVER, thaw_left_over};

/// How often a lock that is taken is tried again.
const LOOK: Duration = Duration::from_millis(5);
/// `STATE` of the control memory: tracking. (The words are those of volumes with a server.)
pub(crate) const ATTACHED: u64 = 1;
/// `STATE`: its bitmap is being stored, or given up. Whoever finds it so afterwards does not go on with it.
pub(crate) const DETACHING: u64 = 3;

/// A watched volume.
#[derive(Debug)]
pub struct Watched {
    pub(crate) options: VolumeOptions,
    pub(crate) pins: Pins,
    pub(crate) marks: Marks,
    pub(crate) counters: Counters,
    pub(crate) engine: Engine,
    pub(crate) control: Control,
    pub(crate) random: SystemRandom,
    /// None: it is only looked at.
    pub(crate) lock: Option<VolumeLock>,
}

/// The volume's lock: one control side at a time. It ends with whoever has it.
#[derive(Debug)]
pub(crate) struct VolumeLock(#[expect(dead_code, reason = "held, not used")] std::fs::File);

impl VolumeLock {
    /// Waits for `limit` at most. Errors: `Refused` with `busy`.
    pub(crate) fn take(options: &VolumeOptions, limit: Duration) -> Result<Self, VolumeError> {
        let path = options.lock();
        let folder = options.volumes_dir();
        fs::create_folders(&folder, 0o755).map_err(|e| failed("make", &folder, other(e)))?;
        let file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|e| failed("open", &path, e))?;
        let deadline = SystemClock.now().after(limit);
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Self(file)),
                Err(std::fs::TryLockError::Error(e)) => return Err(failed("lock", &path, e)),
                Err(std::fs::TryLockError::WouldBlock) if SystemClock.now() < deadline => {
                    pause(LOOK).map_err(|e| failed("wait for", &path, e))?;
                }
                Err(std::fs::TryLockError::WouldBlock) => {
                    let message = format!(
                        "volume {} is busy: a backup, or another command",
                        options.name
                    );
                    return Err(refused(Refusal::Busy, message));
                }
            }
        }
    }
}

impl Watched {
    /// Becomes the control side. Waits: for the lock, `limit` at most; for a pass over the bitmaps.
    ///
    /// Errors: `NotAttached`; `Refused` with `busy`; `Io`, `Engine` if what is pinned is not whole: attach it again.
    pub fn open(options: &VolumeOptions, limit: Duration) -> Result<Self, VolumeError> {
        let pins = Pins::of(&options.runtime_dir, &options.name)?;
        if !pins.exist() {
            return Err(not_attached(options));
        }
        let lock = VolumeLock::take(options, limit)?;
        let mut watched = Self::over(options, pins)?;
        watched.lock = Some(lock);
        let fresh = (watched.fresh(), SystemClock.wall());
        watched.control.adopt(fresh);
        if let Some(left) = watched.left_over() {
            thaw_left_over(options);
            // One that is not complete cannot be thawed yet: it is tried at the next opening as well.
            if left.is_over(LEFT_OVER) {
                watched.marks.set_word(watch::FROZEN_SINCE, 0);
            }
        }
        // What a predecessor had closed and not taken; before the first swap (P14).
        watched.take_closed(&mut |_| {});
        Ok(watched)
    }

    /// Only looks: nothing may be changed through it, and what it tells may be between two states of a control side at work.
    pub fn look(options: &VolumeOptions) -> Result<Self, VolumeError> {
        let pins = Pins::of(&options.runtime_dir, &options.name)?;
        if !pins.exist() {
            return Err(not_attached(options));
        }
        Self::over(options, pins)
    }

    /// Over the pins as they are.
    pub(crate) fn over(options: &VolumeOptions, pins: Pins) -> Result<Self, VolumeError> {
        let control = PinnedMemory::open(&pins, "control")?;
        let banks = PinnedMemory::open(&pins, "banks")?;
        let engine = Engine::open(&control, &banks).map_err(engine_error)?;
        if engine.word(control::STATE) == DETACHING {
            return Err(not_attached(options));
        }
        let marks = Marks::new(PinnedMemory::open(&pins, "marks")?)?;
        Self::of_parts(options, pins, marks, engine)
    }

    /// Of what was opened, or made. It has no lock yet.
    pub(crate) fn of_parts(
        options: &VolumeOptions,
        pins: Pins,
        marks: Marks,
        engine: Engine,
    ) -> Result<Self, VolumeError> {
        Ok(Self {
            counters: Counters::open(&pins)?,
            control: engine.control(),
            options: options.clone(),
            random: SystemRandom::new(),
            lock: None,
            pins,
            marks,
            engine,
        })
    }

    /// The volume's shape, in the image's blocks.
    pub fn geometry(&self) -> Geometry {
        self.engine.shape().geometry
    }

    /// Unit of one bit that the kernel marks.
    pub const fn grain(&self) -> BlockSize {
        self.marks.shape().grain
    }

    /// A freeze that is noted in the kernel's memory.
    pub(crate) fn left_over(&self) -> Option<LeftOver> {
        LeftOver::of(&|index| self.marks.word(index), SystemClock.now())
    }

    /// Notes in the kernel's memory that a freeze of ours may begin.
    pub(crate) fn note_freeze(&self, now: Instant) -> FreezeNote {
        FreezeNote::begin(self.marks.shared(), now.0)
    }

    pub(crate) fn fresh(&self) -> GenerationName {
        GenerationName(self.random.id())
    }

    /// Ends the kernel's generation and takes what was marked in it: it is in the open generation of the tracker when this
    /// returns. Returns the blocks.
    ///
    /// A write that was under way is marked once more when it is done, if the device has requests; else only a freeze gives
    /// a moment at which none is.
    pub fn drain(&mut self) -> BlockSet {
        let mut blocks = BlockSet::new(self.geometry().block_count());
        self.marks.swap();
        self.take_closed(&mut |block| {
            blocks.insert(block);
        });
        blocks
    }

    /// What was marked since the tracker's open generation began, and is not in the kernel's live bitmap only; everything, if that is
    /// not known.
    pub(crate) fn in_open_generation(&self) -> BlockSet {
        let open = self.control.generations().last().map(|g| g.name);
        let known = open.and_then(|name| self.control.changed_since(name).ok());
        known.unwrap_or_else(|| BlockSet::full(self.geometry().block_count()))
    }

    fn take_closed(&self, each: &mut dyn FnMut(BlockIndex)) {
        let (grain, geometry) = (self.grain(), self.geometry());
        self.marks.drain_closed(|index, bits| {
            self.control.absorb(grain, index, bits);
            blocks_of(&geometry, grain, (index, bits), each);
        });
    }

    /// Bytes changed since each generation opened, `None` for a name that is not known, or while nothing is believed; and why.
    ///
    /// Waits: a pass over the bitmaps.
    pub fn changed_since(
        &self,
        generations: &[GenerationName],
    ) -> (Vec<Option<u64>>, Option<Distrust>) {
        let pending = self.pending();
        let bytes = |name: &GenerationName| {
            let mut set = self.control.changed_since(*name).ok()?;
            set.union_with(&pending);
            Some(self.bytes_in(&set))
        };
        (generations.iter().map(bytes).collect(), self.distrusted())
    }

    /// What is marked and not taken yet.
    fn pending(&self) -> BlockSet {
        let (grain, geometry) = (self.grain(), self.geometry());
        let mut blocks = BlockSet::new(geometry.block_count());
        for word in self.marks.peek() {
            blocks_of(&geometry, grain, word, &mut |block| {
                blocks.insert(block);
            });
        }
        blocks
    }

    fn bytes_in(&self, set: &BlockSet) -> u64 {
        let geometry = self.geometry();
        set.runs().map(|run| geometry.bytes_of(run).1).sum()
    }

    /// Which boundaries to keep apart (P2); replaces all earlier hints.
    pub fn hints(&mut self, hints: &[Hint]) {
        for old in self.control.hints() {
            if !hints.iter().any(|h| h.repository.0 == old.repository) {
                self.control.drop_hint(old.repository);
            }
        }
        for hint in hints {
            // One that is dropped for want of room costs the next backup there a few more reads.
            let _dropped = self.control.set_hint(hint.repository.0, hint.generation.0);
        }
    }

    /// A full image was committed whose instant opened `generation`: trusted from there on. False if it has been forgotten.
    pub fn trust(&mut self, generation: GenerationName) -> bool {
        self.control.trust(generation)
    }

    /// Why nothing is believed, if so.
    pub fn distrusted(&self) -> Option<Distrust> {
        let trust = self.control.trusted();
        trust.reason.map(|reason| Distrust {
            reason: reason.code().to_owned(),
            since_ns: trust.since.0,
            detail: self.control.distrust_detail(),
        })
    }

    /// Nothing is believed any more.
    pub(crate) fn distrust(&mut self, reason: Reason, detail: &str) {
        let fresh = self.fresh();
        let at = (reason, SystemClock.wall());
        self.control.distrust(at, detail, fresh);
    }

    /// Facts. Touches no device. Waits: a pass over the bitmaps.
    pub fn status(&self) -> VolumeStatus {
        let geometry = self.geometry();
        let open = self.control.generations().last().copied();
        let name = open.map_or(GenerationName::NONE, |g| g.name);
        let changed = self.changed_since(&[name]).0.first().copied().flatten();
        VolumeStatus {
            name: self.options.name.clone(),
            state: if self.engine.word(control::STATE) == ATTACHED {
                VolumeState::Attached
            } else {
                VolumeState::Attaching
            },
            pid: 0,
            keeper_pid: 0,
            volume_id: Life::of_words(&self.engine).volume.to_string(),
            node: self.options.device.clone(),
            loop_device: None,
            device: self.options.device.clone(),
            volume_bytes: geometry.volume_bytes(),
            block_size_bytes: geometry.block_size().bytes(),
            grain_bytes: self.grain().bytes(),
            logical_sector_bytes: geometry.logical_sector_bytes(),
            physical_sector_bytes: geometry.physical_sector_bytes(),
            generation: Text(name),
            generation_number: open.map_or(0, |g| g.counter),
            changed_bytes: changed.unwrap_or(0),
            distrust: self.distrusted(),
            takeovers: 0,
            longest_pause_ns: 0,
            requests: self.counters.read().map_or(0, |c| c.events),
            requests_finished: 0,
            snapshot: None,
            warnings: Vec::new(),
        }
    }

    /// When the tracker's open generation began, for people.
    pub fn opened(&self) -> Option<WallTime> {
        self.control.generations().last().map(|g| g.opened)
    }
}

/// The blocks that a word of the kernel's bitmap touches, ascending, each once.
fn blocks_of(
    geometry: &Geometry,
    grain: BlockSize,
    (index, bits): (usize, u64),
    each: &mut dyn FnMut(BlockIndex),
) {
    let ratio = geometry.block_size().shift().saturating_sub(grain.shift());
    let base = u64::try_from(index).unwrap_or(u64::MAX).saturating_mul(64);
    let mut left = bits;
    while left != 0 {
        let bit = u64::from(left.trailing_zeros());
        let block = base.saturating_add(bit) >> ratio;
        if block < geometry.block_count().0 {
            each(BlockIndex(block));
        }
        // The other grains of that block say nothing new.
        let next = (block.saturating_add(1) << ratio).saturating_sub(base);
        let skip = u32::try_from(next).unwrap_or(64);
        left &= u64::MAX.checked_shl(skip).unwrap_or(0);
    }
}

pub(crate) fn not_attached(options: &VolumeOptions) -> VolumeError {
    VolumeError::NotAttached {
        name: options.name.clone(),
        source: io::ErrorKind::NotFound.into(),
    }
}

pub(crate) const fn refused(kind: Refusal, message: String) -> VolumeError {
    VolumeError::Refused { kind, message }
}

pub(crate) const fn engine_error(source: EngineError) -> VolumeError {
    VolumeError::Engine { source }
}

pub(crate) fn shared_error(error: SharedError) -> VolumeError {
    VolumeError::Layout {
        why: error.to_string(),
    }
}

pub(crate) fn other(error: impl std::error::Error + Send + Sync + 'static) -> io::Error {
    io::Error::other(error)
}

/// What `path` is said to be in an error.
pub(crate) fn io_at<E>(what: &'static str, path: &Path) -> impl FnOnce(E) -> VolumeError
where
    E: std::error::Error + Send + Sync + 'static,
{
    let path = path.to_owned();
    move |e| failed(what, &path, other(e))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// trap TD7: finer grains fall into the blocks that hold them, past the volume's end into none.
    #[test]
    fn words_of_finer_grains_are_blocks() {
        let (block, grain) = (
            BlockSize::new(65536).unwrap(),
            BlockSize::new(4096).unwrap(),
        );
        let geometry = Geometry::new(10 * 65536 + 4096, block, block, 512, 4096).unwrap();
        let blocks = |index, bits| {
            let mut found = Vec::new();
            blocks_of(&geometry, grain, (index, bits), &mut |b| found.push(b.0));
            found
        };
        assert_eq!(blocks(0, 0), Vec::<u64>::new());
        assert_eq!(blocks(0, u64::MAX), [0, 1, 2, 3]);
        assert_eq!(blocks(1, 1 << 15 | 1 << 16 | 1 << 63), [4, 5, 7]);
        assert_eq!(
            blocks(2, u64::MAX),
            [8, 9, 10],
            "the last block is short, and there is none after it"
        );
        let same = |index, bits| {
            let mut found = Vec::new();
            blocks_of(&geometry, block, (index, bits), &mut |b| found.push(b.0));
            found
        };
        assert_eq!(same(0, 1 | 1 << 10 | 1 << 11), [0, 10]);
    }
}
