//! Whether a bitmap file is believed, and if not, why: P4's and P5's rules in one place, a pure function.

use super::{Found, Identity};
use crate::evidence::{Evidence, compare};
use crate::tracker::StoredGeneration;
use blktide_format::FormatError;
use blktide_format::bitmap_file::{self, Checked, MAGIC_CONSUMED};
use blktide_format::marker::{self, State};
use blktide_types::clock::WallTime;
use blktide_types::reason::Reason;

/// What was found at attach.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Situation {
    /// The marker file.
    pub marker: Found,
    /// The bitmap file.
    pub file: Found,
    /// What the device looks like; `None` if nobody looked.
    pub evidence: Option<Evidence>,
}

impl Situation {
    /// Nothing found yet.
    pub const fn new() -> Self {
        Self {
            marker: Found::Absent,
            file: Found::Absent,
            evidence: None,
        }
    }

    /// Whether only the device can still tell.
    pub fn needs_evidence(&self, identity: &Identity) -> bool {
        check(self, identity).is_ok()
    }
}

impl Default for Situation {
    fn default() -> Self {
        Self::new()
    }
}

/// Whether the bitmap file is believed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is.
    Believed {
        /// Oldest first.
        generations: Vec<StoredGeneration>,
        /// Why, and since when, the volume was distrusted at the stop: an image in full was, and is, owed.
        distrust: Option<(Reason, WallTime)>,
    },
    /// It is not.
    NotBelieved {
        /// Why.
        reason: Reason,
        /// Why, for people.
        detail: &'static str,
    },
}

/// Judges what was found.
pub fn decide(situation: &Situation, identity: &Identity) -> Verdict {
    let believed = check(situation, identity).and_then(|file| {
        let now = situation.evidence.unwrap_or(Evidence::UNREADABLE);
        compare(&file.evidence(), &now, identity.exclusive).map_err(|reason| {
            let detail = if reason == Reason::ForeignWrite {
                "the volume is not as it was left"
            } else {
                "nothing on the volume could show a write by somebody else"
            };
            (reason, detail)
        })?;
        let generations = file
            .generations(&identity.geometry)
            .map_err(|_why| (Reason::BitmapDamaged, "the bitmap file's bits cannot be"))?;
        Ok((generations, file.distrust()))
    });
    match believed {
        Ok((generations, distrust)) => Verdict::Believed {
            generations: generations.iter().map(stored).collect(),
            distrust,
        },
        Err((reason, detail)) => Verdict::NotBelieved { reason, detail },
    }
}

type No = (Reason, &'static str);

/// All that can be judged without looking at the device.
fn check<'a>(situation: &'a Situation, identity: &Identity) -> Result<Checked<'a>, No> {
    let marker = match &situation.marker {
        Found::Absent => return Err((Reason::BitmapMissing, "there is no marker")),
        Found::Unreadable => return Err((Reason::BitmapDamaged, "the marker cannot be read")),
        Found::Content(bytes) => marker::decode(bytes)
            .map_err(|_why| (Reason::BitmapDamaged, "the marker fails its checks"))?,
    };
    if marker.volume != identity.volume {
        return Err((Reason::BitmapOtherVolume, "the marker is another volume's"));
    }
    match marker.state {
        State::Closed => {}
        State::Open(Some(reason)) => {
            return Err((reason, "said so when the last life was given up"));
        }
        State::Open(None) if marker.boot == identity.boot => {
            return Err((
                Reason::TrackingInterrupted,
                "the volume's programs went without a clean stop",
            ));
        }
        State::Open(None) => {
            return Err((
                Reason::UncleanShutdown,
                "the machine went down without a clean stop",
            ));
        }
    }
    let bytes = match &situation.file {
        Found::Absent => return Err((Reason::BitmapMissing, "there is no bitmap file")),
        Found::Unreadable => return Err((Reason::BitmapDamaged, "the bitmap file cannot be read")),
        Found::Content(bytes) => bytes,
    };
    let consumed = FormatError::Magic {
        found: MAGIC_CONSUMED,
    };
    let file = bitmap_file::decode(bytes).map_err(|error| {
        if error == consumed {
            (Reason::BitmapStale, "the bitmap file was used before")
        } else {
            (Reason::BitmapDamaged, "the bitmap file fails its checks")
        }
    })?;
    if file.volume() != identity.volume {
        return Err((
            Reason::BitmapOtherVolume,
            "the bitmap file is another volume's",
        ));
    }
    if !file.fits(&identity.geometry) {
        return Err((
            Reason::BitmapOtherSize,
            "the bitmap file counts other blocks",
        ));
    }
    if file.life() != marker.life {
        return Err((
            Reason::BitmapStale,
            "the bitmap file is of another life than the marker names",
        ));
    }
    Ok(file)
}

fn stored(generation: &bitmap_file::Generation) -> StoredGeneration {
    StoredGeneration {
        name: generation.name,
        counter: generation.counter,
        opened: generation.opened,
        words: generation.grains.words().to_vec(),
    }
}
