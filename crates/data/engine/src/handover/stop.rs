//! The hand-over at a clean stop: from memory to stable storage.
//!
//! It may run twice (its server died in it): nothing writes the volume any more, so the second run stores the same.

use super::{Action, Event, Identity, Name};
use crate::evidence::Evidence;
use crate::tracker::StoredGeneration;
use blktide_format::bitmap_file::{self, Content, Generation};
use blktide_format::marker;
use blktide_types::clock::WallTime;
use blktide_types::reason::Reason;
use blktide_types::set::BlockSet;
use blktide_types::unit::BlockCount;

/// What became of the bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// It is durable and the next attach may believe it.
    Whole,
    /// It is durable; the marker could not be made so. It may be believed or not, and is right in either case.
    MarkerUnsure,
    /// It is not stored; the next attach distrusts.
    Not,
}

/// What the tracker stores.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Bitmap {
    /// Generations, oldest first, the last one open; and why the volume is distrusted, if it is.
    Known {
        /// As `Control::export` gives them.
        generations: Vec<StoredGeneration>,
        /// Why, and since when.
        distrust: Option<(Reason, WallTime)>,
    },
    /// Writes went by unseen: nothing is stored, for this reason.
    Unknown(Reason),
}

/// The hand-over at a clean stop. The volume is provably closed to writers, and the fence still ours.
#[derive(Debug)]
pub struct Stop {
    identity: Identity,
    state: State,
    bitmap: Bitmap,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Before,
    Flushing,
    Collecting,
    Storing,
    SyncingFile,
    SyncingFolder,
    Closing,
    SyncingMarker,
    SyncingMarkerName,
    Removing,
    SyncingRemoval,
    Reasoning,
    SyncingReason,
    Over,
}

impl Stop {
    /// Before the first event.
    pub const fn new(identity: Identity, bitmap: Bitmap) -> Self {
        Self {
            identity,
            state: State::Before,
            bitmap,
        }
    }

    /// Takes what happened, says what is to be done next.
    pub fn step(&mut self, event: &Event) -> Action {
        match event {
            Event::Start if self.state == State::Before => match self.bitmap {
                Bitmap::Known { .. } => self.go(State::Flushing, Action::FlushDevice),
                Bitmap::Unknown(reason) => {
                    let marker = self.identity.marker(marker::State::Open(Some(reason)));
                    self.go(State::Reasoning, Action::Put(Name::Marker, marker))
                }
            },
            Event::Evidence(evidence) if self.state == State::Collecting => self.store(evidence),
            Event::Failed if self.state == State::Collecting => self.store(&Evidence::UNREADABLE),
            Event::Done => self.done(),
            Event::Failed => self.failed(),
            Event::Start | Event::Content(_) | Event::Evidence(_) => self.end(Stored::Not),
        }
    }

    fn done(&mut self) -> Action {
        match self.state {
            State::Flushing => self.go(State::Collecting, Action::Collect),
            State::Storing => self.go(State::SyncingFile, Action::Sync(Name::Bitmap)),
            State::SyncingFile => self.go(State::SyncingFolder, Action::SyncFolder),
            State::SyncingFolder => {
                let marker = self.identity.marker(marker::State::Closed);
                self.go(State::Closing, Action::Put(Name::Marker, marker))
            }
            State::Closing => self.go(State::SyncingMarker, Action::Sync(Name::Marker)),
            // At attach the marker's name may have been lost to an error.
            State::SyncingMarker => self.go(State::SyncingMarkerName, Action::SyncFolder),
            State::SyncingMarkerName => self.end(Stored::Whole),
            State::Removing => self.go(State::SyncingRemoval, Action::SyncFolder),
            State::Reasoning => self.go(State::SyncingReason, Action::Sync(Name::Marker)),
            State::SyncingRemoval
            | State::SyncingReason
            | State::Before
            | State::Collecting
            | State::Over => self.end(Stored::Not),
        }
    }

    fn failed(&mut self) -> Action {
        match self.state {
            State::Storing | State::SyncingFile | State::SyncingFolder => {
                self.go(State::Removing, Action::Unlink(Name::Bitmap))
            }
            State::Closing | State::SyncingMarker | State::SyncingMarkerName => {
                self.end(Stored::MarkerUnsure)
            }
            // Without a flush nobody knows what is on the device.
            State::Flushing
            | State::Removing
            | State::SyncingRemoval
            | State::Reasoning
            | State::SyncingReason
            | State::Before
            | State::Collecting
            | State::Over => self.end(Stored::Not),
        }
    }

    fn store(&mut self, evidence: &Evidence) -> Action {
        let Bitmap::Known {
            generations,
            distrust,
        } = &self.bitmap
        else {
            return self.end(Stored::Not);
        };
        let grains = BlockCount(self.identity.geometry.grain_count());
        let content = Content {
            volume: self.identity.volume,
            life: self.identity.life,
            geometry: self.identity.geometry,
            distrust: *distrust,
            generations: generations
                .iter()
                .map(|g| Generation {
                    name: g.name,
                    counter: g.counter,
                    opened: g.opened,
                    grains: BlockSet::from_words(grains, g.words.iter().copied()),
                })
                .collect(),
            evidence: evidence.block(),
        };
        match bitmap_file::encode(&content) {
            Ok(bytes) => self.go(State::Storing, Action::Put(Name::Bitmap, bytes)),
            Err(_) => self.end(Stored::Not),
        }
    }

    fn end(&mut self, stored: Stored) -> Action {
        self.go(State::Over, Action::Ended(stored))
    }

    fn go(&mut self, state: State, action: Action) -> Action {
        self.state = state;
        action
    }
}
