//! The hand-over of the dirty bitmap from stable storage to memory, and back (P4). req A5
//!
//! ```text
//! attach: marker, file, evidence read ─▶ decide ─▶ marker 'open' durable ─▶ file overwritten, durable
//!         ─▶ unlinked ─▶ folder durable ─▶ Serve: the first write
//! stop:   (provably closed) device flushed ─▶ evidence ─▶ file durable ─▶ folder durable ─▶ marker 'closed' durable
//! ```
//! **Invariant**: at every instant, a bitmap file that a restart would find and believe has a bit for every grain
//! written since its generations began. Two witnesses hold it while the volume may be written: the marker says
//! `open` (or is gone, where it cannot be written), and the file is destroyed. Either alone is enough not to be believed; with
//! neither, no write is let through. (The file's alone does not hold against somebody who puts an older file back.)
//!
//! | what fails at attach | then |
//! |---|---|
//! | reading marker or file | not believed, `bitmap-damaged`; goes on |
//! | one witness is not durable (ENOSPC, EIO, read-only), or the marker had to be removed | goes on, not believed: `tracking-interrupted` unless another reason was found before |
//! | neither is | refused: the old bitmap might be believed after a cut. Nothing is served |
//!
//! | what fails at stop | then |
//! |---|---|
//! | flushing the device; no bitmap to store | no file; the marker stays `open`, with the reason where there is one |
//! | reading the evidence | stored; the next attach says `foreign-write-unknown` |
//! | writing file or folder | file removed, marker stays `open` |
//! | writing the marker | either marker is right: the file is durable, and nobody writes any more |

mod decide;
mod drive;
mod stop;

pub use decide::{Situation, Verdict, decide};
pub use drive::{HandoverError, Surroundings, attach, forget, stop};
pub use stop::{Bitmap, Stop, Stored};

use crate::evidence::Evidence;
use crate::tracker::StoredGeneration;
use blktide_format::bitmap_file;
use blktide_format::marker::{self, Marker};
use blktide_types::clock::WallTime;
use blktide_types::geometry::Geometry;
use blktide_types::id::{BootId, LifeId, VolumeId};
use blktide_types::reason::Reason;

/// A file of the volume's state folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Name {
    /// `marker`.
    Marker,
    /// `bitmap`.
    Bitmap,
}

impl Name {
    /// The file's name in the folder.
    pub const fn file_name(self) -> &'static str {
        match self {
            Self::Marker => "marker",
            Self::Bitmap => "bitmap",
        }
    }
}

/// What the driver is to do next. One at a time; its event comes before the next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Read a whole file: [`Event::Content`].
    Read(Name),
    /// Look at the device: [`Event::Evidence`].
    Collect,
    /// Overwrite a file in place from its first byte, create it if it is not there, then cut it to this length.
    Put(Name, Vec<u8>),
    /// Make a file's content durable.
    Sync(Name),
    /// Remove a file's name; one that is not there is removed.
    Unlink(Name),
    /// Make the names of the folder durable.
    SyncFolder,
    /// Make durable what was written to the backing device.
    FlushDevice,
    /// Attach is over: writes may be let through, with this tracking.
    Serve(Begun),
    /// Attach is over: no write may be let through.
    Refuse,
    /// Stop is over.
    Ended(Stored),
}

/// What the driver reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Begin.
    Start,
    /// A file's content; `None` if it is not there.
    Content(Option<Vec<u8>>),
    /// What the device looks like.
    Evidence(Evidence),
    /// It was done.
    Done,
    /// It failed, perhaps in part.
    Failed,
}

/// Whose hand-over it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The volume.
    pub volume: VolumeId,
    /// The life that begins, or ends.
    pub life: LifeId,
    /// This boot.
    pub boot: BootId,
    /// The volume's shape.
    pub geometry: Geometry,
    /// Nothing else ever writes this device.
    pub exclusive: bool,
}

impl Identity {
    /// Bytes that a bitmap file of this volume has at most; a longer one is damaged. So much need be read, and one more.
    pub fn file_bytes_max(&self) -> u64 {
        let bits = self.geometry.grain_count().div_ceil(64).saturating_mul(8);
        bits.saturating_add(48)
            .saturating_mul(bitmap_file::GENERATIONS_MAX.into())
            .saturating_add(112 + 64)
    }

    fn marker(&self, state: marker::State) -> Vec<u8> {
        let marker = Marker {
            state,
            volume: self.volume,
            life: self.life,
            boot: self.boot,
        };
        marker::encode(&marker).to_vec()
    }
}

/// What the tracker begins a life with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Begun {
    /// The bitmap is believed: the generations go on; if a full image was still owed, it still is.
    Continued {
        /// Oldest first; the last is open and stays so.
        generations: Vec<StoredGeneration>,
        /// Why, and since when, the volume is distrusted.
        distrust: Option<(Reason, WallTime)>,
    },
    /// All names are forgotten; a generation with a fresh name is to be opened.
    Anew {
        /// Why.
        reason: Reason,
        /// Why, for people.
        detail: &'static str,
    },
}

/// The hand-over at attach.
///
/// An event that the state does not expect is a fault of the driver; the machine then refuses.
#[derive(Debug)]
pub struct Attach {
    identity: Identity,
    state: State,
    situation: Situation,
    begun: Option<Begun>,
    marker_says_open: Witness,
    file_is_destroyed: Witness,
}

/// Something durable that keeps an old bitmap from being believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Witness {
    /// Not, or not surely.
    Missing,
    /// Surely, but not as it should be: enough to serve, not to believe (TB5: the folder is failing).
    Makeshift,
    /// On the disk.
    Durable,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Before,
    ReadingMarker,
    ReadingFile,
    Collecting,
    OpeningMarker,
    SyncingMarker,
    SyncingMarkerName,
    RemovingMarker,
    SyncingMarkerRemoval,
    Overwriting,
    SyncingFile,
    Unlinking,
    SyncingFolder,
    Over,
}

impl Attach {
    /// Before the first event. The fence of the backing device is held.
    pub const fn new(identity: Identity) -> Self {
        Self {
            identity,
            state: State::Before,
            situation: Situation::new(),
            begun: None,
            marker_says_open: Witness::Missing,
            file_is_destroyed: Witness::Missing,
        }
    }

    /// Takes what happened, says what is to be done next.
    pub fn step(&mut self, event: Event) -> Action {
        match self.state {
            State::Before => match event {
                Event::Start => self.go(State::ReadingMarker, Action::Read(Name::Marker)),
                Event::Content(_) | Event::Evidence(_) | Event::Done | Event::Failed => {
                    self.refuse()
                }
            },
            State::ReadingMarker => {
                let Some(content) = content(event) else {
                    return self.refuse();
                };
                self.situation.marker = content;
                self.go(State::ReadingFile, Action::Read(Name::Bitmap))
            }
            State::ReadingFile => {
                let Some(content) = content(event) else {
                    return self.refuse();
                };
                self.situation.file = content;
                if self.situation.needs_evidence(&self.identity) {
                    self.go(State::Collecting, Action::Collect)
                } else {
                    self.open_marker()
                }
            }
            State::Collecting => match event {
                Event::Evidence(evidence) => {
                    self.situation.evidence = Some(evidence);
                    self.open_marker()
                }
                Event::Failed => {
                    self.situation.evidence = Some(Evidence::UNREADABLE);
                    self.open_marker()
                }
                Event::Start | Event::Content(_) | Event::Done => self.refuse(),
            },
            State::OpeningMarker
            | State::SyncingMarker
            | State::SyncingMarkerName
            | State::RemovingMarker
            | State::SyncingMarkerRemoval
            | State::Overwriting
            | State::SyncingFile
            | State::Unlinking
            | State::SyncingFolder => match event {
                Event::Done => self.done(),
                Event::Failed => self.failed(),
                Event::Start | Event::Content(_) | Event::Evidence(_) => self.refuse(),
            },
            State::Over => self.refuse(),
        }
    }

    fn open_marker(&mut self) -> Action {
        self.begun = Some(match decide(&self.situation, &self.identity) {
            Verdict::Believed {
                generations,
                distrust,
            } => Begun::Continued {
                generations,
                distrust,
            },
            Verdict::NotBelieved { reason, detail } => Begun::Anew { reason, detail },
        });
        let marker = self.identity.marker(marker::State::Open(None));
        self.go(State::OpeningMarker, Action::Put(Name::Marker, marker))
    }

    /// The step of this state was done.
    fn done(&mut self) -> Action {
        match self.state {
            State::OpeningMarker => self.go(State::SyncingMarker, Action::Sync(Name::Marker)),
            // A marker that was there has its name; one that was not has none that would survive.
            State::SyncingMarker if self.situation.marker == Found::Absent => {
                self.go(State::SyncingMarkerName, Action::SyncFolder)
            }
            State::RemovingMarker => self.go(State::SyncingMarkerRemoval, Action::SyncFolder),
            State::SyncingMarker | State::SyncingMarkerName => {
                self.marker_says_open = Witness::Durable;
                self.consume()
            }
            State::SyncingMarkerRemoval => {
                self.marker_says_open = Witness::Makeshift;
                self.consume()
            }
            State::Overwriting => self.go(State::SyncingFile, Action::Sync(Name::Bitmap)),
            State::SyncingFile => {
                self.file_is_destroyed = Witness::Durable;
                self.go(State::Unlinking, Action::Unlink(Name::Bitmap))
            }
            State::Unlinking => self.go(State::SyncingFolder, Action::SyncFolder),
            State::SyncingFolder => {
                self.file_is_destroyed = Witness::Durable;
                self.conclude()
            }
            State::Before
            | State::ReadingMarker
            | State::ReadingFile
            | State::Collecting
            | State::Over => self.refuse(),
        }
    }

    /// The step of this state failed: the other witness decides.
    fn failed(&mut self) -> Action {
        match self.state {
            // What cannot be written can often still be removed: no marker is as good as one that says 'open'.
            State::OpeningMarker | State::SyncingMarker | State::SyncingMarkerName => {
                self.go(State::RemovingMarker, Action::Unlink(Name::Marker))
            }
            State::RemovingMarker | State::SyncingMarkerRemoval => self.consume(),
            State::Overwriting | State::SyncingFile => {
                self.go(State::Unlinking, Action::Unlink(Name::Bitmap))
            }
            State::Unlinking | State::SyncingFolder => self.conclude(),
            State::Before
            | State::ReadingMarker
            | State::ReadingFile
            | State::Collecting
            | State::Over => self.refuse(),
        }
    }

    /// Destroys the file. One that is not there needs no destroying once the marker says so; else it is made, so that
    /// destroying it proves that the folder can still be written: what was only read might not be on the disk.
    fn consume(&mut self) -> Action {
        if self.marker_says_open != Witness::Missing && self.situation.file == Found::Absent {
            self.file_is_destroyed = Witness::Durable;
            return self.conclude();
        }
        let consumed = bitmap_file::consumed(self.identity.volume, self.identity.life).to_vec();
        self.go(State::Overwriting, Action::Put(Name::Bitmap, consumed))
    }

    fn conclude(&mut self) -> Action {
        let witnesses = [self.marker_says_open, self.file_is_destroyed];
        let all = witnesses.iter().all(|w| *w == Witness::Durable);
        let none = witnesses.iter().all(|w| *w == Witness::Missing);
        let begun = match self.begun.take() {
            Some(begun) if all => begun,
            Some(begun @ Begun::Anew { .. }) if !none => begun,
            Some(Begun::Continued { .. }) if !none => Begun::Anew {
                reason: Reason::TrackingInterrupted,
                detail: "the state folder could not be written",
            },
            Some(Begun::Continued { .. } | Begun::Anew { .. }) | None => return self.refuse(),
        };
        self.go(State::Over, Action::Serve(begun))
    }

    fn refuse(&mut self) -> Action {
        self.go(State::Over, Action::Refuse)
    }

    fn go(&mut self, state: State, action: Action) -> Action {
        self.state = state;
        action
    }
}

/// What reading a file gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// There is no such file.
    Absent,
    /// It is there and could not be read.
    Unreadable,
    /// Its content.
    Content(Vec<u8>),
}

fn content(event: Event) -> Option<Found> {
    match event {
        Event::Content(Some(bytes)) => Some(Found::Content(bytes)),
        Event::Content(None) => Some(Found::Absent),
        Event::Failed => Some(Found::Unreadable),
        Event::Start | Event::Evidence(_) | Event::Done => None,
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests;
