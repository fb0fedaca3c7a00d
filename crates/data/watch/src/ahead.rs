//! A consistent image of a volume that nothing preserves originals of: copied ahead, then frozen for the last blocks.
//!
//! ```text
//! begin ─▶ swap, drain ─▶ [copy ─▶ swap, drain] … ─▶ sync, swap, drain ─▶ copy
//!                              └ until what is left fits the budget          │
//!   freeze ─▶ swap, drain ─▶ evidence ─▶ last blocks into memory ─▶ next generation opens ─▶ thaw ─▶ stored
//!      ├ too much is left: thaw, and copy once more
//!      └ completions went unseen: thaw, copy once more all that was drained, and swap in freezes only from here on
//! ```
//! **Invariant** (P14): the generation that opens inside the freeze is the image's. An early copy of a block counts only if the
//! block was marked in no kernel generation opened since that copy began: a block that is drained is copied again, and one
//! that is drained in the freeze is copied in it. A write that was under way at a swap is marked once more when it completes; were
//! all completions since the begin seen? Only then the early copies count; else those of all that was drained are void, and the
//! swaps from then on are in freezes, when nothing is under way.
//!
//! Everything that was drained is in the tracker's open generation, whether an image comes of it or not: who dies here, or gives
//! up, has lost nothing.

use blktide_engine::PreparedGeneration;
use blktide_engine::evidence::Occasion;
use blktide_format::manifest::Consistency;
use blktide_sys::clock::SystemClock;
use blktide_sys::event::pause;
use blktide_sys::fs;
use blktide_sys::spawn::Program;
use blktide_types::clock::Clock;
use blktide_types::geometry::Geometry;
use blktide_types::id::GenerationName;
use blktide_types::io::{BlockOutcome, RevokeCause, SourceError};
use blktide_types::range::BlockRange;
use blktide_types::set::BlockSet;
use blktide_volume::message::Distrust;
use blktide_volume::{VolumeError, VolumeOptions};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::copy::{Last, Reader};
use crate::evidence::{Completions, Marked};
use crate::image::InstantImage;
use crate::limits::{FreezeLimits, OverBudget};
use crate::quiet::{Look, Quiet, Standing};
use crate::still::Still;
use crate::target::Target;
use crate::tracker::{Watched, engine_error, io_at};

/// Bytes that are read in a freeze at most: they wait in memory.
const LAST_BYTES_MAX: u64 = 256 << 20;
/// What a freeze costs beside the copying, as far as it is known before: the file system's own flush.
const FREEZE_CALL: Duration = Duration::from_millis(20);
/// How much quicker several readers are than one, at least.
const QUEUE_GAIN: u64 = 2;
/// Freezes, at most, in which something is written although nobody should be able to, before that is accepted.
pub(crate) const UNQUIET_MAX: u32 = 5;
/// Between two of them that follow each other at once.
pub(crate) const UNQUIET_PAUSE: Duration = Duration::from_millis(50);
/// A look at all processes that takes longer is followed by one more round before the freeze; and how long it holds then.
const LOOK_SHORT: Duration = Duration::from_millis(50);
const LOOK_HOLDS: Duration = Duration::from_secs(5);
/// A round that reads less says nothing of the device's speed.
const TELLING_BYTES: u64 = 4 << 20;

/// What a backup of a watched volume asks for.
#[derive(Clone, Debug)]
pub struct AheadRequest {
    /// What thaw guards are started from: `blktided`.
    pub guard: Arc<Program>,
    /// The generation that opened at the base image's instant.
    pub base: Option<GenerationName>,
    /// What the base has no content of.
    pub absent: Option<BlockSet>,
    /// How long the volume may stand still.
    pub limits: FreezeLimits,
}

/// What comes after a round.
#[derive(Debug)]
pub enum Next {
    /// These are to be copied (again); then ask once more.
    Copy(BlockSet),
    /// The instant has been.
    Instant(Arc<InstantImage>),
}

/// A volume that is being copied ahead. It is its volume's control side until it is dropped.
#[derive(Debug)]
pub struct Ahead {
    options: VolumeOptions,
    guard: Arc<Program>,
    reader: Arc<Reader>,
    limits: FreezeLimits,
    base: Option<GenerationName>,
    resolved: bool,
    distrust: Option<Distrust>,
    first: BlockSet,
    /// Of this round: bytes read, and the time that all threads together took for it.
    read_bytes: AtomicU64,
    read_nanos: AtomicU64,
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
pub(crate) struct State {
    pub(crate) watched: Watched,
    target: Target,
    wanted: BlockSet,
    changed: Option<BlockSet>,
    /// All that may have been under way at the begin or at a swap since: what early copies may be stale of.
    drained: BlockSet,
    /// At the begin.
    completions: Option<Completions>,
    ends: Ends,
    /// Who else can write, if that took long to find out.
    looked: Option<Look>,
    /// Freezes in which something was written all the same.
    unquiet: u32,
    round: u32,
    /// How it will be made to stand still, once the next round is to be the last: guards keep a file system from being unmounted,
    /// and must not do so for the hours of a first copy.
    quiet: Option<Quiet>,
    /// Bytes a second, as the last telling round had them.
    speed: Option<u64>,
    longest: Duration,
}

impl Ahead {
    /// Begins. Waits: for the volume's lock; for a pass over the bitmaps; a short freeze if the device has no requests.
    ///
    /// Errors: `NotAttached`, `Refused` with `busy`; `Refused` with `unwatchable` where no image could be believed.
    pub fn begin(
        options: &VolumeOptions,
        request: &AheadRequest,
        limit: Duration,
    ) -> Result<Self, VolumeError> {
        let mut watched = Watched::open(options, limit)?;
        let target = Target::of(&options.device)?;
        let device =
            fs::open_direct_read(&options.device).map_err(io_at("open", &options.device))?;
        let geometry = watched.geometry();
        let mut longest = Duration::ZERO;
        let ends = if target.bio_based {
            Ends::InFreezes
        } else {
            Ends::Anywhere
        };
        let how = Still {
            guard: &request.guard,
            limits: request.limits,
        };
        let (completions, drained) = how.begin(&mut watched, &target, &mut longest)?;
        let distrust = watched.distrusted();
        let resolved =
            distrust.is_none() && request.base.is_some_and(|b| watched.control.resolves(b));
        let changed = match request.base {
            Some(base) if resolved => {
                Some(watched.control.changed_since(base).map_err(engine_error)?)
            }
            Some(_) | None => None,
        };
        let mut first = match &changed {
            Some(changed) => changed.clone(),
            None => BlockSet::full(geometry.block_count()),
        };
        if let Some(absent) = &request.absent {
            first.union_with(absent);
        }
        Ok(Self {
            reader: Arc::new(Reader { device, geometry }),
            options: options.clone(),
            guard: Arc::clone(&request.guard),
            limits: request.limits,
            base: request.base,
            resolved,
            distrust,
            state: Arc::new(Mutex::new(State {
                watched,
                target,
                wanted: first.clone(),
                changed,
                drained,
                completions,
                ends,
                looked: None,
                unquiet: 0,
                round: 0,
                quiet: None,
                speed: None,
                longest,
            })),
            first,
            read_bytes: AtomicU64::new(0),
            read_nanos: AtomicU64::new(0),
        })
    }

    /// The volume's shape.
    pub fn geometry(&self) -> Geometry {
        self.reader.geometry
    }

    /// Whether what changed since the base is known, and believed.
    pub const fn resolved(&self) -> bool {
        self.resolved
    }

    /// Why nothing is believed, if so.
    pub const fn distrust(&self) -> Option<&Distrust> {
        self.distrust.as_ref()
    }

    /// The blocks of the first round.
    pub const fn first(&self) -> &BlockSet {
        &self.first
    }

    /// Reads blocks as they are now.
    pub fn read_now(
        &self,
        range: BlockRange,
        buf: &mut [u8],
    ) -> Result<Vec<BlockOutcome>, SourceError> {
        let from = SystemClock.now();
        let outcomes = self.reader.read(range, buf);
        let took = SystemClock.now().since(from).as_nanos();
        let took = u64::try_from(took).unwrap_or(u64::MAX);
        let bytes = u64::try_from(buf.len()).unwrap_or(u64::MAX);
        self.read_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.read_nanos.fetch_add(took, Ordering::Relaxed);
        outcomes
    }

    /// The longest that the volume stood still so far.
    pub fn longest_freeze(&self) -> Duration {
        self.lock().longest
    }

    /// Ends a round; no read is under way.
    ///
    /// Errors: `Revoked` with `distrusted` if something was seen that makes every copy doubtful; `Io`. Nothing is lost by it.
    pub fn next(&self) -> Result<Next, SourceError> {
        self.next_with(&mut || {})
    }

    /// As [`Self::next`]; `at_the_instant` is called while the volume stands still, after all that belongs to the image has been
    /// read. It must be quick, and write to nothing that may be frozen.
    pub fn next_with(&self, at_the_instant: &mut dyn FnMut()) -> Result<Next, SourceError> {
        let mut state = self.lock();
        let state = &mut *state;
        state.round = state.round.saturating_add(1);
        let bytes = self.read_bytes.swap(0, Ordering::Relaxed);
        let nanos = self.read_nanos.swap(0, Ordering::Relaxed);
        if bytes >= TELLING_BYTES || state.speed.is_none() {
            // Of one thread that reads; in the freeze there are several, and a queue is quicker by some.
            let one = per_second(bytes.max(1), Duration::from_nanos(nanos));
            state.speed = Some(one.saturating_mul(QUEUE_GAIN));
        }
        if let Some(mut quiet) = state.quiet.take() {
            let looked = state.looked.take();
            let fresh = |look: &Look| SystemClock.now().since(look.at) < LOOK_HOLDS;
            let look = match looked.filter(fresh) {
                Some(look) => look,
                None => quiet.look(&self.options).map_err(source)?,
            };
            if look.took > LOOK_SHORT && looked.is_none() {
                // There were many processes to look at. What was written meanwhile is not left to the freeze.
                quiet.sync();
                let dirty = self.drain(state)?;
                (state.quiet, state.looked) = (Some(quiet), Some(look));
                return Ok(Next::Copy(dirty));
            }
            return self.instant(state, (&mut quiet, look), at_the_instant);
        }
        let mut dirty = self.drain(state)?;
        if !self.fits(state, &dirty) && state.round < self.limits.rounds {
            return Ok(Next::Copy(dirty));
        }
        if !self.fits(state, &dirty) && self.limits.over == OverBudget::GiveUp {
            return Err(SourceError::Io(self.too_much(&dirty)));
        }
        let quiet = Quiet::of(&self.options, &self.guard).map_err(source)?;
        // A buffered writer's dirty pages are seconds of work: better now than in the freeze.
        quiet.sync();
        dirty.union_with(&self.drain(state)?);
        state.quiet = Some(quiet);
        Ok(Next::Copy(dirty))
    }

    /// Swaps, and takes what is dirty.
    fn drain(&self, state: &mut State) -> Result<BlockSet, SourceError> {
        let how = Still {
            guard: &self.guard,
            limits: self.limits,
        };
        let dirty = if state.ends == Ends::Anywhere {
            state.watched.drain()
        } else {
            let State {
                watched,
                target,
                longest,
                ..
            } = state;
            let mut dirty = BlockSet::new(watched.geometry().block_count());
            match how.swap(watched, target, longest, (None, &mut dirty)) {
                Ok(_) => {}
                // An image of no one moment is better than none.
                Err(VolumeError::Refused { .. }) if !target.bio_based => state.ends = Ends::Loose,
                Err(error) => return Err(source(error)),
            }
            dirty
        };
        state.add(&dirty);
        Ok(dirty)
    }

    /// Whether so much can be read within the budget, with room for the freeze itself.
    fn fits(&self, state: &State, dirty: &BlockSet) -> bool {
        let bytes = self.bytes_of(dirty);
        let speed = state.speed.unwrap_or(1).max(1);
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(speed);
        let needed = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        bytes <= LAST_BYTES_MAX && needed <= self.limits.budget.saturating_sub(FREEZE_CALL)
    }

    fn bytes_of(&self, set: &BlockSet) -> u64 {
        set.runs()
            .map(|run| self.reader.geometry.bytes_of(run).1)
            .sum()
    }

    fn too_much(&self, dirty: &BlockSet) -> io::Error {
        let rounds = self.limits.rounds;
        let left = self.bytes_of(dirty) >> 20;
        io::Error::other(format!(
            "after {rounds} rounds of copying {left} MiB are still being changed: they do not fit a freeze of {} ms. \
             Say over_budget = \"longer\" or a smaller block_size in the volume's file, take a native snapshot (LVM), or mode ublk or fuse",
            self.limits.budget.as_millis()
        ))
    }

    /// The freeze. Nothing is logged, opened or written to a file system of anybody's between its begin and its end.
    fn instant(
        &self,
        state: &mut State,
        (quiet, look): (&mut Quiet, Look),
        at_the_instant: &mut dyn FnMut(),
    ) -> Result<Next, SourceError> {
        let clock = SystemClock;
        let (opens, at) = (state.watched.fresh(), clock.wall());
        let prepared = state
            .watched
            .control
            .prepare_generation(opens, at, self.base)
            .map_err(|e| source(engine_error(e)))?;
        let block = self.reader.geometry.block_size().bytes_u64();
        let room = self.room_in_blocks(state, block);
        let memory = Last::memory_for(&self.reader.geometry, room);
        let began = clock.now();
        let standing = quiet
            .begin(&state.watched, &self.limits, look)
            .map_err(source)?;
        let frozen = self.take_last(state, &standing, (room, memory), &prepared);
        let wall = clock.wall();
        if matches!(frozen, Ok(Taken::All(..))) {
            at_the_instant();
        }
        let (longest, whole) = standing.end();
        state.longest = state.longest.max(longest);
        let (last, set, was) = match frozen? {
            Taken::All(last, set, was) => (last, set, was),
            Taken::Unquiet(dirty) => {
                state.unquiet = state.unquiet.saturating_add(1);
                return Ok(Next::Copy(dirty));
            }
            Taken::Doubtful => return Err(SourceError::Revoked(RevokeCause::Distrusted)),
            Taken::Unseen => {
                state.ends = Ends::InFreezes;
                state.round = 0;
                return Ok(Next::Copy(state.drained.clone()));
            }
            Taken::TooMuch(dirty) if state.round >= self.limits.rounds => {
                return Err(SourceError::Io(self.too_much(&dirty)));
            }
            Taken::TooMuch(dirty) => return Ok(Next::Copy(dirty)),
        };
        if !whole {
            // Thawed by the guard's limit, or by somebody else: the last blocks are of no one moment.
            if state.round >= self.limits.rounds || clock.now().since(began) >= self.limits.limit {
                let why = "the freeze ended before the last blocks were read: somebody thawed it, or it took longer than freeze_limit";
                return Err(SourceError::Io(io::Error::other(why)));
            }
            return Ok(Next::Copy(set));
        }
        state.watched.control.settle();
        Ok(Next::Instant(Arc::new(InstantImage {
            reader: Arc::clone(&self.reader),
            state: Arc::clone(&self.state),
            wanted: state.wanted.clone(),
            changed: state.changed.clone(),
            opened: opens,
            instant: wall,
            consistency: match was {
                Moment::Alone => quiet.consistency(),
                Moment::Beside => Consistency::Instant,
                Moment::None => Consistency::None,
            },
            longest_freeze: state.longest,
            last_blocks: set,
            last,
        })))
    }

    /// Blocks that there is to be room for in a freeze: what the budget allows, whatever the policy allows beyond.
    fn room_in_blocks(&self, state: &State, block: u64) -> u64 {
        let speed = u128::from(state.speed.unwrap_or(1));
        let time = match self.limits.over {
            OverBudget::GiveUp => self.limits.budget,
            OverBudget::Longer => self.limits.limit / 2,
        };
        let bytes = u64::try_from(speed * time.as_millis() / 1000).unwrap_or(LAST_BYTES_MAX);
        (bytes.clamp(8 << 20, LAST_BYTES_MAX) / block)
            .max(1)
            .min(self.reader.geometry.block_count().0)
    }

    fn take_last(
        &self,
        state: &mut State,
        standing: &Standing<'_>,
        (room, memory): (u64, blktide_sys::buffer::AlignedBuffer),
        prepared: &PreparedGeneration,
    ) -> Result<Taken, SourceError> {
        let alone = standing.is_alone();
        let (dirty, mut still) = state.drain_still(standing);
        // Asked before anything is read: what waited for a scheduler then is not done.
        let done = still.is_some() && (alone || state.watched.all_is_done(&state.target));
        // Where writers go on, only the next sample that is quiet by chance can tell: see `Belief::open_question`.
        if still.is_some()
            && state.ends == Ends::Anywhere
            && state.completions != state.watched.completions(&state.target)
        {
            return Ok(Taken::Unseen);
        }
        if dirty.count().0 > room {
            return Ok(Taken::TooMuch(dirty));
        }
        let Some(last) = Last::read(&self.reader, &dirty, memory)? else {
            return Ok(Taken::TooMuch(dirty));
        };
        // Not a moment if something was written in it, by whomever.
        still = still.filter(|marked| state.watched.is_unmarked_since(*marked));
        let quiet = still.is_some();
        let hopeless = state.target.bio_based && !alone;
        if !quiet && !hopeless && state.unquiet < UNQUIET_MAX {
            return Ok(Taken::Unquiet(dirty));
        }
        let sure = quiet && done && state.ends != Ends::Loose;
        if !sure && state.target.bio_based {
            return Err(no_moment());
        }
        if !state.watched.check(&state.target, closing(sure)) {
            return Ok(Taken::Doubtful);
        }
        state
            .watched
            .control
            .open_prepared(prepared)
            .map_err(|e| source(engine_error(e)))?;
        let moment = match (quiet, alone) {
            // Early copies may be stale: completions went unseen, and nothing else could be leaned on.
            _ if state.ends != Ends::Anywhere && !sure => Moment::None,
            (true, true) => Moment::Alone,
            (true, false) => Moment::Beside,
            (false, _) => Moment::None,
        };
        Ok(Taken::All(last, dirty, moment))
    }

    /// Opens the next generation in a short freeze, for an instant that somebody else keeps and that comes after it. Returns its name.
    ///
    /// Errors: `Revoked` with `distrusted`, `Io`; then none was opened, or one that no image names.
    pub(crate) fn open_generation(&self) -> Result<GenerationName, SourceError> {
        let mut state = self.lock();
        let state = &mut *state;
        let mut quiet = Quiet::of(&self.options, &self.guard).map_err(source)?;
        let opens = state.watched.fresh();
        let prepared = state
            .watched
            .control
            .prepare_generation(opens, SystemClock.wall(), self.base)
            .map_err(|e| source(engine_error(e)))?;
        let (standing, quiet) = loop {
            let look = quiet.look(&self.options).map_err(source)?;
            quiet.sync();
            let standing = quiet
                .begin(&state.watched, &self.limits, look)
                .map_err(source)?;
            let (_, still) = state.drain_still(&standing);
            let alone = standing.is_alone();
            let hopeless = state.target.bio_based && !alone;
            if still.is_some() || hopeless || state.unquiet >= UNQUIET_MAX {
                let sure = || alone || state.watched.all_is_done(&state.target);
                break (standing, still.is_some() && sure());
            }
            state.unquiet = state.unquiet.saturating_add(1);
            state.longest = state.longest.max(standing.end().0);
            drop(pause(UNQUIET_PAUSE));
        };
        // Where nobody tells when a write is done, an instant without such a moment is none.
        if state.ends != Ends::Anywhere && !quiet {
            state.longest = state.longest.max(standing.end().0);
            return Err(no_moment());
        }
        let believed = state.watched.check(&state.target, closing(quiet));
        let opened = believed.then(|| state.watched.control.open_prepared(&prepared));
        let (longest, whole) = standing.end();
        state.longest = state.longest.max(longest);
        let Some(opened) = opened.filter(|_| whole) else {
            return Err(SourceError::Revoked(RevokeCause::Distrusted));
        };
        opened.map_err(|e| source(engine_error(e)))?;
        state.watched.control.settle();
        Ok(opens)
    }

    /// What is wanted of an image whose instant was between [`Self::open_generation`] and now, and what has changed.
    pub(crate) fn after_the_instant(&self) -> (BlockSet, Option<BlockSet>) {
        let mut state = self.lock();
        let state = &mut *state;
        let dirty = state.watched.drain();
        state.add(&dirty);
        (state.wanted.clone(), state.changed.clone())
    }

    /// See [`InstantImage::trust`].
    pub(crate) fn trust(&self, opened: GenerationName) -> bool {
        self.lock().watched.trust(opened)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What an instant was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moment {
    /// Nothing was written, and nobody could.
    Alone,
    /// Nothing was written.
    Beside,
    /// It was none.
    None,
}

/// What a freeze has brought.
enum Taken {
    /// All that was left, and what the moment was.
    All(Last, BlockSet, Moment),
    /// Something was written although nobody should have been able to: once more, for it may have been the last of what was
    /// queued long before (discards).
    Unquiet(BlockSet),
    /// More was left than there was room or time for.
    TooMuch(BlockSet),
    /// The evidence says that something was written unseen.
    Doubtful,
    /// Everything is marked, but completions went unseen: copies may be older than their blocks' marks.
    Unseen,
}

const fn closing(quiet: bool) -> Occasion {
    if quiet {
        Occasion::Still
    } else {
        Occasion::Closing
    }
}

/// Where the kernel's generations end, in this backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ends {
    /// Anywhere: what is under way is marked once more when it is done.
    Anywhere,
    /// In freezes: nobody tells when a write is done, or not always.
    InFreezes,
    /// In freezes, and one did not: copies may be stale, and nobody can tell.
    Loose,
}

impl State {
    /// Swaps and drains while it stands still: see [`Watched::drain_still`].
    fn drain_still(&mut self, standing: &Standing<'_>) -> (BlockSet, Option<Marked>) {
        let alone = standing.is_alone();
        let (dirty, still) = self.watched.drain_still(&self.target, alone);
        self.add(&dirty);
        (dirty, still)
    }

    /// What was drained is wanted, and has changed.
    fn add(&mut self, dirty: &BlockSet) {
        self.wanted.union_with(dirty);
        self.drained.union_with(dirty);
        if let Some(changed) = &mut self.changed {
            changed.union_with(dirty);
        }
    }
}

fn per_second(bytes: u64, time: Duration) -> u64 {
    let nanos = time.as_nanos().max(1);
    u64::try_from(u128::from(bytes) * 1_000_000_000 / nanos).unwrap_or(u64::MAX)
}

fn no_moment() -> SourceError {
    SourceError::Io(io::Error::other(
        "a moment is needed at which no write is under way, and there was none: it is written past its file system",
    ))
}

fn source(error: VolumeError) -> SourceError {
    SourceError::Io(io::Error::other(error))
}
