//! Samples of the evidence that every write was marked (P14): taken here, judged by the engine.
//!
//! ```text
//! attach:            base ─▶ belief begins                (fenced: exact; in use: too large rather than too small)
//! begin of a backup: sample, and again until it is quiet, for a while
//! its instant:       sample in the freeze ─▶ nothing was believed before: belief begins anew, exact from here on
//! ```
//! The kernel's count and ours are sums; where ours began in the midst of writes, what the kernel had counted before (the
//! *base*) is only known to a few sectors. Too large a base hides nothing for long: it is made exact at the first instant at
//! which nobody writes, and no generation before that instant is believed anyhow.
//!
//! **Invariant**: a check that failed has distrusted the tracker before anything else is done.

use blktide_engine::evidence::{Belief, Check, Occasion, Proof, Sectors, Vector};
use blktide_sys::blockdev::BlockDevice;
use blktide_sys::event::pause;
use blktide_sys::host;
use blktide_types::reason::Reason;
use blktide_volume::VolumeError;
use std::time::Duration;

use crate::attach::packed;
use crate::counters::Running;
use crate::target::{Target, writer_of_the_file};
use crate::tracker::Watched;

/// Samples, at most, until two in a row are the same although nobody writes: completions that are being counted.
const QUIET_TRIES: u32 = 50;
const QUIET_PAUSE: Duration = Duration::from_micros(200);
/// Samples, at most, and the time between two, in the hope of a quiet moment of a device that is in use.
const HOPE_TRIES: u32 = 40;
const HOPE_PAUSE: Duration = Duration::from_millis(2);
/// Samples for a base.
const BASE_TRIES: u32 = 20;

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
            let mut first = self.quiet_sample(target).ok_or(Check::SampleMissing)?;
            first.base = Sectors::default();
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
            return self.begin_anew(target, false);
        }
        for _ in 0..HOPE_TRIES {
            if !self.check(target, (false, Occasion::Between)) {
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
        self.begin_anew(target, false);
    }

    /// Takes a sample; false: a check failed, the tracker is distrusted, and copies that were made are doubtful.
    pub(crate) fn check(&mut self, target: &Target, (quiet, occasion): (bool, Occasion)) -> bool {
        let now = if quiet {
            self.quiet_sample(target)
        } else {
            self.sample(target)
        };
        let loaded = Belief::load(self.marks.memory());
        let mut verdict = Err(Check::SampleMissing);
        if let Ok(mut belief) = loaded {
            verdict = belief.sample(now.as_ref(), occasion);
            belief.save(self.marks.memory());
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
                let closing = occasion == Occasion::Closing;
                if closing && quiet && !trusted && verdict.proof != Proof::Proven {
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

    /// From here on it is believed again, as far as it can be: nothing that went before is.
    fn begin_anew(&mut self, target: &Target, quiet: bool) {
        if let Ok(mut belief) = self.begin(target, quiet) {
            if let Ok(before) = Belief::load(self.marks.memory()) {
                belief.replace(&before);
            }
            belief.save(self.marks.memory());
        }
    }

    /// One sample: the kernel's count first, ours after. `None`: something could not be read.
    fn sample(&self, target: &Target) -> Option<Vector> {
        let device = BlockDevice::at(&target.path).ok()?;
        let kernel = device.counters().ok()?;
        let counted = self.counters.read().ok()?;
        let running = Running::of(&self.pins);
        let disk = device.whole_disk().ok()?.number();
        let base = Belief::load(self.marks.memory()).map_or(Sectors::default(), |b| b.last().base);
        Some(Vector {
            boot: host::boot_id().ok()?,
            programs: running.programs,
            links: running.links,
            misses: running.skipped?,
            lost: self.marks.lost(),
            passthrough: counted.passed,
            events: counted.events,
            generation: self.marks.generation(),
            own: Sectors {
                written: counted.written,
                discarded: counted.discarded,
            },
            kernel: Sectors {
                written: kernel.sectors_written,
                discarded: kernel.sectors_discarded,
            },
            base,
            sectors: device.bytes().ok()? / 512,
            start_sector: device.start_sector().ok()?,
            device: packed(disk.major, disk.minor),
            holders: u32::try_from(device.holders().ok()?.len()).unwrap_or(u32::MAX),
            statistics: device.counts(),
        })
    }

    /// A sample of a moment at which nobody writes: two in a row are the same.
    fn quiet_sample(&self, target: &Target) -> Option<Vector> {
        let mut before = self.sample(target)?;
        for _ in 0..QUIET_TRIES {
            let now = self.sample(target)?;
            if (now.own, now.kernel) == (before.own, before.kernel) {
                return Some(now);
            }
            before = now;
            drop(pause(QUIET_PAUSE));
        }
        Some(before)
    }

    /// A first sample whose base is at least what the kernel had counted before us: ours is read first, the kernel's after.
    fn with_large_base(&self, target: &Target) -> Option<Vector> {
        let mut base: Option<Sectors> = None;
        for _ in 0..BASE_TRIES {
            let counted = self.counters.read().ok()?;
            let kernel = BlockDevice::at(&target.path).ok()?.counters().ok()?;
            let written = kernel.sectors_written.saturating_sub(counted.written);
            let discarded = kernel.sectors_discarded.saturating_sub(counted.discarded);
            let most = base.get_or_insert(Sectors { written, discarded });
            most.written = most.written.max(written);
            most.discarded = most.discarded.max(discarded);
        }
        let mut first = self.sample(target)?;
        first.base = base?;
        // What was counted between is ours and not yet the kernel's.
        first.base.written = first.base.written.min(first.kernel.written);
        first.base.discarded = first.base.discarded.min(first.kernel.discarded);
        Some(first)
    }
}

/// The counts of a sample, for people: what the kernel counted since the attach, and what we did.
fn figures(sample: &Vector) -> String {
    let since = |kernel: u64, base: u64| i128::from(kernel) - i128::from(base);
    format!(
        ": kernel {}+{}, ours {}+{} sectors",
        since(sample.kernel.written, sample.base.written),
        since(sample.kernel.discarded, sample.base.discarded),
        sample.own.written,
        sample.own.discarded
    )
}
