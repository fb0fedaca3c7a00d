//! What is believed of the marks, from sample to sample (P14), and where it survives the process: in the mapped head.
//!
//! ```text
//!              quiet sample, all completions seen              closing sample while writers go on
//! settled ◀───────────────────────────────────── open question ◀──────────────────────────────────── settled
//!                                                  │ the next closing sample: its image compares digests
//! any ──a check fails──▶ in doubt, until a belief is begun anew
//! ```
//! A write that was under way at a swap is marked in the generation that began there when it completes, and was queued long before:
//! whether that mark is there only the count of completions can tell, and only at a moment at which it does not move (what falls
//! between the reading of the two counts would make up for what is missing). So a generation that was closed while writers went
//! on (no freeze, or writers past the file system) is proven by any later quiet sample, and if there was none the next image
//! cannot lean on the marks alone. Where nothing was under way at the swap, that all was seen queued is enough.
//!
//! **Invariant**: a check that failed stays failed. What is stored is what was said: it is stored before anybody acts on it, and a
//! death while it is stored leaves the sample before it.

use super::vector::{Check, Proof, Sectors, Vector, compare};
use crate::atomic::{AtomicU64, Memory, Ordering, fence};
use crate::broken::step;
use crate::tracker::{halves, name_of};
use blktide_format::shared::{self, sample, watch};
use blktide_types::id::{BootId, GenerationName};

/// Words of a stored sample.
type Stored = [u64; sample::WORDS];

/// When a sample is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Occasion {
    /// Between two instants.
    Between,
    /// Between two instants, and no count moved between two samples.
    Pause,
    /// At the swap after which the image's generation opens, while requests may be under way: there was no freeze.
    Closing,
    /// At such a swap inside a freeze, or behind the fence: nothing is under way.
    Still,
}

impl Occasion {
    const fn closes(self) -> bool {
        matches!(self, Self::Closing | Self::Still)
    }
}

/// What is believed at a sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// What the sample proves of all writes up to now.
    pub proof: Proof,
    /// The generation that was closed before was never proven: this image compares digests, or reads everything.
    pub owes_digests: bool,
}

/// What is believed of a volume's marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Belief {
    last: Vector,
    sequence: u64,
    open_question: bool,
    doubt: Option<Check>,
}

impl Belief {
    /// Begins to believe: at the attach, or when an image that leans on nothing ends a distrust. `first` has its base
    /// ([`Vector::calibrate`]).
    ///
    /// Errors: a check that `first` fails by itself.
    pub fn begin(first: &Vector) -> Result<Self, Check> {
        compare(first, first)?;
        Ok(Self {
            last: *first,
            sequence: 0,
            open_question: false,
            doubt: None,
        })
    }

    /// Takes the place of `earlier`, which was stored: from its next [`Self::save`] on this is the newer one.
    pub const fn replace(&mut self, earlier: &Self) {
        self.sequence = earlier.sequence;
    }

    /// The newest sample that was believed.
    pub const fn last(&self) -> &Vector {
        &self.last
    }

    /// The check that failed, if one did.
    pub const fn doubt(&self) -> Option<Check> {
        self.doubt
    }

    /// Whether a generation was closed that no sample has proven since: its image is provisional.
    pub const fn open_question(&self) -> bool {
        self.open_question
    }

    /// Takes a sample into account; `None` if it could not be taken. Then [`Self::save`], and only then what follows from it.
    ///
    /// Errors: the check that failed, now or before. The tracker is to be distrusted.
    pub fn sample(&mut self, now: Option<&Vector>, occasion: Occasion) -> Result<Verdict, Check> {
        if let Some(check) = self.doubt {
            return Err(check);
        }
        let compared = now.ok_or(Check::SampleMissing);
        let compared = compared.and_then(|now| Ok((*now, compare(&self.last, now)?)));
        let (now, proof) = compared.inspect_err(|check| self.doubt = Some(*check))?;
        self.last = now;
        let quiet = matches!(occasion, Occasion::Pause | Occasion::Still);
        if proof == Proof::Proven && quiet {
            self.open_question = false;
        }
        let owes_digests = self.open_question && occasion.closes();
        if occasion == Occasion::Closing || occasion.closes() && proof == Proof::Provisional {
            self.open_question = true;
        }
        Ok(Verdict {
            proof,
            owes_digests,
        })
    }

    /// Stores it in the head of the marks' memory, in the place of the sample before the last.
    pub fn save(&mut self, head: &dyn Memory) {
        self.sequence = self.sequence.wrapping_add(1);
        let start = if self.sequence & 1 == 0 {
            watch::SAMPLE_0
        } else {
            watch::SAMPLE_1
        };
        let place = head.words().get(start..).unwrap_or_default();
        for (word, value) in place.iter().zip(self.words()) {
            step();
            word.store(value, Ordering::Relaxed);
        }
        // Whoever sees what the caller stores next sees the sample, too.
        fence(Ordering::Release);
    }

    /// The newest one that was stored, by whichever process.
    ///
    /// Errors: `SampleMissing` if none checks.
    pub fn load(head: &dyn Memory) -> Result<Self, Check> {
        fence(Ordering::Acquire);
        [watch::SAMPLE_0, watch::SAMPLE_1]
            .into_iter()
            .filter_map(|start| {
                let end = start.checked_add(sample::WORDS)?;
                Self::of_words(head.words().get(start..end)?)
            })
            .max_by_key(|belief| belief.sequence)
            .ok_or(Check::SampleMissing)
    }

    /// The words that are stored.
    fn words(&self) -> Stored {
        let v = &self.last;
        let [boot_0, boot_1] = halves(GenerationName(v.boot.0));
        let [p0, p1, p2] = v.programs;
        let [l0, l1, l2] = v.links;
        let doubt = self.doubt.map_or(0, Check::number);
        let values = [
            (sample::SEQUENCE, self.sequence),
            (sample::BOOT_ID_0, boot_0),
            (sample::BOOT_ID_1, boot_1),
            (sample::PROGRAMS_01, pair(p0, p1)),
            (sample::PROGRAM_2, pair(p2, v.holders)),
            (sample::LINKS_01, pair(l0, l1)),
            (sample::LINK_2, pair(l2, u32::from(v.statistics))),
            (sample::MISSES, v.misses),
            (sample::LOST, v.lost),
            (sample::PASSTHROUGH, v.passthrough),
            (sample::EVENTS, v.events),
            (sample::GENERATION, v.generation),
            (sample::OWN_WRITTEN, v.own.written),
            (sample::OWN_DISCARDED, v.own.discarded),
            (sample::QUEUED_WRITTEN, v.queued.written),
            (sample::QUEUED_DISCARDED, v.queued.discarded),
            (sample::QUEUED_BASE_WRITTEN, v.queued_base.written),
            (sample::QUEUED_BASE_DISCARDED, v.queued_base.discarded),
            (sample::KERNEL_WRITTEN, v.kernel.written),
            (sample::KERNEL_DISCARDED, v.kernel.discarded),
            (sample::BASE_WRITTEN, v.base.written),
            (sample::BASE_DISCARDED, v.base.discarded),
            (sample::SECTORS, v.sectors),
            (sample::START_SECTOR, v.start_sector),
            (sample::DEVICE, v.device),
            (sample::OPEN_QUESTION, u64::from(self.open_question)),
            (sample::DOUBT, u64::from(doubt)),
        ];
        let mut words = [0; sample::WORDS];
        for (index, value) in values {
            if let Some(word) = words.get_mut(index) {
                *word = value;
            }
        }
        let sum = sum(&words);
        if let Some(last) = words.get_mut(sample::SUM) {
            *last = sum;
        }
        words
    }

    /// What stored words say; `None` if they do not check.
    fn of_words(stored: &[AtomicU64]) -> Option<Self> {
        let mut words: Stored = [0; sample::WORDS];
        for (to, from) in words.iter_mut().zip(stored) {
            *to = from.load(Ordering::Relaxed);
        }
        let word = |index: usize| words.get(index).copied().unwrap_or(0);
        let sectors = |index: usize| Sectors {
            written: word(index),
            discarded: word(index.saturating_add(1)),
        };
        let doubt = word(sample::DOUBT);
        let known = Check::from_number(doubt);
        if word(sample::SUM) != sum(&words) || doubt != 0 && known.is_none() {
            return None;
        }
        let [p0, p1] = unpair(word(sample::PROGRAMS_01));
        let [p2, holders] = unpair(word(sample::PROGRAM_2));
        let [l0, l1] = unpair(word(sample::LINKS_01));
        let [l2, statistics] = unpair(word(sample::LINK_2));
        let boot = name_of(word(sample::BOOT_ID_0), word(sample::BOOT_ID_1));
        Some(Self {
            last: Vector {
                boot: BootId(boot.0),
                programs: [p0, p1, p2],
                links: [l0, l1, l2],
                misses: word(sample::MISSES),
                lost: word(sample::LOST),
                passthrough: word(sample::PASSTHROUGH),
                events: word(sample::EVENTS),
                generation: word(sample::GENERATION),
                own: sectors(sample::OWN_WRITTEN),
                queued: sectors(sample::QUEUED_WRITTEN),
                queued_base: sectors(sample::QUEUED_BASE_WRITTEN),
                kernel: sectors(sample::KERNEL_WRITTEN),
                base: sectors(sample::BASE_WRITTEN),
                sectors: word(sample::SECTORS),
                start_sector: word(sample::START_SECTOR),
                device: word(sample::DEVICE),
                holders,
                statistics: statistics == 1,
            },
            sequence: word(sample::SEQUENCE),
            open_question: word(sample::OPEN_QUESTION) != 0,
            doubt: known,
        })
    }
}

fn sum(words: &Stored) -> u64 {
    shared::table_sum(words.iter().copied().take(sample::SUM))
}

fn pair(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

fn unpair(word: u64) -> [u32; 2] {
    [word & 0xffff_ffff, word >> 32].map(|half| u32::try_from(half).unwrap_or(0))
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests;
