//! Samples of the evidence that every write was marked (P14): taken here, judged by the engine.
//!
//! ```text
//! attach:            base ─▶ belief begins                (fenced: exact; in use: too large rather than too small)
//! begin of a backup: sample, and again until it is quiet, for a while
//!                    nothing is believed: belief begins anew in a freeze, exact from here on
//! its instant:       sample in the freeze; were all completions seen since the begin?
//! ```
//! The kernel's count and ours are sums; where ours began in the midst of writes, what the kernel had counted before (the
//! *base*) is only known to a few sectors. Too large a base hides nothing for long: it is made exact in the first freeze, and no
//! generation before that is believed anyhow.
//!
//! **Completions** may go unseen where writes do not: a kernel that is running a program on a processor does not run it again
//! when an interrupt completes a request there; and some (seen on microVMs' kernels) run none in the context of process 1. The
//! marks are whole then, set when the write was queued. But a write that was under way at a swap without a freeze is marked
//! before it is on the device and not after: a copy made in between may be stale. [`Completions`] finds that out.
//!
//! **A quiet moment** is one in which nothing was marked, from before the swap until its last block is read ([`Marked`]), no write is
//! under way, and nobody is known who could write. What comes to a partition by way of its disk is in no count of the kernel's:
//! what was seen of it queued must have been seen done then.
//!
//! **Invariant**: a check that failed has distrusted the tracker before anything else is done.

use blktide_engine::evidence::{Belief, Check, Occasion, Proof, Sectors, Vector};
use blktide_format::shared::watch;
use blktide_sys::blockdev::BlockDevice;
use blktide_sys::event::pause;
use blktide_sys::host;
use blktide_sys::mounts::DeviceNumber;
use blktide_types::reason::Reason;
use blktide_types::set::BlockSet;
use blktide_volume::VolumeError;
use std::time::Duration;

use crate::counters::{Counted, Running};
use crate::target::{Target, writer_of_the_file};
use crate::tracker::Watched;

/// Samples, at most, until two in a row are the same although nobody writes: completions that are being counted.
const QUIET_TRIES: u32 = 50;
const QUIET_PAUSE: Duration = Duration::from_micros(200);
/// Samples, at most, and the time between two, in the hope of a quiet moment of a device that is in use.
const HOPE_TRIES: u32 = 40;
const HOPE_PAUSE: Duration = Duration::from_millis(2);
/// Readings of both counts, at most, for a base or for what lies between them.
const READINGS: u32 = 20;
const READINGS_FOR_BASE: u32 = 400;
/// Looks, at most, and the time between two, until no write is seen under way.
const LANDING_TRIES: u32 = 100;
/// Looks, at most, whether all that was queued is done: what was may just be being counted.
const ALL_DONE_TRIES: u32 = 5;
/// Drains, at most, in one freeze: what was under way when it began (a file system's discards) is done in its course.
const STRAGGLER_TRIES: u32 = 3;

/// A number of marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Marked(u64);

/// A sample, and how far what came by way of the whole disk is behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sampled {
    vector: Vector,
    foreign_lag: u64,
}

impl Watched {
    /// Begins to believe, at the attach. `quiet`: the fence is ours.
    pub(crate) fn begin_evidence(
        &mut self,
        target: &Target,
        quiet: bool,
    ) -> Result<(), VolumeError> {
        let refuse = |check: Check| VolumeError::Layout {
            why: format!("{} [{check}]", check.what()),
        };
        let mut belief = self.begin(target, quiet).map_err(refuse)?;
        belief.save(self.marks.memory());
        Ok(())
    }

    fn begin(&self, target: &Target, quiet: bool) -> Result<Belief, Check> {
        let first = if quiet {
            let sampled = self.sample_until_still(target, QUIET_TRIES);
            let (sampled, _) = sampled.ok_or(Check::SampleMissing)?;
            self.marks.set_word(watch::FOREIGN_LAG, sampled.foreign_lag);
            let mut first = sampled.vector;
            first.base = Sectors::default();
            first.queued_base = Sectors::default();
            let exact = first;
            first.calibrate(&exact);
            first
        } else {
            self.with_large_base(target).ok_or(Check::SampleMissing)?
        };
        Belief::begin(&first)
    }

    /// At the begin of a backup: what can be said of all writes so far. What cannot be believed is distrusted when this returns.
    pub(crate) fn look_at_evidence(&mut self, target: &Target) {
        let device = BlockDevice::at(&target.path).ok();
        if let Some(obstacle) = device.as_ref().and_then(writer_of_the_file) {
            self.distrust(Reason::ForeignWrite, &obstacle.to_string());
        }
        if self.control.trusted().reason.is_some() {
            return;
        }
        for _ in 0..HOPE_TRIES {
            if !self.check(target, Occasion::Between) {
                return;
            }
            let open = Belief::load(self.marks.memory()).is_ok_and(|belief| belief.open_question());
            if !open {
                return;
            }
            // A signal only shortens it.
            drop(pause(HOPE_PAUSE));
        }
        let detail = "that every write of the last generation was marked could not be proven: its device was never quiet";
        self.distrust(Reason::TrackingInterrupted, detail);
    }

    /// Takes a sample; false: a check failed, the tracker is distrusted, and copies that were made are doubtful.
    pub(crate) fn check(&mut self, target: &Target, mut occasion: Occasion) -> bool {
        let tries = if occasion == Occasion::Still {
            QUIET_TRIES
        } else {
            1
        };
        let sampled = self.sample_until_still(target, tries);
        let still = sampled.is_some_and(|(_, still)| still);
        let lost_foreign = sampled.is_some_and(|(s, _)| self.lags(target, &s));
        occasion = match occasion {
            Occasion::Between if still && !lost_foreign => Occasion::Pause,
            // Somebody is at it whom nobody has seen.
            Occasion::Still if !still => Occasion::Closing,
            Occasion::Between | Occasion::Pause | Occasion::Closing | Occasion::Still => occasion,
        };
        let quiet = occasion == Occasion::Still;
        let now = sampled.map(|(sampled, _)| sampled.vector);
        let loaded = Belief::load(self.marks.memory());
        let mut verdict = Err(Check::SampleMissing);
        if let Ok(mut belief) = loaded {
            verdict = belief.sample(now.as_ref(), occasion);
            belief.save(self.marks.memory());
        }
        if quiet && lost_foreign {
            verdict = Err(Check::RunsSkipped);
        }
        let trusted = self.control.trusted().reason.is_none();
        match verdict {
            Ok(verdict) if verdict.owes_digests && trusted => {
                let detail = "that every write was marked could not be proven [unproven]";
                self.distrust(Reason::TrackingInterrupted, detail);
                self.begin_anew(target, quiet);
                false
            }
            Ok(verdict) => {
                if quiet && !trusted && verdict.proof != Proof::Proven {
                    self.begin_anew(target, true);
                }
                true
            }
            Err(check) => {
                let seen = now.as_ref().map(figures).unwrap_or_default();
                self.distrust(check.reason(), &format!("[{check}{seen}] {}", check.what()));
                self.begin_anew(target, quiet);
                false
            }
        }
    }

    /// Whether a write that came by way of the whole disk is under way, or was not seen to complete: no count of the kernel's shows
    /// that.
    fn lags(&self, target: &Target, sampled: &Sampled) -> bool {
        !target.bio_based && sampled.foreign_lag != self.marks.word(watch::FOREIGN_LAG)
    }

    /// From here on it is believed again, as far as it can be: nothing that went before is. `quiet`: nobody can be writing.
    pub(crate) fn begin_anew(&mut self, target: &Target, quiet: bool) {
        if let Ok(mut belief) = self.begin(target, quiet) {
            if let Ok(before) = Belief::load(self.marks.memory()) {
                belief.replace(&before);
            }
            belief.save(self.marks.memory());
        }
    }

    /// One sample: the kernel's count first, ours after. `None`: something could not be read.
    fn sample(&self, target: &Target) -> Option<Sampled> {
        let device = BlockDevice::at(&target.path).ok()?;
        let kernel = device.counters().ok()?;
        let counted = self.counters.read().ok()?;
        let running = Running::of(&self.pins);
        let disk = device.whole_disk().ok()?;
        let (base, queued_base) = Belief::load(self.marks.memory())
            .map(|b| (b.last().base, b.last().queued_base))
            .unwrap_or_default();
        let passed_in = if device.tells_only_of_itself() {
            0
        } else {
            counted.passed_in
        };
        let vector = Vector {
            boot: host::boot_id().ok()?,
            programs: running.programs,
            links: running.links,
            misses: uncounted_misses(&running, &counted)?,
            lost: self.marks.lost(),
            passthrough: passed_in.wrapping_add(counted.passed_out),
            events: counted.events,
            generation: self.marks.generation(),
            own: done(target, &counted),
            queued: counted.queued,
            kernel: Sectors {
                written: kernel.sectors_written,
                discarded: kernel.sectors_discarded,
            },
            base,
            queued_base,
            sectors: device.bytes().ok()? / 512,
            start_sector: device.start_sector().ok()?,
            device: identity(disk.number(), disk.sequence()),
            holders: u32::try_from(device.holders().ok()?.len()).unwrap_or(u32::MAX),
            statistics: device.counts(),
        };
        Some(Sampled {
            vector,
            foreign_lag: counted.foreign_lag(),
        })
    }

    /// A sample, and whether no count had moved since the one before it: until that is so, for a few times.
    fn sample_until_still(&self, target: &Target, tries: u32) -> Option<(Sampled, bool)> {
        let counts = |sample: &Sampled| {
            let vector = &sample.vector;
            (vector.own, vector.queued, vector.kernel, sample.foreign_lag)
        };
        let mut before = self.sample(target)?;
        for last in (0..tries).rev() {
            let now = self.sample(target)?;
            let still = counts(&now) == counts(&before);
            if still || last == 0 {
                return Some((now, still));
            }
            before = now;
            drop(pause(QUIET_PAUSE));
        }
        Some((before, false))
    }

    /// A first sample of a device that is in use. Its base is that of completions, as exact as it can be had: never too small (ours is
    /// read first), and nearly always to the sector (until the two orders of reading agree). What was under way at the attach is in
    /// no count of what is queued: that one proves nothing, its base is none.
    fn with_large_base(&self, target: &Target) -> Option<Vector> {
        let (mut least, mut most) = (Sectors::default(), None);
        for _ in 0..READINGS_FOR_BASE {
            let before = kernel_count(target)?;
            let done = done(target, &self.counters.read().ok()?);
            let high: &mut Sectors = most.get_or_insert(before);
            least = least.most(before.beyond(done));
            *high = high.least(kernel_count(target)?.beyond(done));
            if *high == least {
                break;
            }
        }
        let mut first = self.sample(target)?.vector;
        // What was counted between is ours and not yet the kernel's.
        first.base = most?.least(first.kernel);
        first.queued_base = Sectors::default();
        Some(first)
    }

    /// Waits a moment for the writes that were queued before to be done; false: some are still under way, or nobody can tell.
    fn has_landed(&self, target: &Target) -> bool {
        let mut seen = 0;
        for _ in 0..LANDING_TRIES {
            let under_way = self.writes_under_way(target);
            // The kernel adds up its processors' counts one after the other: twice, so that no sum is by chance.
            seen = if under_way == Some(0) { seen + 1 } else { 0 };
            if seen == 2 {
                return true;
            }
            if seen == 0 {
                drop(pause(QUIET_PAUSE));
            }
        }
        false
    }

    /// Whether all that was queued is counted as done, by whomever it was written: also what waits for a scheduler, where no count of
    /// requests shows it.
    pub(crate) fn all_is_done(&self, target: &Target) -> bool {
        let is_done = || {
            let now = self.sample(target)?;
            Some(now.vector.all_queued_is_done() && !self.lags(target, &now))
        };
        (0..ALL_DONE_TRIES).any(|_| is_done().unwrap_or(false))
    }

    fn writes_under_way(&self, target: &Target) -> Option<u64> {
        // The disk of a partition counts its other partitions as well, if it has requests: it is asked only if need be.
        let lag = self.counters.read().ok()?.foreign_lag();
        let by_disk = lag != self.marks.word(watch::FOREIGN_LAG);
        let device = BlockDevice::at(&target.path).ok()?;
        device.writes_under_way(by_disk).ok()
    }

    /// Swaps and drains where nobody is to be writing; and whether nobody did: then the number of marks, which must not move as long as
    /// that is to hold (see [`Self::is_unmarked_since`]).
    ///
    /// `alone`: as far as is known nobody can write; then what was closed has landed. If not, a write may still wait for a scheduler
    /// ([`Self::all_is_done`]) and be marked once more when it is done; of a device without requests nothing can be said.
    pub(crate) fn drain_still(
        &mut self,
        target: &Target,
        alone: bool,
    ) -> (BlockSet, Option<Marked>) {
        let mut dirty = BlockSet::new(self.geometry().block_count());
        for _ in 0..STRAGGLER_TRIES {
            let before = self.counters.events().ok().map(Marked);
            dirty.union_with(&self.drain());
            if !alone && target.bio_based || !self.has_landed(target) {
                break;
            }
            // What was done since is marked, some of it maybe in what is live now.
            if before.is_some_and(|marked| self.is_unmarked_since(marked)) {
                return (dirty, before);
            }
        }
        (dirty, None)
    }

    /// Whether nothing of the volume was queued, issued or completed since.
    pub(crate) fn is_unmarked_since(&self, marked: Marked) -> bool {
        self.counters.events().is_ok_and(|now| now == marked.0)
    }

    /// How far we are ahead of the kernel in counting completions, as far as it can be seen while requests are under way; `None`:
    /// something could not be read.
    pub(crate) fn completions(&self, target: &Target) -> Option<Completions> {
        let [_, _, skipped] = Running::of(&self.pins).skipped;
        let mut found = Completions {
            skipped,
            ahead: [i128::MAX; 2],
        };
        for _ in 0..READINGS {
            let kernel = kernel_count(target)?;
            let done = done(target, &self.counters.read().ok()?);
            let [written, discarded] = &mut found.ahead;
            *written = (*written).min(i128::from(done.written) - i128::from(kernel.written));
            *discarded =
                (*discarded).min(i128::from(done.discarded) - i128::from(kernel.discarded));
        }
        Some(found)
    }
}

/// How many sectors more we have seen complete than the kernel has counted, and the runs that it skipped at completions.
///
/// **Invariant**: taken while requests are under way `ahead` is too large rather than too small (the kernel's count is read
/// first), and taken while nothing is it is exact. A completion that is not seen makes it smaller for ever. So two that are equal,
/// the later one of a quiet moment, say that every completion between them was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Completions {
    skipped: Option<u64>,
    /// Written, discarded.
    ahead: [i128; 2],
}

/// What we saw complete; of a device that tells nobody when that is: what was queued.
const fn done(target: &Target, counted: &Counted) -> Sectors {
    if target.bio_based {
        counted.queued
    } else {
        counted.done
    }
}

fn kernel_count(target: &Target) -> Option<Sectors> {
    let kernel = BlockDevice::at(&target.path).ok()?.counters().ok()?;
    Some(Sectors {
        written: kernel.sectors_written,
        discarded: kernel.sectors_discarded,
    })
}

/// Runs that were skipped and that no count would show: of what is queued; and, once somebody has written by way of the whole
/// disk, which is in no count of a partition, of completions. `None`: the kernel does not say.
fn uncounted_misses(running: &Running, counted: &Counted) -> Option<u64> {
    let [queue, _, done] = running.skipped;
    let by_another_way = if counted.foreign_queued > 0 { done? } else { 0 };
    Some(queue?.saturating_add(by_another_way))
}

/// A disk by its number, 32 bits for the kernel, and the low half of its sequence number: loop, nbd and card readers keep the number,
/// the counts and the size for another disk.
fn identity(number: DeviceNumber, sequence: u64) -> u64 {
    sequence << 32 | u64::from(number.major) << 20 | u64::from(number.minor)
}

/// The counts of a sample, for people: what the kernel counted since the attach, and what we did.
fn figures(sample: &Vector) -> String {
    let since = |kernel: u64, base: u64| i128::from(kernel) - i128::from(base);
    format!(
        ": kernel {}+{}, ours {}+{} sectors; kernel {}+{}, queued {}+{}",
        since(sample.kernel.written, sample.base.written),
        since(sample.kernel.discarded, sample.base.discarded),
        sample.own.written,
        sample.own.discarded,
        since(sample.kernel.written, sample.queued_base.written),
        since(sample.kernel.discarded, sample.queued_base.discarded),
        sample.queued.written,
        sample.queued.discarded
    )
}
