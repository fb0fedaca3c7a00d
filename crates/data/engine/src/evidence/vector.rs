//! Evidence that the kernel's programs marked every write (P14): a vector, sampled at the attach and at each swap.
//!
//! ```text
//! a sample: the kernel's counters first ──▶ ours after      what falls in between is ours alone
//! compare(earlier, now) ──▶ proven: all that the kernel has counted we have, to the sector
//!                       ──▶ queued: the same of what was queued, and not of what was completed
//!                       ──▶ provisional: nothing speaks against it; some requests were under way
//!                       ──▶ a failed check, by name
//! ```
//! The kernel counts a request when it completes. We count it twice: when its bios are queued, and when it completes, before the
//! kernel does. So neither of ours is ever behind the kernel's unless runs were skipped, and all are equal when nothing is under
//! way. What the kernel had counted before our programs were there is the *base*, one for each of our counts.
//!
//! **Why two counts.** A write is marked at both places, so one of them that saw everything is enough for the marks. But a kernel
//! does not run a program where it is running it already on that processor, and completions interrupt whatever runs: they
//! are the ones that are skipped. What that costs is the *second* mark, of writes that were under way at a swap outside a freeze.
//!
//! **Invariant**: what was not sampled, or moved backwards, is never taken for evidence.

use blktide_types::id::BootId;
use blktide_types::reason::Reason;

/// Sectors of 512 bytes, counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sectors {
    /// Written.
    pub written: u64,
    /// Discarded.
    pub discarded: u64,
}

impl Sectors {
    /// What `self` has more than `other`; nothing where it has less.
    #[must_use]
    pub const fn beyond(self, other: Self) -> Self {
        Self {
            written: self.written.saturating_sub(other.written),
            discarded: self.discarded.saturating_sub(other.discarded),
        }
    }

    /// The larger of each.
    #[must_use]
    pub fn most(self, other: Self) -> Self {
        Self {
            written: self.written.max(other.written),
            discarded: self.discarded.max(other.discarded),
        }
    }

    /// The smaller of each.
    #[must_use]
    pub fn least(self, other: Self) -> Self {
        Self {
            written: self.written.min(other.written),
            discarded: self.discarded.min(other.discarded),
        }
    }

    /// Whether `self` has more than `other` anywhere.
    const fn exceeds(self, other: Self) -> bool {
        self.written > other.written || self.discarded > other.discarded
    }
}

/// A sample. Ids are the kernel's; 0 stands for a program or a link that is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vector {
    /// The boot.
    pub boot: BootId,
    /// Programs: `bio_queue`, `rq_issue`, `rq_done`.
    pub programs: [u32; 3],
    /// What attaches them.
    pub links: [u32; 3],
    /// Runs that the kernel skipped and that no count would show.
    pub misses: u64,
    /// Marks that were given up: the programs' own distrust.
    pub lost: u64,
    /// Commands that may write and name no range.
    pub passthrough: u64,
    /// Events seen.
    pub events: u64,
    /// The newest swap.
    pub generation: u64,
    /// What we counted as it completed, of this volume's sectors. Read after `kernel`.
    pub own: Sectors,
    /// What we counted as it was queued. Read after `kernel`.
    pub queued: Sectors,
    /// What the kernel counted for this device. Read before `own`.
    pub kernel: Sectors,
    /// What the kernel had counted before us: see [`Vector::calibrate`].
    pub base: Sectors,
    /// The same for `queued`.
    pub queued_base: Sectors,
    /// Sectors of the volume.
    pub sectors: u64,
    /// Its first sector on its disk.
    pub start_sector: u64,
    /// The disk, by all that another one in its place does not have.
    pub device: u64,
    /// Devices stacked on the volume.
    pub holders: u32,
    /// Whether the disk keeps its statistics.
    pub statistics: bool,
}

impl Vector {
    /// Finds the base, at the attach: of several samples the one with the fewest requests under way says most. To be called for
    /// each of them, the first included, before anything is believed.
    ///
    /// A base that is too small is found out by a later sample, as sectors that we did not see.
    pub fn calibrate(&mut self, sample: &Self) {
        self.base = self.base.most(sample.kernel.beyond(sample.own));
        let queued = sample.kernel.beyond(sample.queued);
        self.queued_base = self.queued_base.most(queued);
    }

    /// What the kernel counted since our programs are there, as our count of completions began.
    const fn counted(&self) -> Sectors {
        self.kernel.beyond(self.base)
    }

    /// The same, as our count of what is queued began.
    const fn counted_of_queued(&self) -> Sectors {
        self.kernel.beyond(self.queued_base)
    }

    /// Whether the kernel has counted the end of all that we saw queued: then nothing is under way, wherever it might wait. (A write that was
    /// queued twice, because the first time there was no room for it, makes this false for ever.)
    pub fn all_queued_is_done(&self) -> bool {
        self.counted_of_queued() == self.queued
    }

    /// Whether the kernel has counted what neither of our counts has.
    const fn unseen(&self) -> bool {
        self.counted().exceeds(self.own) && self.counted_of_queued().exceeds(self.queued)
    }

    /// Each number that can only grow.
    const fn growing(&self) -> [u64; 11] {
        [
            self.misses,
            self.lost,
            self.passthrough,
            self.events,
            self.generation,
            self.own.written,
            self.own.discarded,
            self.queued.written,
            self.queued.discarded,
            self.kernel.written,
            self.kernel.discarded,
        ]
    }
}

/// What a sample proves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proof {
    /// Every sector that the kernel counted we saw complete: no run was skipped, up to this sample.
    Proven,
    /// Every sector that the kernel counted we saw queued: all that was queued since the attach is marked. What was marked a
    /// second time, because a generation began while it was under way, is not known.
    Queued,
    /// Requests were under way: nothing was missed as far as can be seen.
    Provisional,
}

macro_rules! checks {
    ($($(#[doc = $doc:literal])+ $name:ident = $number:literal, $code:literal, $reason:ident, $what:literal;)+) => {
        /// A check that failed. The numbers are stored.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Check { $($(#[doc = $doc])+ $name = $number,)+ }

        impl Check {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name,)+];

            /// Its word: `runs-skipped`.
            pub const fn code(self) -> &'static str {
                match self { $(Self::$name => $code,)+ }
            }

            /// Why the bitmap is not believed, then.
            pub const fn reason(self) -> Reason {
                match self { $(Self::$name => Reason::$reason,)+ }
            }

            /// What was seen, for people.
            pub const fn what(self) -> &'static str {
                match self { $(Self::$name => $what,)+ }
            }

            /// The number that is stored; 0 stands for 'none failed'.
            pub const fn number(self) -> u8 {
                match self { $(Self::$name => $number,)+ }
            }

            /// The check of a stored number; `None` for 0 and for numbers of a later version.
            pub const fn from_number(number: u64) -> Option<Self> {
                match number { $($number => Some(Self::$name),)+ _ => None }
            }
        }
    };
}

checks! {
    /// There is no sample to compare, or one of the two could not be taken.
    SampleMissing = 1, "sample-missing", TrackingInterrupted,
        "the evidence of an earlier moment is missing or damaged";
    /// The earlier sample is of another boot.
    OtherBoot = 2, "other-boot", TrackingInterrupted,
        "the machine was started anew since the programs were attached";
    /// Another disk, or another place on it.
    DeviceMoved = 3, "device-moved", DeviceChanged,
        "the volume is on another disk, or begins at another sector";
    /// Another size.
    DeviceResized = 4, "device-resized", Resized,
        "the device has another size";
    /// A link is gone, or is another.
    LinksGone = 5, "links-gone", TrackingInterrupted,
        "a program was detached from the kernel";
    /// A program is another.
    ProgramsChanged = 6, "programs-changed", TrackingInterrupted,
        "the programs in the kernel are not those that were attached";
    /// The two samples are not of one count.
    CountRestarted = 7, "count-restarted", TrackingInterrupted,
        "the count of sectors was begun anew";
    /// The kernel does not count.
    StatisticsOff = 8, "statistics-off", TrackingInterrupted,
        "the disk's statistics are switched off (queue/iostats), so nothing can be checked against them";
    /// Something was put on top of the volume.
    Stacked = 9, "stacked", TrackingInterrupted,
        "another block device was stacked on the volume";
    /// A number that can only grow is smaller.
    WentBackwards = 10, "went-backwards", TrackingInterrupted,
        "a counter moved backwards";
    /// Marks were given up after too many turns.
    MarksLost = 11, "marks-lost", TrackingInterrupted,
        "a mark was given up, because generations changed too fast for it";
    /// The kernel skipped a run.
    RunsSkipped = 12, "runs-skipped", TrackingInterrupted,
        "the kernel skipped a run of a program";
    /// A command that may write and names no range.
    Passthrough = 13, "passthrough", TrackingInterrupted,
        "a command went to the disk past the block layer; what it wrote is not known";
    /// The kernel counted more than we did.
    SectorsUnseen = 14, "sectors-unseen", TrackerSuspect,
        "the kernel counted more sectors than the programs saw";
}

impl core::fmt::Display for Check {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.code())
    }
}

/// Whether all writes between two samples of one attach were marked.
///
/// Errors: the first check that failed.
pub fn compare(earlier: &Vector, now: &Vector) -> Result<Proof, Check> {
    let attached = |ids: &[u32; 3]| ids.iter().all(|id| *id != 0);
    let mut counters = earlier.growing().into_iter().zip(now.growing());
    let shrank = counters.any(|(before, now)| now < before);
    let failed = [
        (earlier.boot != now.boot, Check::OtherBoot),
        (
            (earlier.device, earlier.start_sector) != (now.device, now.start_sector),
            Check::DeviceMoved,
        ),
        (earlier.sectors != now.sectors, Check::DeviceResized),
        (
            earlier.links != now.links || !attached(&now.links),
            Check::LinksGone,
        ),
        (
            earlier.programs != now.programs || !attached(&now.programs),
            Check::ProgramsChanged,
        ),
        (
            (earlier.base, earlier.queued_base) != (now.base, now.queued_base),
            Check::CountRestarted,
        ),
        (!earlier.statistics || !now.statistics, Check::StatisticsOff),
        (earlier.holders > 0 || now.holders > 0, Check::Stacked),
        (
            shrank || now.base.exceeds(now.kernel) || now.queued_base.exceeds(now.kernel),
            Check::WentBackwards,
        ),
        (now.lost != earlier.lost, Check::MarksLost),
        (now.misses != earlier.misses, Check::RunsSkipped),
        (now.passthrough != earlier.passthrough, Check::Passthrough),
        (now.unseen(), Check::SectorsUnseen),
    ];
    match failed.into_iter().find(|(fails, _)| *fails) {
        Some((_, check)) => Err(check),
        None if now.counted() == now.own => Ok(Proof::Proven),
        None if now.counted_of_queued() == now.queued => Ok(Proof::Queued),
        None => Ok(Proof::Provisional),
    }
}
