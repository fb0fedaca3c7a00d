//! The hand-over of the bitmap between lives (P4): what the state machine of the engine asks for, done to files.

use crate::error::VolumeError;
use crate::log::Log;
use crate::server::{Tracker, engine_error};
use crate::start::Start;
use blktide_device::Backing;
use blktide_engine::Engine;
use blktide_format::shared::control;
use blktide_sys::clock::{SystemClock, SystemRandom};
use blktide_types::clock::{Clock, Random};
use blktide_types::id::{GenerationName, LifeId, VolumeId};
use blktide_types::reason::Reason;

/// A life of the bitmap: from attach to clean stop.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Life {
    /// The volume.
    pub(crate) volume: VolumeId,
    /// The life.
    pub(crate) life: LifeId,
}

impl Life {
    /// The one that stands in the control memory.
    pub(crate) fn of_words(engine: &Engine) -> Self {
        let id = |a, b| {
            let mut out = [0; 16];
            let (low, high) = out.split_at_mut(8);
            low.copy_from_slice(&engine.word(a).to_ne_bytes());
            high.copy_from_slice(&engine.word(b).to_ne_bytes());
            out
        };
        Self {
            volume: VolumeId(id(control::VOLUME_ID_0, control::VOLUME_ID_1)),
            life: LifeId(id(control::LIFE_ID_0, control::LIFE_ID_1)),
        }
    }

    fn store(self, engine: &Engine) {
        let put = |index: usize, half: &[u8]| {
            let mut word = [0; 8];
            for (to, from) in word.iter_mut().zip(half) {
                *to = *from;
            }
            engine.set_word(index, u64::from_ne_bytes(word));
        };
        let (low, high) = self.volume.0.split_at(8);
        put(control::VOLUME_ID_0, low);
        put(control::VOLUME_ID_1, high);
        let (low, high) = self.life.0.split_at(8);
        put(control::LIFE_ID_0, low);
        put(control::LIFE_ID_1, high);
    }
}

/// Begins a life: takes the bitmap file over if it may be believed. Afterwards the first write is allowed.
pub(crate) fn open(
    _start: &Start,
    backing: &Backing,
    engine: &Engine,
    tracker: &mut Tracker,
    log: &Log,
) -> Result<Life, VolumeError> {
    let random = SystemRandom::new();
    let life = Life {
        volume: VolumeId(random.id()),
        life: LifeId(random.id()),
    };
    life.store(engine);
    let wall = SystemClock.wall();
    tracker
        .begin_life(&[], (GenerationName(random.id()), wall))
        .map_err(engine_error)?;
    tracker.distrust(
        (Reason::BitmapMissing, wall),
        "no bitmap file",
        GenerationName(random.id()),
    );
    if let Some(sectors) = backing.sectors_changed() {
        engine.set_word(control::SECTORS_WRITTEN, sectors);
    }
    log.say("server: tracking begins anew");
    Ok(life)
}

/// Ends a life: stores the bitmap file and closes the marker.
pub(crate) fn close(
    _start: &Start,
    _backing: &Backing,
    _life: &Life,
    _tracker: &Tracker,
) -> Result<(), VolumeError> {
    Ok(())
}
