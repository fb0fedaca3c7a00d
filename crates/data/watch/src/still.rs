//! Swaps that no write may straddle: inside a freeze, and seen to be so.
//!
//! **Invariant**: what such a swap has closed is on the device when it returns. What it has drained is in the tracker's open
//! generation, whether it could be had or not.

use blktide_sys::event::pause;
use blktide_sys::spawn::Program;
use blktide_types::set::BlockSet;
use blktide_volume::VolumeError;
use blktide_volume::error::Refusal;
use std::time::Duration;

use crate::ahead::{UNQUIET_MAX, UNQUIET_PAUSE};
use crate::attach::writers_of;
use crate::evidence::Completions;
use crate::limits::FreezeLimits;
use crate::quiet::Quiet;
use crate::target::Target;
use crate::tracker::{Watched, refused};

/// How a volume stands still for a swap that no write may straddle.
pub(crate) struct Still<'a> {
    pub(crate) guard: &'a Program,
    pub(crate) limits: FreezeLimits,
}

/// What is done inside a freeze, with the volume.
type Begin<'a> = &'a mut dyn FnMut(&mut Watched);

/// Whether somebody else could have written, as far as is known.
pub(crate) enum Company {
    None,
    Some,
}

impl Still<'_> {
    /// The first swap of an image, and what is believed of the marks from then on; the completions seen so far, and what may have
    /// been under way.
    pub(crate) fn begin(
        &self,
        watched: &mut Watched,
        target: &Target,
        longest: &mut Duration,
    ) -> Result<(Option<Completions>, BlockSet), VolumeError> {
        let mut completions = watched.completions(target);
        let swapped = if target.bio_based {
            let mut dirty = BlockSet::new(watched.geometry().block_count());
            self.swap(watched, target, longest, (None, &mut dirty))?;
            dirty
        } else {
            watched.drain()
        };
        watched.look_at_evidence(target);
        // What was under way at the begin was marked since the last instant, maybe taken by somebody before us.
        let mut drained = watched.in_open_generation();
        drained.union_with(&swapped);
        if watched.distrusted().is_some() {
            // Nothing says what is under way: a moment at which nothing is, and the evidence begins there.
            let mut anew = |watched: &mut Watched| {
                watched.begin_anew(target, true);
                completions = watched.completions(target);
            };
            let mut more = BlockSet::new(watched.geometry().block_count());
            let begun = self.swap(watched, target, longest, (Some(&mut anew), &mut more));
            drained = match begun {
                Ok(Company::None) => more,
                // Somebody's write may have waited for a scheduler all the time.
                Ok(Company::Some) => BlockSet::full(watched.geometry().block_count()),
                Err(VolumeError::Refused { .. }) => {
                    watched.begin_anew(target, false);
                    BlockSet::full(watched.geometry().block_count())
                }
                Err(error) => return Err(error),
            };
        }
        Ok((completions, drained))
    }

    /// Swaps and drains inside a freeze.
    ///
    /// `begin` is called in it, and begins the evidence. Should a write have waited for a scheduler then, its end is one sector too many
    /// of the kernel's, and the first completion that goes unseen ends the belief.
    ///
    /// Adds what was drained to `drained`, whatever comes of it.
    ///
    /// Errors: `Refused`: it cannot be made to stand still, or did not until the end.
    pub(crate) fn swap(
        &self,
        watched: &mut Watched,
        target: &Target,
        longest: &mut Duration,
        (mut begin, drained): (Option<Begin<'_>>, &mut BlockSet),
    ) -> Result<Company, VolumeError> {
        let options = watched.options.clone();
        let mut quiet = Quiet::of(&options, self.guard)?;
        if target.bio_based && matches!(quiet, Quiet::Impossible) {
            let message = format!(
                "{} is in use without a file system that could be frozen, and a moment is needed at which no write is under way",
                options.device.display()
            );
            return Err(refused(Refusal::Unwatchable, message));
        }
        let writers = writers_of(&options)?;
        if target.bio_based && !writers.is_empty() {
            let names: Vec<String> = writers.iter().map(ToString::to_string).collect();
            let message = format!(
                "{} is open for writing by {}, and a moment is needed at which no write is under way",
                options.device.display(),
                names.join(", ")
            );
            return Err(refused(Refusal::Unwatchable, message));
        }
        let mut tries = 0;
        let (still, whole, alone) = loop {
            tries += 1;
            let look = quiet.look(&options)?;
            quiet.sync();
            let standing = quiet.begin(watched, &self.limits, look)?;
            let alone = standing.is_alone();
            let (dirty, mut still) = watched.drain_still(target, alone);
            drained.union_with(&dirty);
            if let Some(marked) = still {
                let sure = match &mut begin {
                    Some(begin) => {
                        begin(watched);
                        true
                    }
                    None => alone || watched.all_is_done(target),
                };
                still = still.filter(|_| sure && watched.is_unmarked_since(marked));
            }
            let (time, whole) = standing.end();
            *longest = (*longest).max(time);
            let hopeless = target.bio_based && !alone;
            if still.is_some() && whole || hopeless || tries >= UNQUIET_MAX {
                break (still, whole, alone);
            }
            // What was queued long before (discards) may have an end.
            drop(pause(UNQUIET_PAUSE));
        };
        let why = match (still.is_some(), whole) {
            (true, true) if alone => return Ok(Company::None),
            (true, true) => return Ok(Company::Some),
            (false, _) => "it is written past its file system",
            (true, false) => "somebody else has thawed it",
        };
        let message = format!(
            "{}: a moment is needed at which no write is under way, and there was none: {why}",
            options.device.display()
        );
        Err(refused(Refusal::Unwatchable, message))
    }
}
